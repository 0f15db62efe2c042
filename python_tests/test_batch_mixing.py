"""Mixup and CutMix: what is drawn, what is mixed, and runs with both."""

import math
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from processes import Crew
from scipy import stats
from small_runs import (
    CLASSES,
    NoWait,
    Samples,
    StopError,
    assert_same,
    final,
    images,
    mostly_slow,
    network,
    shaken,
    stop_after,
)
from torch import nn
from torch.nn import functional

from kcd_ext import IndexedDataset, files, methods
from kcd_ext.methods import Batch, Method, Outcome, entropy
from kcd_ext.training import Condense, Recipe, checkpoint, distill
from kcd_ext.training.batch_mixing import UNIFORMS, BatchMixer, beta_quantity, cutmix, draw_uniforms, mixup

pytestmark = pytest.mark.usefixtures("one_thread")


# --- draws ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 1.0, 2.5, 40.0])
def test_beta_quantities_have_the_beta_distribution(alpha):
    drawn = [beta_quantity(alpha, *row[:2]) for row in draw_uniforms(20_000, seed=5, epoch=2)]
    expected = stats.beta(alpha, alpha)
    inner = expected.ppf(np.linspace(0, 1, 21)).clip(1e-12, 1 - 1e-12)  # a float next to 1 cannot be closer than 1e-16
    edges = np.unique([0, *inner, 1])
    counts, chances = np.histogram(drawn, edges)[0], np.diff(expected.cdf(edges))
    assert len(counts) >= 10 and stats.chisquare(counts[chances > 1e-9], 20_000 * chances[chances > 1e-9]).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [5e-324, 1e-300, 1e-6, 1e6, 3e38])
def test_extreme_alpha_gives_shares_from_0_to_1(alpha):
    tiny = 2.0**-53
    for radius in (tiny, 0.3, 0.5, 1 - tiny):
        for angle in (tiny, 0.25, 0.3, 0.5, 1 - tiny):
            share = beta_quantity(alpha, radius, angle)
            assert 0 <= share <= 1
            if alpha >= 1e6:
                assert share == pytest.approx(0.5, abs=0.02)
            elif radius == 0.3 and angle in (0.3, 0.5):
                assert min(share, 1 - share) < 1e-4


def test_uniforms_depend_on_seed_epoch_and_batch_only():
    assert draw_uniforms(3, seed=2**64 - 1, epoch=7) == draw_uniforms(9, seed=2**64 - 1, epoch=7)[:3]
    philox = np.random.Philox(counter=np.array([0, 0, 0, 5], np.uint64), key=np.array([4, 7], np.uint64))
    raw = [int(number) / 2**64 for number in philox.random_raw(50 * UNIFORMS)]
    drawn = np.array(draw_uniforms(50, seed=4, epoch=7))
    assert drawn.shape == (50, UNIFORMS) and drawn.flatten().tolist() == pytest.approx(raw, abs=1e-15)
    assert drawn.min() > 0 and drawn.max() < 1


# --- mixes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 3, 5, 4), (2, 6), (1, 3, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_mixup_blends_samples_with_their_predecessors(shape, dtype):
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    for row in draw_uniforms(20, seed=1, epoch=0):
        mixed, share = mixup(x, 0.4, row[1:])
        assert 0.5 <= share <= 1 and mixed.dtype == dtype
        given = x.double().numpy()
        expected = share * given + (1 - share) * given[[*range(-1, len(x) - 1)]]
        np.testing.assert_allclose(
            mixed.double().numpy(), expected, rtol=0, atol=0.03 if dtype == torch.bfloat16 else 1e-6
        )
    assert torch.equal(x, before)


def test_shares_of_mixup_are_those_of_beta_or_of_its_mirror_image():
    shares = [mixup(torch.zeros(2, 1), 0.7, row[1:])[1] for row in draw_uniforms(5000, seed=3, epoch=1)]
    folded = stats.kstest(shares, lambda s: 2 * stats.beta(0.7, 0.7).cdf(s) - 1)
    assert folded.pvalue > 1e-3


