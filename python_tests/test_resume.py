"""Runs that are killed at random moments, over and over, on one process and on two, and go on as if nothing had been."""

import random
import time

import numpy as np
import pytest
import torch
from processes import Crew
from torch import nn

from kcd_ext import IndexedDataset
from kcd_ext.data.images import ImageSet
from kcd_ext.data.views import Views
from kcd_ext.training import Condense, Recipe, checkpoint, distill, storage

EPOCHS = 72


def images(size, seed=0):
    """Noise around one image a class, cropped and flipped anew in every epoch."""
    generator = np.random.default_rng(seed)
    labels = np.arange(size) % 4
    centres = np.random.default_rng(99).integers(40, 200, (4, 6, 6, 1))
    pixels = np.clip(centres[labels] + generator.integers(-60, 60, (size, 6, 6, 1)), 0, 255).astype(np.uint8)
    return ImageSet(pixels, labels, Views((0.5,), (0.25,), padding=1 - seed, flip=not seed))


def network(seed, width=6):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, 2, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(9 * width, 4),
        )


METHODS = {
    "kd": {},
    "pkt": {},
    "crd": {"negatives": 12, "dimension": 5},
    "sskd": {"head_epochs": 12, "head_lr": 0.02},
    "pwkd": {"teacher_epochs": 12, "teacher_lr": 0.02, "widths_a_step": 3},
    "iekd": {"factor_epochs": 12, "factor_lr": 0.02, "student_layer": "2", "teacher_layer": "2", "split": "permuted"},
    "ie-dml": {"student_layer": "2", "peer_layer": "2"},
    "kr": {"student_layers": "0+2", "teacher_layers": "2", "kd_weight": 0.5},
}


def recipe(method, epochs=EPOCHS, **changes):
    condense = Condense(keep=0.5, stages=6, **changes.pop("condense", {}))
    options = METHODS[method] | changes.pop("options", {})
    return Recipe(method, options, condense, epochs=epochs, batch_size=8, lr=0.02, device="cpu", seed=5, **changes)


def shaken(image):
    """Random in every way that a transform can be."""
    x = torch.from_numpy(image.transpose(2, 0, 1)) / 255
    return x + 0.1 * torch.randn(()) + 0.1 * random.random() + 0.1 * np.float32(np.random.rand())


def run(output, method, loaded=False, **changes):
    torch.set_num_threads(1)
    torch.manual_seed(random.SystemRandom().randrange(2**32))  # the caller's generator plays no part
    train, test = (IndexedDataset(data, shaken) if loaded else data for data in (images(69), images(30, seed=1)))
    distill(network(1), network(2, width=10), train, test, recipe(method, **changes), output=output, resume=True)


def epochs_done(folder):
    """Of pretraining and of training."""
    files = (folder / "pretraining.jsonl", folder / "metrics.jsonl")
    return sum(len(storage.read_lines(path)) for path in files if path.exists())


def final(folder):
    """All that a run has come to: weights, optimizer, table, mixes, metrics without the clock's."""
    state = checkpoint.load(folder / "checkpoint")
    lines = [
        [{name: x for name, x in line.items() if not name.endswith("seconds")} for line in storage.read_lines(path)]
        for path in sorted(folder.glob("*.jsonl"))
    ]
    return {
        "weights": (folder / "student.safetensors").read_bytes(),
        "model": dict(state.model),
        **state.training,
        "lines": lines,
    }


def assert_same(one, other, path="run"):
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for name in one:
            assert_same(one[name], other[name], f"{path}.{name}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), path
    else:
        assert one == other, path


@pytest.mark.parametrize(
    ("method", "processes", "loaded", "kills"),
    [
        ("kd", 1, False, 10),
        ("kd", 1, True, 10),
        ("crd", 2, False, 10),
        ("sskd", 1, False, 10),
        ("pwkd", 1, False, 4),
        ("iekd", 1, False, 4),
        ("ie-dml", 1, False, 2),
        ("kr", 1, True, 4),
    ],
)
def test_killed_over_and_over_it_ends_as_if_it_never_was(tmp_path, method, processes, loaded, kills):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert Crew(lambda rank: run(whole, method, loaded), processes).wait() == [0] * processes

    chance, killed = random.Random(method), []
    for _ in range(kills):
        crew = Crew(lambda rank: run(torn, method, loaded), processes)
        # From before the first epoch of this start on; then anywhere within an epoch, or while it is written down.
        before, further = epochs_done(torn), chance.randrange(6)
        give_up = time.monotonic() + 60
        while epochs_done(torn) < before + further:
            assert time.monotonic() < give_up
            time.sleep(0.001)
        time.sleep(chance.random() * 0.03)
        crew.kill()
        killed.append(epochs_done(torn))
        assert not (torn / "summary.json").exists()
    assert killed == sorted(killed) and killed[-1] > kills // 2
    assert Crew(lambda rank: run(torn, method, loaded), processes).wait() == [0] * processes

    assert_same(final(torn), final(whole))
    saved = checkpoint.load(whole / "checkpoint").training["condenser"]
    assert saved["stage"] == 6 and len(saved["mixed"]) > 20  # there was something to lose


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """Not bit for bit, but with table, kept set, mixes and momentum; steps of as many samples."""
    half = {"condense": {"every": 3}, "epochs": 8}
    assert Crew(lambda rank: _stop_after(4, tmp_path, gradient_accumulation=2, **half)).wait() == [1]
    before = checkpoint.load(tmp_path / "checkpoint")
    assert before.epoch == 4
    assert Crew(lambda rank: run(tmp_path, "kd", **half), processes=2).wait() == [0, 0]
    lines = storage.read_lines(tmp_path / "metrics.jsonl")
    assert lines[:4] == before.run["history"] and [line["padding"] for line in lines] == [0] * 6 + [1, 1]
    kept = [69] * 3 + [64] * 3 + [59] * 2
    assert [line["samples"] for line in lines] == kept
    table = checkpoint.load(tmp_path / "checkpoint").training["condenser"]
    assert table["counts"].sum() == sum(kept)


class _StopError(Exception):
    pass


def _stop_after(last, output, **changes):
    def stop(line):
        if line["epoch"] == last:
            raise _StopError

    torch.set_num_threads(1)
    distill(
        network(1),
        network(2, width=10),
        images(69),
        images(30, seed=1),
        recipe("kd", **changes),
        output=output,
        progress=stop,
    )
