"""Student beside teacher: every metric against loops in NumPy, and `kcd evaluate` on runs that were really made."""

import contextlib
import dataclasses
import html.parser
import io
import json
import re
import shutil
from statistics import mean, stdev

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kcd_ext import cli, models
from kcd_ext import evaluation as metrics
from kcd_ext.data.images import load
from kcd_ext.evaluation import Evaluation, LinearCKA, evaluate
from kcd_ext.methods import Batch
from kcd_ext.training import Summary
from kcd_ext.training.summary import cells

SMALL = ["--data", "digits", "--epochs", "2", "--threads", "1", "--device", "cpu"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- the formulas, sample by sample -----------------------------------------------------------------------------------


def softmax(row, temperature=1.0):
    shifted = np.exp((np.asarray(row, float) - np.max(row)) / temperature)
    return shifted / shifted.sum()


def by_hand_kl(student, teacher, temperature):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, s = softmax(t, temperature), (s - np.max(s)) / temperature
        log_q = s - np.log(np.exp(s).sum())
        log_p = (t - np.max(t)) / temperature - np.log(np.exp((t - np.max(t)) / temperature).sum())
        total += sum(p[c] * (log_p[c] - log_q[c]) for c in range(len(p)) if p[c] > 0)
    return total / len(student)


def by_hand_ece(logits, labels, bins=15):
    members = [[] for _ in range(bins)]
    for row, label in zip(logits, labels, strict=True):
        p = softmax(row)
        place = next(m for m in range(bins) if m / bins < p.max() <= (m + 1) / bins or m == bins - 1)
        members[place].append((p.max(), float(np.argmax(row) == label)))
    ece = sum(abs(sum(c for c, _ in held) - sum(r for _, r in held)) for held in members) / len(labels)
    means = [tuple(100 * np.mean(held, axis=0)) if held else (np.nan, np.nan) for held in members]
    return 100 * ece, [len(held) for held in members], means


def by_hand_log_odds(row, c):
    others = np.delete(np.asarray(row, float), c)
    return row[c] - others.max() - np.log(np.exp(others - others.max()).sum())


def by_hand_cka(x, y):
    """By the Gram matrices: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))."""
    centre = np.eye(len(x)) - 1 / len(x)
    k, m = (centre @ (f @ f.T) @ centre for f in (np.asarray(x, float), np.asarray(y, float)))
    return (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())


def drawn(n=37, classes=5, seed=0, scale=3.0):
    """Logits of student and teacher, and labels of which the last class has none."""
    draw = np.random.default_rng(seed)
    teacher = draw.normal(size=(n, classes)) * scale
    student = teacher + draw.normal(size=(n, classes))
    return student, teacher, draw.integers(0, classes - 1, n)


CASES = {
    "odd": drawn(),
    "even": drawn(n=12),
    "one sample": drawn(n=1, classes=3),
    "two classes": drawn(n=9, classes=2),
    "large": drawn(n=11, classes=7, scale=1e4),
    "ties": tuple(np.round(part) if part.ndim == 2 else part for part in drawn(n=41, classes=4, scale=1.0)),
}


def tensors(case):
    student, teacher, labels = case
    return torch.tensor(student), torch.tensor(teacher), torch.tensor(labels)


@pytest.mark.parametrize("name", CASES)
def test_metrics_of_logits(name):
    (student, teacher, labels), (s, t, y) = CASES[name], tensors(CASES[name])
    n = len(labels)
    tops = [[int(np.argmax(row)) for row in x] for x in (student, teacher)]
    assert metrics.agreement(s, t) == pytest.approx(100 * sum(a == b for a, b in zip(*tops, strict=True)) / n)
    for logits, tensor, top in ((student, s, tops[0]), (teacher, t, tops[1])):
        assert metrics.accuracy(tensor, y) == pytest.approx(
            100 * np.mean([a == b for a, b in zip(top, labels, strict=True)])
        )
        ece, bins = metrics.calibration(tensor, y)
        expected, counts, means = by_hand_ece(logits, labels)
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
        assert metrics.divergence(s, t, temperature) == pytest.approx(by_hand_kl(student, teacher, temperature))
    for one in metrics.class_accuracies(s, t, y):
        held = [i for i in range(n) if labels[i] == one.label]
        rates = [100 * np.mean([top[i] == one.label for i in held]) if held else np.nan for top in tops]
        np.testing.assert_allclose((one.student, one.teacher), rates)
        assert (one.count, one.name) == (len(held), f"class {one.label}")


@pytest.mark.parametrize("name", CASES)
def test_exaggeration(name):
    (student, teacher, _), (s, t, _) = CASES[name], tensors(CASES[name])
    pairs = [
        (by_hand_log_odds(b, c), by_hand_log_odds(a, c))
        for a, b, c in ((a, b, int(np.argmax(b))) for a, b in zip(student, teacher, strict=True))
    ]
    x, y = np.array(pairs).T
    found = metrics.exaggeration(s, t)
    np.testing.assert_allclose(found.points, pairs, rtol=1e-12, atol=1e-12)
    assert found.count == len(x) and found.median == pytest.approx(np.median(x))
    slope, intercept = np.polyfit(x, y, 1) if len(x) > 1 else (np.nan, np.nan)
    np.testing.assert_allclose((found.slope, found.intercept), (slope, intercept), rtol=1e-7)
    for part, held in ((found.below, x < np.median(x)), (found.above, x > np.median(x))):
        np.testing.assert_allclose(part, (y - x)[held].mean() if held.any() else np.nan, rtol=1e-9)


def test_classes_that_are_ruled_out():
    """Of the last class of both nothing is left; of the student's first the teacher still has something."""
    student, teacher, labels = drawn(n=23)
    student[:, -1] = teacher[:, -1] = -np.inf
    s, t, y = tensors((student, teacher, labels))
    inner = slice(0, -1)
    assert metrics.divergence(s, t, 4.0) == pytest.approx(by_hand_kl(student[:, inner], teacher[:, inner], 4.0))
    assert metrics.quality(s, y).brier == pytest.approx(metrics.quality(s[:, inner], y).brier)
    assert metrics.exaggeration(s, t) == metrics.exaggeration(s[:, inner], t[:, inner])
    student[3, 0] = -np.inf
    assert metrics.divergence(torch.tensor(student), t) == np.inf
    assert metrics.quality(torch.tensor(student), torch.zeros_like(y)).nll == np.inf
    alone = torch.full((2, 3), -np.inf).index_fill(1, torch.tensor([1]), 5.0)  # nothing else is possible
    assert metrics.log_odds(alone, torch.tensor([1, 0])).tolist() == [np.inf, -np.inf]
    assert metrics.exaggeration(alone, alone).count == 0 and np.isnan(metrics.exaggeration(alone, alone).slope)


def test_log_odds_where_probabilities_round_to_one():
    """Of logits (a, b) they are a - b, also where 1 - p is less than float64 tells from 0."""
    logits = torch.tensor([[800.0, -700.0], [0.0, 1e4], [-1e30, 1e30]])
    assert metrics.log_odds(logits, torch.tensor([0, 0, 1])).tolist() == [1500.0, -1e4, float(torch.tensor(1e30)) * 2]


def test_teachers_that_are_always_as_sure_have_no_slope():
    teacher = torch.tensor([[0.1, 0.7, 0.3]]).repeat(11, 1)  # so many that their mean is rounded
    found = metrics.exaggeration(torch.randn(11, 3), teacher)
    assert found.count == 11 and np.isnan([found.slope, found.intercept, found.below, found.above]).all()


def test_the_smallest_temperature_leaves_the_top_class_alone():
    student, teacher, labels = tensors(CASES["odd"])
    wrong = (student.argmax(1) != labels).double().mean().item()
    found = metrics.quality(student, labels, 5e-324)
    assert 0 < wrong < 1 and (found.nll, found.brier) == (np.inf, pytest.approx(2 * wrong))
    assert metrics.divergence(teacher, teacher, 5e-324) == 0


def test_a_confidence_on_an_edge_is_of_the_bin_below():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0], [-np.inf, 0.0, -np.inf, -np.inf, -np.inf]])  # 3/15 and 15/15
    _, bins = metrics.calibration(logits, torch.tensor([0, 0]))
    assert [i for i, one in enumerate(bins) if one.count] == [2, 14]


