"""Tests of `ImportanceCondenser` against exact fractions, complete enumeration and a second implementation in plain Python."""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch

from kcd_ext.condensation import CondensedSampler, ImportanceCondenser, KnowledgeCondenser, UniformCondenser
from kcd_ext.condensation.importance import inclusion_parts, systematic_sample

pytestmark = pytest.mark.usefixtures("one_thread")


def exact_probabilities(values, count):
    """Return the inclusion probabilities as fractions, from the definition. `values` has None for samples without a value."""
    known = [i for i, value in enumerate(values) if value is not None]
    left = count - (len(values) - len(known))
    if left <= 0:
        return [Fraction(count, len(values))] * len(values)
    positive = {i: Fraction(max(values[i], 0.0)) for i in known}
    mean = sum(positive.values()) / max(len(known), 1)
    weight = {i: positive[i] + mean / 4 if mean else Fraction(1) for i in known}
    certain = set(range(len(values))) - set(known)
    while True:  # a weight that exceeds its share becomes certain, which raises the others' shares
        rest = [i for i in known if i not in certain]
        factor = (count - len(certain)) / sum(weight[i] for i in rest) if rest else 0
        more = {i for i in rest if factor * weight[i] >= 1}
        if not more:
            return [Fraction(1) if i in certain else factor * weight[i] for i in range(len(values))]
        certain |= more


def cases():
    random = np.random.default_rng(0)
    yield "one sample", [2.0], 1
    yield "all", [1.0, 5.0, 0.0], 3
    yield "equal", [0.7] * 13, 5
    yield "zero", [0.0] * 6, 4
    yield "negative", [-3.0, -1.0, 0.0, 2.0, 1e-3], 2
    yield "all negative", [-3.0, -1.0], 1
    yield "one dominates", [2.0**959, *[1e-300] * 9], 4
    yield "all huge", [2.0**959] * 7 + [2.0**958], 3
    yield "denormal", [5e-324] * 5 + [0.0] * 5, 7
    yield "wide range", [10.0 ** (-30 * i) for i in range(9)], 4
    yield "many certain", [100.0] * 5 + [1.0] * 6, 7
    yield "unknown", [None, 1.0, 2.0, None, 4.0, 0.0], 4
    yield "only one draw left", [None, None, 1.0, 9.0, 5.0], 3
    yield "as many unknown as draws", [None, None, 1.0, 9.0], 2
    yield "more unknown than draws", [None] * 4 + [3.0], 2
    yield "all unknown", [None] * 4, 3
    for size in (2, 57, 400):
        yield f"exponential {size}", [*random.exponential(size=size) ** 4], size // 2
        yield f"entropy {size}", [*random.beta(0.4, 2, size=size)], max(1, int(0.3 * size))


CASES = [pytest.param(values, count, id=name) for name, values, count in cases()]


@pytest.mark.parametrize(("values", "count"), CASES)
def test_probabilities_equal_exact_fractions_and_add_up_to_the_count(values, count):
    known = np.array([value is not None for value in values])
    parts, whole = inclusion_parts(np.array([value or 0.0 for value in values]), known, count)
    assert parts.dtype == np.int64 and whole & (whole - 1) == 0
    assert int(parts.sum()) == count * whole and parts.min() >= 1 and parts.max() <= whole
    exact = exact_probabilities(values, count)
    assert sum(exact) == count
    for part, expected in zip(parts.tolist(), exact, strict=True):
        assert abs(Fraction(part, whole) - expected) <= max(Fraction(2, whole), expected * Fraction(1, 2**48))


