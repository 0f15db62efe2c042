"""The trainer: results against a hand-written loop, run folders, refused arguments, and the caller's state."""

import copy
import hashlib
import json
import math
import os
import random
import re
import time
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.nn import functional

from kcd_ext import CondensedSampler, IndexedDataset, KnowledgeCondenser, files, methods, models
from kcd_ext.condensation import ImportanceCondenser, InfoBatch, UniformCondenser
from kcd_ext.data.images import REGISTRY as DATASETS
from kcd_ext.data.images import ImageSet
from kcd_ext.data.views import Views
from kcd_ext.methods import Batch, Method, Outcome, Pretraining
from kcd_ext.randomness import seeded
from kcd_ext.registry import call, resolve
from kcd_ext.reports import page
from kcd_ext.reports.tables import results_table
from kcd_ext.training import Condense, Recipe, Summary, checkpoint, distill
from kcd_ext.training.batches import split_evenly
from kcd_ext.training.fingerprint import digest_of_samples
from kcd_ext.training.folder import ENTRIES
from kcd_ext.training.phases import PRETRAINING_SEED_OFFSET
from kcd_ext.training.run import MIN_EVAL_BATCH_SIZE

CLASSES, FEATURES = 4, 6


pytestmark = pytest.mark.usefixtures("one_thread")


class Blobs(torch.utils.data.Dataset):
    """One cloud of points per class."""

    def __init__(self, size, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.y = torch.arange(size) % CLASSES
        centres = 2 * torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(99))
        self.x = centres[self.y] + torch.randn(size, FEATURES, generator=generator)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index], int(self.y[index])


def network(seed=0, hidden=8, dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(FEATURES, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, CLASSES))


def recipe(**changes):
    return Recipe(**{"epochs": 4, "batch_size": 8, "device": "cpu", "seed": 3} | changes)


# --- computed results -------------------------------------------------------------------------------------------------


SELECTORS = {
    "value": KnowledgeCondenser,
    "infobatch": InfoBatch,
    "importance": ImportanceCondenser,
    "uniform": UniformCondenser,
}