# --- CKA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_linear_cka_of_batches(offset):
    draw = np.random.default_rng(1)
    x = draw.normal(size=(29, 3)) + offset
    y = x[:, :2] @ draw.normal(size=(2, 7)) + draw.normal(size=(29, 7))
    similarity = LinearCKA()
    for part in (slice(0, 1), slice(1, 12), slice(12, 12), slice(12, 29)):
        similarity.update(torch.tensor(x[part]), torch.tensor(y[part]))
    assert similarity.value() == pytest.approx(by_hand_cka(x - x.mean(0), y - y.mean(0)), rel=1e-8)
    scaled = LinearCKA()
    scaled.update(torch.tensor(x), torch.tensor(3 * x[:, ::-1].copy() - 8))  # a rotation, a scale and a shift
    assert scaled.value() == pytest.approx(1, abs=1e-9)


def test_features_that_are_always_the_same_have_no_similarity():
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
    """What every layer gives for x, and the logits."""
    with torch.no_grad():
        seen = [x]
        for layer in made.eval():
            seen.append(layer(seen[-1]))
    return seen[1:]


def test_evaluate_against_the_outputs_of_the_networks():
    student, teacher = network((3, 5), stages=("3",)), network((4, 6), stages=("1", "3"), seed=1)
    student[5].train(), teacher.eval()
    modes = [module.training for module in (*student.modules(), *teacher.modules())]
    held = batches()
    found = evaluate(
        student, teacher, [Batch(x, y, torch.arange(len(y))) for x, y in held], class_names=("a", "b", "c")
    )
    assert [module.training for module in (*student.modules(), *teacher.modules())] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for n in (student, teacher) for m in n.modules())
    x = torch.cat([x for x, _ in held])
    a, b = outputs(student, x), outputs(teacher, x)
    assert found.samples == 13 and [(one.student, one.teacher) for one in found.layers] == [
        ("3", "3"),
        ("penultimate", "penultimate"),
        ("logits", "logits"),
    ]
    expected = [by_hand_cka(a[3].mean((2, 3)), b[3].mean((2, 3))), by_hand_cka(a[5], b[5]), by_hand_cka(a[6], b[6])]
    np.testing.assert_allclose([one.cka for one in found.layers], expected, rtol=1e-5)
    assert found.agreement == 100 * (a[6].argmax(1) == b[6].argmax(1)).double().mean()
    kls = [by_hand_kl(a[6].double().numpy(), b[6].double().numpy(), t) for t in (1.0, 4.0)]
    np.testing.assert_allclose([one.kl for one in found.divergence], kls, rtol=1e-5)
    assert [(one.name, one.count) for one in found.classes] == [("a", 7), ("b", 6), ("c", 0)]
    assert np.isnan(found.classes[2].lost) and found.worst_class_change == min(-one.lost for one in found.classes[:2])
    assert found.worst_class_accuracy[1] == min(one.teacher for one in found.classes[:2])

    other = evaluate(student, teacher, held, layers=[("1", "0"), ("6", "6")], temperatures=[2])
    pairs = [by_hand_cka(a[1].mean((2, 3)), b[0].mean((2, 3))), by_hand_cka(a[6], b[6])]
    np.testing.assert_allclose([one.cka for one in other.layers], pairs, rtol=1e-5)
    assert [one.temperature for one in other.divergence] == [2.0]


