"""IE-KD and IE-DML against formulas in float64 NumPy, networks and encoders included; options, and runs of `distill`."""

import copy
import inspect
from functools import partial

import numpy as np
import pytest
import small_runs
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import kstest
from small_runs import images
from torch import nn

from kcd_ext import files, methods
from kcd_ext.methods import Batch, features
from kcd_ext.methods.features import pool_to_common_size
from kcd_ext.methods.iekd import (
    FactorAutoEncoder,
    FactorCoder,
    absolute_cosine,
    cosine_distance,
    l1_distance,
    opposite_l1_distance,
)
from kcd_ext.training import Condense, Recipe, checkpoint, distill

CLASSES, SAMPLES, PIXELS = 4, 9, 5

COMMON = {
    "ce_weight": 1,
    "inheritance_weight": 1,
    "exploration_weight": 1,
    "distance": "l1",
    "split": "natural",
    "split_seed": 0,
    "student_layer": None,
    "label_smoothing": 0,
    "standardize": False,
}
DEFAULTS = {
    "iekd": COMMON
    | {"kd_weight": 0, "temperature": 4, "factor_epochs": 30, "factor_lr": 0.1, "batch_keep": 1, "teacher_layer": None},
    "ie-dml": COMMON | {"kl_weight": 1, "temperature": 1, "peer": None, "peer_layer": None},
}


pytestmark = pytest.mark.usefixtures("one_thread")


class Network(nn.Module):
    """A convolution with tanh, whose outputs are the maps, and a linear layer on their means."""

    stages = ("maps",)

    def __init__(self, *, in_channels=2, num_classes=CLASSES, channels=6, stride=1, seed=None):
        super().__init__()
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.convolution = nn.Conv2d(in_channels, channels, 3, stride, padding=1)
            self.maps = nn.Tanh()
            self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x):
        return self.classifier(self.maps(self.convolution(x)).mean((2, 3)))


wide = partial(Network, channels=8, stride=2)


def wide_double(**options):
    return wide(**options).double()


class Samples:
    """One batch, as `Method.prepare` gets it."""

    def __init__(self, dtype=torch.float64, pixels=PIXELS):
        x = torch.randn(SAMPLES, 2, pixels, pixels, generator=torch.Generator().manual_seed(5))
        self.batch = Batch(x.to(dtype), torch.arange(SAMPLES) * 7 % CLASSES, torch.arange(SAMPLES))

    def __iter__(self):
        yield self.batch


def prepared(name, options=None, student=None, teacher=None, dtype=torch.float64, samples=None):
    """Return a method as it is while the student trains, with random weights and statistics."""
    student = (student or Network(seed=1)).to(dtype)
    teacher = None if name == "ie-dml" else (teacher or wide(seed=2)).to(dtype).eval()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        method = methods.build(name, options)
        method.prepare(student, teacher, samples or Samples(dtype))
        for module in method.modules():
            if isinstance(module, nn.BatchNorm2d):
                for x in (module.weight.data, module.bias.data, module.running_mean):
                    x.normal_()
                module.running_var.uniform_(0.5, 2)
    if name == "iekd":
        method.auto_encoder.requires_grad_(False).eval()  # as the trainer leaves pretrained parts
    return method.to(dtype), student, teacher


# --- formulas ---------------------------------------------------------------------------------------------------------


def numbers(module):
    """Return parameters and buffers as float64 arrays by name."""
    return {name: x.detach().double().numpy().copy() for name, x in module.state_dict().items()}


def of(state, prefix):
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


