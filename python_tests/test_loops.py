"""Tests of `condense`: a plain loop over indices is the oracle, alone and in two real processes with three libraries."""

import os
import random
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import Crew
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset

from kcd_ext import CondensedSampler, IndexedDataset, KnowledgeCondenser, condense
from kcd_ext.condensation import ImportanceCondenser, InfoBatch, RandomCondenser

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 45


class Numbers(torch.utils.data.Dataset):
    """Item i is the image full of i, the label i modulo 5 and, if `own`, an index of its own."""

    def __init__(self, size=SIZE, own=False, width=2):
        self.size, self.own, self.width = size, own, width

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        item = torch.full((1, self.width, self.width), float(index)), index % 5
        return (*item, 1000 + index) if self.own else item


def value_of(index, epoch):
    return torch.sin(index.double() * 12.9898 + epoch * 78.233).abs()


def train(loader, condenser, epochs):
    """Return the batches of every epoch as (x of one pixel, labels, indices)."""
    seen = []
    for _ in range(epochs):
        batches = []
        for x, label, index in loader:
            condenser.update(index, value_of(index, condenser.epoch))
            batches.append((x[:, 0, 0, 0].tolist(), label.tolist(), index.tolist()))
        seen.append(batches)
        condenser.step()
    return seen


@pytest.mark.parametrize(
    "workers", [{}, pytest.param({"num_workers": 2, "persistent_workers": True}, marks=pytest.mark.slow)]
)
def test_loop_equals_sampler_data_set_and_condenser_put_together_by_hand(workers):
    """Seven epochs with three condensation steps. The mixes reach workers that live through all of them."""
    loader, condenser = condense(Numbers(), batch_size=8, keep=0.4, every=2, stages=3, seed=3, **workers)
    assert isinstance(loader, DataLoader) and type(condenser) is KnowledgeCondenser
    twin = KnowledgeCondenser(SIZE, keep=0.4, every=2, stages=3, seed=3)
    sampler, items = CondensedSampler(twin, seed=3), IndexedDataset(Numbers())
    for epoch in range(7):
        sampler.set_epoch(epoch)
        entries, expected = [*sampler], [items[entry] for entry in sampler]
        lengths = len(loader)
        (batches,) = train(loader, condenser, 1)
        assert [[number for batch in batches for number in batch[part]] for part in range(3)] == [
            [item[0][0, 0, 0].item() for item in expected],
            [item[1] for item in expected],
            [item[2] for item in expected],
        ]
        sizes = [len(batch[2]) for batch in batches]
        assert max(sizes) <= 8 and max(sizes) - min(sizes) <= 1 and len(sizes) == lengths == -(-len(entries) // 8)
        own = torch.tensor([entry[0] for entry in entries])
        twin.update(own, value_of(own, epoch))
        twin.step()
        assert condenser.kept.tolist() == twin.kept.tolist()
    assert condenser.stage == 3 and condenser.mix_trees and len(condenser.kept) == int(0.4 * SIZE)


def test_order_is_new_in_every_epoch_and_goes_on_after_a_resume():
    loader, condenser = condense(Numbers(), batch_size=9, keep=0.5, every=2)
    first = [[index for _, _, index in epoch] for epoch in train(loader, condenser, 3)]
    assert len({str(epoch) for epoch in first}) == 3
    state, rest = condenser.state_dict(), train(loader, condenser, 3)
    loader, condenser = condense(Numbers(), batch_size=9, keep=0.5, every=2)
    condenser.load_state_dict(state)
    assert train(loader, condenser, 3) == rest
    other = train(*condense(Numbers(), batch_size=9, keep=0.5, every=2, seed=1), 1)
    assert [batch[2] for batch in other[0]] != first[0]
    ascending = train(*condense(Numbers(), batch_size=9, shuffle=False), 1)
    assert [index for batch in ascending[0] for index in batch[2]] == [*range(SIZE)]


def test_caller_generators_are_not_touched():
    class Random(Numbers):
        def __getitem__(self, index):
            return torch.rand(1, 2, 2) + random.random() + np.random.rand(), 0

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    condense(Random(), batch_size=4)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


@pytest.mark.parametrize(
    ("dataset", "pixels"),
    [
        pytest.param(Numbers(7), range(7), id="map-style"),
        pytest.param(Numbers(7, own=True), range(7), id="own index"),
        pytest.param(Subset(Numbers(own=True), [30, 4, 11, 2]), [30, 4, 11, 2], id="subset of own index"),
        pytest.param(
            ConcatDataset([Numbers(3), Subset(Numbers(own=True), [8, 9])]), [0, 1, 2, 8, 9], id="concatenation"
        ),
        pytest.param([Numbers()[i] for i in (5, 6, 7)], [5, 6, 7], id="list"),
        pytest.param(
            TensorDataset(torch.arange(4.0).reshape(4, 1, 1, 1), torch.arange(4), torch.arange(4) + 7),
            range(4),
            id="tensors",
        ),
        pytest.param(IndexedDataset(Numbers(5)), range(5), id="indexed"),
    ],
)
def test_index_is_the_position_in_the_data_set(dataset, pixels):
    loader, condenser = condense(dataset, batch_size=2)
    found = {index: x for xs, _, indices in loader for x, index in zip(xs[:, 0, 0, 0], indices.tolist(), strict=True)}
    assert {index: int(x) for index, x in found.items()} == dict(enumerate(pixels))
    assert condenser.num_samples == len(pixels)


def test_transform_runs_after_mixing_and_on_the_first_epoch():
    loader, condenser = condense(Numbers(), batch_size=8, transform=lambda x: -x, keep=0.5, every=1, epsilon=1.0)
    for x, label, index in loader:
        assert torch.equal(-x[:, 0, 0, 0].long(), index) and torch.equal(label, index % 5)
        condenser.update(index, value_of(index, 0))
    condenser.step()
    mixed = {index for index, tree in condenser.mix_trees.items() if isinstance(tree, tuple)}
    changed = {
        i for x, _, index in loader for i, p in zip(index.tolist(), x[:, 0, 0, 0].tolist(), strict=True) if p != -i
    }
    assert changed and changed <= mixed


def test_drop_last_gives_full_batches_only_and_refuses_none():
    with pytest.warns(
        RuntimeWarning, match="no batch once the set has shrunk to 4 samples per process: batch_size is 8"
    ):
        loader, condenser = condense(Numbers(), batch_size=8, drop_last=True, keep=0.1, every=1, schedule="immediate")
    assert [len(index) for _, _, index in loader] == [8] * 5 and len(loader) == 5
    condenser.update(torch.arange(SIZE), torch.rand(SIZE))
    condenser.step()
    with pytest.raises(ValueError, match="leaves no batch: an epoch has 4 samples per process, and batch_size is 8"):
        iter(loader)


@pytest.mark.parametrize(
    ("kind", "options"), [(RandomCondenser, {"every": 1}), (ImportanceCondenser, {}), (InfoBatch, {"epochs": 9})]
)
def test_other_condensers_select_their_own_samples(kind, options):
    loader, condenser = condense(Numbers(), batch_size=8, condenser=kind, keep=0.5, seed=7, **options)
    assert type(condenser) is kind and condenser.config["seed"] == 7
    train(loader, condenser, 2)
    visited = sorted(i for _, _, index in loader for i in index.tolist())
    assert visited == sorted(condenser.kept.tolist()) and len(visited) < SIZE


class Passes(KnowledgeCondenser):
    """A condenser with an `__init__` of its own that passes all options on."""

    def __init__(self, num_samples, **options):
        super().__init__(num_samples, **options)


class Draws(KnowledgeCondenser):
    """A condenser without a seed."""

    def __init__(self, num_samples, *, keep=0.5):
        super().__init__(num_samples, keep=keep, every=1, stages=1)


def test_condenser_gets_the_options_that_its_constructor_takes():
    _, condenser = condense(Numbers(), batch_size=8, condenser=Passes, keep=0.3, every=5, seed=4)
    assert (condenser.config["keep"], condenser.config["every"], condenser.config["seed"]) == (0.3, 5, 4)
    _, condenser = condense(Numbers(), batch_size=8, condenser=Draws, keep=0.3, seed=4)
    assert (condenser.config["keep"], condenser.config["seed"]) == (0.3, 0)
    with pytest.raises(TypeError, match="every is no option of Draws or DataLoader"):
        condense(Numbers(), batch_size=8, condenser=Draws, every=2)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())

    def __len__(self):
        return 3


