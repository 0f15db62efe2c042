"""The guide to methods, data, networks and rankings of one's own: every block runs as it stands there, for fewer epochs."""

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

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
FILES = {block.split("\n", 1)[0].removeprefix("# "): block for block in BLOCKS if re.match(r"# \w+\.py\n", block)}
PROGRAMS = [block for block in BLOCKS if block not in FILES.values()]
COMMANDS = re.findall(r"^kcd (.*)$", GUIDE, re.M)
DIGITS = 1083  # training images


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the guide's files in it, in which one works."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = [Path(name).stem for name in FILES]
    for name in names:
        assert name not in sys.modules
    yield tmp_path
    for name in names:
        sys.modules.pop(name, None)


def said(line, **changes):
    """A command of the guide in words, with other values for some of its options."""
    words = shlex.split(line)
    for option, value in changes.items():
        words[words.index(f"--{option}") + 1] = str(value)
    return words


def decoupled(z, y, label, target_weight, other_weight, temperature=4.0):
    """The formula of the guide, row by row and class by class."""
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


def test_the_guide_has_the_parts_that_are_tested_here():
    assert [*FILES] == ["mine.py", "bars.py", "ranking.py"] and len(PROGRAMS) == 1 and len(COMMANDS) == 4
    assert len(re.findall(r"^```", GUIDE, re.M)) == 2 * (len(BLOCKS) + 3)  # the commands are in three blocks
    for name in re.findall(r"`((?:kcd_ext|python_tests)/[\w/]+(?:\.py)?)/?`", GUIDE):
        assert (ROOT / name).exists(), name
    for name in ("prepare", "teacher_of", "pretraining", "lr_factor", "begin", "release"):
        assert f"`{name}(" in GUIDE and hasattr(methods.Method, name)


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_the_loss_is_the_formula(folder, keep):
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


