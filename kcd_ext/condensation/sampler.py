"""The sampler: yields what the condenser keeps, in an order that needs no state to be resumed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from ..checks import check_bool, check_int
from .condenser import KnowledgeCondenser
from .mixing import MixTree
from .random_keys import MAX_SEED, ORDER, random_keys
from .table import SKIP


class CondensedSampler(Sampler):
    """Yields (index, recipe) for the samples that `condenser` keeps; `IndexedDataset` takes these pairs.

    The index is the original one, a Python int; the recipe says what the image is made of and is the index itself for
    a raw image (`mixing.py`). Recipes travel with the indices, so loader workers that live for many epochs never hold
    an old plan.

    The order is a pure function of (seed, epoch, kept set); call `set_epoch` before every epoch or each has the same
    order. What an iterator yields is settled when it is made, and any number of them can be in use.

    With `world_size` > 1 rank r takes every `world_size`-th sample from the r-th on. So that all ranks have equally
    many, the last entries of some ranks are repeats: these carry the index -1, which `KnowledgeCondenser.update` skips,
    while their recipe names the sample. `padding` says how many this rank has.

    **Loaders of Accelerate and Lightning Fabric** call `set_epoch` themselves, directly before every iterator, with the
    number of passes that they have counted, as any sampler with this method gets it. Such a call never replaces yours:
    after `set_epoch(3, consumed=16)` their next iterator yields the rest of epoch 3. Without a call of yours their
    number counts, so every pass has an order of its own. See `set_epoch` for the rule.

    Args:
        condenser: its kept set and recipes are read whenever an iterator is made or a length asked for.
        seed: of the order, in [0, 2^64).
        rank, world_size: the share of this process. Leave them alone where something else shards (Accelerate does).
        shuffle: False yields the kept samples by ascending index.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    def __init__(
        self,
        condenser: KnowledgeCondenser,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ):
        if not isinstance(condenser, KnowledgeCondenser):
            raise TypeError(f"condenser must be a KnowledgeCondenser, got {type(condenser).__name__}")
        self._condenser = condenser
        self._seed = check_int("seed", seed, 0, MAX_SEED)
        self._world_size = check_int("world_size", world_size, 1)
        self._rank = check_int("rank", rank, 0, self._world_size - 1)
        self._shuffle = check_bool("shuffle", shuffle)
        self._epoch = 0
        self._consumed = 0
        self._passes = 0  # iterators made so far
        # The last call of set_epoch since an iterator was made that may be the user's, and whether it gave `consumed`.
        self._last: tuple[int, int] | None = None
        self._last_names_both = False

    def set_epoch(self, epoch: int, consumed: int | None = None) -> None:
        """Choose the epoch that the next iterator yields, and how many of this rank's samples it leaves out.

        To resume in mid-epoch, set `consumed` to the number of samples this rank has trained on (not the number a
        loader has fetched ahead).

        The last call before an iterator (or `order`) is made decides, with one exception: that call does not replace an
        earlier one since the previous iterator if it could be a library's. A library gives no `consumed`, and an
        `epoch` that is at most the number of iterators made so far, because it counts those, or the one that a call with
        `consumed` has named before, because Accelerate repeats the number of `loader.set_epoch`. No such call, nor
        several of them, replaces one with `consumed`. To go back to such an epoch after another choice that no iterator
        has used, name both: `set_epoch(0, consumed=0)`.

        Args:
            epoch: in [0, 2^64).
            consumed: in [0, samples of the epoch on this rank]. None: 0, and the call may be a library's.

        Raises:
            TypeError, ValueError: an argument is not an integer or is out of range. Nothing has changed then.
        """
        epoch = check_int("epoch", epoch, 0, MAX_SEED)
        chosen = epoch, 0 if consumed is None else check_int("consumed", consumed, 0, self._share())
        names_both = self._last is not None and self._last_names_both
        may_be_a_librarys = consumed is None and (epoch <= self._passes or (names_both and epoch == self._epoch))
        if may_be_a_librarys and names_both:
            return
        self._epoch, self._consumed = self._last if may_be_a_librarys and self._last is not None else chosen
        self._last, self._last_names_both = chosen, consumed is not None

    @property
    def padding(self) -> int:
        """How many of the `len(self)` entries to come are repeats marked with index -1."""
        return len(self) - self._real()

    def __len__(self) -> int:
        """Samples the next iterator yields on this rank; the same on all ranks that consumed the same."""
        return max(0, self._share() - self._consumed)

    def __iter__(self) -> Iterator[tuple[int, MixTree]]:
        self._passes += 1
        recipes = self._condenser.recipes  # a stage makes new ones and leaves these as they are
        indices, samples = (part.tolist() for part in self.order())
        return ((index, recipes.get(sample, sample)) for index, sample in zip(indices, samples, strict=True))

    def order(self) -> tuple[np.ndarray, np.ndarray]:
        """What `iter(self)` would yield now, as arrays: for a loop whose images lie on the device (`KnowledgeCondenser.mix`).

        Returns:
            index: (n,) int64 original indices, -1 where the entry is a repeat that only pads: for `update`.
            sample: (n,) int64, whose image, label and weight it is, also of a repeat.
        """
        self._last = None
        positions = np.arange(self._start, self._share() * self._world_size, self._world_size)
        sample = self._shuffled().take(positions, mode="wrap")  # behind the last one come the first ones again
        index = sample.copy()
        index[self._real() :] = SKIP
        return index, sample

    def _share(self) -> int:
        return -(-len(self._condenser.ascending) // self._world_size)

    @property
    def _start(self) -> int:
        """Where this rank's next entry stands in the order of all ranks, of which it has every `world_size`-th."""
        return self._rank + self._consumed * self._world_size

    def _real(self) -> int:
        """How many of the entries to come are no repeats; those come last."""
        return len(range(self._start, len(self._condenser.ascending), self._world_size))

    def _shuffled(self) -> np.ndarray:
        kept = self._condenser.ascending  # the set, whatever the ranking
        if not self._shuffle:
            return kept
        keys = random_keys(len(kept), seed=self._seed, step=self._epoch, stream=ORDER)
        return kept[np.argsort(keys, kind="stable")]
