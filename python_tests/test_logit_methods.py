"""DKD, DIST and standardised logits against their formulas, literally and in many digits; extreme logits and gradients."""

import inspect

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import log_softmax, softmax
from small_runs import Samples, network
from torch import nn

from kcd_ext import methods
from kcd_ext.methods import Batch, kd
from kcd_ext.methods.dist import correlations
from kcd_ext.methods.dkd import decoupled_divergences

pytestmark = pytest.mark.usefixtures("one_thread")

PUBLISHED = {  # mdistiller's for DKD, those of the authors' DIST
    "dkd": {"temperature": 4, "ce_weight": 1, "alpha": 1, "beta": 8, "warmup": 20},
    "dist": {"temperature": 1, "ce_weight": 1, "beta": 1, "gamma": 1},
}
OURS = {"batch_keep": 1, "label_smoothing": 0, "standardize": False}
ROWS, CLASSES = 17, 5


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults_match_published_values(name):
    options = inspect.signature(type(methods.build(name))).parameters
    assert {option: parameter.default for option, parameter in options.items()} == PUBLISHED[name] | OURS


def batch_of(z, y, seed=0, weighted=False):
    """Return trainable logits of a student, constant ones of a teacher, and a batch that looks them up."""
    student, teacher = (nn.Embedding.from_pretrained(torch.tensor(x), freeze=False) for x in (z, y))
    index = torch.arange(len(z))
    weight = torch.tensor(np.random.default_rng(seed).uniform(0, 2, len(z)), dtype=torch.float32)
    return student, teacher, Batch(index, index * 7 % z.shape[1], index, weight if weighted else None)


def logits(seed, scale=3.0):
    rng = np.random.default_rng(seed)
    return [scale * rng.standard_normal((ROWS, CLASSES)) for _ in range(2)]


def top_entropy_rows(z, keep):
    entropies = [stats.entropy(p) for p in softmax(z, 1)]
    return sorted(np.argsort([-x for x in entropies], kind="stable")[: max(1, int(keep * len(z)))])


def cross_entropies(z, label, smoothing=0.0):
    target = np.eye(z.shape[1])[label] * (1 - smoothing) + smoothing / z.shape[1]
    return -(target * log_softmax(z, 1)).sum(1)


def exact_decoupled(z, y, target, temperature):
    """Return TCKD, NCKD and KL of one row by their definition, in 1000 digits."""
    with mpmath.workdps(1000):
        both = []
        for row in (z, y):
            exponentials = [mpmath.e ** (mpmath.mpf(float(x)) / temperature) for x in row]
            both.append([x / sum(exponentials) for x in exponentials])
        q, p = both
        q_rest, p_rest = (sum(x for i, x in enumerate(row) if i != target) for row in both)
        tckd = p[target] * mpmath.log(p[target] / q[target]) + p_rest * mpmath.log(p_rest / q_rest)
        nckd = sum(p[i] / p_rest * mpmath.log((p[i] / p_rest) / (q[i] / q_rest)) for i in range(len(p)) if i != target)
        kl = sum(a * mpmath.log(a / b) for a, b in zip(p, q, strict=True))
        return float(tckd), float(nckd), float(kl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 30.0, 3000.0])
def test_decoupled_divergences_match_definition_on_confident_logits(scale, dtype):
    """At scale 3000 most probabilities underflow, and mdistiller's loss is NaN."""
    z, y = (torch.tensor(x).to(dtype) for x in logits(1, scale))
    label = torch.arange(ROWS) * 7 % CLASSES
    z.requires_grad_()
    found = decoupled_divergences(z, y, label, 4.0)
    expected = [exact_decoupled(*rows, t, 4) for *rows, t in zip(z.tolist(), y.tolist(), label.tolist(), strict=True)]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for part, exact in zip(found, zip(*expected, strict=True), strict=True):
        np.testing.assert_allclose(part.detach().numpy(), exact, rtol=tolerance, atol=tolerance * scale / 10)
        assert part.dtype == dtype
    assert not found[2].requires_grad
    sum(found).sum().backward()
    assert z.grad.isfinite().all() and z.grad.any()


def test_decoupled_divergences_skip_masked_classes():
    """A class that both networks mask with -inf adds nothing, neither to the loss nor to the gradient."""
    z, y = (torch.tensor(x) for x in logits(3))
    label = torch.arange(ROWS) % (CLASSES - 1)
    plain = [x[:, :-1].clone().requires_grad_() for x in (z, y)]
    masked = [torch.cat([x[:, :-1], torch.full((ROWS, 1), -torch.inf)], 1).requires_grad_() for x in (z, y)]
    for one, other in zip(*(decoupled_divergences(*x, label, 4.0) for x in (plain, masked)), strict=True):
        torch.testing.assert_close(one, other)
        if not one.requires_grad:
            continue
        one.sum().backward(retain_graph=True), other.sum().backward(retain_graph=True)
    torch.testing.assert_close(plain[0].grad, masked[0].grad[:, :-1])
    assert masked[0].grad[:, -1].eq(0).all() and masked[1].grad is None
    with pytest.raises(ValueError, match=r"dkd compares at least two classes, got logits of shape \(17, 1\)"):
        decoupled_divergences(z[:, :1], y[:, :1], label * 0, 4.0)


