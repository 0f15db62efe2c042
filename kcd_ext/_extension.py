"""Loads the compiled operators: the Python module `_C`, or a `libkcd_ext.so` built by plain cmake and named by KCD_LIBRARY."""

import ctypes
import importlib
import json
import os
import pathlib
from types import ModuleType

import torch

MINIMUM_TORCH = (2, 10)


def _check_torch() -> None:
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < MINIMUM_TORCH:
        raise ImportError(
            f"kcd_ext needs PyTorch {'.'.join(map(str, MINIMUM_TORCH))} or newer, found {torch.__version__}: pip install -U torch"
        )


def _load_library(path: str) -> dict:
    torch.ops.load_library(path)
    library = ctypes.CDLL(path)
    for function in (library.kcd_load_error, library.kcd_build_info):
        function.restype = ctypes.c_char_p
    error = library.kcd_load_error().decode()
    if error:
        raise ImportError(f"{path}: {error}")
    return json.loads(library.kcd_build_info())


def load() -> tuple[dict, ModuleType | None]:
    """Registers torch.ops.kcd_ext.*.

    Returns:
        The build's facts, as `kcd_ext._C.build_info()` gives them, and the module, where it has the functions of csrc/small.h.
    """
    _check_torch()
    if path := os.environ.get("KCD_LIBRARY"):
        return _load_library(path), None
    try:
        module = importlib.import_module(f"{__package__}._C")
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}._C":
            raise
        here = pathlib.Path(__file__).parent
        if (here.parent / "csrc").is_dir():
            raise ImportError(
                f"{here} is kcd_ext's source folder, which holds no compiled extension. Run Python in another folder, where the"
                " installed package is found, or install in place: pip install -e ."
            ) from None
        raise ImportError(
            f"{here} holds no compiled extension for this Python: the installation is incomplete or was made for another"
            " version of Python; install kcd_ext again with this one's pip"
        ) from None
    return module.build_info(), module if hasattr(module, "small_forward") else None