def by_hand(student, teacher, train, r, condense):
    """Return metrics and condenser of the same training, written with F.kl_div, torch.optim.SGD and a loop over indices."""
    student, teacher = student.double(), teacher.double().eval()
    options = dict(condense)
    batch_keep, selection = options.pop("batch_keep", 1.0), options.pop("selection", "value")
    value = options.pop("value", "loss" if selection == "infobatch" else "entropy")
    if selection == "infobatch":
        options["epochs"] = r.epochs
    condenser = SELECTORS[selection](len(train), seed=r.seed, **options)
    sampler = CondensedSampler(condenser, seed=r.seed)
    items = IndexedDataset(train)
    optimizer = torch.optim.SGD(student.parameters(), r.lr, momentum=r.momentum, weight_decay=r.weight_decay)
    lines, visits, teacher_visits = [], 0, 0
    for epoch in range(r.epochs):
        optimizer.param_groups[0]["lr"] = r.lr * r.gamma ** len([m for m in r.milestones if epoch / r.epochs >= m])
        sampler.set_epoch(epoch)
        order = list(sampler)
        steps = math.ceil(len(order) / r.batch_size)
        right, total = 0, 0.0
        mean = condenser.values[condenser.counts > 0].mean()  # NaN in the first epoch: nothing is below it
        low = (condenser.values < mean) & (epoch < r.epochs - math.ceil(r.epochs / 8))
        for step in range(steps):
            batch = [items[entry] for entry in order[len(order) * step // steps : len(order) * (step + 1) // steps]]
            x = torch.stack([item[0] for item in batch]).double()
            label, index = (torch.tensor([item[i] for item in batch]) for i in (1, 2))
            z, y = student(x), teacher(x).detach()
            p = z.detach().softmax(-1)
            entropy = -(p * p.log()).sum(-1)
            chosen = entropy.argsort(descending=True)[: max(1, int(batch_keep * len(batch)))]
            kl = functional.kl_div((z / 4).log_softmax(-1), (y / 4).softmax(-1), reduction="none").sum(-1)
            part = torch.zeros(len(batch), dtype=torch.float64).index_fill(0, chosen, len(batch) / len(chosen))
            losses = 0.1 * functional.cross_entropy(z, label, reduction="none") + 0.9 * 16 * part * kl
            weight = torch.ones(len(batch))
            if selection == "infobatch":
                weight = weight.masked_fill(low[index], 1 / options["keep"])
            elif condenser.sample_weight is not None:
                weight = condenser.sample_weight[index]
            loss = (weight * losses).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            condenser.update(index, {"loss": losses.detach(), "kl": kl.detach(), "entropy": entropy}[value])
            right += (z.argmax(-1) == label).sum().item()
            total += loss.item() * len(batch)
            visits, teacher_visits = visits + len(batch), teacher_visits + len(chosen)
        condenser.step()
        lines.append({"loss": total / len(order), "train_accuracy": 100 * right / len(order), "samples": len(order)})
        lines[-1] |= {"sample_visits": visits, "teacher_visits": teacher_visits}
        # The student has 6 x 8 and 8 x 4 weights, the teacher 6 x 16 and 16 x 4. Each costs a product and a sum, and a
        # training step costs three forward passes.
        lines[-1]["flops"] = visits * 3 * 2 * (6 * 8 + 8 * 4) + teacher_visits * 2 * (6 * 16 + 16 * 4)
    return lines, condenser


@pytest.mark.parametrize(
    "condense",
    [
        None,
        {"keep": 0.5, "every": 2, "stages": 3, "schedule": "cosine"},
        {"keep": 0.5, "every": 2, "stages": 2, "batch_keep": 0.5},
        {"keep": 0.6, "selection": "infobatch"},
        {"keep": 0.5, "every": 2, "stages": 2, "value": "kl"},
        {"keep": 0.5, "every": 2, "stages": 2, "value": "loss"},
        {"keep": 0.4, "selection": "importance"},
        {"keep": 0.4, "selection": "importance", "value": "kl", "warmup": 3},
        {"keep": 0.4, "selection": "importance", "value": "loss"},
        {"keep": 0.4, "selection": "uniform"},
    ],
)
def test_training_equals_a_hand_written_loop(condense):
    train, test = Blobs(61), Blobs(40, seed=1)
    r = recipe(epochs=9, condense=condense and Condense(**condense))
    student, teacher, twin = network(1), network(2, hidden=16), network(1)
    summary = distill(student, teacher, train, test, r)
    lines, condenser = by_hand(twin, network(2, hidden=16), train, r, condense or {"keep": 1.0, "every": 99})

    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.double(), twin.get_parameter(name), rtol=2e-4, atol=2e-5)
    assert summary.condenser.kept.tolist() == condenser.kept.tolist()
    for line, expected in zip(summary.history, lines, strict=True):
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert (summary.sample_visits, summary.flops) == (lines[-1]["sample_visits"], lines[-1]["flops"])
    if condense:
        assert min(line["samples"] for line in lines) < len(train)
    with torch.no_grad():
        right = [student(x).argmax().item() == label for x, label in (test[i] for i in range(len(test)))]
    assert summary.accuracy_last == pytest.approx(100 * sum(right) / len(right))
    assert summary.accuracy_best == max(line["accuracy"] for line in summary.history) >= summary.accuracy_last
    assert not student.training and not teacher.training


class Warm(Method):
    """A method that pretrains two parts, one after the other. The student then learns from the second."""

    def prepare(self, student, teacher, samples):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.head = nn.Sequential(nn.Linear(FEATURES, CLASSES), nn.BatchNorm1d(CLASSES))
            self.copy = nn.Linear(FEATURES, CLASSES)

    def pretraining(self):
        return (
            Pretraining(self.head, self.loss_of_head, epochs=5, lr=0.1, milestones=(0.2, 0.6)),
            Pretraining(self.copy, self.loss_of_copy, epochs=2, lr=0.2, milestones=(0.5,)),
        )

    def loss_of_head(self, teacher, batch):
        assert self.head.training and not teacher.training and self.is_constant(self.copy)
        return functional.cross_entropy(self.head(batch.x), batch.label)

    def loss_of_copy(self, teacher, batch):
        assert self.copy.training and not self.head.training and self.is_constant(self.head)
        return functional.mse_loss(self.copy(batch.x), self.head(batch.x))

    def forward(self, student, teacher, batch):
        assert student.training and not self.copy.training and self.is_constant(self.copy)
        logits = student(batch.x)
        return Outcome(functional.mse_loss(logits, self.copy(batch.x)), logits.detach(), methods.entropy(logits))

    def is_constant(self, part):
        return not any(parameter.requires_grad for parameter in part.parameters())


def test_pretraining_equals_a_hand_written_loop(tmp_path):
    """Steps have two batches each; learning rates fall after one and three of five epochs."""
    r = recipe(method=f"{__name__}:Warm", gradient_accumulation=2)
    train, method = Blobs(40), Warm()
    method.prepare(None, None, None)
    distill(network(1), network(2), train, Blobs(20), r, output=tmp_path)
    sampler = CondensedSampler(KnowledgeCondenser(40, keep=1.0, every=99, seed=r.seed), seed=r.seed)
    lines = files.read_lines(tmp_path / "pretraining.jsonl")
    assert len(lines) == 7
    for epoch, rate in enumerate([0.1, 0.01, 0.01, 0.001, 0.001, 0.2, 0.02]):
        part = method.head if epoch < 5 else method.copy
        if epoch in (0, 5):
            optimizer = torch.optim.SGD(part.parameters(), rate, momentum=r.momentum, weight_decay=r.weight_decay)
            method.eval(), part.train()
        optimizer.param_groups[0]["lr"] = rate
        sampler.set_epoch(PRETRAINING_SEED_OFFSET + epoch)
        order, losses = [index for index, _ in sampler], []
        for start, middle, end in ((0, 6, 13), (13, 19, 26), (26, 33, 40)):  # at most 16 per step and 8 per batch
            optimizer.zero_grad()
            for batch in (order[start:middle], order[middle:end]):
                x, y = torch.stack([train[i][0] for i in batch]), torch.tensor([train[i][1] for i in batch])
                target = method.head(x)
                loss = (
                    functional.cross_entropy(target, y) if epoch < 5 else functional.mse_loss(part(x), target.detach())
                )
                (loss * len(batch) / (end - start)).backward()
                losses += [loss.item()] * len(batch)
            optimizer.step()
        assert lines[epoch]["lr"] == pytest.approx(rate)
        assert lines[epoch]["loss"] == pytest.approx(sum(losses) / 40, rel=1e-4)
    saved = checkpoint.load(tmp_path / "checkpoint").model
    for name, tensor in method.state_dict().items():
        torch.testing.assert_close(saved[f"method.{name}"], tensor)


class Slow(KnowledgeCondenser):
    def update(self, *arguments):
        time.sleep(0.01)
        super().update(*arguments)

    def step(self):
        time.sleep(0.01)
        return super().step()


def test_seconds_add_up_and_include_condensation(monkeypatch):
    slow = CondensedSampler.set_epoch
    monkeypatch.setattr(CondensedSampler, "set_epoch", lambda *a, **b: (time.sleep(0.01), slow(*a, **b))[1])
    start = time.perf_counter()
    settings = recipe(condense=Condense(selection=f"{__name__}:Slow", every=1, stages=3))
    history = distill(network(1), network(2), Blobs(40), Blobs(20), settings).history
    wall = time.perf_counter() - start
    before = {"seconds": 0.0, "condensation_seconds": 0.0}
    for line in history:
        spent = {name: line[name] - before[name] for name in before}
        assert 0.03 <= spent["condensation_seconds"] + 1e-4 and spent["condensation_seconds"] < spent["seconds"] + 2e-3
        before = {name: line[name] for name in before}
    assert history[-1]["seconds"] <= wall


def test_student_learns_and_teacher_is_unchanged():
    teacher = network(2, hidden=16)
    alone = distill(teacher, None, Blobs(200), Blobs(100, 1), recipe(method="ce", epochs=6))
    weights = [p.clone() for p in teacher.parameters()]
    summary = distill(network(1), teacher, Blobs(200), Blobs(100, 1), recipe(epochs=6))
    assert alone.accuracy_last > 85 and summary.accuracy_last > 85
    assert (alone.method, alone.teacher_visits, summary.method) == ("ce", 0, "kd")
    assert all(torch.equal(a, b) for a, b in zip(weights, teacher.parameters(), strict=True))


def test_leftover_gradients_of_the_caller_are_ignored():
    weights = []
    for left in (False, True):
        student = network(1)
        if left:
            student(torch.ones(4, FEATURES)).sum().mul(100).backward()
        distill(student, network(2), Blobs(40), Blobs(20), recipe(epochs=1))
        weights.append(student[0].weight)
    assert torch.equal(*weights)


class FirstOnes(KnowledgeCondenser):
    """A selection that ranks the lowest index first."""

    def score(self):
        return -torch.arange(self.num_samples, dtype=torch.float64)


class Uneven(Blobs):
    """A data set with more samples of class 1, which come first."""

    def __init__(self, size, seed=0):
        super().__init__(size, seed)
        self.y = torch.arange(size) * CLASSES // (size + 1) % CLASSES
        self.y[: size // 2] = 1

    def as_images(self):
        pixels = np.random.default_rng(3).integers(0, 256, (len(self), 2, 3, 1), dtype=np.uint8)
        return ImageSet(pixels, self.y.numpy(), Views((0.5,), (0.5,)))


@pytest.mark.parametrize("selection", [f"{__name__}:FirstOnes", pytest.param("random", marks=pytest.mark.slow)])
@pytest.mark.parametrize("loaded", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("least", [0, 3])
def test_metrics_count_the_kept_samples_of_every_class(tmp_path, selection, loaded, least):
    data = Uneven(40) if loaded else Uneven(40).as_images()
    student = network() if loaded else nn.Sequential(nn.Flatten(), network())
    settings = recipe(
        method="ce", condense=Condense(0.5, every=1, stages=2, selection=selection, min_per_class=least), epochs=4
    )
    vanish = selection != "random" and not least
    with pytest.warns(RuntimeWarning, match=r"1 of 3 classes .*\(labels 3\)") if vanish else nullcontext():
        summary = distill(student, None, data, data, settings, output=tmp_path)
    labels = torch.as_tensor(data.y if loaded else data.labels)
    steps = [line["condensation"] for line in summary.history]
    assert [step["kept"] for step in steps] == [30, 20, 20, 20]
    for step in steps:
        assert sum(step["classes"]) == step["kept"] and len(step["classes"]) == CLASSES
        assert all(kept >= min(least, size) for kept, size in zip(step["classes"], labels.bincount(), strict=True))
    assert steps[-1]["classes"] == labels[summary.condenser.kept].bincount(minlength=CLASSES).tolist()
    page.write(tmp_path / "report.html", [tmp_path])
    (cells,) = re.findall(r"<tr><td>class 1</td>(.*?)</tr>", (tmp_path / "report.html").read_text())
    assert re.findall(r"<td>(\d+)</td>", cells) == [str(step["classes"][1]) for step in steps]


def test_resumed_run_knows_the_labels_of_loaded_items(tmp_path):
    """The run collected them in its first epoch, which is not trained again."""

    def stop(line):
        if line["epoch"] == 1:
            raise KeyboardInterrupt

    settings = recipe(method="ce", condense=Condense(0.5, every=2, stages=2))
    reference = distill(network(), None, Uneven(40), Uneven(40), settings, output=tmp_path / "reference")
    with pytest.raises(KeyboardInterrupt):
        distill(network(), None, Uneven(40), Uneven(40), settings, output=tmp_path / "interrupted", progress=stop)
    resumed = distill(network(), None, Uneven(40), Uneven(40), settings, output=tmp_path / "interrupted", resume=True)
    assert [line["condensation"] for line in resumed.history] == [line["condensation"] for line in reference.history]
    assert sum(resumed.history[1]["condensation"]["classes"]) == 30


def test_warmup_postpones_condensation():
    settings = recipe(method="ce", condense=Condense(0.5, stages=6, warmup=5), epochs=12)
    summary = distill(network(), None, Blobs(60), Blobs(20), settings)
    assert [line["samples"] for line in summary.history] == [60] * 6 + [55] * 2 + [50] * 2 + [45] * 2
    assert [line["epoch"] for line in summary.history if line["condensation"]] == [6, 8, 10, 12]


def test_random_selection_has_the_same_sizes_and_mixes_nothing():
    stages = {"keep": 0.5, "every": 1, "stages": 3}
    runs = {
        selection: distill(
            network(), network(2), Blobs(60), Blobs(20), recipe(condense=Condense(selection=selection, **stages))
        )
        for selection in ("value", "random")
    }
    sizes = [[line["samples"] for line in run.history] for run in runs.values()]
    assert sizes[0] == sizes[1] == [60, 50, 40, 30]
    described = {name: run.history[0]["condensation"] for name, run in runs.items()}
    assert (described["value"]["mixed"], described["random"]["mixed"]) == (10, 0)
    for line in runs["value"].history[:4]:
        shown = line["condensation"]["values"]
        assert (shown["low"], shown["high"]) == (0.0, pytest.approx(math.log(CLASSES))) and sum(shown["counts"]) == 60
    by_hand = [0] * 40
    for value in runs["value"].condenser.values.tolist():  # the last stage ends where the run does
        by_hand[min(39, int(value / math.log(CLASSES) * 40))] += 1
    assert shown["counts"] == by_hand
    assert runs["random"].condenser.kept.tolist() != runs["value"].condenser.kept.tolist()
    assert [runs[name].method for name in runs] == ["kc-kd", "random"]
    assert recipe(method="crd", condense=Condense(selection="random", every=1)).label == "random-crd"


def test_worker_processes_and_images_in_memory_give_the_same_weights():
    """Worker processes mix raw uint8 images by the mix trees that come with the indices, new ones at every stage. Images in
    memory are mixed all at once, to the same pixels."""
    images = np.random.default_rng(0).integers(0, 256, (41, 8, 8, 1), dtype=np.uint8)
    resident = ImageSet(images, np.arange(41) % 10, Views.from_images(images))
    loaded = IndexedDataset(resident, lambda image: resident.views.normalize(torch.from_numpy(image)[None])[0])
    weights = []
    for num_workers, train in ((0, loaded), (2, loaded), (0, resident)):
        torch.manual_seed(0)
        student = models.build("cnn_small", in_channels=1, num_classes=10)
        teacher = models.build("cnn_large", in_channels=1, num_classes=10)
        condense = Condense(keep=0.4, every=1, stages=3)
        distill(student, teacher, train, train, recipe(epochs=5, condense=condense, num_workers=num_workers))
        weights.append(student.state_dict())
    for other in weights[1:]:
        assert all(torch.equal(weights[0][name], other[name]) for name in weights[0])


class Hint(Method):
    """A method that trains a layer built in `prepare`."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = weight

    def prepare(self, student, teacher, loader):
        batch = next(iter(loader))
        assert isinstance(batch, Batch) and batch.x.shape[1:] == (FEATURES,)
        self.map = nn.Linear(CLASSES, teacher(batch.x).shape[-1])
        self.before = self.map.weight.detach().clone()

    def forward(self, student, teacher, batch):
        logits = student(batch.x)
        with torch.no_grad():
            target = teacher(batch.x)
        gap = functional.mse_loss(self.map(logits), target)
        loss = functional.cross_entropy(logits, batch.label) + self.weight * gap
        return Outcome(loss, logits.detach(), methods.entropy(logits), {"gap": gap.detach()})


def test_custom_method_trains_its_parts_and_resumes(tmp_path):
    r = recipe(method=f"{__name__}:Hint", options={"weight": 0.5})
    summary = distill(network(), network(2), Blobs(40), Blobs(20), r, output=tmp_path / "run")
    gaps = [line["terms"]["gap"] for line in summary.history]
    assert gaps[-1] < gaps[0]
    saved = checkpoint.load(tmp_path / "run" / "checkpoint").model
    assert {"method.map.weight", "student.0.weight"} <= saved.keys()
    again = distill(network(7), network(2), Blobs(40), Blobs(20), r, output=tmp_path / "run", resume=True)
    assert again == summary


def normalised(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))


def test_student_with_batch_norm_never_gets_a_batch_of_one():
    """41, 36, 25 and 20 samples in batches of 8 would leave 1, 4, 1 and 4."""
    r = recipe(epochs=8, condense=Condense(keep=0.5, every=2, stages=3, schedule="cosine"))
    summary = distill(normalised().eval(), network(2), Blobs(41), Blobs(20), r)
    sizes = [line["samples"] for line in summary.history]
    assert sizes[0] == 41 and sizes[-1] == 20 and {size % 8 for size in sizes} > {1}
    assert summary.sample_visits == summary.condenser.counts.sum() == sum(sizes)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 16, 17, 40])
def test_split_evenly_covers_all_samples_in_order_with_equal_sizes(size, batch_size):
    batches = [range(size)[part] for part in split_evenly(size, batch_size)]
    assert [entry for batch in batches for entry in batch] == list(range(size))
    sizes = list(map(len, batches))
    assert max(sizes) - min(sizes) <= 1 and (min(sizes) > 1 or 1 in (size, batch_size))
    if batch_size != 2:
        assert max(sizes) <= batch_size and len(sizes) == math.ceil(size / batch_size)


class Keeper(Method):
    """A method that contains the teacher, as one that trains with the teacher's classifier would."""

    def prepare(self, student, teacher, loader):
        self.teacher = teacher

    def forward(self, student, teacher, batch):
        assert student.training and not teacher.training
        logits = student(batch.x)
        loss = functional.mse_loss(logits, self.teacher(batch.x))
        return Outcome(loss, logits.detach(), methods.entropy(logits))


def test_method_that_contains_the_teacher_does_not_train_it():
    teacher = normalised(2)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    distill(normalised(), teacher, Blobs(40), Blobs(20), recipe(method=f"{__name__}:Keeper"))
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())


class Tunes(Keeper):
    """A method that trains a copy of the teacher."""

    def prepare(self, student, teacher, samples):
        self.teacher = copy.deepcopy(teacher)
        Tunes.seen = self.teacher.state_dict()

    def forward(self, student, teacher, batch):
        logits = student(batch.x)
        loss = functional.cross_entropy(logits + self.teacher(batch.x), batch.label)
        return Outcome(loss, logits.detach(), methods.entropy(logits))


def test_method_can_train_a_copy_of_the_teacher():
    teacher = normalised(2)
    before = copy.deepcopy(teacher.state_dict())
    distill(normalised(), teacher, Blobs(40), Blobs(20), recipe(method=f"{__name__}:Tunes"))
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert not torch.equal(before["0.weight"], Tunes.seen["0.weight"])


class Brings(Method):
    """A method that makes its own teacher."""

    needs_teacher = False

    def teacher_of(self, teacher):
        return network(2)

    def forward(self, student, teacher, batch):
        logits = student(batch.x)
        loss = functional.mse_loss(logits, teacher(batch.x).detach())
        return Outcome(loss, logits.detach(), methods.entropy(logits))


def test_teacher_made_by_the_method_is_called_and_counted():
    summary = distill(network(), None, Blobs(40), Blobs(20), recipe(method=f"{__name__}:Brings", epochs=2))
    assert summary.teacher_visits == 2 * 40 and summary.flops is None  # the cost of a row is unknown


def test_torchscript_teacher_is_called_and_counted():
    summary = distill(network(1), torch.jit.script(network(2).eval()), Blobs(40), Blobs(20), recipe(epochs=1))
    plain = distill(network(1), network(2), Blobs(40), Blobs(20), recipe(epochs=1))
    assert summary.teacher_visits == 40 and summary.accuracy_last == plain.accuracy_last


class Returns(Method):
    """A method that passes a valid outcome through `outcome`."""

    outcome = staticmethod(lambda outcome, step: outcome)

    def __init__(self):
        super().__init__()
        self.steps = 0

    def forward(self, student, teacher, batch):
        logits = student(batch.x)
        loss = functional.cross_entropy(logits, batch.label)
        self.steps += 1
        outcome = Outcome(loss, logits.detach(), methods.entropy(logits), {"t": loss.detach()})
        return Returns.outcome(outcome, self.steps)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda o, step: o.loss, TypeError, "must return an Outcome, got Tensor"),
        (lambda o, step: replace(o, loss=o.loss[None]), ValueError, r"must return loss of shape \(\), got \(1,\)"),
        (lambda o, step: replace(o, loss=o.loss.detach()), ValueError, "must return loss with a gradient$"),
        (lambda o, step: replace(o, value=o.value.mean()), ValueError, r"must return value of shape \(6,\), got \(\)"),
        (lambda o, step: replace(o, value=o.value.long()), TypeError, "must return value of a floating-point dtype"),
        (lambda o, step: replace(o, logits=None), ValueError, r"must return logits \(6, classes\).*got NoneType"),
        (lambda o, step: replace(o, terms=[]), TypeError, "must return terms as a mapping, got list"),
        (lambda o, step: replace(o, value=None), ValueError, r"must return value of shape \(6,\), got NoneType"),
        (
            lambda o, step: replace(o, value=o.value * o.loss),
            ValueError,
            "must return value without a gradient: detach",
        ),
        (
            lambda o, step: replace(o, terms={"t": 1.0}),
            ValueError,
            r"must return terms\['t'\] of shape \(\), got float",
        ),
        (
            lambda o, step: replace(o, logits=o.logits[:1]),
            ValueError,
            r"must return logits \(6, classes\).*got \(1, 4\)",
        ),
        (
            lambda o, step: replace(o, terms={} if step > 1 else o.terms),
            ValueError,
            r"must return the terms \['t'\] .*got \[\]",
        ),
        # In a later epoch: `begin` can change a method.
        (lambda o, step: o if step < 7 else o.loss, TypeError, "must return an Outcome, got Tensor"),
        (
            lambda o, step: o if step < 7 else replace(o, value=o.value * o.loss),
            ValueError,
            "must return value without a",
        ),
    ],
)
def test_invalid_outcome_is_refused_and_names_the_method(monkeypatch, wrong, error, message):
    monkeypatch.setattr(Returns, "outcome", wrong)
    with pytest.raises(error, match=f"^method '.*:Returns' {message}"):
        distill(network(), network(2), Blobs(20), Blobs(20), recipe(method=f"{__name__}:Returns"))


