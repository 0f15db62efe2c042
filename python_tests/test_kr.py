"""KR against its formula in float64 NumPy, position by position; layers, options, and runs of `distill`."""

import inspect
import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from small_runs import Samples, images, mostly_slow
from test_methods import (
    assert_gradient,
    cross_entropies,
    divergences,
    entropies,
    float64,
    record_batch_sizes,
    top_entropy_rows,
)
from torch import nn

from kcd_ext import methods, models
from kcd_ext.methods.kr import aggregate, recoding_loss, representing_loss
from kcd_ext.training import Condense, Recipe, distill

CLASSES, ROWS = 4, 11
DEFAULTS = {
    "temperature": 4,
    "ce_weight": 1,
    "kd_weight": 0,
    "kr_weight": 1,
    "tau": 0.1,
    "ratio": 0.5,
    "batch_keep": 1,
    "student_layers": None,
    "teacher_layers": None,
    "label_smoothing": 0,
    "standardize": False,
}


pytestmark = pytest.mark.usefixtures("one_thread")


# --- the formula ------------------------------------------------------------------------------------------------------


def window(position, size, pixels):
    """Return the slice of pixels that adaptive pooling averages for a position."""
    return slice(position * pixels // size, -(-(position + 1) * pixels // size))


def energies(x, size):
    """(b, c, h, w) -> (b, positions), window by window."""
    e = (x**2).mean(1)
    places = [(i, j) for i in range(size[0]) for j in range(size[1])]
    e = [e[:, window(i, size[0], x.shape[2]), window(j, size[1], x.shape[3])].mean((1, 2)) for i, j in places]
    return np.stack(e, 1)


def aggregate_by_loop(maps, size):
    total = 0
    for x in maps:
        a = energies(x, size)
        total = total + a / (np.sqrt((a**2).sum(1, keepdims=True)) + 1e-7)
    return total / len(maps)


def support_by_sort(a, ratio):
    """Return the support by a stable sort, so that ties go to the lower index."""
    return sorted(range(len(a)), key=lambda i: -a[i])[: max(1, int(ratio * len(a)))]


def recoding_formula(student, teacher, tau, ratio):
    """Return the loss of rows (b, n): probabilities of all positions, restricted to the support and scaled to the sum 1."""
    total = 0.0
    for own, of_teacher in zip(student, teacher, strict=True):
        places = support_by_sort(of_teacher, ratio)
        p, q = softmax(of_teacher / tau)[places], softmax(own / tau)[places]
        total -= (p / p.sum() * np.log(q / q.sum())).sum()
    return total / len(student)


def representing_formula(student_maps, teacher_maps, tau=0.1, ratio=0.5):
    sides = [[x.shape[2:] for x in maps] for maps in (student_maps, teacher_maps)]
    size = [min(side[k] for side in sides[0] + sides[1]) for k in (0, 1)]
    return recoding_formula(aggregate_by_loop(student_maps, size), aggregate_by_loop(teacher_maps, size), tau, ratio)


# --- networks whose maps NumPy can compute -------------------------------------------------------------------------------


class Field(nn.Module):
    """A layer whose map is a weight at each position times the input's mean over the channels."""

    def __init__(self, channels, height, width, stride):
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.randn(channels, height, width))

    def forward(self, x):
        return (x[:, :, :: self.stride[0], :: self.stride[1]].mean(1, keepdim=True) * self.weight).tanh()


class Fields(nn.Module):
    """Images (b, 2, 7, 5), some fields and a classifier."""

    def __init__(self, seed, *fields):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(*[Field(*field) for field in fields])
            self.classifier = nn.Linear(fields[-1][0], CLASSES)
            self.unused = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return self.classifier(self.layers(x).mean((2, 3)))

    def by_hand(self, x, weights=None):
        """Return logits and maps in float64, with other weights of the fields if given."""
        maps = []
        for place, field in enumerate(self.layers):
            weight = float64(field.weight) if weights is None else weights[place]
            x = np.tanh(x[:, :, :: field.stride[0], :: field.stride[1]].mean(1, keepdims=True) * weight)
            maps.append(x)
        return x.mean((2, 3)) @ float64(self.classifier.weight).T + float64(self.classifier.bias), maps


