"""From raw images to what networks take: flip, crop and normalise whole batches, wherever they lie."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..checks import check_bool, check_float, check_int
from ..condensation.random_keys import MAX_SEED, VIEWS, random_keys
from ..describe import describe

# By name: mean and std of the pixels / 255, for three channels, or one number for any.
NORMALISATIONS = {
    "half": ((0.5,), (0.5,)),  # to [-1, 1]
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # torchvision's and timm's
}
FIELD = 2**31 - 1  # 31 bits: times the number of crops, they stay within int64


@dataclass(frozen=True)
class Views:
    """uint8 images (b, h, w, c) -> float32 (b, c, h, w): flipped, cropped, then (x / 255 - mean) / std by channel.

    The view of a sample is a pure function of (seed, epoch, index): the same on every device, in every batch, on every
    process, and in a run that was resumed. What is drawn for it never changes between releases: the windows of a crop
    are equally likely to within one part in 2^31 / (2·padding + 1), and flip and both offsets are independent.

    Results are contiguous, on the device of the images. Nothing here waits for that device.

    Raises:
        TypeError, ValueError: mean and std are no tuples of as many numbers, a std is not above 0, or padding or flip
            is of another kind. When called: images are no uint8 (b, h, w, c) of that many channels, index is no int64
            (b,) beside them, or seed or epoch lies outside [0, 2^64).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 0
    """Pixels of black around the image, out of which a window of its size is cut at random; 0: no crop."""
    flip: bool = False
    """Left and right are exchanged in half of the views."""

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            if not isinstance(numbers, tuple) or not numbers:
                raise TypeError(f"{name} must be a tuple with a number for every channel, got {describe(numbers)}")
            for number in numbers:
                check_float(name, number, "finite numbers", -math.inf)
        if len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError(f"std must hold {len(self.mean)} numbers > 0, as many as mean, got {self.std}")
        check_int("padding", self.padding, 0)
        check_bool("flip", self.flip)

    @classmethod
    def of(cls, images: np.ndarray, *, padding: int = 0, flip: bool = False) -> "Views":
        """With the means and standard deviations of these images' channels; of a channel all alike, std is 1.

        `images`: uint8 (n, h, w, c), at least one. The sums are exact, so the order of the images does not matter.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
            raise ValueError(f"images must be uint8 (n, h, w, c), none of them 0, got {images.dtype} {images.shape}")
        grey = np.arange(256)
        step = max(1, 2**20 // images[0, ..., 0].size)  # a few images at a time: bincount makes int64 of them
        means, deviations = [], []
        for channel in range(images.shape[-1]):
            counts = np.zeros(256, dtype=np.int64)
            for start in range(0, len(images), step):
                counts += np.bincount(images[start : start + step, ..., channel].ravel(), minlength=256)
            size, total, squares = (int((counts * power).sum()) for power in (grey**0, grey, grey**2))
            means.append(total / (255 * size))
            deviations.append(math.sqrt(size * squares - total**2) / (255 * size) or 1.0)
        return cls(tuple(means), tuple(deviations), padding, flip)

    def normalised_by(self, mean: tuple[float, ...], std: tuple[float, ...]) -> "Views":
        """The same views with another mean and std; a single number is that of every channel.

        Raises ValueError where their number is neither 1 nor that of the channels, or where they differ from what they were
        and are not within the range of pixels / 255: mean in [0, 1], std in (0, 1].
        """
        channels, changed = len(self.mean), {}
        for name, numbers in (("mean", mean), ("std", std)):
            if len(numbers) not in (1, channels):
                raise ValueError(
                    f"{name} must hold a number for every channel, {channels} or 1 for all, got {len(numbers)}"
                )
            changed[name] = numbers * (channels // len(numbers))
            outside = [x for x in numbers if not 0 <= x <= 1 or (x == 0 and name == "std")]
            if outside and changed[name] != getattr(self, name):
                bracket = "(" if name == "std" else "["
                raise ValueError(f"{name} must be of pixels / 255, in {bracket}0, 1], got {outside[0]}")
        return replace(self, **changed)

    def normalize(self, images: Tensor) -> Tensor:
        """Return the images normalised alone, as for a test set: uint8 (b, h, w, c) -> float32 (b, c, h, w)."""
        self._check(images)
        result = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        # By numbers, not by a tensor of them, which would have to be copied to the device. First minus, then times:
        # no compiler makes one rounding of these two, so every device gives the same bits.
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            result[:, channel].sub_(255 * mean).mul_(1 / (255 * std))
        return result

    plain = normalize  # its earlier name

    def __call__(self, images: Tensor, index: Tensor, *, seed: int, epoch: int) -> Tensor:
        """The views of samples `index` (b,) int64 in an epoch; `images` are theirs, in the same order."""
        self._check(images)
        if index.shape != images.shape[:1] or index.dtype != torch.int64 or index.device != images.device:
            raise ValueError(
                f"index must be int64 of shape ({len(images)},) on {images.device}, "
                f"got {index.dtype} of shape {tuple(index.shape)} on {index.device}"
            )
        seed, epoch = check_int("seed", seed, 0, MAX_SEED), check_int("epoch", epoch, 0, MAX_SEED)
        if not (self.padding or self.flip) or not images.numel():
            return self.normalize(images)
        bits = _bits(index, seed, epoch)
        count, height, width, channels = images.shape
        tall, wide = height + 2 * self.padding, width + 2 * self.padding
        stacked = torch.cat((images, images.flip(2))) if self.flip else images
        padded = functional.pad(stacked, (0, 0) + 4 * (self.padding,))
        # A window is `height` stretches of memory, each of them `width` pixels long. `first` is where its first pixel
        # lies in `padded`, counted in pixels.
        first = torch.arange(count, device=images.device)
        if self.flip:
            first = first + (bits < 0) * count
        first = first * tall + self._offset(bits & FIELD)
        first = first * wide + self._offset((bits >> 31) & FIELD)
        rows = first[:, None] + torch.arange(0, height * wide, wide, device=images.device)
        stretches = padded.reshape(-1).unfold(0, width * channels, channels)
        return self.normalize(stretches.index_select(0, rows.view(-1)).view(images.shape))

    def _offset(self, field: Tensor) -> Tensor:
        """31 random bits -> one of 0 ... 2·padding."""
        return (field * (2 * self.padding + 1)) >> 31

    def _check(self, images: Tensor) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != len(self.mean):
            raise ValueError(
                f"images must be uint8 (b, h, w, {len(self.mean)}), got {images.dtype} of shape {tuple(images.shape)}"
            )


def check_normalisation(
    mean: str | float | Sequence[float] | None, std: str | float | Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """`mean` and `std` as a number, or one for every channel; None where both are.

    Args:
        mean: finite numbers, or a key of NORMALISATIONS, which brings its own std.
        std: finite numbers > 0, or the same key, or None with one.

    Raises TypeError or ValueError where it is something else, or one of them is missing.
    """
    names = ", ".join(NORMALISATIONS)
    if isinstance(mean, str):
        if mean not in NORMALISATIONS:
            raise ValueError(f"mean must be numbers or one of {names}, got {mean!r}")
        if std is not None and std != mean:
            raise ValueError(f"mean={mean!r} brings its own std, got std={std!r} beside it: leave that out")
        return NORMALISATIONS[mean]
    if isinstance(std, str):
        raise ValueError(f"std must be numbers, got {std!r}: the names {names} are given as mean")
    for name, one, other in (("mean", mean, std), ("std", std, mean)):
        if one is None and other is not None:
            raise ValueError(f"mean and std must be given together, got no {name}")
    if mean is None:
        return None
    return _numbers("mean", mean), _numbers("std", std)


def _numbers(name: str, value: float | Sequence[float]) -> tuple[float, ...]:
    numbers = value if isinstance(value, list | tuple | np.ndarray) else [value]
    if not numbers:
        raise ValueError(f"{name} must be a number, or one for every channel, got none")
    return tuple(check_float(name, number, "finite numbers", -math.inf) for number in numbers)


def _bits(index: Tensor, seed: int, epoch: int) -> Tensor:
    """64 random bits for every index, as int64, a pure function of (seed, epoch, index).

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): the index-th number after a state that is a random key of the seed
    and the epoch. Integers of tensors wrap around as theirs do; `>>` copies the sign, so that is cut off.
    """
    (key,) = random_keys(1, seed=seed, step=epoch, stream=VIEWS).view(np.int64).tolist()
    z = index * _signed(0x9E3779B97F4A7C15) + key
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & (2**33 - 1))


def _signed(word: int) -> int:
    """The int64 of the same 64 bits."""
    return word - 2**64 if word >= 2**63 else word
