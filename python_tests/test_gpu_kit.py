"""The GPU kit (benchmarks/gpu) on a machine without a GPU: every section end to end, and an error planted in each.

`fake_cuda` simulates the GPU, the CPU kernels replace the CUDA kernels, and scripts imitate CUDA's tools. A run and each of
its sections are forks of this process, so a planted error stays in its fork.
"""

import importlib
import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from kcd_ext import ops

CHECKOUT = Path(__file__).resolve().parents[1]
BENCHMARKS = CHECKOUT / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("benchmarks/ is only in the source folder", allow_module_level=True)

pytestmark = pytest.mark.slow  # only developers of the kernels use the kit

Plant = Callable[[], object]


# ---- CUDA's tools


STALLS = {"long_scoreboard": 9.5, "wait": 2.1, "branch_resolving": 1.25, "selected": 1.0, "barrier": 0.25}
COLUMNS = (
    "ID",
    "Process ID",
    "Process Name",
    "Host Name",
    "Kernel Name",
    "Context",
    "Stream",
    "Block Size",
    "Grid Size",
)


def ncu_log(names: Sequence[str], **changes: str) -> str:
    """Return the output of `ncu --csv --page raw` for these kernels; `changes` maps a metric's prefix to another value."""
    metrics = {
        "dram__bytes_read.sum.per_second": ("byte/s", "3,412,345,678,901"),
        "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed": ("%", "77.2"),
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": ("%", "71.5"),
        "gpu__time_duration.sum": ("ns", "371,424"),
        "launch__registers_per_thread": ("register/thread", "79"),
        "sm__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "48.25"),
        "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "36.5"),
        **{
            f"smsp__average_warps_issue_stalled_{reason}{kind}_per_issue_active.ratio": ("inst", f"{cycles * part}")
            for reason, cycles in STALLS.items()
            for kind, part in (("", 1), ("_not_issued", 0.9))
        },
    }
    for name, value in changes.items():
        metrics = {metric: (unit, value if metric.startswith(name) else x) for metric, (unit, x) in metrics.items()}
    rows = [[*COLUMNS, *metrics], ["" for _ in COLUMNS] + [unit for unit, _ in metrics.values()]]
    for i, name in enumerate(names):
        signature = f"void kcd::cuda::{name}<float>(kcd::cuda::Arguments<T1>)"
        prefix = [str(i), "411", "python3.12", "127.0.0.1", signature, "1", "7", "(256, 1, 1)", "(8192, 1, 1)"]
        rows.append(prefix + [value for _, value in metrics.values()])
    profiled = [f'==PROF== Profiling "{name}" - {i}: 0%....50%....100% - 12 passes' for i, name in enumerate(names)]
    table = [",".join(f'"{cell}"' for cell in row) for row in rows]
    return "\n".join(["==PROF== Connected to process 411 (/usr/bin/python3.12)", *profiled, *table, ""])


# A script runs its program itself, or gets the program's output and exit status.
PROGRAM = (
    'if [ -n "${PROGRAM_OUTPUT:-}" ]; then cat "$PROGRAM_OUTPUT"; status=$PROGRAM_STATUS; else "$@"; status=$?; fi\n'
)
TOOLS = {
    "nvidia-smi": 'case "$*" in *driver_version*) echo 580.159.04;; *clocks.sm*) echo 1980;; *) exit 1;; esac\n',
    "nvcc": 'echo "Cuda compilation tools, release 13.0, V13.0.88"\n',
    "cmake": 'echo "cmake version 3.31.6"\n',
    "ninja": 'echo "[1/1] Linking CXX shared module _C.so"\n',
    "compute-sanitizer": """
        tool=$2; while [ "$1" != --launch-timeout ]; do shift; done; shift 2
        echo "========= COMPUTE-SANITIZER"
    """
    + PROGRAM
    + """
        if [ "$tool" = racecheck ]; then
          echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
        else
          echo "========= ERROR SUMMARY: 0 errors"
        fi
        exit $status
    """,
    "ncu": """
        while [ "$1" != --log-file ]; do shift; done; log=$2; shift 2
        cp "$(dirname "$0")/ncu.csv" "$log"
    """
    + PROGRAM
    + "exit $status\n",
}


def tools(folder: Path) -> Path:
    """Write the tools to a folder for PATH, and return it."""
    folder.mkdir()
    for name, script in TOOLS.items():
        replace(folder / name, script)
    (folder / "ncu.csv").write_text(ncu_log(["forward_rows", "backward_rows"] * 3))
    return folder


