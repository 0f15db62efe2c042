"""What this machine is: the facts beside every figure, and what a run needs that is not here."""

import importlib.util
import platform
import shutil

from harness.machine import commit, gpu, lines, processor


def missing(*, building: bool) -> list[str]:
    """What every section needs and this machine lacks, each with what to do.

    Args:
        building: whether kcd_ext's module is to be built.
    """
    lacks = [
        f"{tool} ({advice})"
        for tool, advice in (
            ("nvcc", "the CUDA toolkit; put its bin folder on PATH or name the toolkit in CUDA_HOME"),
            ("cmake", "pip install cmake"),
            ("ninja", "pip install ninja"),
        )
        if building and shutil.which(tool) is None
    ]
    if importlib.util.find_spec("torch") is None:
        return [*lacks, "PyTorch for CUDA (pip install torch, or name another Python in the variable PYTHON)"]
    import torch

    if not torch.cuda.is_available():
        lacks.insert(0, f"an NVIDIA GPU that PyTorch {torch.__version__} can use (see nvidia-smi)")
    return lacks


def facts() -> dict[str, object]:
    """The GPU, its software and the code that runs: what it is -> what was found."""
    return {
        **gpu(),
        "nvcc": next((x for x in lines("nvcc", "--version") if "release" in x), None),
        "cmake": next(iter(lines("cmake", "--version")), None),
        "Python": platform.python_version(),
        "processor": processor(),
        "system": platform.platform(),
        "commit": commit(),
    }