DICTIONARY = [{"x": torch.zeros(1), "label": 0}]


@pytest.mark.parametrize(
    ("dataset", "options", "error", "message"),
    [
        (Stream(), {}, TypeError, "dataset must have a length and integer items, got the iterable Stream"),
        (iter([]), {}, TypeError, "dataset must have a length and integer items, got list_iterator"),
        ([], {}, ValueError, "dataset must hold at least one sample, got none"),
        (DICTIONARY, {}, TypeError, r"pairs \(x, label\) or \(x, label, index\), got dict at index 0"),
        ([(torch.zeros(1), 0, "mask")], {}, TypeError, "got 3 entries at index 0"),
        ([(torch.zeros(1), 0, True)], {}, TypeError, "got 3 entries at index 0"),
        ([(torch.zeros(1), 0, torch.zeros(1))], {}, TypeError, "got 3 entries at index 0"),
        ([("text", 0)], {}, TypeError, "items that are mixed must both be tensors.*; set epsilon=0"),
        (IndexedDataset(Numbers()), {"transform": abs}, TypeError, "transform must be None for an IndexedDataset"),
        (Numbers(), {"batch_size": 0}, ValueError, "batch_size must be an integer >= 1, got 0"),
        (Numbers(), {"seed": -1}, ValueError, "seed must be an integer in"),
        (Numbers(), {"shuffle": 1}, TypeError, "shuffle must be True or False, got int 1"),
        (Numbers(), {"kep": 0.5}, TypeError, "kep is no option of KnowledgeCondenser or DataLoader: did you mean keep"),
        (Numbers(), {"num_worker": 1}, TypeError, "num_worker is no option .*: did you mean num_workers"),
        (Numbers(), {"sampler": None}, TypeError, "condense makes the loader's sampler itself, got sampler=None"),
        (Numbers(), {"condenser": "random"}, TypeError, "condenser must be KnowledgeCondenser or a subclass, got"),
        (
            Numbers(),
            {"condenser": ImportanceCondenser, "every": 3},
            TypeError,
            "every is no option of ImportanceCondenser",
        ),
        (Numbers(), {"keep": 2}, ValueError, r"keep must be a number in \(0, 1\], got 2"),
        (Numbers(), {"num_workers": -1}, ValueError, "num_workers"),
    ],
)
def test_bad_argument_is_named_before_anything_is_loaded(dataset, options, error, message):
    with pytest.raises(error, match=message):
        condense(dataset, **{"batch_size": 4, **options})


