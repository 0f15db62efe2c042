"""Batches on the training device: from a loader over any data set, or from images that fit there as a whole."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..condensation import CondensedSampler, KnowledgeCondenser
from ..condensation.table import SKIP
from ..data import IndexedDataset
from ..data.images import ImageSet
from ..data.loading import Loader
from ..methods import Batch
from ..randomness import seeded


def feed_of(
    dataset: IndexedDataset | ImageSet,
    condenser: KnowledgeCondenser | None,
    device: torch.device,
    num_workers: int,
    *,
    name: str = "the data set",
    mixes: bool = False,
) -> "Feed":
    """Return the feed of a data set.

    Args:
        condenser: says what images are mixed of; None: nothing is mixed (a test set).
        num_workers: processes that load items, from the first batch on until the feed's `close`.
        name: what errors call the data set.
        mixes: whether raw items will be mixed, and must therefore have one shape and dtype.

    Raises:
        TypeError, ValueError: raw items are to be mixed, and the first one cannot be.
    """
    if isinstance(dataset, ImageSet):
        return ResidentFeed(dataset, condenser, device)
    if mixes:
        with seeded(0):  # a data set that draws does not move the generators of the run
            dataset = dataset.for_mixing()
    return LoadedFeed(dataset, device, num_workers, name)


class Samples:
    """A training set as `Method.prepare` sees it: batches, as often as it iterates."""

    def __init__(self, feed: "Feed", batch_size: int):
        self.feed = feed
        self.batch_size = batch_size
        self.labels = getattr(feed, "labels", None)  # of images in memory

    def __iter__(self) -> Iterator[Batch]:
        return self.feed.eval_batches(self.batch_size)


def split_evenly(count: int, size: int) -> list[slice]:
    """Split `count` samples into as few parts of at most `size` as possible; their sizes differ by at most one.

    No part is a single sample, which batch normalisation cannot train on, unless `size` or `count` is 1: an odd number
    in pairs has one part of three.

    A last batch of a few samples would weigh as much as one of 64 in the optimizer, in batch statistics and in losses
    over pairs of samples; such steps can undo what a student has learnt.
    """
    number = -(-count // size) if size == 1 else min(-(-count // size), max(1, count // 2))
    ends = [count * part // number for part in range(number + 1)]
    return [slice(*pair) for pair in pairwise(ends)]


def batches_of_steps(count: int, batch_size: int, accumulation: int) -> Iterator[tuple[slice, float, bool]]:
    """Yield the batches of an epoch: which entries, their share in their step, and whether they end it.

    A step is the mean over all its samples, however they are split into batches.
    """
    for step in split_evenly(count, batch_size * accumulation):
        size = step.stop - step.start
        for part in split_evenly(size, batch_size):
            batch = slice(step.start + part.start, step.start + part.stop)
            yield batch, (part.stop - part.start) / size, batch.stop == step.stop


def with_weight(batch: Batch, weight: Tensor | None) -> Batch:
    """Return the batch with the weights of its samples out of `weight` (N,); a repeat has weight 1."""
    return batch if weight is None else batch._replace(weight=weight[batch.index].where(batch.index >= 0, 1))


def flat_labels(label: Tensor) -> Tensor:
    """Return labels (b,) for (b,) or (b, 1); others as they are."""
    return label.squeeze(1) if label.dim() == 2 and label.shape[1] == 1 else label


class LoadedFeed:
    """The batches of any data set, on the training device; labels (b, 1) become (b,)."""

    def __init__(self, dataset: IndexedDataset, device: torch.device, num_workers: int, name: str = "the data set"):
        self.loader = Loader(dataset, num_workers, name=name, pin_memory=device.type == "cuda")
        self.device = device

    def entries(self, sampler: CondensedSampler) -> list:
        """Return (index, recipe) of what this process trains on in the sampler's epoch, padding repeats included."""
        return list(sampler)

    def epoch(self, entries: Sequence, batches: Sequence[slice], seed: int, epoch: int) -> Iterator[Batch]:
        """Yield the training batches of these entries. Transforms draw from the generators that the trainer has seeded."""
        return map(self._batch, self.loader.load([entries[part] for part in batches]))

    def eval_batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield samples rank, rank + world_size, ... once each, by ascending index, without mixes.

        All processes get equally many: repeats in the end are marked by index -1.
        """
        index, sample = (part.tolist() for part in _share(len(self.loader.dataset), rank, world_size))
        entries = list(zip(index, sample, strict=True))
        batches = [entries[start : start + batch_size] for start in range(0, len(entries), batch_size)]
        return map(self._batch, self.loader.load(batches))

    def first(self, count: int) -> Batch:
        """Return the first `count` samples, or as many as there are, without mixes.

        Raises ValueError, naming the item, where one cannot be loaded.
        """
        return self._batch(self.loader.first(count))

    def close(self) -> None:
        """End the worker processes."""
        self.loader.close()

    def _batch(self, loaded: Sequence[Tensor]) -> Batch:
        x, label, index = (part.to(self.device, non_blocking=True) for part in loaded)
        return Batch(x, flat_labels(label), index)


class ResidentFeed:
    """As `LoadedFeed`, of images that are all on the device: a batch is cropped, flipped and normalised there as a whole."""

    def __init__(self, dataset: ImageSet, condenser: KnowledgeCondenser | None, device: torch.device):
        self.images, self.labels = dataset.tensors(device)
        self.views = dataset.views
        self.condenser = condenser
        self.device = device
        self._current, self._stage = self.images, 0

    def entries(self, sampler: CondensedSampler) -> tuple[Tensor, Tensor]:
        """Return (index, sample), (n,) int64 each, as `LoadedFeed` does. Mixes the images at a new stage."""
        if self._stage != self.condenser.stage:
            self._stage, self._current = self.condenser.stage, self.images  # frees those of the last stage first
            self._current = self.condenser.mix(self.images)
        return self._on_device(sampler.order())

    def epoch(self, entries: Sequence, batches: Sequence[slice], seed: int, epoch: int) -> Iterator[Batch]:
        """Yield as `LoadedFeed` does. The view of a sample is a function of seed, epoch and sample alone."""
        index, sample = entries
        for part in batches:
            chosen = sample[part]
            x = self.views(self._current[chosen], chosen, seed=seed, epoch=epoch)
            yield Batch(x, self.labels[chosen], index[part])

    def eval_batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield as `LoadedFeed` does, neither cropped nor flipped."""
        index, sample = self._on_device(_share(len(self.labels), rank, world_size))
        for start in range(0, len(index), batch_size):
            part = slice(start, start + batch_size)
            x = self.views.normalize(self.images[sample[part]])
            yield Batch(x, self.labels[sample[part]], index[part])

    def first(self, count: int) -> Batch:
        """Return as `LoadedFeed` does."""
        return next(self.eval_batches(count))

    def close(self) -> None:
        """Do nothing: there are no workers."""

    def _on_device(self, arrays: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor]:
        index, sample = (torch.from_numpy(array).to(self.device) for array in arrays)
        return index, sample


Feed = LoadedFeed | ResidentFeed


def _share(count: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (index, sample) int64 of a process; beyond the last sample the first ones repeat, with index -1."""
    position = np.arange(rank, -(-count // world_size) * world_size, world_size)
    return np.where(position < count, position, SKIP), position % count
