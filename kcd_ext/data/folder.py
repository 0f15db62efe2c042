"""Data sets in a folder of image files by class: train/<class>/<file> and test/<class>/<file>."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..condensation.checks import whole
from ..registry import one_line
from .images import ImageData, assemble

TEST = ("test", "val")
ORIENTATION = 0x0112  # EXIF's tag
WIDE = ("I", "F")  # PIL modes, and the beginnings of some, whose numbers do not fit 8 bits
WIDE_CHANNELS = re.compile(r";16[BLN]")  # in what PIL calls the numbers in a file, of 16 bits, where its mode has 8


@dataclass(frozen=True)
class Picture:
    """An image file."""

    path: Path
    label: int
    grey: bool


def read(path: Path, size: int | None = None) -> ImageData:
    """The data set in the folder `path`; training images are neither cropped nor flipped.

    Classes are the folders in `train`, sorted by name; `test`, or `val` if there is no `test`, has the same. Files come
    in the order of their names; those that begin with a dot are left out, every other one must be an image, of an
    animation the first frame. Images are turned as their EXIF orientation says, so that they are what people see, and
    converted to RGB, unless all of both parts are 8-bit grey (PIL's mode L) and stay so. Transparency is dropped as by
    `image.convert("RGB")`: pixels have the colours that are stored, also where none can be seen.

    Args:
        size: height and width in pixels that every image is scaled to (bilinear). None: all must have one size.

    Raises:
        ValueError: a part is missing, its classes differ, a class is empty, a file is no image, damaged, of 16 bits a
            channel or more (PNG, TIFF), of more pixels than PIL.Image.MAX_IMAGE_PIXELS, or of another size than the
            first; names the folder or file.
        OSError: a file or folder cannot be opened.
        ImportError: Pillow is not installed; says which extra installs it.
    """
    if size is not None:
        whole("size", size, 1)
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError('a folder of images needs the package pillow: pip install "kcd-ext[train]"') from error
    if not (path / "train").is_dir():
        raise ValueError(f"{path}: must have a folder train with a folder of images for every class, there is none")
    test = next((path / name for name in TEST if (path / name).is_dir()), None)
    if test is None:
        raise ValueError(f"{path}: must have a test set, a folder {' or '.join(TEST)} beside train, there is none")
    names = _folders(path / "train")
    if _folders(test) != names:
        name = min(set(_folders(test)) ^ set(names))
        raise ValueError(f"{path}: train and {test.name} must have the same classes, only one has {name!r}")
    parts = [_pictures(part, names) for part in (path / "train", test)]
    mode = "L" if all(picture.grey for part in parts for picture in part) else "RGB"
    first = parts[0][0].path if size is None else None
    shape = (size, size) if first is None else _upright(first, mode).size
    arrays = [(_pixels(part, mode, shape, first), np.array([picture.label for picture in part])) for part in parts]
    return assemble(path.resolve().name, *arrays, len(names), names)


def _visible(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))


def _folders(path: Path) -> tuple[str, ...]:
    names = tuple(entry.name for entry in _visible(path) if entry.is_dir())
    if not names:
        raise ValueError(f"{path}: must have a folder of images for every class, there is none")
    return names


def _pictures(part: Path, names: Sequence[str]) -> list[Picture]:
    """By class, then by name. Only the files' headers are read."""
    found = []
    for label, name in enumerate(names):
        files = _visible(part / name)
        if not files:
            raise ValueError(f"{part / name}: must hold images, there is none")
        for file in files:
            with _opened(file) as image:
                _check_width(image)
                found.append(Picture(file, label, image.mode == "L"))
    return found


def _check_width(image: Any) -> None:
    """Raises ValueError for an image of 16 bits a channel or more, of which PIL would keep the upper 8 if any.

    Those that PIL reads into a wider mode, and of the others the files whose numbers it names, PNG and TIFF.
    """
    stored = "".join(str(tile[3]) for tile in getattr(image, "tile", ()))
    if image.mode.startswith(WIDE) or WIDE_CHANNELS.search(stored):
        raise ValueError(f"its pixels must have 8 bits a channel, got {stored or image.mode}, as PIL calls it")


def _pixels(pictures: list[Picture], mode: str, size: tuple[int, int], first: Path | None) -> np.ndarray:
    """(n, h, w, c) uint8. `size`, width and height, is what all are scaled to, or must have as the file `first` has."""
    from PIL.Image import Resampling

    width, height = size
    pixels = np.empty((len(pictures), height, width, len(mode)), dtype=np.uint8)
    for row, picture in zip(pixels, pictures, strict=True):
        image = _upright(picture.path, mode)
        if image.size != size:
            if first is not None:
                raise ValueError(
                    f"{picture.path}: must be {_times(size)} pixels as {first} is, got {_times(image.size)}; "
                    "size scales all to one size"
                )
            image = image.resize(size, Resampling.BILINEAR)
        row[...] = np.asarray(image).reshape(row.shape)
    return pixels


def _upright(path: Path, mode: str) -> Any:
    """The image as people see it, in this mode."""
    from PIL.Image import Transpose

    # By EXIF's number; 1 is upright. (ImageOps.exif_transpose writes the other tags back, which fails for some.)
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    with _opened(path) as image:
        image.load()  # EXIF can stand behind the pixels
        try:
            turn = turns.get(image.getexif().get(ORIENTATION))
        except SyntaxError:  # what is there in the place of EXIF is none; viewers do not mind
            turn = None
        return (image if turn is None else image.transpose(turn)).convert(mode)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The image at `path`; whatever goes wrong with it is told as a ValueError that names the file."""
    from PIL import Image

    with path.open("rb") as file, warnings.catch_warnings():
        # Pillow warns of odd metadata, and of transparency that is dropped. Of too many pixels it warns at first, too.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as image:
                yield image
        except Exception as error:  # Pillow's readers raise what they like at bytes that make no sense
            raise ValueError(f"{path}: cannot be read as an image: {one_line(error)}") from error


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
