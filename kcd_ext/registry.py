"""Names for things that live elsewhere: a short one, or `module:attribute` for what this package never heard of."""

import importlib
from collections.abc import Mapping


def resolve(kind: str, name: str, registry: Mapping[str, str]) -> object:
    """The object that `name` stands for; its module is imported only now.

    Args:
        kind: what is looked up, as it reads in an error message ("data set", "model").
        name: a key of `registry`, or `module:attribute` itself.
        registry: short name -> `module:attribute`.

    Raises:
        TypeError: `name` is no string.
        ValueError: `name` is unknown, or its module or attribute does not exist, or its module fails when imported.
        ImportError: the module exists and needs another one that is not installed.
    """
    if not isinstance(name, str):
        raise TypeError(f"{kind} must be a name or module:attribute, got {type(name).__name__} {name!r}")
    module_name, colon, attribute = registry.get(name, name).partition(":")
    if not colon or not module_name or not attribute:
        raise ValueError(f"unknown {kind} {name!r}: take {', '.join(sorted(registry))}, or write module:attribute")
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, something that it imports is not
        raise ValueError(f"{kind} {name!r}: there is no module {error.name!r}") from error
    except ImportError:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"{kind} {name!r}: import of {module_name} raised {_told(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{kind} {name!r}: {module_name!r} has no {attribute!r}")
        found = getattr(found, part)
    return found


def call(kind: str, name: str, registry: Mapping[str, str], /, **arguments: object) -> object:
    """What the callable that `name` stands for returns for these arguments.

    Raises:
        TypeError, ValueError, ImportError, OSError: as `resolve`, or as the callable does.
        ValueError: the callable, which can be anybody's, raised anything else; says what.
    """
    function = resolve(kind, name, registry)
    try:
        return function(**arguments)
    except (TypeError, ValueError, ImportError, OSError):
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"{kind} {name!r} raised {_told(error)}") from error


def one_line(error: BaseException) -> str:
    """The first line of its message; torch adds a call stack to some."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
