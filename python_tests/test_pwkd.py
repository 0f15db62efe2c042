"""Slimmable networks against narrow ones built by hand, and PWKD against its parts."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from processes import Crew
from scipy.special import log_softmax, softmax
from small_runs import CLASSES, StopError, assert_same, final, images, mostly_slow, seeded, stop_after
from torch import nn
from torch.nn import functional

from kcd_ext import files, methods, models
from kcd_ext.methods import Batch, pkt
from kcd_ext.methods.features import Tap
from kcd_ext.methods.kd import KnowledgeDistillation
from kcd_ext.methods.pwkd import PartialToWhole, slimmable
from kcd_ext.training import Condense, Recipe, checkpoint, distill

# Published for slimmable networks (Yu et al., 2019), or ours. The paper's defaults are unknown.
DEFAULTS = {
    "base": "kd",
    "widths": (0.25, 0.5, 0.75, 1.0),
    "teacher_epochs": 60,
    "teacher_lr": 0.05,
    "lr_min": 0.0,
    "in_place": True,
    "widths_a_step": None,
    "partial": True,
}


pytestmark = pytest.mark.usefixtures("one_thread")


def randomise_normalisation(network, seed=0):
    """Change the parameters and statistics of all normalisations in place, and return the network."""
    generator = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            for part in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                if part is not None:
                    part.data.copy_(0.5 + torch.rand(part.shape, generator=generator))
    return network


def network_of_all_layer_types():
    """Return a network for images (b, 3, 6, 6) with all supported layer types."""
    return nn.Sequential(
        nn.Conv2d(3, 10, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.Conv2d(10, 20, 3, 2, padding=1, groups=10),  # two output channels per input channel
        nn.BatchNorm2d(20),
        nn.Conv2d(20, 12, (2, 1), groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 2 * 3, 10),
        nn.BatchNorm1d(10),
        nn.ReLU(),
        nn.Linear(10, 5),
    )


# --- slimmable networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", mostly_slow(models.REGISTRY))
def test_full_width_matches_network_bit_for_bit_and_all_widths_run(name):
    plain = randomise_normalisation(seeded(1, lambda: models.build(name, in_channels=3, num_classes=7)))
    size = 8 if name.startswith("cnn") else 32
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    slim = slimmable(plain, DEFAULTS["widths"])
    assert type(slim.network) is type(plain) and slim.network.stages == plain.stages
    slim.set_width(0.5)
    slim(x)
    slim.set_width(1.0)
    for network in (plain, slim):
        network.train()(x).square().sum().backward()
    own = dict(slim.network.named_parameters())
    for path, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, own[path].grad)
    state = slim.network.state_dict()
    assert all(torch.equal(part, state[path]) for path, part in plain.state_dict().items())  # running statistics too
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), slim.eval()(x))
    assert plain.state_dict().keys() | {path for path in state if ".narrow." in path} == state.keys()

    feature_counts = {}
    with torch.no_grad():
        tap = Tap(slim.network, None, "teacher")
        for width in slim.widths:
            slim.set_width(width)
            assert slim.width == width
            feature_counts[width] = tap.run(slim.network, x)[1].shape[1]
    tap.remove()
    assert {width: count / feature_counts[1.0] for width, count in feature_counts.items()} == {
        width: width for width in slim.widths
    }
    slim.set_width(0.25)
    slim.train().zero_grad()
    loss = slim(x).square().sum()
    loss.backward()
    assert loss.isfinite() and all(
        p.grad is not None for path, p in slim.network.named_parameters() if ".narrow.0." in path
    )


def convolved(x, weight, bias, layer):
    """Convolve float64 arrays in a loop over the outputs. The weight's shape gives the groups."""
    (kh, kw), (sh, sw) = weight.shape[2:], layer.stride
    mode = {"zeros": "constant", "reflect": "reflect"}[layer.padding_mode]
    x = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in layer.padding)], mode=mode)
    groups = x.shape[1] // weight.shape[1]
    out = np.empty((len(x), len(weight), (x.shape[2] - kh) // sh + 1, (x.shape[3] - kw) // sw + 1))
    for j in range(len(weight)):
        first = j // (len(weight) // groups) * weight.shape[1]
        for r, c in np.ndindex(*out.shape[2:]):
            patch = x[:, first : first + weight.shape[1], r * sh : r * sh + kh, c * sw : c * sw + kw]
            out[:, j, r, c] = (patch * weight[j]).sum((1, 2, 3)) + bias[j]
    return out


def normalised(x, norm, mean=None, variance=None):
    c = x.shape[1]
    shape = (1, c, *[1] * (x.ndim - 2))
    mean, variance, weight, bias = (
        (own.detach().numpy()[:c] if given is None else given).reshape(shape)
        for own, given in (
            (norm.running_mean, mean),
            (norm.running_var, variance),
            (norm.weight, None),
            (norm.bias, None),
        )
    )
    return (x - mean) / np.sqrt(variance + norm.eps) * weight + bias


@pytest.mark.parametrize(
    ("width", "channels"),
    # Two groups, so all counts are even. The depthwise layer doubles its channels.
    [(0.3, (4, 8, 4, 4)), (0.5, (6, 12, 6, 6)), (0.7, (8, 16, 10, 8)), (0.95, (10, 20, 12, 10))],
)
def test_narrow_widths_match_sliced_weights_in_float64(width, channels):
    plain = randomise_normalisation(seeded(3, network_of_all_layer_types)).double()
    slim = slimmable(plain, [width, 1.0]).eval()
    narrow = [randomise_normalisation(slim.network[i].narrow, seed=i)[0] for i in (1, 4, 9)]
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    slim.set_width(width)
    found = slim(x).detach().numpy()

    weight, bias = ([getattr(layer, k, None) for layer in plain] for k in ("weight", "bias"))
    weight, bias = ([None if w is None else w.detach().numpy() for w in parts] for parts in (weight, bias))
    a, b, c, d = channels
    y = convolved(x.numpy(), weight[0][:a], bias[0][:a], plain[0])
    y = np.maximum(normalised(y, narrow[0]), 0)
    y = normalised(convolved(y, weight[3][:b], bias[3][:b], plain[3]), narrow[1])
    rows = [*range(c // 2), *range(6, 6 + c // 2)]  # the first rows of each group
    y = np.maximum(convolved(y, weight[5][rows][:, : b // 2], bias[5][rows], plain[5]), 0)
    y = y.reshape(3, -1)
    y = np.maximum(normalised(y @ weight[8][:d, : y.shape[1]].T + bias[8][:d], narrow[2]), 0)
    np.testing.assert_allclose(found, y @ weight[11][:, :d].T + bias[11], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
def test_each_width_has_its_own_normalisation(options):
    plain = randomise_normalisation(
        nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8, **options), nn.Linear(8, 2)).double()
    )
    slim = slimmable(plain, (0.3, 0.6, 1)).train()
    norm, before = slim.network[1], copy.deepcopy(slim.state_dict())
    assert all(
        torch.equal(part, before[f"network.1.narrow.{i}.{k}"])
        for i in (0, 1)
        for k, part in plain[1].state_dict().items()
    )
    slim.set_width(0.6)
    momentum = options.get("momentum", 0.1)
    expected = [None if x is None else x.clone().numpy() for x in (norm.running_mean, norm.running_var)]
    for step in (1, 2):
        x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        y = functional.linear(x, slim.network[0].weight[:5], slim.network[0].bias[:5]).detach().numpy()
        caught = Tap(slim.network, "2", "teacher")
        _, found = caught.run(slim.network, x)
        caught.remove()
        z = (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5)
        if norm.affine:
            z = z * norm.weight[:5].detach().numpy() + norm.bias[:5].detach().numpy()
        np.testing.assert_allclose(found.detach().numpy(), z, rtol=1e-10)
        for i, statistic in enumerate((y.mean(0), y.var(0, ddof=1))):
            if expected[i] is not None:
                share = 1 / step if momentum is None else momentum
                expected[i][:5] = (1 - share) * expected[i][:5] + share * statistic
    after = slim.state_dict()
    moved = {path for path in after if not torch.equal(after[path], before[path])}
    if options.get("track_running_stats", True):
        assert moved == {f"network.1.narrow.1.{k}" for k in ("running_mean", "running_var", "num_batches_tracked")}
        for k, numbers in zip(("running_mean", "running_var"), expected, strict=True):
            np.testing.assert_allclose(after[f"network.1.narrow.1.{k}"].numpy(), numbers, rtol=1e-12)
        slim.eval()
        y = functional.linear(x, slim.network[0].weight[:5], slim.network[0].bias[:5]).detach().numpy()
        z = (y - expected[0][:5]) / np.sqrt(expected[1][:5] + 1e-5)
        if norm.affine:
            z = z * norm.weight[:5].detach().numpy() + norm.bias[:5].detach().numpy()
        logits = z @ slim.network[2].weight[:, :5].T.detach().numpy() + slim.network[2].bias.detach().numpy()
        np.testing.assert_allclose(slim(x).detach().numpy(), logits, rtol=1e-10)
    else:
        assert not moved


def test_copies_and_states_are_complete_and_module_is_unchanged():
    plain = randomise_normalisation(seeded(5, network_of_all_layer_types))
    frozen = copy.deepcopy(plain.state_dict())
    fired = []
    plain[3].register_forward_hook(lambda *_: fired.append(1))
    slim = slimmable(plain, (0.5, 1)).train()
    slim.set_width(0.5)
    x = torch.randn(4, 3, 6, 6)
    slim(x).sum().backward()
    assert fired == [1] and all(p.grad is None for p in plain.parameters())
    assert all(torch.equal(x, frozen[path]) for path, x in plain.state_dict().items())
    assert [type(layer) for layer in plain] == [type(layer) for layer in network_of_all_layer_types()]
    slim.eval()
    other, untouched = copy.deepcopy(slim), slimmable(seeded(6, network_of_all_layer_types), (0.5, 1)).eval()
    untouched.load_state_dict(slim.state_dict())
    assert other.width == 0.5 and untouched.width == 1
    untouched.set_width(0.5)
    plain[3]._forward_hooks.clear()
    read = pickle.loads(pickle.dumps(slimmable(plain, (0.5, 1)).eval()))
    read.load_state_dict(slim.state_dict())
    read.set_width(0.5)
    expected = slim(x)
    slim.set_width(1)
    assert all(torch.equal(network(x), expected) for network in (other, untouched, read))  # a copy has its own width
    assert not torch.equal(slim(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert other(x).dtype == torch.bfloat16
    torch.testing.assert_close(other.to(memory_format=torch.channels_last)(x), expected)


class ScaleOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 4))


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:.*weight_norm")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: nn.LayerNorm(4),
            r"layer '1.0', a LayerNorm with weight \(4,\), bias \(4,\), must be one of Conv2d, Linear",
        ),
        (lambda: nn.ConvTranspose2d(4, 3, 2), r"ConvTranspose2d with weight \(4, 3, 2, 2\), bias \(3,\)"),
        (ScaleOnly, r"ScaleOnly with scale \(3, 4\)"),
        (lambda: nn.Conv1d(4, 3, 2), r"Conv1d with weight"),
        (lambda: nn.SyncBatchNorm(4, affine=False), "SyncBatchNorm with nothing that can be sliced"),
        (lambda: nn.LazyLinear(4), "LazyLinear with weight UninitializedParameter"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "ParametrizedLinear with bias"),
        (lambda: nn.utils.weight_norm(nn.Linear(4, 4)), r"Linear with bias \(4,\), weight_g"),
        (lambda: torch.jit.script(nn.ReLU()), "RecursiveScriptModule with nothing"),
    ],
)
def test_unsupported_layer_is_named(build, message):
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(build()), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=message) as caught:
        slimmable(module, (0.5, 1))
    assert "\n" not in str(caught.value)


def test_invalid_widths_and_modules_are_refused():
    for widths in ((), (0.5,), (0.5, 0.5, 1), (1, 0.5), (0, 1), (0.5, 1.5), (float("nan"), 1), "0.5,x", "", 0.5):
        with pytest.raises(
            ValueError, match=r"widths must be ascending fractions in \(0, 1\] that end with 1, such as 0.25"
        ):
            slimmable(nn.Linear(2, 2), widths)
    for widths in (None, (True,), ("1",)):
        with pytest.raises(TypeError, match="widths must be ascending fractions"):
            slimmable(nn.Linear(2, 2), widths)
    assert slimmable(nn.Linear(2, 2), 1).widths == (1.0,)
    assert slimmable(nn.Linear(2, 2), "0.3, 1").widths == (0.3, 1.0)
    with pytest.raises(ValueError, match=r"width must be one of 0.5, 1.0, got 0.7"):
        slimmable(nn.Linear(2, 2), (0.5, 1)).set_width(0.7)
    with pytest.raises(ValueError, match=r"must have a torch.nn.Linear.*Sequential has none"):
        slimmable(nn.Sequential(nn.Conv2d(2, 2, 1)), (0.5, 1))
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got function"):
        slimmable(network_of_all_layer_types, (0.5, 1))
    thin = slimmable(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), (1e-12, 1))
    thin.set_width(1e-12)
    assert thin.network[0](torch.zeros(1, 2)).shape == (1, 1) and thin(torch.zeros(1, 2)).shape == (1, 2)
    odd = slimmable(nn.Sequential(nn.Conv2d(9, 9, 1, groups=3), nn.Flatten(), nn.Linear(9, 2)), (0.5, 1))
    odd.set_width(0.5)
    with pytest.raises(
        ValueError, match=r"layer '0', a Conv2d of 3 groups with weight \(9, 3, 1, 1\), receives 4 channels at a narrow"
    ):
        odd(torch.randn(1, 4, 1, 1))


# --- schedule -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_schedule_matches_formula(count):
    widths = tuple((i + 1) / count for i in range(count))
    for epochs in (count, count + 1, 2 * count + 1, 23, 240):
        plan = PartialToWhole(widths, epochs, lr_min=0.1)
        stages = [plan.stage(epoch) for epoch in range(epochs)]
        sizes = [stages.count(stage) for stage in range(count)]
        assert stages == sorted(stages) and max(sizes) - min(sizes) <= 1 and min(sizes) > 0
        t = 0
        for epoch, stage in enumerate(stages):
            t = t + 1 if epoch and stages[epoch - 1] == stage else 0
            expected = 0.1 + 0.5 * (1 - 0.1) * (1 + np.cos(np.pi * t / sizes[stage]))
            assert plan.lr_factor(epoch) == pytest.approx(expected, rel=1e-14)
            assert plan.width(epoch) == widths[stage] and (t > 0 or plan.lr_factor(epoch) == 1)
    with pytest.raises(ValueError, match=r"epoch must be an integer in \[0, 239\], got 240"):
        plan.stage(240)


def test_fewer_epochs_than_stages_are_refused():
    with pytest.raises(ValueError, match=r"epochs must be at least 3, one for each of widths 0.2, 0.5, 1, got 2"):
        PartialToWhole((0.2, 0.5, 1), 2)
    with pytest.raises(ValueError, match=r"lr_min must be a number in \[0, 1\], got 2"):
        PartialToWhole((0.2, 0.5, 1), 3, 2)
    with pytest.raises(ValueError, match=r"epochs must be at least 4, one for each of widths"):
        run("kd", epochs=3, widths=(0.25, 0.5, 0.75, 1))


# --- training ---------------------------------------------------------------------------------------------------


def network(seed, width=6):
    def build():
        return nn.Sequential(
            nn.Conv2d(1, width, 3, 2, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(9 * width, 8),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(8, CLASSES),
        )

    return seeded(seed, build)


def samples(size=20, dtype=torch.float32):
    generator = torch.Generator().manual_seed(11)
    x, label = torch.randn(size, 1, 6, 6, generator=generator, dtype=dtype), torch.arange(size) % CLASSES
    return [Batch(x[i], label[i], i) for i in torch.arange(size).split(7)]


def prepared(options=None, teacher=None, data=None):
    teacher = randomise_normalisation(teacher or network(2, width=9)).eval()
    student, data = network(1), data or samples()
    method = methods.build("pwkd", {"widths": (0.3, 0.5, 0.8, 1), **(options or {})})
    seeded(7, lambda: method.prepare(student, teacher, data))
    return method, student, teacher, data


def run(
    base,
    output=None,
    progress=None,
    resume=False,
    condense=None,
    teacher=None,
    precision="auto",
    compile=False,
    **options,
):
    epochs = options.pop("epochs", 5)
    own = {"crd": {"negatives": 12, "dimension": 5}, "sskd": {"head_epochs": 2, "head_lr": 0.02}}.get(base, {})
    own |= {"teacher_epochs": 2} if options.get("partial", True) else {}
    options = {"base": base, "widths": (0.3, 0.5, 1), "lr_min": 0.1, **own, **options}
    recipe = Recipe(
        "pwkd", options, condense, epochs, 8, lr=0.02, device="cpu", seed=5, precision=precision, compile=compile
    )
    student, teacher = network(1), teacher or network(2, width=9)
    torch.manual_seed(np.random.SeedSequence().entropy % 2**32)  # must have no effect
    arguments = {"output": output, "progress": progress, "resume": resume}
    return student, distill(student, teacher, images(37), images(20, seed=1), recipe, **arguments)


@pytest.mark.parametrize("in_place", [True, False])
def test_pretraining_gradient_is_sum_over_widths(in_place):
    data = samples(dtype=torch.float64)
    method, _, teacher, _ = prepared({"in_place": in_place}, network(2, width=9).double(), data)
    (plan,) = method.pretraining()
    assert plan.part is method.slimmable and (plan.epochs, plan.lr) == (60, 0.05)
    plan.part.train().network[6].eval()  # dropout is random
    expected, losses, target, batch = {}, [], None, data[0]
    for width in (1.0, 0.8, 0.5, 0.3):
        single = copy.deepcopy(plan.part)
        single.set_width(width)
        logits = single(batch.x)
        truth = np.eye(CLASSES)[batch.label.numpy()] if target is None or not in_place else target
        losses.append(-(truth * log_softmax(logits.detach().numpy(), 1)).sum(1).mean())
        slope = (softmax(logits.detach().numpy(), 1) - truth) / len(batch.label)
        logits.backward(torch.tensor(slope))
        for path, parameter in single.named_parameters():
            if parameter.grad is not None:
                expected[path] = expected.get(path, 0) + parameter.grad
        target = softmax(logits.detach().numpy(), 1) if width == 1 else target
    loss = plan.loss(method.teacher_of(teacher), batch)
    np.testing.assert_allclose(loss.item(), sum(losses), rtol=1e-12)
    loss.backward()
    assert plan.part.width == 1 and expected.keys() == dict(plan.part.named_parameters()).keys()
    for path, parameter in plan.part.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[path], rtol=1e-9, atol=1e-12)


def test_widths_a_step_draws_between_widest_and_narrowest():
    widths = (0.2, 0.4, 0.6, 0.8, 1)
    method, _, _, data = prepared({"widths": widths, "widths_a_step": 3, "in_place": False})
    (plan,) = method.pretraining()
    plan.part.train()
    drawn, seen = set(), []
    plan.part.network.register_forward_hook(lambda *_: seen.append(plan.part.width))
    for step in range(30):
        torch.manual_seed(step)
        seen.clear()
        plan.part.zero_grad()
        plan.loss(plan.part.network, data[step % 2]).backward()
        assert len(seen) == 3 and seen[0] == 1 and seen[2] == 0.2
        drawn.add(seen[1])
        for i, width in enumerate(widths[:-1]):
            slopes = [p.grad for p in plan.part.network[1].narrow[i].parameters()]
            assert all(slope is not None and slope.any() == (width in seen) for slope in slopes)
        torch.manual_seed(step)
        plan.loss(plan.part.network, data[0])
        assert seen[3:] == seen[:3]
    assert drawn == {0.4, 0.6, 0.8}
    for count, expected in ((2, [1, 0.2]), (5, [1, 0.8, 0.6, 0.4, 0.2])):
        other, *_ = prepared({"widths": widths, "widths_a_step": count})
        seen.clear()
        (plan,) = other.pretraining()
        plan.part.network.register_forward_hook(lambda *_, plan=plan: seen.append(plan.part.width))
        plan.loss(plan.part.network, data[0])
        assert seen == expected


@pytest.mark.parametrize("batch_keep", [1.0, 0.4])
def test_base_runs_with_teacher_of_current_stage(batch_keep):
    options = {} if batch_keep == 1 else {"batch_keep": batch_keep}
    method, student, teacher, data = prepared({"base": "kd", "temperature": 3, **options})
    randomise_normalisation(method.slimmable, seed=5)
    stand_in = method.teacher_of(teacher)
    assert not any(p is q for p in stand_in.parameters() for q in teacher.parameters())
    plain = methods.build("kd", {"temperature": 3, **options})
    for epoch, width in enumerate((0.3, 0.3, 0.5, 0.5, 0.8, 0.8, 1, 1, 1)):
        method.begin(epoch, 9)
        twin = copy.deepcopy(method.slimmable)
        assert twin.width == width
        outcomes = []
        for distilled, by in ((method, stand_in), (plain, twin)):
            torch.manual_seed(0)
            outcomes.append(distilled(student, by, data[0]))
        assert torch.equal(outcomes[0].loss, outcomes[1].loss) and torch.equal(outcomes[0].value, outcomes[1].value)
    with pytest.raises(ValueError, match=r"epoch must be an integer in \[0, 8\]"):
        method.begin(9, 9)
    assert method.weighs_samples and not method.flops_known and method.needs_teacher


def test_missing_features_of_partial_teacher_are_zeros():
    method, student, teacher, data = prepared({"base": "pkt"})
    stand_in, batch = method.teacher_of(teacher), data[0]
    for epoch, width in enumerate((3, 4, 7, 8)):
        method.begin(epoch, 4)
        tap = Tap(stand_in, None, "teacher")
        with torch.no_grad():
            logits, narrow = tap.run(stand_in, batch.x)
        tap.remove()
        found, padded = method.base.teacher_forward(stand_in, batch.x)
        assert narrow.shape == (7, width) and padded.shape == (7, 8) and torch.equal(found, logits)
        assert torch.equal(padded[:, :width], narrow) and not padded[:, width:].any()
        torch.manual_seed(0)
        outcome = method(student, stand_in, batch)
        torch.manual_seed(0)
        _, features = method.base.student_forward(student, batch.x)
        torch.testing.assert_close(
            outcome.terms["pkt"], pkt.transfer_loss(features, narrow).detach()
        )  # as without padding
    method.release()
    assert not any(layer._forward_pre_hooks for layer in [*student.modules(), *stand_in.modules()])


class Restarts(KnowledgeDistillation):
    def lr_factor(self, epoch, epochs):
        t, size = [(0, 1), (0, 2), (1, 2), (0, 2), (1, 2)][epoch]
        return 0.1 + 0.45 * (1 + math.cos(math.pi * t / size))


def test_control_equals_base_with_same_learning_rates():
    student, summary = run("kd", partial=False)
    other = network(1)
    recipe = Recipe(f"{__name__}:Restarts", {}, None, 5, 8, lr=0.02, device="cpu", seed=5)
    expected = distill(other, network(2, width=9), images(37), images(20, seed=1), recipe)
    state = other.state_dict()
    assert all(torch.equal(part, state[path]) for path, part in student.state_dict().items())
    names = ("lr", "loss", "accuracy", "teacher_visits", "flops")
    assert [[line[name] for name in names] for line in summary.history] == [
        [line[name] for name in names] for line in expected.history
    ]
    assert summary.flops is not None and methods.build("pwkd", {"partial": False}).pretraining() == ()


# --- through the trainer ----------------------------------------------------------------------------------------------


CONDENSED = Condense(keep=0.5, every=1, stages=3)


@pytest.mark.parametrize(
    ("base", "condense", "options"),
    [
        pytest.param("kd", None, {}, marks=pytest.mark.slow),
        pytest.param("kd", CONDENSED, {"widths_a_step": 2}, marks=pytest.mark.slow),
        pytest.param("kd", Condense(keep=0.7, selection="infobatch"), {}, marks=pytest.mark.slow),
        pytest.param("pkt", CONDENSED, {}, marks=pytest.mark.slow),
        pytest.param("pkt", None, {"in_place": False}, marks=pytest.mark.slow),
        ("crd", Condense(keep=0.5, every=2, stages=2, batch_keep=0.6), {}),
        pytest.param("crd", None, {}, marks=pytest.mark.slow),
        pytest.param("sskd", None, {}, marks=pytest.mark.slow),
        pytest.param("sskd", CONDENSED, {"widths": (0.3, 0.4, 0.5, 1), "widths_a_step": 3}, marks=pytest.mark.slow),
    ],
)
def test_resumed_run_ends_in_same_state(tmp_path, base, condense, options):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    _, summary = run(base, straight, condense=condense, **options)
    pretraining = files.read_lines(straight / "pretraining.jsonl")
    assert len(pretraining) == (4 if base == "sskd" else 2) and pretraining[-1]["flops"] is None is summary.flops
    for count in (1, 2, 1, 2):  # in the teacher's pretraining, after it, within a stage, at the end of a stage
        with pytest.raises(StopError):
            run(base, stopped, stop_after(count), resume=True, condense=condense, **options)
    run(base, stopped, resume=True, condense=condense, **options)
    assert_same(final(stopped), final(straight))
    model = checkpoint.load(straight / "checkpoint").model
    narrow, full = (model[f"method.slimmable.network.1.{k}running_mean"] for k in ("narrow.0.", ""))
    assert not torch.equal(narrow, full)  # pretraining has changed the statistics
    if condense is not None:
        assert min(line["samples"] for line in summary.history) < 37


def test_teacher_changes_only_in_pretraining(tmp_path):
    """The original teacher never changes. The slimmable copy stays as its last pretraining epoch left it."""
    states = []

    def keep(line):
        states.append(checkpoint.load(tmp_path / "checkpoint").model)

    teacher = randomise_normalisation(network(2, width=9))
    before = copy.deepcopy(teacher.state_dict())
    _, summary = run("kd", tmp_path, keep, teacher=teacher)
    assert all(torch.equal(part, before[path]) for path, part in teacher.state_dict().items())
    assert [line["lr"] for line in summary.history] == pytest.approx([0.02, 0.02, 0.011, 0.02, 0.011])
    own = [path for path in states[1] if path.startswith("method.slimmable.")]
    assert own and all(torch.equal(states[1][path], states[-1][path]) for path in own)
    assert any(not torch.equal(states[0][path], states[1][path]) for path in own)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"in_place": False}, {"widths_a_step": 3}])
