"""Unusual networks, data and callers: what `distill` accepts, what it refuses by name, and what it leaves unchanged."""

import copy
import math
import multiprocessing
import os
import random
import warnings
from collections import OrderedDict, deque, namedtuple
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import Crew
from small_runs import OPTIONS, images, mostly_slow
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from kcd_ext import IndexedDataset, methods, models
from kcd_ext.evaluation import evaluate
from kcd_ext.methods import Batch, Method, Outcome
from kcd_ext.module_state import restored
from kcd_ext.networks import LogitsOnly, logits_only, usual_modes
from kcd_ext.randomness import seeded
from kcd_ext.training import Condense, Recipe, checkpoint, distill
from kcd_ext.training.batches import LoadedBatches
from kcd_ext.training.rehearsal import Rehearsal
from kcd_ext.training.setup import check_run

TRAIN, TEST = images(24), images(12, seed=1)
pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """A network with batch statistics and dropout that applies `gives` to its output in the modes `where`."""

    stages = ("relu",)

    def __init__(self, seed=0, gives=lambda y: y, where=(True, False), flatten=lambda x: x.flatten(1)):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(1, 6, 3, 2, padding=1)
            self.norm = nn.BatchNorm2d(6)
            self.relu = nn.ReLU()
            self.drop = nn.Dropout(0.2)
            self.fc = nn.Linear(54, 4)
        self.gives, self.where, self.flatten = gives, where, flatten

    def forward(self, x):
        logits = self.fc(self.drop(self.flatten(self.relu(self.norm(self.conv(x))))))
        return self.gives(logits) if self.training in self.where else logits


def run(student, teacher, method="kd", train=TRAIN, test=TEST, output=None, **changes):
    options = OPTIONS.get(method, {}) | changes.pop("options", {})
    settings = {"epochs": 2, "batch_size": 8, "device": "cpu", "lr": 0.02, "seed": 5} | changes
    return distill(
        student,
        teacher if methods.build(method).needs_teacher else None,
        train,
        test,
        Recipe(method, options, **settings),
        output=output,
    )


def bits(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, equal_nan=True)


# --- the trial step --------------------------------------------------------------------------------------------------


def skip_trial_step(rehearsal, layouts):
    for layout in layouts:
        layout.choose(True)


@pytest.mark.parametrize(
    "changes", mostly_slow([{"condense": Condense(every=1, batch_keep=0.4)}, {}, {"precision": "bfloat16"}], kept=[{}])
)
@pytest.mark.parametrize("method", methods.REGISTRY)
def test_trial_step_leaves_result_unchanged(method, changes, monkeypatch):
    """Compares with a run without the trial step: batch statistics, memory banks, heads and generators are equal."""
    if changes.get("condense") and methods.unknown_options(method, ["batch_keep"])[0]:
        changes = {"condense": Condense(every=1)}
    found = []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(Rehearsal, "choose_layouts", skip_trial_step)
        student, teacher = Net(1), Net(2)
        history = run(student, teacher, method, **changes).history
        lines = [{name: x for name, x in line.items() if not name.endswith("seconds")} for line in history]
        found.append((bits(student), bits(teacher), lines))
    for one, other in zip(*(part[:2] for part in found), strict=True):
        assert_equal(one, other)
    assert found[0][2] == found[1][2]


class Restless(nn.Module):
    """A module that changes its tensors, attributes and gradients when it is called."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", None)
        self.steps, self.eager = 0, False

    def forward(self, x):
        self.steps += 1
        self.calls += 1
        self.last = x.detach().clone()
        self.fc.weight.data.mul_(2)
        self.fc.bias.requires_grad_(False)
        self.norm.num_batches_tracked = self.norm.num_batches_tracked + 1
        self.cached = x
        return self.fc(self.norm(x))


@pytest.mark.parametrize("fails", [False, True])
def test_restored_undoes_changes_of_tensors_gradients_modes_and_attributes(fails):
    module = Restless()
    module.fc.weight.grad = torch.full((2, 3), 7.0)
    module.norm.eval()
    module.norm.running_mean[0] = math.nan

    def tensors_of_module():
        return (module.calls, module.fc.weight, module.norm.running_mean, module.fc.weight.grad)

    objects = tensors_of_module()

    def state():
        parameters = {name: p.requires_grad for name, p in module.named_parameters()}
        modes = {name: part.training for name, part in module.named_modules()}
        return parameters, modes, module.steps, module.eager, hasattr(module, "cached"), module.last

    before, tensors = state(), copy.deepcopy(module.state_dict())
    with pytest.raises(KeyError) if fails else nullcontext(), restored(module):
        module.train()
        module(torch.randn(4, 3)).sum().backward()
        module.eager = True
        assert state() != before
        if fails:
            raise KeyError
    assert state() == before
    assert_equal(tensors, module.state_dict())
    assert (
        all(one is other for one, other in zip(objects, tensors_of_module(), strict=True)) and (objects[3] == 7).all()
    )


class Mutable(nn.Module):
    """A module that modifies its attributes in place."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.register_buffer("grid", torch.arange(3.0).expand(2, 3))
        self.mean, self.counts, self.seen = torch.zeros(2), {"calls": [0]}, deque([7], maxlen=2)
        self.pair, self.array, self.names, self.head = (torch.ones(1), []), np.zeros(2), {"a"}, None
        self.generators = [torch.Generator().manual_seed(1), np.random.default_rng(1), random.Random(1)]

    def forward(self, x):
        y = self.fc(x + self.grid[0])
        self.mean.add_(y.detach().mean(0))
        self.counts["calls"][0] += 1
        self.counts["new"] = 1
        self.seen.extend([1, 2])
        self.pair[0].mul_(2)
        self.pair[1].append(x)
        self.array += 1
        self.names.clear()
        self.head = nn.Linear(2, 2)
        self.register_forward_hook(lambda *_: None)
        self.drawn = [g.random(1) for g in self.generators[1:2]] + [torch.rand(1, generator=self.generators[0])]
        self.drawn.append(self.generators[2].random())
        return y


