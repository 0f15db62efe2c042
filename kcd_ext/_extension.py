"""The loader of the compiled operators: the package's module `_C`, or the one that the environment variable KCD_LIBRARY names."""

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
_MODULE_NAME = f"{__package__}._C"
_PACKAGE_FOLDER = pathlib.Path(__file__).parent
_SOURCE_SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}


def _check_torch() -> None:
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < MINIMUM_TORCH:
        raise ImportError(
            f"kcd_ext needs PyTorch {'.'.join(map(str, MINIMUM_TORCH))} or newer, found {torch.__version__}: pip install -U torch"
        )


def load() -> ModuleType:
    """Load and return the compiled module, which registers `torch.ops.kcd_ext.*`.

    Raises:
        ImportError: torch is too old, no module fits this Python, or the sources of a clone have changed since the build.
    """
    _check_torch()
    if path := os.environ.get("KCD_LIBRARY"):
        return _load_from_path(path)
    module = _load_from_package() or _load_from_installation()
    sources = _sources_beside(_PACKAGE_FOLDER)
    if sources is not None and module.build_info().get("sources") != _hash_of(sources):
        raise ImportError(f"{sources} has changed since kcd_ext was installed: run pip install again")
    return module


def _load_from_path(path: str) -> ModuleType:
    """Load a compiled module from a path."""
    spec = importlib.util.spec_from_file_location(_MODULE_NAME, path)
    if spec is None or not os.path.isfile(path):
        raise ImportError(f"KCD_LIBRARY must name a compiled module of kcd_ext, such as build/_C.*.so, got {path!r}")
    return _execute(spec)


def _load_from_package() -> ModuleType | None:
    """Load `_C` from this package. Return None in a clone of the repository, whose `kcd_ext` contains only sources."""
    try:
        return importlib.import_module(_MODULE_NAME)
    except ModuleNotFoundError as error:
        if error.name != _MODULE_NAME:
            raise
    if _sources_beside(_PACKAGE_FOLDER) is not None:
        return None
    raise ImportError(
        f"{_PACKAGE_FOLDER} has no compiled extension for this Python: the installation is incomplete or belongs to another"
        " version of Python; install kcd_ext again with the pip of this Python"
    )


def _load_from_installation() -> ModuleType:
    """Load `_C` from the installed kcd_ext. Python searches the current folder, a clone, first.

    Raises:
        ImportError: kcd_ext is not installed for this Python.
    """
    try:
        site = metadata.distribution("kcd-ext").locate_file("")
        found = PathFinder.find_spec(_MODULE_NAME, [str(pathlib.Path(site, __package__))])
    except metadata.PackageNotFoundError:
        found = None
    if found is None:
        raise ImportError(
            f"{_PACKAGE_FOLDER} contains only sources, and kcd_ext is not installed for this Python: run pip install . first"
        )
    return _execute(found)


def _execute(spec: ModuleSpec) -> ModuleType:
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[_MODULE_NAME] = sys.modules[__package__]._C = module
    return module


def _sources_beside(package: pathlib.Path) -> pathlib.Path | None:
    """Return csrc/ of a clone, or None for an installed package, even if another package has installed a csrc/ there."""
    sources = package.parent / "csrc"
    return sources if (sources / "math" / "row_stats.h").is_file() else None


def _hash_of(sources: pathlib.Path) -> str:
    """Return the hash that csrc/CMakeLists.txt computes of these files."""
    files = (path for path in sources.rglob("*") if path.suffix in _SOURCE_SUFFIXES and not path.name.startswith("."))
    lines = {path.relative_to(sources).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return hashlib.sha256("".join(f"{file} {lines[file]}\n" for file in sorted(lines)).encode()).hexdigest()[:16]
