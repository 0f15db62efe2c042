"""Facts about this environment, for bug reports and the configuration of runs. Imports only torch and NumPy."""

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import numpy
import torch

from .ops import build_info

# Optional packages: networks, data sets, export, logs, loops.
LIBRARIES = (
    "timm",
    "torchvision",
    "transformers",
    "datasets",
    "onnx",
    "onnxruntime",
    "tensorboard",
    "lightning-fabric",
)
MAX_THREADS = 4096  # the largest number of torch threads that options accept


def versions() -> dict[str, str]:
    """Return the versions of this package and of the packages that affect its results."""
    return {
        "kcd_ext": build_info["version"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "accelerate": _version("accelerate"),
    }


def facts() -> dict[str, str]:
    """Return everything that `kcd info` prints, in order: name -> fact."""
    build = {name.replace("_", " ").replace("cuda", "CUDA"): _to_text(fact) for name, fact in build_info.items()}
    if not build_info["cuda_architectures"]:
        build["CUDA compiler"] = "none: built without nvcc, on a GPU kcd_ext.reference takes the kernels' place"
    return {
        **versions(),
        **{package: _version(package) for package in LIBRARIES},
        **{name: fact for name, fact in build.items() if name != "version"},
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors, {len(usable_processors())} usable",
        "torch CUDA": torch.version.cuda or "none, a build for the CPU",
        "CUDA driver": _cuda_driver(),
        "CUDA devices": _cuda_devices(),
        "executable": sys.executable,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _to_text(value: object) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value)


def usable_processors() -> set[int]:
    """Return the numbers of the processors that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def available_memory() -> int:
    """Return how many bytes of memory are available to new work on this machine, at most the limit of the container.

    Without Linux's figures it is the size of the physical memory.
    """
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in _read_lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found.append(1024 * int(line.split()[1]))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        found += [int(line) for line in _read_lines(limit) if line.isdecimal()]  # "max": no limit
    return min(found)


def _read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _processor() -> str:
    """Return the name of the processor model, if Linux provides it."""
    for line in _read_lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cuda_driver() -> str:
    """Query the driver directly, because a CPU build of torch cannot."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no driver"
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return "found, but does not respond"
    return f"for CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def _cuda_devices() -> str:
    if not torch.cuda.is_available():
        return "none that this torch can use"
    names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return "; ".join(f"{p.name}, compute capability {p.major}.{p.minor}" for p in names)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Set torch's number of threads inside the context. None leaves it unchanged."""
    previous = torch.get_num_threads()
    torch.set_num_threads(previous if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
