"""Tests of the networks against published numbers and against reimplementations in torch.nn.functional."""

import math
from functools import partial

import pytest
import torch
from small_runs import FAMILIES, mostly_slow
from torch import nn
from torch.nn import functional as F

from kcd_ext import models
from kcd_ext.models import features
from kcd_ext.models.cnn import cnn
from kcd_ext.models.resnet import ResNet
from kcd_ext.models.wide_resnet import WideResNet

NARROW = [(16, 32), (32, 16), (64, 8)]
DOUBLE = [(32, 32), (64, 16), (128, 8)]
FOURFOLD = [(64, 32), (128, 16), (256, 8)]
VGG = [(128, 16), (256, 8), (512, 4), (512, 4)]

# Parameters for 3 channels and 100 classes; channels and side of every stage for images of 32x32. The parameters were
# counted in the published networks of the RepDistiller comparison (Tian et al., 2020).
PUBLISHED = {
    "mobilenet_v2": (812_836, [(12, 16), (16, 8), (48, 4), (1280, 2)]),
    "resnet8": (83_892, NARROW),
    "resnet14": (181_108, NARROW),
    "resnet20": (278_324, NARROW),
    "resnet32": (472_756, NARROW),
    "resnet44": (667_188, NARROW),
    "resnet56": (861_620, NARROW),
    "resnet110": (1_736_564, NARROW),
    "resnet8x4": (1_233_540, FOURFOLD),
    "resnet32x4": (7_433_860, FOURFOLD),
    "resnet50": (23_705_252, [(256, 32), (512, 16), (1024, 8), (2048, 4)]),
    "shufflenet_v1": (949_258, [(240, 16), (480, 8), (960, 4)]),
    "shufflenet_v2": (1_355_528, [(116, 16), (232, 8), (1024, 4)]),
    "vgg8": (3_965_028, VGG),
    "vgg11": (9_277_284, VGG),
    "vgg13": (9_462_180, VGG),
    "vgg16": (14_774_436, VGG),
    "vgg19": (20_086_692, VGG),
    "wrn_16_1": (180_916, NARROW),
    "wrn_16_2": (703_284, DOUBLE),
    "wrn_40_1": (569_780, NARROW),
    "wrn_40_2": (2_255_156, DOUBLE),
}
OURS = {"cnn_large": (41_812, [(16, 16), (64, 8)]), "cnn_small": (3_304, [(4, 16), (16, 8)])}


pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(name, seed=0, in_channels=3, num_classes=10):
    torch.manual_seed(seed)
    return models.build(name, in_channels=in_channels, num_classes=num_classes)


