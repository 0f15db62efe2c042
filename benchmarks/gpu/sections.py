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

PASSED, FAILED, TIMED_OUT, NOT_AVAILABLE = "passed", "failed", "timed out", "not available"
NOT_REACHED = "not reached"
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
    """Python modules that it needs."""
    file: Path | None = None
    """A file of the checkout that it needs."""
    variable: str | None = None
    """An environment variable that it needs."""
    optional: bool = False
    """It is run where time is left."""

    def lacks(self) -> str | None:
        """Why it cannot run here, None if it can."""
        absent = [module for module in self.modules if find_spec(module) is None]
        if absent:
            return f"{', '.join(absent)} not installed: hand the wheels over with --wheels"
        if self.file is not None and not self.file.exists():
            return f"{self.file.relative_to(CHECKOUT)} is not there yet"
        if self.variable is not None and self.variable not in os.environ:
            return f"the variable {self.variable} is not set: see the head of gpu_check.sh"
        return None


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"gpu.{name}", *arguments]


def _timed_module(name: str) -> Callable[[Run], Sequence[str]]:
    return lambda run: _module(name, "--seconds", run.own_seconds, "--data", str(run.data))


def _pytest(expression: str, *names: str) -> Callable[[Run], Sequence[str]]:
    # Run from another folder: the checkout may be read-only, and pytest and hypothesis write where they are run.
    tests = [str(CHECKOUT / "python_tests" / f"test_{name}.py") for name in names]
    options = ["-k", expression, "-q", "-p", "no:cacheprovider", "--rootdir", str(CHECKOUT)]
    return lambda run: [sys.executable, "-m", "pytest", *options, "-c", str(CHECKOUT / "pyproject.toml"), *tests]


_REPRODUCTION = CHECKOUT / "benchmarks" / "reproduce.py"
_TRAINER = ("accelerate", "safetensors", "tqdm", "tyro", "matplotlib")


def _reproduce(run: Run) -> list[str]:
    """The first pair of the paper's table in a shorter schedule: as many runs as the time lets finish."""
    results = os.environ.get("OUT") or str(CHECKOUT / "benchmarks" / "results")
    options = ["--data", os.environ["KCD_CIFAR100"], "--epochs", "30", "--device", "cuda", "--precision", "bfloat16"]
    options += ["--minutes", f"{float(run.own_seconds) / 60:.2f}", "--results", results]
    return [sys.executable, str(_REPRODUCTION), *options]


SECTIONS = (
    Section("build", 80, lambda run: _module("build", "--build", str(run.build), "--data", str(run.data))),
    Section("conformance", 70, _pytest("cuda", "conformance", "autograd"), modules=("pytest", "hypothesis")),
    Section(
        "training",
        20,
        _pytest("gpu or cuda", "training", "processes", "condensation", "infobatch", "data"),
        modules=("pytest", "hypothesis", "accelerate", "safetensors"),
    ),
    Section("sanitizers", 130, _timed_module("sanitizers")),
    Section("graphs", 20, _timed_module("graphs")),
    Section("large", 25, lambda run: _module("large", "--data", str(run.data))),
    Section("benchmarks", 205, _timed_module("benchmark")),
    Section(
        "reproduction",
        10,
        _reproduce,
        modules=_TRAINER,
        file=_REPRODUCTION,
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
    """A section's part of the seconds that are left for it and those after it."""
    return left * section.share / (section.share + sum(other.share for other in after))


def execute(section: Section, seconds: float, folder: Path, build: Path, log: IO[str]) -> Outcome:
    """Runs one section within so many seconds, its output going to the log.

    Args:
        folder: where it runs, and may write.
        build: the build folder.
        log: a text file opened for appending, from which the last lines are read.
    """
    if lacks := section.lacks():
        return Outcome(section.name, NOT_AVAILABLE, lacks)
    if seconds < LEAST_SECONDS:
        status = NOT_AVAILABLE if section.optional else NOT_REACHED
        return Outcome(section.name, status, f"{seconds:.0f} s are left for it: give it more --minutes")
    run = Run(seconds, build, folder / f"{section.name}.json")
    command = section.command(run)
    log.write(f"\n==== {section.name}: {' '.join(command)}\n")
    log.flush()
    begin = os.path.getsize(log.name)
    start = time.monotonic()
    status = run_within(seconds, command, log, folder=folder)
    outcome = outcome_of(section.name, status, _lines_since(Path(log.name), begin), seconds)
    outcome.seconds, outcome.limit_seconds = round(time.monotonic() - start, 1), round(seconds, 1)
    if run.data.exists():
        outcome.data = json.loads(run.data.read_text())
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
