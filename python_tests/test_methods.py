"""CE, KD, PKT, CRD and SSKD against formulas in float64 NumPy; taps, options and defaults."""

import copy
import inspect
import tempfile
from collections import Counter
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import Crew
from scipy import stats
from scipy.special import log_softmax, softmax
from small_runs import Samples
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kcd_ext import methods
from kcd_ext.methods import Batch, features, kd, pkt, selection
from kcd_ext.methods.features import Tap, unit_rows
from kcd_ext.methods.selection import select_batch_rows
from kcd_ext.methods.sskd import select_least_wrong
from kcd_ext.models.cnn import cnn

# The defaults, as published: KD in the recipe of KCD (Li et al., 2022), PKT and CRD in the comparison of RepDistiller
# (Tian et al., 2020), SSKD by its authors (Xu et al., 2020).
PUBLISHED = {
    "ce": {},
    "kd": {"temperature": 4, "kd_weight": 0.9, "ce_weight": 0.1},
    "pkt": {"ce_weight": 1, "pkt_weight": 30000},
    "crd": {
        "dimension": 128,
        "negatives": 16384,
        "temperature": 0.07,
        "momentum": 0.5,
        "ce_weight": 1,
        "crd_weight": 0.8,
    },
    "sskd": {
        "temperature": 4,
        "transformed_temperature": 4,
        "similarity_temperature": 0.5,
        "ce_weight": 0.1,
        "kd_weight": 0.9,
        "transformed_weight": 2.7,
        "similarity_weight": 10,
        "transformed_ratio": 1,
        "similarity_ratio": 0.75,
        "head_epochs": 60,
        "head_lr": 0.05,
        "head_milestones": (0.5, 0.75),
    },
    # From the authors' config/ie_kd.yaml and main.py. Other options are our own.
    "iekd": {
        "inheritance_weight": 1,
        "exploration_weight": 1,
        "factor_epochs": 30,
        "factor_lr": 0.1,
        "distance": "l1",
        "split": "natural",
    },
}
PARTLY_REBUILT = ("iekd",)
OUR_DEFAULTS = {
    "batch_keep": 1,
    "label_smoothing": 0,
    "standardize": False,
    "student_layer": None,
    "teacher_layer": None,
}  # not in the published code
SAMPLES, CLASSES, PIXELS = 23, 4, 5
OPTIONS = {"crd": {"dimension": 5, "negatives": 11}, "sskd": {"head_epochs": 2}}


pytestmark = pytest.mark.usefixtures("one_thread")


