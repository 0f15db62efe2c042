"""Data sets in a folder of image files by class: train/<class>/.../<file> and test/<class>/.../<file>."""

import math
import os
import re
import unicodedata
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import check_int
from ..describe import one_line, some
from ..files import check_regular
from .images import ImageData, assemble, check_class_names

# Names of the folder of a part, the preferred one first.
TRAIN = ("train", "training")
TEST = ("test", "testing", "val", "valid", "validation")
# A file of such a name must be an image, whether Pillow can read it or not.
SUFFIXES = frozenset(
    ".apng .avif .avifs .bmp .bw .dds .dib .exr .gif .heic .heif .hif .icb .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf"
    " .jpg .jpx .jxl .mpo .pbm .pcx .pfm .pgm .png .pnm .ppm .psd .qoi .ras .rgb .rgba .sgi .svg .tga .tif .tiff .vda"
    " .vst .webp .xbm .xpm".split()
)
# The first bytes of images; a file that begins so must be one, whatever its name.
SIGNATURES = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP|II\*\0|MM\0\*|BM....\0\0\0\0|qoif"
    rb"|....ftyp(avif|avis|heic|heix|mif1)|\0\0\0\x0cjP  \r\n\x87\n",
    re.DOTALL,
)
# Folders that file systems, archivers and network storage add, some of them with small copies of the images.
FOREIGN_FOLDERS = frozenset(
    (
        *("__macosx", "@eadir", "#recycle", "@recycle", "@recently-snapshot", "$recycle.bin"),
        *("system volume information", "lost+found", "__pycache__"),
    )
)
# Why an entry is skipped.
FOREIGN = "what is hidden or no image"
OUTSIDE = "images outside the folders of classes"
REPEATED = "links to folders that are read already or contain the data set"
ORIENTATION = 0x0112  # EXIF's tag
WIDE = ("I", "F")  # PIL modes, and the beginnings of some, whose numbers do not fit 8 bits
WIDE_CHANNELS = re.compile(r";16[BLN]")  # in what PIL calls the numbers in a file, of 16 bits, where its mode has 8


