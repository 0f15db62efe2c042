"""What all tests share: the processors of a worker, and fixtures of many rooms."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

PROCESSORS = len(os.sched_getaffinity(0))
# Set before torch is imported, which reads it; processes that tests start inherit it.
_share = max(1, PROCESSORS // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
_given = os.environ.get("OMP_NUM_THREADS", "")
os.environ["OMP_NUM_THREADS"] = str(min(int(_given), _share) if _given.isdigit() else _share)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Keep the tests that share what is costly on one worker, by their mark `xdist_group`."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "loadgroup"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return a worker for each processor, at most 8: a worker imports torch, which takes memory."""
    return min(8, PROCESSORS)


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
