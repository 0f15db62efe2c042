"""Runs of a study side by side, in processes of their own, and until a deadline."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest

from kcd_ext import files
from kcd_ext.commands import study
from kcd_ext.commands.study import Run, Study
from kcd_ext.commands.teachers import Teacher
from kcd_ext.data.images import load
from kcd_ext.training import Recipe
from kcd_ext.training.folder import WEIGHTS

pytestmark = pytest.mark.usefixtures("one_thread")


def plan(output, data, side_by_side, epochs=2):
    """A teacher and two students of it."""

    def recipe(method, name, seed):
        return Recipe(method, name=name, seed=seed, epochs=epochs, device="cpu", batch_size=256)

    teacher = Run("cnn_small", recipe("ce", "teacher", 0), output / "teacher")
    taught = {"teacher": Teacher("cnn_small"), "teacher_folder": teacher.folder}
    students = [Run("cnn_small", recipe("kd", "kd", seed), output / f"seed-{seed}", **taught) for seed in (0, 1)]
    more = {"resume": True, "threads": 1, "side_by_side": side_by_side}
    return Study("a test", {}, data, {"spec": "digits"}, [teacher, *students], output, **more)


@pytest.mark.slow
def test_runs_side_by_side_are_those_of_one_after_the_other(tmp_path, capfd):
    data = load("digits")
    plan(tmp_path / "alone", data, 1).checked().run()
    shutil.copytree(tmp_path / "alone" / "teacher", tmp_path / "beside" / "teacher")  # it had one thread there
    plan(tmp_path / "beside", data, 2).checked().run()
    for run in ("seed-0", "seed-1"):
        one, other = ((tmp_path / name / run / WEIGHTS).read_bytes() for name in ("alone", "beside"))
        assert one == other
    shown, again = (text.split("report: ")[0] for text in capfd.readouterr().out.split("method ")[1:])
    assert shown.count("kd") == again.count("kd") == 1
    (tmp_path / "beside" / "seed-1" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"beside/seed-1/config.json is damaged"):
        plan(tmp_path / "beside", data, 2).checked()


def test_after_the_deadline_nothing_is_begun(tmp_path, capfd):
    late = replace(plan(tmp_path / "late", load("digits"), 2), deadline=time.monotonic() - 1)
    late.checked().run()
    assert not any(tmp_path.iterdir()) and capfd.readouterr().out == ""


def test_a_deadline_interrupts_and_ctrl_c_is_raised():
    handler = signal.getsignal(signal.SIGALRM)
    started = time.monotonic()
    study._call_until(started + 0.05, partial(time.sleep, 60))
    study._call_until(started, partial(time.sleep, 60))  # it is over
    assert 0.05 <= time.monotonic() - started < 50
    with pytest.raises(KeyboardInterrupt):
        study._call_until(started + 1000, partial(signal.raise_signal, signal.SIGINT))
    assert signal.getsignal(signal.SIGALRM) is handler and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_finished_study_is_moved_aside_once_and_without_files_of_the_user(tmp_path):
    output, previous = tmp_path / "demo", tmp_path / "demo.previous"
    for folder in (output, previous):
        folder.mkdir()
        (folder / "config.json").write_text('{"command": "a test"}')
        (folder / "report.html").write_text(folder.name)
    (output / "notes.txt").write_text("the user's")
    (previous / files.LOCK).touch()  # of a process that was killed while it moved the folder
    first = replace(plan(output, load("digits"), 1), resume=False, keeps_previous=True)
    second = first.checked()
    first._move_aside()
    second._move_aside()  # which has seen it finished, too
    assert (previous / "report.html").read_text() == "demo"
    assert not (previous / "notes.txt").exists() and [path.name for path in output.iterdir()] == ["notes.txt"]


SIDE_BY_SIDE = """
import sys
from pathlib import Path

from kcd_ext.commands.study import Run, Study
from kcd_ext.data.images import load
from kcd_ext.training import Recipe

if __name__ == "__main__":
    output = Path(sys.argv[1])
    recipes = [Recipe("ce", name="ce", seed=seed, epochs=10_000, device="cpu", batch_size=256) for seed in range(4)]
    runs = [Run("cnn_small", recipe, output / f"seed-{recipe.seed}") for recipe in recipes]
    more = {"resume": True, "threads": 1, "side_by_side": 2}
    Study("a test", {}, load("digits"), {"spec": "digits"}, runs, output, **more).checked().run()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_no_run_goes_on_when_a_study_is_ended_by_a_signal(tmp_path, number):
    script, output = tmp_path / "script.py", tmp_path / "runs"
    script.write_text(SIDE_BY_SIDE)
    command = [sys.executable, script, output]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as study:
        try:
            while not all((output / f"seed-{seed}" / "metrics.jsonl").exists() for seed in (0, 1)):
                assert study.poll() is None, study.stderr.read()
                time.sleep(0.01)
            if number == signal.SIGINT:
                os.killpg(study.pid, number)  # as Ctrl-C does
            else:
                study.send_signal(number)
            _, said = study.communicate(timeout=60)  # which ends when all processes that have its stderr have ended
        finally:
            if study.returncode is None:
                os.killpg(study.pid, signal.SIGKILL)
    assert study.returncode == -number and {path.name for path in output.glob("seed-*")} == {"seed-0", "seed-1"}
    assert number == signal.SIGKILL or f"--resume goes on with what is in {output}" in said
