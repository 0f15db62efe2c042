"""Batches on the training device, from a data set that is loaded item by item, or from images in memory or on disk."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..condensation import CondensedSampler, KnowledgeCondenser
from ..condensation.batching import split_evenly
from ..condensation.mixing import MixTree
from ..condensation.table import PADDING_INDEX
from ..data import ImageFiles, ImageSet, IndexedDataset
from ..data.image_files import decoding_workers
from ..data.images import LabelledImages
from ..data.loading import Loader
from ..methods import Batch
from ..randomness import seeded


def batch_source(
    dataset: IndexedDataset | LabelledImages,
    condenser: KnowledgeCondenser | None,
    device: torch.device,
    num_workers: int,
    *,
    name: str = "the data set",
    mixes: bool = False,
) -> "BatchSource":
    """Return the batch source of a data set.

    Args:
        dataset: An `ImageSet` is moved to `device`; `ImageFiles` are decoded batch by batch; any other data set is loaded item
            by item.
        condenser: Decides which images are mixed. None: no image is mixed (a test set).
        device: The device of the batches.
        num_workers: Processes that load items. They start with the first batch and end with `close`. 0: items are loaded in
            this process, and `ImageFiles` are decoded by one process per processor, up to a limit.
        name: The name of the data set in errors.
        mixes: Whether raw items will be mixed. They must then share one shape and dtype.

    Raises:
        TypeError, ValueError: Raw items will be mixed, and the first one cannot be.
    """
    if isinstance(dataset, ImageSet):
        return ResidentBatches(dataset, condenser, device)
    if isinstance(dataset, ImageFiles):
        return StreamedBatches(dataset, condenser, device, num_workers or decoding_workers(), name)
    if mixes:
        with seeded(0):  # the data set may draw random numbers: keep them out of the run's generators
            dataset = dataset.for_mixing()
    return LoadedBatches(dataset, device, num_workers, name)


class Samples:
    """The training set that `Method.prepare` gets: an iterable of batches that can be iterated repeatedly."""

    def __init__(self, source: "BatchSource", batch_size: int):
        self.source = source
        self.batch_size = batch_size
        self.labels = getattr(source, "labels", None)  # only images have them

    def __iter__(self) -> Iterator[Batch]:
        return self.source.eval_batches(self.batch_size)


def batches_of_steps(count: int, batch_size: int, accumulation: int) -> Iterator[tuple[slice, float, bool]]:
    """Yield an epoch's batches: their entries, their share of the optimizer step, and whether they end that step.

    The loss of a step is the mean over all its samples, however they are split into batches.
    """
    for step in split_evenly(count, batch_size * accumulation):
        size = step.stop - step.start
        for part in split_evenly(size, batch_size):
            batch = slice(step.start + part.start, step.start + part.stop)
            yield batch, (part.stop - part.start) / size, batch.stop == step.stop


def with_sample_weight(batch: Batch, weight: Tensor | None) -> Batch:
    """Return the batch with its samples' weights, taken from `weight` (N,). Padding repeats get weight 1."""
    return batch if weight is None else batch._replace(weight=weight[batch.index].where(batch.index >= 0, 1))


def flatten_labels(label: Tensor) -> Tensor:
    """Return labels of shape (b, 1) as (b,), others unchanged."""
    return label.squeeze(1) if label.dim() == 2 and label.shape[1] == 1 else label


