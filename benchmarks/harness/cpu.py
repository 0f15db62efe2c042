"""The CPU: every call is timed separately, on one set of inputs, after the last call's gradient was freed."""

import ctypes
import math
import statistics
import time
import timeit
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch

from kcd_ext.ops import build_info

from . import candidates, floors
from .candidates import Candidate
from .cases import Case, Shape
from .ceilings import Compiled, NoCompilerError
from .constants import BOTH, FORWARD
from .device import Device
from .floors import Ceilings, Job, Work
from .inputs import Rotation
from .machine import processor, processors, slug
from .timing import Seconds

TRIADS = 5
MOST_ROUNDS = 20_000


class Cpu(Device):
    """This machine's processors, with torch's current number of threads."""

    kind = "cpu"
    passes = ((FORWARD, BOTH),)
    rounds = (5, MOST_ROUNDS)

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self.instruction_set = build_info["instruction_set_in_use"]
        self._rates: dict[tuple[bool, int], float] = {}

    @cached_property
    def _compiled(self) -> Compiled | NoCompilerError:
        try:
            return Compiled(self.instruction_set)
        except NoCompilerError as error:
            return error

    @property
    def name(self) -> str:
        """The processor, number of threads and instruction set."""
        model = slug(next(iter(processors()), processor()))
        return f"{model}-{self.threads}-thread{'s' * (self.threads > 1)}-{self.instruction_set}"

    def facts(self) -> dict[str, object]:
        """Return the processor, threads, instruction set and memory of gradients."""
        return {
            "processor": processor(),
            "threads": self.threads,
            "instruction set": self.instruction_set,
            "memory of gradients": build_info["gradient_memory"],
        }

    def candidates(self) -> tuple[list[Candidate], dict[str, str]]:
        """Return kcd_ext's and PyTorch's candidates."""
        return candidates.common_candidates(), {}

    def configure(self, shape: Shape) -> None:
        """Set the shape's number of threads."""
        torch.set_num_threads(shape.threads or self.threads)

    def sets(self, shape: Shape) -> int:
        """Return 1: a model also leaves its logits in the caches, as far as they fit."""
        return 1

    def calls(self, call: Callable[[], object], inputs: Rotation, candidate: Candidate) -> int:
        """Return 1: even a small call takes many ticks of the clock."""
        return 1

    def sample(
        self, inputs: Rotation, candidate: Candidate, case: Case, directions: tuple[str, ...], calls: int
    ) -> Seconds:
        """Return the seconds of the forward pass, and of forward and backward."""
        inputs.free_gradient()
        start = time.perf_counter()
        loss = inputs.loss(candidate, case.keep, backward=True)
        forward = time.perf_counter() - start
        loss.backward()
        return forward, time.perf_counter() - start

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Return how far the process's resident memory, as Linux counts it, rises in the call; the peak is reset before."""
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)

    def release(self) -> None:
        """Return malloc's free memory to the system; only the GNU C library can."""
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))

    def work(self, job: Job) -> Work:
        """Return the work of one pass: a row's exponentials stay in a cache until its gradient is written."""
        return floors.one_pass(job)

    def measure_bandwidth(self, shape: Shape) -> list[float]:
        """Return the seconds of triads c = a + b on preallocated arrays with as many bytes as the logits."""
        n = math.ceil(shape.rows * shape.classes * shape.dtype.itemsize / 4)
        a, b, c = (torch.ones(n) for _ in range(3))
        if isinstance(self._compiled, NoCompilerError):
            return timeit.repeat(lambda: torch.add(a, b, out=c), number=1, repeat=2 * TRIADS)[TRIADS:]
        return [self._compiled.triad_seconds(a, b, c, torch.get_num_threads()) for _ in range(TRIADS)]

    def ceilings(self, shape: Shape, measured: list[float]) -> Ceilings | None:
        """Return the bandwidth of the triad at this shape, and the rate of exponentials on as many threads."""
        if not measured:
            return None
        size = shape.rows * shape.classes * shape.dtype.itemsize
        rate = self._rate(shape.dtype == torch.float64, torch.get_num_threads())
        return Ceilings(3 * size / statistics.median(measured), rate)

    def _rate(self, in_double: bool, threads: int) -> float | None:
        if isinstance(self._compiled, NoCompilerError):
            return None
        if (in_double, threads) not in self._rates:
            rate = self._compiled.exponentials_per_second(in_double=in_double, threads=threads)
            self._rates[in_double, threads] = rate
        return self._rates[in_double, threads]

    def explain_ceilings(self) -> str:
        """Return an explanation of the triad, the exponential and the counts."""
        rate = self._rate(False, self.threads)
        exponentials = (
            "Floors count bytes only, at the speed of torch's addition: the rate of exponentials was not measured"
            f" ({self._compiled})."
            if rate is None
            else "The rate of exponentials is that of the kernels' own exponential on arrays in the first-level cache, measured in"
            f" the same run: {rate / 1e9:.1f} · 10⁹ per second in float32 on {self.threads} threads."
        )
        return f"""The floor is the larger of two times: bytes to move over a triad's bandwidth, and exponentials over their rate.
The triad c = a + b has arrays of the logits' size and runs right before and after the rounds; its stores go through the caches or
past them, whichever is faster. {exponentials}

Let N be the bytes of the student's logits. A call reads 2N, except rows with an ignored label, and writes N as gradient. A pair of
logits takes two exponentials, because at T = 4 e^z follows from e^(z/4); the gradient reuses both.

- "Forward" is the time until the loss exists, in that same call. If kcd_ext selects at least a quarter of the rows, its forward
  pass writes the gradient too.
- malloc keeps its defaults. Whether it returns intermediates of some MB to the system or keeps them changes eager's time by up to
  half from one process to the next.
- For in-place calls the student's logits are copied back before each call, so they are in the caches.
- `student.sum()` and its backward pass compute next to nothing. For small batches their time is the cost of autograd, which every
  loss pays."""


def _status(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{field}:")))
