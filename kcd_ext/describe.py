"""Short descriptions of values and errors, for messages: one line, never a whole tensor, array or container."""

import difflib
import sys
from collections.abc import Collection, Iterable

LENGTH = 60  # characters of a value that a message shows
ARRAYS = (("torch", "Tensor", "tensor"), ("numpy", "ndarray", "array"))


def describe(x: object) -> str:
    """Return the type of `x` and what it is, in one line: `int 3`, `str 'a'`, `list of length 2`, `class Tensor`.

    A tensor or array is described by its dtype and shape. A value longer than 60 characters is cut, and one that does not
    fit in a line is left out.
    """
    summary = _summary(x)
    if summary is not None:
        return summary
    value = brief(x)
    kind = "class" if isinstance(x, type) else type(x).__name__
    return value if value == kind or value.startswith(f"{kind}(") else f"{kind} {value}"


def brief(x: object) -> str:
    """Return `repr(x)` where it is short; of a longer one its beginning, of a tensor, array or container `describe(x)`.

    For messages in which the type of `x` is known.
    """
    summary = _summary(x)
    if summary is not None:
        return summary
    if isinstance(x, str):
        return repr(x) if len(x) <= LENGTH else f"{x[:LENGTH]!r}... ({len(x)} characters)"
    name = getattr(x, "__qualname__", None)
    if isinstance(name, str):  # a class or a function: what it is called says more than where it lies in memory
        return name
    try:
        value = repr(x)
    except Exception:  # an object of the caller's, or an int of more digits than Python writes
        return type(x).__name__
    if "\n" in value or value.startswith("<"):
        return type(x).__name__
    return value if len(value) <= LENGTH else f"{value[:LENGTH]}..."


def _summary(x: object) -> str | None:
    """Return dtype and shape of a tensor or array, type and length of a container, None for anything else."""
    for module, name, noun in ARRAYS:  # without importing either
        array = getattr(sys.modules.get(module), name, None)
        if array is not None and isinstance(x, array):
            try:
                article = "an" if str(x.dtype).startswith(("i", "o")) else "a"
                return f"{article} {x.dtype} {noun} of shape {tuple(x.shape)}"
            except Exception:  # a tensor that has no shape yet, or one of rows of several lengths
                return type(x).__name__
    if isinstance(x, Collection) and not isinstance(x, str | type):
        try:
            return f"{type(x).__name__} of length {len(x)}"
        except Exception:
            return type(x).__name__
    return None


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """Return `: did you mean X?` with the nearest of `names`, or nothing where none is near or `name` is no string.

    The last part of a name with dots is enough: keep is near to condense.keep.
    """
    if not isinstance(name, str):
        return ""
    names = list(names)
    by_form = {_form(other).rpartition(".")[2]: other for other in names} | {_form(other): other for other in names}
    nearest = difflib.get_close_matches(_form(name), by_form, n=1)
    return f": did you mean {by_form[nearest[0]]}?" if nearest else ""


def _form(name: str) -> str:
    """Return what spellings of one name have in common."""
    return name.lower().replace("_", "-").lstrip("-")


def one_line(error: BaseException) -> str:
    """Return the first line of its message, or two if that ends in a colon; torch adds a call stack to some."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def describe_error(error: BaseException) -> str:
    """Return its type and the first line of its message."""
    return f"{type(error).__name__}: {one_line(error)}"


def some(names: Iterable[str], limit: int = 4) -> str:
    """Join the first names for a message, and count the others."""
    names = [*names]
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
