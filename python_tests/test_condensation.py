"""Tests of the condenser against an independent oracle: the authors' rules in plain Python, with images overwritten."""

import json
import math
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch.utils.data import DataLoader, Dataset, TensorDataset

from kcd_ext.condensation import CondensedSampler, KnowledgeCondenser, RandomCondenser, mix_images
from kcd_ext.condensation.mixing import mix_in_place
from kcd_ext.data import IndexedDataset

SIDE = 5


pytestmark = pytest.mark.usefixtures("one_thread")


class Authors:
    """A second implementation of Eq. 12–15 and the authors' code: loops, and arrays that are overwritten."""

    def __init__(self, images, keep, stages, schedule, accumulate, convex):
        self.raw, self.images = images, images.copy()
        self.keep, self.stages, self.schedule, self.accumulate, self.convex = keep, stages, schedule, accumulate, convex
        self.n = len(images)
        self.value, self.visits = [0.0] * self.n, [0] * self.n
        self.remain, self.stage = list(range(self.n)), 0

    def visit(self, index, value):
        self.visits[index] += 1
        f = self.visits[index]
        self.value[index] = ((f - 1) / f) * self.value[index] + value / f

    def e_step(self):
        self.stage += 1
        score = [v * f**0.03 for v, f in zip(self.value, self.visits, strict=True)]
        order = sorted(range(self.n), key=lambda i: (-score[i], i))
        floor = int(self.keep * self.n)
        size = {
            "reference": lambda: max(floor, len(self.remain) - int(self.n * (1 - self.keep) / self.stages)),
            "cosine": lambda: (
                floor
                + int((self.n - floor) * 0.5 * (1 + math.cos(math.pi * min(self.stage, self.stages) / self.stages)))
            ),
            "immediate": lambda: floor,
        }[self.schedule]()
        before, self.remain, lost = self.remain, order[:size], order[size : len(self.remain)]
        self.returned = set(self.remain) - set(before)
        pairs = min(len(lost), size)
        tail = self.remain[size - pairs :]
        if not self.accumulate:
            self.images = self.raw.copy()
        e = []
        for i in range(pairs):
            a, b = self.images[tail[i]], self.images[lost[i]]
            e.append(0.3 * i / len(lost))
            if self.convex:  # the authors' single precision
                own = np.float32(0.3) * (np.float32(len(lost) - i) / np.float32(len(lost))) + np.float32(0.7)
                mixed = a.astype(np.float32) * own + b.astype(np.float32) * (np.float32(1) - own)
            else:
                mixed = np.minimum(a.astype(np.float32) + b.astype(np.float32) * np.float32(e[-1]), np.float32(255))
            assert mixed.dtype == np.float32
            self.images[tail[i]] = mixed.astype(np.uint8)
        return lost, tail, lost[:pairs], e


class Images(Dataset):
    """Raw uint8 images as arrays, tensors or PIL images; sample i has label 10·i."""

    def __init__(self, images, kind="array"):
        self.images, self.kind = images, kind

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        from PIL import Image

        to_kind = {"array": lambda x: x, "tensor": torch.from_numpy, "pil": Image.fromarray}[self.kind]
        return to_kind(self.images[index]), 10 * index


def random_images(n, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (n, SIDE, SIDE, 3), dtype=np.uint8)
    images[:, 0] = 255  # where all images agree, rounding is visible
    return images


def run_epoch(condenser, draw):
    """Visit every kept sample once, in batches; return {index: value}."""
    kept = condenser.kept
    value = torch.tensor([draw(int(i)) for i in kept], dtype=torch.float64)
    for part in torch.randperm(len(kept)).split(17):
        condenser.update(kept[part], value[part])
    return dict(zip(kept.tolist(), value.tolist(), strict=True))


def tied_values(seed):
    """Return a function that draws entropies with many exact ties, some of them 0."""
    random = np.random.default_rng(seed)
    return lambda index: float(random.choice([0.0, 0.25, 0.5, 1.0, 2.0, random.random(), random.random()]))


def assert_mix_equals(condenser, images, authors):
    """Check that `mix` returns the authors' array: every mix, and no other change."""
    assert np.array_equal(condenser.mix(torch.from_numpy(images)), authors.images)


# --- The authors' rules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize(
    "schedule, keep", [("reference", 0.5), ("cosine", 0.7), ("immediate", 0.6), ("immediate", 0.2)]
)
def test_stages_and_pixels_equal_the_authors_rules(schedule, keep, accumulate, convex):
    n, images = 120, random_images(120)
    condenser = KnowledgeCondenser(
        n, keep=keep, every=2, stages=6, schedule=schedule, accumulate=accumulate, convex=convex
    )
    authors = Authors(images, keep, 6, schedule, accumulate, convex)
    through_trees, through_images = IndexedDataset(Images(images)), images
    returned, draw = 0, tied_values(7)
    for epoch in range(1, 2 * 9 + 1):  # beyond the final size, when nothing is dropped
        for index, value in run_epoch(condenser, draw).items():
            authors.visit(index, value)
        condensation = condenser.step()
        assert (condensation is None) == (epoch % 2 == 1)
        if condensation is None:
            continue
        lost, tail, partner, e = authors.e_step()
        assert condensation.stage == condenser.stage == authors.stage and condensation.epoch == epoch
        assert condensation.kept.tolist() == condenser.kept.tolist() == authors.remain
        assert (condensation.dropped.tolist(), condensation.mixed.tolist()) == (lost, tail)
        assert condensation.partner.tolist() == partner
        assert condensation.mix.dtype == torch.float64 and condensation.mix.tolist() == e
        assert condenser.values.tolist() == authors.value and condenser.counts.tolist() == authors.visits

        untouched = through_images.copy()
        mixed = mix_images(through_images, condensation)
        assert np.array_equal(through_images, untouched)
        through_images = mixed if accumulate else through_images
        assert mixed.dtype == np.uint8 and np.array_equal(mixed, authors.images)
        for index in range(n):
            image, label, seen = through_trees[index, condenser.mix_trees.get(index, index)]
            assert np.array_equal(image, authors.images[index]) and (label, seen) == (10 * index, index)
        assert_mix_equals(condenser, images, authors)
        returned += len(authors.returned)
    assert len(authors.remain) == int(keep * n) and not lost
    assert returned > 0  # some dropped samples were kept again