def test_a_student_that_is_its_teacher():
    made = network((3, 5), stages=("1", "3"))
    for stay in (made, network((3, 5), stages=("1", "3"))):
        found = evaluate(made, stay, batches())
        assert (found.agreement, found.worst_class_change, found.lost_most) == (100, 0, ())
        assert [one.kl for one in found.divergence] == [0, 0]
        assert found.exaggeration.slope == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose([one.cka for one in found.layers], 1, atol=1e-12)
        assert str(found.student) == str(found.teacher)  # NaN included


def test_lost_most_is_sorted_and_short():
    student, teacher, labels = (torch.tensor(x) for x in drawn(n=4001, classes=16, scale=1.0))
    found = metrics.class_accuracies(student, teacher, labels)
    whole = evaluate(nn.Identity(), Fixed(teacher), [(student, labels)])
    losses = sorted((one.lost for one in found if one.lost > 0), reverse=True)
    assert [one.lost for one in whole.lost_most] == losses[:10] and whole.worst_class_change < 0
    assert len(whole.exaggeration.points) == 300 and whole.layers[-1].student == "logits"


class Fixed(nn.Module):
    def __init__(self, given):
        super().__init__()
        self.given = given

    def forward(self, x):
        return self.given


def test_json_goes_there_and_back():
    student, teacher, labels = drawn(n=23)
    student[0, 0] = -np.inf
    found = evaluate(nn.Identity(), Fixed(torch.tensor(teacher)), [tensors((student, labels, labels))[:2]])
    text = json.dumps(found.as_json(), allow_nan=False)
    content = json.loads(text)
    assert content["divergence"][0]["kl"] is None and content["classes"][-1]["student"] is None
    assert content["worst_class_change"] == found.worst_class_change
    again = Evaluation.from_json(content)
    assert again.as_json() == content and again.exaggeration.points == found.exaggeration.points
    for change, message in (
        ({"samples": -1}, r"evaluation.samples must be a whole number >= 0, got -1"),
        ({"agreement": True}, r"evaluation.agreement must be a finite number or null, got True"),
        ({"agreement": 10**400}, r"evaluation.agreement must be a finite number or null"),
        ({"layers": 3}, r"evaluation.layers must be a list, got 3"),
        ({"layers": [{"student": "\ud800"}]}, r"evaluation.layers\[0\].student must be text"),
        ({"student": None}, r"evaluation.student must be an object, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            Evaluation.from_json({**content, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": 3}, "student must be a torch.nn.Module, got int"),
        ({"batches": []}, "batches must hold at least one sample, got none"),
        ({"temperatures": ()}, "temperatures must be one or more different numbers"),
        ({"temperatures": (2, 2.0)}, "temperatures must be one or more different numbers"),
        ({"temperatures": (0,)}, "temperatures must be a finite number > 0"),
        ({"layers": [("9", "1")]}, r"layers must name a path in student.named_modules\(\), which has no '9'"),
        ({"layers": ["11"]}, "layers must be pairs"),
        ({"class_names": "ab"}, "class_names must hold 3 names, got 2"),
        ({"teacher": nn.Sequential(nn.Flatten(), nn.Linear(16, 4))}, "as many classes, got 3 and 4"),
        ({"teacher": nn.Flatten(0)}, r"teacher must give logits \(b, classes\), got \(16,\)"),
        ({"batches": [(torch.zeros(1, 1, 4, 4), torch.tensor([3]))]}, r"labels must lie in \[0, 3\), got 3 to 3"),
        ({"batches": [(torch.zeros(1, 1, 4, 4), torch.tensor([0.0]))]}, "labels must be int64"),
        ({"batches": [(torch.full((1, 1, 4, 4), torch.nan), torch.tensor([0]))]}, "student must give logits that are"),
        ({"layers": [("6", "unused")]}, "the teacher's layer 'unused' was not passed"),
    ],
)
def test_bad_arguments(change, message):
    teacher = network((3, 5))
    teacher.register_module("unused", nn.Identity())
    teacher.forward = lambda x: nn.Sequential(*list(teacher)[:7])(x)
    arguments = {"student": network((3, 5)), "teacher": teacher, "batches": batches((1,)), **change}
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        evaluate(**arguments)


