"""`condense`: a data loader and a condenser for a training loop of your own."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler

from .checks import check_bool, check_int
from .condensation import CondensedSampler, KnowledgeCondenser
from .condensation.batching import split_evenly
from .condensation.mixing import MixTree
from .condensation.random_keys import MAX_SEED
from .condensation.schedules import final_size
from .data import IndexedDataset
from .describe import brief, describe, did_you_mean
from .randomness import seeded

# Arguments of DataLoader that `condense` sets itself.
CHOSEN = ("dataset", "batch_size", "shuffle", "sampler", "batch_sampler", "drop_last")


def condense(
    dataset: Any,
    *,
    batch_size: int,
    transform: Callable[[Any], Any] | None = None,
    seed: int = 0,
    shuffle: bool = True,
    drop_last: bool = False,
    condenser: type[KnowledgeCondenser] = KnowledgeCondenser,
    **options: Any,
) -> tuple[CondensedLoader, KnowledgeCondenser]:
    """Return a loader of the samples worth training on, and the condenser that chooses them.

        loader, condenser = condense(dataset, batch_size=64, keep=0.7, every=40, num_workers=4)
        for epoch in range(240):
            for x, label, index in loader:
                with torch.no_grad():
                    teacher_logits = teacher(x)
                loss, knowledge = condensed_kd_loss(student(x), teacher_logits, labels=label, return_knowledge=True)
                condenser.update(index, knowledge.entropy)
                ...                                    # backward pass, optimizer
            condenser.step()

    - **Epochs.** Every pass has a new order, a function of `seed` and the condenser's epoch, which `condenser.step()` ends. There
      is no `set_epoch` to call. To resume, load the condenser's state before the next pass.
    - **Several processes.** Once `torch.distributed` is initialised, each process iterates over its own share (with `group`: its
      share within the group). `accelerator.prepare(loader)` and `fabric.setup_dataloaders(loader)` work with their default options.
      All processes get the same number of batches, of equal sizes. Up to one sample per process and epoch is a repeat with the
      index -1, which `condenser.update` skips. `condenser.sample_weight[index]` would give it the last sample's weight.
    - **Batches** have at most `batch_size` samples, and their sizes differ by at most one.

    Args:
        dataset: A map-style data set of `(x, label)`: any object with `len` and integer items, `Subset` and `ConcatDataset`
            included. Items `(x, label, index)` work too; the loader yields the position in `dataset` instead of their index.
            An `IndexedDataset` is used unchanged.
        batch_size: The largest number of samples per batch and process.
        transform: Called with x after mixing, as for `IndexedDataset`. Put random augmentation here: transforms inside `dataset`
            run before images are mixed.
        seed: Seed of the order, and of a condenser that draws random numbers; in [0, 2^64).
        shuffle: False: ascending index.
        drop_last: True: all batches have exactly `batch_size` samples; an epoch leaves out the last ones of its order.
        condenser: The class of the condenser.
        **options: All other arguments of the condenser (`keep`, `every`, `stages`, `schedule`, `labels`, …), and of
            `torch.utils.data.DataLoader` (`num_workers`, `pin_memory`, `collate_fn`, `persistent_workers`, …).

    Returns:
        The loader, a `torch.utils.data.DataLoader` of `(x, label, index)`, and the condenser.

    Raises:
        TypeError: An argument is unknown or has the wrong type. The first item is not a pair, or its x cannot be mixed.
        ValueError: An argument is out of range, `dataset` is empty, or its items differ in shape or dtype although they will be
            mixed (while loading; with `epsilon=0` nothing is mixed).

    Warns:
        RuntimeWarning: With `drop_last`, the final set of the condenser is too small for a batch.
    """
    check_int("batch_size", batch_size, 1)
    check_int("seed", seed, 0, MAX_SEED)
    check_bool("shuffle", shuffle)
    check_bool("drop_last", drop_last)
    if not (isinstance(condenser, type) and issubclass(condenser, KnowledgeCondenser)):
        raise TypeError(f"condenser must be KnowledgeCondenser or a subclass, got {describe(condenser)}")
    items = _indexed(dataset, transform)
    of_condenser, of_loader = _split_options(condenser, {"seed": seed, **options})
    built = condenser(len(items), **of_condenser)
    with seeded(0):  # the data set may draw random numbers: keep them out of the caller's generators
        mixes = built.config.get("epsilon", 0) and built.config["keep"] < 1
        items = items.for_mixing() if mixes else items
        items[0]
    batches = CondensedBatches(built, batch_size, seed, shuffle, drop_last, of_condenser.get("group"))
    batches.warn_if_too_few(final_size(len(items), built.config["keep"]))
    return CondensedLoader(items, batches, **of_loader), built


class CondensedLoader(DataLoader):
    """A `DataLoader` of the samples that a condenser keeps: this process's share of them. `condense` makes it."""

    def __init__(self, dataset: IndexedDataset, batches: CondensedBatches, **options: Any):
        self._batches = batches
        super().__init__(dataset, batch_sampler=batches, **options)

    def __iter__(self) -> Iterator[Any]:
        with self._batches.own_share():
            return super().__iter__()

    def __len__(self) -> int:
        """Return the number of batches of this process in the next epoch."""
        with self._batches.own_share():
            return len(self._batches)

    @property
    def sampler(self) -> Sampler:
        """The batch sampler. Lightning Fabric looks here for a sampler that shards itself."""
        return self._batches

    @sampler.setter
    def sampler(self, unused: Sampler) -> None:
        pass  # DataLoader sets a default


