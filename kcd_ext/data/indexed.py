"""`IndexedDataset`: adds original indices and mixes to any `(x, label)` data set."""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..checks import is_int
from ..condensation.mixing import MixTree, blend

# The PIL modes whose numbers are intensities and which PIL recognises again in an array of them.
PIL_MODES = ("L", "LA", "RGB", "RGBA", "F")


ADVICE = (
    "resize them in the data set and crop and flip in the transform of IndexedDataset, or set epsilon=0 to condense "
    "without mixing"
)


class MismatchedItemsError(ValueError):
    """The error for raw items to mix that differ in shape, dtype or kind."""


class IndexedDataset(Dataset):
    """A wrapper for a map-style data set of `(x, label)`: item `(index, mix_tree)` is `(x, label, index)`.

    Items `(x, label, index)` of `dataset` work too. Their own index is left out: what counts is the position in `dataset`.

    Raw items are mixed as the mix tree describes, then transformed. The label is that of the sample itself, the leftmost
    index of the tree. The index is passed through, so a repeat marked -1 stays marked. A plain index is an item without
    a mix, so ordinary samplers work too.

    To be mixed, x must be a tensor, a NumPy array or a PIL image (modes L, LA, RGB, RGBA, F). The mix has the same kind:
    uint8 truncated as in the authors' code, floating point in its own dtype. Raw items that are mixed must have one shape
    and dtype: resize them in `dataset`, or use a condenser with epsilon=0, which mixes nothing. Pass random augmentation
    as `transform` here, not to `dataset`; otherwise augmented images are mixed.

    Args:
        dataset: Any object with `len` and integer items `(x, label)` or `(x, label, index)`.
        transform: Called with x after mixing. None: x unchanged.

    Raises:
        TypeError: `dataset` has no length, or `transform` is not callable. On access: an item is not a pair, or cannot
            be mixed.
        IndexError: On access: a plain index is outside [0, len).
        ValueError: On access: items to mix differ in shape or dtype.
    """

    _expected_kind: str | None = None  # kind of every raw item; None: any

    def __init__(self, dataset: Any, transform: Callable[[Any], Any] | None = None):
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise TypeError(f"dataset must have a length and integer items, got {type(dataset).__name__}")
        if transform is not None and not callable(transform):
            raise TypeError(f"transform must be callable or None, got {type(transform).__name__}")
        self.dataset = dataset
        self.transform = transform

    def for_mixing(self) -> IndexedDataset:
        """Return a copy that requires every raw item to be of the first one's kind, so that any two can be mixed.

        Raises:
            TypeError: The first item is of a kind or dtype that cannot be mixed.
            ValueError: The first item is a PIL image of a mode that cannot be mixed.
            MismatchedItemsError: On access: an item differs from the first one in shape, dtype or kind.
        """
        first, _ = self._item(0)
        try:
            _blend_items(first, first, 0.5)
        except (TypeError, ValueError) as error:
            advice = "" if "epsilon=0" in str(error) else "; set epsilon=0 to condense without mixing"
            raise type(error)(f"{error}{advice}") from error
        strict = copy.copy(self)
        strict._expected_kind = _describe_kind(first)
        return strict

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, entry: int | tuple[int, MixTree]) -> tuple[Any, Any, int]:
        index, tree = entry if isinstance(entry, tuple) else (self._check_index(entry),) * 2
        x, label = self._mix(tree)
        return (x if self.transform is None else self.transform(x)), label, index

    def _check_index(self, index: Any) -> int:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        return index

    def _mix(self, tree: MixTree) -> tuple[Any, Any]:
        """Return the mixed raw item and its label. Iterative, so trees can be nested to any depth."""
        finished: dict[int, tuple[Any, Any]] = {}  # a tree can contain a subtree many times: mix it once

        def item_of(tree: MixTree) -> tuple[Any, Any]:
            return finished[id(tree)] if isinstance(tree, tuple) else self._item(tree)

        stack = [tree] if isinstance(tree, tuple) else []
        while stack:
            first, second, *weights = node = stack[-1]
            missing = [part for part in (second, first) if isinstance(part, tuple) and id(part) not in finished]
            if missing:
                stack += missing
                continue
            stack.pop()
            if id(node) not in finished:  # it can be on the stack twice
                (x, label), (other, _) = item_of(first), item_of(second)
                finished[id(node)] = _blend_items(x, other, *weights), label
        return item_of(tree)

    def _item(self, index: int) -> tuple[Any, Any]:
        item = self.dataset[index]
        if not isinstance(item, tuple | list) or not (len(item) == 2 or (len(item) == 3 and _is_index(item[2]))):
            got = f"{len(item)} entries" if isinstance(item, tuple | list) else type(item).__name__
            raise TypeError(f"dataset must return pairs (x, label) or (x, label, index), got {got} at index {index}")
        if self._expected_kind is not None and (kind := _describe_kind(item[0])) != self._expected_kind:
            raise MismatchedItemsError(
                f"raw items that are mixed must be alike, got {self._expected_kind} at index 0 and {kind} at index {index}: "
                f"{ADVICE}"
            )
        return item[0], item[1]


def _is_index(entry: Any) -> bool:
    """Return whether an item's third entry is an index: an integer, also as a tensor or array of one number."""
    if isinstance(entry, Tensor | np.ndarray):
        return entry.ndim == 0 and is_int(entry.item())
    return is_int(entry)


def _blend_items(first: Any, second: Any, weight: float, first_weight: float | None = None) -> Any:
    """Return `blend` of two tensors, NumPy arrays or PIL images, as the same kind."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return blend(first, second, weight, first_weight)
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return blend(torch.from_numpy(first.copy()), torch.from_numpy(second.copy()), weight, first_weight).numpy()
    if _is_pil(first) and _is_pil(second):
        if first.mode != second.mode or first.mode not in PIL_MODES:
            raise ValueError(
                f"PIL images that are mixed must have one mode out of {', '.join(PIL_MODES)}, "
                f"got {first.mode} and {second.mode}; convert them first"
            )
        mixed = blend(torch.from_numpy(np.array(first)), torch.from_numpy(np.array(second)), weight, first_weight)
        return sys.modules["PIL.Image"].fromarray(mixed.numpy())
    raise TypeError(
        f"items that are mixed must both be tensors, NumPy arrays or PIL images, "
        f"got {type(first).__name__} and {type(second).__name__}"
    )


def _describe_kind(x: Any) -> str:
    """Return the properties that two items must share to be mixed."""
    if isinstance(x, Tensor | np.ndarray):
        return f"{'tensor' if isinstance(x, Tensor) else 'array'} of {x.dtype} {tuple(x.shape)}"
    if _is_pil(x):
        return f"PIL image of mode {x.mode} and size {x.size}"
    return type(x).__name__


def _is_pil(item: Any) -> bool:
    # Does not import PIL: an item can only be a PIL image if PIL is imported already.
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(item, pil.Image)
