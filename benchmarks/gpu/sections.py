"""The sections of a run: what each executes, what it needs, how much of the time is its own, and how one is run."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from harness.machine import CHECKOUT

from .process import UNAVAILABLE, run_within

PASSED, FAILED, TIMED_OUT, NOT_REACHED = "passed", "failed", "timed out", "not reached"
NOT_AVAILABLE = "cannot run here"
LAST_LINES = 30
LEAST_SECONDS = 5  # less is not worth starting a section for
MARGIN = 0.1  # of a section's time, which it keeps for coming to an end by itself


@dataclass(frozen=True)
class Run:
    """One section's run: the time it has, and where it reads and writes."""

    seconds: float
    build: Path
    """The build folder."""
    data: Path
    """The JSON file for the section's figures."""
    out: Path
    """The folder for results that are files of their own."""

    @property
    def own_seconds(self) -> str:
        """What the section is told to end in: as long as nothing hangs, it comes to an end before it is stopped."""
        return f"{self.seconds * (1 - MARGIN):.0f}"


@dataclass(frozen=True)
class Section:
    """One part of the run."""

    name: str
    share: float
    """Of the time, relative to the other sections' shares; what a section does not use is left to those after it."""
    command: Callable[[Run], Sequence[str]]
    """What is executed: it exits with 0, with UNAVAILABLE, or it failed; its last line is its summary."""
    modules: tuple[str, ...] = ()
    """Python modules that it needs: one that is missing is a failure, since it can be installed."""
    variable: str | None = None
    """An environment variable that asks for it: without it there is nothing to run."""
    optional: bool = False
    """It is run where time is left."""

    def lacks(self) -> tuple[str, str] | None:
        """Return the status and the reason where it does not start at all; None where it can."""
        if self.variable is not None and not os.environ.get(self.variable):
            return NOT_AVAILABLE, f"the variable {self.variable} is not set: see the head of gpu_check.sh"
        absent = [module for module in self.modules if find_spec(module) is None]
        if absent:
            return FAILED, f"{', '.join(absent)} not installed: hand the wheels over with --wheels"
        return None


def _module(name: str) -> Callable[[Run], Sequence[str]]:
    def command(run: Run) -> list[str]:
        folders = ["--data", str(run.data), "--build", str(run.build), "--out", str(run.out)]
        return [sys.executable, "-m", f"gpu.{name}", "--seconds", run.own_seconds, *folders]

    return command


CONFORMANCE = ("conformance", "autograd", "arguments", "group", "simt_operators")
TRAINING = ("training_on_gpu", "processes", "condensation", "infobatch", "data")
TESTS = CHECKOUT / "python_tests"
_MOST_WORKERS = 8