class LookupNetwork(nn.Module):
    """A network that looks up rows of features, so that their gradients can be compared with those of a formula."""

    def __init__(self, features, classes=CLASSES, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.features = nn.Parameter(torch.as_tensor(features, dtype=torch.float32))
            self.classifier = nn.Linear(self.features.shape[1], classes)

    def forward(self, x):
        return self.classifier(self.features[x])


class ImageNetwork(nn.Module):
    """A network for square images (b, 2, h, h). Its features are element-wise, so autocast leaves them in float32."""

    def __init__(self, seed, classes=CLASSES, normalised=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            width = 2 * PIXELS**2
            self.normalise = nn.BatchNorm2d(2) if normalised else nn.Identity()
            self.scale = nn.Parameter(torch.randn(width))
            self.classifier = nn.Linear(width, classes)

    def forward(self, x):
        return self.classifier((self.normalise(x).flatten(1) * self.scale).tanh())


def images():
    generator = torch.Generator().manual_seed(5)
    return Samples(torch.randn(SAMPLES, 2, PIXELS, PIXELS, generator=generator), torch.arange(SAMPLES) * 7 % CLASSES)


def maps(seed, width=4):
    """Return a network with maps in its layers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cnn(2, CLASSES, (width, 2 * width), (1, 2))


def prepared(name, options=None, student=None, teacher=None, samples=None):
    """Return a method with its networks, ready for the first batch."""
    samples, student, teacher = samples or images(), student or ImageNetwork(1), teacher or ImageNetwork(2)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        method = methods.build(name, {**OPTIONS.get(name, {}), **(options or {})})
        method.prepare(student, teacher, samples)
    return method, student, teacher.eval(), samples


def record_batch_sizes(network):
    """Return a list that collects the batch sizes of the network's forward passes."""
    sizes = []
    network.register_forward_hook(lambda _module, _inputs, out: sizes.append(len(out)))
    return sizes


def float64(x):
    return x.detach().double().numpy()


def assert_gradient(formula, values, found, rng, count=6, step=1e-5):
    """Compare `found` with finite differences of `formula` in float64, at a few coordinates."""
    for place in rng.choice(values.size, min(count, values.size), replace=False):
        h = step * max(np.abs(values.flat[place]), step * np.abs(values).max(), 1e-3 if values.any() else 1.0)
        up, down = values.copy(), values.copy()
        up.flat[place] += h
        down.flat[place] -= h
        expected = (formula(up) - formula(down)) / (2 * h)
        size = np.abs(found).max()
        np.testing.assert_allclose(found.flat[place], expected, rtol=2e-3, atol=2e-4 * size + 1e-12)


# --- formulas ---------------------------------------------------------------------------------------------------------


def cross_entropies(z, label):
    return -log_softmax(z, 1)[np.arange(len(z)), label]


def divergences(z, y, temperature):
    p = softmax(y / temperature, 1)
    return (p * (log_softmax(y / temperature, 1) - log_softmax(z / temperature, 1))).sum(1)


def entropies(z):
    p = softmax(z, 1)
    return -np.where(p > 0, p * log_softmax(z, 1), 0).sum(1)


def top_entropy_rows(z, keep):
    """Return the rows of highest entropy by a stable sort, so that ties go to the lower row."""
    return sorted(sorted(range(len(z)), key=lambda i: -entropies(z)[i])[: max(1, int(keep * len(z)))])


def directions(f):
    length = np.sqrt((f**2).sum(1, keepdims=True))
    return f / (length + 1e-7)


def pkt_formula(f, g):
    def probabilities(features):
        kernel = (directions(features) @ directions(features).T + 1) / 2
        return kernel / kernel.sum(1, keepdims=True)

    q, p = probabilities(f), probabilities(g)
    return (p * np.log((p + 1e-7) / (q + 1e-7))).mean()


# --- ce and kd --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["kernels", "reference"])
def kernels_and_reference(request, monkeypatch):
    """Run the test with the fused operators and with the reference that replaces them on devices without kernels."""
    if request.param == "reference":
        for module in (kd, selection):
            monkeypatch.setattr(module, "has_kernels_for", lambda logits: False)
        for name in ("condensed_kd_loss", "select_rows"):
            monkeypatch.delattr(kd if name == "condensed_kd_loss" else selection, name)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("name", "keep"), [("ce", 1.0), ("kd", 1.0), ("kd", 0.5), ("kd", 0.01)])
def test_ce_and_kd_match_float64_formula(name, keep, weighted, kernels_and_reference):
    rng = np.random.default_rng(0)
    z, y = (10 * rng.standard_normal((33, 7)).astype(np.float32) for _ in range(2))
    z[0, 0] = 500.0
    label, weight = np.arange(33) % 7, rng.uniform(0.5, 2, 33)
    weight[3] = 0
    student, teacher = (nn.Embedding.from_pretrained(torch.tensor(x), freeze=False) for x in (z, y))
    seen = record_batch_sizes(teacher)
    index = torch.arange(33)
    batch = Batch(index, torch.tensor(label), index, torch.tensor(weight).float() if weighted else None)
    outcome = methods.build(name, {} if keep == 1 else {"batch_keep": keep})(student, teacher, batch)

    rows = top_entropy_rows(z.astype(float), keep)
    z, y = z.astype(float), y.astype(float)

    def losses(z):
        if name == "ce":
            return cross_entropies(z, label)
        own = np.zeros(33)
        own[rows] = divergences(z, y, 4)[rows] * 33 / len(rows)
        return 0.1 * cross_entropies(z, label) + 0.9 * 16 * own

    def loss(z):
        return (losses(z) * (weight if weighted else 1)).mean()

    np.testing.assert_allclose(outcome.loss.item(), loss(z), rtol=1e-5)
    np.testing.assert_allclose(float64(outcome.value), entropies(z), rtol=1e-4, atol=1e-5)
    assert not outcome.value.requires_grad and torch.equal(outcome.logits, student.weight)
    assert not outcome.logits.requires_grad
    if weighted:
        np.testing.assert_allclose(float64(outcome.losses), losses(z), rtol=1e-5, atol=1e-5)
        assert not outcome.losses.requires_grad
    else:
        assert outcome.losses is None
    if name == "kd":
        np.testing.assert_allclose(outcome.terms["kl"].item(), divergences(z, y, 4)[rows].mean(), rtol=1e-5)
        assert seen == [max(1, int(33 * keep))] and not outcome.terms["kl"].requires_grad
        assert (outcome.kl is None) == (keep < 1)
        if keep == 1:
            np.testing.assert_allclose(float64(outcome.kl), divergences(z, y, 4), rtol=1e-5, atol=1e-6)
            assert not outcome.kl.requires_grad
    else:
        assert outcome.kl is None
    outcome.loss.backward()
    assert_gradient(loss, z, float64(student.weight.grad), rng)
    assert teacher.weight.grad is None


def test_selected_rows_match_plain_sort(kernels_and_reference):
    rng = np.random.default_rng(1)
    z = rng.standard_normal((37, 6)).astype(np.float32)
    z[[4, 9, 30]] = z[20]  # four rows tie
    z[[2, 35]] = np.nan  # NaN rows come first
    for keep in (0.03, 0.3, 0.5, 0.9):
        order = sorted(range(37), key=lambda i: -(np.inf if np.isnan(z[i, 0]) else entropies(z.astype(float))[i]))
        wide = torch.tensor(np.stack([z, 0 * z], 1)).requires_grad_()[:, 0]  # rows are not contiguous
        assert select_batch_rows(wide, keep).tolist() == sorted(order[: max(1, int(37 * keep))])
    assert select_batch_rows(torch.tensor(z), 1.0) is None


# --- pkt --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_pkt_matches_float64_formula(keep):
    rng = np.random.default_rng(2)
    f, g = rng.standard_normal((11, 6)), rng.standard_normal((11, 3))
    f[3] *= 1e25  # its square overflows float32
    f[4] *= 1e-3
    f[5], g[6] = 0, 0
    f, g = f.astype(np.float32).astype(float), g.astype(np.float32).astype(float)
    samples = Samples(torch.arange(11), torch.arange(11) % CLASSES)
    student, teacher = LookupNetwork(f), LookupNetwork(g)
    with torch.no_grad():
        student.classifier.weight.mul_(1e-25)  # keeps the logits finite
    method, *_ = prepared("pkt", {"batch_keep": keep}, student, teacher, samples)
    seen = record_batch_sizes(teacher)
    outcome = method(student, teacher, samples.at(range(11)))

    z = float64(student(torch.arange(11)))
    rows = top_entropy_rows(z, keep)
    ce = cross_entropies(z, float64(samples.label).astype(int)).mean()
    pkt = pkt_formula(f[rows], g[rows])
    np.testing.assert_allclose(outcome.terms["pkt"].item(), pkt, rtol=1e-4)
    np.testing.assert_allclose(outcome.loss.item(), ce + 30000 * pkt, rtol=1e-4)
    np.testing.assert_allclose(float64(outcome.value), entropies(z), rtol=1e-5)
    assert seen == [len(rows)]

    outcome.loss.backward()
    found = float64(student.features.grad)
    assert np.isfinite(found).all()
    classified = float64(student.classifier.weight)

    def loss(row, i):
        """The loss as a function of row i of the features."""
        changed = f.copy()
        changed[i] = row
        z = changed @ classified.T + float64(student.classifier.bias)
        return cross_entropies(z, float64(samples.label).astype(int)).mean() + 30000 * pkt_formula(
            changed[rows], g[rows]
        )

    for i in sorted({0, 3, 4, rows[-1]} - {5}):
        assert_gradient(lambda row, i=i: loss(row, i), f[i], found[i], rng)
    # A row of zeros has no direction: only the gradient of the cross entropy remains.
    np.testing.assert_allclose(found[5], 0, atol=1e-20)


def test_unit_rows_keeps_zeros_and_propagates_nan():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [torch.inf, 1.0], [torch.nan, 1.0], [1e-30, 0.0]], requires_grad=True)
    y = unit_rows(x)
    torch.testing.assert_close(y[0], torch.tensor([0.6, 0.8]))
    assert y[1].tolist() == [0, 0] and y[2].isnan().any() and y[3].isnan().all() and 0 < y[4, 0] < 1e-22
    assert unit_rows(x.bfloat16()).dtype == torch.float32 and unit_rows(x.double()).dtype == torch.float64
    exact = unit_rows(x, offset=0)
    exact[[0, 1, 4]].sum().backward()
    assert (
        exact[1].tolist() == [0, 0]
        and exact[4].tolist() == [1, 0]
        and exact[2].isnan().any()
        and exact[3].isnan().all()
    )
    assert x.grad[[0, 1, 4]].isfinite().all() and not x.grad[1].any()


