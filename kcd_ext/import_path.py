"""The folder from which commands import the user's `module:function`. Other imports never see it."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_folder: ContextVar[str | None] = ContextVar("folder of the user's modules", default=None)


@contextmanager
def searching(folder: str) -> Iterator[None]:
    """Let `resolving` import modules from `folder`, and let these modules import each other at any time.

    Installed modules take precedence. Imports of other packages do not see the folder: torch and accelerate probe for many
    optional packages, and a user's file of the same name must not run. The previous state returns at the end, also after an error.
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
    """Append the folder of `searching` to `sys.path`, also for processes started inside. A no-op outside `searching`."""
    folder = _folder.get()
    if folder is None:
        yield
        return
    entry = "".join(folder)  # a new object, so that `is` distinguishes it from equal entries
    sys.path.append(entry)
    try:
        yield
    finally:
        sys.path[:] = [other for other in sys.path if other is not entry]


class _Siblings:
    """A finder of modules in a folder, for imports by modules of the same folder (for example inside a function)."""

    def __init__(self, folder: str):
        self._folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's spec if both it and the importing module are in the folder, else None."""
        if path is not None or not self._contains(_importer()):
            return None
        return PathFinder.find_spec(name, [self._folder], target)

    def _contains(self, module: str) -> bool:
        """Return whether a top-level module or package is directly in the folder, not in a .venv below it."""
        spec = getattr(sys.modules.get(module), "__spec__", None)
        if spec is None:
            return False
        paths = spec.submodule_search_locations or [spec.origin or ""]
        return any(os.path.dirname(path) == self._folder for path in paths)


def _importer() -> str:
    """Return the top-level name of the module that is executing the import."""
    frame = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        if name != __name__ and name.partition(".")[0] != "importlib":
            return name.partition(".")[0]
        frame = frame.f_back
    return ""