@pytest.mark.parametrize("whole", [1, 2, 8, 32])
def test_every_sample_is_drawn_exactly_as_often_as_its_probability_says(whole):
    """Enumerate all starting points. So the weighted mean of any numbers has exactly their mean as its expectation."""
    random = np.random.default_rng(whole)
    for _ in range(50):
        parts = random.integers(0, whole + 1, size=random.integers(1, 9))
        parts = np.append(parts, (-parts.sum()) % whole)
        drawn = np.stack([systematic_sample(parts, whole, start) for start in range(whole)])
        assert (drawn.sum(0) == parts).all()
        assert (drawn.sum(1) == parts.sum() // whole).all()


def test_weighted_mean_over_the_draw_is_unbiased_and_less_noisy_than_a_uniform_draw():
    """300 draws; numbers are roughly proportional to the values, as losses are to their KL divergence."""
    n, keep, draws = 211, 0.3, 300
    random = np.random.default_rng(1)
    values = random.exponential(size=n) ** 2
    numbers = torch.from_numpy(values * random.uniform(0.7, 1.3, size=n) + 0.1)
    spread = {}
    for kind in (ImportanceCondenser, UniformCondenser):
        means = []
        for seed in range(draws):
            condenser = kind(n, keep=keep, seed=seed)
            condenser.update(torch.arange(n), torch.from_numpy(values))
            condenser.step()
            weight = condenser.sample_weight
            weight = torch.ones(n) if weight is None else weight
            means.append((weight.double() * numbers)[condenser.kept].mean())
        means = torch.stack(means)
        spread[kind] = means.std()
        assert abs(means.mean() - numbers.mean()) < 4 * means.std() / draws**0.5
    assert spread[ImportanceCondenser] < spread[UniformCondenser] / 3


def test_uniform_draws_all_samples_equally_often_and_anew_in_every_epoch():
    n, epochs = 60, 1000
    condenser, counts, same = UniformCondenser(n, keep=0.25, seed=3), torch.zeros(n), 0
    for _ in range(epochs):
        before = set(condenser.kept.tolist())
        condenser.step()
        counts[condenser.kept] += 1
        same += before == set(condenser.kept.tolist())
        assert len(condenser.kept) == 15 and condenser.sample_weight is None
    assert ((counts / epochs - 0.25).abs() < 5 * (0.25 * 0.75 / epochs) ** 0.5).all()
    assert same < epochs / 2


class Oracle:
    """A second implementation: running means as fractions, probabilities as above, and one random number per epoch."""

    def __init__(self, n, keep, warmup, seed):
        self.n, self.count, self.warmup, self.seed = n, int(keep * n), warmup, seed
        self.seen, self.epoch = {}, 0
        self.drawn, self.weight = set(range(n)), dict.fromkeys(range(n), Fraction(1))

    def end_epoch(self, visits):
        for index, value in visits:
            if index >= 0 and math.isfinite(value):
                self.seen.setdefault(index, []).append(Fraction(value))
        self.epoch += 1
        if self.epoch < self.warmup:
            return
        values = [float(sum(seen) / len(seen)) if (seen := self.seen.get(i)) else None for i in range(self.n)]
        probability = exact_probabilities(values, self.count)
        bits = np.random.Philox(counter=[0, 0, 0, 2], key=np.array([self.seed, self.epoch], dtype=np.uint64))
        whole = 2 ** (52 - self.count.bit_length())
        start, total, self.drawn = Fraction(int(bits.random_raw()) % whole, whole), Fraction(0), set()
        for index, share in enumerate(probability):
            if math.ceil(total - start) < math.ceil(total + share - start):  # an integer distance from the start
                self.drawn.add(index)
            total += share
        self.weight = {i: Fraction(self.count, self.n) / probability[i] for i in self.drawn}


@pytest.mark.parametrize(("keep", "warmup", "seed"), [(0.5, 0, 0), (0.3, 3, 2**64 - 1), (0.99, 1, 7), (1.0, 0, 1)])
def test_condenser_equals_the_oracle_every_epoch_also_when_resumed_in_mid_epoch(keep, warmup, seed, tmp_path):
    n, epochs = 101, 9

    def new():
        return ImportanceCondenser(n, keep=keep, warmup=warmup, seed=seed)

    condenser, oracle, random = new(), Oracle(n, keep, warmup, seed), np.random.default_rng(seed % 1000)
    for epoch in range(epochs):
        sampler = CondensedSampler(condenser, seed=1)
        sampler.set_epoch(epoch)
        yielded = [index for index, tree in sampler if tree == index]
        assert set(yielded) == oracle.drawn and len(yielded) == (int(keep * n) if epoch >= max(1, warmup) else n)
        expected = [float(oracle.weight.get(index, 0)) for index in range(n)]
        assert condenser.sample_weight.tolist() == pytest.approx(expected, rel=1e-6)
        assert condenser.probability[yielded].tolist() == pytest.approx(
            [float(Fraction(len(yielded), n) / oracle.weight[i]) for i in yielded], rel=1e-12
        )
        # Sample 100 is never visited, sample 99 never has a finite value; some are visited twice, and there is padding.
        visits = [(i, math.inf if i == 99 else round(random.exponential() ** 3, 3)) for i in yielded if i != 100]
        visits += [(i, 0.125) for i in yielded[:9] if i < 99] + [(-1, 9.0), (3, math.nan), (4, -math.inf)]
        for part in range(0, len(visits), 23):
            index, value = zip(*visits[part : part + 23], strict=True)
            condenser.update(torch.tensor(index), torch.tensor(value, dtype=torch.float64))
            torch.save(condenser.state_dict(), tmp_path / "state")
            condenser = new()
            condenser.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        before = oracle.drawn
        oracle.end_epoch(visits)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            condensation = condenser.step()
        assert (condensation is None) == (before == oracle.drawn)
        if condensation is not None:
            assert set(condensation.kept.tolist()) == oracle.drawn and not len(condensation.mixed)
            assert set(condensation.dropped.tolist()) == before - oracle.drawn
            value = condenser.values[condensation.kept]
            assert (value[:-1] >= value[1:]).all() and len(condensation.kept) == len(set(condensation.kept.tolist()))
    assert {99, 100} <= set(condenser.kept.tolist())
    with pytest.raises(ValueError, match="condenser='ImportanceCondenser', this condenser has condenser='Uniform"):
        UniformCondenser(n, keep=keep, warmup=warmup, seed=seed).load_state_dict(condenser.state_dict())


def test_selection_is_pinned():
    """The selection never changes, so a run can be resumed with another release."""
    kept = []
    for kind in (ImportanceCondenser, UniformCondenser):
        condenser = kind(12, keep=0.5, seed=5)
        for _ in range(3):
            condenser.update(torch.arange(12), torch.arange(12.0) ** 2)
            condenser.step()
            kept.append(sorted(condenser.kept.tolist()))
    assert kept == [
        [4, 7, 8, 9, 10, 11],
        [0, 5, 7, 9, 10, 11],
        [0, 5, 7, 9, 10, 11],
        [1, 3, 5, 7, 9, 11],
        [0, 2, 4, 6, 8, 10],
        [0, 2, 4, 6, 8, 10],
    ]


def test_samples_without_a_value_warn_and_are_drawn():
    condenser = ImportanceCondenser(9, keep=0.5)
    condenser.update(torch.arange(8), torch.tensor([1.0, 1, 1, 1, 1, 1, 1, math.nan]))
    with pytest.warns(RuntimeWarning) as caught:
        condenser.step()
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2 and messages[0].startswith("1 knowledge values of 1 samples were not finite")
    assert messages[1].startswith(
        "1 of 9 samples were never visited before the first condensation step and are drawn in"
    )
    assert {7, 8} <= set(condenser.kept.tolist())


def test_class_that_is_not_drawn_causes_no_warning():
    """It may be drawn in the next epoch."""
    condenser = ImportanceCondenser(6, keep=0.34)
    condenser.set_labels(range(6))
    condenser.update(torch.arange(6), torch.ones(6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        condenser.step()
    assert len(condenser.kept) == 2


def test_weight_and_measure_are_those_that_a_training_loop_reads():
    condenser = ImportanceCondenser(50)
    with torch.inference_mode():
        weight = condenser.sample_weight
    assert weight.dtype == torch.float32 and weight.tolist() == [1.0] * 50 and not weight.is_inference()
    assert condenser.measure == KnowledgeCondenser.measure == "value" and condenser.ranks_by_value
    assert UniformCondenser(50).sample_weight is None and not UniformCondenser.ranks_by_value


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(keep=0), ValueError, r"keep must be a number in \(0, 1\], got 0"),
        (dict(warmup=-1), ValueError, "warmup must be an integer >= 0, got -1"),
        (dict(seed=2**64), ValueError, "seed"),
        (dict(num_samples=0), ValueError, "num_samples"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        ImportanceCondenser(**{"num_samples": 10, **options})
