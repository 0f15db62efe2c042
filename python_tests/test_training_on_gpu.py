"""A complete training run on a GPU. This imports nothing of the command line, so a machine without its packages can run it."""

import torch
from backends import on_gpu
from torch import nn
from torch.utils.data import TensorDataset

from kcd_ext.training import Condense, Recipe, distill

FEATURES, CLASSES = 6, 4


def clouds(size, seed=0):
    """Return a data set with one cloud of points per class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % CLASSES
    centres = 2 * torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(99))
    return TensorDataset(centres[labels] + torch.randn(size, FEATURES, generator=generator), labels)


def network(seed, hidden=8):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(FEATURES, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))


@on_gpu
def test_accuracy_on_a_gpu_matches_the_cpu():
    accuracy = {}
    for device in ("cpu", "cuda"):
        common = {"epochs": 6, "batch_size": 8, "device": device, "seed": 3}
        teacher = network(2, hidden=16)
        distill(teacher, None, clouds(200), clouds(100, 1), Recipe(method="ce", **common))
        recipe = Recipe(condense=Condense(keep=0.5, every=1, stages=3), **common)
        accuracy[device] = distill(network(1), teacher, clouds(200), clouds(100, 1), recipe).accuracy_last
    assert accuracy["cuda"] > 85 and abs(accuracy["cuda"] - accuracy["cpu"]) < 3