# --- crd --------------------------------------------------------------------------------------------------------------


class Replay:
    """A replay of CRD in float64. It gathers the negatives' vectors, row by row."""

    def __init__(self, method, momentum=0.5, temperature=0.07):
        self.momentum, self.temperature, self.n = momentum, temperature, SAMPLES
        self.memory = [float64(method.student_memory)[:SAMPLES], float64(method.teacher_memory)[:SAMPLES]]
        self.z = None

    def scores(self, anchors, memory, index, negatives):
        """Return one array of scores per row, the positive first."""
        return [
            np.array([anchor @ memory[j] for j in (i, *drawn)]) / self.temperature
            for i, anchor, drawn in zip(index, anchors, negatives, strict=True)
        ]

    def constants(self, embeddings, index, negatives):
        both = [self.scores(e, m, index, negatives) for e, m in zip(embeddings, self.memory[::-1], strict=True)]
        return [np.exp(np.concatenate(rows)).mean() * self.n for rows in both]

    def loss(self, embeddings, index, negatives):
        """Return the published formula, without its 1e-7."""
        total = 0
        for anchors, memory, z in zip(embeddings, self.memory[::-1], self.z, strict=True):
            for row in self.scores(anchors, memory, index, negatives):
                p, noise = np.exp(row) / z, (len(row) - 1) / self.n
                total -= np.log(p[0] / (p[0] + noise)) + np.log(noise / (p[1:] + noise)).sum()
        return total / len(index)

    def update_memory(self, embeddings, index):
        for memory, rows in zip(self.memory, embeddings, strict=True):
            updated = {
                i: self.momentum * memory[i] + (1 - self.momentum) * row for i, row in zip(index, rows, strict=True)
            }
            for i, row in updated.items():
                memory[i] = row / np.sqrt((row**2).sum())


def embedded(features, layer):
    return directions(features @ float64(layer.weight).T + float64(layer.bias))


def crd_formula(replay, embeddings, which, features, bias, index, negatives, weight):
    """Return the loss as a function of one embedding's weight."""
    moved = list(embeddings)
    moved[which] = directions(features @ weight.T + bias)
    return replay.loss(moved, index, negatives)


