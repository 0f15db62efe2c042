"""Where batches come from: a loader over any data set, or images that lie on the training device as a whole."""

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

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

    def first(self, count: int) -> Batch:
        """Return the first `count` samples, or as many as there are, mixed with nothing, loaded by this process."""

    def close(self) -> None:
        """End the processes that load."""


def feed_of(
    dataset: IndexedDataset | ImageSet,
    condenser: KnowledgeCondenser | None,
    device: torch.device,
    num_workers: int,
    *,
    name: str = "the data set",
    mixes: bool = False,
) -> Feed:
    """The feed for this data set.

    Args:
        condenser: says what mixes are made of; None: there are none (a test set).
        num_workers: how many processes load items, from the first batch on until `Feed.close`.
        name: what to call the data set in errors.
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
    """Items are loaded one by one, transformed by the data set, and collated; labels (b, 1) become (b,).

    Worker processes live from the first batch to `close`. Their generators are seeded anew for every pass over the
    data, by a number drawn from torch's generator when the pass begins.
    """

    def __init__(self, dataset: IndexedDataset, device: torch.device, num_workers: int, name: str = "the data set"):
        self.items = _Items(dataset)
        self.device = device
        self.name = name
        self.options = {
            "num_workers": num_workers,
            "pin_memory": device.type == "cuda",
            "collate_fn": _collate,
        }
        self._parts = _Parts()
        self._iterator: Iterator | None = None  # that of the loader whose workers stay
        self._loader: DataLoader | None = None
        self._passes = 0
        self._in_use = False

    def entries(self, sampler: CondensedSampler) -> list:
        """(index, recipe) for each; see `Feed`."""
        return list(sampler)

    def epoch(self, entries: Sequence, batches: Sequence[slice], seed: int, epoch: int) -> Iterator[Batch]:
        """See `Feed`. What the transforms draw comes from the generators that the trainer has seeded."""
        return self._load([entries[part] for part in batches])

    def plain(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """See `Feed`."""
        index, sample = (part.tolist() for part in _share(len(self.items), rank, world_size))
        entries = list(zip(index, sample, strict=True))
        return self._load([entries[i : i + batch_size] for i in range(0, len(entries), batch_size)])

    def first(self, count: int) -> Batch:
        """See `Feed`. Raises ValueError, naming it, where one cannot be loaded."""
        items = []
        for index in range(min(count, len(self.items))):
            try:
                loaded = self.items.__getitems__(_Part(0, 0, [index]))
            except Exception as error:  # the data set and its transform are the user's: they raise what they like
                told = f"{type(error).__name__}: {one_line(error)}"
                raise ValueError(f"{self.name}[{index}] cannot be loaded: {told}") from error
            if isinstance(loaded, _Refused):
                return self._batch(loaded)
            items += loaded
        return self._batch(_collate(items))

    def close(self) -> None:
        """See `Feed`."""
        if self._iterator is not None:
            self._iterator._shutdown_workers()  # they would live as long as an error that holds the iterator
            self._iterator = self._loader = None

    def _load(self, batches: list[list]) -> Iterator[Batch]:
        self._passes += 1
        seed = torch.empty((), dtype=torch.int64).random_().item()
        parts = [_Part(self._passes, seed, entries) for entries in batches]
        for loaded in self._loaded(parts):
            yield self._batch(loaded)

    def _loaded(self, parts: list["_Part"]) -> Iterator[object]:
        # The loader draws a number of its own, from its own generator: nothing depends on it.
        if self.options["num_workers"] == 0 or self._in_use:  # a second reader at a time has workers of its own
            yield from DataLoader(self.items, batch_sampler=parts, generator=torch.Generator(), **self.options)
            return
        self._in_use = True
        try:
            self._parts.parts = parts
            if self._loader is None:
                self._loader = DataLoader(
                    self.items,
                    batch_sampler=self._parts,
                    generator=torch.Generator(),
                    persistent_workers=True,
                    **self.options,
                )
            self._iterator = iter(self._loader)
            yield from self._iterator
        finally:
            self._in_use = False

    def _batch(self, loaded: object) -> Batch:
        if isinstance(loaded, _Refused):
            raise ValueError(f"{self.name}: {loaded.why}")
        x, label, index = (part.to(self.device, non_blocking=True) for part in loaded)
        return Batch(x, plain_labels(label), index)


def plain_labels(label: Tensor) -> Tensor:
    """Return labels (b,) for (b,) or (b, 1); others as they are."""
    return label.squeeze(1) if label.dim() == 2 and label.shape[1] == 1 else label


class _Part(NamedTuple):
    """What makes a batch: `entries` of an `IndexedDataset`, in the pass of this number, for which workers seed themselves."""

    number: int
    seed: int
    entries: list


class _Parts:
    """The batches of the pass to come, as a `batch_sampler` whose content changes."""

    parts: Sequence[_Part] = ()

    def __iter__(self) -> Iterator[_Part]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


class _Refused(NamedTuple):
    """In the place of a batch: why there is none. An exception would come out of a worker with its traceback as text."""

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
    """Seed the generators of this process as torch seeds those of a worker that it starts."""
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

    def first(self, count: int) -> Batch:
        """See `Feed`."""
        index = torch.arange(min(count, len(self.labels)), device=self.device)
        return Batch(self.views.plain(self.images[index]), self.labels[index], index)

    def close(self) -> None:
        """See `Feed`: there are none."""

    def _mix(self) -> None:
        """The images as they are at this stage: where there are mixes, a copy with them."""
        if self._stage != self.condenser.stage:
            self._stage, self._current = self.condenser.stage, self.images  # lets go of the last stage's first
            self._current = self.condenser.mix(self.images)


def _share(count: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(index, sample) int64 of a process; beyond the last sample the first ones are repeated, with index -1."""
    position = np.arange(rank, -(-count // world_size) * world_size, world_size)
    return np.where(position < count, position, SKIP), position % count
