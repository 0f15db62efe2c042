"""Mixup and CutMix: each image of a batch is mixed with the one before it, and so are their labels."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..condensation.random_keys import BATCH_MIXING, random_keys
from ..methods import Batch
from .recipe import Recipe

UNIFORMS = 5  # random numbers of a batch: which mix, two for its share, two for the centre of CutMix's box


class BatchMixer:
    """A function of batches that mixes them.

    A batch of one sample is mixed with itself, so it does not change.

    Args:
        strengths: Name in `MIXES` -> alpha > 0 of the share's distribution, Beta(alpha, alpha). One name is drawn per batch.
        classes: The number of classes.
    """

    def __init__(self, strengths: Mapping[str, float], classes: int):
        self.strengths = strengths
        self.classes = classes

    @classmethod
    def of(cls, recipe: Recipe, classes: int) -> "BatchMixer | None":
        """Return the mixer that the recipe asks for, or None."""
        strengths = {name: getattr(recipe, name) for name in MIXES if getattr(recipe, name) > 0}
        return cls(strengths, classes) if strengths else None

    def mix(self, batch: Batch, uniforms: Sequence[float]) -> Batch:
        """Return the mixed batch. Index and weight of a mixed sample are those of the sample that it shows most of.

        Args:
            batch: A batch with labels (b,) int64.
            uniforms: A row of `draw_uniforms`.

        Returns:
            The batch with labels (b, classes) float32, the share of each class.

        Raises:
            TypeError: x is not floating point.
            ValueError: A mix is CutMix, and x is not (b, c, h, w).
        """
        names, x = [*self.strengths], batch.x
        if not x.is_floating_point():
            raise TypeError(
                f"{names[0]} mixes x of a floating-point dtype, got {x.dtype}: convert it in the data set's transform"
            )
        if "cutmix" in names and x.dim() != 4:
            raise ValueError(f"cutmix mixes x of shape (b, c, h, w), got {tuple(x.shape)}")
        which, *others = uniforms
        name = names[int(which * len(names))]
        mixed, share = MIXES[name](x, self.strengths[name], others)
        label = batch.label[:, None]
        shares = torch.zeros(len(x), self.classes, device=x.device).scatter_(1, label, share)
        shares.scatter_add_(1, label.roll(1, 0), torch.full_like(shares[:, :1], 1 - share))
        mixed_batch = batch._replace(x=mixed, label=shares)
        if share >= 0.5:
            return mixed_batch
        weight = None if batch.weight is None else batch.weight.roll(1, 0)
        return mixed_batch._replace(index=batch.index.roll(1, 0), weight=weight)


def draw_uniforms(count: int, *, seed: int, epoch: int) -> list[list[float]]:
    """Return `UNIFORMS` numbers in (0, 1) for each of `count` batches, a pure function of `(seed, epoch, batch)`.

    They are computed on the host, so they are the same on every device, and the same on every rank.
    """
    keys = random_keys(count * UNIFORMS, seed=seed, step=epoch, stream=BATCH_MIXING)
    return (((keys >> 12) + 0.5) / 2**52).reshape(count, UNIFORMS).tolist()


def beta_quantity(alpha: float, radius: float, angle: float) -> float:
    """Return a number of the distribution Beta(alpha, alpha), alpha > 0, from two independent numbers in (0, 1).

    With T of Student's t distribution with 2 alpha degrees of freedom, 1/2 + T / (2 sqrt(2 alpha + T^2)) has it. T is
    drawn by the polar method (Bailey, Mathematics of Computation, 1994), which rejects no numbers.
    """
    cosine = math.cos(2 * math.pi * angle)
    quotient = math.sqrt(math.expm1(min(-math.log(radius) / alpha, 700.0))) * cosine  # e^700 is still a float
    return 0.5 + 0.5 * quotient / math.hypot(1.0, quotient)


def mixup(x: Tensor, alpha: float, uniforms: Sequence[float]) -> tuple[Tensor, float]:
    """Return samples blended with their predecessors, and the share of the first of both (Zhang et al., ICLR 2018).

    The share is at least 1/2, so that a mixed sample shows itself more than its partner. The pairs are random and the
    distribution is symmetric, so this changes which of two samples a mix is named after, and not what is mixed.
    """
    share = beta_quantity(alpha, *uniforms[:2])
    share = max(share, 1 - share)
    return x.mul(share).add_(x.roll(1, 0), alpha=1 - share), share


def cutmix(x: Tensor, alpha: float, uniforms: Sequence[float]) -> tuple[Tensor, float]:
    """Return images with a box of their predecessors, and the share of their own pixels (Yun et al., ICCV 2019).

    The box has the proportions of the image. Its centre is uniform, and what is outside the image is cut off.

    Args:
        x: (b, c, h, w).
        alpha: The box covers 1 - s of the image before it is cut off, with s of the distribution Beta(alpha, alpha).
        uniforms: Two numbers in (0, 1) for s, and two for the centre.
    """
    side = math.sqrt(1 - beta_quantity(alpha, *uniforms[:2]))
    height, width = x.shape[2:]
    rows, columns = (_clip(length, side, centre) for length, centre in zip((height, width), uniforms[2:], strict=True))
    mixed = x.clone()
    mixed[:, :, rows, columns] = x.roll(1, 0)[:, :, rows, columns]
    return mixed, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)


def _clip(length: int, side: float, centre: float) -> slice:
    """Return the pixels that a box covers in one dimension of the image."""
    size = round(side * length)
    start = int(centre * length) - size // 2
    return slice(max(start, 0), min(start + size, length))


MIXES = {"mixup": mixup, "cutmix": cutmix}
