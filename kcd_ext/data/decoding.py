"""Image files to arrays: upright, of one mode and one size."""

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from ..describe import one_line
from ..files import open_regular
from .resizing import resized

ORIENTATION = 0x0112  # EXIF tag
WIDE_MODES = ("I", "F")  # PIL modes, or their first letters, whose numbers do not fit 8 bits
WIDE_STORAGE = re.compile(r";16[BLN]")  # in PIL's name of the stored format: 16 bits, although the mode has 8


class ImageReadError(ValueError):
    """The error for an image that cannot be read, or is of another kind than the others. Its message names the image."""


class Files(Protocol):
    """Encoded images, such as the files of a folder. Small enough to copy to worker processes."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return the name of an image in messages."""

    def open(self, index: int) -> BinaryIO:
        """Open the bytes of an image. Raises OSError or ValueError if that fails."""

    def stamp(self, index: int) -> str:
        """Return what identifies an image without reading it, wherever it is, such as its name and size. Raises as `open`."""

    def take(self, index: np.ndarray) -> "Files":
        """Return some of the images, in the order of `index` (n,) int64."""


class Paths:
    """Image files by path."""

    def __init__(self, paths: Sequence[Path] | np.ndarray):
        # One array instead of many objects, whose reference counts would make every worker copy them.
        self._paths = paths if isinstance(paths, np.ndarray) else np.array([os.fsencode(path) for path in paths])

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        """Return the path."""
        return os.fsdecode(self._paths[index])

    def open(self, index: int) -> BinaryIO:
        """Open the file. Raises as `kcd_ext.files.open_regular` does."""
        return open_regular(self.name(index))

    def stamp(self, index: int) -> str:
        """Return the file's name, without folders, and its size."""
        path = self.name(index)
        return f"{os.path.basename(path)} {os.stat(path).st_size}"

    def take(self, index: np.ndarray) -> "Paths":
        """Return some of the files."""
        return Paths(self._paths[index])


@dataclass(frozen=True)
class Decoder:
    """The way from an encoded image to its pixels."""

    mode: str
    """PIL mode that images are converted to: L or RGB."""
    size: tuple[int, int]
    """Width and height."""
    resize: str | None = None
    """How images are brought to this size, as in `resized`. None: all must have it."""
    first: str = ""
    """Without `resize`: the name of the image that has this size."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the pixels."""
        width, height = self.size
        return height, width, len(self.mode)

    def decode(self, files: Files, index: int) -> np.ndarray:
        """Return the pixels of an image, uint8 (h, w, c).

        Raises:
            ImageReadError: The image is damaged, or has another size.
            OSError, ValueError: As `files.open` raises.
        """
        image = read_upright(files, index, self.mode)
        if self.resize is not None:
            image = resized(image, *self.size, self.resize)
        elif image.size != self.size:
            raise ImageReadError(
                f"{files.name(index)}: must be {format_size(self.size)} pixels like {self.first}, got "
                f"{format_size(image.size)}; size (--size) scales all to one size"
            )
        return np.array(image).reshape(self.shape)


def read_header(files: Files, index: int) -> tuple[bool, tuple[int, int]]:
    """Return whether an image is 8-bit grey, and its width and height as stored. Reads no pixels.

    Raises:
        ImageReadError: It is no image, or has more than 8 bits per channel.
        OSError, ValueError: As `files.open` raises.
    """
    with files.open(index) as file, open_image(file, files.name(index)) as image:
        return image.mode == "L", image.size


def load_upright(path: Path, mode: str) -> Any:
    """Return the image in a file as `read_upright` does."""
    return read_upright(Paths([path]), 0, mode)


def read_upright(files: Files, index: int, mode: str) -> Any:
    """Return an image as a PIL image in this mode, with its EXIF orientation applied. Raises as `Decoder.decode` does."""
    from PIL.Image import Transpose

    # By EXIF number; 1 is upright. (ImageOps.exif_transpose writes the other tags back, which fails for some.)
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    with files.open(index) as file, open_image(file, files.name(index)) as image:
        image.load()  # EXIF can follow the pixels
        try:
            turn = turns.get(image.getexif().get(ORIENTATION))
        except SyntaxError:  # the EXIF block is not EXIF; viewers ignore it too
            turn = None
        return (image if turn is None else image.transpose(turn)).convert(mode)


@contextmanager
def open_image(file: BinaryIO, name: str) -> Iterator[Any]:
    """Open an image of at most 8 bits per channel. Convert any error to an ImageReadError that names it."""
    from PIL import Image, UnidentifiedImageError

    with warnings.catch_warnings():
        # Pillow warns about odd metadata and dropped transparency. It also only warns, at first, about too many pixels.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as image:
                _check_bit_depth(image)
                yield image
        except UnidentifiedImageError as error:  # its message names the file object, not the file
            is_empty = file.seek(0, os.SEEK_END) == 0
            reason = "it is empty" if is_empty else "Pillow does not know its format"
            raise ImageReadError(f"{name}: cannot be read as an image: {reason}") from error
        except Exception as error:  # Pillow's readers raise any exception for malformed bytes
            raise ImageReadError(f"{name}: cannot be read as an image: {one_line(error)}") from error


def _check_bit_depth(image: Any) -> None:
    """Raise ValueError for an image of 16 bits per channel or more, of which PIL would keep at most the upper 8.

    These are images that PIL reads into a wider mode, and PNG and TIFF files whose stored format PIL names.
    """
    stored = "".join(str(tile[3]) for tile in getattr(image, "tile", ()))
    if image.mode.startswith(WIDE_MODES) or WIDE_STORAGE.search(stored):
        raise ValueError(f"its pixels must have 8 bits per channel, got {stored or image.mode} (PIL's name)")


def format_size(size: tuple[int, int]) -> str:
    """Return width and height as text."""
    return f"{size[0]}x{size[1]}"
