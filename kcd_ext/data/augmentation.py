"""Augmentation policies: random operations on batches of uint8 images, on any device, without waiting for it.

An operation changes every image of a batch in one pass, and leaves those as they are that drew another one. Three passes
make up all operations: a warp moves pixels, a blend mixes the image with a plainer version of itself, and a table maps the
grey levels of a channel. Numbers are rounded as Pillow rounds them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..condensation.random_keys import AUGMENTATION, random_bits, scale_bits

STRONGEST = 30  # strengths are 0 ... 30
ONE = 2**16  # 1 in the fixed-point numbers of a warp
GREY = (
    19595,
    38470,
    7471,
)  # parts of red, green and blue in a grey level, of 65536 (ITU-R BT.601, as Pillow rounds them)


@dataclass(frozen=True)
class Policy:
    """What a policy draws for a view, and the magnitude of each operation at the greatest strength, 30."""

    operations: int
    """The number of operations, one after the other, each drawn from all of `OPERATIONS`."""
    strength: int | None
    """The strength of every operation, in 0 ... 30. None: drawn uniformly for every operation."""
    shear: float
    """Displacement per pixel of distance from the upper left corner."""
    shift: Callable[[int], Fraction]
    """Displacement in pixels for a side of so many pixels."""
    angle: float
    """Rotation about the centre, in degrees."""
    contrast: float
    """Distance of the blend's factor from 1: brightness, colour, contrast and sharpness."""
    bits: int
    """The number of lowest bits that posterize clears."""


POLICIES = {
    # Cubuk et al., 2020, with N = 2 operations of magnitude M = 9.
    "randaugment": Policy(
        2, 9, shear=0.3, shift=lambda side: Fraction(150 * side, 331), angle=30, contrast=0.9, bits=4
    ),
    # Müller and Hutter, 2021, the wide space.
    "trivialaugment": Policy(1, None, shear=0.99, shift=lambda side: Fraction(32), angle=135, contrast=0.99, bits=6),
}


class Draw(NamedTuple):
    """The operation of every image of a batch."""

    operation: Tensor
    """(b,) int64, positions in `OPERATIONS`."""
    strength: Tensor
    """(b,) int64 in 0 ... 30."""
    sign: Tensor
    """(b,) int64, 1 or -1: the direction of a warp or of a blend."""


def augment(policy: str, images: Tensor, index: Tensor, *, seed: int, epoch: int) -> Tensor:
    """Return images changed by the operations that a policy draws for them.

    The operations of a sample are a pure function of `(seed, epoch, index)`. The numbers never change between releases.

    Args:
        policy: A key of `POLICIES`.
        images: uint8 `(b, h, w, c)` with 1 or 3 channels.
        index: `(b,)` int64, the samples.
        seed: In [0, 2^64).
        epoch: In [0, 2^64).

    Returns:
        uint8 `(b, h, w, c)`.
    """
    chosen = POLICIES[policy]
    for bits in random_bits(index, chosen.operations, seed=seed, step=epoch, stream=AUGMENTATION):
        if chosen.strength is None:
            strength = scale_bits(bits >> 31, STRONGEST + 1)
        else:
            strength = torch.full_like(bits, chosen.strength)
        images = apply(chosen, images, Draw(scale_bits(bits, len(OPERATIONS)), strength, 1 - 2 * (bits < 0).long()))
    return images


def apply(policy: Policy, images: Tensor, draw: Draw) -> Tensor:
    """Return images, uint8 `(b, h, w, c)`, after one operation each."""
    return _map_levels(policy, _blend(policy, _warp(policy, images, draw), draw), draw)


def _is(draw: Draw, name: str) -> Tensor:
    """Return which images drew the operation, `(b,)` bool."""
    return draw.operation == OPERATIONS.index(name)


# --- warps: pixel (x, y) becomes that at (xx·x + xy·y + x0, yx·x + yy·y + y0), rounded down; outside the image is black ------


class Warp(NamedTuple):
    """Coefficients of a warp in fixed point, `(b,)` int64 each or one integer for all images.

    `x0` and `y0` include the half pixel from a pixel's corner to its centre.
    """

    xx: Tensor | int = ONE
    xy: Tensor | int = 0
    x0: Tensor | int = ONE // 2
    yx: Tensor | int = 0
    yy: Tensor | int = ONE
    y0: Tensor | int = ONE // 2