class LoadedBatches:
    """Batches, on the training device, of a data set that is loaded item by item. Labels (b, 1) become (b,)."""

    def __init__(self, dataset: IndexedDataset, device: torch.device, num_workers: int, name: str = "the data set"):
        self.loader = Loader(dataset, num_workers, name=name, pin_memory=device.type == "cuda")
        self.device = device

    def entries(self, sampler: CondensedSampler) -> list:
        """Return this rank's (index, mix tree) pairs of the sampler's epoch, padding repeats included."""
        return list(sampler)

    def epoch(self, entries: Sequence, batches: Sequence[slice], seed: int, epoch: int) -> Iterator[Batch]:
        """Yield the training batches of these entries. Transforms draw from the generators that the trainer seeded."""
        return map(self._batch, self.loader.load([entries[part] for part in batches]))

    def eval_batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield samples rank, rank + world_size, … once each, in order of their index, unmixed.

        Every rank gets the same number of samples. Padding repeats at the end have index -1.
        """
        index, sample = (part.tolist() for part in _shard_indices(len(self.loader.dataset), rank, world_size))
        entries = list(zip(index, sample, strict=True))
        batches = [entries[start : start + batch_size] for start in range(0, len(entries), batch_size)]
        return map(self._batch, self.loader.load(batches))

    def first(self, count: int) -> Batch:
        """Return the first `count` samples, or all if there are fewer, unmixed.

        Raises:
            ValueError: An item cannot be loaded. The message names it.
        """
        return self._batch(self.loader.first(count))

    def close(self) -> None:
        """End the worker processes."""
        self.loader.close()

    def _batch(self, loaded: Sequence[Tensor]) -> Batch:
        x, label, index = (part.to(self.device, non_blocking=True) for part in loaded)
        return Batch(x, flatten_labels(label), index)


class ResidentBatches:
    """Batches of images that are all on the device. Each batch is cropped, flipped and normalised there.

    It has the methods of `LoadedBatches`.
    """

    def __init__(self, dataset: ImageSet, condenser: KnowledgeCondenser | None, device: torch.device):
        self.images, self.labels = dataset.tensors(device)
        self.views = dataset.views
        self.condenser = condenser
        self.device = device
        self._current, self._stage = self.images, 0

    def entries(self, sampler: CondensedSampler) -> tuple[Tensor, Tensor]:
        """Return this rank's (index, sample), (n,) int64 each, with padding repeats. Mixes the images if a new stage has begun."""
        if self._stage != self.condenser.stage:
            self._stage, self._current = self.condenser.stage, self.images  # free the last stage's images first
            self._current = self.condenser.mix(self.images)
        return self._on_device(sampler.order())

    def epoch(self, entries: Sequence, batches: Sequence[slice], seed: int, epoch: int) -> Iterator[Batch]:
        """Yield the training batches of these entries. A sample's view depends only on seed, epoch and sample."""
        index, sample = entries
        for part in batches:
            chosen = sample[part]
            x = self.views(self._current[chosen], chosen, seed=seed, epoch=epoch)
            yield Batch(x, self.labels[chosen], index[part])

    def eval_batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield samples as `LoadedBatches.eval_batches` does, neither cropped nor flipped."""
        index, sample = self._on_device(_shard_indices(len(self.labels), rank, world_size))
        for start in range(0, len(index), batch_size):
            part = slice(start, start + batch_size)
            x = self.views.normalize(self.images[sample[part]])
            yield Batch(x, self.labels[sample[part]], index[part])

    def first(self, count: int) -> Batch:
        """Return the first `count` samples, or all if there are fewer."""
        return next(self.eval_batches(count))

    def close(self) -> None:
        """Do nothing: there are no worker processes."""

    def _on_device(self, arrays: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor]:
        index, sample = (torch.from_numpy(array).to(self.device) for array in arrays)
        return index, sample


class StreamedBatches:
    """Batches of images that stay on disk. Worker processes decode and mix them; the rest happens on the device.

    It yields the batches that `ResidentBatches` yields for the same images, bit for bit, and has its methods.
    """

    def __init__(
        self,
        dataset: ImageFiles,
        condenser: KnowledgeCondenser | None,
        device: torch.device,
        num_workers: int,
        name: str = "the data set",
    ):
        self.loader = Loader(IndexedDataset(dataset), num_workers, name=name, pin_memory=device.type == "cuda")
        self.labels = torch.from_numpy(dataset.labels).to(device)
        self.views = dataset.views
        self.condenser = condenser
        self.device = device

    def entries(self, sampler: CondensedSampler) -> tuple[np.ndarray, np.ndarray]:
        """Return this rank's (index, sample), (n,) int64 each, with padding repeats."""
        return sampler.order()

    def epoch(self, entries: Sequence, batches: Sequence[slice], seed: int, epoch: int) -> Iterator[Batch]:
        """Yield the training batches of these entries. A sample's view depends only on seed, epoch and sample."""
        trees = self.condenser.mix_trees
        for images, index, sample in self._load(*entries, batches, trees):
            yield Batch(self.views(images, sample, seed=seed, epoch=epoch), self.labels[sample], index)

    def eval_batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield samples as `LoadedBatches.eval_batches` does, neither cropped nor flipped."""
        index, sample = _shard_indices(len(self.labels), rank, world_size)
        parts = [slice(start, start + batch_size) for start in range(0, len(index), batch_size)]
        for images, own_index, own_sample in self._load(index, sample, parts, {}):
            yield Batch(self.views.normalize(images), self.labels[own_sample], own_index)

    def first(self, count: int) -> Batch:
        """Return the first `count` samples, or all if there are fewer. Raises ValueError if an image cannot be read."""
        images, _, index = (part.to(self.device) for part in self.loader.first(count))
        return Batch(self.views.normalize(images), self.labels[index], index)

    def close(self) -> None:
        """End the worker processes."""
        self.loader.close()

    def _load(
        self, index: np.ndarray, sample: np.ndarray, batches: Sequence[slice], trees: Mapping[int, MixTree]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield images, index and sample of every batch on the device."""
        entries = ([(one, trees.get(one, one)) for one in sample[part].tolist()] for part in batches)
        # Decoding draws no random numbers, so the seed is free. Torch's generator stays as it would for images in memory.
        loaded = self.loader.load(entries, seed=0)
        for (images, _, _), part in zip(loaded, batches, strict=True):
            arrays = (images, torch.from_numpy(index[part]), torch.from_numpy(sample[part]))
            own_images, own_index, own_sample = (array.to(self.device, non_blocking=True) for array in arrays)
            yield own_images, own_index, own_sample


BatchSource = LoadedBatches | ResidentBatches | StreamedBatches


def _shard_indices(count: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a rank's (index, sample), int64. Past the last sample the first ones repeat, with index -1."""
    position = np.arange(rank, -(-count // world_size) * world_size, world_size)
    return np.where(position < count, position, PADDING_INDEX), position % count