class CondensedBatches(DistributedSampler):
    """The batches of an epoch, as lists of entries for `IndexedDataset`.

    Iterated directly, it yields the batches of all processes in turns: batch b belongs to process b modulo the number of
    processes. Accelerate distributes batches in this way. Inside `own_share`, it yields those of this process.

    It is a `DistributedSampler` for libraries that look for one, and shares no code with it.
    """

    def __init__(
        self,
        condenser: KnowledgeCondenser,
        batch_size: int,
        seed: int,
        shuffle: bool,
        drop_last: bool,
        group: torch.distributed.ProcessGroup | None,
    ):
        self._condenser = condenser
        self._size = batch_size
        self._order = {"seed": seed, "shuffle": shuffle}
        self._drops_last = drop_last
        self._group = group
        self._is_own = False

    def __iter__(self) -> Iterator[list[tuple[int, MixTree]]]:
        # Not a generator: `own_share` and the condenser's state count when the iterator is created.
        rank, world_size = self._place()
        ranks = [rank] if self._is_own else range(world_size)
        shares = [self._batches_of(each, world_size) for each in ranks]
        return iter([batch for step in zip(*shares, strict=True) for batch in step])

    def __len__(self) -> int:
        world_size = self._place()[1]
        return len(self._parts(world_size)) * (1 if self._is_own else world_size)

    @contextmanager
    def own_share(self) -> Iterator[None]:
        """Restrict iterators and lengths that are requested inside the context to this process's batches."""
        self._is_own = True
        try:
            yield
        finally:
            self._is_own = False

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the condenser counts the epochs. Accelerate and Lightning Fabric call it with their own count."""

    def warn_if_too_few(self, kept: int) -> None:
        """Warn if an epoch of `kept` samples would have no batch, which is an error once it comes to it."""
        share = -(-kept // self._place()[1])
        if self._drops_last and share < self._size:
            warnings.warn(
                f"drop_last=True leaves no batch once the set has shrunk to {share} samples per process: batch_size is "
                f"{self._size}",
                RuntimeWarning,
                stacklevel=3,
            )

    def _batches_of(self, rank: int, world_size: int) -> list[list[tuple[int, MixTree]]]:
        sampler = CondensedSampler(self._condenser, rank=rank, world_size=world_size, **self._order)
        sampler.set_epoch(self._condenser.epoch, consumed=0)
        entries = [*sampler]
        return [entries[part] for part in self._parts(world_size)]

    def _parts(self, world_size: int) -> list[slice]:
        """Return the batches of one process as slices of its entries."""
        count = -(-len(self._condenser.ascending) // world_size)
        if not self._drops_last:
            return split_evenly(count, self._size)
        if count < self._size:
            raise ValueError(
                f"drop_last=True leaves no batch: an epoch has {count} samples per process, and batch_size is {self._size}"
            )
        return [slice(start, start + self._size) for start in range(0, count - self._size + 1, self._size)]

    def _place(self) -> tuple[int, int]:
        """Return this process's rank and the number of processes, as the condenser counts them."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return 0, 1
        return distributed.get_rank(self._group), distributed.get_world_size(self._group)


def _indexed(dataset: Any, transform: Callable[[Any], Any] | None) -> IndexedDataset:
    if isinstance(dataset, IterableDataset):
        raise TypeError(f"dataset must have a length and integer items, got the iterable {type(dataset).__name__}")
    if isinstance(dataset, IndexedDataset):
        if transform is not None:
            raise TypeError("transform must be None for an IndexedDataset, which has its own")
        indexed = dataset
    else:
        indexed = IndexedDataset(dataset, transform)
    if not len(indexed):
        raise ValueError("dataset must hold at least one sample, got none")
    return indexed


def _split_options(
    condenser: type[KnowledgeCondenser], options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of the condenser and those of the loader. Raise TypeError for one of neither."""
    parameters = dict(inspect.signature(condenser).parameters)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        parameters |= inspect.signature(KnowledgeCondenser).parameters
    of_condenser = parameters.keys() - {"num_samples"}
    of_loader = inspect.signature(DataLoader).parameters.keys() - {*CHOSEN}
    for name in options:
        if name in CHOSEN:
            raise TypeError(f"condense makes the loader's {name} itself, got {name}={brief(options[name])}")
        if name != "seed" and name not in of_condenser | of_loader:  # seed: some condensers draw no random numbers
            nearest = did_you_mean(name, sorted(of_condenser | of_loader))
            raise TypeError(f"{name} is no option of {condenser.__name__} or DataLoader{nearest}")
    chosen = [{name: value for name, value in options.items() if name in known} for known in (of_condenser, of_loader)]
    return chosen[0], chosen[1]