def replace(tool: Path, script: str) -> None:
    """Replace the script of a tool."""
    tool.write_text(f"#!/bin/bash\n{textwrap.dedent(script)}")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)


# ---- processes


def in_child(function: Callable[[], int], output: int) -> int:
    """Fork a process with its own session and output; it runs the function and exits with its result. Return the process id."""
    sys.stdout.flush(), sys.stderr.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.setsid()
        os.dup2(output, 1), os.dup2(output, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
        torch.set_num_threads(1)
        status = function()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(int(status or 0))


class Forked:
    """A replacement of `subprocess.Popen` for `gpu.process`: runs the Python module in a fork, then its tool, if any."""

    def __init__(self, command, *, stdout, env=None, cwd=None, **_) -> None:
        self.args, self.returncode = command, None

        def run() -> int:
            os.environ.update(env or {})
            os.chdir(cwd or ".")
            return self._run(command)

        self.pid = in_child(run, stdout.fileno())

    def _run(self, command) -> int:
        if command[0] == "env":
            name, _, value = command[1].partition("=")
            os.environ[name], command = value, command[2:]
        i = command.index(sys.executable)
        assert command[i + 1] == "-m"
        if i == 0:
            return self._call(*command[2:])
        with tempfile.TemporaryFile("w+") as file:
            program = in_child(lambda: self._call(*command[i + 2 :]), file.fileno())
            status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
            result = {"PROGRAM_OUTPUT": f"/proc/{os.getpid()}/fd/{file.fileno()}", "PROGRAM_STATUS": str(status)}
            return subprocess.run(command, env=os.environ | result).returncode

    @staticmethod
    def _call(module: str, *arguments: str) -> int:
        sys.argv = [module, *arguments]
        for name in [name for name in sys.modules if name.startswith(("test_", "conftest"))]:
            del sys.modules[name]  # the kit's pytest loads files with the same names
        return int(pytest.main([*arguments]) if module == "pytest" else importlib.import_module(module).main())

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.002)
        return self.returncode


# ---- a run of the kit


TEST = """
    import pytest

    @pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    def device(request):
        return request.param

    @pytest.mark.parametrize("n", [1, 2])
    def test_it(device, n):
        assert {passes}
"""


