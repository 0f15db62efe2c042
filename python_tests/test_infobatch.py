"""Tests of `InfoBatch` against its rule in plain Python: dictionaries, exact fractions, explicit random keys."""

import json
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from kcd_ext.condensation import CondensedSampler, InfoBatch, KnowledgeCondenser, RandomCondenser

pytestmark = pytest.mark.usefixtures("one_thread")


class Oracle:
    """A second implementation of the rule: the kept samples and the weights of their losses in the next epoch."""

    def __init__(self, n, keep, annealed_from, seed):
        self.n, self.keep, self.annealed_from, self.seed = n, keep, annealed_from, seed
        self.last, self.epoch = {}, 0
        self.weight = dict.fromkeys(range(n), 1.0)

    def end_epoch(self, visits):
        """Apply the epoch's visits (index, loss), in any order, finite or not."""
        losses = {}
        for index, loss in visits:
            if index >= 0 and math.isfinite(loss):
                losses.setdefault(index, []).append(Fraction(loss))
        self.last |= {index: sum(seen) / len(seen) for index, seen in losses.items()}
        self.epoch += 1
        mean = sum(self.last.values()) / len(self.last) if self.last else None
        bits = np.random.Philox(counter=[0, 0, 0, 2], key=np.array([self.seed, self.epoch], dtype=np.uint64))
        drawn = [int(key) >> 11 < Fraction(self.keep) * 2**53 for key in bits.random_raw(self.n)]
        self.low = {index for index, loss in self.last.items() if loss < mean and self.epoch < self.annealed_from}
        self.weight = {
            i: 1 / self.keep if i in self.low else 1.0 for i in range(self.n) if i not in self.low or drawn[i]
        }


def dense(weights, n):
    return torch.tensor([weights.get(index, 0.0) for index in range(n)], dtype=torch.float32)


