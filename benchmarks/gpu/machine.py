"""What this machine is: the facts beside every figure, and what a run needs that is not here."""

import importlib.util
import platform
import shutil

from harness.machine import commit, lines, nvidia_smi, processor, version


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
    import torch

    gpu = torch.cuda.get_device_properties(0)
    return {
        "gpu": gpu.name,
        "compute_capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory_bytes": gpu.total_memory,
        "l2_bytes": gpu.L2_cache_size,
        "driver": nvidia_smi("driver_version"),
        "torch": torch.__version__,
        "nvcc": next((x for x in lines("nvcc", "--version") if "release" in x), None),
        "cmake": next(iter(lines("cmake", "--version")), None),
        "python": platform.python_version(),
        "triton": version("triton"),
        "liger_kernel": version("liger-kernel"),
        "processor": processor(),
        "platform": platform.platform(),
        "commit": commit(),
    }
