"""One-line descriptions of values and errors for messages. They never print the contents of a tensor, array or container."""

import difflib
import sys
from collections.abc import Collection, Iterable

MAX_LENGTH = 60  # characters of a value that a message shows
_ARRAY_TYPES = (("torch", "Tensor", "tensor"), ("numpy", "ndarray", "array"))


def describe(x: object) -> str:
    """Return type and value of `x` in one line: `int 3`, `str 'a'`, `list of length 2`, `class Tensor`.

    Tensors and arrays are described by dtype and shape. Values are truncated after 60 characters, and omitted if their repr has
    several lines.
    """
    summary = _summary(x)
    if summary is not None:
        return summary
    value = brief(x)
    kind = "class" if isinstance(x, type) else type(x).__name__
    return value if value == kind or value.startswith(f"{kind}(") else f"{kind} {value}"


def brief(x: object) -> str:
    """Return `repr(x)`, truncated after 60 characters, or `describe(x)` for a tensor, array or container.

    Use it in messages that need not mention the type of `x`.
    """
    summary = _summary(x)
    if summary is not None:
        return summary
    if isinstance(x, str):
        return repr(x) if len(x) <= MAX_LENGTH else f"{x[:MAX_LENGTH]!r}... ({len(x)} characters)"
    name = getattr(x, "__qualname__", None)
    if isinstance(name, str):  # a class or a function, whose repr contains an address
        return name
    try:
        value = repr(x)
    except Exception:  # a user's object, or an int with more digits than Python prints
        return type(x).__name__
    if "\n" in value or value.startswith("<"):
        return type(x).__name__
    return value if len(value) <= MAX_LENGTH else f"{value[:MAX_LENGTH]}..."


def _summary(x: object) -> str | None:
    """Return dtype and shape of a tensor or array, type and length of a container, or None for anything else."""
    for module, name, noun in _ARRAY_TYPES:  # looked up in sys.modules, to import neither
        array = getattr(sys.modules.get(module), name, None)
        if array is not None and isinstance(x, array):
            try:
                article = "an" if str(x.dtype).startswith(("i", "o")) else "a"
                return f"{article} {x.dtype} {noun} of shape {tuple(x.shape)}"
            except Exception:  # a lazy tensor without a shape, or a nested one
                return type(x).__name__
    if isinstance(x, Collection) and not isinstance(x, str | type):
        try:
            return f"{type(x).__name__} of length {len(x)}"
        except Exception:
            return type(x).__name__
    return None


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """Return `: did you mean X?` for the nearest of `names`, or "" if none is near or `name` is not a string.

    The last part of a dotted name is enough: `keep` is near `condense.keep`.
    """
    if not isinstance(name, str):
        return ""
    names = list(names)
    by_spelling = {_normalise(other).rpartition(".")[2]: other for other in names} | {
        _normalise(other): other for other in names
    }
    nearest = difflib.get_close_matches(_normalise(name), by_spelling, n=1)
    return f": did you mean {by_spelling[nearest[0]]}?" if nearest else ""


def _normalise(name: str) -> str:
    """Return the form that all spellings of a name share."""
    return name.lower().replace("_", "-").lstrip("-")


def one_line(error: BaseException) -> str:
    """Return the first line of the error's message, or two if it ends in a colon. torch appends a call stack to some errors."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def describe_error(error: BaseException) -> str:
    """Return the error's type and the first line of its message."""
    return f"{type(error).__name__}: {one_line(error)}"


def join_names(names: Iterable[str], limit: int = 4) -> str:
    """Return the first `limit` names and the number of the others, for a message."""
    names = [*names]
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
