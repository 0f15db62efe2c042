"""Processors: every call timed by itself, on one set of inputs, the gradient of the last call freed before."""

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
from .ceilings import Compiled, NoCompilerError
from .device import Device
from .floors import Ceilings, Job, Work
from .inputs import Rotation
from .machine import processor, processors, slug
from .names import BOTH, FORWARD
from .places import Place, Shape
from .timing import Seconds

TRIADS = 5
MOST_ROUNDS = 20_000


class Cpu(Device):
    """So many threads of this machine's processors."""

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
        """Processor, threads, instruction set."""
        model = slug(next(iter(processors()), processor()))
        return f"{model}-{self.threads}-thread{'s' * (self.threads > 1)}-{self.instruction_set}"

    def facts(self) -> dict[str, object]:
        """Processor, threads, instruction set, and where gradients lie."""
        return {
            "processor": processor(),
            "threads": self.threads,
            "instruction set": self.instruction_set,
            "memory of gradients": build_info["gradient_memory"],
        }

    def candidates(self) -> tuple[list[Candidate], dict[str, str]]:
        """Ours and torch's."""
        return candidates.ours_and_torchs(), {}

    def use(self, shape: Shape) -> None:
        """Its number of threads."""
        torch.set_num_threads(shape.threads or self.threads)

    def sets(self, shape: Shape) -> int:
        """One: a model leaves its logits in the caches, as far as they fit."""
        return 1

    def calls(self, call: Callable[[], object], given: Rotation, candidate: Candidate) -> int:
        """One: also a small call's time is many of the clock's steps."""
        return 1

    def sample(
        self, given: Rotation, candidate: Candidate, place: Place, directions: tuple[str, ...], calls: int
    ) -> Seconds:
        """Of the forward pass, and of the whole."""
        given.free_gradient()
        start = time.perf_counter()
        loss = given.loss(candidate, place.keep, backward=True)
        forward = time.perf_counter() - start
        loss.backward()
        return forward, time.perf_counter() - start

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """By the kernel's count of the process's resident memory, its peak set back before."""
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)

    def release(self) -> None:
        """What malloc holds; where the C library is not GNU's it keeps it."""
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))

    def work(self, job: Job) -> Work:
        """One pass: the exponentials of a row stay in a cache until its gradient is written."""
        return floors.one_pass(job)

    def gauge(self, shape: Shape) -> list[float]:
        """Seconds of a triad of the logits' size in bytes: two arrays read, one written, nothing allocated."""
        n = math.ceil(shape.rows * shape.classes * shape.dtype.itemsize / 4)
        a, b, c = (torch.ones(n) for _ in range(3))
        if isinstance(self._compiled, NoCompilerError):
            return timeit.repeat(lambda: torch.add(a, b, out=c), number=1, repeat=2 * TRIADS)[TRIADS:]
        return [self._compiled.triad_seconds(a, b, c, torch.get_num_threads()) for _ in range(TRIADS)]

    def ceilings(self, shape: Shape, gauged: list[float]) -> Ceilings | None:
        """Of the triad at this shape, and of the exponential on as many threads."""
        if not gauged:
            return None
        size = shape.rows * shape.classes * shape.dtype.itemsize
        rate = self._rate(shape.dtype == torch.float64, torch.get_num_threads())
        return Ceilings(3 * size / statistics.median(gauged), rate)

    def _rate(self, in_double: bool, threads: int) -> float | None:
        if isinstance(self._compiled, NoCompilerError):
            return None
        if (in_double, threads) not in self._rates:
            rate = self._compiled.exponentials_per_second(in_double=in_double, threads=threads)
            self._rates[in_double, threads] = rate
        return self._rates[in_double, threads]

    def about_ceilings(self) -> str:
        """The triad, the exponential, the counts."""
        rate = self._rate(False, self.threads)
        exponentials = (
            f"Floors are of bytes alone, by torch's own addition: the rate of exponentials was not measured ({self._compiled})."
            if rate is None
            else "The rate of exponentials is that of the kernels' own on arrays in the first-level cache, measured in the same"
            f" run: {rate / 1e9:.1f} · 10⁹ a second in float32 on {self.threads} threads."
        )
        return f"""The floor is the larger of two times: of the bytes that must move, over the bandwidth of a triad of the logits'
size (c = a + b, written through the caches or past them, whichever is faster) right before and after the rounds; and of the
exponentials. {exponentials}
With N the bytes of the student's logits 2N are read (rows whose label is ignored are not) and N written as gradient; a pair of
logits takes two exponentials, since at T = 4 e^z follows from e^(z/4), and the gradient from both. Forward is the time until the
loss is there in that same call: where kcd_ext selects at least a quarter of the rows its forward pass writes the gradient too.
malloc is left as it is: where it hands intermediates of some MB back to the system, and where it does not, eager's time differs by
up to half from one process to the next. In place the student's logits are copied back before each call: they are in the caches.
`student.sum()` and its backward pass compute next to nothing: where batches are small their time is the way through autograd, which
no loss can leave out."""


def _status(field: str) -> int:
    """Bytes, of /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{field}:")))
