"""Where a command finds the user's `module:function`: in a folder that nothing else is imported from."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_folder: ContextVar[str | None] = ContextVar("the folder with the user's modules", default=None)


@contextmanager
def searching(folder: str) -> Iterator[None]:
    """Let `resolving` find modules in `folder`, and those modules import each other whenever they run.

    Installed modules come first. Nobody else's imports reach the folder: torch and accelerate probe for many packages
    that are usually not installed, and a file that happens to have such a name is not executed. Everything is as before
    at the end, also after an error.
    """
    token, finder = _folder.set(folder), _Siblings(folder)
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path[:] = [other for other in sys.meta_path if other is not finder]
        _folder.reset(token)


@contextmanager
def resolving() -> Iterator[None]:
    """Put the folder of `searching` at the end of `sys.path`, for processes that are started inside too; nothing without one."""
    folder = _folder.get()
    if folder is None:
        yield
        return
    entry = "".join(folder)  # a string of our own, told from equal ones by its identity
    sys.path.append(entry)
    try:
        yield
    finally:
        sys.path[:] = [other for other in sys.path if other is not entry]


class _Siblings:
    """Find modules of a folder for modules of the same folder, as where a `forward` imports what it needs."""

    def __init__(self, folder: str):
        self._folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's spec if it is in the folder and the importing module is so too, else None."""
        if path is not None or not self._has(_importer()):
            return None
        return PathFinder.find_spec(name, [self._folder], target)

    def _has(self, module: str) -> bool:
        """Whether a top-level module, or a package, was found in the folder itself: not in a .venv below it."""
        spec = getattr(sys.modules.get(module), "__spec__", None)
        if spec is None:
            return False
        places = spec.submodule_search_locations or [spec.origin or ""]
        return any(os.path.dirname(place) == self._folder for place in places)


def _importer() -> str:
    """Return the top-level name of the module whose code imports something at this moment."""
    frame = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        if name != __name__ and name.partition(".")[0] != "importlib":
            return name.partition(".")[0]
        frame = frame.f_back
    return ""
