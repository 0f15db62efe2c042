"""The options of a method, read from its signature and docstring for `--help`."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..describe import brief

ENTRY = re.compile(r"(\w+(?:, \w+)*)(?: \([^)]*\))?: (.*)")  # an entry of `Args:`: one or more names, then the text


@dataclass(frozen=True)
class Option:
    """An option of a method."""

    name: str
    default: str
    """The default, as the command line takes it; empty for `**kwargs`."""
    text: str
    """The entry in the docstring; empty if there is none."""


def options_of(parameters: Mapping[str, inspect.Parameter], method: object) -> list[Option]:
    """Return an `Option` for each parameter of a method, in the order of its signature."""
    texts = arguments_of(method)
    return [
        Option(name if p.kind is not p.VAR_KEYWORD else "...", _default(p), texts.get(name, ""))
        for name, p in parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY, p.VAR_KEYWORD)
    ]


def arguments_of(method: object) -> dict[str, str]:
    """Return the entries of the docstring's `Args` section: name -> text on one line.

    Read the docstring of the class or function. If it has no such section, read that of the class's `__init__`.
    """
    for documented in (method, getattr(method, "__init__", None)):
        _, found, section = (inspect.getdoc(documented) or "").partition("Args:\n")
        if found:
            return _entries(section)
    return {}


def _entries(section: str) -> dict[str, str]:
    entries: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if line and not line.startswith(" "):  # the next section starts
            break
        entry = ENTRY.fullmatch(line.strip())
        if entry and len(line) - len(line.lstrip()) == 4:
            names = entry[1].split(", ")
            entries |= dict.fromkeys(names, entry[2])
        elif line.strip():
            entries |= {name: f"{entries[name]} {line.strip()}" for name in names}
        else:
            names = []
    return entries


def _default(parameter: inspect.Parameter) -> str:
    if parameter.kind is parameter.VAR_KEYWORD:
        return ""
    if parameter.default is parameter.empty:
        return "(required)"
    if isinstance(parameter.default, tuple | list):
        return ",".join(map(str, parameter.default))
    return brief(parameter.default).strip("'") or "''"
