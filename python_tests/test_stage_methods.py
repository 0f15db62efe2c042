"""AT, FitNet and ReviewKD against formulas in float64 NumPy; maps of any size, named layers, and errors."""

import copy
import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from small_runs import Samples, seeded
from torch import nn

from kcd_ext import methods, models
from kcd_ext.methods.at import attention_losses
from kcd_ext.methods.normalisation import BatchNormalisation
from kcd_ext.methods.reviewkd import hierarchical_context_losses

pytestmark = pytest.mark.usefixtures("one_thread")

PUBLISHED = {  # RepDistiller's for AT and FitNet, mdistiller's for ReviewKD
    "at": {"ce_weight": 1, "at_weight": 1000, "power": 2},
    "fitnet": {"ce_weight": 1, "hint_weight": 100},
    "reviewkd": {"ce_weight": 1, "review_weight": 1, "mid_channels": 512, "warmup": 20},
}
OURS = {"batch_keep": 1, "label_smoothing": 0, "student_layers": None, "teacher_layers": None, "relu": True}
SAMPLES, CLASSES = 11, 4
NAMES = tuple(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults_match_published_values(name):
    options = inspect.signature(type(methods.build(name))).parameters
    ours = {option: value for option, value in OURS.items() if option in options}
    assert {option: parameter.default for option, parameter in options.items()} == PUBLISHED[name] | ours


def network(seed, widths, strides=(1, 2, 2), stages=True):
    """Return a network of convolutions whose maps are the outputs of layers s0, s1, ..."""

    class Network(nn.Sequential):
        pass

    def build():
        built, channels = Network(), 2
        for stage, (width, stride) in enumerate(zip(widths, strides, strict=True)):
            built.add_module(f"s{stage}", nn.Conv2d(channels, width, 3, stride, padding=1))
            built.add_module(f"r{stage}", nn.Tanh())
            channels = width
        built.add_module("pool", nn.AdaptiveAvgPool2d(1))
        built.add_module("flat", nn.Flatten())
        built.add_module("fc", nn.Linear(channels, CLASSES))
        return built

    built = seeded(seed, build)
    if stages:
        built.stages = tuple(f"r{stage}" for stage in range(len(widths)))
    return built


def samples(height=9, width=7):
    x = torch.randn(SAMPLES, 2, height, width, generator=torch.Generator().manual_seed(5))
    return Samples(x, torch.arange(SAMPLES) * 3 % CLASSES)


def prepared(name, options=None, student=None, teacher=None, data=None):
    student = student or network(1, (3, 4, 5))
    teacher = (teacher or network(2, (4, 6, 8), (2, 1, 2))).eval()
    method = methods.build(name, options)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        method.prepare(student, teacher, data or samples())
    return method, student, teacher


def maps_of(net, x):
    found = []
    for layer in net:
        x = layer(x)
        if isinstance(layer, nn.Tanh):
            found.append(x.detach().double().numpy())
    return found, x.detach().double().numpy()


def pooled(x, height, width):
    """Return the means over torch's adaptive bins, from floor(i h / n) to ceil((i + 1) h / n)."""
    bins = [
        [(i * size // n, -(-(i + 1) * size // n)) for i in range(n)]
        for size, n in zip(x.shape[2:], (height, width), strict=True)
    ]
    return np.stack([np.stack([x[:, :, a:b, c:d].mean((2, 3)) for c, d in bins[1]], -1) for a, b in bins[0]], -2)


def to_common(*maps):
    height, width = (min(x.shape[side] for x in maps) for side in (2, 3))
    return [pooled(x, height, width) for x in maps]


def attention(x, power):
    a = (np.abs(x) ** power).mean(1).reshape(len(x), -1)
    return a / np.sqrt((a**2).sum(1, keepdims=True))


def mean_cross_entropy(z, label):
    return -log_softmax(z, 1)[np.arange(len(z)), label].mean()


@pytest.mark.parametrize("power", [1, 2, 3.5])
def test_at_matches_formula(power):
    method, student, teacher = prepared("at", {"power": power, "at_weight": 50, "ce_weight": 0.5})
    data = samples()
    outcome = method(student, teacher, data.at(range(SAMPLES)))
    (maps, z), (targets, _) = maps_of(student, data.x), maps_of(teacher, data.x)
    at = 0
    for pair in zip(maps, targets, strict=True):
        assert pair[0].shape != pair[1].shape
        at += ((attention(to_common(*pair)[0], power) - attention(to_common(*pair)[1], power)) ** 2).mean()
    np.testing.assert_allclose(outcome.terms["at"].item(), at, rtol=1e-4)
    np.testing.assert_allclose(
        outcome.loss.item(), 0.5 * mean_cross_entropy(z, data.label.numpy()) + 50 * at, rtol=1e-5
    )


def test_at_of_maps_of_zeros_passes_no_gradient():
    x = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = attention_losses(x, torch.rand(2, 5, 4, 4), 2)
    torch.testing.assert_close(loss, torch.full((2,), 1 / 16))
    loss.sum().backward()
    assert x.grad.eq(0).all()


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
def test_attention_gradient(power):
    generator = torch.Generator().manual_seed(1)
    x, y = (
        torch.randn(3, c, *size, dtype=torch.float64, generator=generator) for c, size in ((2, (5, 3)), (4, (3, 4)))
    )
    assert torch.autograd.gradcheck(lambda x: attention_losses(x, y, power), x.requires_grad_())


def convolved(x, weight):
    """Return the 3x3 convolution with a border of zeros."""
    height, width = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = [
        [padded[:, :, i : i + height, j : j + width] for j in range(3)] for i in range(3)
    ]  # [row][column] of the kernel
    return sum(np.einsum("oc,bchw->bohw", weight[:, :, i, j], windows[i][j]) for i in range(3) for j in range(3))


def normalised(x, eps=1e-5):
    mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    return (x - mean) / np.sqrt(variance + eps)


def double(x):
    return x.detach().double().numpy()


@pytest.mark.parametrize("relu", [True, False])
def test_fitnet_matches_formula(relu):
    """By default the hint is the middle stage."""
    method, student, teacher = prepared("fitnet", {"relu": relu, "ce_weight": 0.5})
    data = samples()
    outcome = method(student, teacher, data.at(range(SAMPLES)))
    (maps, z), (targets, _) = maps_of(student, data.x), maps_of(teacher, data.x)
    x, target = to_common(maps[1], targets[1])
    convolution = method.regressors[0][0]
    x = np.einsum("oc,bchw->bohw", double(convolution.weight)[:, :, 0, 0], x) + double(convolution.bias)[:, None, None]
    x = normalised(x)
    hint = (((x.clip(0) if relu else x) - target) ** 2).mean()
    np.testing.assert_allclose(outcome.terms["hint"].item(), hint, rtol=1e-4)
    np.testing.assert_allclose(
        outcome.loss.item(), 0.5 * mean_cross_entropy(z, data.label.numpy()) + 100 * hint, rtol=1e-5
    )


@pytest.mark.parametrize(("stages", "middle"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2)])
def test_fitnet_takes_middle_stage(stages, middle):
    assert methods.build("fitnet").default_layers([*range(stages)]) == [middle]


def context_loss(x, y):
    total, weights = ((x - y) ** 2).mean(), [1]
    for size in (4, 2, 1):
        if size < min(x.shape[2:]):
            weights.append(weights[-1] / 2)
            total += weights[-1] * ((pooled(x, size, size) - pooled(y, size, size)) ** 2).mean()
    return total / sum(weights)


def resized(x, height, width):
    """Return x with the nearest pixel below each position."""
    rows, columns = (np.arange(n) * size // n for n, size in zip((height, width), x.shape[2:], strict=True))
    return x[:, :, rows][:, :, :, columns]


@pytest.mark.parametrize("mid", [512, 2])
def test_reviewkd_matches_formula(mid):
    method, student, teacher = prepared("reviewkd", {"mid_channels": mid, "review_weight": 3, "ce_weight": 0.5})
    method.begin(4, 240)
    data = samples()
    outcome = method(student, teacher, data.at(range(SAMPLES)))
    (maps, z), (targets, _) = maps_of(student, data.x), maps_of(teacher, data.x)
    review, deeper = 0, None
    for level, fusion in reversed([*enumerate(method.fusions)]):
        x, target = (
            found[level] if level < len(found) else found[-1].mean((2, 3), keepdims=True) for found in (maps, targets)
        )
        x = normalised(np.einsum("oc,bchw->bohw", double(fusion.narrow.weight)[:, :, 0, 0], x))
        assert x.shape[1] == min(mid, 5) and (fusion.attention is None) == (deeper is None)
        if deeper is not None:
            deeper = resized(deeper, *x.shape[2:])
            score = np.einsum(
                "oc,bchw->bohw", double(fusion.attention.weight)[:, :, 0, 0], np.concatenate([x, deeper], 1)
            )
            share = 1 / (1 + np.exp(-score - double(fusion.attention.bias)[:, None, None]))
            x = x * share[:, :1] + deeper * share[:, 1:]
        deeper = x = resized(x, *target.shape[2:])
        review += context_loss(normalised(convolved(x, double(fusion.predict.weight))), target)
    np.testing.assert_allclose(outcome.terms["review"].item(), review, rtol=1e-4)
    expected = 0.5 * mean_cross_entropy(z, data.label.numpy()) + 0.25 * 3 * review
    np.testing.assert_allclose(outcome.loss.item(), expected, rtol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (5, 2), (4, 4), (9, 7)])
def test_hierarchical_context_loss_of_any_size(size):
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(3, 2, *size, dtype=torch.float64, generator=generator) for _ in range(2))
    found = hierarchical_context_losses(x.requires_grad_(), y)
    np.testing.assert_allclose(found.mean().item(), context_loss(x.detach().numpy(), y.numpy()), rtol=1e-12)
    assert torch.autograd.gradcheck(lambda x: hierarchical_context_losses(x, y), x)


@pytest.mark.parametrize("name", ["fitnet", "reviewkd"])
def test_gradient_is_that_of_the_loss_through_own_parts(name):
    data = samples(5, 4)
    method, student, teacher = prepared(name, data=data)
    student, teacher, method = (net.double() for net in (student, teacher, method))
    batch = data.at(range(4))
    batch = batch._replace(x=batch.x.double())
    names, values = zip(*((n, p) for n, p in student.named_parameters() if n.startswith("s1")), strict=True)

    def loss(*changed):
        called = lambda x: torch.func.functional_call(student, dict(zip(names, changed, strict=True)), x)  # noqa: E731
        return method(called, teacher, batch).loss

    method.eval()  # running statistics would change between the calls
    assert torch.autograd.gradcheck(loss, tuple(v.detach().clone().requires_grad_() for v in values))


@pytest.mark.parametrize("keep", [1.0, 0.4])
@pytest.mark.parametrize("name", NAMES)
def test_weighted_losses_average_to_the_loss(name, keep):
    data = samples()
    found = []
    for weight in (None, torch.ones(SAMPLES), torch.arange(SAMPLES) / 5.0):
        method, student, teacher = prepared(name, {"batch_keep": keep}, data=data)
        found.append(method(student, teacher, data.at(range(SAMPLES), weight=weight)))
    torch.testing.assert_close(found[0].loss, found[1].loss)
    torch.testing.assert_close(found[1].loss, found[1].losses.mean())
    torch.testing.assert_close(found[2].loss, (found[1].losses * torch.arange(SAMPLES) / 5.0).mean())
    assert found[0].losses is None


def test_one_value_per_channel_is_normalised_by_running_statistics():
    norm = BatchNormalisation(3)
    reference = copy.deepcopy(norm).eval()
    x = torch.randn(1, 3, 1, 1)
    torch.testing.assert_close(norm(x), reference(x))
    assert norm.num_batches_tracked == 0
    x = torch.randn(2, 3, 1, 1)
    torch.testing.assert_close(norm(x), nn.BatchNorm2d(3)(x))
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("name", NAMES)
def test_layers_of_any_network_can_be_named(name):
    student, teacher = network(1, (3, 4, 5), stages=False), network(2, (4, 6, 8), (2, 1, 2), stages=False)
    data = samples()
    with pytest.raises(
        ValueError, match=r"student_layers must name layers, e.g. layer1,layer2: the student, a Network, has no"
    ):
        prepared(name, {}, student, teacher)
    found = []
    for options, nets in (
        ({"student_layers": "r0, r1,r2", "teacher_layers": "r0,r1,r2"}, (student, teacher)),
        ({}, ()),
    ):
        if name == "fitnet" and options:
            options = dict.fromkeys(options, "r1")
        method, *nets = prepared(name, options, *nets)
        found.append(method(*nets, data.at(range(SAMPLES))).loss)
        method.release()
    assert torch.equal(*found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (("r0", "r0,r1"), ValueError, r"must have the same number of layers, got 1 \(r0\) and 2 \(r0,r1\)"),
        (("r0,r9", "r0,r1"), ValueError, "student_layers must be names in student.named_modules.*, which has no 'r9'"),
        (("r0", "fc"), RuntimeError, "the teacher's layer 'fc' had .* maps"),
        (("r0,", "r0"), ValueError, "student_layers must be names of layers, e.g. .*, got 'r0,', with an empty name"),
        ((3, "r0"), TypeError, "student_layers must be names of layers, .* got int 3"),
    ],
)
def test_layers_that_do_not_fit_are_refused(name, layers, error, message):
    student = network(1, (3, 4, 5))
    with pytest.raises(error, match=message):
        prepared(name, dict(zip(("student_layers", "teacher_layers"), layers, strict=True)), student)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["cnn_large", "mobilenet_v2", "resnet8x4", "resnet50", "shufflenet_v1", "vgg11", "wrn_16_2"]
)
def test_every_family_of_networks_trains(family):
    shape = {"in_channels": 3, "num_classes": CLASSES}
    student, teacher = (seeded(seed, lambda: models.build(family, **shape)) for seed in (1, 2))
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = Samples(x, torch.arange(4))
    for name in NAMES:
        method, *nets = prepared(name, {}, student, teacher, data)
        student.zero_grad()
        method(*nets, data.at(range(4))).loss.backward()
        assert all(
            p.grad is not None and p.grad.isfinite().all() for p in (*student.parameters(), *method.parameters())
        )
        method.release()


