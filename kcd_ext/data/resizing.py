"""Resizing of images to one size: crop keeps proportions, squash does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

RESIZES = ("crop", "squash")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


def resized(image: Image, width: int, height: int, resize: str = "crop", interpolation: str = "bilinear") -> Image:
    """Return the image at this size; the image itself if it has that size.

    Args:
        image: A PIL image.
        width: Width in pixels.
        height: Height in pixels.
        resize: crop: scale the image until it covers the size, then cut out the centre. squash: scale both sides.
        interpolation: One of INTERPOLATIONS. PIL's filters are antialiased.
    """
    from PIL.Image import Resampling

    if image.size == (width, height):
        return image
    box = None
    if resize == "crop":
        scale = min(image.width / width, image.height / height)
        left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
        box = (left, top, left + width * scale, top + height * scale)
    return image.resize((width, height), Resampling[interpolation.upper()], box=box)
