"""The measuring loop: for each case, check every candidate's loss, then time the candidates in turn."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

import torch

from kcd_ext.describe import describe_error

from .candidates import Candidate, exact
from .device import Device
from .floors import floor
from .inputs import Rotation
from .names import BOTH, FORWARD, MEASURED, NOT_REACHED, OUT_OF_MEMORY
from .places import Place, Shape
from .timing import Deadline, Seconds, in_turns, summary

COMPILE_SECONDS = 40.0  # assumed time of torch.compile until one was measured

POSITIVE_FIGURES = ("median_us", "low_us", "high_us", "floor_us")  # must be finite and positive

Directions = tuple[str, ...]
Row = dict[str, object]


def is_supported(candidate: Candidate, place: Place, directions: Directions) -> bool:
    """Return whether a candidate can be measured on a case in these directions."""
    keeps = candidate.only_keep in (None, place.keep)
    labels = candidate.takes_labels or place.shape.ignored is None
    return keeps and labels and (BOTH in directions or not candidate.inplace)


@dataclass(eq=False)
class Benchmark:
    """The measurements of candidates on cases."""

    device: Device
    places: Sequence[Place]
    """The cases in order of importance. When time runs out, the last ones are skipped."""
    candidates: Sequence[Candidate]
    """The first is kcd_ext's."""
    _: KW_ONLY
    seconds: float
    """Most seconds for one case and pass. The fewest rounds are run even past it."""
    absent: Mapping[str, str] = field(default_factory=dict)
    """Unavailable candidates: name -> reason."""
    wanted: Callable[[Candidate, Place], bool] = lambda candidate, place: True
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
        self.rows: dict[tuple[Place, str, str], Row] = {
            (place, direction, candidate.name): self._row(place, direction, candidate.name)
            for place in self.places
            for directions in self.device.passes
            for direction in directions
            for candidate in self._candidates_of(place, directions)
        }
        for place in self.places:
            self._set_floors(place, [])
        self.figures = {
            **self.facts,
            "directions": [FORWARD, BOTH],
            "candidates": [*(candidate.name for candidate in self.candidates), *self.absent],
            "absent": dict(self.absent),
            "rows": list(self.rows.values()),
        }
        self.write()

    def _candidates_of(self, place: Place, directions: Directions) -> list[Candidate]:
        return [
            candidate
            for candidate in self.candidates
            if is_supported(candidate, place, directions) and self.wanted(candidate, place)
        ]

    def _row(self, place: Place, direction: str, name: str) -> Row:
        shape = place.shape
        return {
            **shape._asdict(),
            "dtype": shape.dtype_name,
            "threads": shape.threads or self.device.threads,
            "keep": place.keep,
            "direction": direction,
            "candidate": name,
            "status": NOT_REACHED,
        }

    def _set_floors(self, place: Place, measured: list[float]) -> None:
        ceilings = self.device.ceilings(place.shape, measured)
        if ceilings is None:
            return
        for (other, direction, _), row in self.rows.items():
            if other == place:
                low = floor(self.device.work(place.job(backward=direction == BOTH)), ceilings)
                row.update(floor_us=round(low.seconds * 1e6, 2), floor_bound=low.bound)

    def write(self) -> None:
        """Pass the current figures to `written`."""
        self.written(self.figures)

    def measure(self) -> None:
        """Measure times, and memory if requested, of every case until the deadline."""
        groups: dict[Shape, list[Place]] = {}  # cases that share their inputs
        for place in self.places:
            groups.setdefault(place.shape, []).append(place)
        for i, (shape, places) in enumerate(groups.items()):
            if self.deadline.left() > 0:
                self._measure_shape(shape, places, Deadline(self.deadline.left() / (len(groups) - i)))

    def rotation(self, shape: Shape, sets: int) -> Rotation | None:
        """Return inputs, or None if they do not fit into memory. The rows then get that status."""
        self.device.release()
        try:
            return Rotation(shape, sets, self.device.kind)
        except torch.OutOfMemoryError:
            for (place, _, _), row in self.rows.items():
                if place.shape == shape and row["status"] == NOT_REACHED:
                    row["status"] = OUT_OF_MEMORY
            return None

    def _measure_shape(self, shape: Shape, places: list[Place], deadline: Deadline) -> None:
        self.device.configure(shape)
        inputs = self.rotation(shape, self.device.sets(shape))
        if inputs is None:
            return
        keeps = tuple(place.keep for place in places)
        expected = exact(inputs.students[0], inputs.teachers[0], inputs.labels[0], keeps)
        remaining = [(place, directions) for place in places for directions in self.device.passes]
        while remaining and self.deadline.left() > 0:
            place, directions = remaining.pop(0)
            with torch.set_grad_enabled(BOTH in directions):
                ready = [
                    candidate
                    for candidate in self._candidates_of(place, directions)
                    if self._prepare(candidate, place, directions, inputs, expected[place.keep])
                ]
                seconds = min(self.seconds, deadline.left() / (len(remaining) + 1))
                self._time(ready, place, directions, inputs, seconds)
            inputs.forget_original()
            self.write()

    def _prepare(
        self, candidate: Candidate, place: Place, directions: Directions, inputs: Rotation, expected: float
    ) -> bool:
        """Return whether a candidate is ready to be timed. If not, the status of its rows says why."""
        if candidate.compiles and self.deadline.left() < 2 * self._compile_seconds:
            return False
        found: Row = {}
        try:
            if candidate.inplace:
                inputs.keep_original()
            found = self._first_calls(candidate, place, directions, inputs, expected)
        except torch.OutOfMemoryError:
            found = {"status": OUT_OF_MEMORY}
            self.device.release()
        except Exception as error:  # a failure must not hide the other candidates' times
            found = {"status": f"failed: {describe_error(error)}"}
        finally:
            inputs.restore()
        for direction in directions:
            self.rows[place, direction, candidate.name].update(found)
        if "status" in found:
            return False
        if candidate.compiles:
            self._compile_seconds = found["first_call_seconds"]
        return True

    def _first_calls(
        self, candidate: Candidate, place: Place, directions: Directions, inputs: Rotation, expected: float
    ) -> Row:
        """Compile, warm up, compare the loss with the exact one, and find how many calls a sample needs.

        Returns:
            first_call_seconds, relative_error (None for another loss), peak_bytes if requested, calls.

        Raises:
            torch.OutOfMemoryError: the call does not fit into memory.
            ArithmeticError: the loss is wrong.
        """

        def call() -> torch.Tensor:
            return inputs.call(candidate, place.keep, backward=BOTH in directions)

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
        place: Place,
        directions: Directions,
        inputs: Rotation,
        seconds: float,
    ) -> None:
        """Time the candidates in turn for about `seconds` seconds."""

        def sample(candidate: Candidate) -> Seconds:
            calls = self.rows[place, directions[0], candidate.name]["calls"]
            taken = self.device.sample(inputs, candidate, place, directions, calls)
            if candidate.inplace:
                inputs.restore()
            return taken

        functions = {candidate.name: lambda candidate=candidate: sample(candidate) for candidate in ready}
        bandwidth = self.device.measure_bandwidth(place.shape)
        samples = in_turns(functions, Deadline(seconds), self.device.rounds)
        self._set_floors(place, bandwidth + self.device.measure_bandwidth(place.shape))
        for name, taken in samples.items():
            for i, direction in enumerate(directions):
                row = self.rows[place, direction, name]
                row.update(status=MEASURED, rounds=len(taken), **summary([each[i] for each in taken]))
                row["of_floor"] = round(row["floor_us"] / row["median_us"], 3)
                self.report(f"{place}, {direction}: {name} {row['median_us']} us, {row['of_floor']:.0%} of the floor")

    def verdict(self) -> tuple[bool, str]:
        """Return whether the benchmark succeeded, and a summary.

        It succeeds if at least one row was measured and no row of kcd_ext failed.
        """
        statuses = [row["status"] for row in self.rows.values()]
        faults = [
            f"{name} at {place}, {direction}: {row['status']}"
            for (place, direction, name), row in self.rows.items()
            if name.startswith(self.candidates[0].name) and row["status"].startswith("failed")
        ]
        faults += [
            f"{name} at {place}, {direction}: {figure} is {row[figure]}"
            for (place, direction, name), row in self.rows.items()
            for figure in POSITIVE_FIGURES
            if figure in row and not 0 < row[figure] < math.inf
        ]
        counted = ", ".join(
            f"{sum(s.startswith(status) for s in statuses)} {status}"
            for status in (MEASURED, NOT_REACHED, OUT_OF_MEMORY, "failed")
            if any(s.startswith(status) for s in statuses)
        )
        return not faults and MEASURED in statuses, "; ".join([counted, *faults[:1]])
