"""The CUDA operators executed on the CPU, instead of the CPU's operators."""

import contextlib
import functools
import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

from kcd_ext import ops

from . import build

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
OPERATORS = (
    "condensed_kd",
    "condensed_kd_backward",
    "condensed_kd_backward_",
    "row_stats",
    "select_topk",
    "reduce_rows",
)
MACHINE = (4, 256)  # multiprocessors, threads per block: few, so that small inputs reach every code path


@functools.cache
def module() -> ModuleType:
    """Build and import the module that registers `torch.ops.kcd_ext_simt`."""
    import pybind11

    sources = [
        Path(__file__).with_name("module.cpp"),
        SOURCES / "torch" / "cuda_ops.cpp",
        SOURCES / "cuda" / "launch.cu",
    ]
    library = Path(torch.__file__).parent / "lib"
    include = [SOURCES, pybind11.get_include(), sysconfig.get_path("include")]
    built = build.compile("plain", sources, include, [], "module", [f"-L{library}", "-ltorch", "-ltorch_cpu"])
    spec = importlib.util.spec_from_file_location("module", built)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@contextlib.contextmanager
def in_place(machine: tuple[int, int] = MACHINE, schedule: tuple[str, int, int] = ("forward", 1, 1)) -> Iterator[None]:
    """Make kcd_ext call the CUDA operators for CPU tensors.

    Args:
        machine: multiprocessors and threads per block.
        schedule: order of the CUDA threads, seed, resident blocks.
    """
    module().set_device(*machine)
    module().set_schedule(*schedule)
    operators = {name: getattr(torch.ops.kcd_ext_simt, name).default for name in OPERATORS}
    with mock.patch.multiple(ops, **operators, HAS_FAST_PATH=False, supports_gradient_in_forward=lambda logits: False):
        yield
