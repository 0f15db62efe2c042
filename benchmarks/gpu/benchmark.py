"""Section benchmarks: times of ours, PyTorch's and Liger-Kernel's losses in one process, and the floors beside them.

Times are taken by CUDA events around several calls, on inputs in turn that together are larger than the L2 cache, so that the
first read of a logit comes from memory.  The device is idle before: what a small call costs on the host counts.
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from . import timing
from .candidates import KEEPS, Candidate, candidates, exact
from .floors import EXPONENTIALS_PER_CLOCK, Ceilings, Job, floor, selected
from .machine import nvidia_smi
from .process import Deadline, write_json

SHAPES = (  # in order of importance: what the time does not suffice for is left out from the end
    (8192, 32_000, torch.bfloat16),
    (4096, 1000, torch.float32),
    (256, 100, torch.float32),
    (4096, 128_256, torch.bfloat16),
    (8192, 151_936, torch.bfloat16),
)
FORWARD, BOTH = "forward", "forward + backward"
MEASURED, NOT_REACHED, OUT_OF_MEMORY = "measured", "not reached", "out of memory"
REGION_SECONDS = 3e-3  # of calls between two events, about
MOST_CALLS = 200  # between two events
MOST_SECONDS = 4.0  # of measuring at one shape, keep and direction
COMPILE_SECONDS = 40.0  # what torch.compile is taken to need until it has been seen
LAUNCHES_SHARE = 0.15  # of the time, for counting launches


class Configuration(NamedTuple):
    """What the candidates are measured at."""

    rows: int
    classes: int
    dtype: torch.dtype
    keep: float
    direction: str

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.rows} × {self.classes} {kind}, keep {self.keep}, {self.direction}"

    @property
    def shape(self) -> tuple[int, int, torch.dtype]:
        """Rows, classes and dtype."""
        return self[:3]

    @property
    def backward(self) -> bool:
        """Whether the gradient is computed too."""
        return self.direction == BOTH

    @property
    def job(self) -> Job:
        """For the floor."""
        return Job(self.rows, self.classes, self.dtype.itemsize, selected(self.keep, self.rows), self.backward)


def configurations(shape: tuple[int, int, torch.dtype]) -> list[Configuration]:
    """A shape's, in order of importance."""
    return [Configuration(*shape, keep, direction) for keep in KEEPS for direction in (BOTH, FORWARD)]


def takes_part(candidate: Candidate, configuration: Configuration) -> bool:
    """Whether a candidate is measured there at all."""
    return configuration.keep in candidate.keeps and (configuration.backward or not candidate.inplace)


def ceilings(device: str) -> tuple[Ceilings, float | None]:
    """What this GPU reaches, and its multiprocessors' clock in Hz while it copies memory (None: nvidia-smi does not say)."""
    size = int(min(4 * 2**30, torch.cuda.mem_get_info()[0] / 4))
    source, target = (torch.empty(size, dtype=torch.uint8, device=device).fill_(1) for _ in range(2))
    seconds = statistics.median(timing.elapsed(lambda: target.copy_(source), 1) for _ in range(11))
    for _ in range(min(1000, math.ceil(2 / seconds))):  # two seconds, or what the queue takes
        target.copy_(source)
    clock = hertz(nvidia_smi("clocks.sm"))
    torch.cuda.synchronize()
    per_clock = torch.cuda.get_device_properties(0).multi_processor_count * EXPONENTIALS_PER_CLOCK
    return Ceilings(2 * size / seconds, None if clock is None else clock * per_clock), clock