@pytest.mark.parametrize(("keep", "weighted"), [(1.0, False), (0.4, False), (1.0, True), (0.4, True)])
def test_dkd_matches_formula(keep, weighted):
    z, y = logits(4)
    student, teacher, batch = batch_of(z, y, weighted=weighted)
    options = {"temperature": 2, "ce_weight": 0.7, "alpha": 1.5, "beta": 3, "label_smoothing": 0.2, "batch_keep": keep}
    method = methods.build("dkd", options)
    method.begin(4, 240)  # the fifth epoch of 20 that warm up
    outcome = method(student, teacher, batch)

    label, rows = batch.label.numpy(), top_entropy_rows(z, keep)
    parts = np.array([exact_decoupled(z[i], y[i], label[i], 2) for i in range(ROWS)])
    own = np.zeros(ROWS)
    own[rows] = (0.25 * 4 * parts @ [1.5, 3, 0])[rows] * ROWS / len(rows)
    losses = 0.7 * cross_entropies(z, label, 0.2) + own
    weight = batch.weight.double().numpy() if weighted else np.ones(ROWS)
    np.testing.assert_allclose(outcome.loss.item(), (losses * weight).mean(), rtol=1e-7)
    np.testing.assert_allclose(outcome.value.numpy(), [stats.entropy(p) for p in softmax(z, 1)], rtol=1e-7)
    for name, exact in zip(("tckd", "nckd", "kl"), parts[rows].mean(0), strict=True):
        np.testing.assert_allclose(outcome.terms[name].item(), exact, rtol=1e-7)
    if keep == 1:
        np.testing.assert_allclose(outcome.kl.numpy(), parts[:, 2], rtol=1e-7)
    else:
        assert outcome.kl is None
    if weighted:
        np.testing.assert_allclose(outcome.losses.numpy(), losses, rtol=1e-7)


def test_ramp_is_a_function_of_the_epoch():
    for name in ("dkd", "reviewkd"):
        for warmup, expected in ((20, [0.05, 0.5, 1, 1]), (0, [1, 1, 1, 1]), (1, [1, 1, 1, 1])):
            method, found = methods.build(name, {"warmup": warmup}), []
            for epoch in (0, 9, 19, 100):
                method.begin(epoch, 240)
                found.append(method.ramp)
            assert found == expected, (name, warmup)


@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_dist_matches_formula(keep):
    z, y = logits(5)
    student, teacher, batch = batch_of(z, y)
    options = {"temperature": 3, "ce_weight": 0.7, "beta": 1.5, "gamma": 2, "batch_keep": keep}
    outcome = methods.build("dist", options)(student, teacher, batch)
    rows = top_entropy_rows(z, keep)
    q, p = softmax(z / 3, 1)[rows], softmax(y / 3, 1)[rows]
    inter, intra = (
        1 - np.mean([stats.pearsonr(*pair).statistic for pair in zip(a, b, strict=True)])
        for a, b in ((q, p), (q.T, p.T))
    )
    loss = 0.7 * cross_entropies(z, batch.label.numpy()).mean() + 9 * (1.5 * inter + 2 * intra)
    np.testing.assert_allclose(outcome.loss.item(), loss, rtol=1e-5)  # 1e-8 in the denominators
    np.testing.assert_allclose(outcome.terms["inter"].item(), inter, rtol=1e-5)
    np.testing.assert_allclose(outcome.terms["intra"].item(), intra, rtol=1e-5)


def test_correlation_of_a_row_without_spread_is_zero():
    x = torch.tensor([[1.0, 1, 1], [1, 2, 3], [1, 2, 3]], dtype=torch.float64, requires_grad=True)
    found = correlations(x, torch.tensor([[1.0, 2, 3], [3, 2, 1], [2, 4, 6]], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([0.0, -1, 1], dtype=torch.float64))
    found.sum().backward()
    assert x.grad.isfinite().all() and correlations(x[:, :1], x[:, :1]).eq(0).all()


def test_standardized_is_z_score_of_each_row():
    z = logits(6)[0]
    z[0] = 2.5
    z[1] *= 1e25  # squares overflow float32
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-6)):
        found = kd.standardized(torch.tensor(z).to(dtype).requires_grad_())
        expected = stats.zscore(z[1:], axis=1, ddof=1)
        np.testing.assert_allclose(found[1:].detach().numpy(), expected, rtol=tolerance, atol=tolerance)
        assert found[0].eq(0).all() and found.dtype == dtype
    assert kd.standardized(torch.tensor([[1.0], [2.0]])).eq(0).all()
    assert kd.standardized(torch.tensor([[1.0, torch.nan], [1.0, -torch.inf]])).isnan().all()


