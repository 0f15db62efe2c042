"""GPUs by CUDA: times by events around several calls, on inputs in turn that together are larger than the L2 cache.

So the first read of a logit comes from memory.  The device is idle before: what a small call costs on the host counts.
"""

import math
import statistics
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch.autograd import DeviceType

from . import candidates, floors
from .candidates import Candidate
from .device import Device
from .floors import Ceilings, Job, Work
from .inputs import Rotation
from .machine import gpu, nvidia_smi, slug
from .names import BOTH, FORWARD, LIGER
from .places import Place, Shape
from .timing import Seconds

EXPONENTIALS_PER_CLOCK = 16  # of a multiprocessor: its special function units, compute capability 7.0 to 10.0
REGION_SECONDS = 3e-3  # of calls between two events, about
MOST_CALLS = 200  # between two events
L2_TIMES = 3  # how many times larger than L2 the inputs in turn are together
MORE_SETS, MORE_BYTES = 32, 4 * 2**30  # as many as are wanted, as long as they take no more memory
PROFILED_CALLS = 3
REPLAY_SAMPLES = 5


class Reached(NamedTuple):
    """What this GPU reaches: its exponentials computed, not measured."""

    ceilings: Ceilings
    clock: float | None
    """Of the multiprocessors while memory is copied, in Hz; None: nvidia-smi does not say."""


class Cuda(Device):
    """The GPU that torch calls 0."""

    kind = "cuda"
    passes = ((BOTH,), (FORWARD,))
    rounds = (7, 31)

    @cached_property
    def reached(self) -> Reached:
        """Measured when it is first asked for."""
        bandwidth, clock = _copy_and_clock(self.kind)
        self.release()
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        rate = None if clock is None else clock * multiprocessors * EXPONENTIALS_PER_CLOCK
        return Reached(Ceilings(bandwidth, rate), clock)

    @property
    def name(self) -> str:
        """The GPU's."""
        return slug(torch.cuda.get_device_properties(0).name)

    def facts(self) -> dict[str, object]:
        """GPU and driver."""
        return gpu()

    def candidates(self) -> tuple[list[Candidate], dict[str, str]]:
        """Liger-Kernel's too, where it is installed."""
        here = candidates.ours_and_torchs()
        try:
            return here + candidates.ligers(), {}
        except ImportError as error:
            return here, dict.fromkeys(LIGER, f"not installed: {error}")

    def use(self, shape: Shape) -> None:
        """Nothing."""

    def sets(self, shape: Shape) -> int:
        """Of student and teacher: together several times larger than L2, and some more where they are small.

        A gradient in place overwrites its set, so that their number limits how many such calls are timed together.
        """
        size = 2 * shape.rows * shape.classes * shape.dtype.itemsize
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        return max(2, math.ceil(L2_TIMES * l2_bytes / size), min(MORE_SETS, MORE_BYTES // size))

    def calls(self, call: Callable[[], object], given: Rotation, candidate: Candidate) -> int:
        """As many as take some milliseconds; a set that is overwritten serves once."""
        calls = min(MOST_CALLS, math.ceil(REGION_SECONDS / elapsed(call, 3)))
        return min(calls, len(given)) if candidate.inplace else calls

    def sample(
        self, given: Rotation, candidate: Candidate, place: Place, directions: tuple[str, ...], calls: int
    ) -> Seconds:
        """Between two events."""
        backward = BOTH in directions
        return (elapsed(lambda: given.call(candidate, place.keep, backward=backward), calls),)

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """By torch's allocator."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def release(self) -> None:
        """What torch's allocator holds."""
        torch.cuda.empty_cache()

    def work(self, job: Job) -> Work:
        """A pass a direction: no chip holds the exponentials of all rows until the selection is known."""
        return floors.two_passes(job)

    def ceilings(self, shape: Shape, gauged: list[float]) -> Ceilings:
        """Of a large copy, at any shape."""
        return self.reached.ceilings

    def about_ceilings(self) -> str:
        """The copy, the clock, the counts."""
        (bandwidth, rate), clock = self.reached
        copied = f"A large copy on the device reads and writes {bandwidth / 1e12:.2f} TB/s."
        exponentials = (
            "The multiprocessors' clock is not known, so that floors are of bytes alone."
            if rate is None
            else f"Exponentials: {rate / 1e12:.2f} · 10¹² a second, computed, not measured: {EXPONENTIALS_PER_CLOCK} a clock on"
            f" every multiprocessor at {clock / 1e6:.0f} MHz, the clock under load."
        )
        return f"""{copied} {exponentials}
With N the bytes of the student's logits and k of B rows selected, the floor is the larger of two times: bytes that must move,
2N forward, (2k/B + 1)N more backward; exponentials, two a pair of logits forward, two a pair of the selected rows backward.
Where the logits fit in L2 a backward pass need not read them from memory, and a time may be below the floor."""


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


def _copy_and_clock(device: str) -> tuple[float, float | None]:
    """Bytes a second of a large copy, and the multiprocessors' clock in Hz meanwhile (None: nvidia-smi does not say)."""
    size = int(min(4 * 2**30, torch.cuda.mem_get_info()[0] / 4))
    source, target = (torch.empty(size, dtype=torch.uint8, device=device).fill_(1) for _ in range(2))
    seconds = statistics.median(elapsed(lambda: target.copy_(source), 1) for _ in range(11))
    for _ in range(min(1000, math.ceil(2 / seconds))):  # two seconds, or what the queue takes
        target.copy_(source)
    clock = hertz(nvidia_smi("clocks.sm"))
    torch.cuda.synchronize()
    return 2 * size / seconds, clock


def hertz(megahertz: str | None) -> float | None:
    """A clock as nvidia-smi gives it; None where it gives none, or "[N/A]"."""
    try:
        return float(megahertz) * 1e6
    except (TypeError, ValueError):
        return None


# ---- graphs


def replayed(given: Rotation, candidate: Candidate, keep: float, *, backward: bool) -> float:
    """Return the seconds of a call that a CUDA graph replays: what the device takes, without the host's part.

    The graph holds a call on each set of inputs, so that together they are larger than the L2 cache here too.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    with torch.set_grad_enabled(backward):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what a first call loads or compiles cannot be captured
            given.call(candidate, keep, backward=backward)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        given.rewind()
        with torch.cuda.graph(graph):
            for _ in range(len(given)):
                given.call(candidate, keep, backward=backward)
    first = elapsed(graph.replay, 1)
    replays = min(MOST_CALLS, math.ceil(REGION_SECONDS / max(first, 1e-9)))
    return statistics.median(elapsed(graph.replay, replays) for _ in range(REPLAY_SAMPLES)) / len(given)


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
    seen = [event for event in on_device if not event.name.endswith(" Sync")]  # that is a record of the host waiting
    if not seen:
        raise RuntimeError("torch's profiler saw nothing on the device")
    memsets, copies = (sum(event.name.startswith(name) for event in seen) for name in ("Memset", "Memcpy"))
    numbers = (len(seen) - memsets - copies, memsets, copies)
    busy = sum(event.time_range.elapsed_us() for event in seen)
    return Launches(*(round(n / PROFILED_CALLS, 1) for n in numbers), round(busy / PROFILED_CALLS, 2))