def hooks_of(network):
    return [hook for module in network.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


@pytest.mark.parametrize("name", mostly_slow(models.REGISTRY))
def test_networks_have_the_published_parameters_and_shapes(name):
    parameters, stages = {**PUBLISHED, **OURS}[name]
    with torch.device("meta"):  # shapes only, nothing is computed
        network = models.build(name, in_channels=3, num_classes=100)
        assert sum(parameter.numel() for parameter in network.parameters()) == parameters
        *maps, pooled, logits = features(network, torch.empty(2, 3, 32, 32))
        assert [tuple(each.shape) for each in maps] == [(2, channels, side, side) for channels, side in stages]
        assert pooled.shape == (2, stages[-1][0]) and logits.shape == (2, 100)
        network = models.build(name, in_channels=1, num_classes=7)
        for height, width in ((8, 8), (28, 28), (27, 45), (64, 64)):
            *maps, pooled, logits = features(network, torch.empty(3, 1, height, width))
            assert [each.shape[:2] for each in maps] == [(3, channels) for channels, _ in stages]
            assert all(
                abs(each.shape[2] - height * side / 32) < 1 for each, (_, side) in zip(maps, stages, strict=True)
            )
            assert pooled.shape == (3, stages[-1][0]) and logits.shape == (3, 7)


@pytest.mark.parametrize(("name", "parameters"), [("cnn_large", 35_674), ("cnn_small", 1_702)])
def test_demo_networks_have_the_documented_parameters(name, parameters):
    assert sum(parameter.numel() for parameter in seeded(name, in_channels=1).parameters()) == parameters


@pytest.mark.parametrize(("family", "options"), [(ResNet, {}), (WideResNet, {"width": 1})])
def test_depth_without_integer_block_count_is_refused(family, options):
    outside = 2 if family is ResNet else 4
    make = partial(family, in_channels=1, num_classes=2, **options)
    for depth, error, message in (
        (7 + outside, ValueError, rf"depth must be 6 n \+ {outside} for an integer n >= 1, got {7 + outside}"),
        (outside, ValueError, rf"depth must be an integer >= {6 + outside}, got {outside}"),
        (20.0, TypeError, rf"depth must be an integer >= {6 + outside}, got float 20.0"),
    ):
        with pytest.raises(error, match=message):
            make(depth=depth)


def test_widths_and_strides_of_different_length_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        cnn(1, 2, widths=(4, 8), strides=(2,))


# --- reimplementations in torch.nn.functional -------------------------------------------------------------------------


class Weights:
    """A network's tensors by name; each must be used exactly once."""

    def __init__(self, network):
        self.left = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}

    def convolve(self, x, name, stride=1, groups=1, bias=False):
        weight = self.left.pop(f"{name}.weight")
        bias = self.left.pop(f"{name}.bias") if bias else None
        return F.conv2d(x, weight, bias, stride, padding=(weight.shape[-1] - 1) // 2, groups=groups)

    def normalise(self, x, name):
        mean, variance, weight, bias = (
            self.left.pop(f"{name}.{part}")[:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def both(self, x, convolution, norm, stride=1, groups=1, bias=False):
        return self.normalise(self.convolve(x, convolution, stride, groups, bias), norm)

    def finish(self, maps, name):
        pooled = maps[-1].sum((2, 3)) / maps[-1][0, 0].numel()
        logits = pooled @ self.left.pop(f"{name}.weight").T + self.left.pop(f"{name}.bias")
        assert not self.left, f"unused: {list(self.left)}"
        return [*maps, pooled, logits]


def plain_resnet(w, x, blocks, first_projection=2):
    x, maps = w.both(x, "conv1", "bn1").relu(), []
    for stage in (1, 2, 3):
        for block in range(blocks):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = w.both(x, f"{at}.conv1", f"{at}.bn1", stride).relu()
            y = w.both(y, f"{at}.conv2", f"{at}.bn2")
            if block == 0 and stage >= first_projection:
                x = w.both(x, f"{at}.downsample.0", f"{at}.downsample.1", stride)
            x = (x + y).relu()
        maps.append(x)
    return w.finish(maps, "fc")


def plain_resnet50(w, x):
    x, maps = w.both(x, "conv1", "bn1").relu(), []
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = w.both(x, f"{at}.conv1", f"{at}.bn1").relu()
            y = w.both(y, f"{at}.conv2", f"{at}.bn2", stride).relu()
            y = w.both(y, f"{at}.conv3", f"{at}.bn3")
            if block == 0:
                x = w.both(x, f"{at}.shortcut.0", f"{at}.shortcut.1", stride)
            x = (x + y).relu()
        maps.append(x)
    return w.finish(maps, "linear")


def plain_wide_resnet(w, x, blocks, first_projection):
    x, maps = w.convolve(x, "conv1"), []
    for stage in (1, 2, 3):
        for block in range(blocks):
            at, stride = f"block{stage}.layer.{block}", 2 if stage > 1 and block == 0 else 1
            active = w.normalise(x, f"{at}.bn1").relu()
            y = w.both(active, f"{at}.conv1", f"{at}.bn2", stride).relu()
            if block == 0 and stage >= first_projection:
                x = w.convolve(active, f"{at}.convShortcut", stride)
            x = x + w.convolve(y, f"{at}.conv2")
        maps.append(x)
    return w.finish([*maps[:2], w.normalise(maps[2], "bn1").relu()], "fc")


def plain_vgg(w, x, convolutions):
    maps = []
    for stage, count in enumerate(convolutions):
        for layer in range(0, 3 * count, 3):
            x = w.both(x, f"block{stage}.{layer}", f"block{stage}.{layer + 1}", bias=True).relu()
        maps.append(x)
        x = F.max_pool2d(x, 2) if stage < 3 else x
    return w.finish(maps[1:], "classifier")


def plain_mobilenet_v2(w, x):
    x, maps, channels = w.both(x, "conv1.0", "conv1.1", 2).relu(), [], 16
    for stage, (out, count) in enumerate(((8, 1), (12, 2), (16, 3), (32, 4), (48, 3), (80, 3), (160, 1))):
        for block in range(count):
            at, stride = f"blocks.{stage}.{block}.conv", 2 if stage in (2, 3, 5) and block == 0 else 1
            hidden = channels * (6 if stage else 1)
            y = w.both(x, f"{at}.0", f"{at}.1").relu()
            y = w.both(y, f"{at}.3", f"{at}.4", stride, groups=hidden).relu()
            y = w.both(y, f"{at}.6", f"{at}.7")
            x, channels = (x + y if block else y), out
        maps.append(x)
    return w.finish([maps[1], maps[2], maps[4], w.both(x, "conv2.0", "conv2.1").relu()], "classifier.0")


def plain_shufflenet_v1(w, x):
    x, maps = w.both(x, "conv1", "bn1").relu(), []
    for stage, (out, blocks) in enumerate(((240, 4), (480, 8), (960, 4)), start=1):
        for block in range(blocks):
            at, down = f"layer{stage}.{block}", block == 0
            groups = 1 if stage == 1 and down else 3
            hidden = (out - x.shape[1] if down else out) // 4
            y = w.both(x, f"{at}.conv1", f"{at}.bn1", groups=groups).relu()
            y = torch.channel_shuffle(y, groups)
            y = w.both(y, f"{at}.conv2", f"{at}.bn2", 2 if down else 1, groups=hidden).relu()
            y = w.both(y, f"{at}.conv3", f"{at}.bn3", groups=3)
            x = (torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1) if down else x + y).relu()
        maps.append(x)
    return w.finish(maps, "linear")


def plain_shufflenet_v2(w, x):
    x, maps = w.both(x, "conv1", "bn1").relu(), []
    for stage, (out, blocks) in enumerate(((116, 3), (232, 7), (464, 3)), start=1):
        at, into = f"layer{stage}.0", x.shape[1]
        left = w.both(w.both(x, f"{at}.conv1", f"{at}.bn1", 2, into), f"{at}.conv2", f"{at}.bn2").relu()
        right = w.both(x, f"{at}.conv3", f"{at}.bn3").relu()
        right = w.both(w.both(right, f"{at}.conv4", f"{at}.bn4", 2, out // 2), f"{at}.conv5", f"{at}.bn5").relu()
        x = torch.channel_shuffle(torch.cat([left, right], 1), 2)
        for block in range(1, blocks + 1):
            at = f"layer{stage}.{block}"
            right = w.both(x[:, out // 2 :], f"{at}.conv1", f"{at}.bn1").relu()
            right = w.both(right, f"{at}.conv2", f"{at}.bn2", groups=out // 2)
            right = w.both(right, f"{at}.conv3", f"{at}.bn3").relu()
            x = torch.channel_shuffle(torch.cat([x[:, : out // 2], right], 1), 2)
        maps.append(x)
    return w.finish([*maps[:2], w.both(x, "conv2", "bn2").relu()], "linear")


@pytest.mark.parametrize(
    ("name", "plain", "options"),
    [
        ("resnet20", plain_resnet, {"blocks": 3}),
        ("resnet8x4", plain_resnet, {"blocks": 1, "first_projection": 1}),
        ("resnet50", plain_resnet50, {}),
        ("wrn_16_1", plain_wide_resnet, {"blocks": 2, "first_projection": 2}),
        ("wrn_16_2", plain_wide_resnet, {"blocks": 2, "first_projection": 1}),
        ("vgg16", plain_vgg, {"convolutions": (2, 2, 3, 3, 3)}),
        ("mobilenet_v2", plain_mobilenet_v2, {}),
        ("shufflenet_v1", plain_shufflenet_v1, {}),
        ("shufflenet_v2", plain_shufflenet_v2, {}),
    ],
)
def test_networks_equal_their_reimplementation(name, plain, options):
    """Parameter names too: they are those of published checkpoints."""
    network = seeded(name).double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.bias.data):
                values.normal_(std=0.3)
            for values in (module.running_var, module.weight.data):
                values.uniform_(0.5, 1.5)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        for got, expected in zip(features(network, x), plain(Weights(network), x, **options), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11 * float(expected.abs().max()))


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES[1:])
def test_initial_weights_have_the_documented_distribution(name):
    """Convolutions: normal, variance 2 / (outputs * area). ShuffleNets and some linear layers: torch's default."""
    network = seeded(name, num_classes=100)
    small_linear = name in ("mobilenet_v2", "vgg11")
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        weight = module.weight.detach()
        if isinstance(module, nn.Linear) and small_linear:
            deviation = 0.01
        elif isinstance(module, nn.Linear) or name.startswith("shufflenet"):
            deviation = 1 / math.sqrt(3 * weight[0].numel())  # uniform in +- 1 / sqrt(inputs)
            assert weight.abs().max() <= 1 / math.sqrt(weight[0].numel())
        else:
            deviation = math.sqrt(2 / (module.out_channels * math.prod(module.kernel_size)))
            assert weight.numel() < 1000 or weight.abs().max() > 2.5 * deviation  # normal, not uniform
        assert abs(weight.std() / deviation - 1) < 4 / math.sqrt(2 * weight.numel())
        if module.bias is not None:
            zero = isinstance(module, nn.Conv2d) or small_linear or name.startswith("wrn")
            assert (module.bias == 0).all() == zero


@pytest.mark.parametrize("name", FAMILIES)
def test_initial_weights_depend_on_the_seed(name):
    first, again, other = (seeded(name, seed).state_dict() for seed in (5, 5, 6))
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


# --- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", mostly_slow(models.REGISTRY))
def test_gradient_reaches_every_parameter(name):
    network = seeded(name).train()
    torch.manual_seed(1)
    *maps, pooled, logits = features(network, torch.randn(4, 3, 16, 16))
    torch.testing.assert_close(pooled, maps[-1].mean((2, 3)))
    F.cross_entropy(logits, torch.arange(4)).backward()
    for path, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), path
        # Batch normalisation subtracts these biases.
        cancelled = name.startswith("vgg") and path.startswith("block") and path.endswith("bias")
        assert cancelled or parameter.grad.any(), path


@pytest.mark.parametrize("name", FAMILIES)
def test_features_returns_the_networks_own_tensors(name):
    """No module modifies another's output in place; `features` copies nothing and removes its hooks."""
    network, x = seeded(name).eval(), torch.randn(2, 3, 16, 16)
    seen = {}

    def record(path):
        def hook(_module, inputs, output):
            seen[path] = (inputs[0], inputs[0].clone(), output, output.clone())

        return hook

    handles = [module.register_forward_hook(record(path)) for path, module in network.named_modules()]
    *maps, pooled, logits = features(network, x)
    for x_in, x_in_copy, output, output_copy in seen.values():
        assert torch.equal(x_in, x_in_copy) and torch.equal(output, output_copy)
    assert len(maps) == len(network.stages)
    assert all(each is seen[path][2] for each, path in zip(maps, network.stages, strict=True))
    assert pooled is next(seen[path][0] for path, module in network.named_modules() if isinstance(module, nn.Linear))
    assert logits is seen[""][2]
    for handle in handles:
        handle.remove()
    assert not hooks_of(network) and torch.equal(network(x), logits)
    with pytest.raises(RuntimeError):
        features(network, x[:, :2])  # a channel is missing
    assert not hooks_of(network)


def test_features_refuses_networks_without_stages_or_linear_layer():
    class Odd(nn.Sequential):
        stages = ("1", "0")

    x = torch.randn(2, 3)
    with pytest.raises(TypeError, match=r"network must have stages, .* got Linear without them"):
        features(nn.Linear(3, 2), x)
    with pytest.raises(TypeError, match=r"network must end in a torch.nn.Linear, got Odd without any"):
        features(Odd(nn.ReLU(), nn.ReLU()), x)
    network = Odd(nn.ReLU(), nn.Tanh(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"linear layer of Odd must run as \['1', '0', '2'\], got \['0', '1', '2'\]"):
        features(network, x)
    assert not hooks_of(network)
