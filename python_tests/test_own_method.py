"""The guide to custom methods: its files, program and commands do what it says. Custom data, networks and rankings by command."""

import importlib
import json
import math
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import ROOT, blocks, commands
from scipy.special import log_softmax, softmax
from small_runs import NoWait
from test_methods import assert_gradient, float64
from torch import nn
from torch.nn import functional

from kcd_ext import KnowledgeCondenser, cli, files, methods, models
from kcd_ext.data import load
from kcd_ext.methods import Batch
from kcd_ext.training import Condense, Recipe, checkpoint, distill
from kcd_ext.training.batches import split_evenly

PAGE = ROOT / "docs" / "how-to" / "own-method.md"
GUIDE = PAGE.read_text()
PYTHON = [block for block in blocks(PAGE) if block.language == "python"]
FILES = {block.title: block.code for block in PYTHON if block.title}
PROGRAMS = [block.code for block in PYTHON if not block.title]
COMMANDS = [command.removeprefix("kcd ") for block in blocks(PAGE) for command in commands(block)]
DIGITS = 1083  # training images

pytestmark = pytest.mark.usefixtures("one_thread")

BARS = """
import numpy as np
from torch import nn

from kcd_ext.data.images import split


def images():
    generator = np.random.default_rng(0)
    labels = np.arange(400) % 4
    pixels = generator.integers(0, 160, (400, 8, 8, 1), dtype=np.uint8)
    for image, label in zip(pixels, labels):
        image[2 * label : 2 * label + 2] += 90  # a bright bar across the quarter of the label
    return split("bars", pixels, labels, test_fraction=0.25)


def network(*, in_channels, num_classes):
    layers = nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, num_classes)
    )
    layers.stages = ("1",)
    return layers
"""
RANKING = """
from kcd_ext import KnowledgeCondenser


class Middling(KnowledgeCondenser):
    def score(self):
        values = self.values.cpu()
        return -(values - values.median()).abs()
"""
MODULES = {**FILES, "bars.py": BARS, "ranking.py": RANKING}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the guide's files and custom modules."""
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = [Path(name).stem for name in MODULES]
    for name in names:
        assert name not in sys.modules
    yield tmp_path
    for name in names:
        sys.modules.pop(name, None)


def words_of(line, **changes):
    """Split a command into words, with other values for some of its options."""
    words = shlex.split(line)
    for option, value in changes.items():
        words[words.index(f"--{option}") + 1] = str(value)
    return words


def decoupled(z, y, label, target_weight, other_weight, temperature=4.0):
    """Return the guide's formula, row by row and class by class."""
    target = other = 0.0
    for own, of_teacher, t in zip(z, y, label, strict=True):
        q, p = softmax(own / temperature), softmax(of_teacher / temperature)
        target += p[t] * np.log(p[t] / q[t]) + (1 - p[t]) * np.log((1 - p[t]) / (1 - q[t]))
        for c in range(len(p)):
            if c != t:
                ours, theirs = q[c] / (1 - q[t]), p[c] / (1 - p[t])
                other += theirs * np.log(theirs / ours)
    parts = (target_weight * target + other_weight * other) / len(z)
    return target / len(z), other / len(z), temperature**2 * parts