@pytest.mark.parametrize("shape", [(6, 2, 9, 14), (3, 1, 32, 32), (4, 3, 1, 1), (2, 1, 1, 50)])
def test_cutmix_pastes_a_box_and_its_share_is_the_true_area(shape):
    count, _, height, width = shape
    x = torch.arange(count).float()[:, None, None, None].expand(shape)
    for row in draw_uniforms(300, seed=2, epoch=9):
        mixed, share = cutmix(x, 1.0, row[1:])
        is_pasted = (mixed != x).all(1)
        assert torch.equal(is_pasted, (mixed != x).any(1)) and (is_pasted == is_pasted[0]).all()
        assert torch.equal(mixed[:, 0][is_pasted], x.roll(1, 0)[:, 0][is_pasted])
        rows, columns = is_pasted[0].any(1), is_pasted[0].any(0)
        assert torch.equal(is_pasted[0], rows[:, None] & columns)  # one box
        assert share == 1 - is_pasted[0].sum().item() / (height * width)
        side = math.sqrt(1 - beta_quantity(1.0, *row[1:3]))
        for covered, length, centre in ((rows, height, row[3]), (columns, width, row[4])):
            places = covered.nonzero().flatten()
            if len(places) and places[0] > 0 and places[-1] < length - 1:  # not cut off
                assert len(places) == pytest.approx(side * length, abs=0.5)
                assert (places[0] + places[-1] + 1).item() / 2 == pytest.approx(centre * length, abs=1.5)


def test_share_of_cutmix_has_the_mean_of_clipped_boxes():
    """For alpha = 1 the box's side r has r^2 uniform. A box with a uniform centre loses a quarter of its side on average."""
    shares = [cutmix(torch.zeros(2, 1, 200, 200), 1.0, row[1:])[1] for row in draw_uniforms(4000, seed=0, epoch=0)]
    # A side r around a uniform centre covers r - r^2 / 4 on average, for r = sqrt(u): E[(r - r^2/4)^2] = 1/2 - 1/5 + 1/48.
    expected = 1 - (1 / 2 - 1 / 5 + 1 / 48)
    assert np.mean(shares) == pytest.approx(expected, abs=4 * np.std(shares) / math.sqrt(4000))


def batch_of(label, x=None):
    label = torch.tensor(label)
    x = torch.randn(len(label), 1, 6, 6, generator=torch.Generator().manual_seed(1)) if x is None else x
    return Batch(x, label, torch.arange(len(label)) + 10, torch.arange(len(label)) + 1.0)