LAYERS = {"student_layers": "layers.0+layers.1,layers.2", "teacher_layers": "layers.0, layers.1 +layers.2"}


def samples(count=ROWS):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 2, 7, 5, generator=generator) + 0.5
    return Samples(x, torch.arange(count) * 7 % CLASSES)


def prepared(**options):
    """Return a method with its networks. Height and width are smallest in different networks, and pooling windows overlap."""
    student = Fields(1, (3, 7, 5, (1, 1)), (4, 4, 5, (2, 1)), (2, 4, 5, (1, 1)))
    teacher = Fields(2, (5, 7, 3, (1, 2)), (3, 4, 2, (2, 2)), (1, 4, 2, (1, 1))).eval()
    method = methods.build("kr", {**LAYERS, **options})
    method.prepare(student, teacher, samples())
    return method, student, teacher


def hooks_of(*networks):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for net in networks for module in net.modules()
    )


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (ROWS, {}),
        (ROWS, {"batch_keep": 0.5, "kd_weight": 0.7, "temperature": 3.0, "ce_weight": 0.3, "kr_weight": 2.0}),
        (ROWS, {"batch_keep": 0.3, "ratio": 0.8, "tau": 0.03}),
        (1, {"kd_weight": -1.0, "ratio": 1.0}),
    ],
)
def test_loss_matches_float64_formula(rows, options):
    rng = np.random.default_rng(0)
    method, student, teacher = prepared(**options)
    seen = record_batch_sizes(student), record_batch_sizes(teacher)
    batch = samples().at(range(rows))
    outcome = method(student, teacher, batch)

    used = {**DEFAULTS, **options}
    x, label = float64(batch.x), batch.label.numpy()
    z, _ = student.by_hand(x)
    own = top_entropy_rows(z, used["batch_keep"])
    y, target = teacher.by_hand(x[own])

    def terms(weights=None):
        z, maps = student.by_hand(x, weights)
        maps = [of_layer[own] for of_layer in maps]
        kr = representing_formula(maps[:2], target[:1], used["tau"], used["ratio"])
        kr += representing_formula(maps[2:], target[1:], used["tau"], used["ratio"])
        return cross_entropies(z, label).mean(), kr, divergences(z[own], y, used["temperature"]).mean()

    def loss(weights=None):
        ce, kr, kl = terms(weights)
        kd = used["kd_weight"] * used["temperature"] ** 2 * kl
        return used["ce_weight"] * ce + used["kr_weight"] * kr + kd

    _, kr, kl = terms()
    expected = {"kr": kr} | ({"kl": kl} if used["kd_weight"] else {})
    assert {name: term.item() for name, term in outcome.terms.items()} == pytest.approx(expected, rel=1e-4)
    assert outcome.loss.item() == pytest.approx(loss(), rel=1e-4)
    np.testing.assert_allclose(float64(outcome.value), entropies(z), rtol=1e-4)
    np.testing.assert_allclose(float64(outcome.logits), z, rtol=1e-4, atol=1e-5)
    assert seen == ([rows], [len(own)])
    assert not any(t.requires_grad for t in (outcome.value, outcome.logits, *outcome.terms.values()))

    outcome.loss.backward()
    for place, field in enumerate(student.layers):

        def moved(weight, place=place):
            return loss([weight if i == place else float64(f.weight) for i, f in enumerate(student.layers)])

        assert_gradient(moved, float64(field.weight), float64(field.weight.grad), rng)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_gradient_is_exactly_zero_off_the_support():
    generator = torch.Generator().manual_seed(0)
    for places, ratio in ((35, 0.5), (35, 0.29), (7, 0.01), (6, 1.0), (1, 0.5)):
        teacher = (
            torch.randint(0, 6, (9, places), generator=generator) / 5.0
        )  # with ties, also at the edge of the support
        student = torch.rand(9, places, generator=generator).requires_grad_()
        loss = recoding_loss(student, teacher, 0.1, ratio)
        loss.backward()
        assert loss.item() == pytest.approx(
            recoding_formula(float64(student), float64(teacher), 0.1, ratio), rel=1e-5, abs=1e-9
        )
        inside = torch.zeros(9, places, dtype=torch.bool)
        for row, of_teacher in zip(inside, teacher, strict=True):
            row[support_by_sort(of_teacher.tolist(), ratio)] = True
        assert (student.grad[~inside] == 0).all()
        if inside.sum(1).min() > 1:
            assert (student.grad[inside] != 0).all()
        else:  # a support of one position has the probability 1
            assert loss == 0 and (student.grad == 0).all()


