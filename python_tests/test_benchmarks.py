"""The benchmark harness: floors, summaries and the speed guard against hand-computed numbers, and one small run."""

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("only the source folder has benchmarks/", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def harness():
    """Add benchmarks/ to the import path for this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield


@pytest.mark.parametrize(
    ("shape", "keep", "backward", "one_pass", "two_passes"),
    [
        # 10 rows of 8 float32 are 320 bytes, 80 pairs of logits; 7 of the rows are selected.
        ("10x8", 0.7, False, (640, 160), (640, 160)),
        ("10x8", 0.7, True, (960, 160), (960 + 2 * 7 * 32, 160 + 2 * 7 * 8)),
        ("10x8:bfloat16", 0.2, True, (480, 160), (480 + 2 * 2 * 16, 160 + 2 * 2 * 8)),
        # 5 of 10 rows are ignored: they are not read, but their gradient is written. The backward pass reads the student's 5
        # valid rows again for the cross entropy, and the teacher's 3 selected rows.
        ("10x8:labels=0.5", 0.7, True, (320 + 320, 80), (640 + (5 + 3) * 32, 80 + (5 + 3) * 8)),
        ("1x8:float64", 0.2, True, (192, 16), (192 + 128, 16 + 16)),  # at least one row is selected
    ],
)
def test_work_equals_bytes_and_exponentials_counted_by_hand(shape, keep, backward, one_pass, two_passes):
    from harness import floors
    from harness.cases import Case, Shape

    job = Case(Shape.parse(shape), keep).job(backward=backward)
    assert floors.one_pass(job) == one_pass
    assert floors.two_passes(job) == two_passes


def test_floor_is_the_larger_of_bytes_and_exponentials():
    from harness.floors import Ceilings, Work, floor

    assert floor(Work(600, 100), Ceilings(200.0, 50.0)) == (3.0, "bytes")
    assert floor(Work(600, 200), Ceilings(200.0, 50.0)) == (4.0, "exponentials")
    assert floor(Work(600, 200), Ceilings(200.0, None)) == (3.0, "bytes")


def test_shape_parses_its_own_text_and_refuses_other_text():
    from harness.cases import Shape

    shape = Shape.parse("512x128256:bfloat16:labels=0.1")
    assert shape == (512, 128256, torch.bfloat16, 0.1, None) and shape.n_ignored == 51
    assert Shape.parse("4x5") == Shape.parse(str(Shape.parse("4x5"))) == (4, 5, torch.float32, None, None)
    for text in ("4", "4x", "0x5", "4x5x6", "4x5:int8", "4x5:labels=1", "4x-5"):
        with pytest.raises(ValueError):
            Shape.parse(text)
    with pytest.raises(ValueError, match=r"the fraction of ignored labels must be in \[0, 1\), got many"):
        Shape.parse("4x5:labels=many")


def test_candidates_take_turns_in_changing_order_and_summary_has_quartiles():
    from harness.timing import Deadline, interleave, summary

    order = []
    functions = {name: lambda name=name: order.append(name) or (1e-6 * len(order),) for name in "abc"}
    samples = interleave(functions, Deadline(0), (7, 9))  # past the deadline: a warm-up round, then the fewest rounds
    assert order[:3] == ["a", "b", "c"] and len(order) == 3 * 8
    rounds = [order[i : i + 3] for i in range(3, 24, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds) and len(set(map(tuple, rounds))) > 1
    assert samples["b"] == [(1e-6 * (3 + 3 * i + each.index("b") + 1),) for i, each in enumerate(rounds)]
    assert len(interleave(functions, Deadline(60), (2, 5))["a"]) == 5
    microseconds = np.array([7.0, 1, 2, 4, 3, 6, 5])
    low, median, high = np.quantile(microseconds, (0.25, 0.5, 0.75), method="weibull")
    assert summary((microseconds * 1e-6).tolist()) == {"median_us": median, "low_us": low, "high_us": high}


@pytest.mark.parametrize("ignored", [None, 0.0, 0.3])
def test_eager_and_exact_losses_equal_the_reference(ignored):
    from harness import candidates
    from harness.cases import Shape
    from harness.inputs import Rotation

    import kcd_ext.reference

    torch.manual_seed(0)
    inputs = Rotation(Shape(37, 11, torch.float64, ignored), 1, "cpu")
    student, teacher, labels = inputs.students[0].requires_grad_(), inputs.teachers[0], inputs.labels[0]
    assert labels is None or (labels == -100).sum() == round(37 * ignored)
    for keep in (1.0, 0.7, 0.2):
        want = kcd_ext.reference.condensed_kd_loss(student, teacher, labels=labels, keep=keep)
        got = candidates.eager(student, teacher, labels, keep)
        gradients = [torch.autograd.grad(loss, student)[0] for loss in (want, got)]
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*gradients)
        assert candidates.exact(student.detach(), teacher, labels, (keep,))[keep] == pytest.approx(want.item())


def record(folder, name, threads, ratios, instruction_set="avx2", benchmark="cpu"):
    from harness import guard

    facts = {"instruction set": instruction_set, "threads": threads}
    by_name = {shape: {"eager": ratio, "compile": 0.1} for shape, ratio in ratios.items()}
    guard.record(folder, {"benchmark": benchmark, "name": name, "facts": facts, "ratios": by_name})


def test_committed_ratios_are_the_lowest_of_the_instruction_set(tmp_path):
    from harness import guard

    assert guard.committed(tmp_path, "avx2") == {}
    record(tmp_path, "one", 2, {"a": 10.0, "b": 4.0})
    record(tmp_path, "another", 2, {"a": 1.0})
    record(tmp_path, "another", 2, {"a": 8.0, "b": 6.0, "c": 1.0})  # replaces the earlier run
    record(tmp_path, "another", 2, {})  # a run without a main table changes nothing
    record(tmp_path, "more", 4, {"a": 20.0})
    record(tmp_path, "newer", 2, {"a": 30.0}, instruction_set="avx512")
    record(tmp_path, "gpu", 2, {"a": 90.0}, benchmark="cuda")
    assert guard.committed(tmp_path, "avx2") == {2: {"a": 8.0, "b": 4.0, "c": 1.0}, 4: {"a": 20.0}}
    assert guard.committed(tmp_path, "baseline") == {}


def test_every_measured_cpu_has_its_table_and_its_ratios_committed():
    from harness import guard
    from harness.cases import SHORT

    folder = BENCHMARKS / "results"
    machines = json.loads((folder / guard.FILE).read_text())
    tables = {path.stem for path in folder.glob("*.md") if "| instruction set |" in path.read_text()}
    assert machines.keys() == tables
    for name, machine in machines.items():
        assert set(map(str, SHORT.shapes)) <= machine["speedup_over_eager"].keys(), name
        assert name.endswith(f"-thread{'s' * (machine['threads'] > 1)}-{machine['instruction_set']}")


@pytest.mark.parametrize(
    ("first", "second", "measured_again", "messages"),
    [
        ({"a": 5.0, "b": 2.0}, None, [], []),  # half is not below half
        ({"a": 4.9, "b": 2.0}, {"a": 5.1}, ["a"], []),  # fell once
        ({"a": 4.9, "b": 1.9}, {"a": 5.1, "b": 1.8}, ["a", "b"], ["b: 1.8 × eager, committed 4.0"]),  # fell twice
        ({"b": 2.0}, {}, ["a"], ["a: not measured × eager, committed 10.0"]),
        ({"a": float("nan"), "b": 2.0}, {"a": 10.0}, ["a"], []),
    ],
)
def test_guard_reports_a_ratio_that_falls_below_half_twice(first, second, measured_again, messages):
    from harness import guard

    measured = []

    def measure(shapes):
        measured.append(shapes)
        return (first, second)[len(measured) - 1]

    assert guard.fallen_twice(measure, ["a", "b"], {"a": 10.0, "b": 4.0, "unused": 1.0}) == messages
    assert measured == [["a", "b"], measured_again][: 1 + bool(measured_again)]


def test_guard_reports_a_shape_without_a_committed_ratio():
    from harness import guard

    assert guard.fallen_twice(lambda shapes: {"a": 10.0}, ["a", "z"], {"a": 10.0}) == ["z: no committed ratio"]


def run(tmp_path, *arguments, **environment):
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--threads", "1", "--compile", "never", "--memory"]
    command += [*arguments, "--seconds", "0.02", "--output", str(tmp_path / "results")]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (page,) = (tmp_path / "results").glob("*.md")
    return done.stdout, json.loads(page.with_suffix(".json").read_text())


@pytest.mark.slow
def test_small_run_writes_table_figures_plot_and_ratios(tmp_path):
    shapes = ["8x10", "6x300:bfloat16:labels=0.5"]
    text, result = run(tmp_path, "--shapes", *shapes)
    assert result["benchmark"] == "cpu" and result["facts"]["threads"] == 1
    assert list(result["ratios"]) == ["8x10:float32", "6x300:bfloat16:labels=0.5"]
    rows = {(row["rows"], row["direction"], row["candidate"]): row for row in result["figures"]["rows"]}
    assert len(rows) == 2 * 2 * 4  # ours, in place, eager, student.sum()
    for row in rows.values():
        assert row["status"] == "measured" and row["rounds"] >= 5 and 0 < row["low_us"] <= row["high_us"]
        assert row["of_floor"] == pytest.approx(row["floor_us"] / row["median_us"], abs=1e-3)
    both, own = rows[8, "forward + backward", "eager"], rows[8, "forward + backward", "kcd_ext"]
    assert result["ratios"]["8x10:float32"]["eager"] == pytest.approx(both["median_us"] / own["median_us"], abs=0.01)
    assert both["median_us"] > rows[8, "forward", "eager"]["median_us"]
    assert {row["candidate"] for row in result["overhead"]["rows"]} == {"kcd_ext", "eager", "student.sum()"}
    name, folder = result["name"], tmp_path / "results"
    files = {f"{name}.md", f"{name}.json", f"{name}.svg", "ratios.json"}
    assert {path.name for path in folder.iterdir()} == files
    assert (folder / f"{name}.md").read_text() == text[: text.rindex("\n")]
    (machine,) = json.loads((folder / "ratios.json").read_text()).values()
    assert machine["threads"] == 1 and machine["instruction_set"] == result["facts"]["instruction set"]
    assert machine["speedup_over_eager"] == {shape: ratios["eager"] for shape, ratios in result["ratios"].items()}


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="cannot reset the process's peak memory")
def test_peak_memory_excludes_the_inputs():
    from harness import candidates, memory
    from harness.cases import Shape

    cpu = types.SimpleNamespace(kind="cpu", threads=1)
    rows = memory.peaks(cpu, Shape(512, 2048), candidates.common_candidates()[:3])
    peaks = {(row["candidate"], row["direction"]): row["peak_bytes"] / row["logits_bytes"] for row in rows}
    # 4 MiB of logits: no memory without a gradient, one gradient with it, none in place. Library pages may add a little.
    assert peaks.pop(("kcd_ext", "forward")) < 0.5 and peaks.pop(("kcd_ext in place", "forward + backward")) < 0.5
    assert 0.9 < peaks.pop(("kcd_ext", "forward + backward")) < 2
    assert set(peaks) == {("eager", "forward"), ("eager", "forward + backward")} and min(peaks.values()) > 2.9


def test_each_sweep_varies_one_quantity():
    from harness.cases import SWEEPS

    swept = {name: cases(6) for name, cases in SWEEPS.items()}
    assert [place.shape.threads for place in swept["threads"]] == [1, 2, 4, 6]
    assert [place.keep for place in swept["keep"]] == [1.0, 0.7, 0.2] and len({p.shape for p in swept["keep"]}) == 1
    assert [p.shape.classes for p in swept["classes"]] == [10, 64, 256, 1024, 4096, 16384, 65536, 262144]
    assert {p.shape.rows * p.shape.classes for p in swept["classes"][1:]} == {2**22}
    assert len({p.shape.dtype for p in swept["dtype"]}) == 4 and len({p.shape.rows for p in swept["rows"]}) > 4


@pytest.mark.slow
def test_floors_count_bytes_only_without_a_compiler(tmp_path):
    text, result = run(tmp_path, "--shapes", "64x100", CXX="no-such-compiler")
    assert "Floors count bytes only" in text and "no compiler no-such-compiler" in text
    assert {row["floor_bound"] for row in result["figures"]["rows"]} == {"bytes"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_ceilings_use_the_flags_of_the_kernels():
    from harness.ceilings import Compiled, compiler_flags

    from kcd_ext.ops import build_info

    cmake = (BENCHMARKS.parent / "csrc" / "CMakeLists.txt").read_text()
    avx512, avx2, baseline = (compiler_flags(name, cmake) for name in ("avx512", "avx2", "baseline"))
    assert {"-O3", "-mavx512f", "-mfma"} <= set(avx512) and "-mavx512f" not in avx2
    assert "-O3" in baseline and not [flag for flag in baseline if flag.startswith("-m")]
    compiled = Compiled(build_info["instruction_set_in_use"])
    for n in (1, 7, 1001):  # unaligned starts and partial vectors at the end
        a, b, c = torch.arange(n + 1.0)[1:], torch.full((n,), 0.5), torch.zeros(n)
        assert compiled.triad_seconds(a, b, c, 3) > 0
        assert torch.equal(c, a + b)
    # In double a vector has half as many elements, and each takes more steps.
    single, double = (compiled.exponentials_per_second(in_double=wide, threads=1) for wide in (False, True))
    assert single > double > 0
