"""Optimizers, schedules, clipping, averaged weights, validation and early stopping: against loops written by hand."""

import copy
import json
import math
import time
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch
from processes import Crew
from small_runs import StopError, assert_same, final, images, network, stop_after
from test_processes import Waits
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

from kcd_ext import CondensedSampler, KnowledgeCondenser, files
from kcd_ext.data.images import ImageData, ImageSet
from kcd_ext.methods import Method, Outcome, Pretraining
from kcd_ext.reports.comparison import compare
from kcd_ext.training import Condense, Recipe, checkpoint, distill
from kcd_ext.training.distributed import full_state_dict, optimizer_step
from kcd_ext.training.fingerprint import check_same_run
from kcd_ext.training.recipe import milestones_passed

pytestmark = pytest.mark.usefixtures("one_thread")

FEATURES, CLASSES = 5, 3


class Points(torch.utils.data.Dataset):
    """Clouds of points in float64, one for each class. A fraction of the labels is wrong."""

    def __init__(self, size, seed=0, wrong=0.0):
        generator = torch.Generator().manual_seed(seed)
        self.y = torch.arange(size) % CLASSES
        centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
        self.x = centres[self.y] + torch.randn(size, FEATURES, generator=generator, dtype=torch.float64)
        changed = torch.rand(size, generator=generator) < wrong
        self.y = torch.where(changed, (self.y + 1) % CLASSES, self.y)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index], int(self.y[index])