@pytest.mark.parametrize("strengths", [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
def test_labels_are_the_shares_of_both_classes(strengths):
    batch, shifts = batch_of([2, 2, 0, 3, 1]), set()
    for row in draw_uniforms(30, seed=6, epoch=0):
        mixed = BatchMixer(strengths, CLASSES).mix(batch, row)
        name = [*strengths][int(row[0] * len(strengths))]
        x, share = {"mixup": mixup, "cutmix": cutmix}[name](batch.x, strengths[name], row[1:])
        hard = functional.one_hot(batch.label, CLASSES).double()
        expected = share * hard + (1 - share) * hard.roll(1, 0)
        assert mixed.label.dtype == torch.float32 and torch.equal(mixed.x, x)
        torch.testing.assert_close(mixed.label.double(), expected, rtol=0, atol=1e-7)
        shift = int(share < 0.5)  # the image is named after the one that it shows most of
        assert torch.equal(mixed.index, batch.index.roll(shift)) and torch.equal(mixed.weight, batch.weight.roll(shift))
        assert share == 0.5 or torch.equal(mixed.label.argmax(1), batch.label.roll(shift))
        shifts.add(shift)
    assert shifts == ({0, 1} if "cutmix" in strengths else {0})  # both happen


def test_half_of_the_batches_draw_each_mix():
    batch = batch_of([0, 1], torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 1, 40, 40))
    mixer = BatchMixer({"mixup": 1.0, "cutmix": 1.0}, CLASSES)
    blended = sum(mixer.mix(batch, row).x.frac().any().item() for row in draw_uniforms(400, seed=1, epoch=1))
    assert stats.binomtest(blended, 400).pvalue > 1e-3


def test_mixing_does_not_wait_for_the_device():
    with NoWait():
        for row in draw_uniforms(8, seed=0, epoch=0):
            BatchMixer({"mixup": 0.2, "cutmix": 1.0}, CLASSES).mix(batch_of([0, 1, 3]), row)


# --- methods ----------------------------------------------------------------------------------------------------------------

SOFT = [name for name in methods.REGISTRY if name != "pwkd" and methods.build(name).takes_soft_labels]


def test_methods_without_soft_labels_are_those_that_compare_classes():
    assert {*methods.REGISTRY} - {*SOFT} == {"crd", "dkd", "pwkd", "sskd"}


@pytest.mark.parametrize("name", SOFT)
def test_loss_of_soft_labels_is_the_mean_of_the_losses_of_both_labels(name):
    """Cross entropy is linear in the label, so the loss of shares s and 1 - s is that mixture of two losses."""
    samples = Samples(torch.randn(9, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(9) % CLASSES)
    student, teacher, method = network(1, dropout=0.0).eval(), network(2).eval(), methods.build(name)
    method.prepare(student, teacher, samples)
    for weight in (None, torch.linspace(0, 2, 9)) if method.weighs_samples else (None,):
        batch = samples.at(range(9), weight=weight)
        for share in (1.0, 0.7, 0.5):
            hard = functional.one_hot(batch.label, CLASSES).float()
            outcome = method(student, teacher, batch._replace(label=share * hard + (1 - share) * hard.roll(1, 0)))
            one = method(student, teacher, batch)
            other = method(student, teacher, batch._replace(label=batch.label.roll(1)))
            torch.testing.assert_close(outcome.loss, share * one.loss + (1 - share) * other.loss)
            torch.testing.assert_close(outcome.value, one.value)
            if weight is not None:
                torch.testing.assert_close(outcome.losses, share * one.losses + (1 - share) * other.losses)


# --- runs -------------------------------------------------------------------------------------------------------------------


SEEN = []


class Recorded(Method):
    """Cross entropy with soft labels, written out, that adds its batches and logits to SEEN."""

    needs_teacher = False
    weighs_samples = True
    takes_soft_labels = True

    def forward(self, student, teacher, batch):
        logits = student(batch.x)
        losses = -(batch.label * logits.log_softmax(-1)).sum(-1)
        SEEN.append((batch, logits.detach()))
        weight = 1 if batch.weight is None else batch.weight
        return Outcome((weight * losses).mean(), logits.detach(), entropy(logits), {}, losses.detach())


def recipe(**changes):
    return Recipe(**{"method": "ce", "epochs": 4, "batch_size": 8, "lr": 0.02, "device": "cpu", "seed": 5} | changes)


def recorded(train, **changes):
    """Return the summary, the student and, without condensation, every (batch, logits) of a run."""
    SEEN.clear()
    student = network(1)
    r = recipe(method=f"{__name__}:Recorded", **changes)
    summary = distill(student, None, train, images(30, seed=1), r)
    return summary, student, SEEN[-r.epochs * math.ceil(len(train) / r.batch_size) :]


def test_run_trains_on_mixed_images_of_the_first_samples_index():
    train = images(61)
    summary, _, seen = recorded(train, mixup=0.5)
    steps = math.ceil(61 / 8)
    for epoch in range(4):
        draws = draw_uniforms(steps, seed=5, epoch=epoch)
        right = 0
        for (batch, logits), row in zip(seen[epoch * steps : (epoch + 1) * steps], draws, strict=True):
            pixels = torch.from_numpy(train.images[batch.index.numpy()])
            views = train.views(pixels, batch.index, seed=5, epoch=epoch)
            expected, share = mixup(views, 0.5, row[1:])
            assert torch.equal(batch.x, expected)
            hard = torch.from_numpy(train.labels)[batch.index]
            assert torch.equal(batch.label.argmax(-1), hard) or share == 0.5
            right += (logits.argmax(-1) == hard).sum().item()
        assert summary.history[epoch]["train_accuracy"] == pytest.approx(100 * right / 61)


def test_method_ce_trains_as_cross_entropy_with_shares_written_out():
    changes = {"mixup": 0.3, "cutmix": 1.0, "condense": Condense(keep=0.5, stages=3)}
    by_hand, student, _ = recorded(images(61), **changes)
    twin = network(1)
    summary = distill(twin, None, images(61), images(30, seed=1), recipe(**changes))
    for one, other in zip(twin.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert torch.equal(summary.condenser.kept, by_hand.condenser.kept)


@pytest.mark.parametrize("loaded", [False, True])
def test_classes_are_collected_from_the_labels_before_mixing(loaded):
    train = images(61)
    r = recipe(mixup=0.5, cutmix=1.0, condense=Condense(keep=0.4, every=1, stages=2))
    used = IndexedDataset(train, shaken) if loaded else train
    test = IndexedDataset(images(30, seed=1), shaken)
    summary = distill(network(1), None, used, test, r)
    assert summary.condenser.labels.tolist() == train.labels.tolist()
    kept = np.bincount(train.labels[summary.condenser.kept.numpy()], minlength=CLASSES)
    assert summary.history[-1]["condensation"] is None or kept.tolist() == summary.condenser.kept_per_class.tolist()


def test_samples_weights_and_losses_work_with_mixing():
    r = recipe(mixup=0.5, epochs=6, condense=Condense(keep=0.6, selection="infobatch"))
    summary = distill(network(1), None, images(61), images(30, seed=1), r)
    assert min(line["samples"] for line in summary.history) < 61
    assert all(math.isfinite(line["loss"]) for line in summary.history)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mixup": -0.1}, ValueError, "mixup must be a finite number >= 0, got -0.1"),
        ({"cutmix": math.inf}, ValueError, "cutmix must be a finite number >= 0, got inf"),
        ({"mixup": "0.2"}, TypeError, "mixup must be a finite number >= 0, got str '0.2'"),
        ({"mixup": 0.2, "batch_size": 1}, ValueError, "batch_size must be > 1 with mixup=0.2, got 1"),
        ({"cutmix": 1, "batch_size": 1}, ValueError, "batch_size must be > 1 with cutmix=1, got 1"),
    ],
)
def test_recipe_refuses_options_of_mixing_that_cannot_work(changes, error, message):
    with pytest.raises(error, match=message):
        recipe(**changes)


class Vectors(torch.utils.data.Dataset):
    """Samples x of (6,) in a dtype."""

    def __init__(self, dtype):
        self.dtype = dtype

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.full((6,), index % CLASSES).to(self.dtype), index % CLASSES


class Floating(nn.Linear):
    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


@pytest.mark.parametrize("method", [name for name in methods.REGISTRY if name not in SOFT])
def test_method_without_soft_labels_is_refused(method, tmp_path):
    for option in ("mixup", "cutmix"):
        options = {"base": "crd"} if method == "pwkd" else {}
        with pytest.raises(ValueError, match=rf"^{option}=0.4 gives .*which method '{method}' does not take") as caught:
            changed = recipe(method=method, options=options, **{option: 0.4})
            distill(network(1), network(2), images(20), images(20), changed, output=tmp_path / "run")
        assert "\n" not in str(caught.value)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("options", "dtype", "error", "message"),
    [
        ({"mixup": 0.2}, torch.int64, TypeError, "mixup mixes x of a floating-point dtype, got torch.int64: convert"),
        ({"cutmix": 0.2}, torch.uint8, TypeError, "cutmix mixes x of a floating-point dtype, got torch.uint8: convert"),
        ({"cutmix": 0.2}, torch.float32, ValueError, r"cutmix mixes x of shape \(b, c, h, w\), got \(6, 6\)"),
        ({"mixup": 1, "cutmix": 0.2}, torch.float32, ValueError, r"cutmix mixes x of shape \(b, c, h, w\)"),
    ],
)
def test_data_that_cannot_be_mixed_are_refused_before_anything_is_written(options, dtype, error, message, tmp_path):
    data = Vectors(dtype)
    with pytest.raises(error, match=message) as caught:
        distill(Floating(6, CLASSES), None, data, data, recipe(**options), output=tmp_path / "run")
    assert "\n" not in str(caught.value) and [*tmp_path.iterdir()] == []