def test_restored_undoes_changes_inside_attributes():
    module, untouched = Mutable(), Mutable()
    attributes = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    with restored(module):
        module(torch.randn(4, 3)).sum().backward()
    assert module.head is None and not module._forward_hooks and [*module._modules] == ["fc"]
    assert vars(module).keys() == vars(untouched).keys() and all(
        vars(module)[name] is attributes[name] for name in attributes
    )
    assert (module.counts, module.seen, module.names) == (untouched.counts, untouched.seen, untouched.names)
    assert torch.equal(module.mean, untouched.mean) and torch.equal(module.pair[0], untouched.pair[0])
    assert module.pair[1] == [] and not module.array.any()
    drawn = [
        (torch.rand(1, generator=g), n.random(), p.random()) for g, n, p in (module.generators, untouched.generators)
    ]
    assert drawn[0] == drawn[1]


def test_restored_makes_buffer_a_leaf_again():
    module = nn.Linear(3, 2)
    module.register_buffer("mean", torch.zeros(2))
    with restored(module):
        module.mean.add_(module(torch.ones(4, 3)).mean(0))
        assert module.mean.requires_grad
    assert module.mean.is_leaf and not module.mean.requires_grad and not module.mean.any()


class Fails(Net):
    def __init__(self, how, seed=0):
        super().__init__(seed)
        self.how = how

    def forward(self, x):
        return self.how(self, x, super().forward(x))


def raises_in_training(net, x, y):
    if net.training:
        raise KeyError("aux\nand a second line")
    return y


def fails_in_pairs(net, x, y):
    if len(x) > 1:
        raise RuntimeError("one at a time, please")
    return y


class BackwardFails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no way back")


def spoiled(net, path, value):
    with torch.no_grad():
        net.get_parameter(path).view(-1)[-1] = value
    return net


def infinite_slope(net, x, y):
    return y + (y - y.detach()).abs().sqrt()


class InfiniteLoss(Method):
    def forward(self, student, teacher, batch):
        logits = student(batch.x)
        loss = functional.cross_entropy(logits, batch.label)
        return Outcome(loss / 0 if loss > 0 else loss, logits.detach(), methods.entropy(logits))


class OwnPart(Method):
    """A method with a trainable layer."""

    def prepare(self, student, teacher, samples):
        self.part = nn.Linear(4, 4)

    def forward(self, student, teacher, batch):
        logits = student(batch.x)
        loss = functional.cross_entropy(self.part(logits), batch.label)
        return Outcome(loss, logits.detach(), methods.entropy(logits))


class RaisesLookupError(Method):
    def forward(self, student, teacher, batch):
        student(batch.x)
        raise LookupError("no such thing\n  at all")


