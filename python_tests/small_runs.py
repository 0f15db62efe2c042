"""Small data, networks and runs for tests, and comparisons of their results."""

import random
from collections.abc import Callable, Container, Iterable, Sequence

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kcd_ext import files
from kcd_ext.data.images import ImageSet
from kcd_ext.data.views import Views
from kcd_ext.methods import Batch
from kcd_ext.reports.comparison import Comparison
from kcd_ext.training import Summary, checkpoint

CLASSES = 4
# Options that make a method cheap. A method without an entry is tested with its defaults.
OPTIONS = {
    "crd": {"negatives": 12, "dimension": 5},
    "sskd": {"head_epochs": 2, "head_lr": 0.02},
    "pwkd": {"teacher_epochs": 2, "teacher_lr": 0.02, "widths": "0.5,1"},
    "iekd": {"factor_epochs": 2, "factor_lr": 0.02},
    "crd+kd+fitnet": {"negatives": 12, "dimension": 5},
}


# One network of each family.
FAMILIES = ("cnn_large", "mobilenet_v2", "resnet8x4", "shufflenet_v1", "shufflenet_v2", "vgg11", "wrn_16_2")


def mostly_slow(parameters: Iterable, kept: Container = FAMILIES) -> list:
    """Return the parameters of a test, with the mark `slow` on those that are not in `kept`."""
    return [x if x in kept else pytest.param(x, marks=pytest.mark.slow) for x in parameters]


def images(size: int, seed: int = 0) -> ImageSet:
    """Return images with noise around one image per class; views crop and flip them in every epoch."""
    generator = np.random.default_rng(seed)
    labels = np.arange(size) % CLASSES
    centres = np.random.default_rng(99).integers(40, 200, (CLASSES, 6, 6, 1))
    pixels = np.clip(centres[labels] + generator.integers(-60, 60, (size, 6, 6, 1)), 0, 255).astype(np.uint8)
    return ImageSet(pixels, labels, Views((0.5,), (0.25,), padding=1 - seed, flip=not seed))


def shaken(image):
    """Transform an image with random numbers of torch, Python and NumPy."""
    x = torch.from_numpy(image.transpose(2, 0, 1)) / 255
    return x + 0.1 * torch.randn(()) + 0.1 * random.random() + 0.1 * np.float32(np.random.rand())


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """Return `build()`, called with torch's generator seeded; the caller's generator state is restored."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def network(seed: int, width: int = 6, dropout: float = 0.3) -> nn.Module:
    """Return a network for `images`. Its `stages` end in maps with an even number of channels, which all methods accept."""

    def build():
        convolution = nn.Conv2d(1, width, 3, 2, padding=1)
        layers = (
            convolution,
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(9 * width, CLASSES),
        )
        return nn.Sequential(*layers)

    built = seeded(seed, build)
    built.stages = ("2",)
    return built


class Samples:
    """The training set that `Method.prepare` gets."""

    def __init__(self, x, label, batch_size=9):
        self.x, self.label, self.batch_size = x, label, batch_size

    def __iter__(self):
        for index in torch.arange(len(self.label)).split(self.batch_size):
            yield Batch(self.x[index], self.label[index], index)

    def at(self, index, **more):
        index = torch.as_tensor(index)
        return Batch(self.x[index.clamp(min=0)], self.label[index.clamp(min=0)], index, **more)


class NoWait(TorchDispatchMode):
    """A dispatch mode that raises for every operator that makes the host wait for the device."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        dynamic = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None and len(args) < 2
        if name in self.waiting or by_mask or dynamic:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


class StopError(Exception):
    """The error with which `stop_after` stops a run."""


def stop_after(count: int) -> Callable[[dict], None]:
    """Return a `progress` that stops a run after `count` epochs, pretraining included."""
    lines = []

    def progress(line):
        lines.append(line)
        if len(lines) == count:
            raise StopError

    return progress


def comparison(summaries: Sequence[Summary], **more: object) -> Comparison:
    """Return the content of a report of these runs, with the fields `more`."""
    shown = {"title": "t", "baseline": "kd", "notes": [], "differences": [], "ranking": None, "ranked": "kc-kd, seed 3"}
    shown |= {"class_names": (), "config": {}, "folders": {}}
    return Comparison(**{**shown, "summaries": summaries, **more})


def final(folder) -> dict:
    """Return the final state of a run: weights, optimizer, value table, mixes, and metrics without times."""
    state = checkpoint.load(folder / "checkpoint")
    lines = [
        [{name: x for name, x in line.items() if not name.endswith("seconds")} for line in files.read_lines(path)]
        for path in sorted(folder.glob("*.jsonl"))
    ]
    weights = (folder / "student.safetensors").read_bytes()
    return {"weights": weights, "model": dict(state.model), **state.training, "lines": lines}


def assert_same(one, other, path="run") -> None:
    """Assert that two values are equal bit for bit, also inside dictionaries."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for name in one:
            assert_same(one[name], other[name], f"{path}.{name}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), path
    else:
        assert one == other, path