class RecordedWrites(TorchDispatchMode):
    """A mode that records the indices that `index_copy_` writes to."""

    def __init__(self):
        super().__init__()
        self.indices = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index_copy_.default:
            self.indices.append(args[2].tolist())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_crd_matches_float64_replay_over_several_steps(keep):
    rng = np.random.default_rng(3)
    f, g = rng.standard_normal((SAMPLES, 6)), rng.standard_normal((SAMPLES, 3))
    f[2], f[8], g[5] = 0, 1e20 * f[8], 0
    samples = Samples(torch.arange(SAMPLES), torch.arange(SAMPLES) * 7 % CLASSES)
    student, teacher = LookupNetwork(f), LookupNetwork(g)
    with torch.no_grad():
        student.classifier.weight.mul_(1e-20)
        student.classifier.bias.copy_(torch.arange(4) / 2)
    method, *_ = prepared("crd", {"batch_keep": keep}, student, teacher, samples)
    replay, drawn, draw = Replay(method), [], method.draw_negatives
    method.draw_negatives = lambda label: drawn.append(draw(label)) or drawn[-1]
    f, g = float64(student.features), float64(teacher.features)
    # Padding, samples seen twice in a batch, extreme features, samples seen again later.
    batches = [[0, 1, 2, -1, 3, 8, 5], [8, 9, 8, 10, 5, 8, 0], [-1, -1, 7], [11, 12, 0, 13, 14], [-1, -1]]
    for step, index in enumerate(batches):
        # Repeated samples and padding get the features of other samples.
        x = np.array([i if i not in index[:place] and i >= 0 else 22 - place for place, i in enumerate(index)])
        batch = samples.at(index)._replace(x=torch.tensor(x))
        with RecordedWrites() as written:
            outcome = method(student, teacher, batch)
        assert len(written.indices) == 2
        for indices in written.indices:  # no row of the memory is written twice
            assert max(Counter(i for i in indices if i < SAMPLES).values(), default=1) == 1
        z = float64(student(batch.x))
        rows = [i for i in top_entropy_rows(z, keep) if index[i] >= 0]
        place = top_entropy_rows(z, keep)
        negatives = [drawn[-1][place.index(i)].tolist() for i in rows]
        index = [index[i] for i in rows]
        assert drawn[-1].shape == (len(place), 11)
        assert (samples.label[drawn[-1]] != batch.label[place, None]).all()
        embeddings = [
            embedded(h[x[rows]], layer) for h, layer in ((f, method.student_embedding), (g, method.teacher_embedding))
        ]
        if step == 0:
            replay.z = replay.constants(embeddings, index, negatives)
        np.testing.assert_allclose(float64(method.log_z), np.log(replay.z), rtol=1e-5)
        crd = replay.loss(embeddings, index, negatives) if rows else 0
        np.testing.assert_allclose(outcome.terms["crd"].item(), crd, rtol=1e-5)
        ce = cross_entropies(z, batch.label.numpy()).mean()
        np.testing.assert_allclose(outcome.loss.item(), ce + 0.8 * crd, rtol=1e-5)

        method.zero_grad()
        outcome.loss.backward()
        if step in (1, 3) and rows:  # not in the first step, which computes the constant Z
            for which, (h, layer) in enumerate(((f, method.student_embedding), (g, method.teacher_embedding))):
                loss = partial(
                    crd_formula, replay, embeddings, which, h[x[rows]], float64(layer.bias), index, negatives
                )
                assert_gradient(loss, float64(layer.weight), 1.25 * float64(layer.weight.grad), rng)
        replay.update_memory(embeddings, index)
        for name, memory in zip(("student_memory", "teacher_memory"), replay.memory, strict=True):
            np.testing.assert_allclose(float64(getattr(method, name))[:-1], memory, atol=1e-5)
            assert not getattr(method, name)[-1].any()
    assert torch.isfinite(student.features.grad).all() and student.features.grad.any()


def test_crd_draws_uniformly_from_other_classes():
    label = torch.tensor([2, 0, 2, 2, 5, 0, 2])  # unequal classes, some empty
    samples = Samples(torch.arange(7), label)
    table = np.ones((7, 2))
    method, *_ = prepared("crd", {"negatives": 40_000}, LookupNetwork(table, 6), LookupNetwork(table, 6), samples)
    memory = method.student_memory[:-1]
    width = (3 / 5) ** 0.5  # mean squared length 1
    assert memory.abs().max() <= width
    assert stats.kstest(memory.flatten().numpy(), "uniform", args=(-width, 2 * width)).pvalue > 1e-4
    torch.manual_seed(0)
    for own, drawn in zip(label[:5].tolist(), method.draw_negatives(label[:5]), strict=True):
        others = (label != own).nonzero().squeeze(1)
        counts = drawn.bincount(minlength=7)
        assert counts.sum() == counts[others].sum() == 40_000
        assert stats.chisquare(counts[others].numpy()).pvalue > 1e-4


def test_crd_is_finite_after_first_batch_of_padding():
    method, student, teacher, samples = prepared("crd")
    padding = samples.at([-1, -1, -1])
    outcome = method(student, teacher, padding)
    assert outcome.terms["crd"] == 0 and method.log_z.isfinite().all()
    z = method.log_z.clone()
    outcome = method(student, teacher, samples.at([3, -1, 4]))
    assert outcome.loss.isfinite() and outcome.terms["crd"] > 0 and torch.equal(method.log_z, z)