def test_wide_layers_are_refused():
    wide = nn.Sequential(nn.Conv2d(1, 513, 1), nn.Flatten(), nn.Linear(513 * 16, 3))
    with pytest.raises(ValueError, match="student's penultimate has 8208 features"):
        evaluate(wide, wide, batches((2,)))
    assert evaluate(wide, wide, batches((2,)), layers=[("0", "0")]).layers[0].cka == pytest.approx(1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_precisions_and_scripted_networks():
    made = network((3, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluate(made, made, batches()).agreement == 100
    scripted = torch.jit.script(made)
    assert [one.student for one in evaluate(made, scripted, batches()).layers] == ["logits"]


# --- kcd evaluate -----------------------------------------------------------------------------------------------------


def kcd(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Finished runs; not to be changed: `two` seeds with a teacher of their own, and beside it three that are one run each:
    `kd` of a teacher elsewhere, its `elsewhere`, and a student `alone`."""
    folder = tmp_path_factory.mktemp("home")
    shelf = folder / "shelf"
    elsewhere = folder / "far" / "elsewhere"
    assert kcd("distill", *SMALL, "--seeds", 2, "--seed", 5, "--output", folder / "two") == 0
    assert kcd("teacher", *SMALL, "--seed", 9, "--output", elsewhere) == 0
    assert kcd("distill", *SMALL, "--teacher", elsewhere, "--output", shelf / "kd") == 0
    assert kcd("distill", *SMALL, "--method", "ce", "--student", "cnn_small", "--output", shelf / "alone") == 0
    return folder


@pytest.fixture
def here(tmp_path, home, monkeypatch):
    """A copy of `home` to work in."""
    shutil.copytree(home, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def written(folder):
    return json.loads((folder / "evaluation.json").read_text())


def loaded(folder, name):
    made = models.build(name, in_channels=1, num_classes=10)
    made.load_state_dict(load_file(folder / "student.safetensors"))
    return made.eval()


def edited(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


class Page(html.parser.HTMLParser):
    """Tables, headings and references of a page, whose tags must be closed in order."""

    def __init__(self, path):
        super().__init__()
        self.open, self.rows, self.headings, self.references, self.ids, self.drawings = [], [], [], [], [], 0
        self.feed(path.read_text())
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))

    def handle_startendtag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        self.drawings += tag == "svg"
        if tag == "tr":
            self.rows.append([])
        if tag == "h2":
            self.headings.append("")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        tag = self.open[-1] if self.open else ""
        if tag in ("td", "th"):
            self.rows[-1].append(data)
        if tag == "h2":
            self.headings[-1] += data


SECTIONS = ("Reliability", "Accuracy by class", "Confidence of student and teacher", "Similarity of layers")


@pytest.fixture(scope="module")
def evaluated(home, tmp_path_factory):
    """What `kcd evaluate` has made of `two`; not to be changed."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(home / "two", folder / "two")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert kcd("evaluate", folder / "two", "--threads", 1) == 0
    (folder / "printed").write_text(printed.getvalue())
    return folder


def test_what_is_written_of_several_seeds(evaluated):
    data = load("digits").test
    x = data.views.plain(torch.from_numpy(data.images))
    teacher = loaded(evaluated / "two" / "teacher", "cnn_large")
    for seed in (5, 6):
        folder = evaluated / "two" / f"seed-{seed}"
        found, student = written(folder)["evaluation"], loaded(folder, "cnn_small")
        with torch.no_grad():
            s, t = (made(x).double().numpy() for made in (student, teacher))
        last = json.loads((folder / "summary.json").read_text())["results"][0]["accuracy_last"]
        assert found["student"]["accuracy"] == pytest.approx(last, abs=1e-4) and found["samples"] == len(s)
        assert found["agreement"] == pytest.approx(100 * np.mean(s.argmax(1) == t.argmax(1)))
        for one, temperature in zip(found["divergence"], (1, 4), strict=True):
            assert one["kl"] == pytest.approx(by_hand_kl(s, t, temperature), rel=1e-4)
        for role, logits in (("student", s), ("teacher", t)):
            assert found[role]["ece"] == pytest.approx(by_hand_ece(logits, data.labels)[0], abs=1e-3)
        rates = [100 * np.mean((s.argmax(1) == c)[data.labels == c]) for c in range(10)]
        assert [one["student"] for one in found["classes"]] == pytest.approx(rates)
        stages = min(len(student.stages), len(teacher.stages))
        pairs = [*zip(student.stages[-stages:], teacher.stages[-stages:], strict=True)]
        pairs += [("penultimate", "penultimate"), ("logits", "logits")]
        assert [(one["student"], one["teacher"]) for one in found["layers"]] == pairs
        # The student's last stage is averaged and goes into the classifier: one vector, two names.
        assert found["layers"][-3]["cka"] == pytest.approx(found["layers"][-2]["cka"], rel=1e-4)


def test_the_section_of_the_page(home, evaluated):
    before, page = (Page(folder / "two" / "report.html") for folder in (home, evaluated))
    assert not [heading for heading in before.headings if "valuation" in heading]
    assert [heading for heading in page.headings if heading not in before.headings] == [
        "Evaluation: the student beside its teacher",
        "Probabilities against the labels",
        *(f"{section}: kd" for section in SECTIONS),
    ]
    assert page.drawings == before.drawings + 4
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in page.references)
    table = next(i for i, row in enumerate(page.rows) if row[0] == "run")
    printed = (evaluated / "printed").read_text()
    for seed, row in zip((5, 6), page.rows[table + 1 : table + 3], strict=True):
        found = written(evaluated / "two" / f"seed-{seed}")["evaluation"]
        numbers = [found["student"]["accuracy"], found["teacher"]["accuracy"], found["agreement"]]
        kls = [f"{one['kl']:.4g}" for one in found["divergence"]]
        assert row[:6] == [f"kd, seed {seed}", *(f"{x:.2f}" for x in numbers), *kls]
        assert re.search(r" {2,}".join(map(re.escape, row[1:])), printed)


def test_later_reports_have_the_section_and_the_column(evaluated, tmp_path, monkeypatch, capfd):
    shutil.copytree(evaluated / "two", tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    agreements = [written(tmp_path / "two" / f"seed-{seed}")["evaluation"]["agreement"] for seed in (5, 6)]
    shown = f"{mean(agreements):.2f} ± {stdev(agreements):.2f}"
    before = Page(tmp_path / "two" / "report.html")
    for arguments, path in (
        (["distill", *SMALL, "--seeds", 2, "--seed", 5, "--output", "two", "--resume"], "two/report.html"),
        (["report", "two", "--output", "page.html"], "page.html"),
        (["evaluate", "two", "--threads", 1], "two/report.html"),  # once more takes the place of what there is
    ):
        assert kcd(*arguments) == 0
        out, page = capfd.readouterr().out, Page(tmp_path / path)
        assert [h for h in page.headings if h.startswith(SECTIONS)] == [f"{section}: kd" for section in SECTIONS]
        if arguments[0] == "evaluate":
            assert page.headings == before.headings and page.drawings == before.drawings
        else:
            row = next(dict(zip(page.rows[0], row, strict=True)) for row in page.rows if row[0] == "kd")
            assert row["agreement, %"] == shown and shown in out


def test_seeds_that_were_not_evaluated_are_told():
    def run(method, seed, agreement):
        found = None if agreement is None else dataclasses.replace(whole, agreement=agreement)
        return Summary(method, seed, 1.0, 1.0, 1, 1, 1.0, evaluation=found)

    student, teacher, labels = tensors(CASES["odd"])
    whole = evaluate(nn.Identity(), Fixed(teacher), [(student, labels)])
    table = cells([run("a", 0, 80.0), run("a", 1, 90.0), run("a", 2, None), run("b", 0, None), run("c", 0, 70.0)])
    assert [row[3] for row in table] == ["agreement, %", "85.00 ± 7.07 (2 of 3)", "-", "70.00"]
    assert "agreement" not in "".join(cells([run("a", 0, None), run("b", 0, None)])[0])
    assert "evaluation" not in run("a", 0, 80.0).as_json()


def test_a_teacher_elsewhere_is_found_and_a_student_alone_left_out(here, capfd):
    assert kcd("report", "shelf", "--output", "before.html") == 0
    assert "agreement" not in capfd.readouterr().out and "agreement" not in (here / "before.html").read_text()
    (here / "shelf" / "alone" / "report.html").unlink()
    assert kcd("evaluate", "shelf", "--threads", 1, "--layers", "0=2", "--temperatures", 3) == 0
    out = capfd.readouterr().out
    assert out.endswith("\nreport: shelf/kd/report.html\n") and not (here / "shelf" / "alone" / "report.html").exists()
    assert "left out: shelf/alone was distilled from no teacher: --teacher says whom" in out
    content = written(here / "shelf" / "kd")
    assert content["teacher_network"] == "cnn_large" and content["teacher_path"].endswith("far/elsewhere")
    assert [one["temperature"] for one in content["evaluation"]["divergence"]] == [3]
    assert [(one["student"], one["teacher"]) for one in content["evaluation"]["layers"]] == [("0", "2")]
    assert not (here / "shelf" / "alone" / "evaluation.json").exists() and not (here / "shelf" / "report.html").exists()
    assert "Reliability: kd" in Page(here / "shelf" / "kd" / "report.html").headings
    assert kcd("report", "shelf") == 0
    rows = {row[0]: row for row in Page(here / "report.html").rows[:3]}
    assert rows["method"][3] == "agreement, %" and rows["ce"][3] == "-"
    assert rows["kd"][3] == f"{content['evaluation']['agreement']:.2f}"


def test_a_run_without_a_teacher_is_compared_with_one_that_is_named(here, capfd):
    before = contents(here)
    assert kcd("evaluate", "shelf/alone") == 2
    out, error = capfd.readouterr()
    assert (out, error) == (
        "",
        "kcd: shelf/alone was distilled from no teacher: --teacher says whom to compare its student with\n",
    )
    assert contents(here) == before
    weights = here / "weights.safetensors"
    weights.write_bytes((here / "two" / "teacher" / "student.safetensors").read_bytes())
    (here / "shelf" / "alone" / "report.html").unlink()
    for more in (("two/teacher",), (weights, "--teacher-network", "cnn_large")):
        assert kcd("evaluate", "shelf/alone", "--threads", 1, "--teacher", *more) == 0
        assert written(here / "shelf" / "alone")["evaluation"]["agreement"] > 0
    page = Page(here / "shelf" / "alone" / "report.html")
    assert "Configuration" in page.headings and "Similarity of layers: ce" in page.headings


def test_a_run_of_before_its_config_said_where_the_teacher_is(here):
    def forget(content):
        del content["about"]["teacher_network"], content["about"]["teacher_path"]

    edited(here / "shelf" / "kd" / "config.json", forget)
    page = here / "shelf" / "kd" / "report.html"
    page.write_text(page.read_text().replace("<!--evaluations--><!--/evaluations-->", ""))  # older too
    assert kcd("evaluate", "shelf/kd", "--threads", 1) == 0
    assert "Reliability: kd" in Page(page).headings
    shutil.rmtree(here / "two" / "seed-6")
    edited(here / "two" / "seed-5" / "config.json", forget)
    (here / "two" / "seed-5").rename(here / "two" / "only")  # named itself, with its teacher beside it
    assert kcd("evaluate", "two/only", "--threads", 1) == 0
    assert Page(here / "two" / "only" / "report.html").rows


def other_weights(path):
    weights = load_file(path)
    first = next(iter(weights))
    save_file({**weights, first: weights[first] + 1}, path)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda here: other_weights(here / "two" / "teacher" / "student.safetensors"), ["two"], "has other weights"),
        (lambda here: shutil.rmtree(here / "two" / "teacher"), ["two"], "is not found, none is in "),
        (lambda here: None, ["two", "--teacher", "cnn_large"], "must be the folder of a trained run or a file"),
        (lambda here: None, ["two", "--teacher", "nowhere"], "unknown teacher 'nowhere'"),
        (lambda here: None, ["two", "--teacher", "two/seed-5", "--teacher-network", "cnn_large"], "are not of network"),
        (lambda here: None, ["two", "--teacher-network", "cnn_large"], "has no effect without teacher"),
        (
            lambda here: None,
            ["two", "--layers", "0"],
            "layers must be as STUDENT=TEACHER, a path in each network, got '0'",
        ),
        (lambda here: None, ["two", "--layers", "99=0"], "named_modules(), which has no '99'"),
        (lambda here: None, ["two", "--temperatures", "0"], "temperatures must be a finite number > 0, got 0.0"),
        (lambda here: None, ["two", "--device", "gpu"], "device"),
        (lambda here: None, ["two", "--threads", "0"], "threads must be"),
        (lambda here: None, [], "kcd evaluate needs the folder of a run at least"),
        (lambda here: None, ["far"], "nothing to evaluate: far/elsewhere was distilled from no teacher"),
        (lambda here: (here / "two/seed-6/student.safetensors").unlink(), ["two/seed-6"], "is no finished run"),
        (lambda here: (here / "two/seed-6/student.safetensors").write_text("x"), ["two"], "cannot be read as weights"),
        (
            lambda here: (here / "two/report.html").write_text("mine"),
            ["two"],
            "two/report.html is no page of kcd report",
        ),
        (
            lambda here: edited(here / "two/seed-6/config.json", lambda c: c.update(test_samples="0")),
            ["two"],
            "two/seed-6 was tested on other images than those that 'digits' holds now",
        ),
        (
            lambda here: edited(here / "two/seed-6/config.json", lambda c: c["about"]["data"].update(command="rm")),
            ["two"],
            "two/seed-6/config.json is damaged: data must not hold command='rm'",
        ),
        (
            lambda here: edited(here / "two/seed-6/config.json", lambda c: c["about"].update(teacher_path=[1])),
            ["two"],
            "two/seed-6/config.json is damaged: teacher_path must be text, got [1]",
        ),
        (
            lambda here: edited(here / "two/seed-6/config.json", lambda c: c["about"].pop("student")),
            ["two"],
            "two/seed-6/config.json does not say which network was trained",
        ),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(change, arguments, message, here, capfd):
    change(here)
    before = contents(here)
    assert kcd("evaluate", *arguments) == 2
    out, error = capfd.readouterr()
    assert (out, error.count("\n")) == ("", 1) and message in error
    assert contents(here) == before


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"evaluation": {"samples": 1}}'])
def test_a_damaged_evaluation_is_named(text, here, capfd):
    (here / "two" / "seed-6" / "evaluation.json").write_text(text)
    before = contents(here)
    for arguments in (["report", "two"], ["distill", *SMALL, "--seeds", 2, "--seed", 5, "--output", "two", "--resume"]):
        capfd.readouterr()
        assert kcd(*arguments) == 2
        error = capfd.readouterr().err.splitlines()[-1]
        assert error.startswith("kcd: two/seed-6/evaluation.json is damaged: ")
    assert contents(here).keys() == before.keys()
    assert kcd("evaluate", "two", "--threads", 1) == 0  # made anew
    assert written(here / "two" / "seed-6")["evaluation"]["samples"] > 0


def test_no_run_begins_beside_the_evaluation_of_another(here, capfd):
    (here / "fresh").mkdir()
    (here / "fresh" / "evaluation.json").write_text("{}")
    assert kcd("distill", *SMALL, "--teacher", "two/teacher", "--output", "fresh") == 2
    assert "output fresh holds a evaluation.json already" in capfd.readouterr().err