def test_items_of_different_shapes_fail_in_the_first_epoch_unless_nothing_is_mixed():
    ragged = [(torch.zeros(1, 2 + i, 2), 0) for i in range(3)]
    loader, _ = condense(ragged, batch_size=2)
    with pytest.raises(ValueError, match="raw items that are mixed must be alike"):
        list(loader)
    loader, _ = condense(ragged, batch_size=1, epsilon=0.0)
    assert sorted(x.shape[2] for x, _, _ in loader) == [2, 3, 4]


# --- two processes -----------------------------------------------------------------------------------------------------


def plain(loader):
    return loader


def accelerated(loader, **options):
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**options)).prepare(loader)


def dispatched(loader):
    return accelerated(loader, dispatch_batches=True)


def fabric(loader):
    lightning_fabric = pytest.importorskip("lightning_fabric")
    from lightning_fabric.plugins.environments import LightningEnvironment
    from lightning_fabric.strategies import DDPStrategy

    os.environ |= {"NODE_RANK": "0"}
    strategy = DDPStrategy(process_group_backend="gloo", cluster_environment=LightningEnvironment())
    prepared = lightning_fabric.Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy)
    prepared.launch()
    return prepared.setup_dataloaders(loader)


@pytest.mark.slow
@pytest.mark.parametrize("prepare", [plain, accelerated, dispatched, fabric])
@pytest.mark.parametrize("workers", [0, 1])
def test_two_processes_share_every_epoch_and_choose_the_same_samples(prepare, workers, tmp_path):
    """Every kept sample is visited once, by one of them; all else is marked -1. The kept set equals that of one process."""
    if prepare is fabric:
        pytest.importorskip("lightning_fabric")
    if prepare is dispatched and workers:
        pytest.skip("only rank 0 loads")
    epochs = 5

    def job(rank):
        torch.set_num_threads(1)
        timeout = timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=rank, world_size=2, timeout=timeout)
        loader, condenser = condense(Numbers(), batch_size=4, keep=0.4, every=1, stages=3, seed=3, num_workers=workers)
        prepared, seen = prepare(loader), []
        for _ in range(epochs):
            expected, batches = len(prepared), []
            for x, label, index in prepared:
                condenser.update(index, value_of(index, condenser.epoch))
                batches.append((x[:, 0, 0, 0].tolist(), label.tolist(), index.tolist()))
            assert len(batches) == expected
            seen.append(batches)
            condenser.step()
        torch.save({"seen": seen, "kept": condenser.kept.tolist()}, tmp_path / f"{rank}.pt")
        dist.barrier()

    assert Crew(job, 2).wait() == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    single_loader, single = condense(Numbers(), batch_size=4, keep=0.4, every=1, stages=3, seed=3)
    for epoch in range(epochs):
        kept = sorted(single.kept.tolist())
        sizes = [[len(batch[2]) for batch in each["seen"][epoch]] for each in ranks]
        indices = [i for each in ranks for batch in each["seen"][epoch] for i in batch[2]]
        assert sorted(i for i in indices if i >= 0) == kept and indices.count(-1) == len(kept) % 2
        assert sizes[0] == sizes[1] and max(sizes[0]) <= 4 and max(sizes[0]) - min(sizes[0]) <= 1
        train(single_loader, single, 1)
    assert ranks[0]["kept"] == ranks[1]["kept"] == single.kept.tolist()
    orders = {str([batch[2] for batch in epoch]) for epoch in ranks[0]["seen"]}
    assert len(orders) == epochs and single.stage == epochs