THIRD_PARTY = """
import sys
import torch
library = torch.library.Library("torchvision", "DEF")  # torchvision may be built for another torch
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
try:
    import timm
    import torchvision
except (ImportError, RuntimeError) as error:
    sys.exit(f"skip: {error}")
from kcd_ext import methods
from kcd_ext.methods import Batch
label = torch.arange(4)
batch = Batch(torch.randn(4, 3, 64, 64), label, label)
student = torchvision.models.resnet18(num_classes=4)
teacher = timm.create_model("efficientnet_b0", num_classes=4).eval()
layers = {"student_layers": "layer1,layer2,layer3", "teacher_layers": "blocks.1,blocks.2,blocks.4"}
for name in ("at", "fitnet", "reviewkd"):
    method = methods.build(name, layers)
    method.prepare(student, teacher, [batch])
    student.zero_grad()
    method(student, teacher, batch).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (*student.parameters(), *method.parameters()))
    method.release()
"""


@pytest.mark.slow
def test_networks_of_timm_and_torchvision_train_with_named_layers():
    found = subprocess.run([sys.executable, "-c", THIRD_PARTY], capture_output=True, text=True, timeout=180)
    if found.stderr.startswith("skip"):
        pytest.skip(found.stderr)
    assert found.returncode == 0, found.stderr
