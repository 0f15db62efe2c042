"""Class labels in condensation: checks, and a minimum of every class in the kept set."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def check_labels(labels: Tensor | np.ndarray | Sequence[int], num_samples: int) -> Tensor:
    """Return labels as a new `(num_samples,)` int64 tensor on the CPU.

    Raises:
        TypeError: `labels` are not integers.
        ValueError: Their number is not `num_samples`, or one is outside [0, 2^63).
    """
    takes = f"labels must be {num_samples} integers >= 0, shape ({num_samples},)"
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu().numpy() if labels.layout == torch.strided and not labels.is_meta else None
    try:
        array = np.asarray(labels)
    except (ValueError, TypeError) as error:  # ragged lists
        raise TypeError(f"{takes}, got {type(labels).__name__}") from error
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{takes}, got {type(labels).__name__} of {array.dtype}")
    if array.shape != (num_samples,):
        raise ValueError(f"{takes}, got shape {array.shape}")
    if array.min() < 0 or array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{takes}, got {array.min()} to {array.max()}")
    return torch.from_numpy(array.astype(np.int64))


def largest_minimum(labels: Tensor, size: int) -> int:
    """Return the largest minimum per class that fits into `size` samples.

    A class with fewer samples than the minimum counts with all it has.

    Args:
        labels: `(N,)` int64.
        size: The number of samples to keep.

    Returns:
        The minimum; 2^63 - 1 if all N samples fit, because every minimum then fits.
    """
    _, counts = np.unique(labels.numpy(), return_counts=True)
    if counts.sum() <= size:
        return np.iinfo(np.int64).max
    candidates = range(1, int(counts.max()) + 1)
    return bisect.bisect_right(candidates, size, key=lambda minimum: int(np.minimum(counts, minimum).sum()))


def keep_class_minimum(order: Tensor, size: int, labels: Tensor, minimum: int) -> Tensor:
    """Return a mask of the samples to keep: the first `size`, adjusted so that every class keeps at least `minimum`.

    The first samples of each class are kept. They replace the last samples of `order` that no class needs.
    A class with fewer than `minimum` samples keeps all of them.

    Args:
        order: `(N,)` int64 sample indices, highest rank first.
        size: How many samples to keep; the minima of all classes must fit into it.
        labels: `(N,)` int64 class of every sample.
        minimum: Samples to keep of every class at least.

    Returns:
        `(N,)` bool over the positions of `order`.
    """
    classes = labels[order].numpy()
    by_class = np.argsort(classes, kind="stable")  # positions in `order`, class by class, highest rank first
    _, first, counts = np.unique(classes[by_class], return_index=True, return_counts=True)
    rank_in_class = np.empty(len(classes), dtype=np.int64)
    rank_in_class[by_class] = np.arange(len(classes)) - np.repeat(first, counts)
    keep = rank_in_class < minimum
    others = np.flatnonzero(~keep)
    keep[others[: size - int(keep.sum())]] = True
    return torch.from_numpy(keep)
