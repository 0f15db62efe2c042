"""What this machine is.  Nothing of torch is imported before it is asked for."""

import json
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def slug(name: str) -> str:
    """A name as a file's."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def version(package: str) -> str | None:
    """The installed version of a distribution, None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def lines(*command: str) -> list[str]:
    """What a command prints; nothing where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _cpuinfo(field: str) -> list[str]:
    """A field of every processor that the system has; empty where it does not tell."""
    info = Path("/proc/cpuinfo")
    pairs = (line.partition(":") for line in info.read_text().splitlines()) if info.exists() else ()
    return [value.strip() for name, _, value in pairs if name.strip() == field]


def processors() -> list[str]:
    """The model of every processor that the system has; empty where it does not tell.

    With its numbers: virtual machines call processors of different generations by one name.
    """
    numbers = zip(_cpuinfo("cpu family"), _cpuinfo("model"), strict=True)
    generations = [f" (family {family}, model {model})" for family, model in numbers]
    names = _cpuinfo("model name")
    return [name + generation for name, generation in zip(names, generations or [""] * len(names), strict=True)]


def processor() -> str:
    """How many processors of which model."""
    models = processors()
    return f"{len(models)} × {models[0]}" if models else platform.machine()


def commit() -> str | None:
    """The checkout's, with "-dirty" where files differ from it."""
    return next(iter(lines("git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12")), None)


def nvidia_smi(field: str) -> str | None:
    """One field of `nvidia-smi --query-gpu` of the GPU that torch calls 0, without unit; None where it does not answer."""
    import torch

    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)  # torch's numbering need not be nvidia-smi's
    chosen = [] if uuid is None else ["-i", f"GPU-{uuid}"]
    for selection in (chosen, []):
        found = lines("nvidia-smi", *selection, f"--query-gpu={field}", "--format=csv,noheader,nounits")
        if found:
            return found[0].strip()
    return None


def gpu() -> dict[str, object]:
    """Return facts about the GPU that torch calls 0 and the software that drives it: name -> fact, None where not known."""
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
    """Whole or not at all: what reads it may come at any moment."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)
