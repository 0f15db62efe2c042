"""The sampler: yields the kept samples in an order that needs no state to be resumed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from ..checks import check_bool, check_int
from .condenser import KnowledgeCondenser
from .mixing import MixTree
from .random_keys import MAX_SEED, ORDER, random_keys
from .table import PADDING_INDEX


class CondensedSampler(Sampler):
    """A sampler over the samples that `condenser` keeps: yields `(index, mix_tree)` pairs for `IndexedDataset`.

    `index` is the original index, a Python int. `mix_tree` describes the image; for a raw image it is the index itself
    (see `kcd_ext.condensation.mixing`). Mix trees travel with the indices, so persistent loader workers never use an
    outdated plan.

    The order is a pure function of `(seed, epoch, kept set)`. Call `set_epoch` before every epoch; without it, every
    epoch has the same order. An iterator's content is fixed when it is created, and any number of iterators can be in
    use.

    With `world_size` > 1, rank r takes every `world_size`-th sample, starting at the r-th. To give all ranks equally many,
    the last entries of some ranks are repeats. A repeat has the index -1, which `KnowledgeCondenser.update` skips; its
    mix tree names the sample. `padding` counts the repeats of this rank.

    **Loaders of Accelerate and Lightning Fabric** call `set_epoch` themselves, directly before every iterator, with the
    number of passes they have counted, as they do for any sampler with this method. Such a call never replaces yours:
    after `set_epoch(3, consumed=16)` their next iterator yields the rest of epoch 3. If you do not call it, their number
    counts, so every pass has its own order. See `set_epoch` for the rule.

    Args:
        condenser: Its kept set and mix trees are read whenever an iterator is created or a length is requested.
        seed: Seed of the order, in [0, 2^64).
        rank: Rank of this process. Keep the default if something else shards (Accelerate does).
        world_size: Number of processes. Keep the default if something else shards.
        shuffle: False yields the kept samples by ascending index.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
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
        self._passes = 0  # iterators created so far
        # The last call of set_epoch since an iterator was created that can be the user's, and whether it gave `consumed`.
        self._last_call: tuple[int, int] | None = None
        self._last_call_gave_consumed = False

    def set_epoch(self, epoch: int, consumed: int | None = None) -> None:
        """Choose the epoch that the next iterator yields, and how many of this rank's samples it skips.

        To resume in mid-epoch, pass as `consumed` the number of samples this rank has trained on. That is not the number
        a loader has prefetched.

        The last call before an iterator (or `order`) is created decides, with one exception. If that call could come from
        a library, it does not replace an earlier call since the previous iterator. A call could come from a library if it
        gives no `consumed` and its `epoch` is

        - at most the number of iterators created so far, because libraries count these, or
        - that of an earlier call with `consumed`, because Accelerate repeats the number of `loader.set_epoch`.

        No such call, nor several of them, replaces a call with `consumed`. To return to such an epoch after another choice
        that no iterator has used, give both arguments: `set_epoch(0, consumed=0)`.

        Args:
            epoch: In [0, 2^64).
            consumed: In [0, samples of the epoch on this rank]. None: 0, and the call could come from a library.

        Raises:
            TypeError: An argument is not an integer. Nothing has changed then.
            ValueError: An argument is out of range. Nothing has changed then.
        """
        epoch = check_int("epoch", epoch, 0, MAX_SEED)
        choice = epoch, 0 if consumed is None else check_int("consumed", consumed, 0, self._samples_per_rank())
        replaces_consumed = self._last_call is not None and self._last_call_gave_consumed
        from_library = consumed is None and (epoch <= self._passes or (replaces_consumed and epoch == self._epoch))
        if from_library and replaces_consumed:
            return
        self._epoch, self._consumed = self._last_call if from_library and self._last_call is not None else choice
        self._last_call, self._last_call_gave_consumed = choice, consumed is not None

    @property
    def padding(self) -> int:
        """The number of repeats, marked with index -1, among the `len(self)` entries to come."""
        return len(self) - self._unpadded_length()

    def __len__(self) -> int:
        """Return how many samples the next iterator yields on this rank; equal on all ranks with equal `consumed`."""
        return max(0, self._samples_per_rank() - self._consumed)

    def __iter__(self) -> Iterator[tuple[int, MixTree]]:
        self._passes += 1
        trees = self._condenser.mix_trees  # a stage creates new trees and does not modify these
        indices, samples = (part.tolist() for part in self.order())
        return ((index, trees.get(sample, sample)) for index, sample in zip(indices, samples, strict=True))

    def order(self) -> tuple[np.ndarray, np.ndarray]:
        """Return as arrays what `iter(self)` would yield now, for a loop whose images are on the device.

        Use it with `KnowledgeCondenser.mix`, which mixes all images at once.

        Returns:
            index: `(n,)` int64 original indices for `update`, -1 if the entry is a padding repeat.
            sample: `(n,)` int64, the sample whose image, label and weight to use, also for a repeat.
        """
        self._last_call = None
        positions = np.arange(self._first_position, self._samples_per_rank() * self._world_size, self._world_size)
        sample = self._shuffled().take(positions, mode="wrap")  # after the last sample the first ones are repeated
        index = sample.copy()
        index[self._unpadded_length() :] = PADDING_INDEX
        return index, sample

    def _samples_per_rank(self) -> int:
        return -(-len(self._condenser.ascending) // self._world_size)

    @property
    def _first_position(self) -> int:
        """The position of this rank's next entry in the common order; a rank takes every `world_size`-th entry."""
        return self._rank + self._consumed * self._world_size

    def _unpadded_length(self) -> int:
        """Return how many of the entries to come are not repeats; repeats come last."""
        return len(range(self._first_position, len(self._condenser.ascending), self._world_size))

    def _shuffled(self) -> np.ndarray:
        kept = self._condenser.ascending  # so that the order depends on the set, not on its ranking
        if not self._shuffle:
            return kept
        keys = random_keys(len(kept), seed=self._seed, step=self._epoch, stream=ORDER)
        return kept[np.argsort(keys, kind="stable")]