def student(seed=1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = (nn.Linear(FEATURES, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, CLASSES))
        return nn.Sequential(*layers).double()


def recipe(**changes):
    return Recipe(**{"method": "ce", "epochs": 5, "batch_size": 8, "device": "cpu", "seed": 3} | changes)


def train(network, r, data=None, test=None, **more):
    return distill(network, None, data or Points(61), test or Points(40, seed=1), r, **more)


# --- optimizers and schedules -----------------------------------------------------------------------------------------


def two_rates(parameters, lr):
    """Return NAdam with a tenth of the learning rate for biases and scales."""
    large, small = ([p for p in parameters if (p.dim() > 1) == matrix] for matrix in (True, False))
    return torch.optim.NAdam([{"params": large}, {"params": small, "lr": lr / 10}], lr=lr)


def by_hand(network, data, optimizer, factor, clip_norm=None, epochs=5, accumulation=1):
    """Train with cross entropy, LambdaLR and PyTorch's own clipping. Yield the network after every step."""
    scheduler = LambdaLR(optimizer, factor)
    sampler = CondensedSampler(KnowledgeCondenser(len(data), seed=3, keep=1.0, every=99), seed=3)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        order = [entry[0] if isinstance(entry, tuple) else entry for entry in sampler]
        steps = math.ceil(len(order) / (8 * accumulation))
        for step in range(steps):
            index = torch.tensor(order[len(order) * step // steps : len(order) * (step + 1) // steps])
            optimizer.zero_grad()
            functional.cross_entropy(network(data.x[index]), data.y[index]).backward()
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
            optimizer.step()
            scheduler.step()
            yield network


STEPS = 8  # of an epoch: 61 samples in batches of 8


def cosine_after_warmup(step, warmup=1.5 * STEPS, total=5 * STEPS):
    """Return the factor of a step as in transformers' `get_cosine_schedule_with_warmup`."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def adamw(network, lr=1e-3, weight_decay=0.05):
    groups = {True: [], False: []}
    for name, parameter in network.named_parameters():
        groups[name in ("0.weight", "3.weight")].append(parameter)
    decayed, others = ({"params": groups[key], "weight_decay": weight_decay * key} for key in (True, False))
    return torch.optim.AdamW([decayed, others], lr=lr)


def drops(step, lr=0.1):
    return lr ** sum(step >= STEPS * milestone for milestone in (3.125, 3.75, 4.375) if step // STEPS >= milestone)


CASES = {
    "default": ({}, lambda n: torch.optim.SGD(n.parameters(), 0.05, momentum=0.9, weight_decay=5e-4), drops),
    "sgd": (
        {"lr": 0.2, "momentum": 0.5, "weight_decay": 0.01, "schedule": "constant", "clip_norm": 0.2},
        lambda n: torch.optim.SGD(n.parameters(), 0.2, momentum=0.5, weight_decay=0.01),
        lambda step: 1.0,
    ),
    "adamw": (
        {"optimizer": "adamw", "schedule": "cosine", "warmup_epochs": 1.5, "clip_norm": 0.3},
        adamw,
        cosine_after_warmup,
    ),
    "adamw-decay-0": (
        {"optimizer": "adamw", "lr": 0.02, "weight_decay": 0.0, "schedule": "cosine"},
        partial(adamw, lr=0.02, weight_decay=0.0),
        partial(cosine_after_warmup, warmup=0),
    ),
    "milestones-after-warmup": (
        {"optimizer": "adamw", "lr": 0.01, "milestones": (0.2, 0.6), "gamma": 0.5, "warmup_epochs": 2},
        partial(adamw, lr=0.01),
        lambda step: min(1, step / 16) * 0.5 ** ((step >= 8) + (step >= 24)),
    ),
    "torch": (
        {"optimizer": "torch.optim:RAdam", "schedule": "constant", "lr": 0.02},
        lambda n: torch.optim.RAdam(n.parameters(), lr=0.02),
        lambda step: 1.0,
    ),
    "function": (
        {"optimizer": f"{__name__}:two_rates", "schedule": "cosine"},
        lambda n: two_rates([*n.parameters()], lr=1e-3),
        partial(cosine_after_warmup, warmup=0),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_training_equals_a_loop_with_lambda_lr(case):
    changes, build, factor = CASES[case]
    trained, twin = student(), student()
    train(trained, recipe(**changes))
    for _ in by_hand(twin, Points(61), build(twin), factor, changes.get("clip_norm")):
        pass
    for name, tensor in trained.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name], rtol=1e-9, atol=1e-11)


def test_clipping_changes_training_only_if_gradients_are_larger():
    weights = {}
    for clip_norm in (None, 1e9, 0.2):
        trained = student()
        train(trained, recipe(clip_norm=clip_norm, epochs=2))
        weights[clip_norm] = trained[0].weight.detach()
    assert torch.equal(weights[None], weights[1e9]) and not torch.allclose(weights[None], weights[0.2])


def test_clipping_covers_accumulated_gradients():
    trained, twin = student(), student()
    trained[1] = twin[1] = nn.Identity()  # batch statistics would depend on how a step is split
    settings = {"clip_norm": 0.1, "schedule": "constant", "epochs": 3}
    train(trained, recipe(gradient_accumulation=2, **settings))
    optimizer = torch.optim.SGD(twin.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    for _ in by_hand(twin, Points(61), optimizer, lambda step: 1.0, 0.1, 3, accumulation=2):
        pass
    torch.testing.assert_close(trained[0].weight, twin[0].weight, rtol=1e-9, atol=1e-11)


class Scaled:
    """The parts of an Accelerator that `optimizer_step` uses, with a scaler of float16 gradients."""

    num_processes = 1

    def __init__(self):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)


def test_scaled_gradients_are_clipped_by_their_true_norm():
    weight, accelerator = nn.Parameter(torch.zeros(2)), Scaled()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    accelerator.scaler.scale((weight * torch.tensor([3.0, 4.0])).sum()).backward()
    optimizer_step(accelerator, optimizer, nn.Identity(), clip_norm=1.0)
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8]))
    accelerator.scaler.scale((weight * torch.tensor([math.inf, 1.0])).sum()).backward()
    optimizer_step(accelerator, optimizer, nn.Identity(), clip_norm=1.0)
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8]))  # the step is skipped


def test_fraction_of_an_epoch_is_that_of_its_own_steps():
    """Condensation shortens later epochs. The cosine still ends with the last epoch."""
    lines = []
    settings = {"epochs": 6, "schedule": "cosine", "condense": Condense(keep=0.4, every=2, stages=2), "lr": 1.0}
    summary = train(student(), recipe(**settings), progress=lines.append, progress_every=1)
    steps = [math.ceil(line["samples"] / 8) for line in summary.history]
    assert steps[0] == STEPS > steps[-1]
    expected = [
        0.5 + 0.5 * math.cos(math.pi * (epoch + step / steps[epoch]) / 6)
        for epoch in range(6)
        for step in range(steps[epoch])
    ]
    found = [line for line in lines if "step" in line]
    assert [line["lr"] for line in found] == pytest.approx(expected)
    assert [line["step"] for line in found] == [*range(1, sum(steps) + 1)]
    assert [line["lr"] for line in summary.history] == pytest.approx([found[sum(steps[:e])]["lr"] for e in range(6)])


class Pretrained(Method):
    """A method that trains a part of its own first, with a learning rate of SGD."""

    needs_teacher = False

    def prepare(self, student, teacher, samples):
        self.part = nn.Linear(FEATURES, 1, dtype=torch.float64)
        nn.init.zeros_(self.part.weight), nn.init.ones_(self.part.bias)

    def pretraining(self):
        return [Pretraining(self.part, lambda _, batch: self.part(batch.x).square().mean(), epochs=2, lr=0.1)]

    def forward(self, student, teacher, batch):
        logits = student(batch.x)
        loss = functional.cross_entropy(logits, batch.label)
        return Outcome(loss, logits.detach(), loss.detach().expand(len(batch.label)))


def test_pretraining_keeps_its_own_optimizer(tmp_path):
    lines, settings = [], {"schedule": "cosine", "warmup_epochs": 1, "ema": 0.9, "lr": 0.01}
    parts = []
    for optimizer, more in (("sgd", {}), ("adamw", settings)):
        r, output = recipe(method=f"{__name__}:Pretrained", optimizer=optimizer, **more), tmp_path / optimizer
        train(student(), r, output=output, progress=lines.append, progress_every=5)
        rates = [line["lr"] for line in files.read_lines(output / "pretraining.jsonl")]
        assert rates == pytest.approx([0.1, 0.01])  # a tenth after half of the epochs
        parts.append(checkpoint.load(output / "checkpoint").model["method.part.bias"])
    assert torch.equal(*parts) and parts[0] != 1
    counted = [(line["pretraining"], line["step"]) for line in lines if "step" in line and "pretraining" in line]
    assert counted == 2 * [(1, 5), (2, 10), (2, 15)]


# --- averaged weights -------------------------------------------------------------------------------------------------


def test_averaged_student_is_validated_and_saved_and_training_continues_from_the_raw_one(tmp_path):
    trained, twin = student(), student()
    test = Points(300, seed=1, wrong=0.3)
    summary = train(trained, recipe(ema=0.9, lr=0.02, schedule="constant"), test=test, output=tmp_path)
    averages = {name: parameter.detach().clone() for name, parameter in twin.named_parameters()}
    accuracies, decays = [], []
    optimizer = torch.optim.SGD(twin.parameters(), 0.02, momentum=0.9, weight_decay=5e-4)
    for step, _ in enumerate(by_hand(twin, Points(61), optimizer, lambda step: 1.0)):
        decay = min(0.9, (1 + step) / (10 + step))
        for name, parameter in twin.named_parameters():
            averages[name] = decay * averages[name] + (1 - decay) * parameter.detach()
        if step % STEPS == STEPS - 1:
            averaged = copy.deepcopy(twin).eval()
            averaged.load_state_dict(averages, strict=False)
            with torch.no_grad():
                right = (averaged(test.x).argmax(-1) == test.y).double().mean().item()
            accuracies.append(round(100 * right, 4))
            decays.append(decay)
    assert [line["accuracy"] for line in summary.history] == accuracies
    assert [line["ema"] for line in summary.history] == pytest.approx(decays)
    saved = safetensors.torch.load_file(tmp_path / "student.safetensors")
    raw = checkpoint.load(tmp_path / "checkpoint").model
    for name, tensor in twin.state_dict().items():
        expected = averages.get(name, tensor)  # buffers are those of the raw student
        torch.testing.assert_close(saved[name], expected, rtol=1e-9, atol=1e-11)
        assert torch.equal(trained.state_dict()[name], saved[name])
        torch.testing.assert_close(raw[f"student.{name}"], tensor, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(saved["0.weight"], twin[0].weight)


def test_averages_have_float32_precision_for_bfloat16_weights():
    """A decay of 0.999 moves bfloat16 numbers, which have eight bits, by less than their spacing."""
    from kcd_ext.training.averaging import Averages

    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    averages = Averages(0.999, {"p": parameter})
    averages.updates = 10**6  # past the lower decays of a run's beginning
    with torch.no_grad():
        parameter.fill_(2)
    for _ in range(1000):
        averages.update()
    (average,) = averages.state_dict()["averages"].values()
    torch.testing.assert_close(average, torch.full((3,), 2 - 0.999**1000), rtol=1e-3, atol=0)
    with averages.applied():
        assert parameter.dtype == torch.bfloat16 and 1.6 < parameter[0] < 1.65
    assert parameter[0] == 2


# --- validation -------------------------------------------------------------------------------------------------------


def noisy(epochs=12, **changes):
    """Return a recipe that overfits wrong labels, so that its best epoch is not the last."""
    return recipe(epochs=epochs, lr=0.3, schedule="constant", weight_decay=0.0, **changes)


NOISY, VAL, TEST = Points(61, wrong=0.4), Points(80, seed=2, wrong=0.1), Points(200, seed=1)


@pytest.fixture(scope="module")
def observed():
    """The history of a run without `keep_best` and `patience`, and its student after every epoch."""
    torch.set_num_threads(1)
    trained, states = student(), []

    def look(line):
        states.append(copy.deepcopy(trained.state_dict()))

    summary = train(trained, noisy(), NOISY, TEST, val=VAL, progress=look)
    return summary, states


def first_best(accuracies):
    best = 0
    for epoch, accuracy in enumerate(accuracies):
        if accuracy > accuracies[best]:
            best = epoch
    return best


def test_best_epoch_is_chosen_on_validation_and_reported_on_test(observed):
    summary, states = observed
    with torch.no_grad():
        for line, state in zip(summary.history, states, strict=True):
            trained = student()
            trained.load_state_dict(state)
            for name, data in (("accuracy", TEST), ("val_accuracy", VAL)):
                right = (trained.eval()(data.x).argmax(-1) == data.y).double().mean().item()
                assert line[name] == round(100 * right, 4)
    validation = [line["val_accuracy"] for line in summary.history]
    best = first_best(validation)
    assert summary.best_epoch == best + 1 and summary.accuracy_best == summary.history[best]["accuracy"]
    assert summary.accuracy_best < max(line["accuracy"] for line in summary.history)  # the test set did not choose
    assert summary.accuracy == summary.accuracy_last and best < 11


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_student_of_the_best_epoch_is_kept(observed, ema, tmp_path):
    trained, states = student(), []
    if ema:
        settings = noisy(ema=ema)
        whole = train(student(), settings, NOISY, TEST, val=VAL)
        best = first_best([line["val_accuracy"] for line in whole.history])
        shorter = student()
        if best:
            train(shorter, recipe(**{**vars_of(settings), "epochs": best + 1}), NOISY, TEST, val=VAL)
        expected = shorter.state_dict()
    else:
        summary, states = observed
        best, expected = summary.best_epoch - 1, states[summary.best_epoch - 1]
    kept = train(trained, noisy(ema=ema, keep_best=True), NOISY, TEST, val=VAL, output=tmp_path)
    assert kept.best_epoch == best + 1 and kept.accuracy == kept.accuracy_best and len(kept.history) == 12
    assert_same(dict(trained.state_dict()), dict(expected))
    assert_same(safetensors.torch.load_file(tmp_path / "student.safetensors"), dict(expected))
    content = json.loads((tmp_path / "summary.json").read_text())["results"][0]
    assert (content["best_epoch"], content["keeps_best"]) == (best + 1, True)
    again = student(7)
    assert train(again, noisy(ema=ema, keep_best=True), NOISY, TEST, val=VAL, output=tmp_path, resume=True) == kept
    assert_same(dict(again.state_dict()), dict(expected))


def vars_of(settings):
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


def test_run_stops_when_patience_is_over(observed, tmp_path):
    whole, _ = observed
    validation = [line["val_accuracy"] for line in whole.history]
    patience = 3
    stop = next(n for n in range(1, 13) if n - 1 - first_best(validation[:n]) >= patience)
    assert stop < 12
    summary = train(student(), noisy(patience=patience), NOISY, TEST, val=VAL, output=tmp_path)
    assert [line["val_accuracy"] for line in summary.history] == validation[:stop]
    assert summary.sample_visits == stop * 61 and (tmp_path / "student.safetensors").exists()
    lines = []
    again = train(
        student(7),
        noisy(patience=patience),
        NOISY,
        TEST,
        val=VAL,
        output=tmp_path,
        resume=True,
        progress=lines.append,
    )
    assert again == summary and lines == []


def test_metrics_and_summary_are_as_before_without_the_new_options(tmp_path):
    train(student(), recipe(epochs=2), output=tmp_path)
    line = files.read_lines(tmp_path / "metrics.jsonl")[0]
    assert not {"ema", "val_accuracy"} & line.keys()
    content = json.loads((tmp_path / "summary.json").read_text())["results"][0]
    assert not {"best_epoch", "keeps_best"} & content.keys()
    training = checkpoint.load(tmp_path / "checkpoint").training
    assert training.keys() == {"optimizer", "scaler", "condenser", "trained"}
    assert not {"val", "val_samples"} & json.loads((tmp_path / "config.json").read_text()).keys()


# --- resume -----------------------------------------------------------------------------------------------------------

GRID = {
    "sgd-cosine-ema": {"schedule": "cosine", "ema": 0.9},
    "adamw-warmup-clip": {"optimizer": "adamw", "warmup_epochs": 2.5, "clip_norm": 0.5, "schedule": "cosine"},
    "adamw-accumulation-best": {"optimizer": "adamw", "gradient_accumulation": 3, "keep_best": True, "lr": 0.02},
    "function-ema-best-clip": {
        "optimizer": f"{__name__}:two_rates",
        "ema": 0.8,
        "keep_best": True,
        "clip_norm": 1.0,
        "lr": 0.02,
    },
    "sgd-patience-best-warmup": {"patience": 4, "keep_best": True, "warmup_epochs": 1, "lr": 0.1},
    "adamw-bfloat16-ema": {"optimizer": "adamw", "precision": "bfloat16", "ema": 0.9, "schedule": "constant"},
    "sskd-adamw-ema": {
        "method": "sskd",
        "options": {"head_epochs": 3, "head_lr": 0.02},
        "optimizer": "adamw",
        "ema": 0.9,
        "schedule": "cosine",
        "clip_norm": 2.0,
    },
    "pwkd-warmup-adamw": {
        "method": "pwkd",
        "options": {"teacher_epochs": 2, "teacher_lr": 0.02, "widths": "0.5,1"},
        "optimizer": "adamw",
        "warmup_epochs": 1,
    },
    "crd-function-best": {
        "method": "crd",
        "options": {"negatives": 12, "dimension": 5},
        "optimizer": "torch.optim:Adamax",
        "keep_best": True,
    },
}


def val_images():
    whole = images(54, seed=1)
    return ImageSet(whole.images[30:], whole.labels[30:], whole.views)


def run(output, settings, epochs=9, **more):
    torch.set_num_threads(1)
    values = {"method": "kd", "epochs": epochs, "batch_size": 8, "device": "cpu", "seed": 5, **settings}
    r = Recipe(**values, condense=Condense(keep=0.5, stages=3))
    val = val_images() if {"keep_best", "patience"} & settings.keys() else None
    sets = (images(69), images(30, seed=1))
    return distill(network(1), network(2, width=10), *sets, r, val=val, output=output, resume=True, **more)


@pytest.mark.parametrize(
    "case", [name if i < 4 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(GRID)]
)
def test_run_stopped_in_every_epoch_equals_an_uninterrupted_run(case, tmp_path):
    settings = GRID[case]
    reference = run(tmp_path / "reference", settings)
    interrupted, stops = tmp_path / "interrupted", 0
    while not (interrupted / "summary.json").exists():
        try:
            run(interrupted, settings, progress=stop_after(1))
        except StopError:
            stops += 1
    assert stops >= len(reference.history)
    assert_same(final(interrupted), final(tmp_path / "reference"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "processes"),
    [("function-ema-best-clip", 1), ("sskd-adamw-ema", 1), ("adamw-accumulation-best", 2), ("sgd-cosine-ema", 2)],
)
def test_run_killed_repeatedly_equals_an_uninterrupted_run(case, processes, tmp_path):
    settings, epochs = GRID[case], 24
    reference, interrupted = tmp_path / "reference", tmp_path / "interrupted"
    assert Crew(lambda rank: run(reference, settings, epochs), processes).wait() == [0] * processes
    rng, before = np.random.default_rng(len(case)), -1
    for _ in range(4):
        crew, deadline = Crew(lambda rank: run(interrupted, settings, epochs), processes), time.monotonic() + 60
        while (done := epochs_done(interrupted)) <= before + 1:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(rng.random() * 0.03)
        crew.kill()
        before = done
        assert not (interrupted / "summary.json").exists()
    assert Crew(lambda rank: run(interrupted, settings, epochs), processes).wait() == [0] * processes
    assert_same(final(interrupted), final(reference))


def epochs_done(folder):
    paths = (folder / "pretraining.jsonl", folder / "metrics.jsonl")
    return sum(len(files.read_lines(path)) for path in paths if path.exists())


def plain_network(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 4))


def sharded_run(output, sharded, rank, last=9, **settings):
    torch.set_num_threads(1)
    from accelerate import PartialState
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    PartialState(cpu=True)
    trained = plain_network(0)
    if sharded:
        fully_shard(trained, mesh=init_device_mesh("cpu", (2,)))
    saved = output.name != "unsaved"
    r = Recipe("kd", epochs=5, batch_size=8, device="cpu", seed=5, keep_best=saved, **settings)

    def stop(line):
        assert line["epoch"] < last

    data = (images(64), images(20, seed=1))
    more = {"resume": True, "progress": stop, "output": output} if saved else {}
    distill(trained, plain_network(1), *data, r, val=val_images(), **more)
    if not saved:
        state = full_state_dict(trained.state_dict())
        if rank == 0:
            safetensors.torch.save_file(state, output.with_suffix(".safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", f"{__name__}:two_rates"])
def test_sharded_student_trains_saves_and_resumes_like_unsharded_one(optimizer, tmp_path):
    settings = {"optimizer": optimizer, "ema": 0.5, "clip_norm": 0.1, "schedule": "cosine", "lr": 0.01}
    folders = _, sharded, interrupted = [tmp_path / name for name in ("unsharded", "sharded", "interrupted")]
    for folder, cut in zip(folders[:2], (False, True), strict=True):
        assert Crew(partial(sharded_run, folder, cut, **settings), 2).wait() == [0, 0]
    one, other = (safetensors.torch.load_file(folder / "student.safetensors") for folder in folders[:2])
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-6)
    assert Crew(partial(sharded_run, interrupted, True, last=3, **settings), 2).wait()[0] == 1
    assert Crew(partial(sharded_run, interrupted, True, **settings), 2).wait() == [0, 0]
    assert_same(final(interrupted), final(sharded))
    # A state_dict reshards a student. Without any, only the trainer gives it its own weights back after validation.
    assert Crew(partial(sharded_run, tmp_path / "unsaved", True, **settings), 2).wait() == [0, 0]
    averages = checkpoint.load(sharded / "checkpoint").training["averages"]["averages"]
    unsaved = safetensors.torch.load_file(tmp_path / "unsaved.safetensors")
    assert_same({f"student.{name}": tensor for name, tensor in unsaved.items()}, averages)


@pytest.mark.slow
def test_compiled_student_equals_eager_student(tmp_path):
    # Not AdamW: it makes full steps of the rounding errors that are the gradient of a bias before normalisation.
    settings = {"ema": 0.8, "keep_best": True, "clip_norm": 1.0, "schedule": "cosine", "warmup_epochs": 1}
    weights = []
    for compiled in (False, True):
        r = Recipe("kd", epochs=3, batch_size=8, device="cpu", seed=5, compile=compiled, **settings)
        trained, data = network(1, dropout=0.0), (images(69), images(30, seed=1))
        distill(trained, network(2, width=10), *data, r, val=val_images())
        weights.append(trained.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-4)


def test_run_of_an_older_version_resumes_with_the_defaults():
    saved = Recipe("kd", epochs=7).as_json()
    new = ("optimizer", "schedule", "warmup_epochs", "clip_norm", "ema", "keep_best", "patience")
    older = {name: value for name, value in saved.items() if name not in new}
    assert Recipe.from_json(older) == Recipe("kd", epochs=7)
    older["condense"] = {name: value for name, value in older["condense"].items() if name != "value"}
    assert Recipe.from_json(older) == Recipe("kd", epochs=7)
    check_same_run({"recipe": older, "processes": 1}, {"recipe": saved, "processes": 1}, "folder")
    by_loss = Recipe("kd", epochs=7, condense=Condense(value="loss", keep=1.0)).as_json()
    with pytest.raises(ValueError, match=r"folder was run with condense\.value='entropy', got condense\.value='loss'"):
        check_same_run({"recipe": older, "processes": 1}, {"recipe": by_loss, "processes": 1}, "folder")
    changed = Recipe("kd", epochs=7, ema=0.9).as_json()
    with pytest.raises(ValueError, match=r"folder was run with ema=0.0, got ema=0.9"):
        check_same_run({"recipe": older, "processes": 1}, {"recipe": changed, "processes": 1}, "folder")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "adamw"},
        {"optimizer": "a:b"},
        {"schedule": "cosine", "ema": 0.9},
        {"patience": 3, "clip_norm": 1},
    ],
)
def test_recipe_is_restored_from_its_json(changes):
    r = recipe(**changes)
    assert Recipe.from_json(json.loads(json.dumps(r.as_json()))) == r


def test_run_does_not_resume_with_another_validation_set(tmp_path):
    with pytest.raises(StopError):
        train(student(), noisy(), NOISY, TEST, val=VAL, output=tmp_path, progress=stop_after(2))
    for val, message in ((None, "val=80, got val=None"), (Points(80, seed=5), "val_samples=")):
        with pytest.raises(ValueError, match=message):
            train(student(), noisy(), NOISY, TEST, val=val, output=tmp_path, resume=True)
    without = tmp_path / "without"
    with pytest.raises(StopError):
        train(student(), noisy(), NOISY, TEST, output=without, progress=stop_after(2))
    with pytest.raises(ValueError, match="val=None, got val=80"):
        train(student(), noisy(), NOISY, TEST, val=VAL, output=without, resume=True)


def test_runs_of_an_older_version_are_averaged_with_newer_ones(tmp_path):
    for seed in (3, 4):
        train(student(), recipe(epochs=2, seed=seed), output=tmp_path / f"{seed}")
    path = tmp_path / "3" / "config.json"
    config = json.loads(path.read_text())
    for name in ("optimizer", "schedule", "warmup_epochs", "clip_norm", "ema", "keep_best", "patience"):
        del config["recipe"][name]
    path.write_text(json.dumps(config))
    found = compare([tmp_path / "3", tmp_path / "4"])
    assert [s.method for s in found.summaries] == ["ce", "ce"] and not found.differences


# --- refused arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"optimizer": "adam"}, ValueError, "unknown optimizer 'adam': did you mean adamw"),
        ({"optimizer": 5}, TypeError, "optimizer must be a string, got int 5"),
        ({"optimizer": "adamw", "momentum": 0.5}, ValueError, "momentum=0.5 has no effect with optimizer 'adamw'"),
        ({"optimizer": "torch.optim:RAdam", "momentum": 0.5}, ValueError, "momentum=0.5 has no effect with optimizer"),
        (
            {"optimizer": "a:b", "weight_decay": 5e-4},
            ValueError,
            "weight_decay=0.0005 has no effect with optimizer 'a:b'",
        ),
        ({"lr": -1}, ValueError, "lr must be a finite number >= 0, got -1"),
        ({"weight_decay": "x"}, TypeError, "weight_decay must be a finite number >= 0, got str 'x'"),
        (
            {"schedule": "linear"},
            ValueError,
            "schedule must be one of 'milestones', 'cosine', 'constant', got 'linear'",
        ),
        ({"schedule": "cosine", "gamma": 0.5}, ValueError, "gamma=0.5 has no effect with schedule 'cosine'"),
        ({"schedule": "constant", "milestones": [0.5]}, ValueError, "milestones=.* has no effect with schedule 'const"),
        ({"warmup_epochs": -1}, ValueError, "warmup_epochs must be a finite number >= 0, got -1"),
        ({"warmup_epochs": 5}, ValueError, "warmup_epochs must be < epochs=5, got 5"),
        ({"warmup_epochs": math.inf}, ValueError, "warmup_epochs must be a finite number >= 0, got inf"),
        ({"clip_norm": 0}, ValueError, "clip_norm must be a finite number > 0, got 0"),
        ({"ema": 1}, ValueError, r"ema must be a number in \[0, 1\), got 1"),
        ({"ema": True}, TypeError, r"ema must be a number in \[0, 1\), got bool True"),
        ({"keep_best": 1}, TypeError, "keep_best must be True or False"),
        ({"patience": 0}, ValueError, "patience must be an integer >= 1, got 0"),
        ({"patience": 5}, ValueError, "patience must be < epochs=5, got 5: it would never stop the run"),
    ],
)
def test_recipe_refuses_invalid_fields(changes, error, message):
    with pytest.raises(error, match=message):
        recipe(**changes)


def one_parameter(parameters, lr):
    return torch.optim.SGD(parameters[:1], lr)


def foreign_parameter(parameters, lr):
    return torch.optim.SGD([*parameters, nn.Parameter(torch.zeros(1))], lr)


def no_optimizer(parameters, lr):
    return 5


def broken(parameters, lr):
    raise RuntimeError("no luck")


class Unstorable(torch.optim.SGD):
    def step(self):
        super().step()
        self.state[self.param_groups[0]["params"][0]]["self"] = Points


@pytest.mark.parametrize(
    ("optimizer", "error", "message"),
    [
        (
            f"{__name__}:one_parameter",
            ValueError,
            "must train the 6 parameters that it gets, but it trains 1 of them and 0 oth",
        ),
        (f"{__name__}:foreign_parameter", ValueError, "but it trains 6 of them and 1 others"),
        (f"{__name__}:no_optimizer", TypeError, "must return a torch.optim.Optimizer, got int 5"),
        (f"{__name__}:broken", ValueError, r"called with parameters and lr=0\.001: RuntimeError.*no luck"),
        (f"{__name__}:GRID", TypeError, "must be callable, got dict"),
        (f"{__name__}:nothing", ValueError, "has no 'nothing'"),
        ("no_such_module:f", ValueError, "there is no module 'no_such_module'"),
        ("torch.optim:LBFGS", ValueError, "fails in a step: .*closure"),
        (f"{__name__}:Unstorable", ValueError, "has a state that a checkpoint cannot hold"),
    ],
)
def test_optimizer_that_does_not_fit_is_refused_before_anything_is_written(optimizer, error, message, tmp_path):
    with pytest.raises(error, match=message) as caught:
        train(student(), recipe(optimizer=optimizer), output=tmp_path / "run")
    assert optimizer in str(caught.value) or "no_such" in str(caught.value) or "nothing" in str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("changes", [{"keep_best": True}, {"patience": 2}])
def test_options_that_choose_on_validation_are_refused_without_a_validation_set(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name}=.* needs a validation set, got val=None"):
        train(student(), recipe(**changes))


def test_validation_set_that_does_not_fit_is_refused(tmp_path):
    wrong = Points(10)
    wrong.x = wrong.x[:, :3]
    with pytest.raises(ValueError, match=r"student does not take x of torch\.float64 .* from val"):
        train(student(), recipe(), val=wrong, output=tmp_path / "run")
    with pytest.raises(ValueError, match="val must hold at least one sample"):
        train(student(), recipe(), val=torch.utils.data.Subset(Points(10), []))
    with pytest.raises(FloatingPointError, match=r"the accuracy after epoch 1 means nothing: val\[1\] holds NaN"):
        broken = Points(10)
        broken.x[1, 0] = math.nan
        train(student(), recipe(), val=broken)


def test_method_with_its_own_learning_rate_refuses_a_schedule():
    r = Recipe("pwkd", {"widths": "0.5,1"}, epochs=4, schedule="cosine", device="cpu")
    with pytest.raises(ValueError, match="schedule='cosine' has no effect with method 'pwkd', which sets its own"):
        distill(network(1), network(2, width=10), images(20), images(20), r)


def test_warmup_scales_a_learning_rate_of_the_method():
    lines = []
    options = {"widths": "0.5,1", "teacher_epochs": 1}
    r = Recipe("pwkd", options, epochs=4, warmup_epochs=2, lr=0.1, device="cpu", batch_size=8)
    data = (images(16), images(20, seed=1))
    distill(network(1), network(2, width=10), *data, r, progress=lines.append, progress_every=1)
    rates = [line["lr"] for line in lines if "step" in line and "epoch" in line]
    # Two stages of two epochs with factors 1 and 1/2, and two steps in each epoch.
    expected = [0, 0.25, 0.5 * 0.5, 0.75 * 0.5, 1, 1, 0.5, 0.5]
    assert rates == pytest.approx([0.1 * factor for factor in expected])


# --- progress and logs ------------------------------------------------------------------------------------------------


def test_progress_gets_a_line_every_few_steps():
    lines, settings = [], recipe(epochs=2, schedule="constant")
    summary = train(student(), settings, progress=lines.append, progress_every=3)
    assert [line.get("step", "epoch") for line in lines] == [3, 6, "epoch", 9, 12, 15, "epoch"]
    steps = [line for line in lines if "step" in line]
    assert all(line.keys() == {"step", "epoch", "lr", "loss", "samples_per_second"} for line in steps)
    assert all(line["samples_per_second"] > 0 and line["lr"] == 0.05 for line in steps)
    every = []
    train(student(), settings, progress=every.append, progress_every=1)
    single = [line["loss"] for line in every if "step" in line]
    sizes = [61 * (i + 1) // 8 - 61 * i // 8 for i in range(8)] * 2
    for line, parts in zip(steps, ((0, 3), (3, 6), (8, 9), (9, 12), (12, 15)), strict=True):
        chosen = range(*parts)
        mean = sum(single[i] * sizes[i] for i in chosen) / sum(sizes[i] for i in chosen)
        assert line["loss"] == pytest.approx(mean)
    totals = [sum(single[e * 8 + i] * sizes[i] for i in range(8)) / 61 for e in range(2)]
    assert totals == pytest.approx([line["loss"] for line in summary.history])


def test_lines_within_an_epoch_do_not_change_the_run(tmp_path):
    for name, more in (("plain", {}), ("reported", {"progress": lambda line: None, "progress_every": 1})):
        train(student(), recipe(), output=tmp_path / name, **more)
    assert_same(final(tmp_path / "plain"), final(tmp_path / "reported"))


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"progress_every": 0, "progress": print}, ValueError, "progress_every must be an integer >= 1, got 0"),
        ({"progress_every": 2.0, "progress": print}, TypeError, "progress_every must be an integer >= 1, got float"),
        ({"progress_every": 5}, ValueError, "progress_every=5 has no effect without progress"),
    ],
)
def test_invalid_progress_every_is_refused(more, error, message, tmp_path):
    with pytest.raises(error, match=message):
        train(student(), recipe(), output=tmp_path / "run", **more)
    assert not (tmp_path / "run" / "config.json").exists()


def test_steps_never_wait_for_the_device():
    """Sixteen steps per epoch wait as often as four. AdamW reads its step counters, which are on the CPU."""
    counts = []
    for batch_size in (16, 4):
        r = recipe(epochs=2, batch_size=batch_size, schedule="cosine", clip_norm=1.0, ema=0.9)
        with Waits() as waits:
            train(student(), r, Points(64), val=VAL)
        counts.append(waits.count)
    assert counts[0] == counts[1]


def scalars(folder):
    """Return the (step, value) pairs of every scalar in a folder, as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.slow
def test_tensorboard_shows_every_epoch_once_when_a_run_is_interrupted(tmp_path):
    pytest.importorskip("tensorboard")
    from kcd_ext.training.logs import TensorBoard

    def attempt(count, logged=True):
        log, lines = TensorBoard(tmp_path), []

        def progress(line):
            if logged:
                log(line)
            lines.append(line)
            if len([each for each in lines if "step" not in each]) == count:
                raise StopError

        settings = recipe(epochs=6, method=f"{__name__}:Pretrained")
        return train(student(), settings, output=tmp_path, resume=True, progress=progress, progress_every=4)

    # Stopped in pretraining, in training, and while it did not log.
    for count, logged in ((1, True), (2, True), (2, False)):
        with pytest.raises(StopError):
            attempt(count, logged)
    summary = attempt(99)
    shown = scalars(tmp_path / "tensorboard" / "epoch")
    for name in ("accuracy", "loss", "lr", "samples"):
        assert shown[name] == [(line["epoch"], pytest.approx(line[name])) for line in summary.history], name
    assert [step for step, _ in scalars(tmp_path / "tensorboard" / "pretraining")["loss"]] == [1, 2]
    assert [step for step, _ in scalars(tmp_path / "tensorboard" / "pretraining-step")["loss"]] == [4, 8, 12, 16]
    steps = [step for step, _ in scalars(tmp_path / "tensorboard" / "step")["loss"]]
    assert steps == sorted(set(steps)) and steps[-1] == 6 * STEPS


# --- the command ------------------------------------------------------------------------------------------------------


def load_images():
    return ImageData("points", images(60), images(40, seed=1), 4, val=val_images())


LOGGED = []


class Log:
    """A log of one's own."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, line):
        LOGGED.append((self.folder.name, line))


@pytest.mark.slow
def test_command_trains_with_validation_and_reports_the_best_epoch(here, capsys):
    from kcd_ext import cli

    LOGGED.clear()
    command = ["distill", "--data", f"{__name__}:load_images", "--teacher", f"{__name__}:teacher_of_images"]
    command += ["--student", f"{__name__}:student_of_images", "--epochs", "6", "--batch-size", "8", "--threads", "1"]
    command += ["--optimizer", "adamw", "--schedule", "cosine", "--warmup-epochs", "1", "--ema", "0.9", "--keep-best"]
    command += ["--patience", "2", "--clip-norm", "1", "--log", f"{__name__}:Log", "--progress-every", "5"]
    command += ["--device", "cpu", "--output", "run"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "Accuracy best: test accuracy after the epoch with the highest validation accuracy." in out
    assert "Saved student of teacher, kd: that of the best epoch." in out
    assert "validation accuracy" in (here / "run" / "report.html").read_text()
    config = json.loads((here / "run" / "config.json").read_text())
    stored = {name: config["recipe"][name] for name in ("optimizer", "lr", "weight_decay", "ema", "patience")}
    assert stored == {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "ema": 0.9, "patience": 2}
    assert config["val"] == 24
    epochs = [line["epoch"] for name, line in LOGGED if name == "run" and "step" not in line]
    summary = json.loads((here / "run" / "summary.json").read_text())["results"][0]
    assert epochs == [*range(1, len(epochs) + 1)] and len(epochs) == min(6, summary["best_epoch"] + 2)
    assert any("step" in line for _, line in LOGGED)
    assert cli.main([*command, "--resume"]) == 0
    assert "Unfinished" not in capsys.readouterr().out


def student_of_images(in_channels, num_classes):
    return network(1)


def teacher_of_images(in_channels, num_classes):
    return network(2, width=10)


def test_learning_rate_of_the_command_depends_on_the_optimizer():
    from test_commands import parsed

    def rates(*words):
        r = parsed("distill", *words).study().runs[-1].recipe
        return r.lr, r.weight_decay

    assert rates("--data", "digits") == (0.05, 5e-4)
    assert rates("--data", "digits", "--optimizer", "adamw") == (1e-3, 0.05)
    assert rates("--data", "digits", "--optimizer", "torch.optim:RAdam") == (1e-3, None)
    assert rates("--data", "digits", "--optimizer", "adamw", "--lr", "0.01", "--weight-decay", "0") == (0.01, 0)
    assert rates("cifar100-vgg13-mobilenet_v2", "--data", "digits") == (0.01, 5e-4)
    assert rates("cifar100-vgg13-mobilenet_v2", "--data", "digits", "--optimizer", "adamw") == (1e-3, 0.05)
    (teacher, distilled) = parsed("distill", "--data", "digits", "--optimizer", "adamw", "--ema", "0.9").study().runs
    assert (teacher.recipe.lr, teacher.recipe.ema, distilled.recipe.lr) == (1e-3, 0.9, 1e-3)


def test_milestones_of_the_default_schedule_do_not_change():
    for epoch in range(7):
        for fraction in (0.0, 0.5, 0.999):
            expected = 0.05 * 0.1 ** milestones_passed((0.625, 0.75, 0.875), epoch, 7)
            assert Recipe(epochs=7).lr_at(epoch, fraction) == expected