def test_crd_loads_no_samples_if_labels_are_in_memory():
    class InMemory(Samples):
        def __init__(self, x, label):
            super().__init__(x, label)
            self.labels, self.batches = label, 0

        def __iter__(self):
            for batch in super().__iter__():
                self.batches += 1
                yield batch

    loaded = images()
    in_memory = InMemory(loaded.x, loaded.label)
    from_batches, from_memory = (prepared("crd", samples=samples)[0] for samples in (loaded, in_memory))
    assert in_memory.batches == 1  # to probe the width of the features
    for one, two in zip(from_batches.buffers(), from_memory.buffers(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


def test_crd_refuses_one_class_and_unordered_samples():
    samples = Samples(torch.arange(5), torch.ones(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="of other classes, but all 5 samples have class 1"):
        prepared("crd", {}, LookupNetwork(np.ones((5, 2))), LookupNetwork(np.ones((5, 2))), samples)
    samples = [Batch(torch.arange(5), torch.arange(5), torch.tensor([0, 1, 3, 2, 4]))]
    with pytest.raises(ValueError, match="by ascending index"):
        prepared("crd", {}, LookupNetwork(np.ones((5, 2))), LookupNetwork(np.ones((5, 2))), samples)


# --- sskd -------------------------------------------------------------------------------------------------------------


def rotated_views(x):
    """Return views (b, 4, c, h, h): each image and its three rotations."""
    return np.stack([np.rot90(x, turns, (-2, -1)) for turns in range(4)], 1)


def output(network, x, scale=None):
    """Return logits and features of `ImageNetwork` for (..., c, h, h)."""
    features = np.tanh(x.reshape(*x.shape[:-3], -1) * (float64(network.scale) if scale is None else scale))
    return features @ float64(network.classifier.weight).T + float64(network.classifier.bias), features


def apply_head(head, features):
    hidden = np.maximum(features @ float64(head[0].weight).T + float64(head[0].bias), 0)
    return hidden @ float64(head[2].weight).T + float64(head[2].bias)


def cosines(embeddings):
    """Return the cosines (3 b, b) of embeddings (b, 4, d)."""
    e = embeddings / np.sqrt((embeddings**2).sum(-1, keepdims=True))
    return np.array([[e[i, turns] @ e[j, 0] for j in range(len(e))] for i in range(len(e)) for turns in (1, 2, 3)])


def least_wrong_by_loop(score, truth, ratio):
    levels = [sum(other > row[true] for other in row) for row, true in zip(score, truth, strict=True)]
    wrong = sorted((level, i) for i, level in enumerate(levels) if level)
    return sorted([i for i, level in enumerate(levels) if not level] + [i for _, i in wrong[: int(len(wrong) * ratio)]])


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_sskd_matches_float64_formula(keep, kernels_and_reference):
    rng = np.random.default_rng(4)
    options = {
        "batch_keep": keep,
        "transformed_ratio": 0.5,
        "similarity_ratio": 0.6,
        "similarity_temperature": 0.3,
        "transformed_temperature": 3.0,
    }
    method, student, teacher, samples = prepared("sskd", options)
    passes = record_batch_sizes(student), record_batch_sizes(teacher)
    index = [3, -1, 20, 7, 8, 22, 1, 0, 5]
    batch = samples.at(index)
    outcome = method(student, teacher, batch)

    label = batch.label.numpy()
    views = rotated_views(float64(batch.x))
    z, features = output(student, views)
    rows = top_entropy_rows(z[:, 0], keep)
    y, target_features = output(teacher, views[rows])
    similarity = cosines(apply_head(method.teacher_head, target_features))
    truth = np.repeat(label[rows], 3)
    y_tf = y[:, 1:].reshape(-1, CLASSES)
    tf_rows = least_wrong_by_loop(y_tf, truth, 0.5)
    ss_rows = least_wrong_by_loop(similarity, np.arange(3 * len(rows)) // 3, 0.6)
    assert 0 < len(tf_rows) < 3 * len(rows) and 0 < len(ss_rows) < 3 * len(rows)

    def parts(z, features):
        return (
            cross_entropies(z[:, 0], label).mean(),
            divergences(z[rows, 0], y[:, 0], 4).mean(),
            divergences(z[rows, 1:].reshape(-1, CLASSES), y_tf, 3)[tf_rows].mean(),
            divergences(cosines(apply_head(method.student_head, features[rows])), similarity, 0.3)[ss_rows].mean(),
        )

    def loss(ce, kl, tf, ss):
        return 0.1 * ce + 0.9 * 16 * kl + 2.7 * 9 * tf + 10 * 0.09 * ss

    expected = parts(z, features)
    np.testing.assert_allclose(
        [outcome.terms[name].item() for name in ("kl", "transformed", "similarity")], expected[1:], rtol=1e-4
    )
    np.testing.assert_allclose(outcome.loss.item(), loss(*expected), rtol=1e-5)
    np.testing.assert_allclose(float64(outcome.value), entropies(z[:, 0]), rtol=1e-5)
    np.testing.assert_allclose(float64(outcome.logits), z[:, 0], rtol=1e-4, atol=1e-5)
    assert passes == ([4 * 9], [4 * len(rows)])

    outcome.loss.backward()
    assert_gradient(
        lambda scale: loss(*parts(*output(student, views, scale))),
        float64(student.scale),
        float64(student.scale.grad),
        rng,
    )
    assert all(p.grad is None for p in (*teacher.parameters(), *method.teacher_head.parameters()))
    assert all(p.grad is not None for p in method.student_head.parameters())


def test_sskd_pretraining_trains_only_the_teachers_head():
    method, _, teacher, samples = prepared("sskd", {"head_epochs": 6, "head_lr": 0.1, "head_milestones": [0.5]})
    (plan,) = method.pretraining()
    assert plan.part is method.teacher_head and (plan.epochs, plan.lr, plan.milestones) == (6, 0.1, (0.5,))
    before = copy.deepcopy(teacher.state_dict())
    optimizer, losses = torch.optim.SGD(plan.part.parameters(), plan.lr, momentum=0.9), []
    for _ in range(plan.epochs):
        for batch in samples:
            loss = plan.loss(teacher, batch)
            _, features = output(teacher, rotated_views(float64(batch.x)))
            similarity = cosines(apply_head(plan.part, features))
            expected = cross_entropies(similarity, np.arange(len(similarity)) // 3).mean()
            np.testing.assert_allclose(loss.item(), expected, rtol=1e-5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(torch.equal(before[name], x) for name, x in teacher.state_dict().items())
    assert all(p.grad is None for p in (*teacher.parameters(), *method.student_head.parameters()))


@pytest.mark.parametrize(
    ("given", "milestones"),
    [([0.5, 1], (0.5, 1)), (0.25, (0.25,)), ("0.5, 0.75", (0.5, 0.75)), ("1", (1,)), ("", ()), ((), ())],
)
def test_milestones_are_read_from_numbers_and_text(given, milestones):
    assert methods.build("sskd", {"head_milestones": given}).head_milestones == milestones


def test_select_least_wrong_matches_plain_loop():
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 7, 40):
        for ratio in (0.0, 0.29, 0.75, 1.0):
            score = torch.randint(0, 4, (rows, 9), generator=generator).float()  # with ties within and between rows
            truth = torch.randint(0, 9, (rows,), generator=generator)
            selected, number = select_least_wrong(score, truth, ratio)
            expected = least_wrong_by_loop(score.numpy(), truth.numpy(), ratio)
            assert selected.nonzero().squeeze(1).tolist() == expected and number == len(expected)
    score[5, truth[5]] = torch.nan
    assert select_least_wrong(score, truth, 0.0)[0][5]


def test_sskd_term_is_zero_without_selected_rows_and_propagates_nan():
    method, student, teacher, samples = prepared("sskd", {"transformed_ratio": 0.0, "similarity_ratio": 0.0})
    with torch.no_grad():  # a teacher that is always wrong
        teacher.classifier.weight.zero_()
        teacher.classifier.bias.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    batch = samples.at([4, 8, 12])
    assert 1 not in batch.label
    outcome = method(student, teacher, batch)
    assert outcome.terms["transformed"] == 0 and outcome.loss.isfinite()
    with torch.no_grad():
        teacher.classifier.bias[0] = torch.nan
    assert method(student, teacher, batch).loss.isnan()


def test_sskd_refuses_inputs_that_are_not_square_images():
    for shape in ((SAMPLES, 2, 5, 6), (SAMPLES, 10)):
        samples = Samples(torch.zeros(shape), torch.arange(SAMPLES) % CLASSES)
        with pytest.raises(ValueError, match="x must be square images"):
            prepared("sskd", samples=samples)


# --- taps -------------------------------------------------------------------------------------------------------------


class ConvHead(nn.Module):
    """A convolutional head with features of four dimensions; normalisation, dropout, and optionally an unused linear layer."""

    def __init__(self, unused=False):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5))
        self.head = nn.Conv2d(3, CLASSES, PIXELS - 2)
        if unused:
            self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.body(x)).flatten(1)


@pytest.mark.parametrize("name", ["pkt", "crd", "sskd"])
def test_features_of_four_dimensions_are_flattened(name):
    """The student has dropout, normalisation and a convolutional head. `prepare` leaves its state unchanged."""
    student, teacher = ConvHead(), ImageNetwork(2, normalised=True).eval()
    before = copy.deepcopy((student.state_dict(), teacher.state_dict()))
    method, _, _, samples = prepared(name, {"student_layer": "head"}, student, teacher)
    assert (method.student_width, method.teacher_width) == (27, 50)
    for network, state in zip((student, teacher), before, strict=True):
        assert all(torch.equal(x, state[key]) for key, x in network.state_dict().items())
    method(student, teacher, samples.at([1, 2, 3])).loss.backward()
    assert student.body[0].weight.grad.isfinite().all() and student.body[0].weight.grad.any()


def test_tap_defaults_to_last_linear_layer():
    network, x = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.ReLU(), nn.Linear(5, 3))), torch.randn(2, 6)
    hidden = network[0](x)
    for path, expected in ((None, hidden.relu()), ("", hidden.relu()), ("1", hidden), ("0", x)):
        tap = Tap(network, path, "student")
        assert torch.equal(tap.run(network, x)[1], expected)
        tap.remove()