def _scaled(draw: Draw, greatest: float) -> Tensor:
    """Return the magnitude of every image, `(b,)` float64, in [-greatest, greatest]."""
    return (draw.sign * draw.strength).double() * (greatest / STRONGEST)


def _to_fixed(number: Tensor) -> Tensor:
    return (number * ONE).round().long()


def _shear_x(policy: Policy, draw: Draw, height: int, width: int) -> Warp:
    factor = _scaled(draw, policy.shear)
    return Warp(xy=_to_fixed(factor), x0=_to_fixed(0.5 + 0.5 * factor))


def _shear_y(policy: Policy, draw: Draw, height: int, width: int) -> Warp:
    factor = _scaled(draw, policy.shear)
    return Warp(yx=_to_fixed(factor), y0=_to_fixed(0.5 + 0.5 * factor))


def _pixels(policy: Policy, draw: Draw, side: int) -> Tensor:
    """Return the displacements in whole pixels, rounded towards 0."""
    longest = policy.shift(side) / STRONGEST
    return draw.sign * (draw.strength * longest.numerator // longest.denominator)


def _translate_x(policy: Policy, draw: Draw, height: int, width: int) -> Warp:
    return Warp(x0=_pixels(policy, draw, width) * ONE + ONE // 2)


def _translate_y(policy: Policy, draw: Draw, height: int, width: int) -> Warp:
    return Warp(y0=_pixels(policy, draw, height) * ONE + ONE // 2)


def _rotate(policy: Policy, draw: Draw, height: int, width: int) -> Warp:
    angle = _scaled(draw, math.radians(policy.angle))
    cos, sin = angle.cos(), angle.sin()  # devices differ in their last bits; in fixed point they agree
    right, down = 0.5 * width - 0.5, 0.5 * height - 0.5  # from the first pixel to the centre
    x0 = 0.5 * width - cos * right + sin * down
    y0 = 0.5 * height - sin * right - cos * down
    return Warp(_to_fixed(cos), _to_fixed(-sin), _to_fixed(x0), _to_fixed(sin), _to_fixed(cos), _to_fixed(y0))


WARPS = {
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
}


def _warp(policy: Policy, images: Tensor, draw: Draw) -> Tensor:
    count, height, width, channels = images.shape
    fields = [torch.full_like(draw.operation, number) for number in Warp()]
    for name, warp in WARPS.items():
        chosen = _is(draw, name)
        fields = [torch.where(chosen, *pair) for pair in zip(warp(policy, draw, height, width), fields, strict=True)]
    xx, xy, x0, yx, yy, y0 = (field[:, None, None] for field in fields)
    across = torch.arange(width, device=images.device)
    down = torch.arange(height, device=images.device)[:, None]
    x = (xx * across + (xy * down + x0)) >> 16
    y = (yx * across + (yy * down + y0)) >> 16
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    size = height * width + 1  # the last pixel is black
    source = torch.where(inside, y * width + x, size - 1)
    source += size * torch.arange(count, device=images.device)[:, None, None]
    padded = functional.pad(images.reshape(count, size - 1, channels), (0, 0, 0, 1))
    return padded.view(-1, channels).index_select(0, source.view(-1)).view(images.shape)


# --- blends: plain + factor · (image - plain) -------------------------------------------------------------------------------


def _black(images: Tensor, grey: Tensor) -> Tensor:
    return torch.zeros_like(images[:, :1, :1, :1])


def _grey(images: Tensor, grey: Tensor) -> Tensor:
    return grey


def _mean_grey(images: Tensor, grey: Tensor) -> Tensor:
    size = grey[0].numel()
    return ((2 * grey.sum((1, 2, 3), keepdim=True) + size) // (2 * size)).to(torch.uint8)


def _smooth(images: Tensor, grey: Tensor) -> Tensor:
    """Return the means of every pixel, of weight 5, and its eight neighbours. Pixels at the border stay as they are."""
    height, width = images.shape[1:3]
    result = images.clone()
    if height > 2 and width > 2:
        wide = images.to(torch.int16)
        rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
        total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * wide[:, 1:-1, 1:-1]
        result[:, 1:-1, 1:-1] = (2 * total + 13) // 26
    return result


BLENDS = {"brightness": _black, "color": _grey, "contrast": _mean_grey, "sharpness": _smooth}


def _blend(policy: Policy, images: Tensor, draw: Draw) -> Tensor:
    grey = images
    if images.shape[-1] == len(GREY):
        red, green, blue = (part * images[..., i].int() for i, part in enumerate(GREY))
        grey = ((red + green + blue + ONE // 2) >> 16).to(torch.uint8)[..., None]
    plain = images
    for name, make_plain in BLENDS.items():
        plain = torch.where(_is(draw, name)[:, None, None, None], make_plain(images, grey), plain)
    factor = (1 + _scaled(draw, policy.contrast)).float()[:, None, None, None]
    # Subtract, multiply, add: three operators, so that no device fuses two of them into one rounding.
    plain = plain.float()
    blended = images.float().sub_(plain).mul_(factor).add_(plain)
    return blended.clamp_(0, 255).to(torch.uint8)  # rounds down


# --- tables: a channel's new grey level for each of the 256 old ones ---------------------------------------------------------


class Levels(NamedTuple):
    """What the tables of a batch are made from."""

    level: Tensor
    """(256,) int64: 0 ... 255."""
    counts: Tensor
    """(b, c, 256) int64: the number of pixels of each level."""
    low: Tensor
    """(b, c, 1) int64: the lowest level."""
    high: Tensor
    """(b, c, 1) int64: the highest level."""


def _posterize(policy: Policy, strength: Tensor, levels: Levels) -> Tensor:
    bits = (2 * strength * policy.bits + STRONGEST) // (2 * STRONGEST)
    return levels.level >> bits << bits


def _solarize(policy: Policy, strength: Tensor, levels: Levels) -> Tensor:
    is_below = STRONGEST * levels.level < 255 * (STRONGEST - strength)
    return torch.where(is_below, levels.level, 255 - levels.level)


def _autocontrast(policy: Policy, strength: Tensor, levels: Levels) -> Tensor:
    span = (levels.high - levels.low).clamp(min=1).double()
    scale = torch.full_like(span, 255) / span  # 255 / span would be 255 times its reciprocal, rounded twice
    stretched = (levels.level * scale - levels.low * scale).clamp(0, 255).long()
    return torch.where(levels.high > levels.low, stretched, levels.level)


def _equalize(policy: Policy, strength: Tensor, levels: Levels) -> Tensor:
    below = levels.counts.cumsum(-1) - levels.counts
    step = below.gather(-1, levels.high) // 255  # all pixels but those of the highest level
    spread = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, spread, levels.level)


TABLES = {"posterize": _posterize, "solarize": _solarize, "autocontrast": _autocontrast, "equalize": _equalize}


def _map_levels(policy: Policy, images: Tensor, draw: Draw) -> Tensor:
    count, _, _, channels = images.shape
    level = torch.arange(256, device=images.device)
    start = 256 * torch.arange(count * channels, device=images.device).view(count, 1, 1, channels)
    position = (images + start).view(-1)  # of each pixel's entry in the tables
    counts = torch.zeros(count * channels * 256, dtype=torch.int64, device=images.device)
    counts = counts.scatter_add_(0, position, torch.ones_like(position)).view(count, channels, 256)
    occurs = (counts > 0).int()
    low, high = occurs.argmax(-1, keepdim=True), 255 - occurs.flip(-1).argmax(-1, keepdim=True)
    levels = Levels(level, counts, low, high)
    table = level.expand(count, channels, 256)
    for name, make_table in TABLES.items():
        chosen, strength = _is(draw, name)[:, None, None], draw.strength[:, None, None]
        table = torch.where(chosen, make_table(policy, strength, levels), table)
    return table.to(torch.uint8).reshape(-1).index_select(0, position).view(images.shape)


# A position never changes: the random numbers of a view name it.
OPERATIONS = ("identity", *WARPS, *BLENDS, *TABLES)
