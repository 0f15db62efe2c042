"""Print the resources of the CUDA kernels and their cost per pair of logits: python benchmarks/kernel_table.py

The figures come from the compiled code, without a GPU (see python_tests/static_checks.py). Needs nvcc and nvdisasm. Prints the
Markdown tables of docs/internals/cuda-kernels.md.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "python_tests"))
import static_checks
from harness.report import table
from static_checks import Build, Work

# Threads per block, as in csrc/cuda/shape.h and launch.cu.
SMALL, LARGE = 256, 768
THREADS = {
    "forward_rows<float>": (SMALL, LARGE),
    "forward_rows<double>": (SMALL,),
    "backward_rows<float>": (SMALL,),
    "backward_rows<double>": (SMALL,),
    "forward_rows_with_targets<float>": (SMALL,),
    "forward_rows_with_targets<double>": (SMALL,),
    "backward_rows_with_targets<float>": (SMALL,),
    "backward_rows_with_targets<double>": (SMALL,),
    "select_by_one_block": (SMALL, LARGE),
    "select_digit": (LARGE,),
    "select_mark": (LARGE,),
    "reduce_rows<float>": (SMALL, LARGE),
    "reduce_rows<double>": (SMALL, LARGE),
    "map_rows": (SMALL,),
}

FORWARD, BACKWARD = "forward_rows<float>", "backward_rows<float>"
WORK = (
    ("forward, T = 1", Work(FORWARD, 1, False)),
    ("forward, T = 2", Work(FORWARD, 2, False)),
    ("forward, T = 4", Work(FORWARD, 4, False)),
    ("forward, other T", Work(FORWARD, 0, False)),
    ("forward with the teacher's entropy, T = 4", Work(FORWARD, 4, True)),
    ("forward with the teacher's entropy, other T", Work(FORWARD, 0, True)),
    ("backward", Work(BACKWARD, 4, False)),
    ("backward with labels, T = 1", Work(BACKWARD, 1, True)),
    ("backward with labels, T = 2", Work(BACKWARD, 2, True)),
    ("backward with labels, T = 4", Work(BACKWARD, 4, True)),
    ("backward with labels, other T", Work(BACKWARD, 0, True)),
)


def occupancy_table(builds: dict[str, Build], architecture: str) -> str:
    """Return the table of registers, shared memory and resident blocks on one architecture, and most registers on any."""
    multiprocessor = static_checks.MULTIPROCESSORS[architecture]
    head = ["kernel", f"registers, sm_{architecture}", "maximum on any", "static shared memory, bytes"]
    head += ["threads per block", "blocks resident", "occupancy"]
    lines = []
    for kernel, all_threads in THREADS.items():
        resources = builds[architecture].resources[kernel]
        most = max(build.resources[kernel].registers for build in builds.values())
        resident = [static_checks.resident_blocks(resources, threads, multiprocessor) for threads in all_threads]
        shares = [
            f"{blocks * threads / multiprocessor.threads:.1%}"
            for blocks, threads in zip(resident, all_threads, strict=True)
        ]
        either = [" or ".join(map(str, values)) for values in (all_threads, resident, shares)]
        lines.append([f"`{kernel}`", *map(str, (resources.registers, most, resources.shared)), *either])
    return table(head, lines) + "\n"


def work_table(build: Build) -> str:
    """Return the table of exponentials and instructions per pair of logits: the maximum over all types of a size."""
    code = static_checks.disassemble(build)
    head = ["per pair of logits", "exponentials, 16-bit", "instructions", "exponentials, float32", "instructions"]
    lines = []
    for name, work in WORK:
        cells = [name]
        for size in (2, 4):
            loops = static_checks.hot_loops_of(code[work.kernel], size)
            pairs = [static_checks.cost_per_pair(loop, work, size) for loop in loops]
            exponentials, instructions = map(max, zip(*pairs, strict=True))
            cells += [f"{exponentials:.3g}", f"{instructions:.1f}"]
        lines.append(cells)
    return table(head, lines) + "\n"


def main() -> int:
    """Compile the kernels and print both tables. Return 1 if a tool is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--architecture",
        choices=static_checks.MULTIPROCESSORS,
        default="90",
        help="architecture of the figures (%(default)s)",
    )
    architecture = parser.parse_args().architecture
    try:
        with tempfile.TemporaryDirectory() as folder:
            all_architectures = dict.fromkeys((*static_checks.architectures(), architecture))
            builds = static_checks.compile_all(all_architectures, Path(folder))
            print(occupancy_table(builds, architecture), work_table(builds[architecture]), sep="\n", end="")
    except static_checks.MissingToolError as missing:
        print(missing, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