class TakesAnyOption(KnowledgeCondenser):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)


def test_custom_selection_gets_all_options():
    condense = Condense(selection=f"{__name__}:TakesAnyOption", alpha=0.5, keep=0.4)
    config = condense.build(10, seed=1, device="cpu", epochs=5).config
    assert (config["alpha"], config["keep"], config["seed"]) == (0.5, 0.4, 1)


# --- the caller's state -----------------------------------------------------------------------------------------------


@pytest.fixture
def accumulating(request, monkeypatch):
    """Request gradient accumulation as the caller or the environment; `distill` must ignore it."""
    if request.param == "environment":
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    yield Accelerator(cpu=True, gradient_accumulation_steps=4) if request.param == "caller" else None
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("accumulating", ["unset", "caller", "environment"], indirect=True)
def test_distill_restores_the_state_of_the_process(accumulating):
    def state():
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            str(np.random.get_state()),
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.mkldnn.enabled,
            dict(os.environ),
            dict(AcceleratorState._shared_state),
            {name: list(x) if isinstance(x, list) else x for name, x in GradientState._shared_state.items()},
        )

    misfit = nn.Linear(1, 1)
    before = state()
    distill(network(dropout=0.5), network(2), Blobs(20), Blobs(20), recipe(condense=Condense(every=1)))
    with pytest.raises(ValueError):
        distill(network(), misfit, Blobs(20), Blobs(20), recipe())
    assert state() == before
    assert accumulating is None or accumulating.gradient_accumulation_steps == 4


