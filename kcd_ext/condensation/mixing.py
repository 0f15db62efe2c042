"""Value-adaptive knowledge summary (KCD, Eq. 14–15): what a kept sample takes over from one that is dropped.

A recipe, a `MixTree`, says what a sample's image is made of: an index (the raw image), or (recipe, recipe, e) for
(1 - e)·first + e·second, or (recipe, recipe, e, own) for own·first + e·second. It is plain Python ints, floats and
tuples, so it travels with the index to any worker and is exact there.

Pixels are those of the authors' code, which works in single precision: the weight of the image itself is
ε·((|K0| - i)/|K0|) + (1 - ε), each operation rounded to float32, and e is 1 minus that; two products and a sum in
float32 are then cut off to uint8. The order matters: in float64, (1 - e)·a + e·b darkens about 5 % of the pixels in
which both images agree by one level, and so it would again at every stage; in the authors' arithmetic those stay as
they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from .condensation import Condensation

MixTree: TypeAlias = "int | tuple[MixTree, MixTree, float] | tuple[MixTree, MixTree, float, float]"

BLOCK = 2**17  # numbers that many images are blended at a time

# The dtypes that are blended, and the one the arithmetic is done in.
_ARITHMETIC = {
    torch.uint8: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


def mix_strength(pairs: int, dropped: int, epsilon: float) -> Tensor:
    """Eq. 15: e_i = ε·i/|K0| for i = 0 … pairs - 1, (pairs,) float64; `dropped` is |K0|."""
    return epsilon * torch.arange(pairs, dtype=torch.float64, device="cpu") / dropped


def pixel_weight(pairs: int, dropped: int, epsilon: float, convex: bool) -> Tensor:
    """The e_i that pixels are multiplied with: `mix_strength` in the authors' single precision, (pairs,) float64.

    The numbers are float32 ones held in float64. For `convex` and epsilon <= 1/2, 1 - e_i is then exactly the authors'
    weight of the image itself; without `convex` (a form their code has not) e_i is rounded once.
    """
    if not convex:
        return mix_strength(pairs, dropped, epsilon).float().double()
    position = torch.arange(pairs, dtype=torch.float32, device="cpu")
    own = epsilon * ((dropped - position) / dropped) + (1 - epsilon)
    return (1 - own).double()


def build_recipes(log: Iterable[tuple[int, int, float]], convex: bool) -> dict[int, MixTree]:
    """The recipe of every sample that is a mix, from the log of mixes (sample, partner, e) in the order they were
    made.

    A mix is made of what both images are at that moment, as if the log overwrote a copy of the data. Within one stage
    that is what they were before it, in whichever order: what is dropped and what is kept have no sample in common.
    """
    own = () if convex else (1.0,)
    recipes: dict[int, MixTree] = {}
    for sample, partner, weight in log:
        recipes[sample] = (recipes.get(sample, sample), recipes.get(partner, partner), weight, *own)
    return recipes


def blend(first: Tensor, second: Tensor, weight: float | Tensor, own: float | Tensor | None = None) -> Tensor:
    """own·first + weight·second in a new tensor of their shape and dtype; `own` None: 1 - weight.

    uint8 is computed in float32, clipped to [0, 255] (only a mix that is not convex reaches 255) and cut off; float16
    and bfloat16 are computed in float32; float32 and float64 as they are. Weights are numbers, or float64 tensors that
    broadcast against the items; both are rounded to what is computed in.

    Raises ValueError if shapes or dtypes differ, TypeError for other dtypes.
    """
    if first.shape != second.shape or first.dtype != second.dtype:
        raise ValueError(
            f"items that are mixed must have one shape and dtype, got {first.dtype} of shape {tuple(first.shape)} "
            f"and {second.dtype} of shape {tuple(second.shape)}: resize them before they are mixed and crop them after it "
            f"(in the transform of IndexedDataset), or take epsilon=0, which condenses without mixing"
        )
    if first.dtype not in _ARITHMETIC:
        takes = ", ".join(str(dtype).removeprefix("torch.") for dtype in _ARITHMETIC)
        raise TypeError(
            f"items of dtype {first.dtype} cannot be mixed, only {takes}; epsilon=0 condenses without mixing"
        )
    own = 1.0 - weight if own is None else own
    wide = _ARITHMETIC[first.dtype]
    own, weight = (part.to(first.device, wide) if isinstance(part, Tensor) else part for part in (own, weight))
    mixed = first.to(wide) * own + second.to(wide) * weight
    if first.dtype == torch.uint8:
        mixed = mixed.clamp(0, 255)
    return mixed.to(first.dtype)


def mix_images(images: np.ndarray | Tensor, condensation: Condensation) -> np.ndarray | Tensor:
    """All images after the mixing of one stage, exactly as the authors overwrite theirs (Eq. 14–15, their code).

    `images`: uint8, (n, h, w, c) or any other (n, ...), a NumPy array or a tensor; it is not changed. Returned: a new
    one of the same kind, in which images[mixed[i]] is blended with images[partner[i]] and the rest is a copy. To let
    mixes pile up, give the result to the next stage; otherwise give the raw images.

    Raises TypeError if `images` is no uint8 array or tensor, ValueError if it has too few images.
    """
    if not isinstance(images, np.ndarray | Tensor) or images.dtype not in (np.uint8, torch.uint8):
        got = f"{type(images).__name__} of {getattr(images, 'dtype', 'no dtype')}"
        raise TypeError(f"images must be a NumPy array or a tensor of uint8, shape (n, h, w, c), got {got}")
    named = torch.cat((condensation.kept, condensation.dropped))
    if images.ndim < 1 or len(images) <= int(named.max()):
        raise ValueError(f"images must hold sample {int(named.max())}, got shape {tuple(images.shape)}")
    result = torch.from_numpy(images.copy()) if isinstance(images, np.ndarray) else images.clone()
    overwrite(result, condensation.mixed, condensation.partner, condensation.weight, condensation.convex)
    return result.numpy() if isinstance(images, np.ndarray) else result


def overwrite(images: Tensor, mixed: Tensor, partner: Tensor, weight: Tensor, convex: bool) -> None:
    """Overwrites images, in place, by the mixes of a log, one after the other.

    `images` (N, ...) on any device; the log is (m,) each, on the CPU: int64, int64, float64. Bit for bit what the
    recipes of `build_recipes` say; the mixes of a stage, which do not read each other, are made together.
    """
    own = 1 - weight if convex else torch.ones_like(weight)
    for part in _independent(mixed.tolist(), partner.tolist()):
        _blend_rows(images, mixed[part], mixed[part], partner[part], weight[part], own[part])


def _independent(mixed: list[int], partner: list[int]) -> Iterator[slice]:
    """The log in parts, as long as can be, of which none reads what it has written."""
    start, written = 0, set()
    for position, (sample, other) in enumerate(zip(mixed, partner, strict=True)):
        if sample in written or other in written:
            yield slice(start, position)
            start, written = position, set()
        written.add(sample)
    yield slice(start, len(mixed))


def _blend_rows(images: Tensor, target: Tensor, first: Tensor, second: Tensor, weight: Tensor, own: Tensor) -> None:
    """images[target[i]] = own[i]·images[first[i]] + weight[i]·images[second[i]], of which no row is another's target.

    Rows and float64 weights are (m,) on the CPU. A few rows at a time: what is computed in between stays in the cache.
    """
    count = max(1, BLOCK // max(1, images[:1].numel()))
    column = (-1, *[1] * (images.ndim - 1))
    rows = (part.to(images.device).split(count) for part in (target, first, second))
    weights = (part.split(count) for part in (weight, own))
    for to, one, other, e, rest in zip(*rows, *weights, strict=True):
        mixed = blend(images.index_select(0, one), images.index_select(0, other), e.view(column), rest.view(column))
        images.index_copy_(0, to, mixed)