def test_all_widths_learn(options):
    label = torch.arange(64) % CLASSES
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(CLASSES, 1, 6, 6, generator=generator)[label] + 0.3 * torch.randn(64, 1, 6, 6, generator=generator)
    data = [Batch(x[i], label[i], i) for i in torch.arange(64).split(16)]
    teacher = seeded(2, lambda: models.build("cnn_large", in_channels=1, num_classes=CLASSES))
    method, *_ = prepared(options, teacher, data)
    (plan,) = method.pretraining()
    plan.part.train()
    optimizer = torch.optim.SGD(plan.part.parameters(), 0.05, momentum=0.9)
    with torch.random.fork_rng():
        for _ in range(40):
            for batch in data:
                optimizer.zero_grad()
                plan.loss(method.teacher_of(teacher), batch).backward()
                optimizer.step()
    plan.part.eval()
    for width in plan.part.widths:
        plan.part.set_width(width)
        assert (plan.part(x).argmax(-1) == label).float().mean() > 0.9


def test_two_ranks_with_different_widths_do_not_deadlock(tmp_path):
    options = {"widths": (0.2, 0.4, 0.6, 0.8, 1), "widths_a_step": 3}
    crew = Crew(lambda rank: torch.set_num_threads(1) or run("kd", tmp_path, **options), processes=2)
    assert crew.wait() == [0, 0]
    model = checkpoint.load(tmp_path / "checkpoint").model
    steps = [int(model[f"method.slimmable.network.1.narrow.{i}.num_batches_tracked"]) for i in range(4)]
    assert steps[0] == sum(steps[1:]) == 2 * 3  # on rank 0: 19 samples in batches of 8