@pytest.mark.parametrize("accumulating", ["caller", "environment"], indirect=True)
def test_every_batch_is_one_step_if_the_caller_accumulates(accumulating):
    student, twin = network(1), network(1)
    distill(student, network(2), Blobs(24), Blobs(20), recipe(epochs=2))
    by_hand(twin, network(2), Blobs(24), recipe(epochs=2), {"keep": 1.0, "every": 99})
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.double(), twin.get_parameter(name), rtol=2e-4, atol=2e-5)


def test_result_depends_only_on_the_seed():
    def final(seed, caller):
        torch.manual_seed(caller), np.random.seed(caller), random.seed(caller)
        student = network(dropout=0.5)
        distill(student, network(2), Blobs(30), Blobs(20), recipe(seed=seed))
        return student[0].weight

    first = final(0, caller=1)
    assert torch.equal(first, final(0, caller=2))
    assert not torch.equal(first, final(1, caller=1))


def test_every_epoch_draws_new_random_numbers():
    drawn = []

    def jitter(x):
        drawn.append((torch.rand(()).item(), random.random(), np.random.rand()))
        return x

    distill(network(), network(2), IndexedDataset(Blobs(10), jitter), Blobs(10), recipe())
    for numbers in zip(*drawn, strict=True):
        assert len(set(numbers)) == len(numbers) > 40


