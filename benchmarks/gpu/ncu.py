"""Section ncu: why the warps of the kernels stall, from Nsight Compute's counters over the program of `profiled`.

A machine that forbids its counters (ERR_NVGPUCTRPERM: only the administrator may read them, or a virtual machine lacks them) is no
failure, because the kit cannot change that. A missing ncu is a failure, because it can be installed.
"""

import csv
import math
import re
import sys
import tempfile
from pathlib import Path

from harness.machine import write_json

from .process import UNAVAILABLE, output_of, section_options, tool_of_cuda

# Leave the clocks alone, because other users may share the GPU.
OPTIONS = ["--clock-control", "none", "-k", "regex:forward_rows|backward_rows|select", "-c", "8"]
OPTIONS += ["--csv", "--page", "raw", "--print-units", "base"]
for _section in ("SpeedOfLight", "WarpStateStats", "MemoryWorkloadAnalysis", "Occupancy"):
    OPTIONS += ["--section", _section]

ERROR = "==ERROR=="
REFUSES = "ERR_NVGPUCTRPERM|Failed to initialize the profiler|not supported|LibraryNotLoaded"
STALL = re.compile(r"smsp__average_warps_issue_stalled_(?!.*_not_issued)(\w+)_per_issue_active\.ratio")
# Figure of a kernel -> ncu's metric, and the factor on its base unit.
METRICS = {
    "microseconds": ("gpu__time_duration.sum", 1e-3),
    "sm_percent": ("sm__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "dram_percent": ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "memory_percent": ("gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "occupancy_percent": ("sm__warps_active.avg.pct_of_peak_sustained_active", 1),
}
SHOWN_STALLS = 4


def number(text: str | None) -> float:
    """Parse a number of ncu, which separates thousands with commas; NaN if it is missing."""
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return math.nan


def kernels(text: str) -> list[dict]:
    """Read the kernels of ncu's raw page (CSV), in launch order.

    Returns:
        Per kernel its name, METRICS, and `stalls`: reason -> stall cycles of a warp per issued instruction, longest first.
        "selected" is the cycle of the instruction itself.
    """
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    table = csv.DictReader(line for line in lines[begin:] if line.startswith('"'))
    found = []
    for row in table:
        if not row["ID"]:  # the row of units
            continue
        stalls = {match[1]: number(x) for name, x in row.items() if name and (match := STALL.fullmatch(name))}
        found.append(
            {
                "kernel": row["Kernel Name"],
                **{name: number(row.get(metric)) * factor for name, (metric, factor) in METRICS.items()},
                "stalls": dict(sorted(stalls.items(), key=lambda each: -each[1])),
            }
        )
    return found


def faults(found: list[dict], expected: list[str]) -> list[str]:
    """Return what is wrong with the profiled kernels: unexpected names, or figures that are not numbers."""
    names = [kernel["kernel"] for kernel in found]
    if len(names) != len(expected) or not all(
        re.search(rf"\b{x}\b", name) for x, name in zip(expected, names, strict=True)
    ):
        return [f"kernels {', '.join(names) or 'none'} instead of {', '.join(expected)}"]
    wrong = []
    for kernel in found:
        bad = [name for name in METRICS if not (math.isfinite(kernel[name]) and kernel[name] >= 0)]
        if not kernel["stalls"] or not all(math.isfinite(x) and x >= 0 for x in kernel["stalls"].values()):
            bad.append("stalls")
        if bad:
            wrong.append(f"{kernel['kernel']}: no number for {', '.join(bad)}")
    return wrong


def dominant(kernel: dict) -> str:
    """Return the longest stall reasons, each with its share of the cycles between two instructions of a warp."""
    total = sum(kernel["stalls"].values()) or math.nan
    longest = list(kernel["stalls"].items())[:SHOWN_STALLS]
    return ", ".join(f"{reason} {cycles / total:.0%}" for reason, cycles in longest)


def main() -> int:
    """Print a line per kernel, and a summary at the end."""
    options = section_options(__doc__)
    ncu = tool_of_cuda("ncu")
    if ncu is None:
        print("ncu is not installed: it comes with the CUDA toolkit, or as Nsight Compute")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [ncu, *OPTIONS, "--log-file", str(log), sys.executable, "-m", "gpu.profiled"]
        status, printed = output_of(options.seconds, command)
        text = log.read_text(errors="replace") if log.exists() else ""
    print(printed, text, sep="\n", flush=True)
    lines = [*text.splitlines(), *printed.splitlines()]
    problems = [line.removeprefix(ERROR).strip() for line in lines if line.startswith(ERROR)]
    refusals = [line for line in problems if re.search(REFUSES, line)]
    if refusals:
        print(refusals[0])
        return UNAVAILABLE
    if status is None:
        print(f"ncu was stopped after {options.seconds:.0f} s")
        return 1
    found = kernels(text)
    from . import profiled

    shapes = [shape for shape in profiled.SHAPES for _ in profiled.KERNELS]
    wrong = faults(found, [*profiled.KERNELS] * len(profiled.SHAPES))
    if status or wrong:
        last = next((line for line in reversed(problems + printed.splitlines()) if line.strip()), "it printed nothing")
        print(wrong[0] if wrong and not status else f"ncu failed with exit status {status}: {last}")
        return 1
    for shape, kernel in zip(shapes, found, strict=True):
        kernel["shape"] = profiled.name(shape)
        print(f"{kernel['shape']}, {kernel['kernel']}: {kernel['microseconds']:.1f} us, stalls: {dominant(kernel)}")
    write_json(options.data, found)
    print(f"{len(found)} kernels; the largest, {found[0]['shape']} forward, stalls for {dominant(found[0])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
