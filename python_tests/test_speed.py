"""Speed relative to eager, compared with the committed ratios: `pytest -m speed`."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kcd_ext.ops import build_info

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("benchmarks/ exists in the source folder only", allow_module_level=True)


# Make GNU malloc keep freed memory. If it happens to return intermediates to the system, eager takes twice as long.
MALLOC_SETTINGS = {"MALLOC_TRIM_THRESHOLD_": "2147483647", "MALLOC_MMAP_THRESHOLD_": "33554432"}


@pytest.mark.speed
def test_no_ratio_to_eager_falls_below_half_of_the_committed_one_twice(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from harness import cases, guard

    instruction_set, processors = build_info["instruction_set_in_use"], len(os.sched_getaffinity(0))
    committed = guard.committed(BENCHMARKS / "results", instruction_set)
    usable = [threads for threads in committed if threads <= processors]
    if not usable:
        pytest.skip(f"no committed ratios for {instruction_set} and at most {processors} threads")
    threads = min(usable)  # preferably 1, which depends least on the load of other cores

    def measure(shapes):
        command = [sys.executable, str(BENCHMARKS / "run.py"), "--short", "--compile", "never", "--shapes", *shapes]
        folder = tempfile.mkdtemp(dir=tmp_path)
        command += ["--threads", str(threads), "--output", folder]
        subprocess.run(command, cwd=tmp_path, env=os.environ | MALLOC_SETTINGS, check=True, timeout=300)
        return guard.committed(Path(folder), instruction_set).get(threads, {})

    assert guard.fallen_twice(measure, map(str, cases.SHORT.shapes), committed[threads]) == []