def losses_with_ties(index, epoch, random):
    """Draw a multiple of 1/16, so that many are equal, or rarely a non-finite loss; some samples become easy over time."""
    loss = int(random.integers(0, 1 + 32 // (1 + epoch * (index % 3)))) / 16
    return random.choice([math.nan, math.inf]) if random.random() < 0.03 else loss


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
@pytest.mark.parametrize("keep", [0.5, 0.3, 1.0])
def test_infobatch_equals_the_oracle_every_epoch(keep, seed):
    n, epochs = 157, 16
    condenser = InfoBatch(n, keep=keep, epochs=epochs, seed=seed)
    oracle, random = Oracle(n, keep, 14, seed), np.random.default_rng(seed % 1000)
    sampler = CondensedSampler(condenser, seed=1)
    unvisited, came_back, sizes = 0, 0, []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        yielded = [index for index, tree in sampler if tree == index]
        assert sorted(yielded) == sorted(oracle.weight)
        assert torch.equal(condenser.sample_weight, dense(oracle.weight, n))
        # Some samples are not visited, the last one never; some are visited two or four times; and there is padding.
        seen = [index for index in yielded if random.random() > 0.1 and index != n - 1]
        visits = [(i, losses_with_ties(i, epoch, random)) for i in seen for _ in range(random.choice([1, 1, 2, 4]))]
        visits += [(-1, 99.0)] * 3
        unvisited += len(yielded) - len(seen)
        for part in range(0, len(visits), 23):
            index, loss = zip(*visits[part : part + 23], strict=True)
            condenser.update(torch.tensor(index), torch.tensor(loss, dtype=torch.float32))
        assert torch.equal(condenser.sample_weight, dense(oracle.weight, n))  # constant during the epoch
        before = set(oracle.weight)
        oracle.end_epoch(visits)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            condensation = condenser.step()
        now = set(oracle.weight)
        assert condenser.stage == condenser.epoch == epoch + 1
        assert condenser.values.tolist() == [float(oracle.last.get(index, 0)) for index in range(n)]
        assert (condensation is None) == (now == before)
        assert sorted(condenser.kept.tolist()) == sorted(now)
        if condensation is not None:
            by_loss = sorted(range(n), key=lambda i: (-oracle.last.get(i, 0), i))
            assert condensation.kept.tolist() == condenser.kept.tolist() == [i for i in by_loss if i in now]
            assert condensation.dropped.tolist() == [i for i in by_loss if i in before - now]
            assert (condensation.stage, condensation.epoch) == (epoch + 1, epoch + 1)
            assert len(condensation.mixed) == len(condensation.partner) == len(condensation.mix) == 0
        came_back += len(now - before)
        sizes.append(len(now))
    assert n - 1 not in oracle.last and unvisited > 50 and not condenser.mix_trees
    assert sizes[13:] == [n] * 3
    assert (came_back > 100 and max(sizes[:13]) < n) if keep < 1 else sizes == [n] * epochs


@pytest.mark.parametrize("epochs", [1, 2, 7, 8, 9, 10, 16, 20])
@pytest.mark.parametrize("anneal, numerator", [(0.125, 7), (0.0, 8), (0.5, 4), (1.0, 0)])
def test_last_part_of_the_run_has_all_samples_with_weight_one(epochs, anneal, numerator):
    n, annealed_from = 200, numerator * epochs // 8
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        condenser = InfoBatch(n, epochs=epochs, anneal=anneal)
    loss = torch.arange(n) % 2.0
    for epoch in range(epochs):
        has_all = epoch == 0 or epoch >= annealed_from
        assert (len(condenser.kept) == n) == has_all, epoch
        assert set(condenser.sample_weight.tolist()) == ({1.0} if has_all else {0.0, 1.0, 2.0})
        assert condenser.kept[: n // 2].remainder(2).eq(1).all() or has_all  # at or above the mean: always kept
        condenser.update(torch.arange(n), loss)
        condenser.step()
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (annealed_from <= 1 and anneal < 1)
    assert all("nothing is ever pruned" in message for message in messages)


@pytest.mark.parametrize(
    "n, loss", [(197, 0.1), (187, 0.7), (1003, 1e-300), (1003, 2.0**900), (1003, 0.0), (187, -0.7)]
)
def test_equal_losses_drop_nothing_with_any_rounding(n, loss):
    """The rounded exact sum of 197 times 0.1, divided by 197 and rounded, is more than 0.1."""
    assert math.fsum([0.1] * 197) / 197 > 0.1 and math.fsum([0.7] * 187) / 187 > 0.7
    condenser = InfoBatch(n, epochs=100)
    condenser.update(torch.arange(n), torch.full((n,), loss, dtype=torch.float64))
    assert condenser.step() is None
    assert condenser.sample_weight.eq(1).all()


def test_weights_are_unbiased_and_selections_independent():
    """Two runs of 300 selections, 640 of 1000 samples low: all statistics are within 5 sigma of chance."""
    n, low, keep, choices = 1000, 640, 0.3, 300
    easy_first = torch.cat((torch.linspace(0, 0.5, low), torch.linspace(2, 3, n - low))).double()
    loss = easy_first[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    is_low = loss < loss.mean()
    assert is_low.sum() == low
    stays, sums, totals = [], [], []
    for seed in (3, 4):
        condenser = InfoBatch(n, keep=keep, epochs=10_000, seed=seed)
        for _ in range(choices):
            condenser.update(torch.arange(n), loss)
            condenser.step()
            kept, weight = condenser.kept, condenser.sample_weight.double()
            assert weight[kept].gt(0).all() and weight.count_nonzero() == len(kept)
            assert weight[~is_low].eq(1).all() and set(weight[is_low].tolist()) == {0.0, float(np.float32(1 / keep))}
            stays.append(weight[is_low] > 0)
            sums.append(weight[kept][is_low[kept]].sum())
            totals.append((weight * loss)[kept].sum())
    stays, sums, totals = torch.stack(stays).double(), torch.stack(sums), torch.stack(totals)

    def sigmas(mean, expected, variance):
        return abs(mean - expected) / math.sqrt(variance)

    count, odds = len(sums), (1 - keep) / keep
    assert (
        sigmas(sums.mean(), low, low * odds / count) < 5
    )  # the expected sum of the low samples' weights is their number
    assert sigmas(totals.mean(), loss.sum(), loss[is_low].square().sum() * odds / count) < 5
    assert sums.var() == pytest.approx(low * odds, rel=5 * math.sqrt(2 / count))  # each is drawn independently
    variance = keep * (1 - keep)
    assert ((stays.mean(0) - keep).abs() / math.sqrt(variance / count)).max() < 5  # every sample equally often
    assert stays.mean(0).var() == pytest.approx(
        variance / count, rel=5 * math.sqrt(2 / low)
    )  # and independently every time
    # Neither consecutive epochs nor different seeds are correlated.
    for one, other in ((stays[:-1], stays[1:]), (stays[:choices], stays[choices:])):
        covariance = ((one - keep) * (other - keep)).mean()
        assert abs(covariance) < 5 * variance / math.sqrt(one.numel())


def test_selection_is_pinned():
    """The selection never changes, so a run can be resumed with another release."""
    condenser = InfoBatch(12, epochs=100, seed=5)
    kept = []
    for _ in range(3):
        condenser.update(torch.arange(12), torch.arange(12.0))
        condenser.step()
        kept.append(sorted(condenser.kept.tolist()))
    assert kept == [
        [0, 2, 3, 4, 6, 7, 8, 9, 10, 11],
        [0, 5, 6, 7, 8, 9, 10, 11],
        [1, 4, 6, 7, 8, 9, 10, 11],
    ]


def through_torch_save(state, path):
    torch.save(state, path)
    return torch.load(path, weights_only=True)


def through_safetensors_and_json(state, _):
    tensors = {name: entry for name, entry in state.items() if isinstance(entry, torch.Tensor)}
    rest = {name: entry for name, entry in state.items() if name not in tensors}
    return {**load_safetensors(save_safetensors(tensors)), **json.loads(json.dumps(rest))}


@pytest.mark.parametrize("store", [through_torch_save, through_safetensors_and_json])
def test_run_resumed_in_mid_epoch_equals_the_uninterrupted_run(store, tmp_path):
    n, epochs = 90, 16

    def new():
        return InfoBatch(n, keep=0.4, epochs=epochs, seed=7)

    def visit(condenser, epoch, part):
        sampler = CondensedSampler(condenser, seed=2)
        half = len(sampler) // 2
        sampler.set_epoch(epoch, half if part else 0)
        index = torch.tensor([i for i, _ in sampler])[: None if part else half]
        condenser.update(index, torch.sin(index * 12.9898 + epoch * 78.233).abs())
        return condenser.kept.tolist(), condenser.sample_weight.tolist()

    uninterrupted, halted = new(), new()
    for epoch in range(epochs):
        for part in (0, 1):
            assert visit(uninterrupted, epoch, part) == visit(halted, epoch, part)
            resumed = new()
            resumed.load_state_dict(store(halted.state_dict(), tmp_path / "state"))
            halted = resumed
        uninterrupted.step(), halted.step()
    one, other = uninterrupted.state_dict(), halted.state_dict()
    assert one.keys() == other.keys()
    for name, entry in one.items():
        assert torch.equal(entry, other[name]) if isinstance(entry, torch.Tensor) else entry == other[name], name
    with pytest.raises(ValueError, match="epochs=16, this condenser has epochs=17"):
        InfoBatch(n, keep=0.4, epochs=17, seed=7).load_state_dict(one)
    with pytest.raises(ValueError, match="missing"):
        KnowledgeCondenser(n).load_state_dict(one)


def test_samples_without_a_loss_warn_and_stay():
    condenser = InfoBatch(9, keep=0.01, epochs=100)
    condenser.update(torch.arange(6), torch.tensor([0.0, 0, 0, 9, 9, math.nan]))
    with pytest.warns(RuntimeWarning) as caught:
        condenser.step()
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2 and messages[0].startswith("1 losses of 1 samples were not finite")
    assert messages[1].startswith("3 of 9 samples were never visited before the first condensation step and stay")
    assert {3, 4, 5, 6, 7, 8} <= set(condenser.kept.tolist())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        condenser.step()
    with pytest.warns(RuntimeWarning, match="9 of 9 samples"):  # a loop that never calls update()
        assert InfoBatch(9, epochs=100).step() is None


def test_every_condenser_has_measure_and_sample_weight():
    for condenser, measure in (
        (KnowledgeCondenser(50), "value"),
        (RandomCondenser(50), "value"),
        (InfoBatch(50, epochs=9), "losses"),
    ):
        assert condenser.measure == measure
    assert KnowledgeCondenser(50).sample_weight is None and RandomCondenser(50).sample_weight is None
    with torch.inference_mode():
        weight = InfoBatch(50, epochs=9).sample_weight
    assert weight.dtype == torch.float32 and weight.tolist() == [1.0] * 50
    assert not weight.is_inference()  # which autograd could not save


def test_subclass_can_select_with_its_own_sizes():
    class OddThenAll(KnowledgeCondenser):
        def select(self):
            order = self.ranking()
            return [(order[order % 2 == 1], order[order % 2 == 0]), None, (order, order[:0])][self.stage]

    condenser = OddThenAll(7, keep=0.5, every=2, stages=3)
    outcomes = []
    for _ in range(6):
        condenser.update(torch.arange(7), torch.arange(7.0))
        outcomes.append(condenser.step())
    assert [outcome is None for outcome in outcomes] == [True, False, True, True, True, False]
    first, last = outcomes[1], outcomes[5]
    assert (first.stage, first.kept.tolist(), first.dropped.tolist()) == (1, [5, 3, 1], [6, 4, 2, 0])
    assert (first.mixed.tolist(), first.partner.tolist()) == ([5, 3, 1], [6, 4, 2])
    assert (last.stage, last.kept.tolist(), len(last.mixed)) == (3, [6, 5, 4, 3, 2, 1, 0], 0)
    assert condenser.stage == 3


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(keep=0), ValueError, r"keep must be a number in \(0, 1\], got 0"),
        (dict(keep=1.1), ValueError, "keep"),
        (dict(epochs=0), ValueError, "epochs must be an integer >= 1, got 0"),
        (dict(epochs=2.0), TypeError, "epochs must be an integer >= 1, got float 2.0"),
        (dict(anneal=-0.1), ValueError, r"anneal must be a number in \[0, 1\], got -0.1"),
        (dict(anneal=True), TypeError, "anneal"),
        (dict(anneal=math.nan), ValueError, "anneal"),
        (dict(seed=2**64), ValueError, "seed"),
        (dict(num_samples=0), ValueError, "num_samples"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        InfoBatch(**{"num_samples": 10, "epochs": 100, **options})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_selection_on_a_gpu_equals_the_cpu():
    kept = []
    for device in ("cpu", "cuda"):
        condenser = InfoBatch(1000, epochs=100, device=device)
        for epoch in range(5):
            index = torch.arange(1000)
            condenser.update(index.to(device), torch.sin(index.double() + epoch).to(device))
            condenser.step()
        assert condenser.sample_weight.device.type == device
        kept.append((condenser.kept.tolist(), condenser.sample_weight.tolist()))
    assert kept[0] == kept[1]


@pytest.mark.parametrize(("anneal", "epochs", "first"), [(0.8, 10, 2), (0.9, 10, 1), (0.125, 24, 21), (1.0, 7, 0)])
def test_annealing_starts_at_the_epoch_of_exact_arithmetic(anneal, epochs, first):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        condenser = InfoBatch(50, keep=0.5, epochs=epochs, anneal=anneal)
    has_all = []
    for epoch in range(epochs):
        has_all.append(len(condenser.kept) == 50)
        condenser.update(torch.arange(50), torch.arange(50).double() + epoch)
        condenser.step()
    assert all(has_all[first:]) and not any(has_all[1:first])
