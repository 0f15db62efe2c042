"""Facts about this machine. Functions import torch only when they need it."""

import json
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def slug(name: str) -> str:
    """Return a name in a form that suits a file name."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def version(package: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def lines(*command: str) -> list[str]:
    """Return the lines that a command prints; an empty list if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _cpuinfo(field: str) -> list[str]:
    """Return a field of /proc/cpuinfo for every processor; an empty list if the system does not report it."""
    info = Path("/proc/cpuinfo")
    pairs = (line.partition(":") for line in info.read_text().splitlines()) if info.exists() else ()
    return [value.strip() for name, _, value in pairs if name.strip() == field]


def processors() -> list[str]:
    """Return the model of every processor; an empty list if the system does not report it.

    Includes family and model numbers, because virtual machines use one name for processors of different generations.
    """
    numbers = zip(_cpuinfo("cpu family"), _cpuinfo("model"), strict=True)
    generations = [f" (family {family}, model {model})" for family, model in numbers]
    names = _cpuinfo("model name")
    return [name + generation for name, generation in zip(names, generations or [""] * len(names), strict=True)]


def processor() -> str:
    """Return the number of processors and their model."""
    models = processors()
    return f"{len(models)} × {models[0]}" if models else platform.machine()


def commit() -> str | None:
    """Return the checkout's commit, with "-dirty" if files differ from it."""
    return next(iter(lines("git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12")), None)


def nvidia_smi(field: str) -> str | None:
    """Return one field of `nvidia-smi --query-gpu` for torch's GPU 0, without unit; None if nvidia-smi fails."""
    import torch

    # torch and nvidia-smi may number GPUs differently.
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    chosen = [] if uuid is None else ["-i", f"GPU-{uuid}"]
    for selection in (chosen, []):
        found = lines("nvidia-smi", *selection, f"--query-gpu={field}", "--format=csv,noheader,nounits")
        if found:
            return found[0].strip()
    return None


def gpu() -> dict[str, object]:
    """Return facts about torch's GPU 0 and its software: name -> fact, or None if unknown."""
    import torch

    found = torch.cuda.get_device_properties(0)
    return {
        "GPU": found.name,
        "compute capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory, bytes": found.total_memory,
        "L2 cache, bytes": found.L2_cache_size,
        "driver": nvidia_smi("driver_version"),
        "torch": torch.__version__,
        "Triton": version("triton"),
        "Liger-Kernel": version("liger-kernel"),
    }


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically, because another process may read the file at any moment."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)
