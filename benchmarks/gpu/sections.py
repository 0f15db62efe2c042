"""The sections of a run: their commands, requirements and shares of the time, and how to run one."""

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
LEAST_SECONDS = 5  # do not start a section with less
MARGIN = 0.1  # share of a section's time that is reserved for its shutdown


@dataclass(frozen=True)
class Run:
    """The run of one section: its time and its paths."""

    seconds: float
    build: Path
    """The build folder."""
    data: Path
    """The JSON file for the section's figures."""
    out: Path
    """The folder for further result files."""

    @property
    def target_seconds(self) -> str:
        """The time limit passed to the section. It is shorter, so that the section stops by itself unless it hangs."""
        return f"{self.seconds * (1 - MARGIN):.0f}"


@dataclass(frozen=True)
class Section:
    """A section of the kit."""

    name: str
    share: float
    """The share of the time, relative to the other sections. Later sections get the unused time."""
    command: Callable[[Run], Sequence[str]]
    """The command: it exits with 0 or UNAVAILABLE, or it failed. Its last line is its summary."""
    modules: tuple[str, ...] = ()
    """Required Python modules. A missing one is a failure, because it can be installed."""
    variable: str | None = None
    """An environment variable that enables the section."""
    optional: bool = False
    """Runs only if time is left."""

    def obstacle(self) -> tuple[str, str] | None:
        """Return the status and the reason if the section cannot start, else None."""
        if self.variable is not None and not os.environ.get(self.variable):
            return NOT_AVAILABLE, f"the environment variable {self.variable} is not set: see the head of gpu_check.sh"
        absent = [module for module in self.modules if find_spec(module) is None]
        if absent:
            return FAILED, f"{', '.join(absent)} not installed: provide the wheels with --wheels"
        return None


def _module(name: str) -> Callable[[Run], Sequence[str]]:
    def command(run: Run) -> list[str]:
        folders = ["--data", str(run.data), "--build", str(run.build), "--out", str(run.out)]
        return [sys.executable, "-m", f"gpu.{name}", "--seconds", run.target_seconds, *folders]

    return command


CONFORMANCE = ("conformance", "autograd", "arguments", "group", "simt_operators")
TRAINING = ("training_on_gpu", "processes", "condensation", "infobatch", "data")
TESTS = CHECKOUT / "python_tests"
_MOST_WORKERS = 8


def _tests(*names: str, parallel: bool) -> Callable[[Run], Sequence[str]]:
    """Return the command for the tests of these files that are marked gpu, counted by `tally`."""

    def command(run: Run) -> list[str]:
        # Override the pytest options of pyproject.toml. Run in another folder: pytest and hypothesis write to the current
        # one, and the checkout may be read-only.
        options = ["-o", "addopts=", "-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider", "--rootdir", str(TESTS.parent)]
        options += ["-c", str(CHECKOUT / "pyproject.toml"), "-o", "faulthandler_timeout=60"]
        options += ["-p", "gpu.tally", "--tally", str(run.data), "--continue-on-collection-errors"]
        cpus = len(os.sched_getaffinity(0))
        workers = min(_MOST_WORKERS, cpus // 2) if parallel and find_spec("xdist") is not None else 1
        if workers > 1:
            options += ["-n", str(workers), "--dist", "loadgroup"]  # share the fixtures that start processes
        # Oversubscribed threads would slow down the oracle and the small networks.
        environment = ["env", f"OMP_NUM_THREADS={max(1, min(4, cpus // workers))}"]
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
    """The result of a section."""

    name: str
    status: str
    summary: str
    seconds: float = 0.0
    limit_seconds: float = 0.0
    last_lines: list[str] = field(default_factory=list)
    data: object = None

    @property
    def good(self) -> bool:
        """Whether the section passed or cannot run on this machine."""
        return self.status in (PASSED, NOT_AVAILABLE)


def limit(section: Section, after: Iterable[Section], left: float) -> float:
    """Return a section's time: its share of the remaining seconds, among the sections that can run."""
    shares = sum(other.share for other in after if other.obstacle() is None)
    return left * section.share / (section.share + shares)


def execute(section: Section, seconds: float, folder: Path, build: Path, out: Path, log: IO[str]) -> Outcome:
    """Run one section with a time limit and its output in the log. Never raises: an error becomes an outcome.

    Args:
        section: the section to run.
        seconds: its time limit.
        folder: its current folder, writable.
        build: the build folder.
        out: the folder of the results.
        log: a text file opened for writing; its last lines go to the outcome.
    """
    if obstacle := section.obstacle():
        return Outcome(section.name, *obstacle)
    if seconds < LEAST_SECONDS:
        status = NOT_AVAILABLE if section.optional else NOT_REACHED
        return Outcome(section.name, status, f"only {seconds:.0f} s are left: increase --minutes")
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
    except Exception as error:  # an error of the kit in one section must not hide the others
        outcome = Outcome(section.name, FAILED, f"the kit itself failed: {type(error).__name__}: {error}")
    outcome.seconds, outcome.limit_seconds = round(time.monotonic() - start, 1), round(seconds, 1)
    return outcome


def outcome_of(name: str, status: int | None, lines: Sequence[str], seconds: float) -> Outcome:
    """Return the outcome for an exit status (None: timed out) and the printed lines."""
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
