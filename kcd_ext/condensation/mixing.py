"""Value-adaptive knowledge summary (KCD, Eq. 14–15): a kept image takes over a share of a dropped one.

A *mix tree* (`MixTree`) describes which images a sample is made of:

- an index: the raw image;
- `(first, second, e)`: (1 - e)·first + e·second, where `first` and `second` are mix trees;
- `(first, second, e, first_weight)`: first_weight·first + e·second.

It consists of plain Python ints, floats and tuples. So it travels with the index to any loader worker and stays exact.

Pixels are those of the authors' code, which computes in single precision. The kept image has the weight
ε·((|K0| - i)/|K0|) + (1 - ε), each operation rounded to float32, and e is 1 minus that. Two products and a sum in
float32 are then truncated to uint8. The order of operations matters: in float64, (1 - e)·a + e·b makes about 5 % of
the pixels on which both images agree darker by one level, again at every stage. In the authors' arithmetic these pixels do
not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from .condensation import Condensation

MixTree: TypeAlias = "int | tuple[MixTree, MixTree, float] | tuple[MixTree, MixTree, float, float]"

BLEND_BLOCK_SIZE = 2**17  # numbers that are blended at a time, in entire images: at least one

# Which dtypes can be blended, and the dtype each is computed in.
_ARITHMETIC = {
    torch.uint8: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


def mix_strength(pairs: int, dropped: int, epsilon: float) -> Tensor:
    """Return e_i = ε·i/|K0| (Eq. 15) for i = 0 … pairs - 1, `(pairs,)` float64; `dropped` is |K0|."""
    return epsilon * torch.arange(pairs, dtype=torch.float64, device="cpu") / dropped


def pixel_weight(pairs: int, dropped: int, epsilon: float, convex: bool) -> Tensor:
    """Return the e_i that pixels are multiplied by: `mix_strength` in the authors' single precision, `(pairs,)` float64.

    The numbers are float32 values stored as float64. For `convex` and epsilon <= 1/2, 1 - e_i is exactly the authors'
    weight of the kept image. Without `convex`, which their code does not have, e_i is rounded once.
    """
    if not convex:
        return mix_strength(pairs, dropped, epsilon).float().double()
    position = torch.arange(pairs, dtype=torch.float32, device="cpu")
    first_weight = epsilon * ((dropped - position) / dropped) + (1 - epsilon)
    return (1 - first_weight).double()


def build_mix_trees(log: Iterable[tuple[int, int, float]], convex: bool) -> dict[int, MixTree]:
    """Return the mix tree of every mixed sample, from the log of mixes `(sample, partner, e)` in chronological order.

    A mix uses both images as they are at that moment, as if the log overwrote a copy of the data. Within one stage the
    order does not matter: the kept and the dropped samples are disjoint.
    """
    first_weight = () if convex else (1.0,)
    trees: dict[int, MixTree] = {}
    for sample, partner, weight in log:
        trees[sample] = (trees.get(sample, sample), trees.get(partner, partner), weight, *first_weight)
    return trees


def blend(first: Tensor, second: Tensor, weight: float | Tensor, first_weight: float | Tensor | None = None) -> Tensor:
    """Return first_weight·first + weight·second as a new tensor of their shape and dtype.

    uint8 is computed in float32, clipped to [0, 255] (only a mix that is not convex exceeds 255) and truncated. float16
    and bfloat16 are computed in float32; float32 and float64 in their own precision.

    Args:
        first: One item.
        second: The other item, of the same shape and dtype.
        weight: A number, or a float64 tensor that broadcasts against the items. Rounded to the dtype of the computation.
        first_weight: As `weight`. None: 1 - weight.

    Raises:
        ValueError: Shapes or dtypes differ.
        TypeError: The dtype cannot be blended.
    """
    if first.shape != second.shape or first.dtype != second.dtype:
        raise ValueError(
            f"items that are mixed must have one shape and dtype, got {first.dtype} of shape {tuple(first.shape)} "
            f"and {second.dtype} of shape {tuple(second.shape)}: resize them in the data set and crop in the transform of "
            f"IndexedDataset, or set epsilon=0 to condense without mixing"
        )
    if first.dtype not in _ARITHMETIC:
        takes = ", ".join(str(dtype).removeprefix("torch.") for dtype in _ARITHMETIC)
        raise TypeError(
            f"items of dtype {first.dtype} cannot be mixed, only {takes}; set epsilon=0 to condense without mixing"
        )
    first_weight = 1.0 - weight if first_weight is None else first_weight
    dtype = _ARITHMETIC[first.dtype]
    first_weight, weight = (
        part.to(first.device, dtype) if isinstance(part, Tensor) else part for part in (first_weight, weight)
    )
    mixed = first.to(dtype) * first_weight + second.to(dtype) * weight
    if first.dtype == torch.uint8:
        mixed = mixed.clamp(0, 255)
    return mixed.to(first.dtype)


def mix_images(images: np.ndarray | Tensor, condensation: Condensation) -> np.ndarray | Tensor:
    """Return all images after the mixing of one stage, exactly as the authors' code overwrites its images (Eq. 14–15).

    To accumulate mixes over stages, pass the result to the next stage. Otherwise pass the raw images each time.

    Args:
        images: uint8, `(n, h, w, c)` or any other `(n, ...)`, a NumPy array or a tensor. Not modified.
        condensation: The result of `KnowledgeCondenser.step`.

    Returns:
        A new array or tensor in which `images[mixed[i]]` is blended with `images[partner[i]]`; the rest is copied.

    Raises:
        TypeError: `images` is not a uint8 array or tensor.
        ValueError: There are too few images.
    """
    if not isinstance(images, np.ndarray | Tensor) or images.dtype not in (np.uint8, torch.uint8):
        got = f"{type(images).__name__} of {getattr(images, 'dtype', 'no dtype')}"
        raise TypeError(f"images must be a NumPy array or a tensor of uint8, shape (n, h, w, c), got {got}")
    named = torch.cat((condensation.kept, condensation.dropped))
    if images.ndim < 1 or len(images) <= int(named.max()):
        raise ValueError(f"images must contain sample {int(named.max())}, got shape {tuple(images.shape)}")
    result = torch.from_numpy(images.copy()) if isinstance(images, np.ndarray) else images.clone()
    mix_in_place(result, condensation.mixed, condensation.partner, condensation.weight, condensation.convex)
    return result.numpy() if isinstance(images, np.ndarray) else result


def mix_in_place(images: Tensor, mixed: Tensor, partner: Tensor, weight: Tensor, convex: bool) -> None:
    """Overwrite images with the mixes of a log, one after the other.

    The result is bit for bit that of the trees of `build_mix_trees`. Mixes that do not read each other, such as those of
    one stage, are computed together.

    Args:
        images: `(N, ...)` on any device, modified in place.
        mixed: `(m,)` int64 on the CPU, the samples to overwrite.
        partner: `(m,)` int64 on the CPU.
        weight: `(m,)` float64 on the CPU, the partner's weight.
        convex: Whether the sample's own image has the weight 1 - weight; otherwise 1.
    """
    first_weight = 1 - weight if convex else torch.ones_like(weight)
    for part in _independent_slices(mixed.tolist(), partner.tolist()):
        _blend_rows(images, mixed[part], mixed[part], partner[part], weight[part], first_weight[part])


def _independent_slices(mixed: list[int], partner: list[int]) -> Iterator[slice]:
    """Yield the log in slices, as long as possible, none of which reads a sample that it has written."""
    start, written = 0, set()
    for position, (sample, other) in enumerate(zip(mixed, partner, strict=True)):
        if sample in written or other in written:
            yield slice(start, position)
            start, written = position, set()
        written.add(sample)
    yield slice(start, len(mixed))


def _blend_rows(
    images: Tensor, target: Tensor, first: Tensor, second: Tensor, weight: Tensor, first_weight: Tensor
) -> None:
    """Set images[target[i]] = first_weight[i]·images[first[i]] + weight[i]·images[second[i]].

    No row that is read is another one's target. Rows and float64 weights are `(m,)` on the CPU. A few rows are blended
    at a time, so that intermediate results stay in the cache.
    """
    count = max(1, BLEND_BLOCK_SIZE // max(1, images[:1].numel()))
    column = (-1, *[1] * (images.ndim - 1))
    rows = (part.to(images.device).split(count) for part in (target, first, second))
    weights = (part.split(count) for part in (weight, first_weight))
    for to, one, other, e, one_weight in zip(*rows, *weights, strict=True):
        mixed = blend(
            images.index_select(0, one), images.index_select(0, other), e.view(column), one_weight.view(column)
        )
        images.index_copy_(0, to, mixed)