def convolved(x, weight, stride=1):
    b, _, h, w = x.shape
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.zeros((b, len(weight), -(-h // stride), -(-w // stride)))
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            patch = x[:, :, i * stride : i * stride + 3, j * stride : j * stride + 3]
            out[:, :, i, j] = np.einsum("bcuv,ocuv->bo", patch, weight)
    return out


def run_network(state, x, stride):
    maps = np.tanh(convolved(x, state["convolution.weight"], stride) + state["convolution.bias"][:, None, None])
    return maps.mean((2, 3)) @ state["classifier.weight"].T + state["classifier.bias"], maps


def leaky(x):
    return np.where(x > 0, x, 0.1 * x)


def apply_coder(state, x, training=True):
    """Apply an activation, then three convolutions with normalisation and activation each."""
    x = leaky(x)
    for i in (1, 4, 7):
        x = convolved(x, state[f"{i}.weight"])
        mean, variance = (x.mean((0, 2, 3)), x.var((0, 2, 3)))
        if not training:
            mean, variance = state[f"{i + 1}.running_mean"], state[f"{i + 1}.running_var"]
        scale = state[f"{i + 1}.weight"] / np.sqrt(variance + 1e-5)
        x = (x - mean[:, None, None]) * scale[:, None, None] + state[f"{i + 1}.bias"][:, None, None]
        x = leaky(x)
    return x


def reconstruction_of(state, maps):
    """Return the mean |maps - Dec(Enc(maps))|."""
    return np.abs(maps - apply_coder(of(state, "decoder."), apply_coder(of(state, "encoder."), maps))).mean()


def halves(state, maps):
    maps = maps[:, state["order"].astype(int)] if "order" in state else maps
    half = maps.shape[1] // 2
    return (
        apply_coder(of(state, "inheritance."), maps[:, :half]),
        apply_coder(of(state, "exploration."), maps[:, half:]),
    )


def pool(x, size):
    """Average over the windows of adaptive pooling, from floor(i n / m) to ceil((i + 1) n / m)."""
    out = np.zeros((*x.shape[:2], *size))
    for place in np.ndindex(size):
        window = [slice(i * n // m, -(-(i + 1) * n // m)) for i, n, m in zip(place, x.shape[2:], size, strict=True)]
        out[:, :, place[0], place[1]] = x[:, :, window[0], window[1]].mean((2, 3))
    return out


def factor_losses(distance, factors, target):
    """Return the inheritance and exploration losses, computed sample by sample."""
    size = tuple(np.minimum(factors[0].shape[2:], target.shape[2:]))
    sums = np.zeros(2)
    for i in range(len(target)):
        inherited, explored, wanted = (pool(x[i : i + 1], size).ravel() for x in (*factors, target))
        a, b, c = (x / max(np.linalg.norm(x), 1e-12) for x in (inherited, explored, wanted))
        sums += {
            "l1": (np.abs(a - c).mean(), -np.abs(b - c).mean()),
            "cosine": (1 - a @ c, abs(b @ c)),
        }[distance]
    return sums / len(target)


def cross_entropy(z, label):
    return -log_softmax(z, 1)[np.arange(len(z)), label].mean()


def divergence(z, y, temperature):
    p = softmax(y / temperature, 1)
    return (p * (log_softmax(y / temperature, 1) - log_softmax(z / temperature, 1))).sum(1).mean()


def entropies(z):
    return -(softmax(z, 1) * log_softmax(z, 1)).sum(1)


def assert_slope(formula, module, state, step=1e-7, seed=0):
    """Compare gradients with differences of a formula of `state` along a random direction.

    The step is small, because the formula has kinks where an activation or a difference is 0.
    """
    rng, slope, up, down = np.random.default_rng(seed), 0, dict(state), dict(state)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            direction = rng.standard_normal(parameter.shape)
            slope += (parameter.grad.double().numpy() * direction).sum()
            up[name], down[name] = state[name] + step * direction, state[name] - step * direction
    assert abs(slope) > 1e-4
    np.testing.assert_allclose((formula(up) - formula(down)) / (2 * step), slope, rtol=1e-5)


# --- distances --------------------------------------------------------------------------------------------------------

EVERY_DISTANCE = [l1_distance, opposite_l1_distance, cosine_distance, absolute_cosine]


@pytest.mark.parametrize("distance", EVERY_DISTANCE)
def test_distances_match_float64_and_pass_gradcheck(distance):
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(3, 2, 3, 1, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    u, v = (x.detach().numpy().reshape(3, -1) for x in (a, b))
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (u, v))
    assert (u * v).sum(1).min() < -0.1 and (u * v).sum(1).max() > 0.1
    expected = {
        "l1_distance": np.abs(u - v).mean(),
        "opposite_l1_distance": -np.abs(u - v).mean(),
        "cosine_distance": 1 - (u * v).sum(1).mean(),
        "absolute_cosine": np.abs((u * v).sum(1)).mean(),
    }
    torch.testing.assert_close(distance(a, b).item(), expected[distance.__name__], rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(distance, (a, b))
    scale = torch.tensor([1e25, 1e-20, 3.0]).view(3, 1, 1, 1)  # a sample's scale has no effect
    one, other = (x.detach().float() for x in (a, b))
    torch.testing.assert_close(distance(one * scale, other), distance(one, other), rtol=1e-5, atol=1e-7)
    assert distance(one.bfloat16(), other.bfloat16()).dtype == torch.float32


def test_distances_reach_their_documented_bounds():
    """The bounds of the docstrings hold, and are reached."""
    rng = np.random.default_rng(1)
    for n in (1, 2, 7, 64):
        opposite = torch.tensor(rng.choice([-1.0, 1.0], (3, n)))
        assert opposite_l1_distance(opposite, -opposite).item() == pytest.approx(-2 / np.sqrt(n), rel=1e-6)
        assert cosine_distance(opposite, -opposite).item() == pytest.approx(2, rel=1e-6)
        assert absolute_cosine(opposite, -opposite).item() == pytest.approx(1, rel=1e-6)
        for power in (0, 1, 5):  # from equal entries to one dominant entry
            one, other = (torch.tensor(rng.standard_normal((50, n)) ** (2 * power + 1)) for _ in range(2))
            assert -2 / np.sqrt(n) <= opposite_l1_distance(one, other) <= 0 <= cosine_distance(one, other) <= 2
            assert 0 <= absolute_cosine(one, other) <= 1


@pytest.mark.parametrize("distance", EVERY_DISTANCE)
def test_zero_samples_have_no_gradient_and_equal_samples_no_distance(distance):
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(4, 5, generator=generator) for _ in range(2))
    a[0], b[1], a[2], b[2] = 0, 0, 0, 0
    a.requires_grad_(), b.requires_grad_()
    loss = distance(a, b)
    loss.backward()
    assert loss.isfinite() and a.grad.isfinite().all() and b.grad.isfinite().all()
    assert not a.grad[[0, 2]].any() and not b.grad[[1, 2]].any() and a.grad[3].any() and b.grad[3].any()
    if distance in (l1_distance, cosine_distance):
        x = torch.randn(3, 4, 5, 5, generator=generator) * torch.tensor([1e20, 1e-20, 0]).view(3, 1, 1, 1)
        assert distance(x, x.clone()) == 0


def test_larger_maps_are_pooled_to_smallest_size():
    generator = torch.Generator().manual_seed(3)
    sizes = [(5, 3), (4, 7), (4, 3)]
    maps = [torch.randn(2, 3, *size, generator=generator, dtype=torch.float64) for size in sizes]
    for x, found in zip(maps, pool_to_common_size(*maps), strict=True):
        np.testing.assert_allclose(found.numpy(), pool(x.numpy(), (4, 3)), rtol=1e-12)
    assert pool_to_common_size(*maps)[2] is maps[2]


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "size"), [(6, (5, 3)), (2, (1, 1)), (10, (7, 1))])
def test_auto_encoder_matches_float64_formula(channels, size):
    coder, x = FactorAutoEncoder(channels).double(), torch.randn(3, channels, *size, dtype=torch.float64)
    state, half = numbers(coder), channels // 2
    factors, loss = coder(x)
    expected = apply_coder(of(state, "encoder."), x.numpy())
    np.testing.assert_allclose(factors.detach().numpy(), expected, rtol=1e-9, atol=1e-12)
    found, decoded = coder.decoder(factors.detach()), apply_coder(of(state, "decoder."), expected)
    np.testing.assert_allclose(found.detach().numpy(), decoded, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(loss.item(), np.abs(x.numpy() - decoded).mean(), rtol=1e-9)
    assert factors.shape == (3, half, *size) and found.shape == x.shape
    # 3x3 convolutions without bias c -> c -> c / 2 -> c / 2, and back; two BatchNorm parameters per channel.
    c, h = channels, half
    assert sum(p.numel() for p in coder.encoder.parameters()) == 9 * (c * c + c * h + h * h) + 2 * (c + h + h)
    assert sum(p.numel() for p in coder.decoder.parameters()) == 9 * (h * h + h * c + c * c) + 2 * (h + c + c)
    assert FactorCoder(channels, 5)(x.bfloat16()).shape == (3, 5, *size)


@pytest.mark.parametrize("name", ["iekd", "ie-dml"])
def test_initial_weights_have_published_distribution(name):
    """Normal with variance 2 / (9 output channels) in every coder, and determined by torch's generator."""
    student, teacher, states = Network(channels=48, seed=1), Network(channels=64, seed=2), []
    for seed in (0, 0, 1):
        method = methods.build(name, {"peer": f"{__name__}:Network"} if name == "ie-dml" else None)
        torch.manual_seed(seed)
        method.prepare(student, teacher, Samples(torch.float32))
        coders = [module for module in method.modules() if isinstance(module, FactorCoder)]
        states.append([x.clone() for coder in coders for x in coder.state_dict().values()])
        for coder in coders:
            layers = list(coder)
            for convolution, normalisation in zip(layers[1::3], layers[2::3], strict=True):
                weight = convolution.weight.detach().double().flatten().numpy()
                deviation = np.sqrt(2 / (9 * convolution.out_channels))
                n, samples = len(weight), weight / deviation
                assert abs(samples.mean()) < 4 / np.sqrt(n) and abs(samples.std() - 1) < 4 / np.sqrt(2 * n)
                assert kstest(samples, "norm").pvalue > 1e-4
                assert (normalisation.weight == 1).all() and not normalisation.bias.any()
    assert len(coders) == (4 if name == "iekd" else 8)
    same, again, other = states
    assert all(torch.equal(*pair) for pair in zip(same, again, strict=True))
    assert all(not torch.equal(*pair) for pair in zip(same, other, strict=True) if pair[0].dim() == 4)


def test_permuted_order_depends_on_seed_only():
    orders = []
    for options in ({"split_seed": 3}, {"split_seed": 3}, {"split_seed": 4}):
        torch.manual_seed(len(orders))
        method, *_ = prepared("iekd", {"split": "permuted", **options}, Network(seed=1, channels=40))
        orders.append(method.student_encoder.order)
        assert "student_encoder.order" in method.state_dict()
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    assert orders[0].sort().values.tolist() == [*range(40)] != orders[0].tolist()
    method, *_ = prepared("iekd")
    assert method.student_encoder.order is None


# --- losses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "strides"),
    [
        ({}, (1, 2)),
        ({"distance": "cosine", "split": "permuted", "split_seed": 6}, (2, 1)),
        ({"batch_keep": 0.5, "kd_weight": 0.7, "temperature": 3, "ce_weight": 0.2}, (1, 1)),
        ({"batch_keep": 0.01, "kd_weight": -1, "inheritance_weight": 2, "exploration_weight": 3}, (1, 2)),
    ],
)
def test_iekd_matches_float64_formula(options, strides):
    student, teacher = Network(seed=1, stride=strides[0]), wide(seed=2, stride=strides[1])
    method, *_ = prepared("iekd", options, student, teacher)
    given = {**DEFAULTS["iekd"], **options}
    batch_sizes, batch = [], Samples().batch
    teacher.register_forward_hook(lambda _module, _inputs, out: batch_sizes.append(len(out)))
    fixed = copy.deepcopy(method.state_dict())
    outcome = method(student, teacher, batch)
    outcome.loss.backward()

    x, label, state = batch.x.numpy(), batch.label.numpy(), numbers(method)
    ours, theirs = numbers(student), numbers(teacher)
    logits, _ = run_network(ours, x, strides[0])
    rows = sorted(np.argsort(-entropies(logits), kind="stable")[: max(1, int(given["batch_keep"] * SAMPLES))])
    wanted_logits, wanted_maps = run_network(theirs, x[rows], strides[1])
    wanted = apply_coder(of(state, "auto_encoder.encoder."), wanted_maps, training=False)

    def parts(ours, encoder):
        z, maps = run_network(ours, x, strides[0])
        inheritance, exploration = factor_losses(given["distance"], halves(encoder, maps[rows]), wanted)
        return (
            cross_entropy(z, label),
            inheritance,
            exploration,
            divergence(z[rows], wanted_logits, given["temperature"]),
        )

    def loss(ours, encoder):
        ce, inheritance, exploration, kl = parts(ours, encoder)
        weighted = given["inheritance_weight"] * inheritance + given["exploration_weight"] * exploration
        return given["ce_weight"] * ce + weighted + given["kd_weight"] * given["temperature"] ** 2 * kl

    encoder = of(state, "student_encoder.")
    _, *expected, kl = parts(ours, encoder)
    terms = {"inheritance": expected[0], "exploration": expected[1], **({"kl": kl} if given["kd_weight"] else {})}
    assert {name: x.item() for name, x in outcome.terms.items()} == pytest.approx(terms, rel=1e-9)
    np.testing.assert_allclose(outcome.loss.item(), loss(ours, encoder), rtol=1e-9)
    np.testing.assert_allclose(outcome.value.numpy(), entropies(logits), rtol=1e-9)
    np.testing.assert_allclose(outcome.logits.numpy(), logits, rtol=1e-9, atol=1e-12)
    assert batch_sizes == [len(rows)] and outcome.losses is None
    assert not any(x.requires_grad for x in (outcome.value, outcome.logits, *outcome.terms.values()))

    assert_slope(lambda ours: loss(ours, encoder), student, ours)
    assert_slope(lambda encoder: loss(ours, encoder), method.student_encoder, encoder)
    assert all(x.grad is None for x in (*teacher.parameters(), *method.auto_encoder.parameters()))
    for name, x in method.state_dict().items():
        assert torch.equal(x, fixed[name]) or ("student_encoder" in name and "running" in name) or "num_batches" in name


@pytest.mark.parametrize(
    ("options", "peer_stride"),
    [
        ({}, 1),
        (
            {
                "peer": f"{__name__}:wide_double",
                "distance": "cosine",
                "split": "permuted",
                "temperature": 3,
                "kl_weight": 0.4,
            },
            2,
        ),
        ({"peer": f"{__name__}:wide_double", "inheritance_weight": 2, "exploration_weight": 3, "ce_weight": 0.2}, 2),
    ],
)
def test_iedml_matches_float64_formula(options, peer_stride):
    """Each network's gradients are those of its own loss, with the other network constant."""
    method, student, _ = prepared("ie-dml", options)
    given, batch = {**DEFAULTS["ie-dml"], **options}, Samples().batch
    outcome = method(student, None, batch)
    outcome.loss.backward()

    x, label, state = batch.x.numpy(), batch.label.numpy(), numbers(method)
    networks = {"student": (numbers(student), 1), "peer": (of(state, "peer_network."), peer_stride)}
    seen = {name: run_network(weights, x, stride) for name, (weights, stride) in networks.items()}
    factors = {name: apply_coder(of(state, f"{name}_auto_encoder.encoder."), maps) for name, (_, maps) in seen.items()}

    def reconstruction(name, coder):
        return reconstruction_of(coder, seen[name][1])

    def parts(name, weights, encoder):
        other = "peer" if name == "student" else "student"
        z, maps = run_network(weights, x, networks[name][1])
        return (
            cross_entropy(z, label),
            divergence(z, seen[other][0], given["temperature"]),
            *factor_losses(given["distance"], halves(encoder, maps), factors[other]),
        )

    def loss(name, weights, encoder):
        factors = ("ce_weight", "kl_weight", "inheritance_weight", "exploration_weight")
        weighted = [given[factor] * part for factor, part in zip(factors, parts(name, weights, encoder), strict=True)]
        weighted[1] *= given["temperature"] ** 2
        return sum(weighted)

    encoders = {name: of(state, f"{name}_encoder.") for name in networks}
    coders = {name: of(state, f"{name}_auto_encoder.") for name in networks}
    reconstructed = sum(reconstruction(name, coders[name]) for name in networks)
    total = sum(loss(name, networks[name][0], encoders[name]) for name in networks) + reconstructed
    np.testing.assert_allclose(outcome.loss.item(), total, rtol=1e-9)
    _, kl, inheritance, exploration = parts("student", networks["student"][0], encoders["student"])
    assert {name: x.item() for name, x in outcome.terms.items()} == pytest.approx(
        {
            "inheritance": inheritance,
            "exploration": exploration,
            "kl": kl,
            "peer_ce": cross_entropy(seen["peer"][0], label),
            "reconstruction": reconstructed,
        },
        rel=1e-9,
    )
    np.testing.assert_allclose(outcome.logits.numpy(), seen["student"][0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(outcome.value.numpy(), entropies(seen["student"][0]), rtol=1e-9)
    assert not any(x.requires_grad for x in (outcome.value, outcome.logits, *outcome.terms.values()))

    for name, network in (("student", student), ("peer", method.peer_network)):
        weights, encoder = networks[name][0], encoders[name]
        assert_slope(lambda w, name=name, encoder=encoder: loss(name, w, encoder), network, weights)
        own = method.get_submodule(f"{name}_encoder")
        assert_slope(lambda e, name=name, weights=weights: loss(name, weights, e), own, encoder)
        coder = method.get_submodule(f"{name}_auto_encoder")
        assert_slope(lambda c, name=name: reconstruction(name, c), coder, coders[name])


def test_pretraining_trains_only_the_auto_encoder():
    method, student, teacher = prepared("iekd", {"factor_epochs": 40, "factor_lr": 0.05})
    (plan,) = method.pretraining()
    assert plan.part is method.auto_encoder
    assert (plan.epochs, plan.lr, plan.milestones) == (40, 0.05, ())
    before, batch = copy.deepcopy(teacher.state_dict()), Samples().batch
    plan.part.requires_grad_(True).train()
    optimizer, losses = torch.optim.SGD(plan.part.parameters(), plan.lr, momentum=0.9), []
    for _ in range(plan.epochs):
        coder = numbers(plan.part)
        loss = plan.loss(teacher, batch)
        if len(losses) < 2:
            _, maps = run_network(numbers(teacher), batch.x.numpy(), 2)
            np.testing.assert_allclose(loss.item(), reconstruction_of(coder, maps), rtol=1e-9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is None for p in (*teacher.parameters(), *student.parameters()))
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())


EVERY = [("iekd", {}), ("iekd", {"batch_keep": 0.5, "kd_weight": 1, "split": "permuted"}), ("ie-dml", {})]


@pytest.mark.slow
@pytest.mark.parametrize("distance", ["l1", "cosine"])
@pytest.mark.parametrize(("name", "options"), EVERY)
def test_inheritance_and_exploration_losses_fall(name, options, distance):
    weights = {"inheritance_weight": 50, "exploration_weight": 50}
    method, student, teacher = prepared(name, {**options, **weights, "distance": distance}, dtype=torch.float32)
    parameters = [p for p in (*student.parameters(), *method.parameters()) if p.requires_grad]
    optimizer, seen = torch.optim.Adam(parameters, 0.01), []
    for _ in range(80):
        outcome = method(student, teacher, Samples(torch.float32).batch)
        optimizer.zero_grad()
        outcome.loss.backward()
        optimizer.step()
        seen.append({name: x.item() for name, x in outcome.terms.items()} | {"loss": outcome.loss.item()})
    assert seen[-1]["loss"] < seen[0]["loss"]
    assert seen[-1]["inheritance"] < 0.7 * seen[0]["inheritance"]
    assert seen[-1]["exploration"] < (1.1 if distance == "l1" else 0.6) * seen[0]["exploration"]


def test_missing_channels_of_teacher_are_zeros():
    method, _, teacher = prepared("iekd")
    x = Samples().batch.x
    method.teacher_width = 11
    _, maps = method.teacher_forward(teacher, x)
    assert maps.shape == (SAMPLES, 11, 3, 3) and not maps[:, 8:].any()
    np.testing.assert_allclose(maps[:, :8], run_network(numbers(teacher), x.numpy(), 2)[1], rtol=1e-9, atol=1e-12)


# --- networks and hooks -----------------------------------------------------------------------------------------------


def hooks(network):
    return [hook for module in network.modules() for hook in module._forward_hooks.values()]


@pytest.mark.parametrize("name", ["iekd", "ie-dml"])
def test_hooks_stay_until_release_and_not_on_copies(name):
    method, student, teacher = prepared(name)
    networks = {"student": student, **({"teacher": teacher} if teacher else {"peer": method.peer_network})}
    x = Samples().batch.x
    for role, network in networks.items():
        assert len(hooks(network)) == 1
        copy.deepcopy(network)(x)
        with pytest.raises(RuntimeError, match=f"the {role}'s layer 'maps' did not run"):
            method._taps[role].pop()
        with torch.no_grad():
            assert method._taps[role].run(network, x)[1].shape[:2] == (SAMPLES, 8 if role == "teacher" else 6)
    method.prepare(student, teacher, Samples())  # again: the first hooks are removed
    assert all(len(hooks(network)) == 1 for network in networks.values() if network in (student, teacher))
    peer = getattr(method, "peer_network", student)
    method.release()
    assert not any(map(hooks, (*networks.values(), peer)))
    with pytest.raises(RuntimeError, match=r"needs prepare\(student, teacher, samples\)"):
        method(student, teacher, Samples().batch)


def test_default_peer_has_newly_drawn_weights():
    student = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, CLASSES))
    student.stages = ("1",)
    student[1].running_mean.fill_(7)
    student[0].weight.requires_grad_(False)
    before, peers = copy.deepcopy(student.state_dict()), []
    for seed in (0, 0, 1):
        method = methods.build("ie-dml")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            method.prepare(student, None, Samples(torch.float32))
        peers.append(method.peer_network)
    same, again, other = (peer.state_dict() for peer in peers)
    for name, x in student.state_dict().items():
        assert torch.equal(x, before[name])
        assert torch.equal(same[name], again[name]) and same[name].data_ptr() != x.data_ptr()
        if x.dim() and not name.startswith("1."):
            assert not torch.equal(same[name], x) and not torch.equal(same[name], other[name])
    assert not same["1.running_mean"].any()
    assert peers[0].training and all(p.requires_grad for p in peers[0].parameters())


class Unresettable(Network):
    """A network with a parameter that no `reset_parameters` redraws."""

    def __init__(self, **options):
        super().__init__(**options)
        self.scale = nn.Parameter(torch.ones(()))


class OtherStages(Network):
    """A network that uses the attribute `stages` for something else."""

    stages = nn.Identity()


class TooFewClasses(Network):
    """A network that ignores the requested number of classes."""

    def __init__(self, **options):
        super().__init__(**{**options, "num_classes": 2})


@pytest.mark.parametrize(
    ("name", "options", "networks", "error", "message"),
    [
        (
            "iekd",
            {},
            {"student": Network(channels=7)},
            ValueError,
            r"even .*: student_layer 'maps' gives \(1, 7, 5, 5\)",
        ),
        ("iekd", {}, {"teacher": wide(channels=3)}, ValueError, r" and teacher_layer 'maps' gives \(1, 3, 3, 3\)$"),
        (
            "ie-dml",
            {"peer": f"{__name__}:odd_channels"},
            {},
            ValueError,
            r" and peer_layer 'maps' gives \(1, 5, 5, 5\)$",
        ),
        (
            "iekd",
            {},
            {"teacher": OtherStages()},
            ValueError,
            "the teacher has no `stages`, .*: set teacher_layer to a name in",
        ),
        (
            "ie-dml",
            {"peer": f"{__name__}:OtherStages"},
            {},
            ValueError,
            "the peer has no `stages`, .*: set peer_layer to a",
        ),
        ("iekd", {"student_layer": "gone"}, {}, ValueError, "student_layer must be a name in .* has no 'gone'"),
        ("ie-dml", {"peer_layer": "gone"}, {}, ValueError, "peer_layer must be a name in .* has no 'gone'"),
        (
            "iekd",
            {"student_layer": "classifier"},
            {},
            RuntimeError,
            r"'classifier' had a torch.float32 tensor of shape \(1, 4\).* maps",
        ),
        (
            "ie-dml",
            {},
            {"student": Unresettable()},
            ValueError,
            r"peer must be a network's name .*'outermost module' \(Unresettable\)",
        ),
        (
            "ie-dml",
            {"peer": f"{__name__}:TooFewClasses"},
            {},
            ValueError,
            r"peer must give logits .*\(1, 4\), got \(1, 2\)",
        ),
        ("ie-dml", {"peer": "nobody"}, {}, ValueError, "unknown model 'nobody'"),
    ],
)
def test_incompatible_network_or_layer_is_named(name, options, networks, error, message):
    method = methods.build(name, options)
    with pytest.raises(error, match=message) as caught:
        student = networks.get("student", Network())
        method.prepare(student, networks.get("teacher", wide()), Samples(torch.float32))
    assert "\n" not in str(caught.value)
    method.release()
    assert not hooks(student)


odd_channels = partial(Network, channels=5)


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_match_documentation(name):
    method = methods.build(name)
    options = inspect.signature(type(method)).parameters
    assert {option: getattr(method, option) for option in options} == DEFAULTS[name]
    assert {option: parameter.default for option, parameter in options.items()} == DEFAULTS[name]
    assert not method.flops_known and method.needs_teacher == (name == "iekd")


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("iekd", {"distance": "l2"}, ValueError, "distance must be one of 'l1', 'cosine', got 'l2'"),
        ("ie-dml", {"split": 2}, ValueError, "split must be one of 'natural', 'permuted', got 2"),
        ("iekd", {"split_seed": -1}, ValueError, r"split_seed must be an integer in \[0, "),
        ("iekd", {"factor_epochs": 0}, ValueError, "factor_epochs must be an integer >= 1, got 0"),
        ("iekd", {"factor_lr": -1}, ValueError, "factor_lr must be a finite number >= 0, got -1"),
        ("iekd", {"kd_weight": float("nan")}, ValueError, "kd_weight must be a finite number, got nan"),
        ("iekd", {"batch_keep": 0}, ValueError, r"batch_keep must be a number in \(0, 1\], got 0"),
        ("iekd", {"teacher_layer": 3}, TypeError, "teacher_layer must be a name in named_modules.*, got int"),
        ("ie-dml", {"peer_layer": 3}, TypeError, "peer_layer must be a name in named_modules.*, got int"),
        ("ie-dml", {"peer": nn.Identity()}, TypeError, "peer must be a network's name, .* or None, got Identity"),
        ("ie-dml", {"temperature": 0}, ValueError, "temperature must be a finite number > 0, got 0"),
    ],
)
def test_invalid_option_is_refused(name, options, error, message):
    with pytest.raises(error, match=message):
        methods.build(name, options)


