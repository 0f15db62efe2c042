"""Measure kcd_ext against PyTorch, forward and backward, with the floor of each time.

The job: KL at temperature 4, the student's entropy, the top 70 % of the rows by entropy, the mean of their KL, and the gradient.
Before the timing, every candidate's loss is compared with float64. All candidates take turns in one process. A time is a median,
with the quartiles in parentheses.

A first look takes half a minute:

    python benchmarks/run.py --short

A full measurement of a machine, written to files:

    python benchmarks/run.py --sweep rows classes dtype keep threads --output benchmarks/results

Compare ratios between machines, not times.
"""

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import candidates, cases, guard, memory, plot, report
from harness.cases import FULL, SHORT, Case, Shape
from harness.constants import BOTH, FORWARD, MEASURED
from harness.device import Device
from harness.devices import DEVICES
from harness.loop import Benchmark
from harness.machine import commit, write_json

import kcd_ext
from kcd_ext.ops import build_info

SMALL = Shape(8, 10)
NEVER, TABLE, EVERYWHERE = "never", "table", "everywhere"


def argparse_type(parse: Callable[[str], object]) -> Callable[[str], object]:
    """Wrap a parser for argparse, which would hide the message of a ValueError."""

    def parsed(text: str) -> object:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"nargs": "*", "metavar": "ROWSxCLASSES[:DTYPE][:labels=FRACTION]", "type": argparse_type(Shape.parse)}
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--threads", type=int, help="number of CPU threads (default: torch's)")
    parser.add_argument(
        "--shapes",
        **shape,
        help=f"shapes of the main table (default: {' '.join(map(str, FULL.shapes))}); no shape: no table",
    )
    parser.add_argument(
        "--labels",
        type=argparse_type(cases.fraction),
        metavar="FRACTION",
        help="add labels to every shape, with this fraction of rows ignored",
    )
    parser.add_argument("--sweep", nargs="+", choices=cases.SWEEPS, default=[], help="add a table for each")
    parser.add_argument(
        "--memory",
        **shape,
        help=f"shapes whose peak memory is measured (default: {' '.join(map(str, FULL.memory))}); no shape: none",
    )
    parser.add_argument(
        "--compile",
        nargs="?",
        choices=(NEVER, TABLE, EVERYWHERE),
        default=TABLE,
        const=EVERYWHERE,
        help="when to measure torch.compile, which takes 2 to 20 s per shape: `table` in the main table and at 8 × 10"
        " (default: %(default)s), `everywhere` in sweeps too (--compile without a value: %(const)s), `never`",
    )
    parser.add_argument(
        "--short", action="store_true", help=f"take half a minute: {' '.join(map(str, SHORT.shapes))}, no memory"
    )
    parser.add_argument("--seconds", type=float, help=f"seconds per shape ({FULL.seconds}; --short {SHORT.seconds})")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help=f"write NAME.md, NAME.json and NAME.svg, and update {guard.FILE}, which `pytest -m speed` reads;"
        f" in benchmarks/results git tracks only *.md and {guard.FILE}",
    )
    options = parser.parse_args()
    extent = SHORT if options.short else FULL
    options.shapes = extent.shapes if options.shapes is None else options.shapes
    options.memory = extent.memory if options.memory is None else options.memory
    if options.labels is not None:
        options.shapes = [each._replace(ignored=options.labels) for each in options.shapes]
    options.seconds = extent.seconds if options.seconds is None else options.seconds
    if not 0 < options.seconds < math.inf:
        parser.error(f"--seconds must be a number > 0, got {options.seconds}")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be an integer >= 1, got {options.threads}")
    return options


