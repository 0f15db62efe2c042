"""What all tests share: the processors of a worker, and fixtures of many rooms."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Files whose tests share what is costly to make: of pytest-xdist's workers one gets them all.
TOGETHER = {
    f"test_{name}.py"
    for name in ("checkpoint", "cli", "commands", "evaluation", "group", "report", "static_checks", "wheel")
}
PROCESSORS = len(os.sched_getaffinity(0))
# Set before torch is imported, which reads it; processes that tests start inherit it.
_share = max(1, PROCESSORS // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
_given = os.environ.get("OMP_NUM_THREADS", "")
os.environ["OMP_NUM_THREADS"] = str(min(int(_given), _share) if _given.isdigit() else _share)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return a worker for each processor, at most 8: a worker imports torch, which takes memory."""
    return min(8, PROCESSORS)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Return a scheduler that keeps the files of TOGETHER together, and gives any other test to whichever worker is free."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return file if Path(file).name in TOGETHER else nodeid

    return ByFile(config, log)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks of a few weights on two threads only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