def test_tap_error_names_missing_or_unused_layer():
    for option, networks in (
        ("student_layer", (ConvHead(), ImageNetwork(0))),
        ("teacher_layer", (ImageNetwork(0), ConvHead())),
    ):
        with pytest.raises(ValueError, match=f"no torch.nn.Linear.*set {option}"):
            prepared("pkt", {}, *networks)
    with pytest.raises(ValueError, match=r"teacher_layer must be a name in .* no 'fc'"):
        prepared("pkt", {"teacher_layer": "fc"})
    with pytest.raises(RuntimeError, match=r"student's layer 'unused' did not run .* set student_layer"):
        prepared("pkt", {}, ConvHead(unused=True))
    with pytest.raises(TypeError, match="student_layer must be a name in named_modules"):
        methods.build("pkt", {"student_layer": 3})


def test_tap_captures_nothing_between_pop_and_listen():
    network = maps(1)
    tap = Tap(network, "0", "student", output=True)
    x = images().x
    tap.listen()
    network(x)
    assert tap.pop_map().shape == (SAMPLES, 4, PIXELS, PIXELS) and tap._capture.features is None
    network(x)  # like a validation
    assert tap._capture.features is None
    tap.remove()


@pytest.mark.parametrize("inference", [False, True])
def test_tap_refuses_features_changed_in_place(inference):
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, CLASSES))
    tap = Tap(network, "0", "student", output=True)
    tap.listen()
    with torch.inference_mode(inference):
        network(images().x)
    if inference:  # torch counts no changes in inference mode; no method trains in it
        assert tap.pop_map().min() == 0
        return
    with pytest.raises(RuntimeError, match=r"student's layer '0' had its features changed in place .* inplace=False"):
        tap.pop_map()
    tap = Tap(network, "1", "student", output=True)
    network(images().x)
    assert tap.pop_map().min() == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_tap_refuses_torchscript():
    x = images().x
    scripted_networks = torch.jit.script(ImageNetwork(2)), torch.jit.trace(ImageNetwork(2), x)
    inside = [nn.Sequential(network) for network in scripted_networks]
    for path, networks in ((None, scripted_networks), ("0.classifier", inside)):
        for network in networks:
            with pytest.raises(
                ValueError,
                match=r"the teacher must be a torch.nn.Module .*, got TorchScript .* no hooks",
            ):
                Tap(network, path, "teacher")
    scripted = methods.build("kd")(
        ImageNetwork(1), scripted_networks[0].eval(), images().at([1, 2])
    )  # KD needs no hook
    plain = methods.build("kd")(ImageNetwork(1), ImageNetwork(2).eval(), images().at([1, 2]))
    torch.testing.assert_close(scripted.loss, plain.loss)