def test_guide_has_the_tested_blocks():
    assert [*FILES] == ["mine.py", "aligned.py"] and len(PROGRAMS) == 1 and len(COMMANDS) == 3
    for name in ("prepare", "teacher_of", "pretraining", "lr_factor", "begin", "release"):
        assert f"`{name}(" in GUIDE and hasattr(methods.Method, name)


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_decoupled_loss_matches_formula(folder, keep):
    rng = np.random.default_rng(0)
    z, y = (3 * rng.standard_normal((13, 5)) for _ in range(2))
    label, index = np.arange(13) * 3 % 5, torch.arange(13)
    student, teacher = (nn.Embedding.from_pretrained(torch.tensor(x).float(), freeze=False) for x in (z, y))
    options = {"target_weight": 0.5, "other_weight": 2.0, "batch_keep": keep}
    method = methods.build("mine:Decoupled", options)
    with NoWait():
        outcome = method(student, teacher, Batch(index, torch.tensor(label), index))

    def entropies(z):
        return -(softmax(z, 1) * log_softmax(z, 1)).sum(1)

    rows = sorted(np.argsort(-entropies(z), kind="stable")[: int(13 * keep)])

    def loss(z, ramp=1.0):
        ce = -log_softmax(z, 1)[range(13), label].mean()
        return ce + ramp * decoupled(z[rows], y[rows], label[rows], 0.5, 2.0)[2]

    target, other, _ = decoupled(z[rows], y[rows], label[rows], 0.5, 2.0)
    assert outcome.loss.item() == pytest.approx(loss(z), rel=1e-5)
    assert [outcome.terms[name].item() for name in ("target", "other")] == pytest.approx([target, other], rel=1e-4)
    np.testing.assert_allclose(float64(outcome.value), entropies(z), rtol=1e-4)
    outcome.loss.backward()
    assert_gradient(loss, z, float64(student.weight.grad), rng)
    for epoch, ramp in ((0, 0.4), (1, 0.8), (2, 1.0), (9, 1.0)):
        method.begin(epoch, 10)
        found = method(student, teacher, Batch(index, torch.tensor(label), index)).loss.item()
        assert found == pytest.approx(loss(z, ramp), rel=1e-5)