def _tests(*names: str, parallel: bool) -> Callable[[Run], Sequence[str]]:
    """The tests of these files that are marked gpu, counted by `tally`."""

    def command(run: Run) -> list[str]:
        # Of pytest's own options in pyproject.toml none holds here.  Run from another folder, since the checkout may be
        # read-only and pytest and hypothesis write where they are run.
        options = ["-o", "addopts=", "-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider", "--rootdir", str(TESTS.parent)]
        options += ["-c", str(CHECKOUT / "pyproject.toml"), "-o", "faulthandler_timeout=60"]
        options += ["-p", "gpu.tally", "--tally", str(run.data), "--continue-on-collection-errors"]
        processors = len(os.sched_getaffinity(0))
        workers = min(_MOST_WORKERS, processors // 2) if parallel and find_spec("xdist") is not None else 1
        if workers > 1:
            options += ["-n", str(workers), "--dist", "loadgroup"]  # what starts processes for many tests does so once
        # The oracle and the small networks are slowed down by threads that wait for a processor.
        environment = ["env", f"OMP_NUM_THREADS={max(1, min(4, processors // workers))}"]
        return [*environment, sys.executable, "-m", "pytest", *options, *(str(TESTS / f"test_{x}.py") for x in names)]

    return command


SECTIONS = (
    Section("build", 80, _module("build")),
    Section("conformance", 110, _tests(*CONFORMANCE, parallel=True), modules=("pytest", "hypothesis", "numpy")),
    Section(
        "training",
        45,
        _tests(*TRAINING, parallel=False),
        modules=("pytest", "hypothesis", "numpy", "PIL", "accelerate", "safetensors", "tqdm"),
    ),
    Section("sanitizers", 130, _module("sanitizers")),
    Section("graphs", 20, _module("graphs")),
    Section("large", 25, _module("large")),
    Section("ncu", 60, _module("ncu")),
    Section("benchmarks", 205, _module("benchmark")),
    Section(
        "reproduction",
        10,
        _module("reproduction"),
        modules=("accelerate", "safetensors", "tqdm", "tyro", "matplotlib"),
        variable="KCD_CIFAR100",
        optional=True,
    ),
)


@dataclass
class Outcome:
    """How a section went."""

    name: str
    status: str
    summary: str
    seconds: float = 0.0
    limit_seconds: float = 0.0
    last_lines: list[str] = field(default_factory=list)
    data: object = None

    @property
    def good(self) -> bool:
        """Passed, or cannot run on this machine."""
        return self.status in (PASSED, NOT_AVAILABLE)


def limit(section: Section, after: Iterable[Section], left: float) -> float:
    """A section's part of the seconds that are left for it and those after it that can run."""
    shares = sum(other.share for other in after if other.lacks() is None)
    return left * section.share / (section.share + shares)


def execute(section: Section, seconds: float, folder: Path, build: Path, out: Path, log: IO[str]) -> Outcome:
    """Runs one section within so many seconds, its output going to the log.  Whatever happens is an outcome.

    Args:
        folder: where it runs, and may write.
        build: the build folder.
        out: the folder of the results.
        log: a text file opened for appending, from which the last lines are read.
    """
    if lacks := section.lacks():
        return Outcome(section.name, *lacks)
    if seconds < LEAST_SECONDS:
        status = NOT_AVAILABLE if section.optional else NOT_REACHED
        return Outcome(section.name, status, f"{seconds:.0f} s are left for it: give it more --minutes")
    run = Run(seconds, build, folder / f"{section.name}.json", out)
    start = time.monotonic()
    try:
        command = section.command(run)
        log.write(f"\n==== {section.name}: {' '.join(command)}\n")
        log.flush()
        begin = os.path.getsize(log.name)
        status = run_within(seconds, command, log, folder=folder)
        outcome = outcome_of(section.name, status, _lines_since(Path(log.name), begin), seconds)
        if run.data.exists():
            outcome.data = json.loads(run.data.read_text())
    except Exception as error:  # a fault of this kit's in one section must not hide the others
        outcome = Outcome(section.name, FAILED, f"the kit itself failed: {type(error).__name__}: {error}")
    outcome.seconds, outcome.limit_seconds = round(time.monotonic() - start, 1), round(seconds, 1)
    return outcome


def outcome_of(name: str, status: int | None, lines: Sequence[str], seconds: float) -> Outcome:
    """What an exit status (None: stopped after so many seconds) and the printed lines say."""
    last = lines[-1].strip(" =") if lines else "printed nothing"
    if status is None:
        return Outcome(name, TIMED_OUT, f"stopped after {seconds:.0f} s; last line: {last}", last_lines=[*lines])
    words = {0: PASSED, UNAVAILABLE: NOT_AVAILABLE}
    summary = last if status in words or status == 1 else f"{last} (exit status {status})"
    return Outcome(name, words.get(status, FAILED), summary, last_lines=[*lines])


def _lines_since(path: Path, begin: int) -> list[str]:
    with path.open("rb") as file:
        file.seek(max(begin, path.stat().st_size - 100_000))
        text = file.read().decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()][-LAST_LINES:]
