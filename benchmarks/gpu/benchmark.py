"""Section benchmarks: times of ours, PyTorch's and Liger-Kernel's losses in one process, and the floors beside them.

Where logits are few the host takes longer than the device: there calls are replayed from CUDA graphs as well.

What is measured, and for how long; how is the harness's (benchmarks/harness).
"""

import math
import sys
from functools import partial

import torch
from harness import cuda
from harness.candidates import Candidate
from harness.loop import Benchmark
from harness.machine import write_json
from harness.names import BOTH, EAGER, MEASURED, OWN
from harness.places import Place, Shape
from harness.timing import Deadline

from kcd_ext.describe import one_line

from .process import section_options

SHAPES = (  # in order of importance: what the time does not suffice for is left out from the end
    Shape(8192, 32_000, torch.bfloat16),
    Shape(4096, 1000, torch.float32),
    Shape(256, 100, torch.float32),
    Shape(4096, 128_256, torch.bfloat16),
    Shape(8192, 151_936, torch.bfloat16),
)
KEEPS = (0.7, 1.0, 0.2)  # in order of importance
# Few classes and all rows kept: how the time grows with the rows is how the end of a launch does, its selection and sums.  These
# take a second together, and are measured first.
TAIL = tuple(Place(Shape(rows, 10), 1.0) for rows in (1024, 4096, 8192, 65_536))
MOST_SECONDS = 4.0  # of measuring at one shape, keep and direction
LAUNCHES_SHARE = 0.15  # of the time, for counting launches
REPLAYS_SHARE = 0.05  # of the time, for replaying graphs
FEW = 2**23  # logits: where a call may take the host longer than the device


def places() -> list[Place]:
    """All that is measured, in order."""
    return [*TAIL, *(Place(shape, keep) for shape in SHAPES for keep in KEEPS)]


def wanted(candidate: Candidate, place: Place) -> bool:
    """Whether the time is spent on it."""
    return candidate.name == OWN if place in TAIL else place.keep == KEEPS[0] or not candidate.compiles


def replay(benchmark: Benchmark, end: Deadline) -> None:
    """Ours and eager PyTorch from CUDA graphs, where logits are few, as far as the time goes.  What fails says so in its row."""
    for place in places():
        if place.shape.rows * place.shape.classes > FEW:
            continue
        some = [
            (direction, candidate)
            for direction, candidate in _measured(benchmark, place)
            if candidate.name in (OWN, EAGER)
        ]
        given = benchmark.rotation(place.shape, benchmark.device.sets(place.shape)) if some else None
        for direction, candidate in some if given else []:
            if end.left() == 0:
                return
            try:
                seconds = cuda.replayed(given, candidate, place.keep, backward=direction == BOTH)
                figure: object = round(seconds * 1e6, 2)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                figure = f"failed: {one_line(error)}"
            benchmark.rows[place, direction, candidate.name]["replay_us"] = figure
            benchmark.write()


def replays_that_failed(benchmark: Benchmark) -> list[str]:
    """Ours among them: those without a number."""
    figures = {key: row["replay_us"] for key, row in benchmark.rows.items() if "replay_us" in row}
    return [
        f"{name} at {place}, {direction}, replayed: {figure}"
        for (place, direction, name), figure in figures.items()
        if name == OWN and not (isinstance(figure, float) and 0 < figure < math.inf)
    ]


def count_launches(benchmark: Benchmark, end: Deadline) -> None:
    """Of every candidate that was timed, as far as the time goes; calls after it are slower."""
    for place in sorted(places(), key=lambda place: KEEPS.index(place.keep)):
        given = None  # frees the last place's inputs before the next are made
        measured = _measured(benchmark, place)
        given = benchmark.rotation(place.shape, sets=1) if measured else None
        for direction, candidate in measured if given else []:
            if end.left() == 0:
                return
            backward = direction == BOTH
            try:
                with torch.set_grad_enabled(backward):
                    seen = cuda.launches(partial(given.call, candidate, place.keep, backward=backward))
            except torch.OutOfMemoryError:
                continue
            except RuntimeError as error:  # a profiler that does not work here
                benchmark.figures["launches"] = f"not counted: {one_line(error)}"
                benchmark.write()
                return
            benchmark.rows[place, direction, candidate.name].update(seen._asdict())
            benchmark.write()


def _measured(benchmark: Benchmark, place: Place) -> list[tuple[str, Candidate]]:
    return [
        (direction, candidate)
        for (direction,) in benchmark.device.passes
        for candidate in benchmark.candidates
        if benchmark.rows.get((place, direction, candidate.name), {}).get("status") == MEASURED
    ]


def main() -> int:
    """Prints one line for each measurement, and last how many there are."""
    options = section_options(__doc__)
    torch.manual_seed(0)
    end, end_of_replays = Deadline(options.seconds), Deadline(options.seconds * (1 - LAUNCHES_SHARE))
    end_of_timing = Deadline(options.seconds * (1 - LAUNCHES_SHARE - REPLAYS_SHARE))
    device = cuda.Cuda()
    candidates, absent = device.candidates()
    (bandwidth, exponentials), clock = device.reached
    benchmark = Benchmark(
        device,
        places(),
        candidates,
        absent=absent,
        wanted=wanted,
        seconds=MOST_SECONDS,
        deadline=end_of_timing,
        with_memory=True,
        facts={
            "copy_bytes_per_second": bandwidth,
            "clock_under_load_hz": clock,
            "exponentials_per_second": exponentials,
            "ceilings": device.about_ceilings(),
        },
        written=lambda figures: write_json(options.data, figures),
        report=lambda line: print(line, flush=True),
    )
    benchmark.measure()
    replay(benchmark, end_of_replays)
    count_launches(benchmark, end)
    good, text = benchmark.verdict()
    failed = replays_that_failed(benchmark)
    if not all(0 < x < math.inf for x in (bandwidth, clock or 1.0)):
        failed.append(f"a copy of {bandwidth} bytes a second at a clock of {clock} Hz")
    without = [f"without {name}: {why}" for name, why in absent.items()]
    print("; ".join([text, *failed[:1], *without]))
    return 0 if good and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