def test_support_is_ordered_by_aggregate_when_exponentials_underflow():
    """At tau 0.001 all positions but the first have the probability 0 in float32."""
    teacher = torch.tensor([[0.1, 1.0, 0.3, 0.2, 0.4]])
    student = torch.rand(1, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    recoding_loss(student, teacher, 0.001, 0.6).backward()
    other = student.detach().clone().requires_grad_()
    recoding_loss(other, teacher, 0.5, 0.6).backward()
    assert other.grad.nonzero()[:, 1].tolist() == [1, 2, 4]
    assert student.grad[0, [0, 3]].tolist() == [0, 0] and student.grad.isfinite().all()


def maps_of(seed, *shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *shape, dtype=dtype, generator=generator) for shape in shapes]


def test_group_loss_passes_gradcheck():
    """The support is a constant: a small step does not change it."""
    student = [x.requires_grad_() for x in maps_of(0, (2, 5, 4), (3, 3, 7))]
    teacher = [x.requires_grad_() for x in maps_of(1, (4, 6, 3))]
    torch.autograd.gradcheck(lambda *x: representing_loss(x[:2], x[2:], tau=0.2, ratio=0.6), (*student, *teacher))


def test_loss_is_smallest_for_student_equal_to_teacher():
    teacher = maps_of(2, (4, 5, 3), (2, 7, 6))
    a = aggregate_by_loop([float64(x) for x in teacher], (5, 3))
    entropy = 0.0
    for row in a:
        p = softmax(row[support_by_sort(row, 0.5)] / 0.1)
        entropy -= (p * np.log(p)).sum() / len(a)
    assert representing_loss(teacher, teacher).item() == pytest.approx(entropy, rel=1e-12)
    for seed in range(20):
        assert representing_loss(maps_of(10 + seed, (4, 5, 3), (1, 9, 4)), teacher) > entropy + 1e-6
    closer = [(x + 0.1 * noise) for x, noise in zip(teacher, maps_of(9, (4, 5, 3), (2, 7, 6)), strict=True)]
    assert entropy < representing_loss(closer, teacher) < representing_loss(maps_of(9, (4, 5, 3)), teacher)


def test_zero_maps_have_no_gradient_and_nan_propagates():
    student, teacher = maps_of(3, (2, 4, 3), dtype=torch.float32), maps_of(4, (5, 3, 5), dtype=torch.float32)
    student[0][1], teacher[0][2] = 0, 0
    student[0].requires_grad_()
    loss = representing_loss(student, teacher)
    loss.backward()
    expected = representing_formula([float64(student[0])], [float64(teacher[0])])
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert (student[0].grad[1] == 0).all() and student[0].grad.isfinite().all() and student[0].grad[2].any()
    uniform = recoding_loss(aggregate([0 * teacher[0]], (3, 3)), aggregate(teacher, (3, 3)), 0.1, 0.5)
    assert uniform.item() == pytest.approx(math.log(4))  # 4 of 9 positions, equally likely
    for broken in (math.nan, math.inf):
        for maps in (student[0].detach(), teacher[0]):
            kept, maps[0, 0, 0, 0] = maps[0, 0, 0, 0].clone(), broken
            assert not representing_loss([student[0].detach()], teacher).isfinite()
            maps[0, 0, 0, 0] = kept


