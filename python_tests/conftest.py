"""Settings of all tests: threads and scheduling of workers, and shared fixtures."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Files whose tests share costly fixtures: one worker of pytest-xdist runs all tests of such a file.
SINGLE_WORKER_FILES = {
    f"test_{name}.py"
    for name in ("checkpoint", "cli", "commands", "evaluation", "group", "report", "static_checks", "wheel")
}
PROCESSORS = len(os.sched_getaffinity(0))
# torch reads OMP_NUM_THREADS on import. Child processes inherit it.
_share = max(1, PROCESSORS // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
_requested = os.environ.get("OMP_NUM_THREADS", "")
os.environ["OMP_NUM_THREADS"] = str(min(int(_requested), _share) if _requested.isdigit() else _share)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return one worker per processor, at most 8: every worker imports torch, which takes memory."""
    return min(8, PROCESSORS)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Return a scheduler that keeps SINGLE_WORKER_FILES on one worker each and gives other tests to any free worker."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return file if Path(file).name in SINGLE_WORKER_FILES else nodeid

    return ByFile(config, log)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run a test on one thread: with networks this small, threads only wait for each other."""
    import torch

    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(previous)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to an empty working directory and return it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