@pytest.mark.parametrize(
    ("student", "teacher", "method", "message"),
    [
        (
            Fails(raises_in_training),
            Net(),
            "kd",
            r"^student fails in a training step on x of torch\.float32 \(8, 1, 6, 6",
        ),
        (
            Net(),
            Fails(fails_in_pairs),
            "kd",
            "^teacher fails in a training step .*: RuntimeError: one at a time, please$",
        ),
        (
            Fails(lambda net, x, y: BackwardFails.apply(y)),
            Net(),
            "kd",
            "^student fails in a training step on x .*: no way back$",
        ),
        (
            Fails(lambda net, x, y: y.detach()),
            Net(),
            "kd",
            "^student gives logits without a gradient in training mode: does it detach them",
        ),
        (
            Fails(lambda net, x, y: y.detach() if net.training else y),
            Net(),
            f"{__name__}:OwnPart",
            "^student has no part in the loss of method '.*:OwnPart'",
        ),
        (spoiled(Net(), "fc.weight", math.nan), Net(), "kd", r"the student's fc\.weight holds NaN before training$"),
        (Net(), spoiled(Net(), "conv.weight", math.inf), "kd", r"the teacher's conv\.weight holds an infinity before"),
        (Net(), Fails(lambda net, x, y: y / 0), "kd", r"the teacher gives logits that are not finite for train\[0\]"),
        (Fails(lambda net, x, y: y * math.nan), Net(), "kd", "student gives logits that are not finite, from finite"),
        (Fails(infinite_slope), Net(), "kd", r"gives student\.\S+ a gradient that is not finite$"),
        (Net(), Net(), f"{__name__}:InfiniteLoss", "InfiniteLoss' gives a loss of inf, from finite logits"),
        (
            Net(),
            Net(),
            f"{__name__}:RaisesLookupError",
            "RaisesLookupError' fails in a training step .*: LookupError: no such thing$",
        ),
    ],
)
def test_failing_network_or_method_is_named_in_one_line_and_writes_nothing(tmp_path, student, teacher, method, message):
    with pytest.raises(ValueError, match=message) as caught:
        run(student, teacher, method, output=tmp_path / "a" / "run")
    assert "\n" not in str(caught.value) and not [*tmp_path.iterdir()]


def test_out_of_memory_error_is_passed_on_and_writes_nothing(tmp_path):
    def full(logits):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        run(Net(gives=full, where=(True,)), Net(1), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class WithoutLength(Net):
    """A network without a length, like one wrapped by `torch.compile`."""

    def __len__(self):
        raise TypeError("has no length")


def with_buffer(buffer):
    network = Net()
    network.register_buffer("extra", buffer, persistent=False)
    return network


@pytest.mark.parametrize(
    "student",
    [
        lambda: with_buffer(torch.ones(3).expand(4, 3)),
        lambda: with_buffer(torch.eye(3).to_sparse()),
        lambda: with_buffer(torch.eye(3).to_sparse_csr()),
        WithoutLength,
    ],
)
def test_networks_with_unusual_tensors_are_trained(student):
    assert len(run(student(), Net(2), epochs=1).history) == 1


def test_buffer_that_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    student = Net()
    student.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(TypeError, match=r"must have a state_dict of dense tensors .*, got .*sparse_coo 'sparse'$"):
        run(student, Net(2), output=tmp_path / "run")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_parameters_created_in_inference_mode_are_refused(whose):
    with torch.inference_mode():
        made = Net(1)
    with pytest.raises(ValueError, match=rf"^{whose}'s conv\.weight was made inside torch\.inference_mode"):
        run(*((made, Net(2)) if whose == "student" else (Net(2), made)))


class Pixel(nn.Sequential):
    """A network with batch statistics over one-pixel maps: training needs more than one sample."""

    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 6), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4))


class Neighbours(Method):
    """A method that needs more than two samples."""

    def forward(self, student, teacher, batch):
        logits = student(batch.x)
        near = torch.cdist(logits, logits).topk(5).values.mean()
        return Outcome(functional.cross_entropy(logits, batch.label) + near, logits.detach(), methods.entropy(logits))


def test_trial_step_that_needs_more_than_two_samples_gets_full_batch(tmp_path):
    run(Pixel(), Pixel())
    run(Net(), Net(), f"{__name__}:Neighbours")
    # Of two samples, batch_keep leaves one for the batch normalisation of an encoder.
    keep = {"condense": Condense(keep=1.0, batch_keep=0.5)}
    layers = {"student_layer": "0", "teacher_layer": "0"}
    run(Pixel(), Pixel(), "iekd", options=layers, **keep)
    with pytest.raises(ValueError, match=r"^student fails .* \(1, 1, 6, 6\): ValueError: Expected more than 1 value"):
        run(Pixel(), Pixel(), batch_size=1, output=tmp_path / "run")
    one = TensorDataset(torch.rand(1, 1, 6, 6), torch.tensor([2]))
    assert run(Net(), Net(), train=one).sample_visits == 2


def test_resumed_run_uses_weights_of_checkpoint(tmp_path):
    """The weights that the caller passes do not matter."""
    recipe = Recipe("kd", epochs=2, batch_size=8, device="cpu")
    uninterrupted = distill(Net(1), Net(2), TRAIN, TEST, recipe, output=tmp_path / "uninterrupted")

    class StopError(Exception):
        pass

    def stop(line):
        raise StopError

    with pytest.raises(StopError):
        distill(Net(1), Net(2), TRAIN, TEST, recipe, output=tmp_path / "interrupted", progress=stop)
    empty = spoiled(Net(3), "fc.weight", math.nan)
    again = distill(empty, Net(2), TRAIN, TEST, recipe, output=tmp_path / "interrupted", resume=True)
    assert again.accuracy_last == uninterrupted.accuracy_last
    names = [tmp_path / name / "student.safetensors" for name in ("uninterrupted", "interrupted")]
    assert names[0].read_bytes() == names[1].read_bytes()