@pytest.mark.parametrize("keep", [1.0, 0.4])
@pytest.mark.parametrize("weighted", [False, True])
def test_kd_of_standardized_logits_matches_formula(weighted, keep):
    z, y = logits(7)
    student, teacher, batch = batch_of(z, y, weighted=weighted)
    options = {"temperature": 2, "kd_weight": 9, "standardize": True, "batch_keep": keep}
    outcome = methods.build("kd", options)(student, teacher, batch)
    rows, label = top_entropy_rows(z, keep), batch.label.numpy()
    q, p = (softmax(stats.zscore(x, axis=1, ddof=1) / 2, 1) for x in (z, y))
    kl = np.array([stats.entropy(*pair) for pair in zip(p, q, strict=True)])
    own = np.zeros(ROWS)
    own[rows] = kl[rows] * ROWS / len(rows)
    losses = 0.1 * cross_entropies(z, label) + 9 * 4 * own
    weight = batch.weight.double().numpy() if weighted else np.ones(ROWS)
    np.testing.assert_allclose(outcome.loss.item(), (losses * weight).mean(), rtol=1e-6)
    np.testing.assert_allclose(outcome.terms["kl"].item(), kl[rows].mean(), rtol=1e-6)
    np.testing.assert_allclose(outcome.value.numpy(), [stats.entropy(p) for p in softmax(z, 1)], rtol=1e-6)


@pytest.mark.parametrize("name", ["kd", "dkd", "dist"])
def test_standardized_loss_ignores_scale_and_shift_of_teacher(name):
    z, y = logits(8)
    found = []
    for changed in (y, 5 * y - 3):
        student, teacher, batch = batch_of(z, changed)
        found.append(methods.build(name, {"standardize": True})(student, teacher, batch).loss)
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


class Scaled(nn.Module):
    """A network with other logits, a z + b, and the same everything else."""

    def __init__(self, network, scale, shift):
        super().__init__()
        self.network, self.scale, self.shift = network, scale, shift

    def forward(self, x):
        return self.scale * self.network(x) + self.shift


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sskd", {}),
        ("kr", {"kd_weight": 1.0}),
        ("iekd", {"kd_weight": 1.0}),
        ("pwkd", {"base": "kd", "partial": False}),
    ],
)
def test_every_term_of_logits_can_be_standardized(name, options):
    """The logits of a teacher count up to scale and shift. (SSKD ranks its rows by them, which these do not change.)"""
    x = torch.randn(9, 1, 6, 6, generator=torch.Generator().manual_seed(5))
    data, found = Samples(x, torch.arange(9) % 4), []
    for standardize in (False, True):
        for scale, shift in ((1, 0), (5, -3)):
            student, teacher = network(1, dropout=0.0), Scaled(network(2, width=10), scale, shift).eval()
            teacher.stages = ("network.2",)
            method = methods.build(name, {**options, **({"standardize": True} if standardize else {})})
            torch.manual_seed(0)
            method.prepare(student, teacher, data)
            for plan in method.pretraining():
                plan.part.eval()
            found.append(method(student, method.teacher_of(teacher), data.at(range(9))).loss)
    torch.testing.assert_close(found[2], found[3], rtol=1e-5, atol=0)
    assert len({x.item() for x in found[:3]}) == 3


@pytest.mark.parametrize("options", [{}, {"standardize": True}], ids=["plain", "standardised"])
@pytest.mark.parametrize("name", ["kd", "dkd", "dist"])
def test_gradient_is_that_of_the_loss(name, options):
    z, y = logits(9)
    _, teacher, batch = batch_of(z, y)
    method = methods.build(name, options)
    function = torch.nn.functional.embedding
    loss = lambda leaf: method(lambda x: function(x, leaf), teacher, batch).loss  # noqa: E731
    assert torch.autograd.gradcheck(loss, torch.tensor(z, requires_grad=True))


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("dkd", {"temperature": 0}, ValueError, "temperature must be a finite number > 0, got 0"),
        ("dkd", {"warmup": -1}, ValueError, "warmup must be an integer >= 0, got -1"),
        ("dkd", {"warmup": 0.5}, TypeError, "warmup must be an integer >= 0, got float 0.5"),
        ("dist", {"label_smoothing": 1.5}, ValueError, r"label_smoothing must be a number in \[0, 1\], got 1.5"),
        ("kd", {"standardize": 1}, TypeError, "standardize must be True or False, got int 1"),
    ],
)
def test_invalid_option_is_refused(name, options, error, message):
    with pytest.raises(error, match=message):
        methods.build(name, options)