def test_the_two_parts_are_those_of_the_divergence(folder):
    """KL = TCKD + (1 - p_t) NCKD for one row, as the guide says."""
    mine = importlib.import_module("mine")
    z, y = torch.randn(2, 1, 7, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([4])
    tckd, nckd = map(mine.divergence, mine.decoupled(z, label, 2.0), mine.decoupled(y, label, 2.0))
    kl = functional.kl_div((z / 2).log_softmax(1), (y / 2).softmax(1), reduction="batchmean")
    torch.testing.assert_close(tckd + (1 - (y / 2).softmax(1)[0, 4]) * nckd, kl)


def test_the_program(folder, capsys):
    exec(PROGRAMS[0].replace("epochs=12", "epochs=4").replace("epochs=24", "epochs=6"), {})
    accuracy, visits, asked = map(float, capsys.readouterr().out.split())
    sizes = [DIGITS - 54 * stage for stage in range(6)]  # a stage of one epoch each
    assert accuracy > 60 and visits == sum(sizes)
    batches = [part.stop - part.start for size in sizes for part in split_evenly(size, 64)]
    assert asked == sum(size // 2 for size in batches)
    lines = files.read_lines(folder / "runs" / "decoupled" / "metrics.jsonl")
    assert all(line["terms"].keys() == {"target", "other"} for line in lines)
    assert lines[-1]["terms"]["other"] < lines[0]["terms"]["other"]


def run(line, **changes):
    """Executes a command: the folder that it leaves, and its result."""
    assert cli.main(said(line, **changes)) == 0
    output = Path(said(line)[-1])
    (result,) = json.loads((output / "summary.json").read_text())["results"]
    return output, result


def test_the_command_with_a_method_of_ones_own(folder, capsys):
    output, result = run(COMMANDS[0], epochs=6)
    assert result["sample_visits"] == result["teacher_visits"] == sum(DIGITS - 54 * stage for stage in range(6))
    config = json.loads((output / "config.json").read_text())
    assert config["recipe"]["method"] == "mine:Decoupled" and config["recipe"]["options"] == {"other_weight": 2}
    assert "kc-mine:Decoupled" in capsys.readouterr().out and (output / "report.html").is_file()


@pytest.mark.slow
def test_the_command_with_a_part_that_is_trained_first(folder):
    output, result = run(COMMANDS[1], epochs=4)
    first, lines = (files.read_lines(output / name) for name in ("pretraining.jsonl", "metrics.jsonl"))
    assert len(first) == 3 and first[-1]["loss"] < first[0]["loss"]
    rates = [0.05 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert [line["lr"] for line in lines] == pytest.approx(rates)
    assert (result["sample_visits"], result["teacher_visits"]) == (4 * DIGITS, (3 + 4) * DIGITS)


def test_a_teacher_is_fitted_and_left_alone(folder):
    """A teacher whose classes are offset is set right; the student learns from what is, and a run goes on to the same."""
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

    for name, progress in (("whole", None), ("torn", stop), ("torn", None)):
        torch.manual_seed(1)
        student = models.build("cnn_small", in_channels=1, num_classes=10)
        try:
            distill(student, teacher, data.train, data.test, recipe, output=name, resume=True, progress=progress)
        except InterruptedError:
            continue
        weights.append((folder / name / "student.safetensors").read_bytes())
    assert weights[0] == weights[1]
    fitted = checkpoint.load(folder / "whole" / "checkpoint").model
    assert fitted["method.fit.offset"][3] < -2 and not any("teacher" in name for name in fitted)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    first = files.read_lines(folder / "whole" / "pretraining.jsonl")
    assert first[-1]["loss"] < 0.5 * first[0]["loss"] and first[-1]["teacher_visits"] == 2 * DIGITS


@pytest.mark.slow
def test_a_line_in_the_registry_is_all_that_is_needed(folder, monkeypatch):
    (name, target), *more = re.findall(r'`"(\w+)": "kcd_ext\.methods\.(\w+:\w+)"`', GUIDE)
    assert not more
    # The line as it would stand there, but for the folder that the file lies in.
    monkeypatch.setitem(methods.REGISTRY, name, target)
    assert type(methods.build(name, {"other_weight": 3})).__name__ == "Decoupled"
    with pytest.raises(TypeError, match="method 'decoupled' has no option 'alpha'; it takes temperature, target_w"):
        methods.build(name, {"alpha": 1})
    output, _ = run(COMMANDS[0].replace("mine:Decoupled", name), epochs=2)
    assert json.loads((output / "config.json").read_text())["recipe"]["method"] == name


@pytest.mark.slow
def test_the_command_with_data_and_networks_of_ones_own(folder, capsys):
    data = load("bars:images")
    assert (len(data.train), len(data.test), data.num_classes) == (300, 100, 4)
    output, result = run(COMMANDS[2])
    assert result["accuracy_last"] > 90 and result["sample_visits"] == 8 * 300
    assert "kr" in capsys.readouterr().out
    assert all(line["terms"].keys() == {"kr"} for line in files.read_lines(output / "metrics.jsonl"))


@pytest.mark.slow
def test_the_command_with_a_ranking_of_ones_own(folder):
    ranking = importlib.import_module("ranking").Middling(5, keep=0.5, every=1, stages=1)
    assert isinstance(ranking, KnowledgeCondenser)
    ranking.update(torch.arange(5), torch.tensor([0.9, 0.1, 0.5, 0.2, 0.65]))
    ranking.step()
    assert ranking.ranking().tolist() == [2, 4, 3, 0, 1]  # by the distance from 0.5: 0, 0.15, 0.3, 0.4 and 0.4
    output, result = run(COMMANDS[3], epochs=6)
    assert result["sample_visits"] == sum(DIGITS - 54 * stage for stage in range(6))
    config = json.loads((output / "config.json").read_text())
    assert config["recipe"]["condense"]["selection"] == "ranking:Middling"
