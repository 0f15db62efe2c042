"""How many threads of torch's a command takes on the CPU where the user does not say it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .. import processes
from ..data.images import ImageSet
from ..environment import usable_processors
from ..networks import forward_flops
from ..reports import runs

# Measured (docs/training.md): with less than twice as many FLOPs a step, a second thread saves a tenth of the time at most on
# an idle machine. On a busy one threads wait for each other at every operator, and small networks become many times slower.
FLOPS_OF_A_THREAD = 16 * 10**9


@dataclass(frozen=True)
class Threads:
    """A number of threads, and why it is this one; empty where the user has chosen it."""

    count: int
    why: str = ""


def rule(flops: int | None, available: int) -> int:
    """Return the number of threads for a batch of so many FLOPs.

    One for every `FLOPS_OF_A_THREAD`, at least 1 and at most `available`; 1 where the FLOPs are not known (None).
    """
    return max(1, min((flops or 0) // FLOPS_OF_A_THREAD, available))


def available() -> int:
    """Return how many threads this process may have, at least 1.

    The processors that it may use are divided among the processes of the command on this machine; where torch takes fewer threads
    of its own accord, as OMP_NUM_THREADS makes it, these are all.
    """
    usable = len(usable_processors()) // processes.local_world_size()
    return max(1, min(usable, torch.get_num_threads()))


def choose(labels: Mapping[Path, str], flops: Mapping[str, int | None]) -> dict[Path, Threads]:
    """Return the threads of each run of a command: as before if it goes on, else by the rule.

    As before: those of its last epoch, or those that the command before had chosen for it.

    Args:
        labels: of the run in each folder, in the order in which they are run. A folder need not be there yet.
        flops: of a training step, by label.

    Raises ValueError where a config.json is damaged.
    """
    planned: dict[str, int] = {}
    for folder in labels:
        if begun := runs.metadata_if_begun(folder):
            planned |= begun.planned_threads
    before = {folder: runs.threads_of(folder) or planned.get(label) for folder, label in labels.items()}
    return {
        folder: by_rule(flops[label]) if before[folder] is None else Threads(before[folder], "as before")
        for folder, label in labels.items()
    }


def by_rule(flops: int | None, work: str = "step") -> Threads:
    """Return the threads for `work` of so many FLOPs."""
    return Threads(rule(flops, available()), "FLOPs unknown" if flops is None else f"{_shown(flops)}FLOPs a {work}")


def batch_flops(
    passes: Iterable[tuple[int, nn.Module | None]], images: ImageSet, batch_size: int, device: str
) -> int | None:
    """Return an estimate of the floating-point operations that the CPU does for a batch; None: they cannot be counted.

    An operator that torch.utils.flop_counter does not know counts nothing.

    Args:
        passes: how many forward passes of which network; it is moved to the CPU and called with an image of zeros.
        images: the data set.
        batch_size: the number of images in a batch, if there are as many.
        device: auto, cpu or cuda. Where that is CUDA, the CPU does nothing.
    """
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return 0
    _, height, width, channels = images.images.shape
    x = torch.zeros(1, channels, height, width)
    try:
        costs = [(times, forward_flops(network, x)) for times, network in passes if network is not None]
    except Exception:  # of a network of the user's: one that does not work says why where it is used
        return None
    if any(cost is None for _, cost in costs):
        return None
    return min(batch_size, len(images)) * sum(times * cost for times, cost in costs)


def announcement(chosen: Iterable[tuple[str, Threads]]) -> str:
    """Return what a user is told of the threads of these runs, by their names; empty where there is nothing to tell."""
    names: dict[Threads, list[str]] = {}
    for name, threads in chosen:
        if threads.why:
            names.setdefault(threads, []).append(name)
    several = len(names) > 1
    told = [
        f"{threads.count}{' for ' + ', '.join(dict.fromkeys(who)) if several else ''} ({threads.why})"
        for threads, who in names.items()
    ]
    return f"threads {', '.join(told)}" if told else ""


def _shown(flops: int) -> str:
    """As 24.1 M."""
    unit, letter = next(
        ((u, letter) for u, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if flops >= u), (1, "")
    )
    return f"{flops / unit:.3g} {letter}"
