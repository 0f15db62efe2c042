"""Lookup of objects by name: a registered short name, or `module:attribute` for the user's code."""

import importlib
from collections.abc import Iterable, Mapping
from contextlib import nullcontext

from .describe import brief, describe, describe_error, did_you_mean
from .import_path import resolving


def resolve(kind: str, name: str, registry: Mapping[str, str]) -> object:
    """Import and return the object that `name` stands for.

    Args:
        kind: Kind of the object, for error messages ("data set", "model").
        name: A key of `registry`, or `module:attribute`.
        registry: Maps short names to `module:attribute`.

    Returns:
        The object.

    Raises:
        TypeError: `name` is not a string.
        ValueError: `name` is unknown, its module or attribute does not exist, or its module fails on import.
        ImportError: The module exists, but needs another one that is not installed.
    """
    if not isinstance(name, str):
        raise TypeError(f"{kind} must be a name or module:attribute, got {describe(name)}")
    module_name, colon, attribute = registry.get(name, name).partition(":")
    if not colon or not module_name or not attribute:
        raise unknown_name_error(kind, name, sorted(registry), "write module:attribute")
    try:
        with nullcontext() if name in registry else resolving():
            found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, but one of its own imports does not
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


def call(kind: str, name: str, registry: Mapping[str, str], /, *positional: object, **arguments: object) -> object:
    """Call the callable that `name` stands for, and return its result.

    Args:
        kind: Kind of the object, for error messages.
        name: A key of `registry`, or `module:attribute`.
        registry: Maps short names to `module:attribute`.
        *positional: Positional arguments of the callable.
        **arguments: Keyword arguments of the callable.

    Returns:
        The result of the call.

    Raises:
        TypeError: As `resolve`, or raised by the callable; likewise ImportError and OSError.
        ValueError: As `resolve`, or raised by the callable. Any other error of the callable becomes one that names it.
    """
    function = resolve(kind, name, registry)
    if not callable(function):
        raise TypeError(f"{kind} {name!r} must be callable, got {describe(function)}")
    try:
        with nullcontext() if name in registry else resolving():
            return function(*positional, **arguments)
    except (TypeError, ValueError, ImportError, OSError):
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"{kind} {name!r} raised {describe_error(error)}") from error


def unknown_name_error(
    kind: str, name: str, names: Iterable[str], otherwise: str = "", variants: Iterable[str] = ()
) -> ValueError:
    """Return the error for an unknown name. It suggests the nearest name, lists all names, and mentions `otherwise`.

    `variants` are not listed, but may be suggested.
    """
    names = list(names)
    nearest = did_you_mean(name, [*names, *variants])
    others = ", ".join(names) + (f", or {otherwise}" if otherwise else "")
    return ValueError(f"unknown {kind} {brief(name)}{f'{nearest} Choose' if nearest else ': choose'} from {others}")