def test_tap_works_without_gradients_and_under_torch_compile():
    network, x = ImageNetwork(0), images().x
    tap = Tap(network, None, "student")
    expected = (x.flatten(1) * network.scale).tanh()
    with torch.no_grad():
        _, features = tap.run(network, x)
    assert torch.equal(features, expected) and not features.requires_grad
    with pytest.raises(RuntimeError, match="did not run"):
        tap.pop()
    network(x)  # like a validation: a later run must not return these features
    with pytest.raises(RuntimeError, match="did not run"):
        tap.run(nn.Flatten(), x)
    compiled = torch.compile(network, backend="aot_eager")
    for part in (x, x[:5] + 1, x[:5] + 2):
        logits, features = tap.run(compiled, part)
        torch.testing.assert_close(features, (part.flatten(1) * network.scale).tanh())
        torch.testing.assert_close(logits, network.classifier(features))
        network.zero_grad()
        features.sum().backward()
        slope = network.scale.grad.clone()
        network.zero_grad()
        (part.flatten(1) * network.scale).tanh().sum().backward()
        torch.testing.assert_close(slope, network.scale.grad)
    tap.remove()


# --- all --------------------------------------------------------------------------------------------------------------


def test_crd_recomputes_log_z_after_loading_initial_state():
    method, student, teacher, samples = prepared("crd")
    saved = copy.deepcopy(method.state_dict())
    method(student, teacher, samples.at([1, 2]))
    method.load_state_dict(saved)
    assert method(student, teacher, samples.at([1, 2])).loss.isfinite()


@pytest.mark.parametrize("name", ["pkt", "crd", "sskd"])
def test_similarities_stay_float32_under_autocast(name):
    found = []
    for enabled in (False, True):
        method, student, teacher, samples = prepared(name)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outcome = method(student, teacher, samples.at([1, 2, 3, 4, 5]))
        assert outcome.logits.dtype == (torch.bfloat16 if enabled else torch.float32)
        outcome.loss.backward()
        found.append(outcome.terms[{"sskd": "similarity"}.get(name, name)])
    assert found[0] == found[1] != 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults_match_published_values(name):
    method = methods.build(name)
    options = inspect.signature(type(method)).parameters
    if name in PARTLY_REBUILT:
        assert {option: getattr(method, option) for option in PUBLISHED[name]} == PUBLISHED[name]
        return
    assert {option: getattr(method, option) for option in options if option not in OUR_DEFAULTS} == PUBLISHED[name]
    assert all(getattr(method, option) == OUR_DEFAULTS[option] for option in options if option in OUR_DEFAULTS)
    assert all(options[option].default == value for option, value in PUBLISHED[name].items())


def test_constants_match_published_values():
    assert pkt.EPSILON == features.LENGTH_OFFSET == 1e-7


class TypedOptions(kd.KnowledgeDistillation):
    def __init__(
        self, plain=1, scale: "float" = 1.0, on: "bool" = True, anything: object = None, layer: "str | None" = None
    ):
        super().__init__()


class UnresolvedAnnotation(kd.KnowledgeDistillation):
    def __init__(self, scale: "NotThere" = 1.0):  # noqa: F821
        super().__init__()


def test_text_options_are_converted_by_annotation():
    read = partial(methods.convert_options, f"{__name__}:TypedOptions")
    assert read({"plain": "2", "scale": "2.5", "on": "false"}) == {"plain": 2, "scale": 2.5, "on": False}
    assert read({"plain": "x", "anything": "True", "layer": "1.10"}) == {
        "plain": "x",
        "anything": True,
        "layer": "1.10",
    }
    assert read({"scale": 3, "other": "4"}) == {"scale": 3, "other": 4}
    assert methods.convert_options(f"{__name__}:UnresolvedAnnotation", {"scale": "2"}) == {"scale": 2}
    assert methods.convert_options("sskd", {"head_epochs": "2.5", "head_milestones": "0.5,1"}) == {
        "head_epochs": 2.5,
        "head_milestones": "0.5,1",
    }