def test_large_and_half_precision_maps_are_compared_in_float32():
    student, teacher = maps_of(5, (2, 4, 3), dtype=torch.float32), maps_of(6, (5, 3, 5), dtype=torch.float32)
    expected = representing_formula([float64(student[0])], [float64(teacher[0])])
    for factor in (1e-1, 1e3, 1e18):  # 1e18 squared twice would overflow
        assert representing_loss([factor * student[0]], teacher).item() == pytest.approx(expected, rel=1e-3)
    for dtype, factor in ((torch.bfloat16, 1), (torch.float16, 500)):  # its squares overflow float16
        narrow = [(factor * student[0]).to(dtype).requires_grad_()], [teacher[0].to(dtype)]
        wide = [x[0].detach().float() for x in narrow]
        with torch.autocast("cpu", torch.bfloat16):
            loss = representing_loss(*narrow)
        assert loss.dtype == torch.float32 and loss == representing_loss(wide[:1], wide[1:])
        loss.backward()
        assert narrow[0][0].grad.isfinite().all() and narrow[0][0].grad.any()


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", mostly_slow(models.REGISTRY))
def test_default_groups_match_stages_of_package_networks(name):
    """The last layer of a group ends the stage. A step trains every network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = models.build(name, in_channels=1, num_classes=CLASSES)
        teacher = models.build(name, in_channels=1, num_classes=CLASSES)
    data = Samples(torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3]))
    method = methods.build("kr")
    method.prepare(student.eval(), teacher.eval(), data)
    _, groups = method._forward("teacher", teacher, data.x)
    *ends, _, _ = models.features(teacher, data.x)
    assert len(groups) == len(ends) == len(teacher.stages)
    for group, end in zip(groups, ends, strict=True):
        assert torch.equal(group[-1], end)
    if name.startswith("resnet") and name != "resnet50":
        depth = int(name.removeprefix("resnet").split("x")[0])
        assert [*map(len, groups)] == 3 * [(depth - 2) // 6]
    if name.startswith("wrn"):
        blocks = (int(name.split("_")[1]) - 4) // 6
        assert [*map(len, groups)] == [blocks, blocks, 1]
    if name.startswith(("cnn", "vgg")):
        assert [*map(len, groups)] == [1] * len(ends)
    outcome = method(student, teacher, data.at([0, 1]))
    outcome.loss.backward()
    assert outcome.loss.isfinite() and all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)
    method.release()
    assert hooks_of(student, teacher) == 0


def test_layer_that_stops_running_is_named():
    method, student, teacher = prepared()
    batch = samples().at([0, 1])
    student(batch.x)  # like a validation
    student.forward = lambda x: x.mean((2, 3)) @ x.new_ones(2, CLASSES)
    with pytest.raises(RuntimeError, match=r"student's layer 'layers.0' did not run in its forward pass"):
        method(student, teacher, batch)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_incompatible_layers_are_refused_in_one_line():
    def refused(error, message, student=None, teacher=None, **options):
        student, teacher = student or prepared()[1], teacher or prepared()[2]
        for network in (student, teacher):
            for module in network.modules():
                module._forward_hooks.clear()
        method = methods.build("kr", options)
        with pytest.raises(error, match=message) as raised:
            method.prepare(student, teacher, samples())
        assert "\n" not in str(raised.value)
        method.release()
        assert hooks_of(student, teacher) == 0

    def with_layers(student, teacher):
        return {"student_layers": student, "teacher_layers": teacher}

    refused(
        ValueError,
        r"same number of groups, got 2 \(layers.0\+layers.1,layers.2\) and 1 \(layers.0\)",
        **with_layers("layers.0+layers.1,layers.2", "layers.0"),
    )
    refused(
        ValueError, r"student_layers must be names in student.named_modules\(\), which has no 'x'", student_layers="x"
    )
    refused(
        ValueError,
        r"teacher_layers must be names in .* no 'fc'",
        **with_layers("layers.0,layers.1", "layers.0,layers.1+fc"),
    )
    refused(ValueError, r"student_layers must name layers, e.g. .* the student, a Fields, has no `stages`")
    refused(ValueError, r"teacher_layers must name layers", student_layers="layers.0")
    other, absent = prepared()[1], prepared()[2]
    other.stages, absent.stages = other.layers, ("layers.7",)  # other libraries use `stages` for something else
    refused(ValueError, r"student_layers must name layers, e.g. .* a Fields, has no `stages`", other)
    refused(ValueError, r"teacher_layers must be names in .* no 'layers.7'", None, absent, student_layers="layers.0")
    refused(
        RuntimeError,
        r"teacher's layer 'classifier' had a torch.float32 tensor of shape \(1, 4\) .* maps \(b, c, h, w\)",
        **with_layers("layers.0", "classifier"),
    )
    refused(RuntimeError, r"student's layer 'unused' did not run", **with_layers("unused", "layers.0"))
    scripted = torch.jit.script(models.build("cnn_large", in_channels=2, num_classes=CLASSES))
    refused(
        ValueError,
        r"teacher must be a torch.nn.Module to capture its features, got TorchScript",
        None,
        scripted,
        student_layers="layers.0,layers.1",
    )
    method = methods.build("kr", LAYERS)
    with pytest.raises(RuntimeError, match="KnowledgeRepresenting needs prepare"):
        method(prepared()[1], prepared()[2], samples().at([0]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tau": 0}, ValueError, "tau must be a finite number > 0, got 0"),
        ({"ratio": 0}, ValueError, r"ratio must be a number in \(0, 1\], got 0"),
        ({"ratio": 1.5}, ValueError, r"ratio must be a number in \(0, 1\], got 1.5"),
        ({"kr_weight": math.inf}, ValueError, "kr_weight must be a finite number, got inf"),
        ({"kd_weight": "1"}, TypeError, "kd_weight must be a finite number, got str '1'"),
        ({"ce_weight": None}, TypeError, "ce_weight must be a finite number, got None"),
        ({"temperature": -1}, ValueError, "temperature must be a finite number > 0, got -1"),
        ({"batch_keep": 0}, ValueError, r"batch_keep must be a number in \(0, 1\], got 0"),
        (
            {"student_layers": ["layer1"]},
            TypeError,
            r"student_layers must be names of layers, e.g. .* got list of length 1",
        ),
        ({"teacher_layers": "a,,b"}, ValueError, "teacher_layers must be names .* got 'a,,b', with an empty name"),
        ({"teacher_layers": "a+ "}, ValueError, "teacher_layers must be names .* with an empty name"),
        ({"student_layers": ""}, ValueError, "student_layers must be names .* got '', with an empty name"),
    ],
)
def test_invalid_option_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        methods.build("kr", options)


def test_defaults_match_documentation():
    method = methods.build("kr")
    options = inspect.signature(type(method)).parameters
    assert {name: option.default for name, option in options.items()} == DEFAULTS
    assert {name: getattr(method, name) for name in options} == DEFAULTS
    assert method.flops_known and method.needs_teacher and not method.weighs_samples and not method.pretraining()


# --- a step, and a run ------------------------------------------------------------------------------------------------


def test_loss_approaches_its_minimum():
    method, student, teacher = prepared(ce_weight=0.0)
    optimizer = torch.optim.Adam(student.parameters(), 0.03)
    losses = []
    for _ in range(80):
        outcome = method(student, teacher, samples().at(range(ROWS)))
        optimizer.zero_grad()
        outcome.loss.backward()
        optimizer.step()
        losses.append(outcome.loss.item())
    _, target = teacher.by_hand(float64(samples().x))
    groups = aggregate_by_loop(target[:1], (4, 3)), aggregate_by_loop(target[1:], (4, 2))
    least = sum(recoding_formula(a, a, 0.1, 0.5) for a in groups)
    assert least < losses[-1] < least + 0.5 * (losses[0] - least)


@pytest.mark.parametrize(
    ("options", "condense"),
    [
        ({"kd_weight": 0.9}, None),
        ({"ratio": 0.7}, Condense(keep=0.5, every=1, stages=4, batch_keep=0.5)),
        ({"student_layers": "0+1,2", "teacher_layers": "1,3+4"}, Condense(keep=0.6, every=2, stages=2)),
    ],
)
def test_run_reports_terms_and_visits(options, condense):
    recipe = Recipe("kr", options, condense, epochs=5, batch_size=8, lr=0.02, device="cpu", seed=5)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        student = models.build("cnn_small", in_channels=1, num_classes=4)
        teacher = models.build("cnn_large", in_channels=1, num_classes=4)
    summary = distill(student, teacher, images(69), images(30, seed=1), recipe)
    terms = {"kr", "kl"} if options.get("kd_weight") else {"kr"}
    assert all(line["terms"].keys() == terms for line in summary.history)
    samples = [line["samples"] for line in summary.history]
    assert samples == {None: [69] * 5, 0.5: [69, 61, 53, 45, 37], 0.6: [69, 69, 56, 56, 43]}[condense and condense.keep]
    assert summary.flops > 0  # known, because there is no third network
    teacher_share = summary.teacher_visits / summary.sample_visits
    assert teacher_share == 1 if condense is None or condense.batch_keep == 1 else 0.4 < teacher_share <= 0.5
