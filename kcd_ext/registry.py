"""Names for things that live elsewhere: a short one, or `module:attribute` for what this package never heard of."""

import importlib
from collections.abc import Iterable, Mapping
from contextlib import nullcontext

from .describe import brief, describe, describe_error, did_you_mean
from .import_path import resolving


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
        raise TypeError(f"{kind} must be a name or module:attribute, got {describe(name)}")
    module_name, colon, attribute = registry.get(name, name).partition(":")
    if not colon or not module_name or not attribute:
        raise unknown(kind, name, sorted(registry), "write module:attribute")
    try:
        with nullcontext() if name in registry else resolving():
            found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, something that it imports is not
        raise ValueError(f"{kind} {name!r}: there is no module {error.name!r}") from error
    except ImportError:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"{kind} {name!r}: import of {module_name} raised {describe_error(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{kind} {name!r}: {module_name!r} has no {attribute!r}{did_you_mean(part, dir(found))}")
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
        with nullcontext() if name in registry else resolving():
            return function(**arguments)
    except (TypeError, ValueError, ImportError, OSError):
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"{kind} {name!r} raised {describe_error(error)}") from error


def unknown(
    kind: str, name: str, names: Iterable[str], otherwise: str = "", variants: Iterable[str] = ()
) -> ValueError:
    """Return the error for a name that is none of `names`: which one is nearest, all of them, and what else is taken.

    `variants` of the names are not listed, but may be the nearest.
    """
    names = list(names)
    nearest = did_you_mean(name, [*names, *variants])
    others = ", ".join(names) + (f", or {otherwise}" if otherwise else "")
    return ValueError(f"unknown {kind} {brief(name)}{f'{nearest} Else' if nearest else ':'} take {others}")