def test_mixup_takes_samples_that_are_not_images():
    data = Vectors(torch.float64)
    summary = distill(Floating(6, CLASSES).double(), None, data, data, recipe(mixup=0.2))
    assert math.isfinite(summary.history[-1]["loss"])


class Broken(Vectors):
    def __getitem__(self, index):
        return torch.full((6,), math.nan if index == 1 else 1.0), 0


def test_sample_that_is_not_finite_is_named_as_before_it_was_mixed():
    with pytest.raises(ValueError, match=r"train\[1\] holds NaN"):
        distill(Floating(6, CLASSES), None, Broken(None), Vectors(torch.float32), recipe(mixup=0.2))


def test_recipe_of_an_older_run_has_no_mixing():
    plain = recipe(mixup=0.2).as_json()
    assert Recipe.from_json(plain) == recipe(mixup=0.2)
    del plain["mixup"], plain["cutmix"]
    assert Recipe.from_json(plain) == recipe()


# --- bytes ------------------------------------------------------------------------------------------------------------------

K = Condense(keep=0.5, every=1, stages=3)
VARIANTS = {
    "mixup": {"mixup": 0.4},
    "both, condensed": {"mixup": 0.4, "cutmix": 1.0, "condense": K},
    "loaded": {"mixup": 0.4, "cutmix": 1.0, "condense": K, "loaded": True},
    "accumulated": {"cutmix": 0.4, "gradient_accumulation": 3, "condense": K},
    "bfloat16": {"cutmix": 0.4, "precision": "bfloat16"},
    "infobatch": {"mixup": 0.4, "condense": Condense(keep=0.5, selection="infobatch")},
    "randaugment": {"policy": "randaugment", "condense": K},
    "trivialaugment": {"policy": "trivialaugment", "mixup": 0.4, "cutmix": 1.0, "condense": K},
    "pretraining": {"method": "sskd", "policy": "trivialaugment", "options": {"head_epochs": 2, "head_lr": 0.02}},
}