def hertz(megahertz: str | None) -> float | None:
    """A clock as nvidia-smi gives it; None where it gives none, or "[N/A]"."""
    try:
        return float(megahertz) * 1e6
    except (TypeError, ValueError):
        return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def prepare(candidate: Candidate, configuration: Configuration, given: timing.Rotation, want: float) -> dict:
    """Compiles, warms up, compares the loss with the exact one, and finds how many calls make a measurement.

    Returns:
        first_call_seconds, relative_error (None for another loss), peak_bytes, calls.

    Raises:
        torch.OutOfMemoryError: it does not fit.
        ArithmeticError: it computes something else.
    """

    def call() -> torch.Tensor:
        return given.call(candidate, configuration.keep, backward=configuration.backward)

    given.rewind()  # the first set is the one whose loss is known
    start = time.monotonic()
    loss = call().item()
    first_seconds = time.monotonic() - start
    error = None if candidate.tolerance is None else abs(loss - want) / abs(want)
    if error is not None and not error <= candidate.tolerance:
        raise ArithmeticError(f"loss {loss:.6g} instead of {want:.6g}")
    peak = timing.peak_bytes(call)
    calls = min(MOST_CALLS, math.ceil(REGION_SECONDS / timing.elapsed(call, 3)))
    return {
        "first_call_seconds": round(first_seconds, 2),
        "relative_error": error and float(f"{error:.1e}"),
        "peak_bytes": peak,
        "calls": min(calls, len(given)) if candidate.inplace else calls,  # a set that is overwritten serves once
    }