# --- memory layouts ---------------------------------------------------------------------------------------------------


def viewed(x):
    return x.view(len(x), -1)


class Centred(Net):
    """A network that reads weights through `.view`, but only in training."""

    def forward(self, x):
        if self.training:
            self.conv.weight.view(6, -1)
            self.deep.weight.view(6, -1)
        return super().forward(x) + 0 * (self.deep.weight.sum() + self.spare.sum())

    def __init__(self, seed=0):
        super().__init__(seed)
        self.deep = nn.Conv2d(6, 6, 3)
        self.spare = nn.Parameter(torch.rand(2, 3, 4, 5))
        self.register_buffer("table", torch.rand(2, 3, 4, 5))


@pytest.mark.parametrize("method", mostly_slow(methods.REGISTRY, kept=["kd", "crd"]))
def test_networks_that_use_view_train_like_those_that_flatten(method):
    results = []
    for flatten in (viewed, lambda x: x.flatten(1)):
        student = Net(1, flatten=flatten)
        run(student, Net(2, flatten=flatten), method)
        results.append(student)
        student.eval()(TEST.views.normalize(torch.from_numpy(TEST.images)))
    for one, other in zip(*(bits(net).values() for net in results), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def strides(network):
    return {name: x.stride() for name, x in [*network.named_parameters(), *network.named_buffers()]}


def mixed_layout(network):
    network.spare.data = network.spare.data.to(memory_format=torch.channels_last)
    network.table = network.table.transpose(0, 3)
    return network


def zoo(seed):
    return models.build("cnn_small", in_channels=1, num_classes=4)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("build", [lambda seed: mixed_layout(Centred(seed)), Centred, zoo])
def test_memory_layout_is_restored_after_training(build, fails):
    student, teacher = build(1), build(2)
    before, seen = (strides(student), strides(teacher)), []

    def look(line):
        seen.append(strides(student))
        if fails:
            raise KeyError

    with pytest.raises(KeyError) if fails else nullcontext():
        distill(student, teacher, TRAIN, TEST, Recipe("kd", epochs=1, device="cpu"), progress=look)
    assert (strides(student), strides(teacher)) == before
    assert (seen[0] != before[0]) == (build is zoo)  # channels-last during training, if supported


class DeepNet(Net):
    """A network with two inner channels, so that memory layouts differ."""

    def __init__(self, seed, **options):
        super().__init__(seed, **options)
        self.first = nn.Conv2d(1, 2, 1)
        self.conv = nn.Conv2d(2, 6, 3, 2, padding=1)

    def forward(self, x):
        return super().forward(self.first(x))


class RecordsLayouts(Method):
    """A method that records whether the first convolutions of student and teacher kept their layout."""

    seen: list = []  # noqa: RUF012 - in the last epoch

    def forward(self, student, teacher, batch):
        RecordsLayouts.seen = [network.conv.weight.is_contiguous() for network in (student, teacher)]
        logits = student(batch.x)
        teacher(batch.x)
        return Outcome(functional.cross_entropy(logits, batch.label), logits.detach(), methods.entropy(logits))


@pytest.mark.parametrize("own", [(True, False), (False, True), (False, False), (True, True)])
def test_each_network_is_channels_last_if_it_supports_it(own):
    student, teacher = (DeepNet(1, flatten=viewed if one else lambda x: x.flatten(1)) for one in own)
    run(student, teacher, f"{__name__}:RecordsLayouts")
    assert RecordsLayouts.seen == list(own)


# --- structured outputs -----------------------------------------------------------------------------------------------

Both = namedtuple("Both", "aux logits")


class ModelOutput(OrderedDict):
    """A stand-in for the class of transformers."""

    @property
    def logits(self):
        return self["logits"]


KINDS = {
    "tuple": lambda y: (y, 2 * y),
    "list": lambda y: [y],
    "named tuple": lambda y: Both(2 * y, y),
    "dict": lambda y: {"loss": None, "logits": y},
    "ModelOutput": lambda y: ModelOutput(loss=None, logits=y),
    "object": lambda y: SimpleNamespace(logits=y, hidden=None),
}


@pytest.mark.parametrize("where", mostly_slow([(True,), (False,), (True, False)], kept=[(True, False)]))
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_found_in_structured_outputs(kind, where, tmp_path):
    results = []
    for gives in (KINDS[kind], lambda y: y):
        student, teacher = Net(1, gives, where), Net(2, gives, (True, False))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            summary = run(student, teacher, output=tmp_path / str(len(results)))
        messages = [str(warning.message) for warning in caught if warning.category is UserWarning]
        results.append((bits(student), summary.history[-1]["loss"], summary.teacher_visits, summary.flops, messages))
    assert_equal(results[0][0], results[1][0])
    assert results[0][1:4] == results[1][1:4] and not results[1][4]
    assert [text.split(" gives ")[0] for text in results[0][4]] == ["student", "teacher"]
    saved = [checkpoint.load(tmp_path / name / "checkpoint").model.keys() for name in "01"]
    assert saved[0] == saved[1]
    assert type(student.eval()(torch.zeros(1, 1, 6, 6))) is torch.Tensor  # the plain network of the last iteration
    student = Net(1, KINDS[kind])
    with pytest.warns(UserWarning, match="^student gives "):
        run(student, Net(2))
    assert not isinstance(student(torch.zeros(2, 1, 6, 6)), torch.Tensor)  # the hook is removed


def test_check_run_does_not_warn_about_outputs():
    student, recipe = Net(1, gives=lambda y: (y, None)), Recipe("ce", epochs=1, batch_size=8, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_run(student, None, TRAIN, TEST, recipe)
    with pytest.warns(UserWarning, match="^student gives a tuple") as caught:
        distill(student, None, TRAIN, TEST, recipe)
    assert len(caught) == 1


@pytest.mark.parametrize("method", methods.REGISTRY)
def test_every_method_accepts_structured_outputs(method):
    results = []
    for gives in (KINDS["named tuple"], lambda y: y):
        student, teacher = Net(1, gives), Net(2, gives)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            run(student, teacher, method, condense=Condense(keep=0.5, every=1))
        results.append(bits(student))
    assert_equal(*results)


class Auxiliary(Method):
    """A method that uses auxiliary outputs of the student, and requests features of the teacher by an option."""

    def forward(self, student, teacher, batch):
        logits, aux = student(batch.x)
        with torch.no_grad():
            answer, features = teacher(batch.x, features=True)
        loss = functional.cross_entropy(logits, batch.label) + functional.mse_loss(aux, answer) + 0 * features.sum()
        return Outcome(loss, logits.detach(), methods.entropy(logits))


class Features(Net):
    def forward(self, x, features=False):
        return (super().forward(x), x) if features else super().forward(x)


def test_method_that_uses_full_outputs_receives_them():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert run(Net(1, lambda y: (y, 3 * y), (True,)), Features(2), f"{__name__}:Auxiliary").sample_visits == 48


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        (lambda y: {"out": y, "aux": y}, "got a dict with 'out', 'aux' in {} mode"),
        (lambda y: {"logits": [y]}, "got a dict with 'logits' in {} mode"),
        (lambda y: ({"logits": y}, y), "got a tuple of dict, Tensor in {} mode"),
        (lambda y: (), "got a tuple of nothing in {} mode"),
        (lambda y: None, "got a NoneType in {} mode"),
        (
            lambda y: (y[:, :, None, None], y),
            r"got a tuple of Tensor, Tensor, its first element of shape \(\d+, 4, 1, 1\)",
        ),
        (lambda y: y[:, :, None], r"got \(\d+, 4, 1\) in {} mode"),
    ],
)
@pytest.mark.parametrize(
    ("name", "mode"), [("student", "training"), ("student", "evaluation"), ("teacher", "evaluation")]
)
def test_output_without_logits_is_refused(name, mode, gives, message, tmp_path):
    odd = Net(1, gives, (mode == "training",))
    student, teacher = (odd, Net()) if name == "student" else (Net(), odd)
    with pytest.raises(ValueError, match=rf"^{name} must give logits \(b, classes\), {message.format(mode)}") as caught:
        run(student, teacher, output=tmp_path / "run")
    assert "\n" not in str(caught.value) and not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_structured_outputs_work_on_several_ranks_and_sharded(tmp_path):
    def job(rank):
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        from accelerate import PartialState
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        PartialState(cpu=True)
        for sharded in (False, True):
            found = []
            for gives in (KINDS["dict"], lambda y: y):
                torch.manual_seed(0)
                student = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), Head(gives))
                if sharded:
                    fully_shard(student, mesh=init_device_mesh("cpu", (2,)))
                run(student, Net(2, gives))
                found.append({name: checkpoint_of(x) for name, x in student.state_dict().items()})
            assert_equal(*found)

    assert Crew(job, 2).wait() == [0, 0]


