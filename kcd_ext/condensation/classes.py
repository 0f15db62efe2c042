"""Classes of samples: a minimum of each in what is kept."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def checked_labels(labels: Tensor | np.ndarray | Sequence[int], num_samples: int) -> Tensor:
    """Return labels as a new (N,) int64 tensor on the CPU.

    Raises TypeError or ValueError unless they are `num_samples` integers in [0, 2^63).
    """
    takes = f"labels must be {num_samples} integers >= 0, shape ({num_samples},)"
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu().numpy() if labels.layout == torch.strided and not labels.is_meta else None
    try:
        found = np.asarray(labels)
    except (ValueError, TypeError) as error:  # lists of several lengths
        raise TypeError(f"{takes}, got {type(labels).__name__}") from error
    if not np.issubdtype(found.dtype, np.integer):
        raise TypeError(f"{takes}, got {type(labels).__name__} of {found.dtype}")
    if found.shape != (num_samples,):
        raise ValueError(f"{takes}, got shape {found.shape}")
    if found.min() < 0 or found.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{takes}, got {found.min()} to {found.max()}")
    return torch.from_numpy(found.astype(np.int64))


def largest_minimum(labels: Tensor, size: int) -> int:
    """Return the largest minimum of every class that fits into `size` samples; a class of fewer samples takes these.

    `labels` is (N,) int64. Where all samples fit, every minimum does, and the largest is 2^63 - 1.
    """
    _, counts = np.unique(labels.numpy(), return_counts=True)
    if counts.sum() <= size:
        return np.iinfo(np.int64).max
    candidates = range(1, int(counts.max()) + 1)
    return bisect.bisect_right(candidates, size, key=lambda least: int(np.minimum(counts, least).sum()))


def with_minimum(order: Tensor, size: int, labels: Tensor, least: int) -> Tensor:
    """Return which of `order` stay, (N,) bool: the first `size`, except that every class has at least `least`.

    A class of fewer samples keeps all. The first ones of a class stay, in the place of the last ones of `order` that no
    class needs. `order` is (N,) int64, the highest rank first; all minima together must fit into `size`.
    """
    classes = labels[order].numpy()
    by_class = np.argsort(classes, kind="stable")  # positions in `order`, class by class, the highest rank first
    _, first, counts = np.unique(classes[by_class], return_index=True, return_counts=True)
    rank_in_class = np.empty(len(classes), dtype=np.int64)
    rank_in_class[by_class] = np.arange(len(classes)) - np.repeat(first, counts)
    stays = rank_in_class < least
    others = np.flatnonzero(~stays)
    stays[others[: size - int(stays.sum())]] = True
    return torch.from_numpy(stays)