def test_kl_is_tckd_plus_weighted_nckd(folder):
    mine = importlib.import_module("mine")
    z, y = torch.randn(2, 1, 7, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([4])
    tckd, nckd = map(mine.divergence, mine.decoupled(z, label, 2.0), mine.decoupled(y, label, 2.0))
    kl = functional.kl_div((z / 2).log_softmax(1), (y / 2).softmax(1), reduction="batchmean")
    torch.testing.assert_close(tckd + (1 - (y / 2).softmax(1)[0, 4]) * nckd, kl)


def test_program_reports_visits_and_terms(folder, capsys):
    exec(PROGRAMS[0], {})
    accuracy, sample_visits, teacher_visits = map(float, capsys.readouterr().out.split())
    sizes = [DIGITS - 54 * stage for stage in range(6)]  # one epoch per stage
    assert accuracy > 60 and sample_visits == sum(sizes)
    batches = [part.stop - part.start for size in sizes for part in split_evenly(size, 64)]
    assert teacher_visits == sum(size // 2 for size in batches)
    lines = files.read_lines(folder / "runs" / "decoupled" / "metrics.jsonl")
    assert all(line["terms"].keys() == {"target", "other"} for line in lines)
    assert lines[-1]["terms"]["other"] < lines[0]["terms"]["other"]


def run(line, **changes):
    """Run a command and return its run folder and its result."""
    assert cli.main(words_of(line, **changes)) == 0
    output = Path(words_of(line)[-1])
    (result,) = json.loads((output / "summary.json").read_text())["results"]
    return output, result


def test_command_trains_custom_method_condensed(folder, capsys):
    output, result = run(COMMANDS[0], epochs=6)
    assert result["sample_visits"] == result["teacher_visits"] == sum(DIGITS - 54 * stage for stage in range(6))
    config = json.loads((output / "config.json").read_text())
    assert config["recipe"]["method"] == "mine:Decoupled" and config["recipe"]["options"] == {"other_weight": 2}
    assert "kc-mine:Decoupled" in capsys.readouterr().out and (output / "report.html").is_file()


@pytest.mark.slow
def test_command_pretrains_part_and_uses_method_schedule(folder):
    output, result = run(COMMANDS[1], epochs=4)
    first, lines = (files.read_lines(output / name) for name in ("pretraining.jsonl", "metrics.jsonl"))
    assert len(first) == 3 and first[-1]["loss"] < first[0]["loss"]
    rates = [0.05 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert [line["lr"] for line in lines] == pytest.approx(rates)
    assert (result["sample_visits"], result["teacher_visits"]) == (4 * DIGITS, (3 + 4) * DIGITS)


def test_adapted_teacher_is_corrected_and_original_unchanged(folder):
    """The fit corrects a teacher with one biased class. A resumed run ends in the same bytes."""
    data, weights = load("digits"), []
    torch.manual_seed(0)
    teacher = models.build("cnn_large", in_channels=1, num_classes=10)
    distill(teacher, None, data.train, data.test, Recipe("ce", epochs=3))
    with torch.no_grad():
        teacher[-1].bias[3] += 8
    before = [parameter.clone() for parameter in teacher.parameters()]
    recipe = Recipe("mine:Adapted", {"fit_lr": 0.5, "other_weight": 1.0}, Condense(keep=0.7, stages=2), epochs=3)

    def stop(line):
        if line.get("epoch") == 2:
            raise InterruptedError

    for name, progress in (("straight", None), ("stopped", stop), ("stopped", None)):
        torch.manual_seed(1)
        student = models.build("cnn_small", in_channels=1, num_classes=10)
        try:
            distill(student, teacher, data.train, data.test, recipe, output=name, resume=True, progress=progress)
        except InterruptedError:
            continue
        weights.append((folder / name / "student.safetensors").read_bytes())
    assert weights[0] == weights[1]
    fitted = checkpoint.load(folder / "straight" / "checkpoint").model
    assert fitted["method.fit.offset"][3] < -2 and not any("teacher" in name for name in fitted)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    first = files.read_lines(folder / "straight" / "pretraining.jsonl")
    assert first[-1]["loss"] < 0.5 * first[0]["loss"] and first[-1]["teacher_visits"] == 2 * DIGITS


@pytest.mark.slow
def test_registry_line_gives_short_name(folder, monkeypatch):
    (name, target), *more = re.findall(r'`"(\w+)": "kcd_ext\.methods\.(\w+:\w+)"`', GUIDE)
    assert not more
    # The guide's line, except that the file is not in the package.
    monkeypatch.setitem(methods.REGISTRY, name, target)
    assert type(methods.build(name, {"other_weight": 3})).__name__ == "Decoupled"
    with pytest.raises(TypeError, match="method 'decoupled' has no option 'alpha'; it takes temperature, target_w"):
        methods.build(name, {"alpha": 1})
    output, _ = run(COMMANDS[0].replace("mine:Decoupled", name), epochs=2)
    assert json.loads((output / "config.json").read_text())["recipe"]["method"] == name


@pytest.mark.slow
def test_command_takes_custom_data_and_networks(folder, capsys):
    data = load("bars:images")
    assert (len(data.train), len(data.test), data.num_classes) == (300, 100, 4)
    networks = "--teacher bars:network --student bars:network"
    output, result = run(f"distill --data bars:images {networks} --method kr --epochs 8 --output runs/bars")
    assert result["accuracy_last"] > 90 and result["sample_visits"] == 8 * 300
    assert "kr" in capsys.readouterr().out
    assert all(line["terms"].keys() == {"kr"} for line in files.read_lines(output / "metrics.jsonl"))


@pytest.mark.slow
def test_command_takes_custom_ranking(folder):
    ranking = importlib.import_module("ranking").Middling(5, keep=0.5, every=1, stages=1)
    assert isinstance(ranking, KnowledgeCondenser)
    ranking.update(torch.arange(5), torch.tensor([0.9, 0.1, 0.5, 0.2, 0.65]))
    ranking.step()
    assert ranking.ranking().tolist() == [2, 4, 3, 0, 1]  # by the distance from 0.5: 0, 0.15, 0.3, 0.4 and 0.4
    selection = "--condense.keep 0.7 --condense.selection ranking:Middling"
    output, result = run(f"distill --data digits --method kd {selection} --epochs 6 --output runs/middling")
    assert result["sample_visits"] == sum(DIGITS - 54 * stage for stage in range(6))
    config = json.loads((output / "config.json").read_text())
    assert config["recipe"]["condense"]["selection"] == "ranking:Middling"


def test_aligned_features_get_closer(folder):
    data = load("digits")
    torch.manual_seed(0)
    teacher, student = (models.build("cnn_small", in_channels=1, num_classes=10) for _ in range(2))
    distill(teacher, None, data.train, data.test, Recipe("ce", epochs=2))
    summary = distill(student, teacher, data.train, data.test, Recipe("aligned:Aligned", epochs=3))
    gaps = [line["terms"]["gap"] for line in summary.history]
    assert gaps[-1] < 0.7 * gaps[0]