class Benchmark:
    """All measurements; the file with the figures is written after each."""

    def __init__(self, path: Path, seconds: float, device: str) -> None:
        self.path, self.device = path, device
        self.end, self.end_of_timing = Deadline(seconds), Deadline(seconds * (1 - LAUNCHES_SHARE))
        self.candidates, absent = candidates()
        self.compile_seconds = COMPILE_SECONDS
        self.ceilings, clock = ceilings(device)
        torch.cuda.empty_cache()
        everything = [configuration for shape in SHAPES for configuration in configurations(shape)]
        self.rows = {
            (configuration, candidate.name): self._row(configuration, candidate.name)
            for configuration in everything
            for candidate in self.candidates
            if takes_part(candidate, configuration)
        }
        self.result = {
            "copy_bytes_per_second": self.ceilings.bytes_per_second,
            "clock_under_load_hz": clock,
            "exponentials_per_second": self.ceilings.exponentials_per_second,
            "directions": [FORWARD, BOTH],
            "candidates": [*(candidate.name for candidate in self.candidates), *absent],
            "absent": absent,
            "rows": list(self.rows.values()),
        }
        self._write()

    def _row(self, configuration: Configuration, name: str) -> dict:
        low = floor(configuration.job, self.ceilings)
        return {
            **configuration._asdict(),
            "dtype": str(configuration.dtype).removeprefix("torch."),
            "candidate": name,
            "status": NOT_REACHED,
            "floor_us": round(low.seconds * 1e6, 2),
            "floor_bound": low.bound,
        }

    def _write(self) -> None:
        write_json(self.path, self.result)

    def measure(self) -> None:
        """Times and memory of every shape, as far as the time goes; then launches, which slow down calls after them."""
        for i, shape in enumerate(SHAPES):
            if self.end_of_timing.left() > 0:
                self._measure_shape(shape, Deadline(self.end_of_timing.left() / (len(SHAPES) - i)))
        for keep in KEEPS:
            for shape in SHAPES:
                if self.end.left() > 0 and "launches" not in self.result:
                    self._count_launches(shape, keep)

    def _rotation(self, shape: tuple[int, int, torch.dtype], sets: int) -> timing.Rotation | None:
        """None where they do not fit, which the rows then say."""
        torch.cuda.empty_cache()
        try:
            return timing.Rotation(*shape, sets, self.device)
        except torch.OutOfMemoryError:
            for (configuration, _), row in self.rows.items():
                if configuration.shape == shape and row["status"] == NOT_REACHED:
                    row["status"] = OUT_OF_MEMORY
            return None

    def _measure_shape(self, shape: tuple[int, int, torch.dtype], deadline: Deadline) -> None:
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        given = self._rotation(shape, timing.how_many_sets(*shape[:2], shape[2].itemsize, l2_bytes))
        if given is None:
            return
        want = exact(given.students[0], given.teachers[0], KEEPS)
        to_do = configurations(shape)
        while to_do and self.end_of_timing.left() > 0:
            configuration = to_do.pop(0)
            with torch.set_grad_enabled(configuration.backward):
                ready = [
                    candidate
                    for candidate in self.candidates
                    if takes_part(candidate, configuration)
                    and self._prepare(candidate, configuration, given, want[configuration.keep])
                ]
                self._time(ready, configuration, given, min(MOST_SECONDS, deadline.left() / (len(to_do) + 1)))
            given.forget_original()
            self._write()

    def _prepare(self, candidate: Candidate, configuration: Configuration, given: timing.Rotation, want: float) -> bool:
        """Whether a candidate is ready to be timed; if not, its row says why."""
        row = self.rows[configuration, candidate.name]
        if candidate.compiles and self.end_of_timing.left() < 2 * self.compile_seconds:
            return False
        try:
            if candidate.inplace:
                given.keep_original()
            row.update(prepare(candidate, configuration, given, want))
        except torch.OutOfMemoryError:
            row["status"] = OUT_OF_MEMORY
            torch.cuda.empty_cache()
            return False
        except Exception as error:  # one that fails must not hide the others' times
            row["status"] = f"failed: {type(error).__name__}: {_first_line(error)}"
            return False
        finally:
            given.restore()
        if candidate.compiles:
            self.compile_seconds = row["first_call_seconds"]
        return True

    def _time(
        self, ready: list[Candidate], configuration: Configuration, given: timing.Rotation, seconds: float
    ) -> None:
        """The candidates take turns for about so many seconds."""

        def region(candidate: Candidate) -> float:
            calls = self.rows[configuration, candidate.name]["calls"]
            taken = timing.elapsed(
                lambda: given.call(candidate, configuration.keep, backward=configuration.backward), calls
            )
            if candidate.inplace:
                given.restore()
            return taken

        functions = {candidate.name: lambda candidate=candidate: region(candidate) for candidate in ready}
        for name, samples in timing.in_turns(functions, Deadline(seconds)).items():
            row = self.rows[configuration, name]
            row.update(status=MEASURED, rounds=len(samples), **timing.summary(samples))
            row["of_floor"] = round(row["floor_us"] / row["median_us"], 3)
            print(f"{configuration}: {name} {row['median_us']} us, {row['of_floor']:.0%} of the floor", flush=True)

    def _count_launches(self, shape: tuple[int, int, torch.dtype], keep: float) -> None:
        """Of every candidate that was timed there."""
        measured = [
            (configuration, candidate)
            for configuration in configurations(shape)
            for candidate in self.candidates
            if configuration.keep == keep
            and self.rows.get((configuration, candidate.name), {}).get("status") == MEASURED
        ]
        given = self._rotation(shape, sets=1) if measured else None
        if given is None:
            return
        for configuration, candidate in measured:
            if self.end.left() == 0:
                return
            with torch.set_grad_enabled(configuration.backward):
                try:
                    seen = timing.launches(
                        lambda c=configuration, each=candidate: given.call(each, c.keep, backward=c.backward)
                    )
                except torch.OutOfMemoryError:
                    continue
                except RuntimeError as error:  # a profiler that does not work here
                    self.result["launches"] = f"not counted: {_first_line(error)}"
                    self._write()
                    return
            self.rows[configuration, candidate.name].update(seen._asdict())
            self._write()

    def verdict(self) -> tuple[bool, str]:
        """Whether something was measured, and ours wherever there was time and memory; and the summary."""
        statuses = [row["status"] for row in self.rows.values()]
        faults = [
            f"{name} at {configuration}: {row['status']}"
            for (configuration, name), row in self.rows.items()
            if name.startswith("kcd_ext") and row["status"].startswith("failed")
        ]
        counted = ", ".join(
            f"{sum(s.startswith(status) for s in statuses)} {status}"
            for status in (MEASURED, NOT_REACHED, OUT_OF_MEMORY, "failed")
            if any(s.startswith(status) for s in statuses)
        )
        return not faults and MEASURED in statuses, "; ".join([counted, *faults[:1]])


def main(device: str = "cuda") -> int:
    """Prints one line for each measurement, and last how many there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, required=True, help="for all of it")
    parser.add_argument("--data", type=Path, required=True, help="a JSON file for the figures")
    options = parser.parse_args()
    torch.manual_seed(0)
    benchmark = Benchmark(options.data, options.seconds, device)
    benchmark.measure()
    good, text = benchmark.verdict()
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