class Head(nn.Module):
    def __init__(self, gives):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.fc = nn.Linear(8, 4)
        self.gives = gives

    def forward(self, x):
        return self.gives(self.fc(x))


def checkpoint_of(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(48, 4)

    def forward(self, x):
        maps = self.norm(self.conv(x))
        return self.fc(maps.view(maps.size(0), -1)), x


def scripted():
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.manual_seed(0)
        return torch.jit.script(Scripted())


def test_scripted_networks_may_return_tuples_and_use_view(monkeypatch):
    with pytest.warns(
        UserWarning, match="^teacher gives a tuple of Tensor, Tensor in evaluation mode: its first element"
    ):
        assert run(Net(), scripted()).teacher_visits == 48
    found = []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(Rehearsal, "choose_layouts", lambda rehearsal, layouts: None)
            monkeypatch.setattr(LogitsOnly, "restrict_to_found_modes", lambda hook: False)
        with pytest.warns(UserWarning, match="^student gives a tuple of Tensor, Tensor in evaluation mode: its first"):
            student = scripted()
            run(student, Net(2))
        found.append(bits(student))
    assert_equal(*found)


def test_evaluate_accepts_structured_outputs():
    x, label = torch.rand(9, 1, 6, 6), torch.arange(9) % 4
    plain = repr(evaluate(Net(1), Net(2), [(x, label)]))
    with pytest.warns(
        UserWarning, match="^student gives a dict with 'loss', 'logits' in evaluation mode: its 'logits'"
    ):
        assert repr(evaluate(Net(1, KINDS["dict"]), Net(2), [(x, label)])) == plain
    with pytest.raises(ValueError, match=r"^teacher must give logits"):
        evaluate(Net(1), Net(2, lambda y: {"out": y}), [(x, label)])


def test_copies_share_the_hook_until_it_is_removed():
    network = Net(0, KINDS["tuple"])
    x = torch.zeros(2, 1, 6, 6)
    with logits_only("student", network):
        twin = copy.deepcopy(network)
        assert isinstance(network(x), torch.Tensor) and isinstance(twin(x), torch.Tensor)
    assert isinstance(network(x), tuple) and isinstance(twin(x), tuple)
    with pytest.raises(TypeError, match=r"student must be a torch.nn.Module, got int"):
        LogitsOnly("student", 3)


# --- the caller's modes -----------------------------------------------------------------------------------------------


class Dtype:
    def __init__(self, dtype):
        self.dtype = dtype

    def __enter__(self):
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_):
        torch.set_default_dtype(self.before)


MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast without a cache": lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "float64": lambda: Dtype(torch.float64),
    "bfloat16": lambda: Dtype(torch.bfloat16),
    "device": lambda: torch.device("meta"),
}


def modes():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
    )


@pytest.mark.parametrize("changes", mostly_slow([{}, {"precision": "bfloat16"}, {"method": "crd"}], kept=[{}]))
@pytest.mark.parametrize("mode", MODES)
def test_callers_modes_do_not_affect_results(mode, changes):
    x, label = torch.rand(9, 1, 6, 6), torch.arange(9) % 4
    results = []
    for context in (nullcontext, MODES[mode]):
        student, teacher = Net(1), Net(2)
        with context():
            before = modes()
            summary = run(student, teacher, **changes)
            found = evaluate(student, teacher, [(x, label)])
            assert modes() == before
        results.append((bits(student), summary.history[-1]["loss"], repr(found)))
    assert_equal(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]
    assert modes()[:3] == (True, False, False)


def test_usual_modes_drop_weights_cached_by_autocast():
    network, x = nn.Linear(3, 2), torch.ones(1, 3)
    with torch.autocast("cpu", torch.bfloat16):
        network(x)
        with usual_modes(), torch.no_grad():
            network.weight.zero_()
            network.bias.zero_()
        assert (network(x) == 0).all()


# --- worker processes -------------------------------------------------------------------------------------------------


def shaken(image):
    """Return a randomly changed image and the process id as a channel. Uses the generators of torch, NumPy and Python."""
    noise = torch.randn(()) + float(np.random.rand()) + __import__("random").random()
    return torch.cat(
        [torch.from_numpy(image.transpose(2, 0, 1)) / 255 + noise, torch.full((1, 6, 6), float(os.getpid()))]
    )


SHAKEN = IndexedDataset(TRAIN, shaken)


@pytest.mark.parametrize("workers", mostly_slow([0, 1, 3], kept=[0, 1]))
def test_passes_equal_those_of_a_new_data_loader(workers):
    """The oracle is torch's loader, created for every pass under the same seed.

    Passes that are aborted or read concurrently do not affect others.
    """
    entries = [(i, i) for i in range(24)]
    parts = [slice(i, i + 5) for i in range(0, 24, 5)]
    feed = LoadedBatches(SHAKEN, torch.device("cpu"), workers)
    pids, drawn = set(), []
    try:
        for epoch in range(3):
            with seeded(7, epoch):
                found = list(feed.epoch(entries, parts, 0, 0))
                after = torch.rand(())
            with seeded(7, epoch):
                loader = DataLoader(SHAKEN, batch_sampler=[entries[part] for part in parts], num_workers=workers)
                expected = [Batch(*batch) for batch in loader]
                assert torch.rand(()) == after
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one.x[:, 0], other.x[:, 0]) and torch.equal(one.label, other.label)
            pids |= {float(pid) for batch in found for pid in batch.x[:, 1].unique()}
            drawn.append(torch.cat([batch.x[:, 0] for batch in found]))
            next(iter(feed.eval_batches(4)))  # an aborted pass
            unfinished = feed.eval_batches(4)
            next(unfinished)
            assert len([*feed.eval_batches(7)]) == 4  # while another pass is unfinished
            del unfinished
        assert not torch.equal(drawn[0], drawn[1])
        assert len(pids) == max(workers, 1)
    finally:
        feed.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("fails", [False, True])
