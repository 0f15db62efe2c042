"""Where batches come from: a loader over any data set, or images that lie on the training device as a whole."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..condensation import CondensedSampler, KnowledgeCondenser
from ..condensation.table import SKIP
from ..data import IndexedDataset
from ..data.images import ImageSet
from ..methods import Batch


class Feed(Protocol):
    """The batches of a data set, on the training device. Entries are what a sampler chooses for an epoch."""

    def entries(self, sampler: CondensedSampler) -> Sequence:
        """What this process trains on in the sampler's epoch, in order; repeats that only pad included."""

    def epoch(self, entries: Sequence, batches: Sequence[slice], seed: int, epoch: int) -> Iterator[Batch]:
        """The training batches of these entries."""

    def plain(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Samples rank, rank + world_size, ... once each, by ascending index, mixed with nothing.

        So that all processes have equally many there can be repeats in the end, marked by index -1.
        """


def feed_of(
    dataset: IndexedDataset | ImageSet, condenser: KnowledgeCondenser | None, device: torch.device, num_workers: int
) -> Feed:
    """The feed for this data set. `condenser` says what mixes are made of; None: there are none (a test set)."""
    if isinstance(dataset, ImageSet):
        return ResidentFeed(dataset, condenser, device)
    return LoadedFeed(dataset, device, num_workers)


class Samples:
    """A training set as `Method.prepare` sees it, as often as it asks."""

    def __init__(self, feed: Feed, batch_size: int):
        self.feed = feed
        self.batch_size = batch_size
        self.labels = getattr(feed, "labels", None)  # of images in memory: nobody has to ask for them batch by batch

    def __iter__(self) -> Iterator[Batch]:
        return self.feed.plain(self.batch_size)


def cut(count: int, size: int) -> list[slice]:
    """`count` samples in as many parts as it takes for none to be larger than `size`; no two differ by more than one.

    None is a single sample, which batch normalisation cannot train on, unless `size` or `count` is 1: of an odd number
    in pairs one part has three.

    Stages have all sizes, and whole batches would leave all sorts of rests. A step on five samples counts as much as
    one on 64, batch normalisation takes its statistics of them, and a loss over pairs of samples is of another size:
    such steps can undo what a student has learnt.
    """
    number = -(-count // size) if size == 1 else min(-(-count // size), max(1, count // 2))
    ends = [count * part // number for part in range(number + 1)]
    return [slice(*pair) for pair in pairwise(ends)]


class LoadedFeed:
    """Items are loaded one by one, transformed by the data set, and collated."""

    def __init__(self, dataset: IndexedDataset, device: torch.device, num_workers: int):
        self.dataset = dataset
        self.device = device
        self.options = {"num_workers": num_workers, "pin_memory": device.type == "cuda"}

    def entries(self, sampler: CondensedSampler) -> list:
        """(index, recipe) for each; see `Feed`."""
        return list(sampler)

    def epoch(self, entries: Sequence, batches: Sequence[slice], seed: int, epoch: int) -> Iterator[Batch]:
        """See `Feed`. What the transforms draw comes from the generators that the trainer has seeded."""
        return self._load([entries[part] for part in batches])

    def plain(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """See `Feed`."""
        index, sample = (part.tolist() for part in _share(len(self.dataset), rank, world_size))
        entries = list(zip(index, sample, strict=True))
        return self._load([entries[i : i + batch_size] for i in range(0, len(entries), batch_size)])

    def _load(self, batches: list[list]) -> Iterator[Batch]:
        for x, label, index in DataLoader(self.dataset, batch_sampler=batches, **self.options):
            moved = (part.to(self.device, non_blocking=True) for part in (x, label, index))
            yield Batch(*moved)


class ResidentFeed:
    """All images lie on the device; a batch is gathered, cropped, flipped and normalised there as a whole."""

    def __init__(self, dataset: ImageSet, condenser: KnowledgeCondenser | None, device: torch.device):
        self.images, self.labels = dataset.tensors(device)
        self.views = dataset.views
        self.condenser = condenser
        self.device = device
        self._current, self._stage = self.images, 0

    def entries(self, sampler: CondensedSampler) -> tuple[Tensor, Tensor]:
        """(index, sample), (n,) int64 each; see `Feed`. At a new stage, its mixes are made here."""
        self._mix()
        index, sample = (torch.from_numpy(part).to(self.device) for part in sampler.order())
        return index, sample

    def epoch(self, entries: Sequence, batches: Sequence[slice], seed: int, epoch: int) -> Iterator[Batch]:
        """See `Feed`. The view of a sample is a function of seed, epoch and sample alone."""
        index, sample = entries
        for part in batches:
            chosen = sample[part]
            x = self.views(self._current[chosen], chosen, seed=seed, epoch=epoch)
            yield Batch(x, self.labels[chosen], index[part])

    def plain(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """See `Feed`."""
        index, sample = (torch.from_numpy(part).to(self.device) for part in _share(len(self.labels), rank, world_size))
        for start in range(0, len(index), batch_size):
            part = slice(start, start + batch_size)
            x = self.views.plain(self.images[sample[part]])
            yield Batch(x, self.labels[sample[part]], index[part])

    def _mix(self) -> None:
        """The images as they are at this stage: where there are mixes, a copy with them."""
        if self._stage != self.condenser.stage:
            self._stage, self._current = self.condenser.stage, self.images  # lets go of the last stage's first
            self._current = self.condenser.mix(self.images)


def _share(count: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(index, sample) int64 of a process; beyond the last sample the first ones are repeated, with index -1."""
    position = np.arange(rank, -(-count // world_size) * world_size, world_size)
    return np.where(position < count, position, SKIP), position % count
