"""The GPU: CUDA events time several calls at once, on sets of inputs that together exceed the L2 cache.

So the first read of a logit comes from memory. The device is idle before the calls, so a small call's cost on the host counts.
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
from .cases import Case, Shape
from .constants import BOTH, FORWARD, LIGER
from .device import Device
from .floors import Ceilings, Job, Work
from .inputs import Rotation
from .machine import gpu, nvidia_smi, slug
from .timing import Seconds

EXPONENTIALS_PER_CLOCK = 16  # per multiprocessor: its special function units, compute capability 7.0 to 10.0
REGION_SECONDS = 3e-3  # approximate duration of the calls between two events
MOST_CALLS = 200  # most calls between two events
L2_TIMES = 3  # total size of the sets of inputs, in units of the L2 cache
MORE_SETS, MORE_BYTES = 32, 4 * 2**30  # use up to this many sets while they fit into this memory
PROFILED_CALLS = 3
REPLAY_SAMPLES = 5


class Reached(NamedTuple):
    """The rates that this GPU reaches. The rate of exponentials is computed, not measured."""

    ceilings: Ceilings
    clock: float | None
    """Clock of the multiprocessors during a copy, in Hz; None: nvidia-smi does not report it."""


class Cuda(Device):
    """torch's GPU 0."""

    kind = "cuda"
    passes = ((BOTH,), (FORWARD,))
    rounds = (7, 31)

    @cached_property
    def reached(self) -> Reached:
        """The rates, measured at the first access."""
        bandwidth, clock = _copy_and_clock(self.kind)
        self.release()
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        rate = None if clock is None else clock * multiprocessors * EXPONENTIALS_PER_CLOCK
        return Reached(Ceilings(bandwidth, rate), clock)

    @property
    def name(self) -> str:
        """The GPU's name, in a form that suits a file name."""
        return slug(torch.cuda.get_device_properties(0).name)

    def facts(self) -> dict[str, object]:
        """Return facts about GPU and driver."""
        return gpu()

    def candidates(self) -> tuple[list[Candidate], dict[str, str]]:
        """Return the common candidates, and Liger-Kernel's if it is installed."""
        common = candidates.common_candidates()
        try:
            return common + candidates.liger_candidates(), {}
        except ImportError as error:
            return common, dict.fromkeys(LIGER, f"not installed: {error}")

    def configure(self, shape: Shape) -> None:
        """Do nothing: a shape needs no settings here."""

    def sets(self, shape: Shape) -> int:
        """Return enough sets to exceed the L2 cache several times, and more sets if they are small.

        An in-place gradient overwrites its set, so the number of sets limits how many such calls are timed together.
        """
        size = 2 * shape.rows * shape.classes * shape.dtype.itemsize
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        return max(2, math.ceil(L2_TIMES * l2_bytes / size), min(MORE_SETS, MORE_BYTES // size))

    def calls(self, call: Callable[[], object], inputs: Rotation, candidate: Candidate) -> int:
        """Return as many calls as take some milliseconds; an in-place call uses each set once."""
        calls = min(MOST_CALLS, math.ceil(REGION_SECONDS / elapsed(call, 3)))
        return min(calls, len(inputs)) if candidate.inplace else calls

    def sample(
        self, inputs: Rotation, candidate: Candidate, case: Case, directions: tuple[str, ...], calls: int
    ) -> Seconds:
        """Return the seconds of a call, from the events around `calls` calls."""
        backward = BOTH in directions
        return (elapsed(lambda: inputs.call(candidate, case.keep, backward=backward), calls),)

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Return the peak that torch's allocator counts."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def release(self) -> None:
        """Return the free memory of torch's allocator to the driver."""
        torch.cuda.empty_cache()

    def work(self, job: Job) -> Work:
        """Return the work of two passes: no chip can keep the exponentials of all rows until the selection is known."""
        return floors.two_passes(job)

    def ceilings(self, shape: Shape, measured: list[float]) -> Ceilings:
        """Return the rates from a large copy, for any shape."""
        return self.reached.ceilings

    def explain_ceilings(self) -> str:
        """Return an explanation of the copy, the clock and the counts."""
        (bandwidth, rate), clock = self.reached
        copied = f"A large copy on the device reads and writes {bandwidth / 1e12:.2f} TB/s."
        exponentials = (
            "The multiprocessors' clock is unknown, so floors count bytes only."
            if rate is None
            else f"Exponentials: {rate / 1e12:.2f} · 10¹² per second, computed, not measured: {EXPONENTIALS_PER_CLOCK} per clock on"
            f" every multiprocessor at {clock / 1e6:.0f} MHz, the clock under load."
        )
        return f"""{copied} {exponentials}
Let N be the bytes of the student's logits, and k of B rows selected. The floor is the larger of two times:

- bytes to move: 2N forward, (2k/B + 1)N more backward;
- exponentials: two for a pair of logits forward, two for a pair of the selected rows backward.

If the logits fit in L2, a backward pass need not read them from memory, and a time may be below the floor."""


def elapsed(function: Callable[[], object], calls: int) -> float:
    """Return the seconds of one call, averaged over `calls` calls on a device that is idle before."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e-3 / calls


def _copy_and_clock(device: str) -> tuple[float, float | None]:
    """Return the bytes per second of a large copy, and the multiprocessors' clock in Hz meanwhile (None: unknown)."""
    size = int(min(4 * 2**30, torch.cuda.mem_get_info()[0] / 4))
    source, target = (torch.empty(size, dtype=torch.uint8, device=device).fill_(1) for _ in range(2))
    seconds = statistics.median(elapsed(lambda: target.copy_(source), 1) for _ in range(11))
    for _ in range(min(1000, math.ceil(2 / seconds))):  # two seconds, or as much as the queue holds
        target.copy_(source)
    clock = hertz(nvidia_smi("clocks.sm"))
    torch.cuda.synchronize()
    return 2 * size / seconds, clock


def hertz(megahertz: str | None) -> float | None:
    """Parse a clock that nvidia-smi prints; None if it prints none, or "[N/A]"."""
    try:
        return float(megahertz) * 1e6
    except (TypeError, ValueError):
        return None


# ---- graphs


def replayed(inputs: Rotation, candidate: Candidate, keep: float, *, backward: bool) -> float:
    """Return the seconds of a call that a CUDA graph replays: the device's time without the host's.

    The graph calls the candidate on each set of inputs, so they exceed the L2 cache here too.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    with torch.set_grad_enabled(backward):
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):  # a capture may not load or compile code
            inputs.call(candidate, keep, backward=backward)
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        inputs.rewind()
        with torch.cuda.graph(graph):
            for _ in range(len(inputs)):
                inputs.call(candidate, keep, backward=backward)
    first = elapsed(graph.replay, 1)
    replays = min(MOST_CALLS, math.ceil(REGION_SECONDS / max(first, 1e-9)))
    return statistics.median(elapsed(graph.replay, replays) for _ in range(REPLAY_SAMPLES)) / len(inputs)


# ---- launches


class Launches(NamedTuple):
    """The operations that one call launches on the device."""

    kernels: float
    memsets: float
    copies: float
    device_us: float
    """Microseconds of device time, summed over all operations."""


def launches(function: Callable[[], object]) -> Launches:
    """Count the operations of one call with torch's profiler.

    Calls are slower once the profiler has run, so measure times first.

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
    seen = [event for event in on_device if not event.name.endswith(" Sync")]  # these record that the host waits
    if not seen:
        raise RuntimeError("torch's profiler saw nothing on the device")
    memsets, copies = (sum(event.name.startswith(name) for event in seen) for name in ("Memset", "Memcpy"))
    numbers = (len(seen) - memsets - copies, memsets, copies)
    busy = sum(event.time_range.elapsed_us() for event in seen)
    return Launches(*(round(n / PROFILED_CALLS, 1) for n in numbers), round(busy / PROFILED_CALLS, 2))