def train(output, epochs=12, progress=None, loaded=False, policy=None, **changes):
    torch.set_num_threads(1)
    torch.manual_seed(random.SystemRandom().randrange(2**32))  # the caller's generator must not matter
    data, test = images(69), images(30, seed=1)
    data.views = replace(data.views, policy=policy)
    if loaded:
        data, test = (IndexedDataset(part, shaken) for part in (data, test))
    teacher = network(2, width=10) if changes.get("method", "ce") != "ce" else None
    distill(
        network(1), teacher, data, test, recipe(epochs=epochs, **changes), output=output, resume=True, progress=progress
    )


@pytest.mark.parametrize("name", mostly_slow(VARIANTS, ("both, condensed", "trivialaugment")))
def test_stopped_and_resumed_run_equals_an_uninterrupted_run(tmp_path, name):
    train(tmp_path / "reference", epochs=4, **VARIANTS[name])
    for stop in (1, 2):
        with pytest.raises(StopError):
            train(tmp_path / "stopped", epochs=4, progress=stop_after(stop), **VARIANTS[name])
    train(tmp_path / "stopped", epochs=4, **VARIANTS[name])
    assert_same(final(tmp_path / "stopped"), final(tmp_path / "reference"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_run_equals_an_uninterrupted_run(tmp_path, processes):
    options = {**VARIANTS["trivialaugment"], "epochs": 30}
    reference, interrupted = tmp_path / "reference", tmp_path / "interrupted"
    assert Crew(lambda rank: train(reference, **options), processes).wait() == [0] * processes

    def done():
        path = interrupted / "metrics.jsonl"
        return len(files.read_lines(path)) if path.exists() else 0

    for kill in range(3):
        crew, before = Crew(lambda rank: train(interrupted, **options), processes), done()
        deadline = time.monotonic() + 60
        while done() < before + 1 + kill:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        crew.kill()
        assert not (interrupted / "summary.json").exists()
    assert Crew(lambda rank: train(interrupted, **options), processes).wait() == [0] * processes
    assert_same(final(interrupted), final(reference))
    assert len(checkpoint.load(reference / "checkpoint").training["condenser"]["mixed"]) > 20


@pytest.mark.slow
def test_ranks_draw_the_same_share_and_each_mixes_its_own_batch(tmp_path):
    def record(rank):
        torch.set_num_threads(1)
        recorded(images(61), mixup=0.5)
        torch.save([tuple(batch[:3]) for batch, _ in SEEN], tmp_path / f"{rank}.pt")

    data, steps = images(61), 4  # 31 samples per rank, one of them a repeat
    assert Crew(record, processes=2).wait() == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt")[-4 * steps :] for rank in range(2)]
    for epoch in range(4):
        seen = []
        for step, row in enumerate(draw_uniforms(steps, seed=5, epoch=epoch)):
            for x, label, index in (rank[epoch * steps + step] for rank in ranks):
                seen += index.tolist()
                if -1 in index:
                    continue
                views = data.views(torch.from_numpy(data.images[index.numpy()]), index, seed=5, epoch=epoch)
                expected, share = mixup(views, 0.5, row[1:])
                assert torch.equal(x, expected) and label.amax(1).min() == pytest.approx(share)
        assert sorted(seen) == [-1, *range(61)]


@pytest.mark.parametrize("option", ["mixup", "cutmix"])
def test_resumed_run_must_not_change_its_mixing(tmp_path, option):
    train(tmp_path, epochs=2, **{option: 0.5})
    with pytest.raises(ValueError, match=rf"was run with {option}=0.5, got {option}=0.0"):
        train(tmp_path, epochs=2)


@pytest.mark.slow
def test_networks_compile_with_mixing(tmp_path):
    train(tmp_path, epochs=2, compile=True, mixup=0.4, cutmix=1.0)
    assert (tmp_path / "summary.json").exists()
