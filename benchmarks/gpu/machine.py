"""What this machine is: the facts beside every figure, and what a run needs that is not here."""

import importlib.util
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def missing() -> list[str]:
    """What every section needs and this machine lacks, each with what to do."""
    lacks = [
        f"{tool} ({advice})"
        for tool, advice in (
            ("nvcc", "the CUDA toolkit; put its bin folder on PATH or name the toolkit in CUDA_HOME"),
            ("cmake", "pip install cmake"),
            ("ninja", "pip install ninja"),
        )
        if shutil.which(tool) is None
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
        "nvcc": next((x for x in _lines("nvcc", "--version") if "release" in x), None),
        "cmake": next(iter(_lines("cmake", "--version")), None),
        "python": platform.python_version(),
        "triton": version("triton"),
        "liger_kernel": version("liger-kernel"),
        "processor": _processor(),
        "platform": platform.platform(),
        "commit": next(
            iter(_lines("git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12")), None
        ),
    }


def nvidia_smi(field: str) -> str | None:
    """One field of `nvidia-smi --query-gpu` of the GPU that torch calls 0, without unit; None where it does not answer."""
    import torch

    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)  # torch's numbering need not be nvidia-smi's
    chosen = [] if uuid is None else ["-i", f"GPU-{uuid}"]
    for selection in (chosen, []):
        lines = _lines("nvidia-smi", *selection, f"--query-gpu={field}", "--format=csv,noheader,nounits")
        if lines:
            return lines[0].strip()
    return None


def version(package: str) -> str | None:
    """The installed version of a distribution, None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _lines(*command: str) -> list[str]:
    """What a command prints; nothing where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} × {models[0]}" if models else platform.machine()
