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
        ValueError: `name` is unknown, or its module or attribute does not exist.
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
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{kind} {name!r}: {module_name!r} has no {attribute!r}")
        found = getattr(found, part)
    return found
