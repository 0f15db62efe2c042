"""Facts about this machine for the report, and the requirements that it lacks."""

import importlib.util
import platform
import shutil

from harness.machine import commit, gpu, lines, processor


def missing(*, building: bool) -> list[str]:
    """Return the requirements of all sections that this machine lacks, each with advice.

    Args:
        building: whether kcd_ext's module must be built.
    """
    absent = [
        f"{tool} ({advice})"
        for tool, advice in (
            ("nvcc", "the CUDA toolkit; put its bin folder on PATH, or set CUDA_HOME to the toolkit"),
            ("cmake", "pip install cmake"),
            ("ninja", "pip install ninja"),
        )
        if building and shutil.which(tool) is None
    ]
    if importlib.util.find_spec("torch") is None:
        return [
            *absent,
            "PyTorch for CUDA (pip install torch, or set the environment variable PYTHON to another Python)",
        ]
    import torch

    if not torch.cuda.is_available():
        absent.insert(0, f"an NVIDIA GPU that PyTorch {torch.__version__} can use (see nvidia-smi)")
    return absent


def facts() -> dict[str, object]:
    """Return facts about the GPU, the software and the code, by name."""
    return {
        **gpu(),
        "nvcc": next((x for x in lines("nvcc", "--version") if "release" in x), None),
        "cmake": next(iter(lines("cmake", "--version")), None),
        "Python": platform.python_version(),
        "processor": processor(),
        "system": platform.platform(),
        "commit": commit(),
    }