def test_feature_probe_restores_modes_and_keeps_statistics():
    """`prepare` probes both networks in evaluation mode: a teacher in training mode returns to it, with unchanged statistics."""
    student, teacher = (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(50), nn.Linear(50, n)) for n in (4, 4))
    student.eval()
    method = methods.build("pkt")
    method.prepare(student, teacher, Samples(torch.float32))
    assert (method.student_width, method.teacher_width) == (50, 50)
    assert teacher.training and teacher[1].training and not student.training and not teacher[1].running_mean.any()
    method.release()
    assert isinstance(method, features.FeatureMethod)


# --- through distill --------------------------------------------------------------------------------------------------


OPTIONS = {"iekd": {"factor_epochs": 2, "factor_lr": 0.02, "split": "permuted"}, "ie-dml": {"distance": "cosine"}}


@pytest.mark.parametrize("name", ["iekd", "ie-dml"])
def test_run_trains_parts_in_their_phase(name, tmp_path):
    states = []
    teacher = small_runs.network(2, width=10) if name == "iekd" else None
    r = Recipe(name, OPTIONS[name], Condense(keep=0.5, every=1), epochs=3, batch_size=8, lr=0.02, device="cpu", seed=5)
    summary = distill(
        small_runs.network(1),
        teacher,
        images(30),
        images(12, seed=1),
        r,
        output=tmp_path,
        progress=lambda line: states.append(copy.deepcopy(checkpoint.load(tmp_path / "checkpoint").model)),
    )
    assert summary.flops is None and summary.history[-1]["terms"].keys() >= {"inheritance", "exploration"}
    if name == "iekd":  # the auto-encoder changes only in its two epochs, the student only afterwards
        lines = files.read_lines(tmp_path / "pretraining.jsonl")
        assert len(lines) == 2 and len(states) == 5 and lines[1]["loss"] < lines[0]["loss"]
        assert [line["lr"] for line in lines] == [0.02, 0.02]  # no milestones
        for key, last in states[-1].items():
            first, pretrained = (states[i][key] for i in (0, 1))
            if "auto_encoder" in key:
                assert torch.equal(pretrained, last) and not torch.equal(first, pretrained)
            else:
                assert torch.equal(first, pretrained) and (key.endswith("order") or not torch.equal(pretrained, last))
    else:
        assert all(not torch.equal(states[0][key], last) for key, last in states[-1].items() if "weight" in key)
        assert any("peer_network" in key for key in states[0])
