"""What all tests share: threads of a worker, what is built once for all workers, fixtures of many rooms."""

import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

PROCESSORS = len(os.sched_getaffinity(0))
# Set before torch is imported, which reads it; processes that tests start inherit it.
_share = max(1, PROCESSORS // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
_given = os.environ.get("OMP_NUM_THREADS", "")
os.environ["OMP_NUM_THREADS"] = str(min(int(_given), _share) if _given.isdigit() else _share)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return a worker for each processor, at most 8: a worker imports torch, which takes memory."""
    return min(8, PROCESSORS)


@pytest.fixture(scope="session")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], object]:
    """`built_once(name, build)`: what `build(folder)` returns. One worker calls it; the others wait and read its result."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def once(name: str, build: Callable[[Path], object]) -> object:
        folder, result = root / name, root / f"{name}.pickle"
        with FileLock(root / f"{name}.lock"):
            if not result.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                result.write_bytes(pickle.dumps(build(folder)))
            return pickle.loads(result.read_bytes())

    return once


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