@pytest.mark.slow
def test_compiled_run_resumes_to_same_bytes(tmp_path):
    """The growing teacher is not compiled: otherwise the code would depend on the widths that a process has seen."""

    def stop(line):
        if line.get("epoch") == 3:
            raise KeyboardInterrupt

    straight, _ = run("kd", tmp_path / "straight", compile=True)
    with pytest.raises(KeyboardInterrupt):
        run("kd", tmp_path / "stopped", stop, compile=True)
    resumed, _ = run("kd", tmp_path / "stopped", resume=True, compile=True)
    assert all(torch.equal(part, resumed.state_dict()[name]) for name, part in straight.state_dict().items())


def test_run_in_bfloat16_has_finite_loss():
    _, summary = run("sskd", precision="bfloat16", widths_a_step=2)
    assert math.isfinite(summary.history[-1]["loss"])


# --- options ----------------------------------------------------------------------------------------------------


def test_defaults_match_documentation():
    method = methods.build("pwkd")
    assert {name: getattr(method, name) for name in DEFAULTS if name != "base"} == {
        name: value for name, value in DEFAULTS.items() if name != "base"
    }
    assert type(method.base) is KnowledgeDistillation and method.base.temperature == 4
    assert methods.build("pwkd", {"batch_keep": 0.5}).base.batch_keep == 0.5
    assert methods.build("pwkd", {"widths": "0.5,1"}).widths == (0.5, 1)
    base = methods.build(
        "pwkd", {"base": "pkt", "pkt_weight": "3e2", "student_layer": "1.10"}
    ).base  # as on the command line
    assert (base.pkt_weight, base.student_layer) == (300, "1.10")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"widths": "0.5"}, ValueError, "widths must be ascending fractions .* got '0.5'"),
        ({"teacher_epochs": 0}, ValueError, "teacher_epochs must be an integer >= 1, got 0"),
        ({"teacher_lr": -1}, ValueError, "teacher_lr must be a finite number >= 0, got -1"),
        ({"lr_min": 1.5}, ValueError, r"lr_min must be a number in \[0, 1\], got 1.5"),
        ({"in_place": 1}, TypeError, "in_place must be True or False, got int 1"),
        ({"partial": "no"}, TypeError, "partial must be True or False, got str 'no'"),
        ({"widths_a_step": 1}, ValueError, "widths_a_step must be an integer >= 2, got 1"),
        (
            {"widths_a_step": 5},
            ValueError,
            r"widths_a_step must be at most 4, the number of widths 0.25, 0.5, 0.75, 1, got 5",
        ),
        ({"widths_a_step": 2.0}, TypeError, "widths_a_step must be an integer >= 2, got float 2.0"),
        ({"base": "ce"}, ValueError, "base must be a method that needs a teacher, got 'ce', which needs none"),
        ({"base": "pwkd"}, ValueError, "got 'pwkd', which chooses the teacher"),
        ({"base": f"{__name__}:Restarts"}, ValueError, "Restarts', which has its own learning rates"),
        ({"base": "nothing"}, ValueError, "unknown base 'nothing'"),
        ({"partial": False, "teacher_epochs": 3}, ValueError, "teacher_epochs=3 has no effect with partial=False"),
        ({"partial": False, "in_place": False}, ValueError, "in_place=False has no effect with partial=False"),
        (
            {"temprature": 4},
            TypeError,
            "has no option 'temprature', nor has its base 'kd': pwkd takes base, .* the base temperature",
        ),
        (
            {"teacher_epoch": 4},
            TypeError,
            "'pwkd' has no option 'teacher_epoch', .*: pwkd takes base, widths, teacher_epochs",
        ),
        ({"teacher_epochs": 2.5}, TypeError, "teacher_epochs must be an integer >= 1, got float 2.5"),
        ({"base": "pkt", "temperature": 4}, TypeError, "no option 'temperature', nor has its base 'pkt'"),
        ({"temperature": 0}, ValueError, "temperature must be a finite number > 0, got 0"),
    ],
)
def test_invalid_option_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        methods.build("pwkd", options)


