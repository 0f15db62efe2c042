"""Tests of `KnowledgeCondenser.step` with real processes: one collective, equal results, no visit lost if a rank dies."""

import os
import signal
import tempfile
from collections import Counter
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import Crew
from torch.utils._python_dispatch import TorchDispatchMode

from kcd_ext.condensation import CondensedSampler, ImportanceCondenser, InfoBatch, KnowledgeCondenser

WORLD = 2
SAMPLES = 101
EPOCHS = 6
TIME_LIMIT = 120  # seconds: to detect a hang, not to measure speed

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


class CollectiveCounter(TorchDispatchMode):
    """A counter of every collective operator below torch.distributed's Python functions."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


def value_of(index, epoch):
    """Return a function of both: without ties in every third epoch, with many in the others."""
    raw = torch.sin(index.double() * 12.9898 + epoch * 78.233).abs()
    return raw if epoch % 3 == 0 else (raw * 4).round() / 4


def new_condenser(**options):
    return KnowledgeCondenser(SAMPLES, keep=0.5, every=2, stages=3, **options)


def new_infobatch():
    return InfoBatch(SAMPLES, epochs=EPOCHS)


def new_importance():
    return ImportanceCondenser(SAMPLES, keep=0.4, seed=3)


def train(condenser, rank, world_size):
    sampler, counted = CondensedSampler(condenser, seed=1, rank=rank, world_size=world_size), []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        index = torch.tensor([i for i, _ in sampler])
        with CollectiveCounter() as during_update:
            for part in index.split(16):
                condenser.update(part, value_of(part, epoch))
        with CollectiveCounter() as during_step:
            condenser.step()
        counted.append((dict(during_update.calls), dict(during_step.calls)))
    return counted


def outcome(condenser, counted=None):
    return {"state": condenser.state_dict(), "counted": counted}


def agree(rank, folder):
    """Train with the default group, which the condenser finds itself."""
    condenser = new_condenser()
    torch.save(outcome(condenser, train(condenser, rank, WORLD)), folder / f"{rank}.pt")


def agree_on_draws(new, rank, folder):
    """Train with a selection and weights that change every epoch."""
    condenser = new()
    counted, chosen = [], []
    sampler = CondensedSampler(condenser, seed=1, rank=rank, world_size=WORLD)
    for epoch in range(EPOCHS):
        chosen.append(epoch_of_draws(condenser, sampler, epoch))
        with CollectiveCounter() as during_step:
            condenser.step()
        counted.append(dict(during_step.calls))
    torch.save({**outcome(condenser, counted), "chosen": chosen}, folder / f"{rank}.pt")


def epoch_of_draws(condenser, sampler, epoch):
    """Train on a sampler's share; return the visited indices, the kept set and all weights."""
    sampler.set_epoch(epoch)
    index = torch.from_numpy(sampler.order()[0])
    condenser.update(index, value_of(index, epoch))
    return {"visited": index, "kept": condenser.kept, "weight": condenser.sample_weight}


def train_alone(rank, folder):
    """Train with a group of one rank, which keeps a condenser local whatever the default group is."""
    mine = [dist.new_group([r]) for r in range(WORLD)][rank]
    condenser = new_condenser(group=mine)
    torch.save(outcome(condenser, train(condenser, 0, 1)), folder / f"{rank}.pt")


def lose_a_peer(rank, folder):
    """Kill rank 1 with its visits; rank 0 gets an error and keeps its own visits."""
    condenser = new_condenser()
    condenser.update(torch.arange(SAMPLES), torch.rand(SAMPLES))
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    before = condenser.state_dict()
    try:
        condenser.step()
    except RuntimeError:
        torch.save({"before": before, "after": condenser.state_dict()}, folder / "0.pt")


def run(job):
    """Run `job` in WORLD processes; return their exit codes and what they saved. Kill one that hangs."""

    def process(rank):
        torch.set_num_threads(1)
        rendezvous, timeout = f"file://{folder}/rendezvous", timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD, timeout=timeout)
        job(rank, Path(folder))
        if job is not lose_a_peer:
            dist.barrier()

    with tempfile.TemporaryDirectory() as folder:
        codes = Crew(process, WORLD).wait(TIME_LIMIT, together=False)
        return codes, {path.stem: torch.load(path, weights_only=True) for path in Path(folder).glob("*.pt")}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, entry in one.items():
        same = torch.equal(entry, other[name]) if isinstance(entry, torch.Tensor) else entry == other[name]
        assert same, name


def test_ranks_equal_one_process_bit_for_bit_with_one_all_reduce_per_step():
    codes, saved = run(agree)
    assert codes == [0, 0]
    single = new_condenser()
    assert train(single, 0, 1) == [({}, {})] * EPOCHS
    assert single.stage == 3 and single.mix_trees
    for rank in ("0", "1"):
        assert saved[rank]["counted"] == [({}, {"allreduce_": 1})] * EPOCHS
        assert_same(saved[rank]["state"], single.state_dict())


@pytest.mark.parametrize("new", [new_infobatch, pytest.param(new_importance, marks=pytest.mark.slow)])
def test_ranks_select_the_same_samples_and_weights_with_one_all_reduce_per_epoch(new):
    codes, saved = run(partial(agree_on_draws, new))
    assert codes == [0, 0]
    single = new()
    sampler = CondensedSampler(single, seed=1)
    sizes = []
    for epoch in range(EPOCHS):
        expected = epoch_of_draws(single, sampler, epoch)
        of_rank = [saved[rank]["chosen"][epoch] for rank in ("0", "1")]
        visited = torch.cat([chosen.pop("visited") for chosen in of_rank])
        assert sorted(visited[visited >= 0].tolist()) == sorted(expected.pop("visited").tolist())
        for chosen in of_rank:
            assert_same(chosen, expected)
        sizes.append(len(expected["kept"]))
        single.step()
    assert sizes[0] == SAMPLES and max(sizes[1:5]) < SAMPLES
    assert sizes[5] == (
        SAMPLES if new is new_infobatch else int(0.4 * SAMPLES)
    )  # annealed from epoch floor(0.875 * 6) on
    for rank in ("0", "1"):
        assert saved[rank]["counted"] == [{"allreduce_": 1}] * EPOCHS
        assert_same(saved[rank]["state"], single.state_dict())


def test_group_of_one_rank_does_not_communicate():
    codes, saved = run(train_alone)
    assert codes == [0, 0]
    for rank in ("0", "1"):
        assert saved[rank]["counted"] == [({}, {})] * EPOCHS
    assert_same(saved["0"]["state"], saved["1"]["state"])


def test_killed_rank_loses_no_visit_of_the_other():
    codes, saved = run(lose_a_peer)
    assert codes[1] == -signal.SIGKILL
    assert "0" in saved, "step() did not raise when its peer was gone"
    assert_same(saved["0"]["before"], saved["0"]["after"])
    assert saved["0"]["after"]["pending"][:, 1].sum() == SAMPLES