def test_workers_start_once_and_stop_with_the_run(fails, monkeypatch, tmp_path):
    starts = []
    start = multiprocessing.process.BaseProcess.start
    monkeypatch.setattr(
        multiprocessing.process.BaseProcess, "start", lambda process: (starts.append(process), start(process))[1]
    )

    def stop(line):
        if fails and line["epoch"] == 2:
            raise KeyError

    data = IndexedDataset(TRAIN, lambda image: shaken(image)[:1])
    with pytest.raises(KeyError) if fails else nullcontext():
        recipe = Recipe("crd", OPTIONS["crd"], epochs=3, batch_size=8, device="cpu", num_workers=1)
        distill(Net(1), Net(2), data, data, recipe, progress=stop)
    assert len(starts) == 2 and not multiprocessing.active_children()


class Breaks:
    def __len__(self):
        return 9

    def __getitem__(self, index):
        if index == 7:
            raise KeyError(index)
        return torch.rand(1, 6, 6), index % 4


def test_workers_stop_if_data_set_fails():
    with pytest.raises(KeyError) as caught:
        run(Net(1), Net(2), train=Breaks(), num_workers=2)
    assert caught.tb and not multiprocessing.active_children()
    with pytest.raises(ValueError, match=r"^test\[7\] cannot be loaded: KeyError: 7$"):
        run(Pixel(), Pixel(), f"{__name__}:Neighbours", test=Breaks(), num_workers=2)


@pytest.mark.slow
def test_spawned_workers_load_the_same_as_forked_ones():
    """Items and mixes are sent to a process that was not forked."""

    def job(rank):
        found = []
        for method in ("fork", "spawn"):
            multiprocessing.set_start_method(method, force=True)
            feed = LoadedBatches(SHAKEN, torch.device("cpu"), 1)
            with seeded(1):
                entries = [(0, 0), (1, (1, (2, 3, 0.5), 0.25))]
                passes = [list(feed.epoch(entries, [slice(0, 2)], 0, epoch)) for epoch in range(2)]
            feed.close()
            found.append([batch.x[:, 0] for batches in passes for batch in batches])
        assert all(map(torch.equal, *found)) and not torch.equal(*found[0])

    assert Crew(job).wait() == [0]


@pytest.mark.slow
def test_run_with_workers_resumes_bit_for_bit(tmp_path):
    class StopError(Exception):
        pass

    def stop(line):
        if line["epoch"] == 2:
            raise StopError

    data = IndexedDataset(TRAIN, lambda image: shaken(image)[:1])
    recipe = Recipe("kd", condense=Condense(keep=0.5, every=1), epochs=5, batch_size=8, device="cpu", num_workers=2)
    weights = []
    for interrupted in (False, True):
        output = tmp_path / str(interrupted)
        if interrupted:
            with pytest.raises(StopError):
                distill(Net(1), Net(2), data, data, recipe, output=output, progress=stop)
        distill(Net(1), Net(2), data, data, recipe, output=output, resume=True)
        weights.append((output / "student.safetensors").read_bytes())
    assert weights[0] == weights[1]


# --- NaN and infinity --------------------------------------------------------------------------------------------------


def with_number(place, value, size=24):
    x = torch.rand(size, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    if place is not None:
        x[place, 0, 3, 3] = value
    return TensorDataset(x, torch.arange(size) % 4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 17])
def test_non_finite_sample_is_named(place, value, tmp_path):
    what = "NaN" if math.isnan(value) else "an infinity"
    error = ValueError if place == 0 else FloatingPointError  # checked before anything is written
    with warnings.catch_warnings(), pytest.raises(error, match=rf"train\[{place}\] holds {what}$"):
        warnings.simplefilter("ignore", RuntimeWarning)
        run(Net(1), Net(2), train=with_number(place, value), output=tmp_path / "run")
    assert (tmp_path / "run").exists() == (place > 0)
    with pytest.raises(
        FloatingPointError, match=rf"^the accuracy after epoch 1 means nothing: test\[{place}\] holds {what}$"
    ):
        run(Net(1), Net(2), test=with_number(place, value))


def test_teacher_that_returns_nan_is_named():
    """The teacher returns NaN for one sample."""
    data = with_number(17, 100.0)
    fussy = Fails(lambda net, x, y: y.where((x.amax((1, 2, 3)) < 50)[:, None], math.nan))
    message = (
        r"^the loss is not finite after epoch 1 \(nan\): the teacher gives logits that are not finite for train\[17\]"
    )
    with warnings.catch_warnings(), pytest.raises(FloatingPointError, match=message):
        warnings.simplefilter("ignore", RuntimeWarning)
        run(Net(1), fussy, train=data)
    masked = Fails(lambda net, x, y: y.masked_fill(torch.tensor([False, False, False, True]), -math.inf))
    assert math.isfinite(run(Net(1), masked, "kd", train=data).history[-1]["loss"])  # an impossible class is allowed