class Kit:
    """A kit with its own tools, tests and results; it can run several times."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.tools, self.tests = tools(folder / "tools"), folder / "tests"
        self.tests.mkdir()
        self.write_tests(TEST.format(passes=True))

    def write_tests(self, text: str, *names: str) -> None:
        """Write the tests to files of these names, or to all files that the sections run."""
        from gpu.sections import CONFORMANCE, TRAINING

        for name in names or (*CONFORMANCE, *TRAINING):
            (self.tests / f"test_{name}.py").write_text(textwrap.dedent(text))

    def run(self, *arguments: str, plant: Plant = lambda: None, **environment: str) -> types.SimpleNamespace:
        """Run the kit. Return its exit status, printed lines, JSON and Markdown results, and log."""
        shutil.rmtree(self.out, ignore_errors=True)

        def body() -> int:
            os.environ.update(PATH=f"{self.tools}:{os.environ['PATH']}", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
            for name in ("KCD_LIBRARY", "OUT", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST"):
                os.environ.pop(name, None)
            os.environ.update(environment)
            self._shrink()
            plant()
            sys.argv = ["gpu_check.sh", "--out", str(self.out), *arguments]
            return importlib.import_module("gpu.__main__").main()

        with (self.folder / "printed").open("w") as file:
            status = os.waitstatus_to_exitcode(os.waitpid(in_child(body, file.fileno()), 0)[1])
        found = types.SimpleNamespace(status=status, lines=(self.folder / "printed").read_text().splitlines())
        for ending in ("json", "md", "log"):
            path = self.out / f"fake-gpu.{ending}"
            setattr(found, ending, path.read_text() if path.exists() else "")
        found.results = json.loads(found.json) if found.json else {}
        found.sections = {section["name"]: section for section in found.results.get("sections", ())}
        return found

    def _shrink(self) -> None:
        """Install the simulated GPU, and shrink all sizes for the CPU."""
        import fake_cuda
        from gpu import benchmark, cases, graphs, large, process, profiled, sections
        from harness import candidates, cuda
        from harness.cases import Case, Shape

        fake_cuda.install()
        small = {
            (process, "subprocess"): types.SimpleNamespace(
                Popen=Forked,
                DEVNULL=None,
                STDOUT=None,
                TimeoutExpired=subprocess.TimeoutExpired,
            ),
            (sections, "TESTS"): self.tests,
            (sections, "LEAST_SECONDS"): 0.1,
            (sections, "find_spec"): lambda name, find=sections.find_spec: None if name == "xdist" else find(name),
            (cases, "every_path"): lambda every=cases.every_path: every()[5:8],
            (graphs, "REPLAYS"): 4,
            (graphs, "PAIRS"): graphs.PAIRS[:1],
            (graphs, "UNSYNCHRONISED"): graphs.UNSYNCHRONISED[:1],
            (large, "CHECKS"): {
                "bfloat16": (lambda: large.contiguous(rows=33, classes=65), 1000),
                "strided rows": (lambda: large.strided(stride=1064), 1000),
            },
            (profiled, "SHAPES"): ((8, 40, torch.bfloat16), (8, 30, torch.float32), (64, 10, torch.float32)),
            (benchmark, "SHAPES"): (Shape(16, 100), Shape(8, 300, torch.float64)),
            (benchmark, "KEEPS"): (0.7, 1.0),
            (benchmark, "TAIL"): (Case(Shape(64, 10), 1.0),),
            (benchmark, "MOST_SECONDS"): 0.01,
            (benchmark, "wanted"): lambda candidate, place, wanted=benchmark.wanted: (
                wanted(candidate, place) and not candidate.compiles
            ),
            (cuda, "REGION_SECONDS"): 1e-4,
            (cuda, "MORE_SETS"): 2,
            (cuda, "REPLAY_SAMPLES"): 2,
            (cuda.Cuda, "rounds"): (7, 7),
            (cuda, "launches"): lambda call: call() is not None and cuda.Launches(2.0, 1.0, 0.0, 5.5),
            (candidates, "liger_candidates"): mock.Mock(side_effect=ImportError("no Liger-Kernel")),
        }
        for (module, name), value in small.items():
            setattr(module, name, value)


@pytest.fixture(scope="module", autouse=True)
def loaded():
    """Import the kit and everything that torch loads lazily, so that forked processes need not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        from gpu import benchmark, cases, graphs, large, ncu, report, reproduction, sanitized, sanitizers  # noqa: F401
        from torch._functorch import apis  # noqa: F401

        sanitized.check(cases.Case(4, 5), "cpu")
        yield


@pytest.fixture
def kit(tmp_path):
    return Kit(tmp_path)


def test_every_section_passes(kit):
    done = kit.run()
    assert done.status == 0, done.log
    assert {name: each["status"] for name, each in done.sections.items()} == {
        **dict.fromkeys(("build", "conformance", "training", "sanitizers", "graphs", "large", "ncu"), "passed"),
        "benchmarks": "passed",
        "reproduction": "cannot run here",
    }
    unset = "reproduction: the environment variable KCD_CIFAR100 is not set: see the head of gpu_check.sh"
    assert done.lines[-1] == f"gpu_check: passed: 8. Cannot run here: {unset}"
    assert done.md.startswith(f"# Fake GPU\n\n**{done.results['verdict']}**\n\n## Sections")
    assert "| conformance | passed | 10 of 10 |" in done.md and "could not be written" not in done.md
    per_call = (
        "Time of a call, forward",
        "Time of a call replayed, forward",
        "Memory of a call, forward",
        "Launches of a call",
    )
    for heading in ("Machine", "Ceilings", *per_call, "Errors", "Not measured", "Warp stalls"):
        assert f"## {heading}" in done.md
    assert "| 2 + 1 + 0: 5.5 |" in done.md

    verdicts = {each["tool"]: each for each in done.sections["sanitizers"]["data"]}
    assert list(verdicts) == ["memcheck", "racecheck", "initcheck", "synccheck"]
    assert verdicts["racecheck"]["summary"].startswith("0 hazards displayed") and "3 of 3 cases, 0 wrong" in str(
        verdicts
    )
    kernel = done.sections["ncu"]["data"][3]
    assert kernel["shape"] == "8 × 30 float32" and "backward_rows" in kernel["kernel"]
    assert (round(kernel["microseconds"], 3), kernel["dram_percent"]) == (371.424, 71.5) and kernel["stalls"] == STALLS
    total = sum(STALLS.values())
    assert f"long_scoreboard {9.5 / total:.0%}, wait {2.1 / total:.0%}, branch_resolving {1.25 / total:.0%}" in done.md
    figures = done.sections["benchmarks"]["data"]
    rows = figures["rows"]
    # Two shapes and two keeps, each with three candidates forward + backward and two forward; one place with kcd_ext only.
    assert len(rows) == 2 * 2 * (3 + 2) + 2
    assert all(row["status"] == "measured" and row["kernels"] == 2 and row["peak_bytes"] == 234 for row in rows)
    assert figures["exponentials_per_second"] == 1980e6 * 2 * 16 and figures["clock_under_load_hz"] == 1980e6
    row = next(row for row in rows if row["keep"] == 0.7 and row["direction"] == "forward + backward")
    moved, rate = (3 * 16 + 2 * 11) * 400, figures["copy_bytes_per_second"]
    assert row["floor_us"] == pytest.approx(1e6 * max(moved / rate, 100 * 2 * (16 + 11) / (1980e6 * 32)), abs=0.01)
    replayed = {(row["candidate"], row["rows"], row["keep"]) for row in rows if "replay_us" in row}
    assert replayed == {
        ("kcd_ext", 64, 1.0),
        *((name, n, keep) for name in ("kcd_ext", "eager") for n in (16, 8) for keep in (0.7, 1.0)),
    }


