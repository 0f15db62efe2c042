"""A loader of `IndexedDataset` batches whose worker processes live for the entire run."""

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from ..describe import describe_error
from .decoding import ImageReadError
from .indexed import IndexedDataset, MismatchedItemsError

EXPLAINED = (MismatchedItemsError, ImageReadError)  # their messages name the item


def load_item(name: str, dataset: IndexedDataset, index: int) -> tuple:
    """Return item `index` of `dataset`, which errors call `name`.

    Raises:
        ValueError: The item cannot be loaded; names it.
    """
    try:
        return dataset[index]
    except EXPLAINED as error:
        raise ValueError(f"{name}: {error}") from error
    except Exception as error:  # the data set and its transform are the user's: they can raise anything
        raise ValueError(f"{name}[{index}] cannot be loaded: {describe_error(error)}") from error


class Loader:
    """A loader that collates the items of a data set into batches.

    Workers are reseeded for every pass over the data. By default the seed is drawn from torch's generator at its start.

    Args:
        dataset: The items to load.
        num_workers: Number of worker processes; 0 loads in this process.
        name: Name of the data set in errors.
        pin_memory: Whether to copy batches into pinned memory.
    """

    def __init__(self, dataset: IndexedDataset, num_workers: int, *, name: str, pin_memory: bool):
        self.dataset = dataset
        self.num_workers = num_workers
        self.name = name
        self._pin_memory = pin_memory
        self._requests = _BatchRequests()
        self._iterator: Iterator | None = None  # of the loader whose workers persist
        self._loader: DataLoader | None = None
        self._passes = 0
        self._in_use = False

    def load(self, batches: Iterable[Sequence], seed: int | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield `(x, label, index)` of each batch of entries.

        Args:
            batches: The entries of every batch, read a few batches ahead.
            seed: The seed of the workers. None: drawn from torch's generator.

        Raises:
            ValueError: The items of a batch differ in shape, raw items to mix are not alike, or an image cannot be read.
        """
        self._passes += 1
        seed = torch.empty((), dtype=torch.int64).random_().item() if seed is None else seed
        number = self._passes
        for loaded in self._loaded(_BatchRequest(number, seed, entries) for entries in batches):
            yield self._check(loaded)

    def first(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the first `count` items, or all if there are fewer, loaded in this process.

        Raises:
            ValueError: An item cannot be loaded; names it.
        """
        count = min(count, len(self.dataset))
        return self._check(_collate([load_item(self.name, self.dataset, index) for index in range(count)]))

    def close(self) -> None:
        """Stop the worker processes."""
        if self._iterator is not None:
            # Explicitly, because an error that refers to the iterator would keep the workers alive.
            self._iterator._shutdown_workers()
            self._iterator = self._loader = None

    def _check(self, loaded: object) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(loaded, _BatchError):
            raise ValueError(f"{self.name}: {loaded.message}")
        return loaded

    def _loaded(self, requests: Iterable["_BatchRequest"]) -> Iterator[object]:
        if self.num_workers == 0 or self._in_use:  # a second concurrent pass starts its own workers
            yield from self._new_loader(requests)
            return
        self._in_use = True
        try:
            self._requests.requests = requests
            if self._loader is None:
                self._loader = self._new_loader(self._requests, persistent_workers=True)
            self._iterator = iter(self._loader)
            yield from self._iterator
        finally:
            self._in_use = False

    def _new_loader(self, requests: Iterable["_BatchRequest"], **options: bool) -> DataLoader:
        return DataLoader(
            _BatchDataset(self.dataset),
            batch_sampler=requests,
            generator=torch.Generator(),  # its numbers are not used, so torch's own generator is not touched
            num_workers=self.num_workers,
            pin_memory=self._pin_memory,
            collate_fn=_collate,
            **options,
        )


class _BatchRequest(NamedTuple):
    """A batch to load: `entries` of an `IndexedDataset`, and the number and seed of the pass, for the workers."""

    pass_number: int
    seed: int
    entries: Sequence


class _BatchRequests:
    """A `batch_sampler` whose content changes from pass to pass."""

    requests: Iterable[_BatchRequest] = ()

    def __iter__(self) -> Iterator[_BatchRequest]:
        return iter(self.requests)


class _BatchError(NamedTuple):
    """The reason why a batch could not be made. A worker's exception would arrive with its traceback as text."""

    message: str


class _BatchDataset(Dataset):
    """The data set as a `DataLoader` reads it, one batch at a time."""

    def __init__(self, dataset: IndexedDataset):
        self.dataset = dataset
        self._pass_number = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, request: _BatchRequest) -> list | _BatchError:
        worker = get_worker_info()
        if worker is not None and self._pass_number != request.pass_number:
            self._pass_number = request.pass_number
            _seed_worker(request.seed, worker.id)
        try:
            return [self.dataset[entry] for entry in request.entries]
        except EXPLAINED as error:
            return _BatchError(str(error))


def _seed_worker(seed: int, worker: int) -> None:
    """Seed this process's generators as torch seeds those of a new worker."""
    random.seed(seed + worker)
    torch.manual_seed(seed + worker)
    np.random.seed(np.random.SeedSequence([worker, seed % 2**32, seed // 2**32, 0]).generate_state(4))


def _collate(items: list | _BatchError) -> object:
    """Return `(x, label, index)` of a batch."""
    if isinstance(items, _BatchError):
        return items
    try:
        return default_collate(items)
    except RuntimeError:
        first, shape = items[0][2], getattr(items[0][0], "shape", None)
        for x, _, index in items:
            if getattr(x, "shape", None) != shape:
                return _BatchError(
                    f"item {first} has shape {tuple(shape)} and item {index} {tuple(x.shape)}, which cannot be batched: "
                    f"resize them in the data set, or crop them in the transform of an IndexedDataset"
                )
        raise