# --- run folders and resuming -----------------------------------------------------------------------------------------


def test_run_folder_has_all_files_and_matches_the_summary(tmp_path):
    student = network()
    seen = []
    summary = distill(
        student, network(2), Blobs(20), Blobs(20), recipe(), output=tmp_path / "a" / "run", progress=seen.append
    )
    folder = tmp_path / "a" / "run"
    names = {"config.json", "metrics.jsonl", "checkpoint", "student.safetensors", "summary.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert [path.name for path in (folder / "checkpoint").iterdir()] == ["epoch-0004"]
    assert files.read_lines(folder / "metrics.jsonl") == seen == list(summary.history)
    written = json.loads((folder / "summary.json").read_text())
    student_file = hashlib.sha256((folder / "student.safetensors").read_bytes()).hexdigest()
    assert written.pop("sha256") == {"student.safetensors": student_file}
    assert written == {"dataset": "Blobs", "seeds": [3], "results": [summary.as_json()]}
    config = json.loads((folder / "config.json").read_text())
    assert Recipe.from_json(config["recipe"]) == recipe() and config["versions"]["torch"] == torch.__version__
    from safetensors.torch import load_file

    loaded = load_file(folder / "student.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in student.state_dict().items())


def test_summary_names_the_data_set_of_a_subset(tmp_path):
    train = torch.utils.data.Subset(Blobs(30), range(20))
    distill(network(), network(2), train, Blobs(20), recipe(epochs=1), output=tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["dataset"] == "Blobs"


def test_folder_with_a_run_is_not_overwritten(tmp_path):
    distill(network(), network(2), Blobs(20), Blobs(20), recipe(), output=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    arguments = (network(), network(2), Blobs(20), Blobs(20))
    with pytest.raises(FileExistsError, match="already holds a run"):
        distill(*arguments, recipe(), output=tmp_path)
    with pytest.raises(ValueError, match=r"lr=0.05, got lr=0.1"):
        distill(*arguments, recipe(lr=0.1), output=tmp_path, resume=True)
    with pytest.raises(ValueError, match="train=20, got train=21"):
        distill(network(), network(2), Blobs(21), Blobs(20), recipe(), output=tmp_path, resume=True)
    with pytest.raises(ValueError, match="student does not match the checkpoint"):
        distill(network(hidden=9), network(2), Blobs(20), Blobs(20), recipe(), output=tmp_path, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ENTRIES)
def test_foreign_files_are_not_overwritten(tmp_path, name, resume):
    (tmp_path / name).write_text("precious")
    with (
        pytest.raises(FileExistsError, match=name) if name != "config.json" or not resume else pytest.raises(ValueError)
    ):
        distill(network(), network(2), Blobs(20), Blobs(20), recipe(), output=tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "precious"


def test_run_killed_in_its_first_epoch_resumes_and_another_does_not(tmp_path):
    arguments = (network(2), Blobs(20), Blobs(20))
    distill(network(), *arguments, recipe(), output=tmp_path)
    for path in (tmp_path / "checkpoint").iterdir():
        files.remove(path)
    with pytest.raises(FileExistsError, match="but no checkpoint to resume from"):  # it has results
        distill(network(), *arguments, recipe(), output=tmp_path, resume=True)
    (tmp_path / "summary.json").unlink(), (tmp_path / "student.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lr=0.05, got lr=0.1"):
        distill(network(), *arguments, recipe(lr=0.1), output=tmp_path, resume=True)
    assert len(distill(network(), *arguments, recipe(), output=tmp_path, resume=True).history) == 4


def test_resume_names_the_first_difference_of_the_student(tmp_path):
    def resume(student, **changes):
        distill(student, network(2), Blobs(20), Blobs(20), recipe(**changes), output=tmp_path, resume=True)

    partly = network()
    partly[0].requires_grad_(False)
    resume(partly)
    with pytest.raises(
        ValueError, match=r"checkpoint: student\.0\.weight is of shape \(8, 6\) there, of shape \(9, 6\) here$"
    ):
        resume(network(hidden=9))
    with pytest.raises(ValueError, match=r"checkpoint: student\.4\.weight is missing there, of shape \(4, 4\) here$"):
        resume(network().append(nn.Linear(CLASSES, CLASSES)))
    with pytest.raises(ValueError, match=r"checkpoint: student\.3\.bias is of shape \(4,\) there, missing here$"):
        resume(nn.Sequential(nn.Linear(FEATURES, 8), nn.Flatten(), nn.Flatten(), Narrow()))
    with pytest.raises(ValueError, match=r"^student\.0\.bias is trained now, but was not before"):
        resume(network())
    other = network()
    other.requires_grad_(False)[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"^student\.0\.bias is trained now, but was not before"):
        resume(other)


class Narrow(nn.Module):
    """A network without weights."""

    def forward(self, x):
        return x[:, :CLASSES]


class Remembers(nn.Linear):
    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        pass


def test_state_that_a_checkpoint_cannot_hold_is_refused_before_training(tmp_path):
    student = Remembers(FEATURES, CLASSES)
    with pytest.raises(
        TypeError, match="student must have a state_dict of dense tensors to be saved, got dict '_extra_state'"
    ):
        distill(student, network(2), Blobs(20), Blobs(20), recipe(), output=tmp_path)
    assert not [*tmp_path.iterdir()]
    distill(student, network(2), Blobs(20), Blobs(20), recipe())
    with pytest.raises(TypeError, match="method must have a state_dict of dense tensors to be saved, got dict"):
        distill(network(), network(2), Blobs(20), Blobs(20), recipe(method=f"{__name__}:Keeps"), output=tmp_path)
    assert not [*tmp_path.iterdir()]


class Keeps(Keeper):
    get_extra_state, set_extra_state = Remembers.get_extra_state, Remembers.set_extra_state


def relabelled(size, seed=0):
    data = Blobs(size, seed)
    data.y = data.y.flip(0)
    return data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": network(5)}, "with teacher='"),
        ({"train": Blobs(20, seed=5)}, "with train_samples='"),
        ({"train": relabelled(20)}, "with train_samples='"),
        ({"test": Blobs(20, seed=5)}, "with test_samples='"),
        ({"precision": "bf16"}, "with precision='no', got precision='bf16'"),
    ],
)
def test_resume_refuses_another_teacher_data_set_or_precision(tmp_path, changes, message, monkeypatch):
    def jitter(x):  # random, but the digest of the samples must not change
        return x + torch.rand(())

    arguments = {"teacher": network(2), "train": IndexedDataset(Blobs(20), jitter), "test": Blobs(20)}
    assert digest_of_samples(arguments["train"]) == digest_of_samples(arguments["train"])
    distill(network(), **arguments, recipe=recipe(), output=tmp_path)
    torch.manual_seed(77)
    distill(network(), **arguments, recipe=recipe(), output=tmp_path, resume=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if "precision" in changes:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", changes["precision"])
    changes = {name: x for name, x in changes.items() if name != "precision"}
    if "train" in changes:
        changes["train"] = IndexedDataset(changes["train"], jitter)
    with pytest.raises(ValueError, match=message):
        distill(network(), **{**arguments, **changes}, recipe=recipe(), output=tmp_path, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_checkpoint_of_another_version_is_refused(tmp_path):
    arguments = (network(2), Blobs(20), Blobs(20))
    distill(network(), *arguments, recipe(), output=tmp_path)
    path = tmp_path / "checkpoint" / "epoch-0004" / "run.json"
    (path.parent / checkpoint.SUMS).unlink()  # another version may have none
    for written in ('"format":99', '"form":1'):
        path.write_text(re.sub(r'"form\w*": ?\d+', written, path.read_text()))
        with pytest.raises(
            ValueError, match=r"epoch-0004 is of another version of kcd_ext \(format (99|None), this one reads 2"
        ):
            distill(network(), *arguments, recipe(), output=tmp_path, resume=True)


def test_failed_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    state = checkpoint.Checkpoint(1, {"student.w": torch.ones(3)}, {"optimizer": {}}, {"history": [1]})
    checkpoint.save(tmp_path, state)
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        checkpoint.save(tmp_path, checkpoint.Checkpoint(2, {"student.w": torch.zeros(3)}, {}, {}))
    assert caught.value.filename.endswith("training.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-0001"]
    assert checkpoint.load(tmp_path).run == {"history": [1]}


def test_file_is_replaced_atomically(tmp_path):
    path = tmp_path / "file"
    files.write_bytes(path, b"old")
    with open(path, "rb") as reader:
        files.write_bytes(path, b"new")
        assert reader.read() == b"old"  # a reader sees the old file or the new one
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
@pytest.mark.parametrize("name", ["model.safetensors", "training.pt", "run.json"])
def test_truncated_checkpoint_is_refused_in_one_line_and_folder_is_unchanged(tmp_path, name, keep):
    arguments = (network(2), Blobs(20), Blobs(20))
    distill(network(), *arguments, recipe(), output=tmp_path)
    path = tmp_path / "checkpoint" / "epoch-0004" / name
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match=r"checkpoint .*epoch-0004 is damaged \(.*\): remove it to start over"
    ) as caught:
        distill(network(), *arguments, recipe(), output=tmp_path, resume=True)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_non_finite_loss_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="smaller lr"), pytest.warns(RuntimeWarning, match="not finite"):
        distill(network(), network(2), Blobs(20), Blobs(20), recipe(lr=1e30), output=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_non_finite_weights_stop_the_run(tmp_path):
    """There is one batch: its loss is finite, and only its step makes the weights infinite."""
    with pytest.raises(FloatingPointError, match="weights are not finite after epoch 1: a smaller lr"):
        distill(
            network(),
            network(2),
            Blobs(8),
            Blobs(8),
            recipe(epochs=1, lr=2e38, options={"kd_weight": 1e5}),
            output=tmp_path,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


class InfiniteTerm(Method):
    def forward(self, student, teacher, batch):
        logits = student(batch.x)
        term = torch.tensor(math.inf)
        return Outcome(
            functional.cross_entropy(logits, batch.label), logits.detach(), methods.entropy(logits), {"t": term}
        )


def test_metrics_are_valid_json_if_a_term_is_infinite(tmp_path):
    distill(network(), network(2), Blobs(8), Blobs(8), recipe(method=f"{__name__}:InfiniteTerm"), output=tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["terms"] for line in lines] == [{"t": None}] * 4


def test_tied_weights_are_saved_and_resumed(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(FEATURES, CLASSES)
            self.b = nn.Linear(FEATURES, CLASSES)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.a(x) + self.b(x)

    summary = distill(Tied(), network(2), Blobs(20), Blobs(20), recipe(), output=tmp_path)
    assert distill(Tied(), network(2), Blobs(20), Blobs(20), recipe(), output=tmp_path, resume=True) == summary


# --- refused arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be an integer >= 1, got 0"),
        ({"epochs": 2.0}, TypeError, "epochs must be an integer"),
        ({"batch_size": True}, TypeError, "batch_size must be an integer"),
        ({"lr": 1e39}, ValueError, "lr must be a finite number"),
        ({"lr": float("nan")}, ValueError, "lr must be a finite number >= 0, got nan"),
        ({"milestones": (0.5, 150)}, ValueError, "milestones must be fractions"),
        ({"epochs": 6, "condense": Condense(warmup=6)}, ValueError, "condense.warmup must be <= 5, .* got 6: nothing"),
        ({"epochs": 9, "condense": Condense(every=4, warmup=9)}, ValueError, "condense.warmup must be <= 8"),
        ({"seed": -1}, ValueError, r"seed must be an integer in \[0, "),
        ({"seed": 10**22}, ValueError, r"seed must be an integer in \[0, "),
        ({"milestones": 5}, TypeError, "milestones must be fractions of the epochs in .*, got int 5"),
        ({"name": 5}, TypeError, "name must be a string, got int 5"),
        ({"device": "tpu"}, ValueError, "device must be auto, cpu or cuda, got 'tpu'"),
        ({"condense": {"keep": 0.5}}, TypeError, "condense must be a Condense or None"),
        (
            {"epochs": 40, "condense": Condense(every=40)},
            ValueError,
            "every must be < epochs=40, got 40: nothing would",
        ),
        ({"epochs": 1, "condense": Condense()}, ValueError, r"epochs must be > 1 if condense\.keep < 1, got 1"),
        ({"gradient_accumulation": 0}, ValueError, "gradient_accumulation must be an integer >= 1, got 0"),
        ({"compile": 1}, TypeError, "compile must be True or False"),
        ({"precision": "half"}, ValueError, "precision must be auto, float32, bfloat16, float16, got 'half'"),
        ({"options": "kd"}, TypeError, "options must be a mapping"),
    ],
)
def test_recipe_refuses_invalid_fields(changes, error, message):
    with pytest.raises(error, match=message):
        recipe(**changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "infobatch"}, "selection 'infobatch'"),
        ({"value": "loss"}, "condense.value='loss'"),
        ({"value": "kl", "selection": "importance"}, "condense.value='kl'"),
    ],
)
def test_value_of_the_teacher_refuses_batch_keep(options, message):
    condense = Condense(keep=0.5, batch_keep=0.5, **options)
    with pytest.raises(ValueError, match=rf"batch_keep=0\.5 cannot be combined with {message}: .*samples that skip"):
        distill(network(), network(2), Blobs(20), Blobs(20), recipe(condense=condense))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ce", {"value": "kl"}, "method 'ce' gives no kl of every sample"),
        ("Warm", {"value": "kl"}, "Warm' gives no kl of every sample"),
        ("Warm", {"value": "loss"}, "condense.value='loss' needs every sample's loss, which method .* does not give"),
        ("Warm", {"selection": "importance"}, "selection 'importance' weights every sample's loss, but method"),
    ],
)
def test_value_or_selection_that_the_method_lacks_is_refused_before_anything_is_written(
    tmp_path, method, options, message
):
    method = method if method == "ce" else f"{__name__}:{method}"
    settings = recipe(method=method, condense=Condense(keep=0.5, **options))
    with pytest.raises(ValueError, match=message):
        distill(network(), network(2), Blobs(20), Blobs(20), settings, output=tmp_path / "run")
    assert not [*tmp_path.iterdir()]


