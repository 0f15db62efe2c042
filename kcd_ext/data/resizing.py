"""Resizing: images of any proportions to one width and height."""

from typing import TYPE_CHECKING

from ..checks import check_choice

if TYPE_CHECKING:
    from PIL.Image import Image

RESIZES = ("crop", "squash")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
ELONGATED = 16  # a scaled image that covers this many times the pixels of its centre is not worth its time and memory


def resized(image: "Image", width: int, height: int, resize: str = "crop", interpolation: str = "bilinear") -> "Image":
    """Return the image with this width and height; the image itself if it has them.

    Shrinking is antialiased, except with `nearest`.

    Args:
        image: A PIL image. Convert palette images to RGB first: colours of a palette are not interpolated.
        width: In pixels, at least 1.
        height: In pixels, at least 1.
        resize: `crop` keeps the proportions: the image is scaled until it just covers width and height, and its centre is
            cropped. For a square this is `Resize(side)` and `CenterCrop(side)` of torchvision. Of an image with a side more
            than 16 times too long only the centre is scaled. `squash` scales both sides independently.
        interpolation: nearest, bilinear, bicubic or lanczos, as Pillow's `Resampling`.

    Raises:
        ValueError: `resize` or `interpolation` is unknown.
    """
    from PIL.Image import Resampling

    check_choice("resize", resize, RESIZES)
    method = Resampling[check_choice("interpolation", interpolation, INTERPOLATIONS).upper()]
    if image.size == (width, height):
        return image
    if resize == "squash":
        return image.resize((width, height), method)
    own_width, own_height = image.size
    # The side that needs the larger factor gets its size exactly. The other one is rounded down, but not below its size.
    if width * own_height >= height * own_width:
        scaled = width, own_height * width // own_width
    else:
        scaled = own_width * height // own_height, height
    left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
    if scaled[0] * scaled[1] > ELONGATED * width * height:
        # Bilinear pixels are the same up to rounding: Pillow stores the box in float32. Other images keep theirs bit for bit.
        across, down = own_width / scaled[0], own_height / scaled[1]  # pixels of the image per scaled pixel
        box = (
            left * across,
            top * down,
            min((left + width) * across, own_width),
            min((top + height) * down, own_height),
        )
        return image.resize((width, height), method, box)
    return image.resize(scaled, method).crop((left, top, left + width, top + height))
