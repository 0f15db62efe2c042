"""Measuring calls on the device: random inputs in turn, CUDA events, rounds in which candidates take turns, launch counts."""

import math
import random
import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType

from .candidates import Candidate
from .cases import Produced
from .process import Deadline

L2_TIMES = 3  # how many times larger than L2 the inputs in turn are together
MORE_SETS, MORE_BYTES = 32, 4 * 2**30  # as many as are wanted, as long as they take no more memory
ROUNDS = (7, 31)  # fewest, most
PROFILED_CALLS = 3


# ---- inputs and calls


def how_many_sets(rows: int, classes: int, itemsize: int, l2_bytes: int) -> int:
    """Sets of student and teacher: together several times larger than L2, and some more where they are small.

    A gradient in place overwrites its set, so that their number limits how many such calls are timed together.
    """
    size = 2 * rows * classes * itemsize
    return max(2, math.ceil(L2_TIMES * l2_bytes / size), min(MORE_SETS, MORE_BYTES // size))


class Rotation:
    """Random logits of one shape, several sets that calls take in turn."""

    def __init__(self, rows: int, classes: int, dtype: torch.dtype, sets: int, device: str) -> None:
        shape = (sets, rows, classes)
        self._student = torch.empty(shape, dtype=dtype, device=device).normal_()
        self._original: Tensor | None = None
        self.students = list(self._student)
        self.teachers = list(torch.empty(shape, dtype=dtype, device=device).normal_())
        self._leaves = [x.detach().requires_grad_() for x in self.students]
        self._anchor = torch.ones((), device=device, requires_grad=True)
        self._next = 0

    def __len__(self) -> int:
        return len(self.students)

    def rewind(self) -> None:
        """The next call takes the first set."""
        self._next = 0

    def keep_original(self) -> None:
        """From now on `restore` undoes what calls overwrite."""
        self._original = self._student.clone()

    def restore(self) -> None:
        """The students' logits as they were when `keep_original` was called, if it was."""
        if self._original is not None:
            self._student.copy_(self._original)

    def forget_original(self) -> None:
        """Frees the copy."""
        self._original = None

    def call(self, candidate: Candidate, keep: float, *, backward: bool) -> Tensor:
        """One call on the next set: its loss.  The gradient is freed, except where it takes the logits' place."""
        i, self._next = self._next, (self._next + 1) % len(self.students)
        if not backward:
            return candidate.loss(self.students[i], self.teachers[i], keep)
        leaf = self._leaves[i]
        student = Produced.apply(self._anchor, self.students[i]) if candidate.inplace else leaf
        loss = candidate.loss(student, self.teachers[i], keep)
        loss.backward()
        leaf.grad = None
        return loss


# ---- time


def elapsed(function: Callable[[], object], calls: int) -> float:
    """Seconds a call of so many, one after another on a device that was idle before."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e-3 / calls


def in_turns(functions: dict[str, Callable[[], float]], deadline: Deadline) -> dict[str, list[float]]:
    """What every function gives, over rounds in which each is called once, in another order each time.

    The fewest rounds are made even past the deadline, and one before them that does not count.
    """
    fewest, most = ROUNDS
    samples: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(0).shuffle
    for function in functions.values():
        function()
    for done in range(most):
        if done >= fewest and deadline.left() == 0:
            break
        shuffle(order)  # nobody always follows the same one
        for name in order:
            samples[name].append(functions[name]())
    return samples


def summary(samples: list[float]) -> dict[str, float]:
    """Median and the middle half of seconds, in microseconds."""
    low, median, high = (round(x * 1e6, 2) for x in statistics.quantiles(samples, n=4))
    return {"median_us": median, "low_us": low, "high_us": high}


# ---- memory


def peak_bytes(function: Callable[[], object]) -> int:
    """Device memory that a call takes at most, beyond what is allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# ---- launches


class Launches(NamedTuple):
    """What one call puts on the device."""

    kernels: float
    memsets: float
    copies: float
    device_us: float
    """Microseconds in which the device is at one of them, summed over all."""


def launches(function: Callable[[], object]) -> Launches:
    """Of one call, as torch's profiler sees it.

    Once it has been used calls are slower: times are taken before.

    Raises:
        RuntimeError: the profiler saw nothing.
    """
    from torch.profiler import ProfilerActivity, profile

    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED_CALLS):
            function()
        torch.cuda.synchronize()
    on_device = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return count((event.name, event.time_range.elapsed_us()) for event in on_device)


def count(events: Iterable[tuple[str, float]]) -> Launches:
    """What device events (name, microseconds) of PROFILED_CALLS calls amount to in one."""
    numbers = {"kernels": 0, "memsets": 0, "copies": 0}
    busy = 0.0
    for name, microseconds in events:
        if name.endswith(" Sync"):  # a record of the host waiting
            continue
        kind = "memsets" if name.startswith("Memset") else "copies" if name.startswith("Memcpy") else "kernels"
        numbers[kind] += 1
        busy += microseconds
    if not any(numbers.values()):
        raise RuntimeError("torch's profiler saw nothing on the device")
    return Launches(*(round(n / PROFILED_CALLS, 1) for n in numbers.values()), round(busy / PROFILED_CALLS, 2))
