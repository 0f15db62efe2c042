"""Loads the compiled operators: the module `_C`, the package's own or one that the environment variable KCD_LIBRARY names."""

import hashlib
import importlib
import importlib.util
import os
import pathlib
import sys
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

import torch

MINIMUM_TORCH = (2, 10)
_NAME = f"{__package__}._C"
_HERE = pathlib.Path(__file__).parent
_SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}


def _check_torch() -> None:
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < MINIMUM_TORCH:
        raise ImportError(
            f"kcd_ext needs PyTorch {'.'.join(map(str, MINIMUM_TORCH))} or newer, found {torch.__version__}: pip install -U torch"
        )


def load() -> ModuleType:
    """Return the compiled module; importing it registers torch.ops.kcd_ext.*."""
    _check_torch()
    if path := os.environ.get("KCD_LIBRARY"):
        return _module_at(path)
    module = _own_module() or _installed_module()
    sources = _sources_beside(_HERE)
    if sources is not None and module.build_info().get("sources") != _hash_of(sources):
        raise ImportError(f"{sources} has changed since kcd_ext was installed: run pip install again")
    return module


def _module_at(path: str) -> ModuleType:
    """Import a compiled module from any place."""
    spec = importlib.util.spec_from_file_location(_NAME, path)
    if spec is None or not os.path.isfile(path):
        raise ImportError(f"KCD_LIBRARY must name a compiled module of kcd_ext, such as build/_C.*.so, got {path!r}")
    return _run(spec)


def _own_module() -> ModuleType | None:
    """Import `_C` from this package; None in a clone of the repository, whose folder `kcd_ext` holds sources alone."""
    try:
        return importlib.import_module(_NAME)
    except ModuleNotFoundError as error:
        if error.name != _NAME:
            raise
    if _sources_beside(_HERE) is not None:
        return None
    raise ImportError(
        f"{_HERE} holds no compiled extension for this Python: the installation is incomplete or was made for another"
        " version of Python; install kcd_ext again with this one's pip"
    )


def _installed_module() -> ModuleType:
    """Import `_C` from where kcd_ext is installed: a clone is the current folder, which Python searches first.

    Raises:
        ImportError: kcd_ext is not installed for this Python.
    """
    try:
        site = metadata.distribution("kcd-ext").locate_file("")
        found = PathFinder.find_spec(_NAME, [str(pathlib.Path(site, __package__))])
    except metadata.PackageNotFoundError:
        found = None
    if found is None:
        raise ImportError(
            f"{_HERE} holds sources, and kcd_ext is not installed for this Python: run pip install . first"
        )
    return _run(found)


def _run(spec: ModuleSpec) -> ModuleType:
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[_NAME] = sys.modules[__package__]._C = module
    return module


def _sources_beside(package: pathlib.Path) -> pathlib.Path | None:
    """Return csrc/ of a clone; None where the package is installed, even if another package has left a csrc/ there."""
    sources = package.parent / "csrc"
    return sources if (sources / "math" / "row_stats.h").is_file() else None


def _hash_of(sources: pathlib.Path) -> str:
    """Return what csrc/CMakeLists.txt makes of the same files."""
    files = (path for path in sources.rglob("*") if path.suffix in _SUFFIXES and not path.name.startswith("."))
    lines = {path.relative_to(sources).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return hashlib.sha256("".join(f"{file} {lines[file]}\n" for file in sorted(lines)).encode()).hexdigest()[:16]
