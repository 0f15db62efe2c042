"""The number of torch's CPU threads that a command uses by default."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .. import processes
from ..data.images import LabelledImages
from ..environment import usable_processors
from ..networks import forward_flops
from ..reports import runs

# Measured (docs/how-to/threads.md): below twice this many FLOPs a step, a second thread saves at most a tenth of the time
# on an idle machine. On a busy machine threads wait for each other at every operator, and small networks become many times
# slower.
FLOPS_PER_THREAD = 16 * 10**9


@dataclass(frozen=True)
class Threads:
    """A number of threads and the reason for it; the reason is empty if the user chose the number."""

    count: int
    reason: str = ""


def threads_for_flops(flops: int | None, available: int) -> int:
    """Return the number of threads for a batch with this many FLOPs.

    That is one for every `FLOPS_PER_THREAD`, in [1, `available`], and 1 if the FLOPs are unknown (None).
    """
    return max(1, min((flops or 0) // FLOPS_PER_THREAD, available))


def available_threads() -> int:
    """Return how many threads this process may use, at least 1.

    The usable processors are divided among the processes of the command on this machine. Torch's own default, which
    `OMP_NUM_THREADS` can lower, is an upper bound.
    """
    usable = len(usable_processors()) // processes.local_world_size()
    return max(1, min(usable, torch.get_num_threads()))


def choose_threads(labels: Mapping[Path, str], flops: Mapping[str, int | None]) -> dict[Path, Threads]:
    """Return the threads of each run of a command: the earlier number for a resumed run, else by the rule.

    The earlier number is that of the last epoch or, without one, the number that the interrupted command had planned.

    Args:
        labels: label of the run in each folder, in the order of the runs. The folders need not exist.
        flops: FLOPs of a training step, by label.

    Raises:
        ValueError: a config.json is damaged.
    """
    planned: dict[str, int] = {}
    for folder in labels:
        if metadata := runs.metadata_if_started(folder):
            planned |= metadata.planned_threads
    earlier = {folder: runs.last_threads(folder) or planned.get(label) for folder, label in labels.items()}
    return {
        folder: threads_for(flops[label]) if earlier[folder] is None else Threads(earlier[folder], "as before")
        for folder, label in labels.items()
    }


def threads_for(flops: int | None, work: str = "step") -> Threads:
    """Return the threads, by the rule, for a `work` unit ("step" or "batch") with this many FLOPs."""
    return Threads(
        threads_for_flops(flops, available_threads()),
        "FLOPs unknown" if flops is None else f"{_abbreviate(flops)}FLOPs a {work}",
    )


def batch_flops(
    passes: Iterable[tuple[int, nn.Module | None]], images: LabelledImages, batch_size: int, device: str
) -> int | None:
    """Return an estimate of the CPU's floating-point operations for a batch, or None if they cannot be counted.

    Operators that `torch.utils.flop_counter` does not know count as 0. On a CUDA device the estimate is 0.

    Args:
        passes: number of forward passes and network, each; a network is moved to the CPU and run on an image of zeros.
        images: the data set.
        batch_size: the number of images in a batch; capped at the size of the data set.
        device: auto, cpu or cuda.
    """
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return 0
    height, width, channels = images.shape
    x = torch.zeros(1, channels, height, width)
    try:
        costs = [(times, forward_flops(network, x)) for times, network in passes if network is not None]
    except Exception:  # a broken custom network reports its error where it is used
        return None
    if any(cost is None for _, cost in costs):
        return None
    return min(batch_size, len(images)) * sum(times * cost for times, cost in costs)


def announcement(chosen: Iterable[tuple[str, Threads]]) -> str:
    """Return the line that announces the threads of these runs, by name; empty if the user chose them all."""
    groups: dict[Threads, list[str]] = {}
    for name, threads in chosen:
        if threads.reason:
            groups.setdefault(threads, []).append(name)
    several = len(groups) > 1
    parts = [
        f"{threads.count}{' for ' + ', '.join(dict.fromkeys(names)) if several else ''} ({threads.reason})"
        for threads, names in groups.items()
    ]
    return f"threads {', '.join(parts)}" if parts else ""


def _abbreviate(flops: int) -> str:
    """Return a number with a unit prefix, such as "24.1 M"."""
    unit, letter = next(
        ((u, letter) for u, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if flops >= u), (1, "")
    )
    return f"{flops / unit:.3g} {letter}"