class TwoHeads(nn.Module):
    """A network with two linear layers for logits. The first one, which is used, gets sliced."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(36, CLASSES), nn.Linear(36, CLASSES)

    def forward(self, x):
        return self.first(x.flatten(1))


class FixedChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3), nn.Linear(128, CLASSES)

    def forward(self, x):
        x = self.first(x)
        assert x.shape[1] == 8, "8 channels"
        return self.last(x.flatten(1))


def test_unsuitable_teacher_is_refused_before_writing(tmp_path):
    for teacher, message in (
        (TwoHeads(), r"teacher must give logits \(1, 4\) at every width, got \(1, 2\) at width 0.5"),
        (
            nn.Sequential(
                nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Unflatten(1, (8, 16)), nn.Flatten(), nn.Linear(128, CLASSES)
            ),
            r"widths must suit the teacher, which does not run at 0.5 .* last layer that ran was '1', a Flatten: \(1, 4, 4, 4\) ->",
        ),
        (
            FixedChannels(),
            r"does not run at 0.5 \(8 channels\): the last layer that ran was 'first', a Conv2d: .* -> \(1, 4, 4, 4\)",
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES)), r"do not change the teacher: .*'1': \(4, 4, 4\)"),
        (nn.Sequential(nn.Flatten(), nn.LayerNorm(36), nn.Linear(36, CLASSES)), r"layer '1', a LayerNorm with"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            run("kd", tmp_path, teacher=teacher)
        assert "\n" not in str(caught.value) and not (tmp_path / "config.json").exists()