# ---- an error in each section: (section, plant, part of the last line)


def with_result(function: Callable, change: Callable) -> Callable:
    """Return the function with its result changed."""
    return lambda *arguments, **options: change(function(*arguments, **options))


def patch(path: str, change: Callable[[object], object]) -> Plant:
    """Return a plant that sets `module.name = change(module.name)`."""
    module, name = path.split(":")

    def plant() -> None:
        found = importlib.import_module(module)
        setattr(found, name, change(getattr(found, name)))

    return plant


def hide(module: str) -> Plant:
    """Return a plant that hides an installed Python module."""
    return patch("gpu.sections:find_spec", lambda find: lambda name: None if name == module else find(name))


def with_wrong_gradient(results: dict) -> dict:
    """Change one element of the gradient slightly, but not the loss."""
    gradient = results["gradient"].clone()
    gradient.view(-1)[7] += 0.01 * gradient.abs().max()
    return results | {"gradient": gradient}


def with_wrong_last_row(gradient: torch.Tensor) -> torch.Tensor:
    """Change the last row of the gradient, only in large calls."""
    return torch.cat([gradient[:-1], 1.05 * gradient[-1:]]) if len(gradient) > 30 else gradient


def synchronizing(loss: Callable) -> Callable:
    def call(*arguments, **options):
        torch.cuda.synchronize()
        return loss(*arguments, **options)

    return call


def with_flipped_bit(replay: Callable) -> Callable:
    def call(graph) -> None:
        replay(graph)
        for x in graph.calls[-1][3:]:
            for tensor in x if isinstance(x, (tuple, list)) else [x]:
                tensor.view(-1)[:1].view(torch.uint8)[0] ^= 1

    return call


def broken() -> int:
    raise NameError("name 'cuad' is not defined")


def sleeping() -> int:
    print("asleep", flush=True)
    time.sleep(60)
    return 0