def test_warmup_of_a_selection_that_draws_every_epoch_is_any_but_the_last():
    Recipe(epochs=24, condense=Condense(keep=0.5, selection="importance", warmup=23))
    with pytest.raises(ValueError, match=r"condense\.warmup must be <= 23, the last condensation"):
        Recipe(epochs=24, condense=Condense(keep=0.5, selection="importance", warmup=24))
    with pytest.raises(ValueError, match=r"condense\.warmup must be <= 20, the last condensation"):
        Recipe(epochs=24, condense=Condense(keep=0.5, warmup=21))


def test_labels_name_selection_method_and_value():
    labels = [
        Recipe(method, condense=Condense(keep=keep, **options)).label
        for method, keep, options in (
            ("kd", 1.0, {}),
            ("kd", 0.5, {}),
            ("sskd", 0.5, {"value": "kl"}),
            ("kd", 0.5, {"selection": "uniform"}),
            ("kd", 0.5, {"selection": "importance", "value": "loss"}),
            ("ce", 0.5, {"selection": "importance", "value": "loss"}),
        )
    ]
    assert labels == ["kd", "kc-kd", "kc-sskd-kl", "uniform", "importance-loss", "importance-ce-loss"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep": 0.0}, ValueError, "keep must be a number in"),
        ({"keep": 1.5}, ValueError, "keep must be a number in"),
        ({"schedule": "linear"}, ValueError, "schedule must be one of"),
        ({"selection": "best"}, ValueError, "unknown selection 'best': choose from importance, infob"),
        ({"selection": "random", "epsilon": 0.1}, ValueError, "epsilon=0.1 has no effect with selection 'random'"),
        ({"selection": "infobatch", "stages": 3}, ValueError, "stages=3 has no effect with selection 'infobatch'"),
        (
            {"selection": "infobatch", "min_per_class": 1},
            ValueError,
            "min_per_class=1 has no effect with .* 'infobatch'",
        ),
        ({"selection": "infobatch", "warmup": 1}, ValueError, "warmup=1 has no effect with selection 'infobatch'"),
        (
            {"value": "teacher_entropy"},
            ValueError,
            "value must be one of 'entropy', 'kl', 'loss', got 'teacher_entropy'",
        ),
        ({"selection": "random", "value": "kl"}, ValueError, "value='kl' has no effect with selection 'random'"),
        ({"selection": "uniform", "value": "loss"}, ValueError, "value='loss' has no effect with selection 'uniform'"),
        ({"selection": "infobatch", "value": "kl"}, ValueError, "value='kl' has no effect with selection 'infobatch'"),
        ({"selection": "importance", "alpha": 1}, ValueError, "alpha=1 has no effect with selection 'importance'"),
        ({"selection": "uniform", "epsilon": 0.5}, ValueError, "epsilon=0.5 has no effect with selection 'uniform'"),
        ({"min_per_class": -1}, ValueError, "min_per_class must be an integer >= 0"),
        ({"warmup": True}, TypeError, "warmup must be an integer >= 0"),
        ({"batch_keep": 0}, ValueError, r"batch_keep must be a number in \(0, 1\]"),
        ({"every": 0}, ValueError, "every must be an integer >= 1, got 0"),
        ({"alpha": 10**400}, ValueError, "alpha must be .*, got 1000"),
    ],
)
def test_condense_refuses_invalid_fields(options, error, message):
    with pytest.raises(error, match=message):
        Condense(**options)


