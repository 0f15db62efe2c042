"""The loop: every candidate's loss checked, then its times taken in turns with the others', place after place."""

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

COMPILE_SECONDS = 40.0  # what torch.compile is taken to need until it has been seen

FIGURES = ("median_us", "low_us", "high_us", "floor_us")  # what must be a number in every row that has it

Directions = tuple[str, ...]
Row = dict[str, object]


def takes_part(candidate: Candidate, place: Place, directions: Directions) -> bool:
    """Whether a candidate can be measured there at all."""
    keeps = candidate.only_keep in (None, place.keep)
    labels = candidate.takes_labels or place.shape.ignored is None
    return keeps and labels and (BOTH in directions or not candidate.inplace)


@dataclass(eq=False)
class Benchmark:
    """All measurements of some candidates at some places."""

    device: Device
    places: Sequence[Place]
    """In order of importance: what the time does not suffice for is left out from the end."""
    candidates: Sequence[Candidate]
    """The first is ours."""
    _: KW_ONLY
    seconds: float
    """Of measuring at one place and pass, at most (the fewest rounds are made even so)."""
    absent: Mapping[str, str] = field(default_factory=dict)
    """Candidates that cannot be measured: name -> why."""
    wanted: Callable[[Candidate, Place], bool] = lambda candidate, place: True
    """Whether a candidate is measured at a place, where it can be."""
    deadline: Deadline = field(default_factory=lambda: Deadline(math.inf))
    """For everything."""
    with_memory: bool = False
    """Measure also what a call takes, in this process."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """Stand among the figures."""
    written: Callable[[dict], None] = lambda figures: None
    """Is called with the figures after each place."""
    report: Callable[[str], None] = lambda line: None
    """Is called with a line for each measurement."""

    def __post_init__(self) -> None:
        self._compile_seconds = COMPILE_SECONDS
        self.rows: dict[tuple[Place, str, str], Row] = {
            (place, direction, candidate.name): self._row(place, direction, candidate.name)
            for place in self.places
            for directions in self.device.passes
            for direction in directions
            for candidate in self._taking_part(place, directions)
        }
        for place in self.places:
            self._state_floors(place, [])
        self.figures = {
            **self.facts,
            "directions": [FORWARD, BOTH],
            "candidates": [*(candidate.name for candidate in self.candidates), *self.absent],
            "absent": dict(self.absent),
            "rows": list(self.rows.values()),
        }
        self.write()

    def _taking_part(self, place: Place, directions: Directions) -> list[Candidate]:
        return [
            candidate
            for candidate in self.candidates
            if takes_part(candidate, place, directions) and self.wanted(candidate, place)
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

    def _state_floors(self, place: Place, gauged: list[float]) -> None:
        ceilings = self.device.ceilings(place.shape, gauged)
        if ceilings is None:
            return
        for (other, direction, _), row in self.rows.items():
            if other == place:
                low = floor(self.device.work(place.job(backward=direction == BOTH)), ceilings)
                row.update(floor_us=round(low.seconds * 1e6, 2), floor_bound=low.bound)

    def write(self) -> None:
        """The figures as they are now."""
        self.written(self.figures)

    def measure(self) -> None:
        """Times, and memory where it is asked for, of every place, as far as the time goes."""
        groups: dict[Shape, list[Place]] = {}  # that share their inputs
        for place in self.places:
            groups.setdefault(place.shape, []).append(place)
        for i, (shape, places) in enumerate(groups.items()):
            if self.deadline.left() > 0:
                self._measure_shape(shape, places, Deadline(self.deadline.left() / (len(groups) - i)))

    def rotation(self, shape: Shape, sets: int) -> Rotation | None:
        """Inputs; None where they do not fit, which the rows then say."""
        self.device.release()
        try:
            return Rotation(shape, sets, self.device.kind)
        except torch.OutOfMemoryError:
            for (place, _, _), row in self.rows.items():
                if place.shape == shape and row["status"] == NOT_REACHED:
                    row["status"] = OUT_OF_MEMORY
            return None

    def _measure_shape(self, shape: Shape, places: list[Place], deadline: Deadline) -> None:
        self.device.use(shape)
        given = self.rotation(shape, self.device.sets(shape))
        if given is None:
            return
        want = exact(given.students[0], given.teachers[0], given.labels[0], tuple(place.keep for place in places))
        to_do = [(place, directions) for place in places for directions in self.device.passes]
        while to_do and self.deadline.left() > 0:
            place, directions = to_do.pop(0)
            with torch.set_grad_enabled(BOTH in directions):
                ready = [
                    candidate
                    for candidate in self._taking_part(place, directions)
                    if self._prepare(candidate, place, directions, given, want[place.keep])
                ]
                seconds = min(self.seconds, deadline.left() / (len(to_do) + 1))
                self._time(ready, place, directions, given, seconds)
            given.forget_original()
            self.write()

    def _prepare(
        self, candidate: Candidate, place: Place, directions: Directions, given: Rotation, want: float
    ) -> bool:
        """Whether a candidate is ready to be timed; if not, its rows say why."""
        if candidate.compiles and self.deadline.left() < 2 * self._compile_seconds:
            return False
        found: Row = {}
        try:
            if candidate.inplace:
                given.keep_original()
            found = self._first_calls(candidate, place, directions, given, want)
        except torch.OutOfMemoryError:
            found = {"status": OUT_OF_MEMORY}
            self.device.release()
        except Exception as error:  # one that fails must not hide the others' times
            found = {"status": f"failed: {describe_error(error)}"}
        finally:
            given.restore()
        for direction in directions:
            self.rows[place, direction, candidate.name].update(found)
        if "status" in found:
            return False
        if candidate.compiles:
            self._compile_seconds = found["first_call_seconds"]
        return True

    def _first_calls(
        self, candidate: Candidate, place: Place, directions: Directions, given: Rotation, want: float
    ) -> Row:
        """Compiles, warms up, compares the loss with the exact one, and finds how many calls make a sample.

        Returns:
            first_call_seconds, relative_error (None for another loss), peak_bytes where it is asked for, calls.

        Raises:
            torch.OutOfMemoryError: it does not fit.
            ArithmeticError: it computes something else.
        """

        def call() -> torch.Tensor:
            return given.call(candidate, place.keep, backward=BOTH in directions)

        given.rewind()  # the first set is the one whose loss is known
        start = time.monotonic()
        loss = call().item()
        first_seconds = time.monotonic() - start
        error = None if candidate.tolerance is None else abs(loss - want) / abs(want)
        if error is not None and not error <= candidate.tolerance:
            raise ArithmeticError(f"loss {loss:.6g} instead of {want:.6g}")
        peak = {"peak_bytes": self.device.peak_bytes(call)} if self.with_memory else {}
        return {
            "first_call_seconds": round(first_seconds, 2),
            "relative_error": error and float(f"{error:.1e}"),
            **peak,
            "calls": self.device.calls(call, given, candidate),
        }

    def _time(
        self,
        ready: list[Candidate],
        place: Place,
        directions: Directions,
        given: Rotation,
        seconds: float,
    ) -> None:
        """The candidates take turns for about so many seconds."""

        def sample(candidate: Candidate) -> Seconds:
            calls = self.rows[place, directions[0], candidate.name]["calls"]
            taken = self.device.sample(given, candidate, place, directions, calls)
            if candidate.inplace:
                given.restore()
            return taken

        functions = {candidate.name: lambda candidate=candidate: sample(candidate) for candidate in ready}
        gauged = self.device.gauge(place.shape)
        samples = in_turns(functions, Deadline(seconds), self.device.rounds)
        self._state_floors(place, gauged + self.device.gauge(place.shape))
        for name, taken in samples.items():
            for i, direction in enumerate(directions):
                row = self.rows[place, direction, name]
                row.update(status=MEASURED, rounds=len(taken), **summary([each[i] for each in taken]))
                row["of_floor"] = round(row["floor_us"] / row["median_us"], 3)
                self.report(f"{place}, {direction}: {name} {row['median_us']} us, {row['of_floor']:.0%} of the floor")

    def verdict(self) -> tuple[bool, str]:
        """Whether something was measured, and ours wherever there was time and memory; and the summary."""
        statuses = [row["status"] for row in self.rows.values()]
        faults = [
            f"{name} at {place}, {direction}: {row['status']}"
            for (place, direction, name), row in self.rows.items()
            if name.startswith(self.candidates[0].name) and row["status"].startswith("failed")
        ]
        faults += [
            f"{name} at {place}, {direction}: {figure} is {row[figure]}"
            for (place, direction, name), row in self.rows.items()
            for figure in FIGURES
            if figure in row and not 0 < row[figure] < math.inf
        ]
        counted = ", ".join(
            f"{sum(s.startswith(status) for s in statuses)} {status}"
            for status in (MEASURED, NOT_REACHED, OUT_OF_MEMORY, "failed")
            if any(s.startswith(status) for s in statuses)
        )
        return not faults and MEASURED in statuses, "; ".join([counted, *faults[:1]])
