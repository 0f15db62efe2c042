"""Section benchmarks: times of ours, PyTorch's and Liger-Kernel's losses in one process, and the floors beside them.

What is measured, and for how long; how is the harness's (benchmarks/harness).
"""

import argparse
import sys
from pathlib import Path

import torch
from harness import cuda
from harness.candidates import Candidate
from harness.loop import Benchmark, first_line
from harness.machine import write_json
from harness.names import BOTH, MEASURED
from harness.places import Place, Shape
from harness.timing import Deadline

SHAPES = (  # in order of importance: what the time does not suffice for is left out from the end
    Shape(8192, 32_000, torch.bfloat16),
    Shape(4096, 1000, torch.float32),
    Shape(256, 100, torch.float32),
    Shape(4096, 128_256, torch.bfloat16),
    Shape(8192, 151_936, torch.bfloat16),
)
KEEPS = (0.7, 1.0, 0.2)  # in order of importance
MOST_SECONDS = 4.0  # of measuring at one shape, keep and direction
LAUNCHES_SHARE = 0.15  # of the time, for counting launches


def wanted(candidate: Candidate, place: Place) -> bool:
    """Whether the time is spent on it."""
    return place.keep == KEEPS[0] or not candidate.compiles


def count_launches(benchmark: Benchmark, end: Deadline) -> None:
    """Of every candidate that was timed, as far as the time goes; calls after it are slower."""
    for keep in KEEPS:
        for shape in SHAPES:
            if end.left() > 0 and "launches" not in benchmark.figures:
                _count_launches(benchmark, Place(shape, keep), end)


def _count_launches(benchmark: Benchmark, place: Place, end: Deadline) -> None:
    measured = [
        (direction, candidate)
        for (direction,) in benchmark.device.passes
        for candidate in benchmark.candidates
        if benchmark.rows.get((place, direction, candidate.name), {}).get("status") == MEASURED
    ]
    given = benchmark.rotation(place.shape, sets=1) if measured else None
    if given is None:
        return
    for direction, candidate in measured:
        if end.left() == 0:
            return
        backward = direction == BOTH
        with torch.set_grad_enabled(backward):
            try:
                seen = cuda.launches(
                    lambda each=candidate, backward=backward: given.call(each, place.keep, backward=backward)
                )
            except torch.OutOfMemoryError:
                continue
            except RuntimeError as error:  # a profiler that does not work here
                benchmark.figures["launches"] = f"not counted: {first_line(error)}"
                benchmark.write()
                return
        benchmark.rows[place, direction, candidate.name].update(seen._asdict())
        benchmark.write()


def main() -> int:
    """Prints one line for each measurement, and last how many there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, required=True, help="for all of it")
    parser.add_argument("--data", type=Path, required=True, help="a JSON file for the figures")
    options = parser.parse_args()
    torch.manual_seed(0)
    end, end_of_timing = Deadline(options.seconds), Deadline(options.seconds * (1 - LAUNCHES_SHARE))
    device = cuda.Cuda()
    candidates, absent = device.candidates()
    (bandwidth, exponentials), clock = device.reached
    benchmark = Benchmark(
        device,
        [Place(shape, keep) for shape in SHAPES for keep in KEEPS],
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
        told=lambda line: print(line, flush=True),
    )
    benchmark.measure()
    count_launches(benchmark, end)
    good, text = benchmark.verdict()
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
