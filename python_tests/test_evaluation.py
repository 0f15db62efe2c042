"""Every metric against loops in NumPy, and `kcd evaluate` on real runs."""

import contextlib
import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
import torch
from commands import Page, contents
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from small_runs import comparison, mostly_slow
from torch import nn

from kcd_ext import cli, models
from kcd_ext import evaluation as metrics
from kcd_ext.data.images import load
from kcd_ext.evaluation import Evaluation, LinearCKA, evaluate
from kcd_ext.methods import Batch
from kcd_ext.reports import figures, tables
from kcd_ext.reports.page import render
from kcd_ext.training import Summary
from kcd_ext.training.summary import ComparedWith

SMALL = ["--data", "digits", "--epochs", "2", "--threads", "1", "--device", "cpu"]


pytestmark = pytest.mark.usefixtures("one_thread")


# --- metrics -----------------------------------------------------------------------------------


def softmax(row, temperature=1.0):
    shifted = np.exp((np.asarray(row, float) - np.max(row)) / temperature)
    return shifted / shifted.sum()


def loop_kl(student, teacher, temperature):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, s = softmax(t, temperature), (s - np.max(s)) / temperature
        log_q = s - np.log(np.exp(s).sum())
        log_p = (t - np.max(t)) / temperature - np.log(np.exp((t - np.max(t)) / temperature).sum())
        total += sum(p[c] * (log_p[c] - log_q[c]) for c in range(len(p)) if p[c] > 0)
    return total / len(student)


def loop_ece(logits, labels, bins=15):
    members = [[] for _ in range(bins)]
    for row, label in zip(logits, labels, strict=True):
        p = softmax(row)
        place = next(m for m in range(bins) if m / bins < p.max() <= (m + 1) / bins or m == bins - 1)
        members[place].append((p.max(), float(np.argmax(row) == label)))
    ece = sum(abs(sum(c for c, _ in group) - sum(r for _, r in group)) for group in members) / len(labels)
    means = [tuple(100 * np.mean(group, axis=0)) if group else (np.nan, np.nan) for group in members]
    return 100 * ece, [len(group) for group in members], means


def loop_log_odds(row, c):
    others = np.delete(np.asarray(row, float), c)
    return row[c] - others.max() - np.log(np.exp(others - others.max()).sum())


def gram_cka(x, y):
    """Return CKA from Gram matrices: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))."""
    centre = np.eye(len(x)) - 1 / len(x)
    k, m = (centre @ (f @ f.T) @ centre for f in (np.asarray(x, float), np.asarray(y, float)))
    return (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())


def random_case(n=37, classes=5, seed=0, scale=3.0):
    """Return logits of student and teacher, and labels without the last class."""
    draw = np.random.default_rng(seed)
    teacher = draw.normal(size=(n, classes)) * scale
    student = teacher + draw.normal(size=(n, classes))
    return student, teacher, draw.integers(0, classes - 1, n)


CASES = {
    "odd": random_case(),
    "even": random_case(n=12),
    "one sample": random_case(n=1, classes=3),
    "two classes": random_case(n=9, classes=2),
    "large": random_case(n=11, classes=7, scale=1e4),
    "ties": tuple(np.round(part) if part.ndim == 2 else part for part in random_case(n=41, classes=4, scale=1.0)),
}


def tensors(case):
    student, teacher, labels = case
    return torch.tensor(student), torch.tensor(teacher), torch.tensor(labels)


@pytest.mark.parametrize("name", CASES)
def test_metrics_match_loops_over_samples(name):
    (student, teacher, labels), (s, t, y) = CASES[name], tensors(CASES[name])
    n = len(labels)
    tops = [[int(np.argmax(row)) for row in x] for x in (student, teacher)]
    assert metrics.agreement(s, t) == pytest.approx(100 * sum(a == b for a, b in zip(*tops, strict=True)) / n)
    for logits, tensor, top in ((student, s, tops[0]), (teacher, t, tops[1])):
        assert metrics.accuracy(tensor, y) == pytest.approx(
            100 * np.mean([a == b for a, b in zip(top, labels, strict=True)])
        )
        ece, bins = metrics.calibration(tensor, y)
        expected, counts, means = loop_ece(logits, labels)
        assert ece == pytest.approx(expected, abs=1e-9) and [one.count for one in bins] == counts
        np.testing.assert_allclose([(one.confidence, one.accuracy) for one in bins], means, rtol=1e-12)
        np.testing.assert_allclose([one.high for one in bins], [100 * (m + 1) / 15 for m in range(15)])
        for temperature in (1.0, 4.0, 0.3):
            found = metrics.quality(tensor, y, temperature)
            rows = [softmax(row, temperature) for row in logits]
            brier = [
                sum((p[c] - (c == label)) ** 2 for c in range(len(p))) for p, label in zip(rows, labels, strict=True)
            ]
            nll = [
                np.log(np.exp((row - row.max()) / temperature).sum()) - (row[label] - row.max()) / temperature
                for row, label in zip(logits, labels, strict=True)
            ]
            assert (found.temperature, found.brier) == (temperature, pytest.approx(np.mean(brier), abs=1e-12))
            assert found.nll == pytest.approx(np.mean(nll))
    for temperature in (1.0, 4.0):
        assert metrics.divergence(s, t, temperature) == pytest.approx(loop_kl(student, teacher, temperature))
    for one in metrics.class_accuracies(s, t, y):
        of_class = [i for i in range(n) if labels[i] == one.label]
        rates = [100 * np.mean([top[i] == one.label for i in of_class]) if of_class else np.nan for top in tops]
        np.testing.assert_allclose((one.student, one.teacher), rates)
        assert (one.count, one.name) == (len(of_class), f"class {one.label}")


@pytest.mark.parametrize("name", CASES)
def test_exaggeration_matches_loop_over_samples(name):
    (student, teacher, _), (s, t, _) = CASES[name], tensors(CASES[name])
    pairs = [
        (loop_log_odds(b, c), loop_log_odds(a, c))
        for a, b, c in ((a, b, int(np.argmax(b))) for a, b in zip(student, teacher, strict=True))
    ]
    x, y = np.array(pairs).T
    found = metrics.exaggeration(s, t)
    np.testing.assert_allclose(found.points, pairs, rtol=1e-12, atol=1e-12)
    assert found.count == len(x) and found.median == pytest.approx(np.median(x))
    slope, intercept = np.polyfit(x, y, 1) if len(x) > 1 else (np.nan, np.nan)
    np.testing.assert_allclose((found.slope, found.intercept), (slope, intercept), rtol=1e-7)
    for part, half in ((found.below, x < np.median(x)), (found.above, x > np.median(x))):
        np.testing.assert_allclose(part, (y - x)[half].mean() if half.any() else np.nan, rtol=1e-9)


def test_ruled_out_classes_do_not_count():
    """Both networks rule out the last class. Then the student also rules out the first one, and the KL is infinite."""
    student, teacher, labels = random_case(n=23)
    student[:, -1] = teacher[:, -1] = -np.inf
    s, t, y = tensors((student, teacher, labels))
    inner = slice(0, -1)
    assert metrics.divergence(s, t, 4.0) == pytest.approx(loop_kl(student[:, inner], teacher[:, inner], 4.0))
    assert metrics.quality(s, y).brier == pytest.approx(metrics.quality(s[:, inner], y).brier)
    assert metrics.exaggeration(s, t) == metrics.exaggeration(s[:, inner], t[:, inner])
    student[3, 0] = -np.inf
    assert metrics.divergence(torch.tensor(student), t) == np.inf
    assert metrics.quality(torch.tensor(student), torch.zeros_like(y)).nll == np.inf
    single = torch.full((2, 3), -np.inf).index_fill(1, torch.tensor([1]), 5.0)  # only one class is possible
    assert metrics.log_odds(single, torch.tensor([1, 0])).tolist() == [np.inf, -np.inf]
    assert metrics.exaggeration(single, single).count == 0 and np.isnan(metrics.exaggeration(single, single).slope)