class Skipped:
    """What the folder of a data set holds beside its images, for one warning."""

    def __init__(self) -> None:
        self._names: dict[str, Counter[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Count an entry of this name."""
        self._names.setdefault(reason, Counter())[name] += 1

    def warn(self, path: Path) -> None:
        """Warn once of all entries, the most frequent names first; of none, do nothing."""
        notes = []
        for reason, names in self._names.items():
            shown = [
                name if count == 1 else f"{name} ({count} times)"
                for name, count in sorted(names.items(), key=lambda item: (-item[1], item[0]))
            ]
            notes.append(f"{reason}: {some(shown)}")
        if notes:
            warnings.warn(f"{path}: skipped {'; '.join(notes)}", stacklevel=2)


@dataclass(frozen=True)
class Picture:
    """An image file."""

    path: Path
    label: int
    grey: bool
    size: tuple[int, int]
    """Width and height as stored, before EXIF turns the image."""


def read(path: Path, size: int | None = None) -> ImageData:
    """Return the data set in the folder `path`; training images are neither cropped nor flipped.

    Training images are in `train` or `training`, test images in `test`, `testing`, `val`, `valid` or `validation`, in
    upper or lower case. Of several folders for one part the first in this order is read, and a warning names the
    others.

    Classes are the folders in the training part, sorted by name. Names are compared and given in Unicode's form NFC. A
    class may have no images in one part: it keeps its number, and `load` warns of it. All images below a class's folder
    belong to the class, in the order of their relative paths, whose parts are compared one by one in form NFC. Links to
    files and folders are followed. Within a class each folder is read once, so that loops of links end.

    A file is an image if its name ends as an image's (`SUFFIXES`) or if it begins as one (`SIGNATURES`), and must then
    be readable. All others are skipped, with entries whose names begin with a dot and the folders in `FOREIGN_FOLDERS`;
    one warning names them. Of an animation the first frame is read. Images are turned as their EXIF orientation says,
    so that they are what people see, and converted to RGB, unless all of both parts are 8-bit grey (PIL's mode L) and
    stay so. Transparency is dropped as by `image.convert("RGB")`: pixels have the colours that are stored, also where
    none can be seen.

    Args:
        size: height and width in pixels that every image is scaled to (bilinear). None: all must have one size.

    Raises:
        ValueError: a part is missing or holds no images; the test part has a class that the training part has not; two
            names are one in form NFC, or no text in UTF-8; a link leads to nothing; an entry is neither a file nor a
            folder; an image is damaged, of 16 bits a channel or more (PNG, TIFF), or of more pixels than
            PIL.Image.MAX_IMAGE_PIXELS; or images differ in size. Names the folder or file.
        OSError: a file or folder cannot be opened.
        ImportError: Pillow is not installed; says which extra installs it.
    """
    if size is not None:
        check_int("size", size, 1)
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError('a folder of images needs the package pillow: pip install "kcd-ext[train]"') from error
    train, test = _part(path, TRAIN), _part(path, TEST)
    skipped = Skipped()
    classes = [_classes(part, skipped) for part in (train, test)]
    _check_classes(train, test, *classes)
    names = tuple(sorted(classes[0]))
    check_class_names(path.resolve().name, names)
    parts = [_pictures(part, names, held, skipped) for part, held in zip((train, test), classes, strict=True)]
    skipped.warn(path)
    pictures = [picture for part in parts for picture in part]
    mode = "L" if all(picture.grey for picture in pictures) else "RGB"
    if size is None:
        _check_sizes(path, pictures)
    first = parts[0][0].path if size is None else None
    shape = (size, size) if first is None else _upright(first, mode).size
    arrays = [
        (_pixels(part, mode, shape, first), np.array([picture.label for picture in part], dtype=np.int64))
        for part in parts
    ]
    return assemble(path.resolve().name, *arrays, len(names), names)


# --- folders ----------------------------------------------------------------------------------------------------------


def _part(path: Path, names: Sequence[str]) -> Path:
    """The folder of a part: the first of `names` that is there, in upper or lower case."""
    folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    found = sorted((name for name in folders if name.lower() in names), key=lambda name: names.index(name.lower()))
    if not found:
        has = f"it has the folders {some(list(map(repr, folders)))}" if folders else "it has no folders"
        raise ValueError(
            f"{path}: must have a folder {names[0]} (or {', '.join(names[1:])}); {has}; "
            "the layout is train/<class>/<images> and test/<class>/<images>"
        )
    same = [name for name in found if name.lower() == found[0].lower()]
    if len(same) > 1:
        raise ValueError(f"{path}: must have one folder {found[0].lower()}, got {' and '.join(same)}")
    if len(found) > 1:
        warnings.warn(f"{path}: read {found[0]} and left out {', '.join(found[1:])}", stacklevel=2)
    return path / found[0]


def _classes(part: Path, skipped: Skipped) -> dict[str, Path]:
    """The folders of the classes by name, in form NFC."""
    folders, files = _entries(part, skipped)
    classes: dict[str, Path] = {}
    for folder in folders:
        name = unicodedata.normalize("NFC", folder.name)
        if name in classes:
            both = " and ".join(ascii(path.name) for path in (classes[name], folder))
            raise ValueError(f"{part}: {both} are one name in Unicode's form NFC; join or rename these folders")
        classes[name] = folder
    for file in files:
        if _is_image(file):
            skipped.add(OUTSIDE, f"{part.name}/{file.name}")
        else:
            skipped.add(FOREIGN, file.name)
    if not classes:
        raise ValueError(f"{part}: must have a folder of images for every class, there is none")
    return classes


def _check_classes(train: Path, test: Path, of_train: Mapping[str, Path], of_test: Mapping[str, Path]) -> None:
    """Raise ValueError for a class of the test part alone; name one of the training part that looks like it."""
    unknown = sorted(set(of_test) - set(of_train))
    if not unknown:
        return
    folded = set(map(_folded, unknown))
    alike = [repr(name) for name in sorted(of_train) if _folded(name) in folded]
    hint = f"; it has {some(alike)}: names must agree in case and spaces" if alike else ""
    raise ValueError(
        f"{test}: every class must have a folder in {train.name} too, which has none for "
        f"{some(list(map(repr, unknown)))}{hint}"
    )


def _folded(name: str) -> str:
    """What is left of a name without case, spaces and typographic forms."""
    return "".join(unicodedata.normalize("NFKC", name).casefold().split())


def _entries(folder: Path, skipped: Skipped) -> tuple[list[Path], list[Path]]:
    """The folders and the files in a folder, each sorted by name.

    Raises:
        ValueError: an entry is neither, or a link to nothing.
    """
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                skipped.add(FOREIGN, entry.name)
            elif entry.is_dir():
                if entry.name.lower() in FOREIGN_FOLDERS:
                    skipped.add(FOREIGN, entry.name)
                else:
                    folders.append(folder / entry.name)
            else:
                if not entry.is_file():
                    check_regular(entry.path)
                files.append(folder / entry.name)
    return folders, files


def _files(folder: Path, part: Path, skipped: Skipped) -> list[Path]:
    """All files below the folder of a class, by relative path. Each folder is read once, however many links lead to it."""
    root, seen = Path(os.path.realpath(part)), set()
    found, waiting = [], deque([folder])
    while waiting:
        current = waiting.pop()
        real = os.path.realpath(current)
        if real in seen or root.is_relative_to(real):
            skipped.add(REPEATED, str(current.relative_to(part.parent)))
            continue
        seen.add(real)
        folders, files = _entries(current, skipped)
        waiting.extendleft(path for path in folders if path.is_symlink())  # read last, if at all
        waiting.extend(path for path in reversed(folders) if not path.is_symlink())
        found += files
    depth = len(folder.parts)
    return sorted(found, key=lambda path: [(unicodedata.normalize("NFC", name), name) for name in path.parts[depth:]])


# --- images -----------------------------------------------------------------------------------------------------------


def _pictures(part: Path, names: Sequence[str], folders: Mapping[str, Path], skipped: Skipped) -> list[Picture]:
    """The images of a part by class, then by relative path. Only the files' headers are read."""
    found = []
    for label, name in enumerate(names):
        for file in _files(folders[name], part, skipped) if name in folders else ():
            if not _is_image(file):
                skipped.add(FOREIGN, file.name)
                continue
            with _opened(file) as image:
                _check_width(image)
                found.append(Picture(file, label, image.mode == "L", image.size))
    if not found:
        raise ValueError(f"{part}: must hold images, there is none")
    return found


def _is_image(file: Path) -> bool:
    """Whether a file must be an image, by its name or its first bytes."""
    if file.suffix.lower() in SUFFIXES:
        return True
    with file.open("rb") as opened:
        return SIGNATURES.match(opened.read(16)) is not None


def _check_width(image: Any) -> None:
    """Raises ValueError for an image of 16 bits a channel or more, of which PIL would keep the upper 8 if any.

    Those that PIL reads into a wider mode, and of the others the files whose numbers it names, PNG and TIFF.
    """
    stored = "".join(str(tile[3]) for tile in getattr(image, "tile", ()))
    if image.mode.startswith(WIDE) or WIDE_CHANNELS.search(stored):
        raise ValueError(f"its pixels must have 8 bits a channel, got {stored or image.mode}, as PIL calls it")


def _check_sizes(path: Path, pictures: Sequence[Picture]) -> None:
    """Raise ValueError where sizes differ by more than a turn, which EXIF may undo."""
    by_size = {tuple(sorted(picture.size)): picture for picture in reversed(pictures)}  # the first picture of each
    if len(by_size) == 1:
        return
    low, high = (choose(by_size.values(), key=lambda picture: math.prod(picture.size)) for choose in (min, max))
    raise ValueError(
        f"{path}: images must have one size, got {len(by_size)}, "
        f"from {_times(low.size)} ({low.path.relative_to(path)}) to {_times(high.size)} "
        f"({high.path.relative_to(path)}); size (--size) scales all to one size"
    )


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
                    "size (--size) scales all to one size"
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
    from PIL import Image, UnidentifiedImageError

    with path.open("rb") as file, warnings.catch_warnings():
        # Pillow warns of odd metadata, and of transparency that is dropped. Of too many pixels it warns at first, too.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as image:
                yield image
        except UnidentifiedImageError as error:  # its message is of the opened file as an object
            what = "it is empty" if os.fstat(file.fileno()).st_size == 0 else "it is of no format that Pillow knows"
            raise ValueError(f"{path}: cannot be read as an image: {what}") from error
        except Exception as error:  # Pillow's readers raise what they like at bytes that make no sense
            raise ValueError(f"{path}: cannot be read as an image: {one_line(error)}") from error


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
