"""Views: raw images to network inputs. Flips, crops, augments and normalises entire batches on any device."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..checks import check_bool, check_float, check_int
from ..condensation.random_keys import MAX_SEED, VIEWS, random_bits, scale_bits
from ..describe import brief, describe
from .augmentation import GREY, POLICIES, augment

# By name: mean and std of pixels / 255, for three channels, or one number for any.
NORMALISATIONS = {
    "half": ((0.5,), (0.5,)),  # to [-1, 1]
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # torchvision's and timm's
}


@dataclass(frozen=True)
class Views:
    """A transform of uint8 images `(b, h, w, c)` to float32 `(b, c, h, w)`: flip, crop, augment, normalise.

    Normalisation is (x / 255 - mean) / std by channel.

    The view of a sample is a pure function of `(seed, epoch, index)`. It is the same on every device, in every batch, on
    every rank and in a resumed run. Its random numbers never change between releases. Flip, both offsets and the operations of
    a policy are independent. The windows of a crop are equally likely to within one part in 2^31 / (2·padding + 1).

    Results are contiguous, on the device of the images. They are computed without synchronising with it.

    Raises:
        TypeError: `mean` or `std` is not a tuple of numbers, `padding` or, on call, `seed` or `epoch` is not an integer,
            `flip` is not a bool, or `policy` is not a string.
        ValueError: `mean` and `std` are not equally many finite numbers, a `std` is not > 0, `padding` is negative, or
            `policy` is unknown or for another number of channels. On call: images are not uint8 `(b, h, w, c)` with that
            many channels, `index` is not int64 `(b,)` on their device, or `seed` or `epoch` is outside [0, 2^64).
    """

    mean: tuple[float, ...]
    """The mean of every channel, in units of pixels / 255."""
    std: tuple[float, ...]
    """The standard deviation of every channel, in the same units."""
    padding: int = 0
    """Black pixels added around the image, before a window of the original size is cropped at random. 0: no crop."""
    flip: bool = False
    """Whether half of the views are mirrored horizontally."""
    policy: str | None = None
    """The augmentation policy, `randaugment` or `trivialaugment`, which changes images of 1 or 3 channels after flip and crop."""

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            if not isinstance(numbers, tuple) or not numbers:
                raise TypeError(f"{name} must be a tuple with a number for every channel, got {describe(numbers)}")
            for number in numbers:
                check_float(name, number, "finite numbers", -math.inf)
        if len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError(f"std must be {len(self.mean)} numbers > 0, as many as mean, got {self.std}")
        check_int("padding", self.padding, 0)
        check_bool("flip", self.flip)
        if not isinstance(self.policy, str | None):
            raise TypeError(f"policy must be {', '.join(POLICIES)} or None, got {describe(self.policy)}")
        if self.policy is not None and self.policy not in POLICIES:
            raise ValueError(f"policy must be {', '.join(POLICIES)} or None, got {brief(self.policy)}")
        if self.policy and len(self.mean) not in (1, len(GREY)):
            raise ValueError(f"policy {self.policy!r} is for images with 1 or 3 channels, got {len(self.mean)}")

    def __repr__(self) -> str:
        """Return all fields, but `policy` only if there is one: fingerprints of runs without one must not change."""
        shown = [field.name for field in fields(self) if field.name != "policy" or self.policy]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    @classmethod
    def from_images(cls, images: np.ndarray, *, padding: int = 0, flip: bool = False) -> "Views":
        """Return views normalised by the mean and standard deviation of these images' channels.

        The std of a constant channel is set to 1. Sums are exact, so the order of the images does not matter.

        Args:
            images: uint8 `(n, h, w, c)`, at least one.
            padding: As the field `padding`.
            flip: As the field `flip`.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
            raise ValueError(f"images must be uint8 (n, h, w, c), not empty, got {images.dtype} {images.shape}")
        step = max(1, 2**20 // images[0, ..., 0].size)  # a few images at a time: bincount converts to int64
        blocks = (images[start : start + step] for start in range(0, len(images), step))
        return cls.from_blocks(blocks, images.shape[-1], padding=padding, flip=flip)

    @classmethod
    def from_blocks(
        cls, blocks: Iterable[np.ndarray], channels: int, *, padding: int = 0, flip: bool = False
    ) -> "Views":
        """Return the views that `from_images` returns for all images of the blocks together.

        Args:
            blocks: uint8 `(b, h, w, channels)` each; at least one image together.
            channels: Number of channels.
            padding: As the field `padding`.
            flip: As the field `flip`.
        """
        counts = np.zeros((channels, 256), dtype=np.int64)
        for block in blocks:
            for channel in range(channels):
                counts[channel] += np.bincount(block[..., channel].ravel(), minlength=256)
        grey = np.arange(256)
        means, deviations = [], []
        for levels in counts:
            size, total, squares = (int((levels * power).sum()) for power in (grey**0, grey, grey**2))
            means.append(total / (255 * size))
            deviations.append(math.sqrt(size * squares - total**2) / (255 * size) or 1.0)
        return cls(tuple(means), tuple(deviations), padding, flip)

    def with_normalisation(self, mean: tuple[float, ...], std: tuple[float, ...]) -> "Views":
        """Return the same views with another mean and std.

        Args:
            mean: Numbers in [0, 1], in units of pixels / 255: one per channel, or one for all.
            std: As `mean`, in (0, 1].

        Raises:
            ValueError: There is neither one number nor one per channel; or a number is out of range and differs from
                the present one.
        """
        channels, changed = len(self.mean), {}
        for name, numbers in (("mean", mean), ("std", std)):
            if len(numbers) not in (1, channels):
                raise ValueError(
                    f"{name} must be one number or one per channel ({channels} here), got {len(numbers)} numbers"
                )
            changed[name] = numbers * (channels // len(numbers))
            outside = [x for x in numbers if not 0 <= x <= 1 or (x == 0 and name == "std")]
            if outside and changed[name] != getattr(self, name):
                bracket = "(" if name == "std" else "["
                raise ValueError(f"{name} must be of pixels / 255, in {bracket}0, 1], got {outside[0]}")
        return replace(self, **changed)

    def normalize(self, images: Tensor) -> Tensor:
        """Return the images only normalised, as for a test set: uint8 `(b, h, w, c)` to float32 `(b, c, h, w)`."""
        self._check(images)
        result = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        # Python numbers, because a tensor would have to be copied to the device. Subtract first, then multiply: no
        # compiler fuses these two into one rounding, so every device computes the same bits.
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            result[:, channel].sub_(255 * mean).mul_(1 / (255 * std))
        return result

    def __call__(self, images: Tensor, index: Tensor, *, seed: int, epoch: int) -> Tensor:
        """Return the views of samples `index` `(b,)` int64 in an epoch; `images` are theirs, in the same order."""
        self._check(images)
        if index.shape != images.shape[:1] or index.dtype != torch.int64 or index.device != images.device:
            raise ValueError(
                f"index must be int64 of shape ({len(images)},) on {images.device}, "
                f"got {index.dtype} of shape {tuple(index.shape)} on {index.device}"
            )
        seed, epoch = check_int("seed", seed, 0, MAX_SEED), check_int("epoch", epoch, 0, MAX_SEED)
        if images.numel():
            if self.padding or self.flip:
                images = self._flip_and_crop(images, index, seed, epoch)
            if self.policy:
                images = augment(self.policy, images, index, seed=seed, epoch=epoch)
        return self.normalize(images)

    def _flip_and_crop(self, images: Tensor, index: Tensor, seed: int, epoch: int) -> Tensor:
        (bits,) = random_bits(index, seed=seed, step=epoch, stream=VIEWS)
        count, height, width, channels = images.shape
        tall, wide = height + 2 * self.padding, width + 2 * self.padding
        stacked = torch.cat((images, images.flip(2))) if self.flip else images
        padded = functional.pad(stacked, (0, 0) + 4 * (self.padding,))
        # A window is `height` runs of memory of `width` pixels each. `first` is the position of its first pixel in
        # `padded`, in pixels.
        first = torch.arange(count, device=images.device)
        if self.flip:
            first = first + (bits < 0) * count
        offsets = 2 * self.padding + 1
        first = first * tall + scale_bits(bits, offsets)
        first = first * wide + scale_bits(bits >> 31, offsets)
        starts = first[:, None] + torch.arange(0, height * wide, wide, device=images.device)
        runs = padded.reshape(-1).unfold(0, width * channels, channels)
        return runs.index_select(0, starts.view(-1)).view(images.shape)

    def _check(self, images: Tensor) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != len(self.mean):
            raise ValueError(
                f"images must be uint8 (b, h, w, {len(self.mean)}), got {images.dtype} of shape {tuple(images.shape)}"
            )


def check_normalisation(
    mean: str | float | Sequence[float] | None, std: str | float | Sequence[float] | None, prefix: str = ""
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return `mean` and `std` as tuples of one number, or one per channel; None if both are None.

    Args:
        mean: Finite numbers, or a key of NORMALISATIONS, which includes the std.
        std: Finite numbers; None if `mean` is a key (or the same key).
        prefix: Start of both names in errors.

    Raises:
        TypeError: An argument is neither numbers nor a string.
        ValueError: A number is not finite, a name is unknown, or only one of the two is given.
    """
    names, mean_name, std_name = ", ".join(NORMALISATIONS), f"{prefix}mean", f"{prefix}std"
    if isinstance(mean, str):
        if mean not in NORMALISATIONS:
            raise ValueError(f"{mean_name} must be numbers or one of {names}, got {mean!r}")
        if std is not None and std != mean:
            raise ValueError(f"{mean_name}={mean!r} includes its std, got {std_name}={std!r} too: leave {std_name} out")
        return NORMALISATIONS[mean]
    if isinstance(std, str):
        raise ValueError(f"{std_name} must be numbers, got {std!r}: pass the names {names} as {mean_name}")
    for name, one, other in ((mean_name, mean, std), (std_name, std, mean)):
        if one is None and other is not None:
            raise ValueError(f"{mean_name} and {std_name} must be given together, got no {name}")
    if mean is None:
        return None
    return _to_tuple(mean_name, mean), _to_tuple(std_name, std)


def _to_tuple(name: str, value: float | Sequence[float]) -> tuple[float, ...]:
    numbers = value if isinstance(value, list | tuple | np.ndarray) else [value]
    if not numbers:
        raise ValueError(f"{name} must be one number or one per channel, got none")
    return tuple(check_float(name, number, "finite numbers", -math.inf) for number in numbers)