def test_log_odds_are_exact_when_probability_rounds_to_one():
    """For logits (a, b) the log-odds are a - b, even if 1 - p underflows in float64."""
    logits = torch.tensor([[800.0, -700.0], [0.0, 1e4], [-1e30, 1e30]])
    assert metrics.log_odds(logits, torch.tensor([0, 0, 1])).tolist() == [1500.0, -1e4, float(torch.tensor(1e30)) * 2]


def test_slope_is_nan_for_constant_teacher_confidence():
    teacher = torch.tensor([[0.1, 0.7, 0.3]]).repeat(11, 1)  # enough samples that their mean is rounded
    found = metrics.exaggeration(torch.randn(11, 3), teacher)
    assert found.count == 11 and np.isnan([found.slope, found.intercept, found.below, found.above]).all()


def test_smallest_temperature_keeps_only_top_class():
    student, teacher, labels = tensors(CASES["odd"])
    wrong = (student.argmax(1) != labels).double().mean().item()
    found = metrics.quality(student, labels, 5e-324)
    assert 0 < wrong < 1 and (found.nll, found.brier) == (np.inf, pytest.approx(2 * wrong))
    assert metrics.divergence(teacher, teacher, 5e-324) == 0


def test_confidence_on_bin_edge_counts_in_lower_bin():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0], [-np.inf, 0.0, -np.inf, -np.inf, -np.inf]])  # 3/15 and 15/15
    _, bins = metrics.calibration(logits, torch.tensor([0, 0]))
    assert [i for i, one in enumerate(bins) if one.count] == [2, 14]


# --- CKA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_linear_cka_of_batches_matches_gram_matrices(offset):
    draw = np.random.default_rng(1)
    x = draw.normal(size=(29, 3)) + offset
    y = x[:, :2] @ draw.normal(size=(2, 7)) + draw.normal(size=(29, 7))
    similarity = LinearCKA()
    for part in (slice(0, 1), slice(1, 12), slice(12, 12), slice(12, 29)):
        similarity.update(torch.tensor(x[part]), torch.tensor(y[part]))
    assert similarity.value() == pytest.approx(gram_cka(x - x.mean(0), y - y.mean(0)), rel=1e-8)
    scaled = LinearCKA()
    scaled.update(torch.tensor(x), torch.tensor(3 * x[:, ::-1].copy() - 8))  # a permutation, a scale and a shift
    assert scaled.value() == pytest.approx(1, abs=1e-9)


def test_cka_is_nan_for_constant_features():
    x = torch.full((7, 2), 0.1, dtype=torch.float64)
    for one, other in ((x, torch.randn(7, 3)), (torch.randn(7, 3), x), (x, x), (torch.randn(1, 2), torch.randn(1, 2))):
        similarity = LinearCKA()
        similarity.update(one, other)
        assert np.isnan(similarity.value())
    assert np.isnan(LinearCKA().value())
    with pytest.raises(ValueError, match=r"got \(7, 2\) and \(6, 3\)"):
        LinearCKA().update(x, torch.randn(6, 3))


# --- evaluate ---------------------------------------------------------------------------------------------------------


def network(widths, stages=None, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, widths[0], 3, padding=1), nn.ReLU(), nn.Conv2d(widths[0], widths[1], 3), nn.ReLU()]
    made = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.5), nn.Linear(widths[1] * 4, 3))
    if stages is not None:
        made.stages = stages
    return made


def batches(sizes=(4, 1, 8), seed=3):
    torch.manual_seed(seed)
    return [(torch.randn(size, 1, 4, 4), torch.arange(size) % 2) for size in sizes]


def outputs(made, x):
    """Return the output of each layer for x; the last is the logits."""
    with torch.no_grad():
        seen = [x]
        for layer in made.eval():
            seen.append(layer(seen[-1]))
    return seen[1:]


def test_evaluate_matches_outputs_of_networks():
    student, teacher = network((3, 5), stages=("3",)), network((4, 6), stages=("1", "3"), seed=1)
    student[5].train(), teacher.eval()
    modes = [module.training for module in (*student.modules(), *teacher.modules())]
    data = batches()
    found = evaluate(
        student, teacher, [Batch(x, y, torch.arange(len(y))) for x, y in data], class_names=("a", "b", "c")
    )
    assert [module.training for module in (*student.modules(), *teacher.modules())] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for n in (student, teacher) for m in n.modules())
    x = torch.cat([x for x, _ in data])
    a, b = outputs(student, x), outputs(teacher, x)
    assert found.samples == 13 and [(one.student, one.teacher) for one in found.layers] == [
        ("3", "3"),
        ("penultimate", "penultimate"),
        ("logits", "logits"),
    ]
    expected = [gram_cka(a[3].mean((2, 3)), b[3].mean((2, 3))), gram_cka(a[5], b[5]), gram_cka(a[6], b[6])]
    np.testing.assert_allclose([one.cka for one in found.layers], expected, rtol=1e-5)
    assert found.agreement == 100 * (a[6].argmax(1) == b[6].argmax(1)).double().mean()
    kls = [loop_kl(a[6].double().numpy(), b[6].double().numpy(), t) for t in (1.0, 4.0)]
    np.testing.assert_allclose([one.kl for one in found.divergence], kls, rtol=1e-5)
    assert [(one.name, one.count) for one in found.classes] == [("a", 7), ("b", 6), ("c", 0)]
    assert np.isnan(found.classes[2].lost) and found.worst_class_change == min(-one.lost for one in found.classes[:2])
    assert found.worst_class_accuracy[1] == min(one.teacher for one in found.classes[:2])

    other = evaluate(student, teacher, data, layers=[("1", "0"), ("6", "6")], temperatures=[2])
    pairs = [gram_cka(a[1].mean((2, 3)), b[0].mean((2, 3))), gram_cka(a[6], b[6])]
    np.testing.assert_allclose([one.cka for one in other.layers], pairs, rtol=1e-5)
    assert [one.temperature for one in other.divergence] == [2.0]


def test_named_layers_are_compared():
    student, teacher = network((3, 5), stages=("3",)), network((4, 6), stages=("3",), seed=1)
    pairs = [("penultimate", "penultimate"), ("logits", "logits"), ("logits", "3")]
    found = evaluate(student, teacher, batches(), layers=pairs).layers
    assert [(one.student, one.teacher) for one in found] == pairs
    usual = evaluate(student, teacher, batches()).layers
    assert [one.cka for one in found[:2]] == [one.cka for one in usual[1:]]
    x = torch.cat([x for x, _ in batches()])
    a, b = outputs(student, x)[6], outputs(teacher, x)[3].mean((2, 3))
    assert found[2].cka == pytest.approx(gram_cka(a, b), rel=1e-5)
    student.add_module("penultimate", nn.Identity())  # a path of that name wins
    first = evaluate(student, teacher, batches(), layers=[("penultimate", "logits")]).layers[0].cka
    assert first == pytest.approx(gram_cka(a, outputs(teacher, x)[6]), rel=1e-5)


