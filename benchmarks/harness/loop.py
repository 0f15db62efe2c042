"""The measuring loop: for each case, check every candidate's loss, then time the candidates in turn."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

import torch

from kcd_ext.describe import describe_error

from .candidates import Candidate, exact
from .cases import Case, Shape
from .constants import BOTH, FORWARD, MEASURED, NOT_REACHED, OUT_OF_MEMORY
from .device import Device
from .floors import floor
from .inputs import Rotation
from .timing import Deadline, Seconds, interleave, summary

COMPILE_SECONDS = 40.0  # assumed time of torch.compile until one was measured

POSITIVE_FIGURES = ("median_us", "low_us", "high_us", "floor_us")  # finite and positive in every row that has them

Directions = tuple[str, ...]
Row = dict[str, object]


def is_supported(candidate: Candidate, case: Case, directions: Directions) -> bool:
    """Return whether a candidate can be measured on a case in these directions."""
    keeps = candidate.only_keep in (None, case.keep)
    labels = candidate.takes_labels or case.shape.ignored is None
    return keeps and labels and (BOTH in directions or not candidate.inplace)


@dataclass(eq=False)
class Benchmark:
    """The measurements of candidates on cases."""

    device: Device
    cases: Sequence[Case]
    """The cases in order of importance. When time runs out, the last ones are skipped."""
    candidates: Sequence[Candidate]
    """The first is kcd_ext's."""
    _: KW_ONLY
    seconds: float
    """Most seconds for one case and pass. The fewest rounds are run even past it."""
    absent: Mapping[str, str] = field(default_factory=dict)
    """Unavailable candidates: name -> reason."""
    wanted: Callable[[Candidate, Case], bool] = lambda candidate, case: True
    """Returns whether to measure a candidate on a case that it supports."""
    deadline: Deadline = field(default_factory=lambda: Deadline(math.inf))
    """The deadline of all measurements."""
    with_memory: bool = False
    """Also measure the peak memory of a call, in this process."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """Facts to include in the figures."""
    written: Callable[[dict], None] = lambda figures: None
    """Called with the figures after each case."""
    report: Callable[[str], None] = lambda line: None
    """Called with a line for each measurement."""

    def __post_init__(self) -> None:
        self._compile_seconds = COMPILE_SECONDS
        self.rows: dict[tuple[Case, str, str], Row] = {
            (case, direction, candidate.name): self._row(case, direction, candidate.name)
            for case in self.cases
            for directions in self.device.passes
            for direction in directions
            for candidate in self._candidates_of(case, directions)
        }
        for case in self.cases:
            self._set_floors(case, [])
        self.figures = {
            **self.facts,
            "directions": [FORWARD, BOTH],
            "candidates": [*(candidate.name for candidate in self.candidates), *self.absent],
            "absent": dict(self.absent),
            "rows": list(self.rows.values()),
        }
        self.write()

    def _candidates_of(self, case: Case, directions: Directions) -> list[Candidate]:
        return [
            candidate
            for candidate in self.candidates
            if is_supported(candidate, case, directions) and self.wanted(candidate, case)
        ]

    def _row(self, case: Case, direction: str, name: str) -> Row:
        shape = case.shape
        return {
            **shape._asdict(),
            "dtype": shape.dtype_name,
            "threads": shape.threads or self.device.threads,
            "keep": case.keep,
            "direction": direction,
            "candidate": name,
            "status": NOT_REACHED,
        }

    def _set_floors(self, case: Case, measured: list[float]) -> None:
        ceilings = self.device.ceilings(case.shape, measured)
        if ceilings is None:
            return
        for (other, direction, _), row in self.rows.items():
            if other == case:
                low = floor(self.device.work(case.job(backward=direction == BOTH)), ceilings)
                row.update(floor_us=round(low.seconds * 1e6, 2), floor_bound=low.bound)

    def write(self) -> None:
        """Pass the current figures to `written`."""
        self.written(self.figures)

    def measure(self) -> None:
        """Measure times, and memory if requested, of every case until the deadline."""
        groups: dict[Shape, list[Case]] = {}  # cases that share their inputs
        for case in self.cases:
            groups.setdefault(case.shape, []).append(case)
        for i, (shape, cases) in enumerate(groups.items()):
            if self.deadline.left() > 0:
                self._measure_shape(shape, cases, Deadline(self.deadline.left() / (len(groups) - i)))

    def rotation(self, shape: Shape, sets: int) -> Rotation | None:
        """Return inputs, or None if they do not fit into memory. The rows then get that status."""
        self.device.release()
        try:
            return Rotation(shape, sets, self.device.kind)
        except torch.OutOfMemoryError:
            for (case, _, _), row in self.rows.items():
                if case.shape == shape and row["status"] == NOT_REACHED:
                    row["status"] = OUT_OF_MEMORY
            return None

    def _measure_shape(self, shape: Shape, cases: list[Case], deadline: Deadline) -> None:
        self.device.configure(shape)
        inputs = self.rotation(shape, self.device.sets(shape))
        if inputs is None:
            return
        keeps = tuple(case.keep for case in cases)
        expected = exact(inputs.students[0], inputs.teachers[0], inputs.labels[0], keeps)
        remaining = [(case, directions) for case in cases for directions in self.device.passes]
        while remaining and self.deadline.left() > 0:
            case, directions = remaining.pop(0)
            with torch.set_grad_enabled(BOTH in directions):
                ready = [
                    candidate
                    for candidate in self._candidates_of(case, directions)
                    if self._prepare(candidate, case, directions, inputs, expected[case.keep])
                ]
                seconds = min(self.seconds, deadline.left() / (len(remaining) + 1))
                self._time(ready, case, directions, inputs, seconds)
            inputs.forget_original()
            self.write()

    def _prepare(
        self, candidate: Candidate, case: Case, directions: Directions, inputs: Rotation, expected: float
    ) -> bool:
        """Return whether a candidate is ready to be timed. If not, the status of its rows says why."""
        if candidate.compiles and self.deadline.left() < 2 * self._compile_seconds:
            return False
        found: Row = {}
        try:
            if candidate.inplace:
                inputs.keep_original()
            found = self._first_calls(candidate, case, directions, inputs, expected)
        except torch.OutOfMemoryError:
            found = {"status": OUT_OF_MEMORY}
            self.device.release()
        except Exception as error:  # a failure must not hide the other candidates' times
            found = {"status": f"failed: {describe_error(error)}"}
        finally:
            inputs.restore()
        for direction in directions:
            self.rows[case, direction, candidate.name].update(found)
        if "status" in found:
            return False
        if candidate.compiles:
            self._compile_seconds = found["first_call_seconds"]
        return True

    def _first_calls(
        self, candidate: Candidate, case: Case, directions: Directions, inputs: Rotation, expected: float
    ) -> Row:
        """Compile, warm up, compare the loss with the exact one, and find how many calls a sample needs.

        Returns:
            first_call_seconds, relative_error (None for another loss), peak_bytes if requested, calls.

        Raises:
            torch.OutOfMemoryError: the call does not fit into memory.
            ArithmeticError: the loss is wrong.
        """

        def call() -> torch.Tensor:
            return inputs.call(candidate, case.keep, backward=BOTH in directions)

        inputs.rewind()  # the exact loss belongs to the first set
        start = time.monotonic()
        loss = call().item()
        first_seconds = time.monotonic() - start
        error = None if candidate.tolerance is None else abs(loss - expected) / abs(expected)
        if error is not None and not error <= candidate.tolerance:
            raise ArithmeticError(f"loss {loss:.6g} instead of {expected:.6g}")
        peak = {"peak_bytes": self.device.peak_bytes(call)} if self.with_memory else {}
        return {
            "first_call_seconds": round(first_seconds, 2),
            "relative_error": error and float(f"{error:.1e}"),
            **peak,
            "calls": self.device.calls(call, inputs, candidate),
        }

    def _time(
        self,
        ready: list[Candidate],
        case: Case,
        directions: Directions,
        inputs: Rotation,
        seconds: float,
    ) -> None:
        """Time the candidates in turn for about `seconds` seconds."""

        def sample(candidate: Candidate) -> Seconds:
            calls = self.rows[case, directions[0], candidate.name]["calls"]
            taken = self.device.sample(inputs, candidate, case, directions, calls)
            if candidate.inplace:
                inputs.restore()
            return taken

        functions = {candidate.name: lambda candidate=candidate: sample(candidate) for candidate in ready}
        bandwidth = self.device.measure_bandwidth(case.shape)
        samples = interleave(functions, Deadline(seconds), self.device.rounds)
        self._set_floors(case, bandwidth + self.device.measure_bandwidth(case.shape))
        for name, taken in samples.items():
            for i, direction in enumerate(directions):
                row = self.rows[case, direction, name]
                row.update(status=MEASURED, rounds=len(taken), **summary([each[i] for each in taken]))
                row["of_floor"] = round(row["floor_us"] / row["median_us"], 3)
                self.report(f"{case}, {direction}: {name} {row['median_us']} us, {row['of_floor']:.0%} of the floor")

    def verdict(self) -> tuple[bool, str]:
        """Return whether the benchmark succeeded, and a summary.

        It succeeds if at least one row was measured, no row of kcd_ext failed, and all `POSITIVE_FIGURES` are finite and positive.
        """
        statuses = [row["status"] for row in self.rows.values()]
        faults = [
            f"{name} at {case}, {direction}: {row['status']}"
            for (case, direction, name), row in self.rows.items()
            if name.startswith(self.candidates[0].name) and row["status"].startswith("failed")
        ]
        faults += [
            f"{name} at {case}, {direction}: {figure} is {row[figure]}"
            for (case, direction, name), row in self.rows.items()
            for figure in POSITIVE_FIGURES
            if figure in row and not 0 < row[figure] < math.inf
        ]
        counted = ", ".join(
            f"{sum(s.startswith(status) for s in statuses)} {status}"
            for status in (MEASURED, NOT_REACHED, OUT_OF_MEMORY, "failed")
            if any(s.startswith(status) for s in statuses)
        )
        return not faults and MEASURED in statuses, "; ".join([counted, *faults[:1]])