def test_default_milestones_equal_the_paper():
    rates = [Recipe().lr_at(epoch) for epoch in range(240)]
    expected = [0.05] * 150 + [0.005] * 30 + [0.0005] * 30 + [0.00005] * 30
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("epochs", [3, 7, 10, 100, 240])
def test_milestone_at_an_integer_epoch_is_not_missed(epochs):
    for epoch in range(1, epochs):
        for milestone in (epoch / epochs, float(f"{epoch / epochs:.15f}"), 1 - (epochs - epoch) / epochs):
            rates = [Recipe(epochs=epochs, milestones=(milestone,), lr=1.0).lr_at(e) for e in (epoch - 1, epoch)]
            assert rates == pytest.approx([1.0, 0.1])


def test_different_seeds_give_different_random_numbers():
    """Even if their concatenated bits are equal."""
    drawn = []
    for numbers in [(1,), (1, 0), (0, 1), (2**32,), (1, 0, 0), (0, 1, 0), (2**32, 0), (0, 2**32), (0, 0, 1)]:
        with seeded(*numbers):
            drawn.append((torch.rand(()).item(), random.random(), np.random.rand()))
    for numbers in zip(*drawn, strict=True):
        assert len(set(numbers)) == len(drawn)


SHARED = nn.Linear(FEATURES, CLASSES)