def test_mixing_keeps_pixels_on_which_both_images_agree():
    """In float64, 0.3·k/L + (1 − 0.3·k/L) times 255 is often just below 255 and would be truncated to 254."""
    n = 400
    condenser = KnowledgeCondenser(n, keep=0.5, every=1, schedule="immediate")
    condenser.update(torch.arange(n), torch.arange(n) + 1.0)
    condensation = condenser.step()
    grey = np.repeat(np.arange(256, dtype=np.uint8)[None], n, axis=0)
    assert np.array_equal(mix_images(grey, condensation), grey)
    pairs = np.float32(len(condensation.mix))
    own = np.float32(0.3) * ((pairs - np.arange(pairs, dtype=np.float32)) / pairs) + np.float32(0.7)
    assert own.dtype == np.float32 and condensation.weight.tolist() == (1 - own).tolist()
    e = condensation.mix.numpy()[:, None]
    assert ((e * grey[: len(e)] + (1 - e) * grey[: len(e)]).astype(np.uint8) != grey[: len(e)]).any()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "n, sizes, left",
    [(2000, [2000, 1900, 1800, 1700, 1600, 1500], 1400), (1999, [1999, 1900, 1801, 1702, 1603, 1504], 1405)],
)
def test_reference_run_equals_the_authors_from_first_to_last_visit(n, sizes, left, world_size):
    """All six stages of the paper's run, with two epochs each instead of 40 and visits from the samplers."""
    images, every, draw = random_images(n, seed=5), 2, tied_values(11)
    condenser = KnowledgeCondenser(n, keep=0.7, every=every, stages=6)
    authors, dataset = Authors(images, 0.7, 6, "reference", True, True), IndexedDataset(Images(images))
    samplers = [CondensedSampler(condenser, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)]
    counted, nested = [], 0
    for epoch in range(6 * every):
        visited, shares = [], []
        for sampler in samplers:
            sampler.set_epoch(epoch)
            shares.append(list(sampler))
            for entry in shares[-1]:
                if epoch % every == 0:  # a repeat has the image of the entry that it repeats
                    image, label, index = dataset[entry]
                    assert index == entry[0] in (-1, label // 10)
                    assert np.array_equal(image, authors.images[label // 10])
                nested += isinstance(entry[1], tuple) and any(isinstance(part, tuple) for part in entry[1])
            index = torch.tensor([index for index, _ in shares[-1]])
            value = torch.tensor([draw(i) for i in index.tolist()], dtype=torch.float64)
            for part in torch.arange(len(index)).split(64):
                condenser.update(index[part], value[part])
            for i, v in zip(index.tolist(), value.tolist(), strict=True):
                if i != -1:
                    visited.append(i)
                    authors.visit(i, v)
        assert sorted(visited) == sorted(authors.remain)  # every kept sample once over all ranks
        padding = [sum(index == -1 for index, _ in share) for share in shares]
        assert padding == [0] * (world_size - 1) + [-len(visited) % world_size] == [s.padding for s in samplers]
        assert len({len(share) for share in shares}) == 1
        counted.append(len(visited))

        condensation = condenser.step()
        assert (condensation is None) == ((epoch + 1) % every > 0)
        if condensation is None:
            continue
        lost, tail, partner, e = authors.e_step()
        assert condensation.kept.tolist() == authors.remain and condensation.dropped.tolist() == lost
        assert (condensation.mixed.tolist(), condensation.partner.tolist()) == (tail, partner)
        assert condensation.mix.tolist() == e and len(e) == len(lost)
        assert condenser.values.tolist() == authors.value and condenser.counts.tolist() == authors.visits
        assert_mix_equals(condenser, images, authors)
    assert counted == [size for size in sizes for _ in range(every)]
    assert len(condenser.kept) == left and condenser.stage == 6 and nested > 0
    if n == 2000:
        assert sum(counted) == 0.875 * n * 6 * every


def test_reference_schedule_has_the_papers_sample_visits():
    condenser, visits = KnowledgeCondenser(50_000, keep=0.7, every=40, stages=6), []
    sampler, value = CondensedSampler(condenser), torch.rand(50_000)
    for epoch in range(240):
        sampler.set_epoch(epoch)
        index = torch.from_numpy(sampler.order()[0])
        visits.append(int((index >= 0).sum()))
        condenser.update(index, value[index])
        condenser.step()
    assert visits[::40] == [50_000, 47_500, 45_000, 42_500, 40_000, 37_500]
    assert sum(visits) == 0.875 * 240 * 50_000
    assert len(condenser.kept) == 35_000


@settings(deadline=None, max_examples=100)
@given(
    n=st.integers(1, 300),
    keep=st.floats(0.0001, 1),
    stages=st.integers(1, 9),
    schedule=st.sampled_from(["reference", "cosine", "immediate"]),
    kind=st.sampled_from([KnowledgeCondenser, RandomCondenser]),
    seed=st.integers(0, 2**64 - 1),
)
@example(n=1, keep=0.1, stages=1, schedule="immediate", kind=KnowledgeCondenser, seed=0)
@example(n=7, keep=1.0, stages=1, schedule="reference", kind=KnowledgeCondenser, seed=0)
def test_stage_sizes_and_partition_are_valid_for_any_options(n, keep, stages, schedule, kind, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # sizes at which the reference schedule never drops a sample
        condenser = kind(n, keep=keep, every=1, stages=stages, schedule=schedule, seed=seed)
    random, final = np.random.default_rng(seed), max(1, int(keep * n))
    for stage in range(1, stages + 3):
        before = len(condenser.kept)
        condenser.update(torch.arange(n), torch.from_numpy(random.random(n)))
        outcome = condenser.step()
        kept, dropped = outcome.kept.tolist(), outcome.dropped.tolist()
        assert final <= len(kept) <= before and len(kept) + len(dropped) == before
        assert len(set(kept + dropped)) == before and all(0 <= i < n for i in kept + dropped)
        pairs = min(len(dropped), len(kept)) if kind is KnowledgeCondenser else 0
        assert outcome.mixed.tolist() == kept[len(kept) - pairs :] and outcome.partner.tolist() == dropped[:pairs]
        assert len(outcome.mix) == len(outcome.weight) == pairs
        torch.testing.assert_close(outcome.weight, outcome.mix, atol=1e-7, rtol=0)
        if schedule == "immediate" or (schedule == "cosine" and stage >= stages):
            assert len(kept) == final


# --- The value table -----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_table_is_the_running_mean_for_any_batches(data):
    """Repeats in a batch or an epoch count as visits; skipped entries and non-finite values do not."""
    n = data.draw(st.integers(1, 6))
    entry = st.tuples(st.integers(-1, n - 1), st.floats(width=32))
    epochs = data.draw(st.lists(st.lists(st.lists(entry, max_size=8), max_size=3), max_size=4))
    condenser, seen, left_out = KnowledgeCondenser(n, every=100, schedule="immediate"), [[] for _ in range(n)], 0
    for batches in epochs:
        for batch in batches:
            condenser.update(
                torch.tensor([i for i, _ in batch], dtype=torch.int64), torch.tensor([v for _, v in batch])
            )
            for i, value in batch:
                if i >= 0 and math.isfinite(value):
                    seen[i].append(value)
                left_out += i >= 0 and not math.isfinite(value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            condenser.step()
    assert condenser.counts.tolist() == [len(values) for values in seen]
    assert condenser.non_finite == left_out
    for got, values in zip(condenser.values.tolist(), seen, strict=True):
        scale = max(map(abs, values), default=0.0)
        assert got == pytest.approx(math.fsum(values) / max(1, len(values)), abs=1e-14 * scale)


def test_update_shows_pending_visits_and_accepts_low_precision_and_gradients():
    condenser = KnowledgeCondenser(4, schedule="immediate")
    condenser.update(torch.tensor([1, 1]), torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    condenser.update(torch.tensor([3]), torch.tensor([0.5], requires_grad=True))
    assert condenser.values.tolist() == [0, 1.5, 0, 0.5] and condenser.counts.tolist() == [0, 2, 0, 1]
    assert not condenser.values.requires_grad
    condenser.values.fill_(9), condenser.kept.fill_(9)  # the caller gets copies
    assert condenser.values.max() == 1.5 and condenser.kept.tolist() == [0, 1, 2, 3]


def test_non_finite_values_warn_once_and_never_rank():
    condenser = KnowledgeCondenser(4, keep=0.5, every=1, schedule="immediate")
    condenser.update(torch.tensor([0, 0, 1, 2, 3]), torch.tensor([math.nan, math.inf, -math.inf, 1, 2]))
    with pytest.warns(RuntimeWarning, match="3 knowledge values of 2 samples were not finite"):
        assert condenser.step().kept.tolist() == [3, 2]
    condenser.update(torch.tensor([0, 2]), torch.tensor([math.nan, 1.7e308], dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        condenser.step()
    assert condenser.non_finite == 5  # including the last one, which would overflow a sum
    assert condenser.values.tolist() == [0, 0, 1, 2]


def test_samples_without_a_value_warn_only_at_the_first_stage():
    condenser = KnowledgeCondenser(9, every=1, schedule="immediate")
    condenser.update(
        torch.arange(7), torch.tensor([1.0] * 6 + [math.nan])
    )  # the seventh was visited but has no finite value
    with pytest.warns(RuntimeWarning) as caught:
        condenser.step()
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2
    assert messages[1].startswith("2 of 9 samples were never visited before the first condensation step")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        condenser.step()
        RandomCondenser(90, every=1).step()


def test_never_visited_samples_rank_last_and_ties_rank_by_index():
    condenser = KnowledgeCondenser(50, keep=0.9, every=1, schedule="immediate", alpha=0.0)
    condenser.update(torch.arange(40, 4, -1), torch.full((36,), 0.1))
    assert condenser.step().kept.tolist() == [*range(5, 41), 0, 1, 2, 3, 4, 41, 42, 43, 44]


@pytest.mark.parametrize("n", [1, 3, 17, 129, 1151])
def test_equal_histories_tie_at_any_position(n):
    """A power that rounds differently in the scalar tail than in the vector part would break ties by position."""
    condenser = KnowledgeCondenser(n, keep=1.0, every=7)
    for _ in range(7):
        condenser.update(torch.arange(n), torch.full((n,), 0.7))
        outcome = condenser.step()
    assert outcome.kept.tolist() == list(range(n))


def test_update_does_not_synchronise():
    """Tensors on the meta device have no values: any read of one raises."""
    condenser = KnowledgeCondenser(10, schedule="immediate", device="meta")
    for _ in range(3):
        condenser.update(torch.arange(5, device="meta"), torch.rand(5, device="meta"))
    assert condenser.values.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_update_on_a_gpu_does_not_synchronise_and_counts_repeats_exactly():
    condenser, cpu = KnowledgeCondenser(1000), KnowledgeCondenser(1000)
    index, value = torch.randint(-1, 1000, (4096,)), torch.rand(4096)
    gpu_index, gpu_value = index.cuda(), value.cuda()
    condenser.update(gpu_index, gpu_value)  # warm-up: the first call moves the table
    cpu.update(index, value)
    torch.cuda.set_sync_debug_mode("error")
    try:
        condenser.update(gpu_index, gpu_value)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    cpu.update(index, value)
    condenser.update(torch.tensor([1000, -7, 2**40]).cuda(), torch.rand(3).cuda())
    with pytest.warns(RuntimeWarning, match="3 indices"):
        condenser.step()
    cpu.step()
    assert torch.equal(condenser.counts.cpu(), cpu.counts)
    torch.testing.assert_close(condenser.values.cpu(), cpu.values, rtol=1e-15, atol=0)


def test_unchecked_out_of_range_indices_change_no_value(monkeypatch):
    """As on a GPU, where the range is not checked."""
    monkeypatch.setattr("kcd_ext.condensation.table._check_batch", lambda *_: None)
    condenser = KnowledgeCondenser(3, schedule="immediate")
    condenser.update(torch.tensor([3, -2, 2**40, -(2**63), 1, -1]), torch.tensor([9.0, 9, math.nan, 9, 1, 9]))
    with pytest.warns(RuntimeWarning, match=r"4 indices passed to update\(\) were outside \[0, 3\)"):
        condenser.step()
    assert condenser.values.tolist() == [0, 1, 0] and condenser.counts.tolist() == [0, 1, 0]
    assert condenser.non_finite == 0


def test_condenser_works_inside_and_outside_inference_mode():
    condenser = KnowledgeCondenser(3, every=1, schedule="immediate")
    for mode in (True, False, True, False):
        with torch.inference_mode(mode):
            condenser.update(torch.arange(3), torch.arange(3.0))
            condenser.step()
            condenser.load_state_dict(condenser.state_dict())
    assert condenser.values.tolist() == [0, 1, 2] and condenser.counts.tolist() == [4, 4, 4]

    moved = KnowledgeCondenser(3, schedule="immediate")  # in inference mode, to the device of its first values
    with torch.inference_mode():
        moved.update(torch.arange(3), torch.rand(3, device="meta"))
    moved.update(torch.arange(3), torch.rand(3, device="meta"))
    assert moved.values.device.type == "meta"


# --- State ---------------------------------------------------------------------------------------------------------


def assert_same_state(got, expected):
    assert got.keys() == expected.keys()
    for name, entry in expected.items():
        assert torch.equal(entry, got[name]) if isinstance(entry, torch.Tensor) else entry == got[name], name


def through_torch_save(state, path):
    torch.save(state, path)
    return torch.load(path, weights_only=True)


def through_safetensors_and_json(state, _):
    tensors = {name: entry for name, entry in state.items() if isinstance(entry, torch.Tensor)}
    rest = {name: entry for name, entry in state.items() if name not in tensors}
    return {**load_safetensors(save_safetensors(tensors)), **json.loads(json.dumps(rest))}


@pytest.mark.parametrize("store", [through_torch_save, through_safetensors_and_json])
@pytest.mark.parametrize("kind", [KnowledgeCondenser, RandomCondenser])
def test_run_resumed_in_mid_epoch_equals_the_uninterrupted_run(store, kind, tmp_path):
    def train(condenser, epochs, halted=False):
        for epoch in epochs:
            kept = condenser.kept
            value = torch.rand(len(kept), generator=torch.Generator().manual_seed(epoch), dtype=torch.float64)
            half = len(kept) // 2
            if not halted:
                condenser.update(kept[:half], value[:half])
                if epoch == 5 and len(epochs) == 6:
                    return
            halted = False
            condenser.update(kept[half:], value[half:])
            condenser.step()

    def new():
        return kind(60, keep=0.5, every=1, stages=8)

    uninterrupted, first, second = new(), new(), new()
    train(uninterrupted, range(12))
    train(first, range(6))  # stops in the middle of epoch 5
    second.load_state_dict(store(first.state_dict(), tmp_path / "state"))
    train(second, range(5, 12), halted=True)
    assert torch.equal(uninterrupted.kept, second.kept) and uninterrupted.mix_trees == second.mix_trees
    assert bool(uninterrupted.mix_trees) == (kind is KnowledgeCondenser)
    assert_same_state(second.state_dict(), uninterrupted.state_dict())


def broken_states(state):
    yield "num_samples=61.*num_samples=60", {**state, "num_samples": 61}
    yield "keep=0.6.*keep=0.5", {**state, "keep": 0.6}
    yield "RandomCondenser.*KnowledgeCondenser", {**state, "condenser": "RandomCondenser"}
    yield "version", {**state, "version": 99}
    yield "entry .values. is missing", {name: entry for name, entry in state.items() if name != "values"}
    yield "entry .more. is unknown", {**state, "more": 1}
    yield "epoch", {**state, "epoch": -1}
    yield "values", {**state, "values": state["values"].float()}
    yield "values", {**state, "values": state["values"] * math.nan}
    yield "counts", {**state, "counts": state["counts"] - 1000}
    yield "pending", {**state, "pending": state["pending"][1:]}
    yield "kept", {**state, "kept": state["kept"].tolist()}
    yield "kept", {**state, "kept": state["kept"] + 60}
    yield "kept", {**state, "kept": torch.zeros_like(state["kept"])}
    yield "kept", {**state, "kept": state["kept"][:0]}
    yield "partner", {**state, "partner": -1 - state["partner"]}
    yield "partner", {**state, "partner": state["partner"][1:]}
    yield "weight", {**state, "weight": state["weight"] * math.nan}


def test_bad_state_is_named_and_changes_nothing():
    condenser = KnowledgeCondenser(60, keep=0.5, every=1, stages=2)
    for _ in range(2):
        condenser.update(torch.arange(60), torch.rand(60))
        condenser.step()
    condenser.update(torch.arange(9), torch.rand(9))
    before, trees = condenser.state_dict(), dict(condenser.mix_trees)
    for message, state in broken_states(condenser.state_dict()):
        with pytest.raises((ValueError, TypeError), match=re.compile(message)):
            condenser.load_state_dict(state)
        assert_same_state(condenser.state_dict(), before)
        assert condenser.mix_trees == trees


def test_failing_ranking_loses_no_visit():
    class Failing(KnowledgeCondenser):
        def score(self):
            return torch.full((5,), math.nan, dtype=torch.float64)

    condenser = Failing(5, every=1, schedule="immediate")
    condenser.update(torch.arange(5), torch.ones(5))
    with pytest.raises(ValueError, match=r"score\(\) must not return NaN, got 5"):
        condenser.step()
    assert (condenser.epoch, condenser.stage, len(condenser.kept)) == (0, 0, 5)
    assert condenser.counts.tolist() == [1] * 5


def test_failing_collective_loses_no_visit(monkeypatch):
    def fails(tensor, group):
        tensor.fill_(math.nan)
        raise RuntimeError("connection closed by peer")

    condenser = KnowledgeCondenser(5, every=1, schedule="immediate")
    condenser.update(torch.arange(5), torch.ones(5))
    before = condenser.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(KnowledgeCondenser, "_reduction_group", lambda self: "a group")
        patch.setattr(torch.distributed, "all_reduce", fails)
        with pytest.raises(RuntimeError, match="closed by peer"):
            condenser.step()
    assert_same_state(condenser.state_dict(), before)
    condenser.step()
    assert condenser.counts.tolist() == [1] * 5


# --- The random control ---------------------------------------------------------------------------------------------------


def test_random_ranking_depends_only_on_seed_and_stage_at_the_same_sizes():
    def kept(condenser, value):
        sets = []
        for _ in range(6):
            condenser.update(torch.arange(200), value)
            sets.append(condenser.step().kept.tolist())
        assert not condenser.mix_trees
        return sets

    options = dict(keep=0.5, every=1, stages=6)
    one = kept(RandomCondenser(200, seed=3, **options), torch.rand(200))
    assert one == kept(RandomCondenser(200, seed=3, **options), torch.rand(200))
    assert one != kept(RandomCondenser(200, seed=4, **options), torch.rand(200))
    valued = KnowledgeCondenser(200, **options)
    assert [len(s) for s in one] == [len(valued.step().kept) for _ in range(6)]
    assert len({tuple(sorted(s[:100])) for s in one}) == 6  # redrawn at every stage
    # Half of 10 000 samples, spread over the data set as evenly as chance allows (5 standard deviations).
    large = RandomCondenser(10_000, keep=0.5, every=1, schedule="immediate").step().kept
    assert abs((large < 5000).sum() - 2500) < 5 * 25


# --- Classes and warm-up -------------------------------------------------------------------------------------------


def keep_class_minimum_by_hand(order, size, labels, minimum):
    """Take the best of every class, then fill up one sample at a time."""
    taken = set()
    for label in set(labels):
        taken |= set([i for i in order if labels[i] == label][:minimum])
    for i in order:
        if len(taken) < size:
            taken.add(i)
    return [i for i in order if i in taken]


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.sampled_from([0, 1, 1, 1, 4]), min_size=6, max_size=60),
    keep=st.floats(0.3, 1.0),
    schedule=st.sampled_from(["reference", "cosine", "immediate"]),
    kind=st.sampled_from([KnowledgeCondenser, RandomCondenser]),
    form=st.sampled_from([list, torch.tensor, np.array, lambda labels: torch.tensor(labels, dtype=torch.int32)]),
    seed=st.integers(0, 2**32),
)
def test_min_per_class_is_kept_at_the_sizes_of_the_schedule(labels, keep, schedule, kind, form, seed):
    n, counts = len(labels), [labels.count(label) for label in set(labels)]
    final = max(1, int(keep * n))
    minimum = [k for k in range(n + 1) if sum(min(k, count) for count in counts) <= final][-1]  # n if all are kept
    options = {"keep": keep, "every": 1, "stages": 3, "schedule": schedule, "seed": seed}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if minimum < n:
            with pytest.raises(ValueError, match=f"min_per_class must be at most {minimum}, .* got {minimum + 1}$"):
                kind(n, labels=form(labels), min_per_class=minimum + 1, **options)
        plain, guarded = kind(n, **options), kind(n, labels=form(labels), min_per_class=minimum, **options)
        random = np.random.default_rng(seed)
        for _ in range(5):
            value = torch.from_numpy(random.integers(0, 4, n) / 4)  # with ties
            sizes = []
            before = len(guarded.kept)
            for condenser in (plain, guarded):
                condenser.update(torch.arange(n), value)
                order = condenser.ranking().tolist()
                step = condenser.step()
                sizes.append([len(getattr(step, part)) for part in ("kept", "dropped", "mixed", "partner")])
            assert sizes[0] == sizes[1]
            kept = step.kept.tolist()
            assert kept == keep_class_minimum_by_hand(order, len(kept), labels, minimum)
            left = [i for i in order if i not in kept]
            assert step.dropped.tolist() == left[: before - len(kept)]
            assert step.mixed.tolist() == kept[len(kept) - len(step.mixed) :]
            assert step.partner.tolist() == step.dropped.tolist()[: len(step.partner)]
            for label, count in enumerate(guarded.kept_per_class.tolist()):
                assert count == sum(labels[i] == label for i in kept) >= min(minimum, labels.count(label))
        again = kind(n, labels=labels, min_per_class=minimum, **options)
    again.load_state_dict(guarded.state_dict())
    assert again.kept.tolist() == kept and again.labels.tolist() == labels


def test_labels_without_a_minimum_change_nothing():
    labels = torch.arange(103) % 7
    one, other = condensed(), condensed(labels=labels)
    assert torch.equal(one.kept, other.kept) and one.mix_trees == other.mix_trees
    late = condensed()
    assert late.kept_per_class is None and late.labels is None
    late.set_labels(labels.tolist())
    assert torch.equal(late.kept_per_class, torch.bincount(labels[late.kept]))
    with pytest.raises(ValueError, match="labels must equal the labels this condenser already has"):
        late.set_labels(labels.flip(0))
    fresh = condensed()
    fresh.load_state_dict(late.state_dict())  # a resumed run need not read the data set again
    assert torch.equal(fresh.labels, labels)
    with pytest.raises(ValueError, match="other labels"):
        condensed(labels=labels.flip(0)).load_state_dict(late.state_dict())


def test_vanished_class_warns_once():
    value = torch.linspace(0, 1, 30)
    hashed = KnowledgeCondenser(30, keep=0.3, every=1, schedule="immediate", labels=[2**62] * 10 + [2**63 - 1] * 20)
    hashed.update(torch.arange(30), value)
    with pytest.warns(
        RuntimeWarning, match=rf"1 of 2 classes have no sample in the kept set any more \(labels {2**62}\)"
    ):
        hashed.step()
    condenser = KnowledgeCondenser(30, keep=0.3, every=1, schedule="immediate", labels=[0] * 10 + [3] * 20)
    condenser.update(torch.arange(30), value)
    with pytest.warns(RuntimeWarning, match=r"1 of 2 classes have no sample in the kept set any more \(labels 0\)"):
        condenser.step()
    assert condenser.kept_per_class.tolist() == [0, 0, 0, 9]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        condenser.step()
        guarded = KnowledgeCondenser(
            30, keep=0.3, every=1, schedule="immediate", labels=condenser.labels, min_per_class=2
        )
        guarded.update(torch.arange(30), value)
        assert guarded.step().kept.tolist() == [*range(29, 22, -1), 9, 8]


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0, 1, 2, 5, 6])
def test_warmup_skips_the_first_condensation_steps_as_the_authors_do(warmup, every):
    """Their loop: `for epoch in range(1, epochs + 1): ... if epoch % purification == 0 and epoch >= warmup`."""
    for kind in (KnowledgeCondenser, RandomCondenser):
        condenser = kind(60, keep=0.5, every=every, stages=3, warmup=warmup)
        stage, remaining = 0, 60
        for epoch in range(1, 13):
            condenser.update(torch.arange(60), torch.rand(60))
            step = condenser.step()
            if epoch % every == 0 and epoch >= warmup:
                stage, remaining = stage + 1, max(30, remaining - int(60 * (1 - 0.5) / 3))
                assert (step.stage, step.epoch, len(step.kept)) == (stage, epoch, remaining)
            else:
                assert step is None
        assert condenser.stage == stage


# --- The sampler ---------------------------------------------------------------------------------------------------


def condensed(n=103, keep=0.6, seed=0, **options):
    condenser = KnowledgeCondenser(n, keep=keep, every=1, stages=2, **options)
    for epoch in range(2):
        generator = torch.Generator().manual_seed(seed + epoch)
        condenser.update(torch.arange(n), torch.rand(n, generator=generator))
        condenser.step()
    return condenser


def test_sampler_yields_the_kept_set_in_an_order_that_depends_on_seed_and_epoch():
    condenser = condensed()
    sampler = CondensedSampler(condenser, seed=1)
    orders = []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        entries = list(sampler)
        assert entries == list(sampler) and len(entries) == len(sampler) == len(condenser.kept)
        assert all(type(index) is int for index, _ in entries)
        assert all(tree == condenser.mix_trees.get(index, index) for index, tree in entries)
        orders.append([index for index, _ in entries])
        assert sorted(orders[-1]) == sorted(condenser.kept.tolist())
    assert len(set(map(tuple, orders))) == 5
    other = CondensedSampler(condenser, seed=2)
    assert [index for index, _ in other] != orders[0]
    # The same kept set ranked differently has the same order.
    state = condenser.state_dict()
    condenser.load_state_dict({**state, "kept": state["kept"].flip(0)})
    sampler.set_epoch(0)
    assert [index for index, _ in sampler] == orders[0]
    plain = CondensedSampler(condenser, shuffle=False)
    assert [index for index, _ in plain] == sorted(condenser.kept.tolist())


def test_sampler_order_is_pinned():
    """The keys never change, so a run can be resumed with another release of NumPy or torch."""
    sampler = CondensedSampler(KnowledgeCondenser(10, schedule="immediate"), seed=5)
    sampler.set_epoch(2)
    assert [index for index, _ in sampler] == [3, 5, 9, 2, 7, 1, 8, 0, 6, 4]


@pytest.mark.parametrize("world_size, n", [(2, 103), (4, 103), (3, 4), (4, 1)])
def test_shards_cover_the_kept_set_once_and_padding_is_marked(world_size, n):
    condenser = condensed(n) if n > 4 else KnowledgeCondenser(n, schedule="immediate")
    samplers = [CondensedSampler(condenser, seed=3, rank=r, world_size=world_size) for r in range(world_size)]
    shares = [list(sampler) for sampler in samplers]
    assert {len(share) for share in shares} == {-(-len(condenser.kept) // world_size)} == {len(s) for s in samplers}
    unpadded = [index for share in shares for index, _ in share if index >= 0]
    assert sorted(unpadded) == sorted(condenser.kept.tolist())
    marked = [sum(index < 0 for index, _ in share) for share in shares]
    assert marked == [sampler.padding for sampler in samplers] and max(marked) <= 1
    known = {condenser.mix_trees.get(i, i) for i in condenser.kept.tolist()}
    for share, sampler in zip(shares, samplers, strict=True):
        assert all(tree in known for _, tree in share)
        index, sample = sampler.order()
        assert index.dtype == sample.dtype == np.int64
        arrays = zip(index.tolist(), sample.tolist(), strict=True)
        assert [(i, condenser.mix_trees.get(s, s)) for i, s in arrays] == share
        condenser.update(torch.tensor([index for index, _ in share]), torch.ones(len(sampler)))
    visits = condenser.state_dict()["pending"][:n, 1]  # each kept sample once, padding never
    assert visits.sum() == len(condenser.kept) and visits[condenser.kept].eq(1).all()


@pytest.mark.parametrize("world_size", [1, 3])
def test_sampler_resumed_in_mid_epoch_yields_the_rest(world_size):
    condenser = condensed()
    for rank in range(world_size):
        sampler = CondensedSampler(condenser, rank=rank, world_size=world_size)
        sampler.set_epoch(4)
        full, padding = list(sampler), sampler.padding
        for consumed in (0, 1, 7, len(full) - 1, len(full)):
            sampler.set_epoch(4, consumed=consumed)
            assert list(sampler) == full[consumed:] and len(sampler) == len(full) - consumed
            assert sampler.padding == (padding if consumed < len(full) else 0)
            assert sampler.order()[0].tolist() == [index for index, _ in full[consumed:]]
        with pytest.raises(ValueError, match="consumed must be an integer in"):
            sampler.set_epoch(5, consumed=len(full) + 1)
        assert list(sampler) == []  # the state of the last valid call
        sampler.set_epoch(5)
        assert len(list(sampler)) == len(full)


def test_iterators_are_independent_and_fixed_when_created():
    condenser = condensed()
    sampler = CondensedSampler(condenser)
    expected = list(sampler)
    one, two = iter(sampler), iter(sampler)
    next(one)
    sampler.set_epoch(1)
    condenser.step()
    assert list(two) == expected and list(one) == expected[1:]


# --- The sampler in the loaders of other libraries -----------------------------------------------------------------


@pytest.fixture
def reset_accelerate():
    """Reset Accelerate's process-wide state, which processes forked by other tests would inherit."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class FabricLoader:
    """A copy of Lightning Fabric's loader: `set_epoch` on the sampler with the number of iterators so far, then iterate."""

    def __init__(self, loader):
        self.loader, self.passes = loader, 0

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for sampler in {id(s): s for s in (self.loader.sampler, self.loader.batch_sampler.sampler)}.values():
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(self.passes)
        self.passes += 1
        yield from self.loader


def by_accelerate(**options):
    def prepare(loader):
        configuration = DataLoaderConfiguration(**options)
        return Accelerator(cpu=True, dataloader_config=configuration).prepare(loader)

    return prepare


def as_process(rank, **options):
    return lambda loader: prepare_data_loader(loader, num_processes=2, process_index=rank, **options)


LOADERS = {
    "torch": (lambda loader: loader, {}),
    "accelerate": (by_accelerate(), {}),
    "seedable": (by_accelerate(use_seedable_sampler=True), {}),
    "dispatched": (by_accelerate(dispatch_batches=True, split_batches=True), {}),
    "workers": (by_accelerate(), {"num_workers": 2, "prefetch_factor": 2, "persistent_workers": True}),
    "uneven": (as_process(1, even_batches=False), {}),
    "even": (as_process(0, even_batches=True), {}),
    "split": (as_process(1, split_batches=True), {}),
    "fabric": (FabricLoader, {}),
}


@pytest.mark.usefixtures("reset_accelerate")
@pytest.mark.parametrize(
    "prepare, options",
    [pytest.param(*x, id=name, marks=pytest.mark.slow if name == "workers" else ()) for name, x in LOADERS.items()],
)
def test_any_loader_yields_the_users_epoch(prepare, options):
    """The oracle is a new sampler for every pass, in a torch loader wrapped the same way."""
    condenser = condensed()
    items = IndexedDataset(TensorDataset(torch.zeros(103, 1), torch.zeros(103)))

    def new():
        sampler = CondensedSampler(condenser, seed=4)
        return sampler, prepare(DataLoader(items, batch_size=8, sampler=sampler, **options))

    def indices(loader):
        return [i for _, _, index in loader for i in index.tolist()]

    def expected(epoch, consumed=0):
        sampler, loader = new()
        sampler.set_epoch(epoch, consumed=consumed)
        return indices(loader)

    assert len({tuple(expected(epoch)) for epoch in range(6)}) == 6
    sampler, loader = new()
    for epoch, consumed in ((3, 16), (4, 0), (0, 0), (0, 8), (1, 0), (1, 0), (0, 0)):
        sampler.set_epoch(5)  # replaced by the next call
        sampler.set_epoch(epoch, consumed)
        length, batches = len(loader), [index.tolist() for _, _, index in loader]
        assert [i for batch in batches for i in batch] == expected(epoch, consumed) and len(batches) == length
    for epoch in (1, 7, 2, 0, 0):
        sampler.set_epoch(epoch)
        first = next(iter(loader))[2].tolist()  # an epoch that is stopped early
        assert first == expected(epoch)[: len(first)]
        sampler.set_epoch(epoch)
        assert indices(loader) == expected(epoch)
    for _ in range(3):  # a loader prepared after its sampler was used elsewhere
        sampler.set_epoch(9)
        list(sampler)
    loader = prepare(DataLoader(items, batch_size=8, sampler=sampler, **options))
    sampler.set_epoch(2)
    assert indices(loader) == expected(2)


@pytest.mark.usefixtures("reset_accelerate")
@pytest.mark.parametrize("prepare, options", [LOADERS["accelerate"], LOADERS["dispatched"], LOADERS["fabric"]])
def test_every_pass_of_a_library_has_its_own_order_without_user_calls(prepare, options):
    sampler = CondensedSampler(condensed(), seed=4)
    items = IndexedDataset(TensorDataset(torch.zeros(103, 1), torch.zeros(103)))
    loader = prepare(DataLoader(items, batch_size=8, sampler=sampler))
    passes = [[i for _, _, index in loader for i in index.tolist()] for _ in range(3)]
    alone = CondensedSampler(condensed(), seed=4)
    for epoch, got in enumerate(passes):
        alone.set_epoch(epoch)
        assert got == [index for index, _ in alone]


@pytest.mark.usefixtures("reset_accelerate")
def test_accelerate_skips_batches_of_the_users_epoch():
    sampler = CondensedSampler(condensed(), seed=4)
    sampler.set_epoch(3)
    want = [index for index, _ in sampler]
    items = IndexedDataset(TensorDataset(torch.zeros(103, 1), torch.zeros(103)))
    loader = by_accelerate()(DataLoader(items, batch_size=8, sampler=sampler))
    sampler.set_epoch(3)
    assert [i for _, _, index in skip_first_batches(loader, 2) for i in index.tolist()] == want[16:]
    loader.set_epoch(3)  # Accelerate's own way to choose an epoch
    assert [i for _, _, index in loader for i in index.tolist()] == want


@pytest.mark.usefixtures("reset_accelerate")
@pytest.mark.parametrize("loader_chooses", ["before", "after", "both"])
def test_mid_epoch_position_survives_the_loaders_set_epoch(loader_chooses):
    """Accelerate's loader passes the epoch of `loader.set_epoch` to the sampler, and repeats it before its iterator."""
    items = IndexedDataset(TensorDataset(torch.zeros(103, 1), torch.zeros(103)))
    sampler = CondensedSampler(condensed(), seed=4)
    loader = by_accelerate()(DataLoader(items, batch_size=8, sampler=sampler))
    for epoch in (5, 2):  # an epoch that the loader cannot have counted, and one that it can
        sampler.set_epoch(epoch, consumed=0)
        want = [index for index, _ in sampler][16:]
        if loader_chooses != "after":
            loader.set_epoch(epoch)
        sampler.set_epoch(epoch, consumed=16)
        if loader_chooses != "before":
            loader.set_epoch(epoch)
        assert [i for _, _, index in loader for i in index.tolist()] == want


def test_last_set_epoch_call_decides_unless_it_could_be_a_librarys():
    condenser = condensed()
    sampler, kept = CondensedSampler(condenser), len(condenser.kept)

    def epoch_of(*calls):
        for call in calls:
            sampler.set_epoch(*call)
        got = [index for index, _ in sampler]
        for epoch in range(8):
            alone = CondensedSampler(condenser)
            alone.set_epoch(epoch)
            if [index for index, _ in alone][kept - len(got) :] == got:
                return epoch, kept - len(got)

    assert epoch_of((0,), (1,), (2,)) == (2, 0)  # a resumed run that skips epochs
    assert epoch_of((7,), (5,)) == (5, 0)
    assert epoch_of((5,), (0,)) == (5, 0)
    assert epoch_of((5,), (0, 0)) == (0, 0)
    assert epoch_of((6,), (5, 3), (0,)) == (5, 3)
    assert epoch_of((6,), (5, 3), (0,), (0,)) == (5, 3)
    assert epoch_of((6, 3), (7,)) == (7, 0)
    assert epoch_of((7, 3), (7,), (7, 0)) == (7, 0)
    assert epoch_of((0,)) == (0, 0)
    sampler.set_epoch(5)
    sampler.order()  # as a loop over images on the device does
    assert epoch_of((0,)) == (0, 0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_persistent_workers_see_every_new_stage(num_workers):
    n, images = 64, random_images(64, seed=3)
    condenser = KnowledgeCondenser(n, keep=0.5, every=1, stages=3)
    authors = Authors(images, 0.5, 3, "reference", True, True)
    sampler = CondensedSampler(condenser)
    loader = DataLoader(
        IndexedDataset(Images(images)),
        batch_size=10,
        sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    draw = tied_values(2)
    for epoch in range(5):
        sampler.set_epoch(epoch)
        seen = []
        for x, label, index in loader:
            assert index.dtype == torch.int64
            assert np.array_equal(x, authors.images[index]) and torch.equal(label, 10 * index)
            value = torch.tensor([draw(int(i)) for i in index], dtype=torch.float64)
            condenser.update(index, value)
            for i, v in zip(index.tolist(), value.tolist(), strict=True):
                authors.visit(i, v)
            seen += index.tolist()
        assert sorted(seen) == sorted(authors.remain)
        condenser.step()
        authors.e_step()
    assert condenser.mix_trees and len(condenser.kept) == 32


# --- The data set --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["array", "tensor", "pil"])
def test_items_of_every_kind_are_mixed_before_the_transform(kind):
    images = random_images(6)
    tree = ((0, 1, 0.25), (2, (0, 1, 0.25), 0.125), 0.5)
    dataset = IndexedDataset(Images(images, kind), transform=lambda x: (type(x), np.asarray(x)))

    def mix(a, b, e):
        return (a * np.float32(1 - e) + b * np.float32(e)).astype(np.uint8)

    inner = mix(images[0], images[1], 0.25)
    expected = mix(inner, mix(images[2], inner, 0.125), 0.5)
    (cls, pixels), label, index = dataset[-1, tree]
    raw = Images(images, kind)[0][0]
    assert isinstance(raw, cls) and np.array_equal(pixels, expected)
    assert (label, index) == (0, -1)  # the leftmost leaf's label, and the unchanged mark of a repeat
    (_, pixels), label, index = dataset[4]
    assert np.array_equal(pixels, images[4]) and (label, index) == (40, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_point_items_keep_their_dtype_and_are_not_truncated(dtype):
    x = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    dataset = IndexedDataset([(x[0], "a"), (x[1], "b")])
    for tree, first_weight in (((1, 0, 0.3), 0.7), ((1, 0, 0.3, 1.0), 1.0)):
        mixed, label, index = dataset[1, tree]
        assert (mixed.dtype, label, index) == (dtype, "b", 1)
        expected = first_weight * x[1].double() + 0.3 * x[0].double()
        torch.testing.assert_close(mixed.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-12)


def test_non_convex_mix_is_clipped():
    images = np.array([[0, 100, 200, 255], [255, 255, 255, 255]], dtype=np.uint8)
    mixed, _, _ = IndexedDataset([(image, 0) for image in images])[0, (0, 1, 0.25, 1.0)]
    assert mixed.tolist() == [63, 163, 255, 255]


def test_shared_subtrees_are_mixed_once():
    """Forty levels are 2^40 leaves if every subtree is mixed again; after pickling too, as for a worker."""
    tree = 0
    for _ in range(40):
        tree = (tree, tree, 0.5)
    images = random_images(1)
    image, _, _ = IndexedDataset(Images(images))[pickle.loads(pickle.dumps((0, tree)))]
    assert np.array_equal(image, images[0])


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("shape", [(7, 6, 3), (300_000,), (5,), ()])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_mixing_all_at_once_equals_mixing_one_by_one(dtype, shape, convex):
    count = 60 if shape != (300_000,) else 12
    pixels = np.random.default_rng(1).integers(0, 256, (count, *shape))
    images = (
        torch.from_numpy(pixels).to(torch.uint8) if dtype == torch.uint8 else torch.from_numpy(pixels / 255).to(dtype)
    )
    images = images.repeat_interleave(2, dim=0)[::2]  # not contiguous
    before, condenser = images.clone(), condensed(n=count, convex=convex)
    mixed = condenser.mix(images)
    assert torch.equal(images, before) and len(condenser.mix_trees) > count // 8
    dataset = IndexedDataset([(image, 0) for image in images])
    for sample in range(count):
        tree = condenser.mix_trees.get(sample)
        assert torch.equal(mixed[sample], dataset[sample if tree is None else (sample, tree)][0])


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("samples, side", [(9, 5), (200, 5), (40, 400)])
def test_mix_in_place_applies_a_log_in_order(samples, side, dtype, convex):
    """Samples mixed again, mixes as partners, and partners that are mixed afterwards, in any order."""
    random, count = np.random.default_rng(samples), 150
    pixels = random.integers(0, 256, (samples, side), np.uint8)
    images = torch.from_numpy(pixels).to(dtype)
    mixed = random.integers(0, samples, count)
    partner = (mixed + random.integers(1, samples, count)) % samples
    weight = random.random(count).astype(np.float32)
    expected = images.numpy().astype(np.float32)
    for sample, other, e in zip(mixed, partner, weight, strict=True):
        first_weight = np.float32(1) - e if convex else np.float32(1)
        blended = first_weight * expected[sample] + e * expected[other]
        expected[sample] = np.floor(blended.clip(0, 255)) if dtype == torch.uint8 else blended
    log = (torch.from_numpy(mixed), torch.from_numpy(partner), torch.from_numpy(weight.astype(float)))
    mix_in_place(images, *log, convex)
    assert images.dtype == dtype and np.array_equal(images.numpy(), expected)


def test_mix_copies_images_only_if_there_are_mixes():
    condenser, raw = condensed(), torch.rand(103, 4)
    before = raw.clone()
    mixed = condenser.mix(raw)
    assert torch.equal(raw, before) and not torch.equal(mixed, raw)
    resumed = KnowledgeCondenser(103, keep=0.6, every=1, stages=2)
    assert resumed.mix(raw) is raw
    resumed.load_state_dict(condenser.state_dict())
    assert torch.equal(resumed.mix(raw), mixed) and resumed.mix_trees == condenser.mix_trees


def test_ascending_kept_set_is_read_only():
    condenser = condensed()
    assert condenser.ascending.tolist() == sorted(condenser.kept.tolist())
    with pytest.raises(ValueError, match="read-only"):
        condenser.ascending[0] = 1
    index, sample = CondensedSampler(condenser, shuffle=False).order()
    index[:], sample[:] = 7, 7  # these are copies
    assert condenser.ascending.tolist() == sorted(condenser.kept.tolist())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_mixing_on_a_gpu_equals_the_cpu(dtype):
    condenser = condensed(n=500)
    images = (torch.rand(500, 9, 9, 3) * (255 if dtype == torch.uint8 else 1)).to(dtype)
    assert torch.equal(condenser.mix(images.cuda()).cpu(), condenser.mix(images))


# --- Bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(num_samples=0), ValueError, "num_samples must be an integer >= 1, got 0"),
        (dict(num_samples=True), TypeError, "num_samples .* got bool True"),
        (dict(num_samples=9.0), TypeError, "num_samples"),
        (dict(num_samples=10**400), ValueError, "num_samples must be an integer that int64 can hold, got 1000"),
        (dict(stages=10**5000), ValueError, "stages must be an integer that int64 can hold, got int"),
        (dict(alpha=10**5000), ValueError, "alpha must be a finite number >= 0, got int"),
        (dict(epsilon=list(range(9))), TypeError, r"epsilon must be a number in .* got list of length 9"),
        (dict(schedule="x" * 1000), ValueError, r"schedule must be one of .* \(1000 characters\)"),
        (
            dict(device=[0] * 1000),
            TypeError,
            "device must be a torch.device, a string or None, got list of length 1000",
        ),
        (dict(keep=0), ValueError, r"keep must be a number in \(0, 1\], got 0"),
        (dict(keep=1.5), ValueError, "keep"),
        (dict(keep=True), TypeError, "keep"),
        (dict(keep=math.nan), ValueError, "keep"),
        (dict(every=0), ValueError, "every must be an integer >= 1, got 0"),
        (dict(stages=2.5), TypeError, "stages"),
        (
            dict(schedule="linear"),
            ValueError,
            "schedule must be one of 'reference', 'cosine', 'immediate', got 'linear'",
        ),
        (dict(schedule=None), ValueError, "schedule"),
        (dict(alpha=-1), ValueError, "alpha"),
        (dict(alpha=math.inf), ValueError, "alpha"),
        (dict(epsilon=1.01), ValueError, r"epsilon must be a number in \[0, 1\], got 1.01"),
        (dict(accumulate=1), TypeError, "accumulate must be True or False, got int 1"),
        (dict(convex="yes"), TypeError, "convex"),
        (dict(seed=-1), ValueError, "seed"),
        (dict(group="all"), (TypeError, ValueError), "group"),
        (dict(warmup=-1), ValueError, "warmup must be an integer >= 0"),
        (dict(min_per_class=1), ValueError, "min_per_class=1 needs labels"),
        (
            dict(num_samples=9, min_per_class=3, labels=[0, 1, 2] * 3, keep=0.7),
            ValueError,
            "min_per_class must be at most 2, so that 3 classes fit into the final size 6",
        ),
        (dict(num_samples=9, min_per_class=0.5, labels=[0] * 9), TypeError, "min_per_class must be an integer"),
        (dict(num_samples=9, labels=[0] * 8), ValueError, r"labels must be 9 integers >= 0, .*, got shape \(8,\)"),
        (dict(num_samples=9, labels=[0.0] * 9), TypeError, "labels must be .* got list of float64"),
        (dict(num_samples=9, labels=[True] * 9), TypeError, "labels must be .* got list of bool"),
        (dict(num_samples=9, labels=[-1] * 9), ValueError, "labels must be .* got -1 to -1"),
        (dict(num_samples=2, labels=[[1], [2, 3]]), TypeError, "labels must be .* got list"),
        (dict(num_samples=9, labels=torch.zeros(9, 1, dtype=torch.int64)), ValueError, r"got shape \(9, 1\)"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        KnowledgeCondenser(**{"num_samples": 100, **options})


def test_schedule_that_never_drops_warns():
    with pytest.warns(RuntimeWarning, match="nothing is ever condensed"):
        KnowledgeCondenser(10, keep=0.7, stages=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KnowledgeCondenser(10, keep=0.7, stages=6, schedule="cosine")
        KnowledgeCondenser(10, keep=1.0)  # as requested


@pytest.mark.parametrize(
    "index, value, error, message",
    [
        ([0], torch.ones(1), TypeError, "index must be a tensor"),
        (torch.zeros(1, dtype=torch.int32), torch.ones(1), TypeError, "index must be int64"),
        (torch.zeros(1), torch.ones(1), TypeError, "index must be int64"),
        (torch.tensor([0]), torch.tensor([1]), TypeError, "value must have a floating-point dtype"),
        (torch.tensor([0]), torch.ones(2), ValueError, r"value must have the shape of index, \(1,\), got \(2,\)"),
        (torch.tensor([[0]]), torch.ones(1, 1), ValueError, r"index must have shape \(b,\), got \(1, 1\)"),
        (torch.tensor([0, 5]), torch.ones(2), IndexError, r"index must be in \[0, 5\).* from 0 to 5"),
        (torch.tensor([0, -2]), torch.ones(2), IndexError, "from -2 to 0"),
    ],
)
def test_bad_updates_are_named_and_record_nothing(index, value, error, message):
    condenser = KnowledgeCondenser(5, schedule="immediate")
    with pytest.raises(error, match=message):
        condenser.update(index, value)
    assert condenser.counts.sum() == 0


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda c: CondensedSampler([1, 2]), TypeError, "condenser must be a KnowledgeCondenser, got list"),
        (
            lambda c: CondensedSampler(c, rank=2, world_size=2),
            ValueError,
            r"rank must be an integer in \[0, 1\], got 2",
        ),
        (lambda c: CondensedSampler(c, shuffle=1), TypeError, "shuffle"),
        (lambda c: CondensedSampler(c).set_epoch(-1), ValueError, "epoch"),
        (lambda c: CondensedSampler(c).set_epoch(0, 1.0), TypeError, "consumed"),
        (lambda c: IndexedDataset(iter([])), TypeError, "dataset must have a length"),
        (lambda c: IndexedDataset([], transform=3), TypeError, "transform must be callable or None, got int"),
        (lambda c: IndexedDataset([(0, 0)])[1], IndexError, r"index must be in \[0, 1\), got 1"),
        (lambda c: IndexedDataset([(0, 0)])[-1], IndexError, "got -1"),
        (lambda c: IndexedDataset([{"x": 0, "y": 0}])[0], TypeError, "pairs .* got dict at index 0"),
        (lambda c: IndexedDataset([(0, 0, 0, 0)])[0], TypeError, "got 4 entries"),
        (lambda c: IndexedDataset([("a", 0)])[0, (0, 0, 0.5)], TypeError, "got str and str"),
        (lambda c: IndexedDataset([(torch.ones(2, dtype=int), 0)])[0, (0, 0, 0.5)], TypeError, "int64 cannot be mixed"),
        (
            lambda c: IndexedDataset([(torch.ones(2), 0), (torch.ones(3), 0)])[0, (0, 1, 0.5)],
            ValueError,
            r"shape \(2,\) and .* shape \(3,\)",
        ),
        (lambda c: c.mix(np.zeros((9, 2))), TypeError, r"images must be a tensor of shape \(N, ...\), got ndarray"),
        (lambda c: c.mix(torch.zeros(8, 2)), ValueError, r"images must have shape \(9, ...\), got \(8, 2\)"),
        (lambda c: c.mix(torch.zeros(())), ValueError, r"got \(\)"),
        (lambda c: condensed(9).mix(torch.ones(9, dtype=int)), TypeError, "int64 cannot be mixed"),
        (lambda c: mix_images(np.zeros((9, 2), dtype=np.float32), c.step()), TypeError, "uint8.* ndarray of float32"),
        (lambda c: mix_images(np.zeros((8, 2), dtype=np.uint8), c.step()), ValueError, r"sample 8, got shape \(8, 2\)"),
    ],
)
def test_bad_calls_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(KnowledgeCondenser(9, every=1, schedule="immediate"))


def test_pil_palettes_are_refused():
    from PIL import Image

    palette = Image.new("P", (2, 2))
    with pytest.raises(ValueError, match="one mode out of L, LA, RGB, RGBA, F, got P and P; convert"):
        IndexedDataset([(palette, 0)])[0, (0, 0, 0.5)]
