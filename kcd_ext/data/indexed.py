"""Any (x, label) data set, with original indices and with the mixes that condensation asks for."""

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

from ..condensation.mixing import MixTree, blend

# The PIL modes whose numbers are intensities and which PIL recognises again in an array of them.
PIL_MODES = ("L", "LA", "RGB", "RGBA", "F")


REMEDY = (
    "resize them in the data set and leave crops and flips to the transform of IndexedDataset, or take epsilon=0, which "
    "condenses without mixing"
)


class UnlikeItemsError(ValueError):
    """Raw items that are to be mixed differ in shape, dtype or kind."""


class IndexedDataset(Dataset):
    """Wraps a map-style data set of (x, label): item (index, recipe) is (x, label, index).

    Raw items are mixed as the recipe says, then transformed; the label is that of the sample itself (of the leftmost
    index of the recipe). The index is handed on as it came, so a repeat marked -1 stays marked. A plain index is an
    item without a mix, so the usual samplers work too.

    Mixing needs x to be a tensor, a NumPy array or a PIL image (modes L, LA, RGB, RGBA, F), and gives the same kind
    back: uint8 cut off as the authors do, floating point in its own dtype. Give random augmentation as `transform`
    here rather than to `dataset`, or mixes are made of augmented images. Raw items that are mixed must have one shape and
    dtype: resize them in `dataset`, or let the condenser have epsilon=0, which mixes nothing.

    Args:
        dataset: anything with `len` and integer items (x, label).
        transform: called with x after mixing. None: x as it is.

    Raises:
        TypeError: `dataset` has no length, or `transform` is not callable. On access: an item is no pair, or cannot be
            mixed.
        IndexError: on access: a plain index outside [0, len).
        ValueError: on access: the shapes or dtypes that are to be mixed differ.
    """

    _like: str | None = None  # what every raw item must be; None: anything

    def __init__(self, dataset: Any, transform: Callable[[Any], Any] | None = None):
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise TypeError(f"dataset must have a length and integer items, got {type(dataset).__name__}")
        if transform is not None and not callable(transform):
            raise TypeError(f"transform must be callable or None, got {type(transform).__name__}")
        self.dataset = dataset
        self.transform = transform

    def for_mixing(self) -> IndexedDataset:
        """Return a copy all of whose raw items must be like the first one, so that any two can be mixed.

        Raises:
            TypeError, ValueError: the first item cannot be mixed.
            UnlikeItemsError: (on access) an item has another shape or dtype, or is of another kind, than the first one.
        """
        first, _ = self._item(0)
        try:
            _mixed(first, first, 0.5)
        except (TypeError, ValueError) as error:
            without = "" if "epsilon=0" in str(error) else "; epsilon=0 condenses without mixing"
            raise type(error)(f"{error}{without}") from error
        alike = copy.copy(self)
        alike._like = _described(first)
        return alike

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, entry: int | tuple[int, MixTree]) -> tuple[Any, Any, int]:
        index, recipe = entry if isinstance(entry, tuple) else (self._plain(entry),) * 2
        x, label = self._make(recipe)
        return (x if self.transform is None else self.transform(x)), label, index

    def _plain(self, index: Any) -> int:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index must lie in [0, {len(self)}), got {index}")
        return index

    def _make(self, recipe: MixTree) -> tuple[Any, Any]:
        """The mixed raw item. Without recursion, so that mixes can be nested as deep as one likes."""
        made: dict[int, tuple[Any, Any]] = {}  # a recipe can name a part of itself many times: each is made once

        def part_of(recipe: MixTree) -> tuple[Any, Any]:
            return made[id(recipe)] if isinstance(recipe, tuple) else self._item(recipe)

        waiting = [recipe] if isinstance(recipe, tuple) else []
        while waiting:
            first, second, *weights = mix = waiting[-1]
            missing = [part for part in (second, first) if isinstance(part, tuple) and id(part) not in made]
            if missing:
                waiting += missing
                continue
            waiting.pop()
            if id(mix) not in made:  # it can have waited twice
                (x, label), (other, _) = part_of(first), part_of(second)
                made[id(mix)] = _mixed(x, other, *weights), label
        return part_of(recipe)

    def _item(self, index: int) -> tuple[Any, Any]:
        item = self.dataset[index]
        if not isinstance(item, tuple | list) or len(item) != 2:
            got = f"{len(item)} entries" if isinstance(item, tuple | list) else type(item).__name__
            raise TypeError(f"dataset must give pairs (x, label), got {got} at index {index}")
        if self._like is not None and (found := _described(item[0])) != self._like:
            raise UnlikeItemsError(
                f"raw items that are to be mixed must be alike, got {self._like} at index 0 and {found} at index {index}: "
                f"{REMEDY}"
            )
        return item[0], item[1]


def _mixed(first: Any, second: Any, weight: float, own: float | None = None) -> Any:
    """`blend` for whatever an item can be."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return blend(first, second, weight, own)
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return blend(torch.from_numpy(first.copy()), torch.from_numpy(second.copy()), weight, own).numpy()
    if _is_pil(first) and _is_pil(second):
        if first.mode != second.mode or first.mode not in PIL_MODES:
            raise ValueError(
                f"PIL images that are mixed must have one mode out of {', '.join(PIL_MODES)}, "
                f"got {first.mode} and {second.mode}; convert them first"
            )
        mixed = blend(torch.from_numpy(np.array(first)), torch.from_numpy(np.array(second)), weight, own)
        return sys.modules["PIL.Image"].fromarray(mixed.numpy())
    raise TypeError(
        f"items that are mixed must both be tensors, NumPy arrays or PIL images, "
        f"got {type(first).__name__} and {type(second).__name__}"
    )


def _described(x: Any) -> str:
    """Return what must be the same of two items that are mixed."""
    if isinstance(x, Tensor | np.ndarray):
        return f"{'tensor' if isinstance(x, Tensor) else 'array'} of {x.dtype} {tuple(x.shape)}"
    if _is_pil(x):
        return f"PIL image of mode {x.mode} and size {x.size}"
    return type(x).__name__


def _is_pil(item: Any) -> bool:
    # Without importing PIL: an item can be an image of it only if somebody has.
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(item, pil.Image)
