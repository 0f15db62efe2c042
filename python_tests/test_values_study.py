"""benchmarks/values_study.py: its budgets by counting the visits of real selections, and the study it plans."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from kcd_ext.condensation import CondensedSampler
from kcd_ext.data.images import assemble

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
if not FOLDER.exists():
    pytest.skip("benchmarks/ exists in the source folder only", allow_module_level=True)


@pytest.fixture
def script(monkeypatch):
    """The script as a module, imported as it is run: its folder comes first in the path."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("values_study")


@pytest.mark.parametrize("epochs", [12, 24, 30])
@pytest.mark.parametrize("budget", [0.875, 0.75, 0.5])
def test_every_arm_visits_the_share_of_the_samples_that_its_budget_says(script, budget, epochs):
    n, generator = 1200, torch.Generator().manual_seed(0)
    difficulty = torch.rand(n, generator=generator) ** 1.5
    for name, condense in script.arms(budget, epochs).items():
        condenser = condense.build(n, seed=1, device="cpu", epochs=epochs)
        sampler, visits = CondensedSampler(condenser), 0
        for _ in range(epochs):
            index = torch.tensor([sample for sample, _ in sampler])
            visits += len(index)
            condenser.update(index, difficulty[index])
            condenser.step()
        tolerance = 0.12 if name == "infobatch" else 0.002  # it depends on the losses how many InfoBatch may leave out
        assert visits / (n * epochs) == pytest.approx(budget, abs=tolerance), name


def test_arms_differ_in_selection_and_value_and_share_their_sizes(script):
    for budget in (0.875, 0.5):
        arms = script.arms(budget, 24)
        assert tuple(arms) == script.ARMS
        assert {name: (arm.selection, arm.value) for name, arm in arms.items()} == {
            "kc-kd": ("value", "entropy"),
            "kc-kd kl": ("value", "kl"),
            "kc-kd loss": ("value", "loss"),
            "random": ("random", "entropy"),
            "importance entropy": ("importance", "entropy"),
            "importance kl": ("importance", "kl"),
            "importance loss": ("importance", "loss"),
            "uniform": ("uniform", "entropy"),
            "infobatch": ("infobatch", "entropy"),
        }
        for names in (("kc-kd", "kc-kd kl", "kc-kd loss", "random"), script.ARMS[4:8]):
            assert len({(arms[name].keep, arms[name].schedule) for name in names}) == 1
    paper = script.arms(0.875, 240)["kc-kd"]
    assert (paper.keep, paper.schedule, paper.interval(240)) == (0.7, "reference", 40)


def data(path):
    random = np.random.default_rng(0)
    parts = [
        (random.integers(0, 256, (size, 6, 6, 1), np.uint8), np.arange(size, dtype=np.int64) % 20) for size in (60, 40)
    ]
    images = assemble("pixels", *parts, 20)
    arrays = [a for part in (images.train, images.test) for a in (part.images, part.labels)]
    np.savez(path, **dict(zip(("x_train", "y_train", "x_test", "y_test"), arrays, strict=True)))
    return images


def test_study_plans_every_arm_at_every_budget_beside_kd_and_the_student_alone(script, tmp_path):
    images = data(tmp_path / "pixels.npz")
    study = script.ValuesStudy(
        data=str(tmp_path / "pixels.npz"),
        seeds=2,
        budget=(75.0, 50.0),
        arms=("kc-kd", "uniform"),
        output=tmp_path / "runs",
    )
    study._check()
    teacher, *runs = study._study(images).runs
    assert (teacher.network, teacher.recipe.method) == ("resnet20", "ce")
    labels = ["kd", "student alone", "kc-kd 75 %", "uniform 75 %", "kc-kd 50 %", "uniform 50 %"]
    assert [(run.recipe.seed, run.recipe.label) for run in runs] == [(seed, name) for seed in (0, 1) for name in labels]
    assert [run.folder.relative_to(tmp_path / "runs").as_posix() for run in runs[:4]] == [
        "kd/seed-0",
        "student-alone/seed-0",
        "kc-kd-75/seed-0",
        "uniform-75/seed-0",
    ]
    assert {run.network for run in runs} == {"resnet8"} and runs[3].recipe.condense.selection == "uniform"


@pytest.mark.slow
def test_study_trains_writes_its_table_and_resumes(script, tmp_path, monkeypatch, capsys):
    data(tmp_path / "pixels.npz")
    options = {"data": str(tmp_path / "pixels.npz"), "seeds": 1, "epochs": 12, "device": "cpu", "side_by_side": 1}
    options |= {"output": tmp_path / "runs", "results": tmp_path / "results", "precision": "float32", "classes": None}
    study = script.ValuesStudy(**options, pair="resnet8-resnet8", budget=(50.0,), arms=("importance kl", "kc-kd loss"))
    for _ in range(2):  # the second call finds all runs finished
        study.run()
        assert "4 of 4 runs are finished" in capsys.readouterr().out
    (table,) = (tmp_path / "results").glob("values_study-*.md")
    rows = [line.split("|")[1].strip() for line in table.read_text().splitlines() if line.startswith("|")]
    assert rows[2:] == ["kd", "student alone", "importance kl 50 %", "kc-kd loss 50 %"]
    assert "(50.2 %)" in table.read_text() or "(50.0 %)" in table.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 20}, "epochs must be a multiple of 6, at least 12, got 20"),
        ({"epochs": 6}, "epochs must be a multiple of 6, at least 12, got 6"),
        ({"arms": ("kc-kd", "kl")}, "arms must be among 'kc-kd', .*, got 'kl'"),
        ({"budget": (75.0, 0.5)}, r"budget must be percentages of the visits in \[40, 99\], got 0.5"),
        ({"budget": ()}, r"budget must be percentages of the visits in \[40, 99\], got \(\)"),
        ({"seeds": 0}, "seeds must be an integer >= 1, got 0"),
    ],
)
def test_invalid_option_is_an_error_before_anything_runs(script, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        script.ValuesStudy(output=tmp_path / "runs", **options).run()
    assert not [*tmp_path.iterdir()]