def test_diverged_teacher_training_suggests_smaller_lr():
    with pytest.raises(FloatingPointError, match=r"after pretraining epoch 1.*: a smaller lr than"):
        run(Net(1), Net(2), "pwkd", options={"teacher_lr": 1e30})


def test_student_with_non_finite_test_logits_warns():
    student = Fails(lambda net, x, y: y if net.training else y.where((x.amax((1, 2, 3)) < 50)[:, None], math.nan))
    with pytest.warns(
        RuntimeWarning, match=r"^1 test samples have no finite logits after epoch 1: the student .* test\[3\]"
    ):
        run(student, Net(2), test=with_number(3, 100.0), epochs=1)


# --- labels and shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_column_labels_equal_flat_labels(workers):
    x, label = torch.rand(20, 1, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 4
    results = []
    for column in (False, True):
        data = TensorDataset(x, label[:, None] if column else label)
        student = Net(1)
        run(student, Net(2), "crd", train=IndexedDataset(data), test=data, num_workers=workers)
        results.append(bits(student))
    assert_equal(*results)


class Sizes:
    """A data set whose raw items have the sizes `sizes`; `cut` crops them to one size."""

    def __init__(self, sizes, kind=torch.zeros):
        self.sizes, self.kind = sizes, kind

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        return self.kind((1, self.sizes[index], self.sizes[index])), index % 4


def cut(x):
    return torch.as_tensor(x)[:, :6, :6].float()


@pytest.mark.parametrize("workers", mostly_slow([0, 2], kept=[0]))
@pytest.mark.parametrize("kind", [torch.rand, np.zeros])
def test_raw_items_of_different_shapes_are_refused_in_first_epoch(kind, workers, tmp_path):
    data = IndexedDataset(Sizes([8] * 21 + [9] + [8] * 2, kind), cut)
    condense = {"condense": Condense(keep=0.5, every=2), "epochs": 4}
    message = (
        r"^train: raw items that are mixed must be alike, got .*8, 8\) at index 0 and .*9, 9\) at index 21: resize"
    )
    seen = []
    with pytest.raises(ValueError, match=message + ".*epsilon=0") as caught:
        distill(
            Net(1),
            Net(2),
            data,
            TEST,
            Recipe(batch_size=8, device="cpu", num_workers=workers, **condense),
            progress=seen.append,
        )
    assert not seen and "\n" not in str(caught.value)
    for without in ({"epsilon": 0.0}, {"selection": "random"}):
        condense["condense"] = Condense(keep=0.5, every=2, **without)
        assert run(Net(1), Net(2), train=data, num_workers=workers, **condense).condenser.stage == 2
    run(Net(1), Net(2), train=data, num_workers=workers, epochs=1)


def test_unmixable_items_are_refused_before_anything_is_written(tmp_path):
    class Words(Sizes):
        def __getitem__(self, index):
            return "word", 0

    data = IndexedDataset(Words([6] * 9), lambda word: torch.zeros(1, 6, 6))
    condense = {"condense": Condense(keep=0.5, every=1)}
    with pytest.raises(
        TypeError, match=r"must both be tensors, .* got str and str; set epsilon=0 to condense without mixing"
    ):
        run(Net(1), Net(2), train=data, output=tmp_path / "run", **condense)
    integers = IndexedDataset(TensorDataset(torch.zeros(9, 1, 6, 6, dtype=torch.int64), torch.zeros(9).long()), cut)
    with pytest.raises(TypeError, match=r"items of dtype torch.int64 cannot be mixed, .* epsilon=0"):
        run(Net(1), Net(2), train=integers, output=tmp_path / "run", **condense)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("workers", [0, 1])
def test_items_that_cannot_be_batched_are_named_in_one_line(workers, tmp_path):
    condense = {"condense": Condense(keep=0.5, every=1, epsilon=0.0)}
    with pytest.raises(
        ValueError, match=r"^train: item 0 has shape \(1, 6, 6\) and item 1 \(1, 7, 7\), which cannot be batched"
    ):
        run(Net(1), Net(2), train=Sizes([6, 7] * 9), output=tmp_path / "run", num_workers=workers, **condense)
    assert not [*tmp_path.iterdir()]
    with pytest.raises(
        ValueError, match=r"^test: item \d+ has shape .*, which cannot be batched: resize them"
    ) as caught:
        run(Net(1), Net(2), test=Sizes([6] * 11 + [7]), num_workers=workers)
    assert "\n" not in str(caught.value)


def test_mixing_items_of_different_shapes_suggests_remedy():
    data = IndexedDataset(Sizes([6, 7], torch.rand))
    with pytest.raises(ValueError, match=r"\(1, 6, 6\) and .*\(1, 7, 7\): resize them .* IndexedDataset.* epsilon=0"):
        data[0, (0, 1, 0.3)]
