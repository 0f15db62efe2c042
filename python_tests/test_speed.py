"""The speed relative to eager, compared with the committed ratios: `pytest -m speed`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kcd_ext.ops import build_info

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("only the source folder has benchmarks/", allow_module_level=True)


# Makes GNU malloc keep freed memory. If it happens to return intermediates to the system, eager takes twice as long.
STEADY_MALLOC = {"MALLOC_TRIM_THRESHOLD_": "2147483647", "MALLOC_MMAP_THRESHOLD_": "33554432"}


@pytest.mark.speed
def test_ratio_to_eager_does_not_fall_below_half_of_the_committed_one_twice(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from harness import guard, places

    instruction_set, processors = build_info["instruction_set_in_use"], len(os.sched_getaffinity(0))
    committed = guard.committed(BENCHMARKS / "results", instruction_set)
    usable = [threads for threads in committed if threads <= processors]
    if not usable:
        pytest.skip(f"no ratios are committed for {instruction_set} and at most {processors} threads")
    threads = min(usable)  # usually one, so that load on other cores matters little

    def measure(shapes):
        command = [sys.executable, str(BENCHMARKS / "run.py"), "--short", "--compile", "never", "--shapes", *shapes]
        command += ["--threads", str(threads), "--output", str(tmp_path)]
        subprocess.run(command, cwd=tmp_path, env=os.environ | STEADY_MALLOC, check=True, timeout=300)
        return guard.committed(tmp_path, instruction_set)[threads]

    assert guard.fallen_twice(measure, map(str, places.SHORT.shapes), committed[threads]) == []
