"""Runs that are killed repeatedly at random moments, on one process and on two, and resume bit for bit."""

import random
import time

import pytest
import torch
from processes import Crew
from small_runs import OPTIONS, assert_same, final, images, network, shaken, stop_after

from kcd_ext import IndexedDataset, files, methods
from kcd_ext.training import Condense, Recipe, checkpoint, distill

EPOCHS = 30
# Options that reach code paths that the defaults do not.
VARIANTS = {
    "pwkd": {"widths": "0.25,0.5,0.75,1", "widths_a_step": 3},
    "iekd": {"split": "permuted"},
    "kr": {"student_layers": "0+2", "teacher_layers": "2", "kd_weight": 0.5},
}


def recipe(method, epochs=EPOCHS, **changes):
    condense = Condense(**({"keep": 0.5, "stages": 6} | changes.pop("condense", {})))
    # Longer than elsewhere, so that some processes are killed in pretraining.
    long = {name: 4 for name in OPTIONS.get(method, {}) if name.endswith("_epochs")}
    options = OPTIONS.get(method, {}) | VARIANTS.get(method, {}) | long | changes.pop("options", {})
    return Recipe(method, options, condense, epochs=epochs, batch_size=8, lr=0.02, device="cpu", seed=5, **changes)


IMPORTANCE = {"keep": 0.5, "selection": "importance", "value": "kl"}
BY_LOSS = {"keep": 0.5, "value": "loss"}


def run(output, method, loaded=False, **changes):
    torch.set_num_threads(1)
    torch.manual_seed(random.SystemRandom().randrange(2**32))  # the caller's generator must not matter
    train, test = (IndexedDataset(data, shaken) if loaded else data for data in (images(69), images(30, seed=1)))
    teacher = network(2, width=10) if methods.build(method).needs_teacher else None
    distill(network(1), teacher, train, test, recipe(method, **changes), output=output, resume=True)


def epochs_done(folder):
    """Return the finished epochs, pretraining included."""
    paths = (folder / "pretraining.jsonl", folder / "metrics.jsonl")
    return sum(len(files.read_lines(path)) for path in paths if path.exists())


KILLS = [
    pytest.param("kd", 1, False, 3, {}),
    *(pytest.param(name, 1, False, 3, {}, marks=pytest.mark.slow) for name in methods.REGISTRY if name != "kd"),
    pytest.param("kd", 1, True, 4, {}, marks=pytest.mark.slow),
    pytest.param("crd", 2, False, 4, {}, marks=pytest.mark.slow),
    pytest.param("kd", 1, False, 3, {"condense": BY_LOSS}, marks=pytest.mark.slow),
    pytest.param("kd", 2, False, 3, {"condense": IMPORTANCE}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("method", "processes", "loaded", "kills", "changes"), KILLS)
def test_run_killed_repeatedly_equals_an_uninterrupted_run(tmp_path, method, processes, loaded, kills, changes):
    reference, interrupted = tmp_path / "reference", tmp_path / "interrupted"
    assert Crew(lambda rank: run(reference, method, loaded, **changes), processes).wait() == [0] * processes

    rng, killed = random.Random(method), []
    for kill in range(kills):
        crew = Crew(lambda rank: run(interrupted, method, loaded, **changes), processes)
        # The first kill comes before the first epoch, the others within an epoch or while it is written.
        before, further = epochs_done(interrupted), kill and rng.randrange(1, 6)
        deadline = time.monotonic() + 60
        while epochs_done(interrupted) < before + further:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(rng.random() * 0.03)
        crew.kill()
        killed.append(epochs_done(interrupted))
        assert not (interrupted / "summary.json").exists()
    assert killed == sorted(killed) and killed[-1] >= kills - 1
    assert Crew(lambda rank: run(interrupted, method, loaded, **changes), processes).wait() == [0] * processes

    assert_same(final(interrupted), final(reference))
    saved = checkpoint.load(reference / "checkpoint").training["condenser"]
    steps = (
        (EPOCHS, 0) if changes.get("condense") == IMPORTANCE else (6, 21)
    )  # the kills could have lost condensation state
    assert saved["stage"] == steps[0] and len(saved["mixed"]) >= steps[1]


@pytest.mark.slow
def test_run_resumes_with_another_number_of_processes(tmp_path):
    """It keeps value table, kept set, mixes and momentum, and steps have as many samples. It is not bit for bit."""
    half = {"condense": {"every": 3}, "epochs": 8}
    assert Crew(lambda rank: _stop_after(4, tmp_path, gradient_accumulation=2, **half)).wait() == [1]
    before = checkpoint.load(tmp_path / "checkpoint")
    assert before.epoch == 4
    assert Crew(lambda rank: run(tmp_path, "kd", **half), processes=2).wait() == [0, 0]
    lines = files.read_lines(tmp_path / "metrics.jsonl")
    assert lines[:4] == before.run["history"] and [line["padding"] for line in lines] == [0] * 6 + [1, 1]
    kept = [69] * 3 + [64] * 3 + [59] * 2
    assert [line["samples"] for line in lines] == kept
    table = checkpoint.load(tmp_path / "checkpoint").training["condenser"]
    assert table["counts"].sum() == sum(kept)


def _stop_after(last, output, **changes):
    torch.set_num_threads(1)
    distill(
        network(1),
        network(2, width=10),
        images(69),
        images(30, seed=1),
        recipe("kd", **changes),
        output=output,
        progress=stop_after(last),
    )
