"""Loads batches of an `IndexedDataset`, in worker processes that live from the first pass over the data to the last."""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from ..describe import describe_error
from .indexed import IndexedDataset, UnlikeItemsError


def load_item(name: str, dataset: IndexedDataset, index: int) -> tuple:
    """Return an item. Raise ValueError, naming it, where it cannot be loaded."""
    try:
        return dataset[index]
    except UnlikeItemsError as error:
        raise ValueError(f"{name}: {error}") from error
    except Exception as error:  # the data set and its transform are the user's: they raise what they like
        raise ValueError(f"{name}[{index}] cannot be loaded: {describe_error(error)}") from error


class Loader:
    """Loads and collates the items of a data set.

    Workers are seeded anew for every pass over the data, by a number drawn from torch's generator when the pass begins.

    Args:
        name: what errors call the data set.
        pin_memory: whether batches are copied into pinned memory.
    """

    def __init__(self, dataset: IndexedDataset, num_workers: int, *, name: str, pin_memory: bool):
        self.dataset = dataset
        self.num_workers = num_workers
        self.name = name
        self._pin_memory = pin_memory
        self._parts = _Parts()
        self._iterator: Iterator | None = None  # that of the loader whose workers stay
        self._loader: DataLoader | None = None
        self._passes = 0
        self._in_use = False

    def load(self, batches: Sequence[Sequence]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (x, label, index) of each batch of entries.

        Raises ValueError where the items of a batch differ in shape, or raw items that are to be mixed are unlike.
        """
        self._passes += 1
        seed = torch.empty((), dtype=torch.int64).random_().item()
        for loaded in self._loaded([_Part(self._passes, seed, entries) for entries in batches]):
            yield self._checked(loaded)

    def first(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the first `count` items, or as many as there are, loaded by this process.

        Raises ValueError, naming it, where one cannot be loaded.
        """
        count = min(count, len(self.dataset))
        return self._checked(_collate([load_item(self.name, self.dataset, index) for index in range(count)]))

    def close(self) -> None:
        """End the worker processes."""
        if self._iterator is not None:
            self._iterator._shutdown_workers()  # they would live as long as an error that holds the iterator
            self._iterator = self._loader = None

    def _checked(self, loaded: object) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(loaded, _Refused):
            raise ValueError(f"{self.name}: {loaded.why}")
        return loaded

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
        return DataLoader(
            _Items(self.dataset),
            batch_sampler=parts,
            generator=torch.Generator(),  # it draws numbers that nothing depends on
            num_workers=self.num_workers,
            pin_memory=self._pin_memory,
            collate_fn=_collate,
            **options,
        )


class _Part(NamedTuple):
    """A batch to load: `entries` of an `IndexedDataset`, in the pass of this number, for which workers seed themselves."""

    number: int
    seed: int
    entries: Sequence


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
    """The data set as a `DataLoader` reads it, a part at a time."""

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
