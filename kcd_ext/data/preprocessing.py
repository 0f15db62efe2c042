"""`Preprocessing`: from an image, or a file of one, to the input of a network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check_choice, check_int
from ..describe import describe
from .decoding import load_upright
from .resizing import INTERPOLATIONS, RESIZES, resized
from .views import Views

PIL_MODES = {1: "L", 3: "RGB"}  # by number of channels


@dataclass(frozen=True)
class Preprocessing:
    """A transform of one image to float32 `(channels, height, width)`: convert, resize, normalise.

    It gives a test image exactly the numbers that the network was tested on.

    Raises:
        TypeError: A field has the wrong type. On call: the image is of another kind.
        ValueError: A field is out of range. On call: the image has another number of channels or cannot be read.
    """

    height: int
    """Height in pixels."""
    width: int
    """Width in pixels."""
    mean: tuple[float, ...]
    """The mean of every channel, in units of pixels / 255."""
    std: tuple[float, ...]
    """The standard deviation of every channel, in the same units."""
    resize: str = "crop"
    """What happens to an image of another size. crop: it is scaled to cover the size, and its centre is cut out. squash: both
    sides are scaled."""
    interpolation: str = "bilinear"
    """The filter of resizing, antialiased: nearest, bilinear, bicubic or lanczos."""

    def __post_init__(self) -> None:
        check_int("height", self.height, 1)
        check_int("width", self.width, 1)
        check_choice("resize", self.resize, RESIZES)
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        Views(self.mean, self.std)  # checks both

    @property
    def channels(self) -> int:
        """The number of channels."""
        return len(self.mean)

    def __call__(self, image: Any) -> Tensor:
        """Return the network's input for an image.

        Args:
            image: The path of a file, a PIL image, or a uint8 array or tensor `(h, w)` or `(h, w, channels)`. Files are read
                as by `kcd_ext.data.load`: turned upright by EXIF, in RGB or grey.
        """
        pixels = torch.from_numpy(np.array(self._pixels(image))).view(self.height, self.width, self.channels)
        return Views(self.mean, self.std).normalize(pixels[None])[0]

    def as_json(self) -> dict[str, object]:
        """Return the fields as numbers, strings and lists."""
        return {name: list(field) if isinstance(field, tuple) else field for name, field in asdict(self).items()}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Preprocessing:
        """Return the preprocessing that `as_json` returned. Raises TypeError or ValueError for anything else."""
        return cls(**{**plain, "mean": tuple(plain["mean"]), "std": tuple(plain["std"])})

    def _pixels(self, image: Any) -> Any:
        """Return the image, as a PIL image or array, with the right size and number of channels."""
        if isinstance(image, Tensor | np.ndarray):
            array = self._check_array(image)
            if array.shape[:2] == (self.height, self.width):
                return array
            image = self._from_array(array)
        elif isinstance(image, str | os.PathLike):
            image = load_upright(Path(image), self._mode())
        elif not (hasattr(image, "convert") and hasattr(image, "getbands")):
            raise TypeError(f"image must be a path, a PIL image or a uint8 array, got {describe(image)}")
        elif image.mode.startswith(("I", "F")):
            raise ValueError(f"image must have 8 bits per channel, got PIL mode {image.mode}")
        else:
            image = image.convert(self._mode())
        return resized(image, self.width, self.height, self.resize, self.interpolation)

    def _mode(self) -> str:
        if self.channels not in PIL_MODES:
            raise ValueError(
                f"image must be a uint8 array (h, w, {self.channels}): files and PIL images have 1 or 3 channels"
            )
        return PIL_MODES[self.channels]

    def _check_array(self, image: Tensor | np.ndarray) -> np.ndarray:
        array = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
        array = array[..., None] if array.ndim == 2 else array
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != self.channels or not array.size:
            raise ValueError(f"image must be uint8 (h, w, {self.channels}), got {describe(image)}")
        return array

    def _from_array(self, array: np.ndarray) -> Any:
        from PIL.Image import fromarray

        self._mode()  # other numbers of channels cannot be resized
        return fromarray(array[..., 0] if self.channels == 1 else np.ascontiguousarray(array))