ERRORS = {
    "wrong first loss": (
        "build",
        patch("kcd_ext:condensed_kd_loss", lambda loss: with_result(loss, lambda x: 1.01 * x)),
        "FAILED: build: the first loss is",
    ),
    "no CUDA kernels": ("build", lambda: ops.build_info.update(cuda_architectures=[]), "has no CUDA kernels"),
    "missing pytest": ("conformance", hide("pytest"), "FAILED: conformance: pytest not installed"),
    "missing hypothesis": ("conformance", hide("hypothesis"), "FAILED: conformance: hypothesis not installed"),
    "missing accelerate": ("training", hide("accelerate"), "FAILED: training: accelerate not installed"),
    "wrong gradient under a sanitizer": (
        "sanitizers",
        patch("gpu.cases:call", lambda call: with_result(call, with_wrong_gradient)),
        "memcheck failed: 0 errors, 3 of 3 cases, 3 wrong",
    ),
    "program fails before it uses the GPU": (
        "sanitizers",
        patch("gpu.sanitized:main", lambda _: broken),
        "memcheck failed: exit status 1: ERROR SUMMARY: 0 errors",
    ),
    "replay with a flipped bit": (
        "graphs",
        patch("fake_cuda:CUDAGraph", lambda graph: setattr(graph, "replay", with_flipped_bit(graph.replay)) or graph),
        "FAILED: graphs: 8 faults, the first: 64 × 1000 float32, keep 0.7 by entropy, labelled: loss of replay 0",
    ),
    "call that synchronises": (
        "graphs",
        patch("kcd_ext:condensed_kd_loss", synchronizing),
        "FAILED: graphs: 1 faults, the first: 64 × 1000 float32, keep 0.7 by entropy, labelled: a call returned only after",
    ),
    "large case out of tolerance": (
        "large",
        patch("kcd_ext.ops:condensed_kd_backward", lambda gradient: with_result(gradient, with_wrong_last_row)),
        "FAILED: large: bfloat16: different gradient than in a small call; strided rows: same as in a small call",
    ),
    "time is NaN": (
        "benchmarks",
        patch("harness.cuda:elapsed", lambda _: lambda function, calls: math.nan if calls > 3 else 1e-6),
        "median_us is nan",
    ),
    "wrong loss": (
        "benchmarks",
        patch("harness.candidates:ours", lambda loss: with_result(loss, lambda x: 1.01 * x)),
        "failed: ArithmeticError: loss",
    ),
    "call cannot be captured": (
        "benchmarks",
        patch("harness.cuda:replayed", lambda _: mock.Mock(side_effect=RuntimeError("not permitted when capturing"))),
        "keep 1.0, forward + backward, replayed: failed: not permitted when capturing",
    ),
    "table cannot be written": (
        "ncu",
        patch("gpu.report:_stalls", lambda _: mock.Mock(side_effect=KeyError("stalls"))),
        "gpu_check: a part of the report could not be written: KeyError: 'stalls'",
    ),
    "section raises an exception": (
        "graphs",
        patch("gpu.graphs:main", lambda _: broken),
        "FAILED: graphs: NameError: name 'cuad' is not defined",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_planted_error_is_reported(kit, name):
    section, plant, words = ERRORS[name]
    done = kit.run("--only", section, plant=plant)
    assert done.status == 1 and words in done.lines[-1], (done.lines, done.log)
    assert done.lines[-1].startswith("gpu_check: ") and done.md.count(words.removeprefix("gpu_check: "))


FAILING = TEST.format(passes="device == 'cpu' or n == 1")
SKIPPED = TEST.format(passes="device == 'cpu' or pytest.skip('no driver')")
ONE_SIDED = TEST.replace('"cpu", ', '"cpu", "simt", ').replace(', pytest.param("cuda", marks=pytest.mark.gpu)', "")
TESTS = {
    "failing test": ("autograd", FAILING, "9 of 10 tests for the GPU passed; 1 failed, the first: "),
    "skipped test": (
        "autograd",
        SKIPPED,
        "8 of 10 tests for the GPU passed; 2 did not run: 2 × Skipped: no driver",
    ),
    "file cannot be imported": (
        "autograd",
        "import nowhere\n",
        "8 of 8 tests for the GPU passed; 1 failed, the first: tests/test_autograd.py",
    ),
    "CPU case without a GPU twin": (
        "autograd",
        ONE_SIDED.format(passes=True),
        "8 of 8 tests for the GPU passed; 2 CPU cases have no GPU twin, the first: tests/test_autograd.py",
    ),
    "no tests": (
        (),
        ONE_SIDED.format(passes=True).replace('"cpu"', '"reference"'),
        "no test for the GPU was found: torch sees no GPU",
    ),
}


@pytest.mark.parametrize("name", TESTS)
def test_failing_or_missing_tests_are_reported(kit, name):
    file, text, words = TESTS[name]
    kit.write_tests(text, *([file] if file else []))
    done = kit.run("--only", "conformance")
    assert done.status == 1 and f"FAILED: conformance: {words}" in done.lines[-1], (
        done.lines,
        done.log,
    )


def test_deselected_tests_are_reported(kit):
    done = kit.run("--only", "training", plant=lambda: os.environ.update(PYTEST_ADDOPTS="-k not(infobatch)"))
    assert done.status == 1 and "8 of 10 tests for the GPU passed; 2 did not run: 2 × deselected" in done.lines[-1]
    assert done.sections["training"]["data"]["tests"] == 10


REPORT = """
    echo "========= COMPUTE-SANITIZER"
    cat "$PROGRAM_OUTPUT"
    echo "========= Invalid __global__ read of size 16 bytes"
    echo "=========     at void kcd::cuda::forward_rows<float>(kcd::cuda::RowStatsArguments<T1>)+0x1b0 in walk.cuh:91"
    echo "=========     by thread (3,0,0) in block (12,0,0)"
    echo "========= ERROR SUMMARY: 1 error"
    exit 86
"""
REFUSED = """
    echo "========= COMPUTE-SANITIZER"
    echo "========= Error: Device not supported. Please refer to the \\"Supported Devices\\" section of the sanitizer documentation"
    exit 1
"""
ERROR = 'while [ "$1" != --log-file ]; do shift; done; echo "==ERROR== %s" >"$2"; exit %d\n'
COUNTERS = "ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters on the target device 0."
SCRIPTS = {
    "cmake fails": ("graphs", "cmake", "exit 1", 1, "FAILED: build: cmake could not configure for native or 90-real"),
    "ninja fails": (
        "graphs",
        "ninja",
        "exit 1",
        1,
        "FAILED: build: ninja failed with status 1: see the log; graphs: the build",
    ),
    "sanitizer reports an error": (
        "sanitizers",
        "compute-sanitizer",
        REPORT,
        1,
        "FAILED: sanitizers: memcheck failed: 1 error, 3 of",
    ),
    "sanitizer does not support the device": (
        "sanitizers",
        "compute-sanitizer",
        REFUSED,
        0,
        "Cannot run here: sanitizers: Error: Device not supported",
    ),
    "counters are forbidden": ("ncu", "ncu", ERROR % (COUNTERS, 1), 0, f"Cannot run here: ncu: {COUNTERS}"),
    "profiler cannot start": (
        *("ncu", "ncu", ERROR % ("Failed to initialize the profiler: LibraryNotLoaded", 1), 0),
        "Cannot run here: ncu: Failed to initialize the profiler",
    ),
    "profiler fails": (
        *("ncu", "ncu", ERROR % ("Option '--section' is unknown", 3), 1),
        "FAILED: ncu: ncu failed with exit status 3: Option '--section' is unknown",
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_tool_result_is_reported(kit, name):
    section, tool, script, status, words = SCRIPTS[name]
    replace(kit.tools / tool, script)
    done = kit.run("--only", section)
    assert done.status == status and words in done.lines[-1] and words in done.md, (done.lines, done.log)


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (ncu_log([]), "FAILED: ncu: kernels none instead of forward_rows, backward_rows"),
        (ncu_log(["forward_rows"] * 6), "FAILED: ncu: kernels void kcd::cuda::forward_rows"),
        (ncu_log(["forward_rows", "backward_rows"] * 3, gpu__time="n/a"), "Arguments<T1>): no number for microseconds"),
        (
            ncu_log(["forward_rows", "backward_rows"] * 3, smsp__average="(!) nan"),
            "Arguments<T1>): no number for stalls",
        ),
    ],
)
def test_missing_counters_are_reported(kit, log, words):
    (kit.tools / "ncu.csv").write_text(log)
    done = kit.run("--only", "ncu")
    assert done.status == 1 and words in done.lines[-1], (done.lines, done.log)


@pytest.mark.parametrize("tool", ["compute-sanitizer", "ncu"])
def test_missing_tool_is_reported(kit, tool):
    section = "sanitizers" if tool == "compute-sanitizer" else tool
    module = f"gpu.{section}:tool_of_cuda"
    done = kit.run("--only", section, plant=patch(module, lambda _: lambda name: None))
    assert done.status == 1 and f"FAILED: {section}: {tool} is not installed" in done.lines[-1]


def test_tools_are_found_in_the_toolkit(kit, tmp_path, monkeypatch):
    from gpu.process import tool_of_cuda

    toolkit = tmp_path / "cuda"
    for path in ("bin/nvcc", "compute-sanitizer/compute-sanitizer"):
        (toolkit / path).parent.mkdir(parents=True)
        replace(toolkit / path, "exit 0")
    monkeypatch.setenv("PATH", str(toolkit / "bin"))
    assert tool_of_cuda("compute-sanitizer") == str(toolkit / "compute-sanitizer" / "compute-sanitizer")
    assert tool_of_cuda("no-such-tool") is None


def test_hanging_section_does_not_stop_the_others(kit):
    plant = patch("gpu.graphs:main", lambda _: sleeping)
    done = kit.run("--only", "graphs,large", "--minutes", "0.05", plant=plant)
    assert done.status == 1 and re.search(r"FAILED: graphs: stopped after \d s; last line: ", done.lines[-1])
    assert {name: each["status"] for name, each in done.sections.items()} == {
        "build": "passed",
        "graphs": "timed out",
        "large": "passed",
    }
    assert "asleep" in done.log and done.results["seconds"] < 6


def test_killed_run_is_reported_as_failed(kit):
    def die_in_last_section(execute):
        return lambda section, *arguments: os._exit(9) if section.name == "ncu" else execute(section, *arguments)

    plant = patch("gpu.__main__:execute", die_in_last_section)

    done = kit.run("--only", "large,ncu", plant=plant)
    assert done.status == 9 and "**FAILED: ncu: the run was stopped before it**" in done.md


# ---- reproduction


def images(path: Path, classes: int) -> Path:
    labels = np.arange(200) % classes
    pixels = np.zeros((200, 4, 4, 3), np.uint8)
    np.savez(path, x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    return path


REPRODUCTION = """
    import json, sys
    from pathlib import Path
    runs = [{{"kind": kind, "accuracy_last": {accuracy}}} for kind in ("kd", "kc-kd")]
    if {finished}:
        folder = Path(sys.argv[sys.argv.index("--results") + 1])
        (folder / "reproduce-a.json").write_text(json.dumps({{"pair": "a-b", "runs": runs}}))
    sys.exit({status})
"""


@pytest.mark.parametrize(
    ("accuracy", "finished", "status", "words"),
    [
        ("71.5", True, 0, "gpu_check: passed: 2"),
        ("float('nan')", True, 0, "FAILED: reproduction: no accuracy in the runs of kd, kc-kd"),
        ("71.5", False, 0, "FAILED: reproduction: no seed finished in all kinds"),
        ("71.5", True, 1, "FAILED: reproduction: reproduce.py failed with exit status 1"),
    ],
)
def test_reproduction_reports_its_result(kit, accuracy, finished, status, words):
    script = kit.folder / "reproduce.py"
    script.write_text(textwrap.dedent(REPRODUCTION).format(accuracy=accuracy, finished=finished, status=status))
    plant = patch("gpu.reproduction:SCRIPT", lambda _: script)
    archive = images(kit.folder / "images.npz", 100)
    done = kit.run("--only", "reproduction", plant=plant, KCD_CIFAR100=os.path.relpath(archive))
    assert words in done.lines[-1] and done.status == ("FAILED" in words), (done.lines, done.log)


def test_reproduction_rejects_other_data(kit):
    data = images(kit.folder / "images.npz", 10)
    done = kit.run("--only", "reproduction", KCD_CIFAR100=str(data))
    assert done.status == 1 and "is not CIFAR-100: it has 10 classes" in done.lines[-1]
    data.write_bytes(b"no archive")
    done = kit.run("--only", "reproduction", KCD_CIFAR100=str(data))
    assert done.status == 1 and "FAILED: reproduction: KCD_CIFAR100: " in done.lines[-1], done.log


# ---- around the sections


def test_existing_library_is_used_without_building(kit):
    replace(kit.tools / "cmake", "exit 1")
    done = kit.run("--only", "large", KCD_LIBRARY="_C.so")
    assert done.status == 0 and f"KCD_LIBRARY names {Path.cwd() / '_C.so'}" in done.sections["build"]["summary"]


def test_clock_starts_before_torch_is_imported():
    code = "import sys, gpu.__main__; sys.exit('torch' in sys.modules or gpu.__main__._arguments().minutes != 8.5)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(BENCHMARKS)})
    assert done.returncode == 0


def test_script_rejects_unknown_section_and_missing_python(tmp_path):
    command = [BENCHMARKS / "gpu_check.sh", "--only", "benchmark"]
    done = subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 2 and "unknown section benchmark; the sections are build, conformance" in done.stderr
    done = subprocess.run(command, env=os.environ | {"PYTHON": "no-python"}, capture_output=True, text=True)
    assert done.returncode == 2 and "no-python was not found" in done.stderr


def test_script_header_names_every_section(kit):
    from gpu.sections import SECTIONS

    head = (BENCHMARKS / "gpu_check.sh").read_text()
    (names,) = re.findall(r"# Sections: ([a-z, \n#]+)\.", head)
    assert re.findall("[a-z]+", names) == [section.name for section in SECTIONS]


def test_moved_tensors_keep_their_layout():
    from backends import copy_to_device

    memory = torch.arange(40.0)
    for x in (memory.view(5, 8)[:, 1:4], memory[3:].as_strided((4, 3), (2, 1)), memory[:1].expand(3), torch.empty(0)):
        moved = copy_to_device(x, "meta")
        assert (moved.shape, moved.stride(), moved.storage_offset()) == (x.shape, x.stride(), x.storage_offset())
        assert moved.untyped_storage().nbytes() == x.untyped_storage().nbytes()


# ---- real processes


@pytest.fixture
def child_processes(kit, monkeypatch):
    """Give every child process the simulated GPU and the fake tools, and hide packages that a GPU machine may lack."""
    site = kit.folder / "site"
    site.mkdir()
    absent = "import sys; sys.modules.update(dict.fromkeys(('tyro', 'sklearn', 'mlxtend', 'liger_kernel')))"
    lines = [absent, "import os; os.environ.pop('KCD_LIBRARY', None)", "import fake_cuda; fake_cuda.install()"]
    (site / "sitecustomize.py").write_text("\n".join(lines))
    folders = [site, CHECKOUT, BENCHMARKS, Path(__file__).parent]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    monkeypatch.setenv("PATH", f"{kit.tools}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.delenv("KCD_LIBRARY", raising=False)


# Tests that the simulated GPU does not support, that the CPU kernels reject, or that take the oracle 15 s.
COMPILED = "compile or trace or opcheck or graphed or inplace_is_refused"
EXCLUDED = (
    f"{COMPILED} or gradcheck or twice or transforms or fake_tensors or autocast or on_a_gpu or gpu_memory or nccl"
)
EXCLUDED += " or out_of_range_give_nan or rejects or refuses or many_rows"


@pytest.mark.parametrize(("name", "left_out", "least"), [("conformance", EXCLUDED, 400), ("training", "", 10)])
def test_kit_tests_pass_on_the_simulated_gpu(kit, child_processes, monkeypatch, name, left_out, least):
    """Run a section's real command: every test moves its tensors, and every test has a CUDA case."""
    from gpu import sections

    monkeypatch.setenv("PYTEST_ADDOPTS", f"-k 'not ({left_out})'" if left_out else "")
    monkeypatch.setattr(sections, "find_spec", lambda name: None)  # avoid xdist's processes on a busy machine
    (section,) = (section for section in sections.SECTIONS if section.name == name)
    run = sections.Run(100.0, kit.folder, kit.folder / "counts", kit.folder)
    done = subprocess.run(section.command(run), cwd=kit.folder, capture_output=True, text=True)
    counts = json.loads(run.data.read_text())
    deselected = counts["tests"] - counts["passed"]
    assert counts["failed"] == counts["without_twin"] == [] and counts["passed"] >= least, done.stdout
    assert (
        counts["why_not_run"] == ({"deselected": deselected} if deselected else {})
        and deselected < 0.2 * counts["tests"]
    )
    assert done.returncode == (deselected > 0)


def test_script_runs_end_to_end(kit, child_processes):
    command = [
        str(BENCHMARKS / "gpu_check.sh"),
        "--out",
        str(kit.out),
        "--only",
        "sanitizers,graphs,large",
        "--minutes",
        "8",
    ]
    done = subprocess.run(command, cwd=kit.folder, capture_output=True, text=True)
    results = json.loads((kit.out / "fake-gpu.json").read_text())
    statuses = {section["name"]: section["status"] for section in results["sections"]}
    passed = dict.fromkeys(("build", "sanitizers", "graphs"), "passed")
    assert statuses == {**passed, "large": "cannot run here"} and done.returncode == 0, done.stdout + done.stderr
    assert results["sections"][1]["data"][0]["summary"] == "0 errors, 40 of 40 cases, 0 wrong"
    assert done.stdout.splitlines()[-1].startswith(
        "gpu_check: passed: 3. Cannot run here: large: bfloat16 32769 × 65537: needs"
    )


@pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="needs pytest-xdist")
def test_tests_are_counted_across_workers(kit, tmp_path):
    text = TEST.format(passes="device == 'cpu' or n == 1 or pytest.skip('no driver')")
    kit.write_tests(text)
    kit.write_tests(
        text.replace("@pytest.fixture(", "pytestmark = pytest.mark.xdist_group('it')\n    @pytest.fixture("), "group"
    )
    options = "-p xdist -p gpu.tally --tally counts -n 2 --dist loadgroup -m gpu -k not(infobatch) tests"
    environment = {"PYTHONPATH": str(BENCHMARKS), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", *options.split()]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)
    counts = json.loads((tmp_path / "counts").read_text())
    assert (counts["tests"], counts["passed"]) == (20, 9), done.stdout
    assert counts["why_not_run"] == {"Skipped: no driver": 9, "deselected": 2} and counts["without_twin"] == []
    assert done.returncode == 1 and done.stdout.splitlines()[-1].startswith(
        "9 of 20 tests for the GPU passed; 11 did not run: "
    )