def labelled(wrong):
    """Return images of six pixels. The last one has the label `wrong`."""
    return ImageSet(np.zeros((9, 1, 6, 1), np.uint8), np.array([0] * 8 + [wrong]), Views((0.5,), (0.25,)))


FLAT = {name: nn.Sequential(nn.Flatten(), nn.Linear(FEATURES, CLASSES)) for name in ("student", "teacher")}


class Broken(nn.Linear):
    def __init__(self):
        super().__init__(FEATURES, CLASSES)

    def forward(self, x):
        return self.nothing(x)


@pytest.mark.parametrize(
    ("arguments", "changes", "error", "message"),
    [
        ({"teacher": None}, {}, ValueError, "teacher must be a torch.nn.Module for method 'kd', got None"),
        ({"student": nn.Linear(3, 4)}, {}, ValueError, r"student does not take x of torch.float32 \(1, 6\)"),
        ({"teacher": nn.Linear(3, 4)}, {}, ValueError, "teacher does not take x"),
        ({"student": nn.Linear(6, 4).requires_grad_(False)}, {}, ValueError, "student has no parameters to train"),
        ({"student": nn.Linear(6, 3)}, {}, ValueError, "the same number of classes, got 3 and 4"),
        ({"student": SHARED, "teacher": SHARED}, {}, ValueError, "student and teacher share parameters"),
        ({"student": nn.Sequential(SHARED), "teacher": SHARED}, {}, ValueError, "share parameters"),
        (
            {"student": Broken()},
            {},
            ValueError,
            "student does not take x .*: 'Broken' object has no attribute 'nothing'",
        ),
        (
            {},
            {"options": {"batch_keep": 0.5}},
            ValueError,
            "options must not contain batch_keep, got 0.5: set condense.batch_keep",
        ),
        ({"train": labelled(7)} | FLAT, {}, ValueError, r"train must give labels in \[0, 4\), got 7"),
        (
            {"train": labelled(0), "test": labelled(-1)} | FLAT,
            {},
            ValueError,
            r"test must give labels in \[0, 4\), got -1",
        ),
        ({"test": [(torch.zeros(3), 0)]}, {}, ValueError, r"does not take x of torch.float32 \(1, 3\) from test"),
        ({"test": [(torch.zeros(6), torch.tensor([1, 0]))]}, {}, ValueError, r"test must give labels .* \(1, 2\)"),
        ({"train": [(torch.zeros(6), np.int32(1))]}, {}, ValueError, r"train must give labels .* torch.int32 \(1,\)"),
        ({"train": [(torch.zeros(6), 4)]}, {}, ValueError, r"train must give labels in \[0, 4\), got 4"),
        ({"train": IndexedDataset(Blobs(9), {}.__getitem__)}, {}, ValueError, r"train\[0\] cannot be loaded: "),
        ({"student": nn.Unflatten(1, (2, 3))}, {}, ValueError, r"student must give logits \(b, classes\)"),
        ({"student": "resnet"}, {}, TypeError, "student must be a torch.nn.Module, got str"),
        ({"train": 5}, {}, TypeError, "train: dataset must have a length"),
        ({"test": []}, {}, ValueError, "test must hold at least one sample"),
        (
            {},
            {"method": "pkd"},
            ValueError,
            "unknown method 'pkd': did you mean pwkd\\? Choose from at, ce, crd, dist, dkd, fitnet, ie-dml, iekd, kd, kr, ",
        ),
        ({}, {"precision": "float16"}, ValueError, "precision 'float16' needs CUDA, but the device is cpu"),
        ({}, {"options": {"temperature": 0.0}}, ValueError, "temperature must be a finite number > 0"),
        ({}, {"options": {"temprature": 1.0}}, TypeError, "temprature"),
    ],
)
def test_distill_refuses_invalid_arguments_before_it_writes(tmp_path, arguments, changes, error, message):
    valid = {"student": network(), "teacher": network(2), "train": Blobs(20), "test": Blobs(20)}
    with pytest.raises(error, match=message):
        distill(**{**valid, **arguments}, recipe=recipe(**changes), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_later_test_labels_of_another_shape_are_refused():
    x, size = torch.zeros(FEATURES), MIN_EVAL_BATCH_SIZE
    test = [(x, torch.tensor(0))] * size + [(x, torch.tensor([0, 0]))] * size
    with pytest.raises(ValueError, match=rf"^test labels must have shape \({size},\), got \({size}, 2\)"):
        distill(network(), network(2), Blobs(20), test, recipe())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_device_cuda_is_refused_without_cuda():
    with pytest.raises(ValueError, match="device 'cuda' is not available"):
        distill(network(), network(2), Blobs(20), Blobs(20), recipe(device="cuda"))


# --- names ----------------------------------------------------------------------------------------------


def test_registry_resolves_names_and_refuses_unknown_ones():
    assert resolve("thing", "os:path.join", {}) is os.path.join
    assert resolve("thing", "short", {"short": "os:getcwd"}) is os.getcwd
    for name, message in (
        ("nothing", "unknown thing 'nothing': choose from short, or write module:attribute"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
        ("os.nowhere:f", "there is no module 'os.nowhere'"),
        ("os:nothing", "'os' has no 'nothing'"),
        (":f", "unknown thing"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve("thing", name, {"short": "os:getcwd"})
    with pytest.raises(TypeError, match="thing must be a name"):
        resolve("thing", 3, {})
    assert call("thing", "short", {"short": "builtins:dict"}, name=3, kind=4) == {"name": 3, "kind": 4}
    for registry in (DATASETS, methods.REGISTRY, models.REGISTRY):
        assert all(callable(resolve("entry", name, registry)) for name in registry)


@pytest.mark.parametrize("epochs", range(2, 50))
def test_condensations_split_the_run_into_equal_parts(epochs):
    config = Condense().build(1000, seed=0, device="cpu", epochs=epochs).config
    assert config["every"] == math.ceil(epochs / 6) and config["stages"] == math.ceil(epochs / config["every"]) <= 6
    if epochs % 6 == 0:  # the authors' rule: six equal parts, the first with all samples
        sizes = [1 - 0.3 / 6 * (epoch // config["every"]) for epoch in range(epochs)]
        assert config["stages"] == 6 and sum(sizes) / epochs == pytest.approx(0.875)


def test_results_table_equals_means_by_hand():
    def run(method, seed, last, visits, teacher):
        return Summary(method, seed, last, last + 1, visits, teacher, 2.0)

    runs = [run("kd", 0, 90.0, 1000, 1000), run("kd", 1, 92.0, 1000, 1000), run("student", 0, 80.0, 1000, 0)]
    kd, student, condensed = results_table([*runs, run("kc-kd", 0, 91.0, 875, 875)])[1:]
    assert kd[1:3] == ["91.00 ± 1.41", "92.00 ± 1.41"]
    assert (student[1], *student[3:5]) == ("80.00", "1,000 (100.0 %)", "0")
    assert condensed[4] == "875 (87.5 %)"
