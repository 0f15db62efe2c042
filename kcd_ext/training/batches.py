"""Batches on the training device: from a loader over any data set, or from images that fit there as a whole."""

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from ..condensation import CondensedSampler, KnowledgeCondenser
from ..condensation.table import SKIP
from ..data import IndexedDataset
from ..data.images import ImageSet
from ..data.indexed import UnlikeItemsError
from ..methods import Batch
from ..registry import one_line
from .randomness import seeded


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


def load_item(name: str, dataset: IndexedDataset, index: int) -> tuple:
    """Return an item. Raises ValueError, naming it, where it cannot be loaded."""
    try:
        return dataset[index]
    except UnlikeItemsError as error:
        raise ValueError(f"{name}: {error}") from error
    except Exception as error:  # the data set and its transform are the user's: they raise what they like
        raise ValueError(f"{name}[{index}] cannot be loaded: {type(error).__name__}: {one_line(error)}") from error


def flat_labels(label: Tensor) -> Tensor:
    """Return labels (b,) for (b,) or (b, 1); others as they are."""
    return label.squeeze(1) if label.dim() == 2 and label.shape[1] == 1 else label


class LoadedFeed:
    """The batches of any data set, on the training device: loads items one by one and collates them.

    Labels (b, 1) become (b,). Worker processes live from the first batch to `close`. They are seeded anew for every pass
    over the data, by a number drawn from torch's generator when the pass begins.
    """

    def __init__(self, dataset: IndexedDataset, device: torch.device, num_workers: int, name: str = "the data set"):
        self.items = _Items(dataset)
        self.device = device
        self.num_workers = num_workers
        self.name = name
        self._parts = _Parts()
        self._iterator: Iterator | None = None  # that of the loader whose workers stay
        self._loader: DataLoader | None = None
        self._passes = 0
        self._in_use = False

    def entries(self, sampler: CondensedSampler) -> list:
        """Return (index, recipe) of what this process trains on in the sampler's epoch, padding repeats included."""
        return list(sampler)

    def epoch(self, entries: Sequence, batches: Sequence[slice], seed: int, epoch: int) -> Iterator[Batch]:
        """Yield the training batches of these entries. Transforms draw from the generators that the trainer has seeded."""
        return self._load([entries[part] for part in batches])

    def eval_batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield samples rank, rank + world_size, ... once each, by ascending index, without mixes.

        All processes get equally many: repeats in the end are marked by index -1.
        """
        index, sample = (part.tolist() for part in _share(len(self.items), rank, world_size))
        entries = list(zip(index, sample, strict=True))
        return self._load([entries[i : i + batch_size] for i in range(0, len(entries), batch_size)])

    def first(self, count: int) -> Batch:
        """Return the first `count` samples, or as many as there are, without mixes.

        Raises ValueError, naming the item, where one cannot be loaded.
        """
        dataset = self.items.dataset
        return self._batch(_collate([load_item(self.name, dataset, i) for i in range(min(count, len(dataset)))]))

    def close(self) -> None:
        """End the worker processes."""
        if self._iterator is not None:
            self._iterator._shutdown_workers()  # they would live as long as an error that holds the iterator
            self._iterator = self._loader = None

    def _load(self, batches: list[list]) -> Iterator[Batch]:
        self._passes += 1
        seed = torch.empty((), dtype=torch.int64).random_().item()
        for loaded in self._loaded([_Part(self._passes, seed, entries) for entries in batches]):
            yield self._batch(loaded)

    def _loaded(self, parts: list["_Part"]) -> Iterator[object]:
        if self.num_workers == 0 or self._in_use:  # a second reader at a time has workers of its own
            yield from self._loader_of(parts)
            return
        self._in_use = True
        try:
            self._parts.parts = parts
            self._loader = self._loader or self._loader_of(self._parts, persistent_workers=True)
            self._iterator = iter(self._loader)
            yield from self._iterator
        finally:
            self._in_use = False

    def _loader_of(self, parts: Sequence["_Part"], **options: bool) -> DataLoader:
        # Its generator draws numbers that nothing depends on.
        return DataLoader(
            self.items,
            batch_sampler=parts,
            generator=torch.Generator(),
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            collate_fn=_collate,
            **options,
        )

    def _batch(self, loaded: object) -> Batch:
        if isinstance(loaded, _Refused):
            raise ValueError(f"{self.name}: {loaded.why}")
        x, label, index = (part.to(self.device, non_blocking=True) for part in loaded)
        return Batch(x, flat_labels(label), index)


class _Part(NamedTuple):
    """A batch to load: `entries` of an `IndexedDataset`, in the pass of this number, for which workers seed themselves."""

    number: int
    seed: int
    entries: list


class _Parts:
    """A `batch_sampler` whose content changes from pass to pass."""

    parts: Sequence[_Part] = ()

    def __iter__(self) -> Iterator[_Part]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


class _Refused(NamedTuple):
    """Why there is no batch. An exception would come out of a worker with its traceback as text."""

    why: str


class _Items(Dataset):
    """The data set as loaders read it, a part at a time."""

    def __init__(self, dataset: IndexedDataset):
        self.dataset = dataset
        self._pass = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, part: _Part) -> list | _Refused:
        worker = get_worker_info()
        if worker is not None and self._pass != part.number:
            self._pass = part.number
            _seed_worker(part.seed, worker.id)
        try:
            return [self.dataset[entry] for entry in part.entries]
        except UnlikeItemsError as error:
            return _Refused(str(error))


def _seed_worker(seed: int, worker: int) -> None:
    """Seed this process's generators as torch seeds those of a worker that it starts."""
    random.seed(seed + worker)
    torch.manual_seed(seed + worker)
    np.random.seed(np.random.SeedSequence([worker, seed % 2**32, seed // 2**32, 0]).generate_state(4))


def _collate(items: list | _Refused) -> object:
    """Return (x, label, index) of a batch."""
    if isinstance(items, _Refused):
        return items
    try:
        return default_collate(items)
    except RuntimeError:
        first, shape = items[0][2], getattr(items[0][0], "shape", None)
        for x, _, index in items:
            if getattr(x, "shape", None) != shape:
                return _Refused(
                    f"item {first} has shape {tuple(shape)} and item {index} {tuple(x.shape)}, which make no batch: "
                    f"resize them in the data set, or crop them in the transform of an IndexedDataset"
                )
        raise


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
            x = self.views.plain(self.images[sample[part]])
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