def test_build_error_lists_valid_options():
    with pytest.raises(
        TypeError,
        match=r"method 'kd' has no option 'temprature': did you mean temperature\? It takes temperature, kd_weight, ce_w",
    ):
        methods.build("kd", {"temprature": 4})
    with pytest.raises(TypeError, match="method 'ce' has no option 'batch_keep'; it takes label_smoothing"):
        methods.build("ce", {"batch_keep": 0.5})
    with pytest.raises(TypeError, match="Method, got Counter"):
        methods.build("collections:Counter", {"of": 1})  # Counter takes any keyword


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("kd", {"temperature": 0}, ValueError, "temperature must be a finite number > 0, got 0"),
        ("crd", {"temperature": float("inf")}, ValueError, "temperature must be a finite number > 0, got inf"),
        ("sskd", {"temperature": "4"}, TypeError, "temperature must be a finite number > 0, got str '4'"),
        ("kd", {"ce_weight": float("nan")}, ValueError, "ce_weight must be a finite number, got nan"),
        ("kd", {"batch_keep": 0}, ValueError, r"batch_keep must be a number in \(0, 1\], got 0"),
        ("pkt", {"batch_keep": 1.5}, ValueError, r"batch_keep must be a number in \(0, 1\], got 1.5"),
        ("pkt", {"pkt_weight": "1"}, TypeError, "pkt_weight must be a finite number, got str '1'"),
        ("crd", {"dimension": 0}, ValueError, "dimension must be an integer >= 1, got 0"),
        ("iekd", {"temperature": 2}, ValueError, "temperature=2 has no effect with kd_weight=0"),
        ("kr", {"temperature": 2}, ValueError, "temperature=2 has no effect with kd_weight=0"),
        ("iekd", {"split_seed": 1}, ValueError, "split_seed=1 has no effect with split='natural'"),
        ("ie-dml", {"split_seed": 1}, ValueError, "split_seed=1 has no effect with split='natural'"),
        ("crd", {"negatives": 2.0}, TypeError, "negatives must be an integer >= 1, got float 2.0"),
        ("crd", {"momentum": 1.1}, ValueError, r"momentum must be a number in \[0, 1\], got 1.1"),
        (
            "sskd",
            {"similarity_temperature": 0},
            ValueError,
            "similarity_temperature must be a finite number > 0, got 0",
        ),
        ("sskd", {"transformed_ratio": -0.1}, ValueError, r"transformed_ratio must be a number in \[0, 1\], got -0.1"),
        ("sskd", {"head_epochs": 0}, ValueError, "head_epochs must be an integer >= 1, got 0"),
        ("sskd", {"head_milestones": [2]}, ValueError, r"head_milestones must be fractions of head_epochs in \[0, 1\]"),
        (
            "sskd",
            {"head_milestones": -0.5},
            ValueError,
            r"head_milestones must be fractions of head_epochs in \[0, 1\]",
        ),
        ("sskd", {"head_milestones": "0.5,x"}, ValueError, "head_milestones must be fractions .* got '0.5,x'"),
        ("sskd", {"head_milestones": "0.5,1.5"}, ValueError, "head_milestones must be fractions .* got 1.5"),
        ("sskd", {"head_milestones": None}, TypeError, "head_milestones must be fractions .* got None"),
    ],
)
def test_invalid_option_is_refused(name, options, error, message):
    with pytest.raises(error, match=message):
        methods.build(name, options)


# --- several ranks ------------------------------------------------------------------------------------------------

WORLD = 2
BATCHES = [[[0, 1, 2], [3, 4, 5]], [[6, 2, 7], [8, -1, -1]], [[-1, 9, 9], [2, 10, 11]]]  # [step][rank]


def _run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    torch.manual_seed(rank)  # so that each rank draws its own numbers
    samples, student, teacher = images(), ImageNetwork(1), ImageNetwork(2)
    method = methods.build("crd", OPTIONS["crd"])
    method.prepare(student, teacher, samples)
    with torch.no_grad():  # as the trainer does
        for parameter in method.parameters():
            dist.broadcast(parameter, 0)
    record = {"before": {k: x.clone() for k, x in method.state_dict().items()}, "drawn": [], "losses": []}
    draw = method.draw_negatives
    method.draw_negatives = lambda label: record["drawn"].append(draw(label)) or record["drawn"][-1]
    for step in BATCHES:
        record["losses"].append(method(student, teacher, samples.at(step[rank])).terms["crd"])
    torch.save({**record, "after": method.state_dict()}, folder / f"{rank}.pt")
    dist.barrier()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_crd_memory_holds_rows_of_both_ranks():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        assert Crew(lambda rank: _run_rank(rank, folder), WORLD).wait() == [0] * WORLD
        ranks = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    for moment in ("before", "after"):
        for key, x in ranks[0][moment].items():
            assert x.equal(ranks[1][moment][key]) or (key, moment) == ("log_z", "before"), (moment, key)
    assert not ranks[0]["drawn"][0].equal(ranks[1]["drawn"][0])

    method, student, teacher, samples = prepared("crd")
    method.load_state_dict(ranks[0]["before"])
    replay = Replay(method)
    for step, batches in enumerate(BATCHES):
        rows = [[i for i, index in enumerate(indices) if index >= 0] for indices in batches]
        index = [[indices[i] for i in own] for indices, own in zip(batches, rows, strict=True)]
        negatives = [rank["drawn"][step][own].tolist() for rank, own in zip(ranks, rows, strict=True)]
        embeddings = [
            [
                embedded(output(network, float64(samples.x[own]))[1], layer)
                for network, layer in ((student, method.student_embedding), (teacher, method.teacher_embedding))
            ]
            for own in index
        ]
        both = [np.concatenate(parts) for parts in zip(*embeddings, strict=True)]
        if step == 0:
            replay.z = replay.constants(both, [*chain(*index)], [*chain(*negatives)])
        for rank, own, indices, drawn in zip(ranks, embeddings, index, negatives, strict=True):
            np.testing.assert_allclose(rank["losses"][step], replay.loss(own, indices, drawn), rtol=1e-5)
        replay.update_memory(both, [*chain(*index)])
    np.testing.assert_allclose(float64(ranks[0]["after"]["log_z"]), np.log(replay.z), rtol=1e-5)
    for name, memory in zip(("student_memory", "teacher_memory"), replay.memory, strict=True):
        np.testing.assert_allclose(float64(ranks[0]["after"][name])[:-1], memory, atol=1e-5)
