"""Lines of progress without a terminal."""

import time

import pytest
from tqdm import tqdm

from kcd_ext.commands import progress


@pytest.mark.parametrize("interval", [0, 60])
def test_progress_without_a_terminal_is_a_line_per_interval(interval, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", interval)
    clock = iter(range(1000, 2000, 35))  # seconds at each look
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with progress.Bar(2, 3) as bar:
        show = bar.start("kd, seed 0")
        show({"step": 4, "loss": 0.5})
        for epoch in (1, 2, 3):
            show({"epoch": epoch, "accuracy": 10.0 * epoch})
        bar.finish()
        bar.start("kd, seed 1")
        bar.finish()  # it was finished already
    lines = ["kd, seed 0: epoch 1 of 3, 10.0 %", "kd, seed 0: epoch 2 of 3, 20.0 %", "kd, seed 0: epoch 3 of 3, 30.0 %"]
    lines += ["1 of 2 runs are finished", "2 of 2 runs are finished"]
    expected = lines if not interval else [lines[1], lines[3]]
    assert capsys.readouterr().err.splitlines() == [f"kcd: {line}" for line in expected]


def test_progress_in_a_terminal_is_a_bar_without_lines(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(progress, "tqdm", lambda **options: tqdm(**options | {"disable": False}))
    with progress.Bar(1, 1) as bar:
        bar.start("kd, seed 0")({"epoch": 1, "accuracy": 97.5})
        bar.finish()
    error = capsys.readouterr().err
    assert "kd, seed 0" in error and "97.5 %" in error and "kcd: " not in error
