"""A pytest plugin for the sections that run tests: it fails if a test was left out.

Every test marked gpu must run, and every CPU case must have a CUDA twin. The counts go to the file of --tally and to the last line
that pytest prints. With pytest-xdist the workers collect, and the controller counts.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from harness.machine import write_json

CPU, CUDA = "cpu", "cuda"
LONGEST = 120  # characters of a test id in messages
WORKERS = "gpu_tally"  # key in the output of a pytest-xdist worker


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option --tally."""
    parser.addoption("--tally", type=Path, required=True, metavar="FILE", help="JSON file for the counts")


def pytest_configure(config: pytest.Config) -> None:
    """Register the counter."""
    config.pluginmanager.register(Tally(config), "tally of tests")


def without_twin(items: Sequence[pytest.Item]) -> list[str]:
    """Return the ids of the CPU cases that have no CUDA twin.

    A parameter "cpu" or "cuda" says where a case runs; its twin has the same other parameters.
    """
    cases: dict[str, dict[tuple, str]] = {CPU: {}, CUDA: {}}
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        device = next((x for x in parameters.values() if isinstance(x, str) and x in cases), None)
        if device is not None:
            others = sorted((name, repr(x)) for name, x in parameters.items() if x is not device)
            cases[device][(item.path, item.originalname, *others)] = item.nodeid
    return [name for case, name in cases[CPU].items() if case not in cases[CUDA]]


class Tally:
    """A counter of the tests in one pytest run."""

    def __init__(self, config: pytest.Config) -> None:
        self._path: Path = config.getoption("tally")
        self._worker = getattr(config, "workeroutput", None)
        self._marked: list[pytest.Item] = []  # items, because pytest-xdist changes their ids after collection
        self._deselected: list[pytest.Item] = []
        self._collected: dict[str, list[str]] = {"marked": [], "without_twin": [], "deselected": []}
        self._ran: set[str] = set()
        self._failed: dict[str, None] = {}  # ordered
        self._skipped: dict[str, str] = {}
        self._summary = "pytest did not finish"

    @pytest.hookimpl(tryfirst=True)  # before any test is deselected
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Note all tests."""
        self._marked = [item for item in items if item.get_closest_marker("gpu")]
        self._collected["without_twin"] = without_twin(items)

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """Note the tests that an option deselects."""
        self._deselected += items

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object) -> None:
        """Take the tests that a worker collected; all workers collect the same."""
        self._collected = getattr(node, "workeroutput", {}).get(WORKERS, self._collected)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Count a file that cannot be imported as failed."""
        if report.failed:
            self._failed[report.nodeid] = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count one phase of a test."""
        if report.failed:
            self._failed[report.nodeid] = None
        elif report.skipped:
            self._skipped[report.nodeid] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else "xfail")
        if report.when == "call" and not report.skipped:
            self._ran.add(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the counts, and make pytest fail if tests are missing."""
        for name, items in (("marked", self._marked), ("deselected", self._deselected)):
            self._collected[name] += [item.nodeid for item in items]
        if self._worker is not None:
            self._worker[WORKERS] = self._collected
            return
        marked, without = self._collected["marked"], self._collected["without_twin"]
        passed = [name for name in self._ran if name not in self._failed]
        missing = [name for name in marked if name not in self._ran and name not in self._failed]
        reasons = Counter(self._skipped.get(name) or self._why_not(name) for name in missing)
        write_json(
            self._path,
            {
                "tests": len(marked),
                "passed": len(passed),
                "failed": [*self._failed],
                "not_run": missing,
                "why_not_run": dict(reasons),
                "without_twin": without,
            },
        )
        parts = [f"{len(passed)} of {len(marked)} tests for the GPU passed"]
        if not marked:
            parts = ["no test for the GPU was found: torch sees no GPU, or the build has no kernels for it"]
        if self._failed:
            parts.append(f"{len(self._failed)} failed, the first: {_short(next(iter(self._failed)))}")
        if missing:
            why = "; ".join(f"{n} × {reason}" for reason, n in reasons.items())
            parts.append(f"{len(missing)} did not run: {why}")
        if without:
            parts.append(f"{len(without)} CPU cases have no GPU twin, the first: {_short(without[0])}")
        self._summary = "; ".join(parts)
        if (missing or without or not marked) and session.exitstatus in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _why_not(self, name: str) -> str:
        return "deselected" if name in self._collected["deselected"] else "not reached"

    def pytest_unconfigure(self) -> None:
        """Print the last line."""
        if self._worker is None:
            print(self._summary, flush=True)


def _short(name: str) -> str:
    """Shorten a test id, which may contain tensors."""
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}…"
