"""Section benchmarks: time the losses of kcd_ext, PyTorch and Liger-Kernel in one process, and compare them with the floors.

For few logits the host takes longer than the device, so calls are also replayed from CUDA graphs.

This module says what is measured and for how long; benchmarks/harness measures.
"""

import math
import sys
from functools import partial

import torch
from harness import cuda
from harness.candidates import Candidate
from harness.cases import Case, Shape
from harness.constants import BOTH, EAGER, MEASURED, OURS
from harness.loop import Benchmark
from harness.machine import write_json
from harness.timing import Deadline

from kcd_ext.describe import one_line

from .process import section_options

SHAPES = (  # in order of importance; the last ones are skipped if time runs out
    Shape(8192, 32_000, torch.bfloat16),
    Shape(4096, 1000, torch.float32),
    Shape(256, 100, torch.float32),
    Shape(4096, 128_256, torch.bfloat16),
    Shape(8192, 151_936, torch.bfloat16),
)
KEEPS = (0.7, 1.0, 0.2)  # in order of importance
# With few classes and all rows kept, the time grows with the rows as the end of a launch does: its selection and sums. These
# cases take a second in total and come first.
TAIL = tuple(Case(Shape(rows, 10), 1.0) for rows in (1024, 4096, 8192, 65_536))
MOST_SECONDS = 4.0  # per shape, keep and direction
LAUNCHES_SHARE = 0.15  # share of the time that counts launches
REPLAYS_SHARE = 0.05  # share of the time that replays graphs
FEW = 2**23  # logits; below this the host may take longer than the device


def cases() -> list[Case]:
    """Return everything to measure, in order."""
    return [*TAIL, *(Case(shape, keep) for shape in SHAPES for keep in KEEPS)]


def wanted(candidate: Candidate, case: Case) -> bool:
    """Return whether to measure a candidate at a case."""
    return candidate.name == OURS if case in TAIL else case.keep == KEEPS[0] or not candidate.compiles


def replay(benchmark: Benchmark, end: Deadline) -> None:
    """Replay kcd_ext and eager PyTorch from CUDA graphs, for few logits, until the time is over. A failure is noted in its row."""
    for case in cases():
        if case.shape.rows * case.shape.classes > FEW:
            continue
        chosen = [
            (direction, candidate)
            for direction, candidate in _measured(benchmark, case)
            if candidate.name in (OURS, EAGER)
        ]
        inputs = benchmark.rotation(case.shape, benchmark.device.sets(case.shape)) if chosen else None
        for direction, candidate in chosen if inputs else []:
            if end.left() == 0:
                return
            try:
                seconds = cuda.replayed(inputs, candidate, case.keep, backward=direction == BOTH)
                figure: object = round(seconds * 1e6, 2)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                figure = f"failed: {one_line(error)}"
            benchmark.rows[case, direction, candidate.name]["replay_us"] = figure
            benchmark.write()


def failed_replays(benchmark: Benchmark) -> list[str]:
    """Return the replays of kcd_ext that have no valid time."""
    figures = {key: row["replay_us"] for key, row in benchmark.rows.items() if "replay_us" in row}
    return [
        f"{name} at {case}, {direction}, replayed: {figure}"
        for (case, direction, name), figure in figures.items()
        if name == OURS and not (isinstance(figure, float) and 0 < figure < math.inf)
    ]


def count_launches(benchmark: Benchmark, end: Deadline) -> None:
    """Count the launches of every timed candidate, until the time is over. Later calls are slower."""
    for case in sorted(cases(), key=lambda case: KEEPS.index(case.keep)):
        inputs = None  # free the previous inputs before creating the next
        measured = _measured(benchmark, case)
        inputs = benchmark.rotation(case.shape, sets=1) if measured else None
        for direction, candidate in measured if inputs else []:
            if end.left() == 0:
                return
            backward = direction == BOTH
            try:
                with torch.set_grad_enabled(backward):
                    launches = cuda.launches(partial(inputs.call, candidate, case.keep, backward=backward))
            except torch.OutOfMemoryError:
                continue
            except RuntimeError as error:  # the profiler does not work on this machine
                benchmark.figures["launches"] = f"not counted: {one_line(error)}"
                benchmark.write()
                return
            benchmark.rows[case, direction, candidate.name].update(launches._asdict())
            benchmark.write()


def _measured(benchmark: Benchmark, case: Case) -> list[tuple[str, Candidate]]:
    return [
        (direction, candidate)
        for (direction,) in benchmark.device.passes
        for candidate in benchmark.candidates
        if benchmark.rows.get((case, direction, candidate.name), {}).get("status") == MEASURED
    ]


def main() -> int:
    """Print one line per measurement, and their number at the end."""
    options = section_options(__doc__)
    torch.manual_seed(0)
    end, end_of_replays = Deadline(options.seconds), Deadline(options.seconds * (1 - LAUNCHES_SHARE))
    end_of_timing = Deadline(options.seconds * (1 - LAUNCHES_SHARE - REPLAYS_SHARE))
    device = cuda.Cuda()
    candidates, absent = device.candidates()
    (bandwidth, exponentials), clock = device.reached
    benchmark = Benchmark(
        device,
        cases(),
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
            "ceilings": device.explain_ceilings(),
        },
        written=lambda figures: write_json(options.data, figures),
        report=lambda line: print(line, flush=True),
    )
    benchmark.measure()
    replay(benchmark, end_of_replays)
    count_launches(benchmark, end)
    good, text = benchmark.verdict()
    failed = failed_replays(benchmark)
    if not all(0 < x < math.inf for x in (bandwidth, clock or 1.0)):
        failed.append(f"a copy of {bandwidth} bytes a second at a clock of {clock} Hz")
    without = [f"without {name}: {why}" for name, why in absent.items()]
    print("; ".join([text, *failed[:1], *without]))
    return 0 if good and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