class Pooling(nn.Module):
    """A classifier of the mean of its last stage. With `parts` the classifier's input differs from it for some samples."""

    stages = ("conv",)

    def __init__(self, width, parts, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.linear, self.parts = nn.Conv2d(1, width, 3), nn.Linear(width, 3), parts

    def forward(self, x):
        pooled = self.conv(x).mean((3, 2))  # another order of summation
        return self.linear(pooled + self.parts * (x.mean((1, 2, 3), keepdim=True)[:, :, 0, 0] > 0.5))


@pytest.mark.parametrize(("parts", "summed"), [(0, 6), (1, 8)])
def test_equal_features_are_summed_once(parts, summed, monkeypatch):
    """Three batches of two pairs; with parts=1 also the third pair, which differs from the second batch on."""
    calls, real = [], LinearCKA.update
    monkeypatch.setattr(LinearCKA, "update", lambda self, x, y: calls.append(self) or real(self, x, y))
    student, teacher = Pooling(4, parts, 0), Pooling(6, 0, 1)
    data = batches()
    x = torch.cat([x - x.mean((1, 2, 3), keepdim=True) + i * torch.ones(1) for i, (x, _) in enumerate(data)])
    data = list(zip(x.split([4, 1, 8]), (y for _, y in data), strict=True))
    found = evaluate(student, teacher, data).layers
    with torch.no_grad():
        stage = student.conv(x).mean((2, 3)), teacher.conv(x).mean((2, 3))
    shifted = stage[0] + parts * (torch.arange(3).repeat_interleave(torch.tensor([4, 1, 8])) > 0)[:, None]
    assert [one.student for one in found] == ["conv", "penultimate", "logits"] and len(calls) == summed
    assert found[0].cka == pytest.approx(gram_cka(*stage), rel=1e-5)
    assert found[1].cka == pytest.approx(gram_cka(shifted, stage[1]), rel=1e-5)


@pytest.mark.parametrize("block", [1, 2, 5])
def test_cka_is_the_same_for_any_block_size(block, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK_SIZE", block)
    test_linear_cka_of_batches_matches_gram_matrices(3.0)


def test_student_exaggerates_if_more_confident_above_and_less_below():
    teacher = torch.tensor([[x, 0.0] for x in (1.0, 2.0, 3.0, 4.0)])
    steep = metrics.exaggeration(2 * teacher - torch.tensor([2.5, 0.0]), teacher)
    less_sure = metrics.exaggeration(1.1 * teacher - torch.tensor([5.0, 0.0]), teacher)
    assert (steep.slope, steep.exaggerates) == (pytest.approx(2), True)
    assert (less_sure.slope, less_sure.exaggerates) == (pytest.approx(1.1), False) and less_sure.above < 0


def test_student_equal_to_teacher_has_perfect_scores():
    made = network((3, 5), stages=("1", "3"))
    for stay in (made, network((3, 5), stages=("1", "3"))):
        found = evaluate(made, stay, batches())
        assert (found.agreement, found.worst_class_change, found.lost_most) == (100, 0, ())
        assert [one.kl for one in found.divergence] == [0, 0]
        assert found.exaggeration.slope == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose([one.cka for one in found.layers], 1, atol=1e-12)
        assert str(found.student) == str(found.teacher)  # including NaN


def test_lost_most_is_sorted_and_limited():
    student, teacher, labels = (torch.tensor(x) for x in random_case(n=4001, classes=16, scale=1.0))
    found = metrics.class_accuracies(student, teacher, labels)
    full = evaluate(nn.Identity(), Fixed(teacher), [(student, labels)])
    losses = sorted((one.lost for one in found if one.lost > 0), reverse=True)
    assert [one.lost for one in full.lost_most] == losses[:10] and full.worst_class_change < 0
    assert len(full.exaggeration.points) == 300 and full.layers[-1].student == "logits"


class Fixed(nn.Module):
    def __init__(self, given):
        super().__init__()
        self.given = given

    def forward(self, x):
        return self.given


def test_json_round_trip_and_damaged_json_is_refused():
    student, teacher, labels = random_case(n=23)
    student[0, 0] = -np.inf
    found = evaluate(nn.Identity(), Fixed(torch.tensor(teacher)), [tensors((student, labels, labels))[:2]])
    text = json.dumps(found.as_json(), allow_nan=False)
    content = json.loads(text)
    assert content["divergence"][0]["kl"] is None and content["classes"][-1]["student"] is None
    assert content["worst_class_change"] == found.worst_class_change
    again = Evaluation.from_json(content)
    assert again.as_json() == content and again.exaggeration.points == found.exaggeration.points
    for change, message in (
        ({"samples": -1}, "must be an integer >= 0, got -1"),
        ({"samples": None}, "must be an integer >= 0, got NoneType None"),
        ({"agreement": True}, "must be finite or null, got bool True"),
        ({"agreement": 10**400}, "must be finite or null"),
        ({"agreement": 2e100}, "must be finite or null, got 2e\\+100"),
        ({"layers": 3}, "expected a list, got int 3"),
        ({"layers": [{"student": "\ud800"}]}, "expected text"),
        ({"layers": [{"student": "a", "teacher": "b"}]}, "cka"),
        ({"layers": ["ab"]}, "indices must be integers"),
        ({"exaggeration": {**content["exaggeration"], "points": [[1]]}}, "expected a list, got list of length 1"),
        ({"student": None}, "not subscriptable"),
        ({"agreement": None}, r"evaluation.agreement must be a number in \[0, 100\], got nan"),
        ({"samples": 0}, "must have samples, layers and classes"),
        ({"layers": []}, "must have samples, layers and classes"),
        ({"classes": []}, "must have samples, layers and classes"),
        ({"classes": content["classes"][1:]}, "evaluation.classes must count 23 samples"),
        ({"divergence": []}, "temperatures must be one or more"),
        ({"divergence": [{"temperature": None, "kl": 1.0}]}, "temperatures must be numbers in"),
        ({"student": {**content["student"], "bins": []}}, "evaluation.student.bins must count 23 samples"),
        ({"teacher": {**content["teacher"], "quality": []}}, "evaluation.teacher.quality must have temperatures"),
        ({"teacher": {**content["teacher"], "accuracy": None}}, "evaluation.teacher.accuracy must be a number in"),
    ):
        with pytest.raises((KeyError, TypeError, ValueError), match=message):
            Evaluation.from_json({**content, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": 3}, "student must be a torch.nn.Module, got int"),
        ({"batches": []}, "batches must hold at least one sample, got none"),
        ({"temperatures": ()}, "temperatures must be one or more distinct numbers"),
        ({"temperatures": (2, 2.0)}, "temperatures must be one or more distinct numbers"),
        ({"temperatures": (0,)}, r"temperatures must be numbers in \[0.001, 1000\], got 0"),
        ({"temperatures": (1e4,)}, r"temperatures must be numbers in \[0.001, 1000\], got 10000.0"),
        (
            {"layers": [("9", "1")]},
            r"layers must name a path in student.named_modules\(\), penultimate or logits; the student has no '9', only 0, 1, 2, "
            r"3, 4, 5, 6$",
        ),
        ({"layers": ()}, "layers must be one or more pairs"),
        ({"layers": [("penultimate", "1")], "student": nn.Identity()}, "layers: the student has no torch.nn.Linear"),
        ({"layers": ["11"]}, "layers must be pairs"),
        ({"class_names": "ab"}, "class_names must have 3 names, got 2"),
        ({"teacher": nn.Sequential(nn.Flatten(), nn.Linear(16, 4))}, "same number of classes, got 3 and 4"),
        ({"teacher": nn.Flatten(0)}, r"teacher must give logits \(b, classes\), got \(16,\)"),
        ({"batches": [(torch.zeros(1, 1, 4, 4), torch.tensor([3]))]}, r"labels must be in \[0, 3\), got 3 to 3"),
        ({"batches": [(torch.zeros(1, 1, 4, 4), torch.tensor([0.0]))]}, "labels must be int64"),
        ({"batches": [(torch.full((1, 1, 4, 4), torch.nan), torch.tensor([0]))]}, "student must give logits that are"),
        ({"layers": [("6", "unused")]}, "the teacher's layer 'unused' did not run"),
    ],
)
def test_invalid_argument_is_refused(change, message):
    teacher = network((3, 5))
    teacher.register_module("unused", nn.Identity())
    teacher.forward = lambda x: nn.Sequential(*list(teacher)[:7])(x)
    arguments = {"student": network((3, 5)), "teacher": teacher, "batches": batches((1,)), **change}
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        evaluate(**arguments)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_hook_remains_on_student_if_teacher_layer_is_torchscript():
    student, teacher = network((3, 5)), nn.Sequential(nn.Flatten(), torch.jit.script(nn.Linear(16, 3)))
    with pytest.raises(ValueError, match=r"the teacher must be a torch.nn.Module .*, got TorchScript"):
        evaluate(student, teacher, batches((1,)), layers=[("1", "1")])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())


def test_wide_layers_are_refused():
    wide = nn.Sequential(nn.Conv2d(1, 513, 1), nn.Flatten(), nn.Linear(513 * 16, 3))
    with pytest.raises(ValueError, match="student's penultimate has 8208 features"):
        evaluate(wide, wide, batches((2,)))
    assert evaluate(wide, wide, batches((2,)), layers=[("0", "0")]).layers[0].cka == pytest.approx(1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_autocast_and_scripted_networks_are_supported():
    made = network((3, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluate(made, made, batches()).agreement == 100
    scripted = torch.jit.script(made)
    assert [one.student for one in evaluate(made, scripted, batches()).layers] == ["logits"]


# --- kcd evaluate -----------------------------------------------------------------------------------------------------


def kcd(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory):
    """Finished runs, read-only.

    `two` has two seeds and their teacher. `shelf/kd` was distilled from the teacher `far/elsewhere`. `shelf/plain` is a student
    without a teacher.
    """
    folder = tmp_path_factory.mktemp("shared_runs")
    shelf = folder / "shelf"
    elsewhere = folder / "far" / "elsewhere"
    assert kcd("distill", *SMALL, "--seeds", 2, "--seed", 5, "--output", folder / "two") == 0
    assert kcd("teacher", *SMALL, "--seed", 9, "--output", elsewhere) == 0
    assert kcd("distill", *SMALL, "--teacher", elsewhere, "--output", shelf / "kd") == 0
    assert kcd("distill", *SMALL, "--method", "ce", "--student", "cnn_small", "--output", shelf / "plain") == 0
    return folder


@pytest.fixture
def runs(tmp_path, shared_runs, monkeypatch):
    """A copy of `shared_runs` to change, as the current folder."""
    shutil.copytree(shared_runs, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def read_evaluation(folder):
    return json.loads((folder / "evaluation.json").read_text())


def load_network(folder, name):
    made = models.build(name, in_channels=1, num_classes=10)
    made.load_state_dict(load_file(folder / "student.safetensors"))
    return made.eval()


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def read_page(path):
    return Page(path.read_text())


SECTIONS = ("Reliability", "Accuracy by class", "Confidence of student and teacher", "Similarity of layers")


@pytest.fixture(scope="module")
def evaluated(shared_runs, tmp_path_factory):
    """`two` after `kcd evaluate`, read-only."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(shared_runs / "two", folder / "two")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert kcd("evaluate", folder / "two", "--threads", 1) == 0
    (folder / "printed").write_text(printed.getvalue())
    return folder


def test_evaluation_json_of_each_seed_matches_networks(evaluated):
    data = load("digits").test
    x = data.views.normalize(torch.from_numpy(data.images))
    teacher = load_network(evaluated / "two" / "teacher", "cnn_large")
    for seed in (5, 6):
        folder = evaluated / "two" / f"seed-{seed}"
        found, student = read_evaluation(folder)["evaluation"], load_network(folder, "cnn_small")
        with torch.no_grad():
            s, t = (made(x).double().numpy() for made in (student, teacher))
        last = json.loads((folder / "summary.json").read_text())["results"][0]["accuracy_last"]
        assert found["student"]["accuracy"] == pytest.approx(last, abs=1e-4) and found["samples"] == len(s)
        assert found["agreement"] == pytest.approx(100 * np.mean(s.argmax(1) == t.argmax(1)))
        for one, temperature in zip(found["divergence"], (1, 4), strict=True):
            assert one["kl"] == pytest.approx(loop_kl(s, t, temperature), rel=1e-4)
        for role, logits in (("student", s), ("teacher", t)):
            assert found[role]["ece"] == pytest.approx(loop_ece(logits, data.labels)[0], abs=1e-3)
        rates = [100 * np.mean((s.argmax(1) == c)[data.labels == c]) for c in range(10)]
        assert [one["student"] for one in found["classes"]] == pytest.approx(rates)
        stages = min(len(student.stages), len(teacher.stages))
        pairs = [*zip(student.stages[-stages:], teacher.stages[-stages:], strict=True)]
        pairs += [("penultimate", "penultimate"), ("logits", "logits")]
        assert [(one["student"], one["teacher"]) for one in found["layers"]] == pairs
        # The mean of the student's last stage is the classifier's input: one vector under two names.
        assert found["layers"][-3]["cka"] == pytest.approx(found["layers"][-2]["cka"], rel=1e-4)


def test_report_page_has_evaluation_section(shared_runs, evaluated):
    before, page = (read_page(folder / "two" / "report.html") for folder in (shared_runs, evaluated))
    assert not [heading for heading in before.headings if "valuation" in heading]
    assert [heading for heading in page.headings if heading not in before.headings] == [
        "Evaluation: the student beside its teacher",
        "Probabilities against the labels",
        *(f"{section}: kd, seed 5" for section in SECTIONS),
    ]
    assert page.drawings == before.drawings + 4
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in page.references)
    table = next(i for i, row in enumerate(page.rows) if row[0] == "run")
    printed = (evaluated / "printed").read_text()
    for seed, row in zip((5, 6), page.rows[table + 1 : table + 3], strict=True):
        found = read_evaluation(evaluated / "two" / f"seed-{seed}")["evaluation"]
        numbers = [found["student"]["accuracy"], found["teacher"]["accuracy"], found["agreement"]]
        kls = [f"{one['kl']:.4g}" for one in found["divergence"]]
        assert row[:6] == [f"kd, seed {seed}", *(f"{x:.2f}" for x in numbers), *kls]
        assert re.search(r" {2,}".join(map(re.escape, row[1:])), printed)


def test_later_reports_keep_evaluation_section_and_column(evaluated, tmp_path, monkeypatch, capfd):
    shutil.copytree(evaluated / "two", tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    agreements = [read_evaluation(tmp_path / "two" / f"seed-{seed}")["evaluation"]["agreement"] for seed in (5, 6)]
    shown = f"{mean(agreements):.2f} ± {stdev(agreements):.2f}"
    before = read_page(tmp_path / "two" / "report.html")
    for arguments, path in (
        (["distill", *SMALL, "--seeds", 2, "--seed", 5, "--output", "two", "--resume"], "two/report.html"),
        (["report", "two", "--output", "page.html"], "page.html"),
        (["evaluate", "two", "--threads", 1], "two/report.html"),  # evaluating again replaces the section
    ):
        assert kcd(*arguments) == 0
        out, page = capfd.readouterr().out, read_page(tmp_path / path)
        assert [h for h in page.headings if h.startswith(SECTIONS)] == [
            f"{section}: kd, seed 5" for section in SECTIONS
        ]
        if arguments[0] == "evaluate":
            assert page.headings == before.headings and page.drawings == before.drawings
            assert page.rows == before.rows
        else:
            row = next(dict(zip(page.rows[0], row, strict=True)) for row in page.rows if row[0] == "kd")
            assert row["agreement, %"] == shown and shown in out


def test_table_counts_evaluated_seeds():
    def run(method, seed, agreement):
        scores = None if agreement is None else dataclasses.replace(full.student, ece=agreement / 10)
        found = None if scores is None else dataclasses.replace(full, agreement=agreement, student=scores)
        return Summary(method, seed, 1.0, 1.0, 1, 1, 1.0, evaluation=found)

    student, teacher, labels = tensors(CASES["odd"])
    full = evaluate(nn.Identity(), Fixed(teacher), [(student, labels)])
    table = tables.results_table(
        [run("a", 0, 80.0), run("a", 1, 90.0), run("a", 2, None), run("b", 0, None), run("c", 0, 70.0)]
    )
    assert [row[3] for row in table] == ["agreement, %", "85.00 ± 7.07 (2 of 3)", "-", "70.00"]
    assert [row[4] for row in table] == ["ECE, %", "8.50 ± 0.71 (2 of 3)", "-", "7.00"]
    head = "".join(tables.results_table([run("a", 0, None), run("b", 0, None)])[0])
    assert "agreement" not in head and "ECE" not in head
    assert "evaluation" not in run("a", 0, 80.0).as_json()


# --- figures and tables --------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[6, 31])
def random_evaluation(request):
    """An evaluation whose numbers all differ between student and teacher, with its logits and labels."""
    student, teacher, labels = random_case(n=500, classes=request.param, scale=1.5)
    known = (np.arange(500) % 3 > 0) & (teacher.argmax(1) < request.param - 1)  # the last class has no samples
    s, t, y = tensors((1.4 * student - 0.3, teacher, np.where(known, teacher.argmax(1), labels)))
    names = [f"name {label}" for label in range(request.param)]
    return evaluate(nn.Identity(), Fixed(t), [(s, y)], temperatures=(1, 2.5), class_names=names), s, t, y


def of_one_run(evaluation):
    """Return the summary of a run of one epoch with this evaluation."""
    line = dict.fromkeys(("accuracy", "sample_visits", "seconds", "flops"), 1) | {"condensation": None}
    return Summary("kd", 0, 1.0, 1.0, 1, 1, 1.0, evaluation=evaluation, history=[line])


def page_of(evaluation):
    """Return the report page of that run, with its text on one line."""
    shown = Page(render(comparison([of_one_run(evaluation)]), Path())[0].decode())
    shown.text = " ".join("".join(shown.text).split())
    return shown


def axes_of(draw, evaluation):
    axes = Figure().subplots()
    draw(axes, evaluation)
    return axes


def test_reliability_figure_matches_bins(random_evaluation):
    found, s, t, y = random_evaluation
    axes = axes_of(figures.draw_reliability, found)
    lines = {line.get_label().partition(",")[0]: line for line in axes.lines}
    marks = {marks.get_label(): marks for marks in axes.collections}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("confidence, %", "accuracy, %")
    for role, logits in (("student", s), ("teacher", t)):
        ece, counts, points = loop_ece(logits.numpy(), y.numpy())
        points = [point for point, count in zip(points, counts, strict=True) if count]
        np.testing.assert_allclose(lines[role].get_xydata(), points, rtol=1e-9)
        np.testing.assert_allclose(marks[f"_{role}"].get_offsets(), points, rtol=1e-9)
        areas = marks[f"_{role}"].get_sizes()
        np.testing.assert_allclose(areas / areas.sum(), [count / len(y) for count in counts if count])
        assert lines[role].get_label() == f"{role}, ECE {ece:.2f}"
        colours = (lines[role].get_color(), marks[f"_{role}"].get_facecolor()[0][:3])
        assert (
            colours[0] == figures.NETWORK_COLOURS[role] and figures.matplotlib.colors.to_hex(colours[1]) == colours[0]
        )


def test_classes_figure_matches_accuracies(random_evaluation):
    found, s, t, y = random_evaluation
    axes = axes_of(figures.draw_classes, found)
    rates = {"student": [], "teacher": []}
    for role, x in (("student", s), ("teacher", t)):
        for c in range(s.shape[1]):
            right, of_class = int((x.argmax(1) == c)[y == c].sum()), int((y == c).sum())
            rates[role].append(100 * right / of_class if of_class else np.nan)
    lost = {c: b - a for c, (a, b) in enumerate(zip(*rates.values(), strict=True)) if not np.isnan(a)}
    order = sorted(lost, key=lambda c: -lost[c])
    shown = order[:20] if s.shape[1] > 20 else range(s.shape[1])
    assert [text.get_text() for text in axes.get_xticklabels()] == [f"name {c}" for c in shown]
    for bars in axes.containers:
        heights = [0 if np.isnan(x) else x for x in (rates[bars.get_label()][c] for c in shown)]
        np.testing.assert_allclose([bar.get_height() for bar in bars], heights, rtol=1e-9)
        assert {figures.matplotlib.colors.to_hex(bar.get_facecolor()) for bar in bars} == {
            figures.NETWORK_COLOURS[bars.get_label()]
        }
    assert {bars.get_label() for bars in axes.containers} == {"student", "teacher"}
    worse = [f"name {c} ({lost[c]:.2f})" for c in order if lost[c] > 0][:10]
    assert len(worse) > 1 and f"Largest losses in percentage points: {', '.join(worse)}." in page_of(found).text
    axes.figure.canvas.draw()
    assert axes.get_legend().get_window_extent().y0 >= axes.get_window_extent().y1  # above all bars


def test_log_odds_figure_matches_samples(random_evaluation):
    found, s, t, _ = random_evaluation
    axes = axes_of(figures.draw_log_odds, found)
    tops = t.argmax(1).tolist()
    x, y = (np.array([loop_log_odds(row.numpy(), c) for row, c in zip(z, tops, strict=True)]) for z in (t, s))
    points, alike, line = axes.lines
    assert len(points.get_xdata()) == 300 and "teacher's" in axes.get_xlabel() and "student's" in axes.get_ylabel()
    np.testing.assert_allclose(points.get_xydata()[[0, -1]], [(x[0], y[0]), (x[-1], y[-1])], rtol=1e-9)
    assert (alike.get_xdata() == alike.get_ydata()).all()
    slope, intercept = np.polyfit(x, y, 1)
    np.testing.assert_allclose(line.get_ydata(), slope * np.array(line.get_xdata()) + intercept, rtol=1e-6)
    assert line.get_label() == f"slope {slope:.4g}"
    below, above = ((y - x)[part].mean() for part in (x < np.median(x), x > np.median(x)))
    note = page_of(found).text
    assert (
        f"by {below:+.4g} where the teacher's are below their median and by {above:+.4g} where they are above it."
        in note
    )
    assert ("The student exaggerates" in note) == (below < 0 < above)
    other = dataclasses.replace(found.exaggeration, below=-0.5, above=0.25)
    assert "The student exaggerates" in page_of(dataclasses.replace(found, exaggeration=other)).text


def test_layers_figure_matches_cka(random_evaluation):
    layers = tuple(metrics.LayerSimilarity(*row) for row in (("a", "b", 0.25), ("c", "c", 0.75), ("d", "d", np.nan)))
    axes = axes_of(figures.draw_layers, dataclasses.replace(random_evaluation[0], layers=layers))
    assert [bar.get_width() for bar in axes.patches] == [0.25, 0.75, 0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a / b", "c", "d"]
    assert axes.yaxis_inverted() and axes.get_xlim() == (0, 1)


def test_evaluation_tables_match_metrics(random_evaluation):
    found, s, t, y = random_evaluation
    summary = Summary("kd", 0, 1.0, 1.0, 1, 1, 1.0, evaluation=found)
    head, row = tables.evaluation_table([summary])
    assert len(set(head)) == len(head)
    row_by_name, one = dict(zip(head, row, strict=True)), found.exaggeration
    rates = [100 * np.mean((x.argmax(1) == y).numpy()) for x in (s, t)]
    worst = min(a - b for a, b in ((c.student, c.teacher) for c in found.classes if c.count))
    assert row_by_name == {
        "run": "kd",
        "accuracy, %": f"{rates[0]:.2f}",
        "teacher's accuracy, %": f"{rates[1]:.2f}",
        "agreement, %": f"{100 * np.mean((s.argmax(1) == t.argmax(1)).numpy()):.2f}",
        "KL, T = 1": f"{loop_kl(s.numpy(), t.numpy(), 1):.4g}",
        "KL, T = 2.5": f"{loop_kl(s.numpy(), t.numpy(), 2.5):.4g}",
        "ECE, %": f"{loop_ece(s.numpy(), y.numpy())[0]:.2f}",
        "teacher's ECE, %": f"{loop_ece(t.numpy(), y.numpy())[0]:.2f}",
        "slope of log-odds": f"{one.slope:.4g}",
        "halves of log-odds": f"{one.below:+.4g} / {one.above:+.4g}",
        "worst class, points": f"{worst:+.2f}",
    }
    rows = page_of(found).rows
    start = next(i for i, row in enumerate(rows) if row[1] == "temperature")
    head, *rows = rows[start : start + 3]
    assert head == ["run", "temperature", "NLL", "teacher's NLL", "Brier", "teacher's Brier"]
    for row, temperature in zip(rows, (1, 2.5), strict=True):
        p = [torch.softmax(x / temperature, 1) for x in (s, t)]
        nll = [-x.gather(1, y[:, None]).log().mean().item() for x in p]
        brier = [(x - nn.functional.one_hot(y, x.shape[1])).square().sum(1).mean().item() for x in p]
        assert row == ["kd", f"{temperature:g}", *(f"{x:.4g}" for x in (*nll, *brier))]


def test_numbers_that_round_to_zero_have_no_sign(random_evaluation):
    same = evaluate(nn.Identity(), Fixed(random_evaluation[1]), [(random_evaluation[1], random_evaluation[3])])
    assert str(same.worst_class_change) == "0.0" and json.dumps(same.as_json()).count('"worst_class_change": 0.0') == 1
    cells = tables.evaluation_table([Summary("kd", 0, 1.0, 1.0, 1, 1, 1.0, evaluation=same)])[1]
    assert cells[-2:] == ["0 / 0", "0.00"] and [tables.format_number(x, "+.2f") for x in (-0.001, 0.001, -1)] == [
        "0.00",
        "0.00",
        "-1.00",
    ]


def test_close_temperatures_have_distinct_labels(random_evaluation):
    _, s, t, y = random_evaluation
    found = evaluate(nn.Identity(), Fixed(t), [(s, y)], temperatures=(1, 1.0000001, 4))
    summary = Summary("kd", 0, 1.0, 1.0, 1, 1, 1.0, evaluation=found)
    assert tables.evaluation_table([summary])[0][4:7] == ["KL, T = 1", "KL, T = 1.0000001", "KL, T = 4"]
    assert [row[1] for row in page_of(found).rows[-3:]] == ["1", "1.0000001", "4"]


def test_notes_name_agreements_with_different_teachers(random_evaluation):
    def run(method, seed, weights, own=True):
        with_whom = ComparedWith("net", f"at-{weights}", weights, own)
        return Summary(method, seed, 1.0, 1.0, 1, 1, 1.0, evaluation=random_evaluation[0], compared_with=with_whom)

    assert tables.notes_on_agreement([run("a", 0, "x"), run("a", 1, "x"), run("b", 0, "x")]) == []
    several = "The agreements are with different teachers: see the evaluation."
    assert tables.notes_on_agreement([run("a", 0, "x"), run("b", 0, "y")]) == [several]
    assert tables.notes_on_agreement([run("a", 0, "x"), run("a", 1, "y")]) == [
        several,
        "The agreement of a is averaged over different teachers.",
    ]
    assert tables.notes_on_agreement([run(method, seed, f"of-{seed}") for method in "ab" for seed in (0, 1)]) == [
        several,
        "The agreement of a, b is averaged over different teachers.",
    ]
    assert tables.notes_on_agreement([run("a", 0, "x", own=False)]) == [
        "The agreement of a is with net of at-x (weights x), not with a teacher that the run was distilled from."
    ]


@pytest.mark.slow
def test_distant_teacher_is_found_and_run_without_teacher_skipped(runs, capfd):
    assert kcd("report", "shelf", "--output", "before.html") == 0
    assert "agreement" not in capfd.readouterr().out and "agreement" not in (runs / "before.html").read_text()
    (runs / "shelf" / "plain" / "report.html").unlink()
    assert kcd("evaluate", "shelf", "--threads", 1, "--layers", "0=2", "--temperatures", 3) == 0
    out = capfd.readouterr().out
    assert out.endswith("\nreport: shelf/kd/report.html\n") and not (runs / "shelf" / "plain" / "report.html").exists()
    assert "skipped: shelf/plain: the run has no teacher: give --teacher to compare" in out
    content = read_evaluation(runs / "shelf" / "kd")
    assert content["teacher_network"] == "cnn_large" and content["teacher_path"].endswith("far/elsewhere")
    assert [one["temperature"] for one in content["evaluation"]["divergence"]] == [3]
    assert [(one["student"], one["teacher"]) for one in content["evaluation"]["layers"]] == [("0", "2")]
    assert not (runs / "shelf" / "plain" / "evaluation.json").exists() and not (runs / "shelf" / "report.html").exists()
    assert "Reliability: kd" in read_page(runs / "shelf" / "kd" / "report.html").headings
    assert kcd("report", "shelf") == 0
    rows = {row[0]: row for row in read_page(runs / "report.html").rows[:4]}
    assert rows["method"][3] == "agreement, %" and rows["ce"][3] == rows["teacher"][3] == "-"
    assert rows["kd"][3] == f"{content['evaluation']['agreement']:.2f}"


@pytest.mark.slow
def test_run_without_teacher_is_compared_with_named_teacher(runs, capfd):
    before = contents(runs)
    assert kcd("evaluate", "shelf/plain") == 2
    out, error = capfd.readouterr()
    assert (out, error) == (
        "",
        "kcd: shelf/plain: the run has no teacher: give --teacher to compare its student with one\n",
    )
    assert contents(runs) == before
    weights = runs / "weights.safetensors"
    weights.write_bytes((runs / "two" / "teacher" / "student.safetensors").read_bytes())
    (runs / "shelf" / "plain" / "report.html").unlink()
    for more in (("two/teacher",), (weights, "--teacher-network", "cnn_large")):
        assert kcd("evaluate", "shelf/plain", "--threads", 1, "--teacher", *more) == 0
        assert read_evaluation(runs / "shelf" / "plain")["evaluation"]["agreement"] > 0
    page = read_page(runs / "shelf" / "plain" / "report.html")
    assert "Configuration" in page.headings and "Similarity of layers: ce" in page.headings


@pytest.mark.slow
def test_older_config_without_teacher_path_is_evaluated(runs):
    def forget(content):
        del content["about"]["teacher_network"], content["about"]["teacher_path"]

    edit_json(runs / "shelf" / "kd" / "config.json", forget)
    assert kcd("evaluate", "shelf/kd", "--threads", 1) == 0
    assert "Reliability: kd" in read_page(runs / "shelf" / "kd" / "report.html").headings
    shutil.rmtree(runs / "two" / "seed-6")
    edit_json(runs / "two" / "seed-5" / "config.json", forget)
    (runs / "two" / "seed-5").rename(runs / "two" / "only")  # its teacher is in the folder beside it
    assert kcd("evaluate", "two/only", "--threads", 1) == 0
    assert read_page(runs / "two" / "only" / "report.html").rows


def change_weights(path):
    weights = load_file(path)
    first = next(iter(weights))
    save_file({**weights, first: weights[first] + 1}, path)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (
            lambda runs: change_weights(runs / "two" / "teacher" / "student.safetensors"),
            ["two"],
            "two/teacher/student.safetensors has changed since the run wrote it",
        ),
        (
            lambda runs: (
                change_weights(runs / "two" / "teacher" / "student.safetensors"),
                (runs / "two" / "teacher" / "summary.json").unlink(),
            ),
            ["two"],
            "has other weights",
        ),
        (lambda runs: shutil.rmtree(runs / "two" / "teacher"), ["two"], "was not found: no weights in "),
        (
            lambda runs: None,
            ["two", "--teacher", "cnn_large"],
            "must be the folder of a finished run or a weights file",
        ),
        (lambda runs: None, ["two", "--teacher", "nowhere"], "unknown teacher 'nowhere'"),
        (lambda runs: None, ["two", "--teacher", "two/seed-5", "--teacher-network", "cnn_large"], "do not fit network"),
        (lambda runs: None, ["two", "--teacher-network", "cnn_large"], "has no effect without teacher"),
        (
            lambda runs: None,
            ["two", "--layers", "0"],
            "layers must be STUDENT=TEACHER, a module path in each network, got '0'",
        ),
        (
            lambda runs: None,
            ["two", "--layers", "99=0"],
            "two/seed-5: layers must name a path in student.named_modules()",
        ),
        (lambda runs: None, ["two/seed-6", "--layers", "0=99"], "kcd: two/seed-6: layers must name a path in teacher."),
        (lambda runs: None, ["two", "--temperatures", "0"], "temperatures must be numbers in [0.001, 1000], got 0.0"),
        (
            lambda runs: (runs / "two/seed-6/evaluation.json").mkdir(),
            ["two"],
            "two/seed-6/evaluation.json must be a file, but is a folder",
        ),
        (lambda runs: None, ["two", "--device", "gpu"], "device must be auto, cpu or cuda, got 'gpu'"),
        (lambda runs: None, ["two", "--threads", "0"], "threads must be"),
        (lambda runs: None, [], "kcd evaluate needs at least one run folder"),
        (lambda runs: None, ["far"], "nothing to evaluate: far/elsewhere: the run has no teacher"),
        (lambda runs: (runs / "two/seed-6/student.safetensors").unlink(), ["two/seed-6"], "the run is not finished"),
        (
            lambda runs: (runs / "two/seed-6/student.safetensors").write_text("x"),
            ["two/seed-6"],
            "two/seed-6/student.safetensors has changed since the run wrote it",
        ),
        (
            lambda runs: ((runs / "two/report.png").unlink(), (runs / "two/report.png").mkdir()),
            ["two"],
            "two/report.png must be a file, but is a folder",
        ),
        (
            lambda runs: edit_json(runs / "two/seed-6/config.json", lambda c: c.update(test_samples="0")),
            ["two/seed-6"],
            "two/seed-6: the run was tested on other images than 'digits' contains now",
        ),
        (
            lambda runs: edit_json(runs / "two/seed-6/config.json", lambda c: c["about"]["data"].update(command="rm")),
            ["two/seed-6"],
            "two/seed-6: load() got an unexpected keyword argument 'command'",
        ),
        (
            lambda runs: edit_json(runs / "two/seed-6/config.json", lambda c: c["about"].update(teacher_path=[1])),
            ["two/seed-6"],
            "two/seed-6/config.json is damaged: teacher_path must be a string, got list of length 1",
        ),
        (
            lambda runs: edit_json(runs / "two/seed-6/config.json", lambda c: c["about"].pop("student")),
            ["two/seed-6"],
            "two/seed-6: config.json does not say which network was trained",
        ),
        (
            lambda runs: edit_json(runs / "two/seed-6/config.json", lambda c: c.update(about={})),
            ["two/seed-6"],
            "config.json does not name the data set, because no command wrote it: "
            "call kcd_ext.evaluation.evaluate with the networks",
        ),
    ],
)
def test_invalid_input_is_one_line_and_writes_nothing(change, arguments, message, runs, capfd):
    change(runs)
    before = contents(runs)
    assert kcd("evaluate", *arguments) == 2
    out, error = capfd.readouterr()
    assert (out, error.count("\n")) == ("", 1) and message in error
    assert contents(runs) == before


@pytest.mark.slow
def test_runs_that_cannot_be_evaluated_are_skipped(runs, capfd):
    """One run has lost its teacher, one was not made by a command, one has other weights than its config says."""
    shutil.copytree(runs / "shelf" / "kd", runs / "shelf" / "kd-2")
    edit_json(runs / "shelf" / "kd-2" / "config.json", lambda c: c.update(about={}))
    shutil.copytree(runs / "two" / "seed-5", runs / "shelf" / "beside")
    shutil.copytree(runs / "two" / "teacher", runs / "shelf" / "teacher")
    edit_json(runs / "shelf" / "kd" / "config.json", lambda c: c["about"].update(teacher_path="moved"))
    assert kcd("evaluate", "shelf", "--threads", 1) == 0
    out = capfd.readouterr().out
    for reason in (
        "kd: its teacher (weights ",
        "kd-2: config.json does not name the data set",
        "teacher: the run has no teacher",
    ):
        assert f"\nskipped: shelf/{reason}" in out
    assert [path.parent.name for path in sorted((runs / "shelf").glob("*/evaluation.json"))] == ["beside"]
    (runs / "shelf" / "beside" / "evaluation.json").unlink()
    edit_json(runs / "two" / "seed-6" / "config.json", lambda c: c["about"].update(student="cnn_large"))
    assert kcd("evaluate", "two", "--threads", 1) == 0
    assert "skipped: two/seed-6: weights in " in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["student.safetensors", "metrics.jsonl"])
def test_evaluation_of_another_student_is_refused(name, evaluated, runs, capfd):
    evaluation = (evaluated / "two" / "seed-5" / "evaluation.json").read_bytes()
    (runs / "two" / "seed-6" / "evaluation.json").write_bytes(evaluation)
    assert kcd("report", "two") == 2
    assert capfd.readouterr().err.startswith(
        "kcd: two/seed-6/evaluation.json belongs to another student: metrics.jsonl has changed"
    )
    (runs / "two" / "seed-6" / "evaluation.json").unlink()
    (runs / "two" / "seed-5" / "evaluation.json").write_bytes(evaluation)
    assert kcd("report", "two") == 0
    other = runs / "two" / "seed-6" / name
    if name == "metrics.jsonl":
        shutil.copy(other, runs / "two" / "seed-5" / name)
        (runs / "two" / "seed-5" / "ranking.json").unlink()
    else:
        change_weights(runs / "two" / "seed-5" / name)
    capfd.readouterr()
    assert kcd("report", "two") == 2
    assert capfd.readouterr().err.startswith(
        f"kcd: two/seed-5/evaluation.json belongs to another student: {name} has changed"
    )
    if name == "student.safetensors":  # looks damaged, because the digest differs
        assert kcd("evaluate", "two/seed-5", "--threads", 1) == 2
        assert "seed-5/student.safetensors has changed since the run wrote it" in capfd.readouterr().err
        edit_json(runs / "two" / "seed-5" / "summary.json", lambda summary: summary.pop("sha256"))
    assert kcd("evaluate", "two", "--threads", 1) == 0  # replaces it


@pytest.mark.slow
def test_evaluated_teacher_is_still_shown_as_teacher(runs, capfd):
    """Its row is drawn as a level, and its own agreement with another network is not shown."""
    assert kcd("evaluate", "far/elsewhere", "--teacher", "two/teacher", "--threads", 1) == 0
    assert kcd("evaluate", "shelf/kd", "--threads", 1) == 0
    for arguments in ([], ["distill", *SMALL, "--teacher", "far/elsewhere", "--output", "shelf/kd", "--resume"]):
        assert not arguments or kcd(*arguments) == 0
        page = read_page(runs / "shelf" / "kd" / "report.html")
        rows = {row[0]: dict(zip(page.rows[0], row, strict=True)) for row in page.rows[1:3]}
        agreement = read_evaluation(runs / "shelf" / "kd")["evaluation"]["agreement"]
        assert {name: row["agreement, %"] for name, row in rows.items()} == {"teacher": "-", "kd": f"{agreement:.2f}"}
        assert [h for h in page.headings if h.startswith(SECTIONS)] == [f"{section}: kd" for section in SECTIONS]


@pytest.mark.slow
def test_report_names_teacher_of_each_comparison(runs, capfd):
    notes = ("not with a teacher that the run was distilled from", "The agreements are with different teachers")
    assert kcd("evaluate", "two", "--threads", 1) == 0
    out, text = capfd.readouterr().out, (runs / "two" / "report.html").read_text()
    weights = json.loads((runs / "two" / "seed-5" / "config.json").read_text())["teacher"]
    assert f"their own teacher, cnn_large (weights {weights}): kd, seed 5; kd, seed 6." in text
    assert f"their own teacher, cnn_large (weights {weights}): two/seed-5; two/seed-6." in out
    assert "student and teacher have the same top class" in text
    assert not [note for note in notes if note in text]
    assert kcd("evaluate", "two/seed-6", "--teacher", "far/elsewhere", "--threads", 1) == 0
    capfd.readouterr()
    assert kcd("report", "two", "--output", "page.html") == 0
    out, pages = capfd.readouterr().out, [runs / "two" / "report.html", runs / "page.html"]
    weights = json.loads((runs / "shelf" / "kd" / "config.json").read_text())["teacher"]
    note = (
        f"The agreement of kd, seed 6 is with cnn_large of far/elsewhere (weights {weights}), not with a teacher that"
    )
    for text in (out, *(page.read_text() for page in pages)):
        assert note in text and "The agreements are with different teachers" in text
        assert "The agreement of kd is averaged over different teachers." in text
    assert f"another teacher, cnn_large of far/elsewhere (weights {weights}): kd, seed 6." in text


@pytest.mark.slow
def test_pages_of_one_seed_and_all_seeds_agree(runs, monkeypatch, capfd):
    """The table of results has the agreement on every page, and its other columns stay."""
    page = runs / "two" / "report.html"
    before = read_page(page)
    assert kcd("evaluate", "two/seed-5", "--threads", 1) == 0
    out = capfd.readouterr().out
    assert "report: two/seed-5/report.html\nreport: two/report.html\n" in out
    one = read_evaluation(runs / "two" / "seed-5")["evaluation"]["agreement"]
    assert kcd("evaluate", "two", "--threads", 1, "--temperatures", 3) == 0
    assert "report: two/seed-5/report.html\n" in capfd.readouterr().out
    seed, both = read_page(runs / "two" / "seed-5" / "report.html"), read_page(page)
    assert "KL, T = 3" in next(row for row in seed.rows if row[0] == "run")
    assert [row[3] for row in seed.rows[:3]] == ["agreement, %", "-", f"{one:.2f}"]
    two = mean([one, (other := read_evaluation(runs / "two" / "seed-6")["evaluation"]["agreement"])])
    assert [row[3] for row in both.rows[:3]] == ["agreement, %", "-", f"{two:.2f} ± {stdev([one, other]):.2f}"]
    assert [row[:3] + row[5:] for row in both.rows[:3]] == before.rows[:3]
    page.write_text("of an older version")
    monkeypatch.chdir(runs / "two" / "seed-5")
    assert kcd("evaluate", ".", "--threads", 1) == 0
    out = capfd.readouterr().out
    assert "\nseed-5 " in out and out.endswith("\nreport: report.html\nreport: ../report.html\n")
    assert both.rows[:3] == read_page(page).rows[:3]


@pytest.mark.parametrize("text", mostly_slow(["{", "[]", "{}", '{"evaluation": {"samples": 1}}'], kept=["{"]))
def test_damaged_evaluation_is_named(text, runs, capfd):
    (runs / "two" / "seed-6" / "evaluation.json").write_text(text)
    before = contents(runs)
    for arguments in (["report", "two"], ["distill", *SMALL, "--seeds", 2, "--seed", 5, "--output", "two", "--resume"]):
        capfd.readouterr()
        assert kcd(*arguments) == 2
        error = capfd.readouterr().err.splitlines()[-1]
        assert error.startswith("kcd: two/seed-6/evaluation.json is damaged: ")
    assert contents(runs).keys() == before.keys()
    assert kcd("evaluate", "two", "--threads", 1) == 0  # replaces it
    assert read_evaluation(runs / "two" / "seed-6")["evaluation"]["samples"] > 0


def test_run_is_refused_in_folder_with_evaluation(runs, capfd):
    (runs / "fresh").mkdir()
    (runs / "fresh" / "evaluation.json").write_text("{}")
    assert kcd("distill", *SMALL, "--teacher", "two/teacher", "--output", "fresh") == 2
    assert "output fresh already holds evaluation.json" in capfd.readouterr().err
