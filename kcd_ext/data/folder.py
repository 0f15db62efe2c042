"""Data sets in a folder of image files by class: train/<class>/<file> and test/<class>/<file>."""

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
WIDE = ("I", "F")  # PIL modes, and the beginnings of some, whose numbers do not fit 8 bits


@dataclass(frozen=True)
class Picture:
    """An image file."""

    path: Path
    label: int
    size: tuple[int, int]  # width, height
    grey: bool


def read(path: Path, size: int | None = None) -> ImageData:
    """The data set in the folder `path`; training images are neither cropped nor flipped.

    Classes are the folders in `train`, sorted by name; `test`, or `val` if there is no `test`, has the same. Files come
    in the order of their names; those that begin with a dot are left out, every other one must be an image. Images are
    converted to RGB, unless all of both parts are 8-bit grey (PIL's mode L) and stay so.

    Args:
        size: height and width in pixels that every image is scaled to (bilinear). None: all must have one size.

    Raises:
        ValueError: a part is missing, its classes differ, a class is empty, a file is no image of 8 bits, damaged, or
            of another size than the first; names the folder or file.
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
    first, grey = parts[0][0], all(picture.grey for part in parts for picture in part)
    if size is None:
        other = next((p for part in parts for p in part if p.size != first.size), None)
        if other is not None:
            raise ValueError(
                f"{other.path}: must be {_times(first.size)} pixels as {first.path} is, got {_times(other.size)}; "
                "size scales all to one size"
            )
    shape = first.size if size is None else (size, size)
    arrays = [
        (_pixels(part, shape, "L" if grey else "RGB"), np.array([picture.label for picture in part])) for part in parts
    ]
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
                if image.mode.startswith(WIDE):
                    raise ValueError(f"its pixels must have 8 bits a channel, got PIL's mode {image.mode}")
                found.append(Picture(file, label, image.size, image.mode == "L"))
    return found


def _pixels(pictures: list[Picture], size: tuple[int, int], mode: str) -> np.ndarray:
    """(n, h, w, c) uint8."""
    from PIL.Image import Resampling

    width, height = size
    pixels = np.empty((len(pictures), height, width, len(mode)), dtype=np.uint8)
    for row, picture in zip(pixels, pictures, strict=True):
        with _opened(picture.path) as image:
            converted = image.convert(mode)
            scaled = converted if converted.size == size else converted.resize(size, Resampling.BILINEAR)
            row[...] = np.asarray(scaled).reshape(row.shape)
    return pixels


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The image at `path`; whatever goes wrong with it is told as a ValueError that names the file."""
    from PIL import Image

    with path.open("rb") as file:
        try:
            with Image.open(file) as image:
                yield image
        except Exception as error:  # Pillow's readers raise what they like at bytes that make no sense
            raise ValueError(f"{path}: cannot be read as an image: {one_line(error)}") from error


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
