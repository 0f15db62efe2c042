"""Studies: runs in parallel processes, deadlines, and signals."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
from commands import heed_interrupts

from kcd_ext import files
from kcd_ext.commands import study
from kcd_ext.commands.study import PlannedRun, Study
from kcd_ext.commands.teachers import Teacher
from kcd_ext.data.images import load
from kcd_ext.students import WEIGHTS
from kcd_ext.training import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def plan(output, data, side_by_side, epochs=2):
    """Return a study of a teacher and its two students."""

    def recipe(method, name, seed):
        return Recipe(method, name=name, seed=seed, epochs=epochs, device="cpu", batch_size=256)

    teacher = PlannedRun("cnn_small", recipe("ce", "teacher", 0), output / "teacher")
    teaching = {"teacher": Teacher("cnn_small"), "teacher_folder": teacher.folder}
    students = [
        PlannedRun("cnn_small", recipe("kd", "kd", seed), output / f"seed-{seed}", **teaching) for seed in (0, 1)
    ]
    more = {"resume": True, "threads": 1, "side_by_side": side_by_side}
    return Study("a test", {}, data, {"spec": "digits"}, [teacher, *students], output, **more)


@pytest.mark.slow
def test_parallel_runs_equal_sequential_runs(tmp_path, capfd):
    data = load("digits")
    plan(tmp_path / "alone", data, 1).checked().run()
    # Copy the teacher: trained in the parallel study, it would have two threads.
    shutil.copytree(tmp_path / "alone" / "teacher", tmp_path / "beside" / "teacher")
    plan(tmp_path / "beside", data, 2).checked().run()
    for run in ("seed-0", "seed-1"):
        one, other = ((tmp_path / name / run / WEIGHTS).read_bytes() for name in ("alone", "beside"))
        assert one == other
    shown, again = (text.split("report: ")[0] for text in capfd.readouterr().out.split("method ")[1:])
    assert shown.count("kd") == again.count("kd") == 1
    (tmp_path / "beside" / "seed-1" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"beside/seed-1/config.json is damaged"):
        plan(tmp_path / "beside", data, 2).checked()


def test_no_run_starts_after_the_deadline(tmp_path, capfd):
    late = replace(plan(tmp_path / "late", load("digits"), 2), deadline=time.monotonic() - 1)
    late.checked().run()
    assert not any(tmp_path.iterdir()) and capfd.readouterr().out == ""


@pytest.fixture
def heeds_interrupts():
    """SIGINT raises KeyboardInterrupt, also if the shell that started the tests ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_deadline_interrupts_silently_but_ctrl_c_is_raised(heeds_interrupts):
    handler = signal.getsignal(signal.SIGALRM)
    started = time.monotonic()
    study._call_until(started + 0.05, partial(time.sleep, 60))
    study._call_until(started, partial(time.sleep, 60))  # a deadline in the past
    assert 0.05 <= time.monotonic() - started < 50
    with pytest.raises(KeyboardInterrupt):
        study._call_until(started + 1000, partial(signal.raise_signal, signal.SIGINT))
    assert signal.getsignal(signal.SIGALRM) is handler and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_finished_study_is_moved_aside_once_without_user_files(tmp_path):
    output, previous = tmp_path / "demo", tmp_path / "demo.previous"
    for folder in (output, previous):
        folder.mkdir()
        (folder / "config.json").write_text('{"command": "a test"}')
        (folder / "report.html").write_text(folder.name)
    (output / "notes.txt").write_text("the user's")
    (previous / files.LOCK).touch()  # left by a process that was killed while it moved the folder
    first = replace(plan(output, load("digits"), 1), resume=False, keeps_previous=True)
    second = first.checked()
    first._move_aside()
    second._move_aside()  # its check, too, saw a finished study
    assert (previous / "report.html").read_text() == "demo"
    assert not (previous / "notes.txt").exists() and [path.name for path in output.iterdir()] == ["notes.txt"]


SIDE_BY_SIDE = """
import sys
from pathlib import Path

from kcd_ext.commands.study import PlannedRun, Study
from kcd_ext.data.images import load
from kcd_ext.training import Recipe

if __name__ == "__main__":
    output = Path(sys.argv[1])
    recipes = [Recipe("ce", name="ce", seed=seed, epochs=10_000, device="cpu", batch_size=256) for seed in range(4)]
    runs = [PlannedRun("cnn_small", recipe, output / f"seed-{recipe.seed}") for recipe in recipes]
    more = {"resume": True, "threads": 1, "side_by_side": 2}
    Study("a test", {}, load("digits"), {"spec": "digits"}, runs, output, **more).checked().run()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_no_run_continues_after_a_signal_ends_the_study(tmp_path, number):
    script, output = tmp_path / "script.py", tmp_path / "runs"
    script.write_text(SIDE_BY_SIDE)
    command = [sys.executable, script, output]
    options = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True, "preexec_fn": heed_interrupts}
    with subprocess.Popen(command, **options) as study:
        try:
            while not all((output / f"seed-{seed}" / "metrics.jsonl").exists() for seed in (0, 1)):
                assert study.poll() is None, study.stderr.read()
                time.sleep(0.01)
            if number == signal.SIGINT:
                os.killpg(study.pid, number)  # like Ctrl-C
            else:
                study.send_signal(number)
            _, error = study.communicate(timeout=60)  # returns when all processes that hold its stderr have ended
        finally:
            if study.returncode is None:
                os.killpg(study.pid, signal.SIGKILL)
    assert study.returncode == -number and {path.name for path in output.glob("seed-*")} == {"seed-0", "seed-1"}
    assert number == signal.SIGKILL or f"with --resume to continue in {output}" in error
