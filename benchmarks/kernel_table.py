"""What the CUDA kernels take of a multiprocessor, and of each pair of logits: python benchmarks/kernel_table.py

Read off what nvcc makes of them, without a GPU, by the code that the tests use (python_tests/static_checks.py).  Needs nvcc and
nvdisasm.  Prints Markdown, the tables of docs/kernels.md.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "python_tests"))
import static_checks
from harness.report import table
from static_checks import Build, Work

# Threads of a block, as csrc/cuda/shape.h and launch.cu choose them.
FEW, MANY = 256, 768
THREADS = {
    "forward_rows<float>": (FEW, MANY),
    "forward_rows<double>": (FEW,),
    "backward_rows<float>": (FEW,),
    "backward_rows<double>": (FEW,),
    "select_by_one_block": (FEW, MANY),
    "select_digit": (MANY,),
    "select_mark": (MANY,),
    "reduce_rows<float>": (FEW, MANY),
    "reduce_rows<double>": (FEW, MANY),
    "map_rows": (FEW,),
}

FORWARD, BACKWARD = "forward_rows<float>", "backward_rows<float>"
WORK = (
    ("forward, T = 1", Work(FORWARD, 1, False)),
    ("forward, T = 2", Work(FORWARD, 2, False)),
    ("forward, T = 4", Work(FORWARD, 4, False)),
    ("forward, another T", Work(FORWARD, 0, False)),
    ("forward with the teacher's entropy, T = 4", Work(FORWARD, 4, True)),
    ("forward with the teacher's entropy, another T", Work(FORWARD, 0, True)),
    ("backward", Work(BACKWARD, 4, False)),
    ("backward with labels, T = 1", Work(BACKWARD, 1, True)),
    ("backward with labels, T = 2", Work(BACKWARD, 2, True)),
    ("backward with labels, T = 4", Work(BACKWARD, 4, True)),
    ("backward with labels, another T", Work(BACKWARD, 0, True)),
)


def occupancy_table(builds: dict[str, Build], architecture: str) -> str:
    """Registers, shared memory and resident blocks for one architecture, from builds for it and others."""
    multiprocessor = static_checks.MULTIPROCESSORS[architecture]
    head = ["kernel", f"registers, sm_{architecture}", "most on any", "static shared memory, bytes"]
    head += ["threads a block", "blocks resident", "occupancy"]
    lines = []
    for kernel, all_threads in THREADS.items():
        own = builds[architecture].resources[kernel]
        most = max(build.resources[kernel].registers for build in builds.values())
        resident = [static_checks.resident_blocks(own, threads, multiprocessor) for threads in all_threads]
        shares = [
            f"{blocks * threads / multiprocessor.threads:.1%}"
            for blocks, threads in zip(resident, all_threads, strict=True)
        ]
        either = [" or ".join(map(str, values)) for values in (all_threads, resident, shares)]
        lines.append([f"`{kernel}`", *map(str, (own.registers, most, own.shared)), *either])
    return table(head, lines) + "\n"


def work_table(build: Build) -> str:
    """Exponentials and instructions for one pair of logits: of all types of a size the most."""
    code = static_checks.disassemble(build)
    head = ["for a pair of logits", "exponentials, 16-bit", "instructions", "exponentials, float32", "instructions"]
    lines = []
    for name, work in WORK:
        cells = [name]
        for size in (2, 4):
            loops = static_checks.hot_loops_of(code[work.kernel], size)
            pairs = [static_checks.of_a_pair(loop, work, size) for loop in loops]
            exponentials, instructions = map(max, zip(*pairs, strict=True))
            cells += [f"{exponentials:.3g}", f"{instructions:.1f}"]
        lines.append(cells)
    return table(head, lines) + "\n"


def main() -> int:
    """Compiles, and prints both tables; 1 where a tool is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--architecture", choices=static_checks.MULTIPROCESSORS, default="90", help="whose figures are printed"
    )
    architecture = parser.parse_args().architecture
    try:
        with tempfile.TemporaryDirectory() as folder:
            everywhere = dict.fromkeys((*static_checks.architectures(), architecture))
            builds = static_checks.compile_all(everywhere, Path(folder))
            print(occupancy_table(builds, architecture), work_table(builds[architecture]), sep="\n", end="")
    except static_checks.MissingToolError as missing:
        print(missing, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
