"""The whole job, forward and backward, against PyTorch, with its floor: python benchmarks/run.py [--short]

The job: KL at temperature 4, the student's entropy, the top 70 % of the rows by it, the mean of their KL, the gradient.  Medians
and, in parentheses, the middle half of rounds in which the candidates take turns, in one process; every candidate's loss is
compared with float64 before.  A first look takes half a minute:

    python benchmarks/run.py --short

and everything that there is to say of a machine, into files:

    python benchmarks/run.py --sweep rows classes dtype keep threads --output benchmarks/results

Ratios may be compared between machines; times may not.
"""

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import candidates, memory, places, plot, report
from harness.device import Device
from harness.devices import DEVICES
from harness.loop import Benchmark
from harness.machine import commit, write_json
from harness.names import BOTH, FORWARD, MEASURED
from harness.places import FULL, SHORT, Place, Shape

import kcd_ext
from kcd_ext.ops import build_info

SMALL = Shape(8, 10)
NEVER, TABLE, EVERYWHERE = "never", "table", "everywhere"


def checked(parse: Callable[[str], object]) -> Callable[[str], object]:
    """What argparse takes as a type: its own word for a ValueError would hide the message."""

    def parsed(text: str) -> object:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"nargs": "*", "metavar": "ROWSxCLASSES[:DTYPE][:labels=FRACTION]", "type": checked(Shape.parse)}
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU (torch's own number)")
    parser.add_argument(
        "--shapes", **shape, help=f"of the main table ({' '.join(map(str, FULL.shapes))}); none: no table"
    )
    parser.add_argument(
        "--labels",
        type=checked(places.fraction),
        metavar="FRACTION",
        help="labels at every shape, with so many rows ignored",
    )
    parser.add_argument("--sweep", nargs="+", choices=places.SWEEPS, default=[], help="tables of their own")
    parser.add_argument(
        "--memory", **shape, help=f"where memory is measured ({' '.join(map(str, FULL.memory))}); none: nowhere"
    )
    parser.add_argument(
        "--compile",
        nargs="?",
        choices=(NEVER, TABLE, EVERYWHERE),
        default=TABLE,
        const=EVERYWHERE,
        help="where torch.compile is measured, which takes 2 to 20 s a shape: in the main table and at 8 × 10 (%(default)s),"
        " in sweeps too (%(const)s, also without a word), or not at all",
    )
    parser.add_argument(
        "--short", action="store_true", help=f"half a minute: {' '.join(map(str, SHORT.shapes))}, no memory"
    )
    parser.add_argument("--seconds", type=float, help=f"at each shape ({FULL.seconds}; --short {SHORT.seconds})")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for NAME.md, NAME.json and NAME.svg")
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
        parser.error(f"--threads must be >= 1, got {options.threads}")
    return options


class Run:
    """All tables of one command."""

    def __init__(self, options: argparse.Namespace, device: Device) -> None:
        self.options, self.device = options, device
        self.candidates, self.absent = device.candidates()
        self.parts: list[str] = []
        self.faults: list[str] = []
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
        """Print a paragraph, a heading or a table, which `write` also writes."""
        self.parts.append(text)
        print(text, end="\n\n", flush=True)

    def measure(self) -> None:
        """Everything that was asked for, to stdout."""
        self.add(f"# {self.device.name}")
        self.add(report.facts(self.result["facts"]))
        if self.options.shapes:
            self._main_table()
        self._overhead()
        if self.options.sweep:
            self.result["sweeps"] = {name: self._sweep(name) for name in self.options.sweep}
        if self.options.memory:
            self._memory()

    def _chosen(self, everyone: list[candidates.Candidate], compiled: bool) -> list[candidates.Candidate]:
        return [candidate for candidate in everyone if compiled or not candidate.compiles]

    def _benchmark(self, some: list[Place], everyone: list[candidates.Candidate], compiled: bool) -> dict:
        """Figures; torch.compile's where it is wanted."""
        benchmark = Benchmark(
            self.device,
            some,
            self._chosen(everyone, compiled),
            absent=self.absent,
            seconds=self.options.seconds,
            report=lambda line: print(line, file=sys.stderr, flush=True),
        )
        benchmark.measure()
        good, verdict = benchmark.verdict()
        self.faults += [] if good else [verdict]
        return benchmark.figures

    def _main_table(self) -> None:
        compiled = self.options.compile != NEVER
        everyone = [*self.candidates, candidates.least()]  # the way through autograd is a floor of small calls
        figures = self._benchmark([Place(shape) for shape in self.options.shapes], everyone, compiled)
        self.result |= {"ratios": report.ratios(figures), "figures": figures}
        for direction in (BOTH, FORWARD):
            self.add(f"## {direction.capitalize()}, µs")
            self.add(report.times(figures, direction))
        self.add(self.device.about_ceilings())
        self.add("## Errors")
        self.add(report.errors(figures))
        if any(row["status"] != MEASURED for row in figures["rows"]):
            self.add("## Not measured")
            self.add(report.not_measured(figures))

    def _overhead(self) -> None:
        compiled = self.options.compile == EVERYWHERE or (self.options.compile == TABLE and not self.options.short)
        everyone = [candidate for candidate in self.candidates if not candidate.inplace]
        figures = self._benchmark([Place(SMALL)], [*everyone, candidates.least()], compiled)
        self.result["overhead"] = figures
        self.add(f"## What a call costs: {SMALL.rows} × {SMALL.classes}, µs")
        self.add(report.overhead(figures))

    def _sweep(self, name: str) -> dict:
        everyone = [candidate for candidate in self.candidates if not candidate.inplace]
        some = places.SWEEPS[name](self.device.threads or 1)
        figures = self._benchmark(some, everyone, self.options.compile == EVERYWHERE)
        self.add(f"## Over {name}: forward + backward, µs")
        self.add(report.times(figures, BOTH))
        return figures

    def _memory(self) -> None:
        chosen = self._chosen(self.candidates, self.options.compile != NEVER)
        rows = [row for shape in self.options.memory for row in memory.peaks(self.device, shape, chosen)]
        self.result["memory"] = rows
        self.add("## Memory of a call")
        self.add(report.memory(rows))
        self.add("At the peak, beyond the inputs, each in a fresh process that keeps no buffer from call to call.")

    def write(self, folder: Path) -> None:
        """NAME.md, NAME.json and, where matplotlib is there, NAME.svg."""
        folder.mkdir(parents=True, exist_ok=True)
        base = folder / self.device.name
        rows = [row for row in self.result.get("figures", {}).get("rows", []) if row["ignored"] is None]
        if not any(row["status"] == MEASURED for row in rows):
            pass
        elif importlib.util.find_spec("matplotlib") is None:
            self.add("No plot: matplotlib is not installed (the extra `train` has it).")
        else:
            plot.draw(rows, f"{self.device.name}, keep {places.KEEP}", Path(f"{base}.svg"))
            self.add(f"![time against bytes]({self.device.name}.svg)")
        write_json(Path(f"{base}.json"), self.result)
        Path(f"{base}.md").write_text("\n\n".join(self.parts) + "\n")


def main() -> int:
    """Exit status: 0, or 1 where ours failed or nothing was measured."""
    options = arguments()
    started = time.monotonic()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    run = Run(options, DEVICES[options.device]())
    run.measure()
    run.result["seconds"] = round(time.monotonic() - started, 1)
    if options.output is not None:
        run.write(options.output)
    for fault in run.faults:
        print(fault, file=sys.stderr)
    return 1 if run.faults else 0


if __name__ == "__main__":
    sys.exit(main())