class Run:
    """The tables of one command."""

    def __init__(self, options: argparse.Namespace, device: Device) -> None:
        self.options, self.device = options, device
        self.candidates, self.absent = device.candidates()
        self.paragraphs: list[str] = []
        self.failures: list[str] = []
        self.result = {
            "benchmark": device.kind,
            "name": device.name,
            "facts": {**device.facts(), "kcd_ext": kcd_ext.__version__, "torch": torch.__version__, "commit": commit()},
            "build": build_info,
            "temperature": candidates.TEMPERATURE,
            "seconds_at_each_shape": options.seconds,
            "ratios": {},
        }

    def add(self, text: str) -> None:
        """Print a paragraph, a heading or a table, and keep it for `write`."""
        self.paragraphs.append(text)
        print(text, end="\n\n", flush=True)

    def measure(self) -> None:
        """Measure everything that was requested and print it."""
        self.add(f"# {self.device.name}")
        self.add(report.facts(self.result["facts"]))
        if self.options.shapes:
            self._main_table()
        self._overhead()
        if self.options.sweep:
            self.result["sweeps"] = {name: self._sweep(name) for name in self.options.sweep}
        if self.options.memory:
            self._memory()

    def _select(self, everyone: list[candidates.Candidate], compiled: bool) -> list[candidates.Candidate]:
        return [candidate for candidate in everyone if compiled or not candidate.compiles]

    def _benchmark(self, cases: list[Case], everyone: list[candidates.Candidate], compiled: bool) -> dict:
        """Return the figures of the candidates; torch.compile's only if `compiled`."""
        benchmark = Benchmark(
            self.device,
            cases,
            self._select(everyone, compiled),
            absent=self.absent,
            seconds=self.options.seconds,
            report=lambda line: print(line, file=sys.stderr, flush=True),
        )
        benchmark.measure()
        good, verdict = benchmark.verdict()
        self.failures += [] if good else [verdict]
        return benchmark.figures

    def _main_table(self) -> None:
        compiled = self.options.compile != NEVER
        everyone = [*self.candidates, candidates.autograd_overhead()]  # autograd is a floor of small calls
        figures = self._benchmark([Case(shape) for shape in self.options.shapes], everyone, compiled)
        self.result |= {"ratios": report.ratios(figures), "figures": figures}
        for direction in (BOTH, FORWARD):
            self.add(f"## {direction.capitalize()}, µs")
            self.add(report.times(figures, direction))
        self.add(self.device.explain_ceilings())
        self.add("## Errors")
        self.add(report.errors(figures))
        if any(row["status"] != MEASURED for row in figures["rows"]):
            self.add("## Not measured")
            self.add(report.not_measured(figures))

    def _overhead(self) -> None:
        compiled = self.options.compile == EVERYWHERE or (self.options.compile == TABLE and not self.options.short)
        everyone = [candidate for candidate in self.candidates if not candidate.inplace]
        figures = self._benchmark([Case(SMALL)], [*everyone, candidates.autograd_overhead()], compiled)
        self.result["overhead"] = figures
        self.add(f"## The cost of a call: {SMALL.rows} × {SMALL.classes}, µs")
        self.add(report.overhead(figures))

    def _sweep(self, name: str) -> dict:
        everyone = [candidate for candidate in self.candidates if not candidate.inplace]
        swept = cases.SWEEPS[name](self.device.threads or 1)
        figures = self._benchmark(swept, everyone, self.options.compile == EVERYWHERE)
        self.add(f"## Over {name}: forward + backward, µs")
        self.add(report.times(figures, BOTH))
        return figures

    def _memory(self) -> None:
        selected = self._select(self.candidates, self.options.compile != NEVER)
        rows = [row for shape in self.options.memory for row in memory.peaks(self.device, shape, selected)]
        self.result["memory"] = rows
        self.add("## Memory of a call")
        self.add(report.memory(rows))
        self.add("The peak beyond the inputs. Each call has a fresh process, which keeps no buffer between calls.")

    def write(self, folder: Path) -> None:
        """Write NAME.md, NAME.json and, if matplotlib is installed, NAME.svg, and record the ratios for the speed guard."""
        folder.mkdir(parents=True, exist_ok=True)
        base = folder / self.device.name
        rows = [row for row in self.result.get("figures", {}).get("rows", []) if row["ignored"] is None]
        if any(row["status"] == MEASURED for row in rows):
            if importlib.util.find_spec("matplotlib") is None:
                print("No plot: matplotlib is not installed (pip install kcd-ext[train])", file=sys.stderr)
            else:
                plot.draw(rows, f"{self.device.name}, keep {cases.KEEP}", Path(f"{base}.svg"))
        write_json(Path(f"{base}.json"), self.result)
        guard.record(folder, self.result)
        Path(f"{base}.md").write_text("\n\n".join(self.paragraphs) + "\n")


def main() -> int:
    """Return the exit status: 0, or 1 if kcd_ext failed or nothing was measured."""
    options = parse_arguments()
    started = time.monotonic()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    run = Run(options, DEVICES[options.device]())
    run.measure()
    run.result["seconds"] = round(time.monotonic() - started, 1)
    if options.output is not None:
        run.write(options.output)
    for failure in run.failures:
        print(failure, file=sys.stderr)
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
