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
from ..describe import join_names, one_line
from ..files import check_regular
from .images import ImageData, assemble, check_class_names

# Folder names of each part, in order of preference.
TRAIN = ("train", "training")
TEST = ("test", "testing", "val", "valid", "validation")
# A file with such a suffix must be an image, whether Pillow can read it or not.
SUFFIXES = frozenset(
    ".apng .avif .avifs .bmp .bw .dds .dib .exr .gif .heic .heif .hif .icb .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf"
    " .jpg .jpx .jxl .mpo .pbm .pcx .pfm .pgm .png .pnm .ppm .psd .qoi .ras .rgb .rgba .sgi .svg .tga .tif .tiff .vda"
    " .vst .webp .xbm .xpm".split()
)
# The first bytes of image formats. A file that starts with one must be an image, whatever its name.
SIGNATURES = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP|II\*\0|MM\0\*|BM....\0\0\0\0|qoif"
    rb"|....ftyp(avif|avis|heic|heix|mif1)|\0\0\0\x0cjP  \r\n\x87\n",
    re.DOTALL,
)
# Folders that file systems, archivers and network storage add, some of them with thumbnails of the images.
SYSTEM_FOLDERS = frozenset(
    (
        *("__macosx", "@eadir", "#recycle", "@recycle", "@recently-snapshot", "$recycle.bin"),
        *("system volume information", "lost+found", "__pycache__"),
    )
)
# Reasons why an entry is skipped.
NOT_AN_IMAGE = "hidden entries, system folders and files that are not images"
OUTSIDE_CLASSES = "images outside the class folders"
REPEATED = "links to folders that were already read or contain the data set"
ORIENTATION = 0x0112  # EXIF tag
WIDE_MODES = ("I", "F")  # PIL modes, or their first letters, whose numbers do not fit 8 bits
WIDE_STORAGE = re.compile(r";16[BLN]")  # in PIL's name of the stored format: 16 bits, although the mode has 8


class SkippedEntries:
    """The entries of a folder that are not part of the data set, collected for one warning."""

    def __init__(self) -> None:
        self._names: dict[str, Counter[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Count an entry of this name."""
        self._names.setdefault(reason, Counter())[name] += 1

    def warn(self, path: Path) -> None:
        """Warn once about all entries, the most frequent names first; do nothing if there are none."""
        notes = []
        for reason, names in self._names.items():
            shown = [
                name if count == 1 else f"{name} ({count} times)"
                for name, count in sorted(names.items(), key=lambda item: (-item[1], item[0]))
            ]
            notes.append(f"{reason}: {join_names(shown)}")
        if notes:
            warnings.warn(f"{path}: skipped {'; '.join(notes)}", stacklevel=2)


@dataclass(frozen=True)
class ImageFile:
    """An image file."""

    path: Path
    label: int
    grey: bool
    size: tuple[int, int]
    """Width and height as stored, before the EXIF orientation is applied."""


def read(path: Path, size: int | None = None) -> ImageData:
    """Return the data set in the folder `path`; training images are neither cropped nor flipped.

    - **Parts.** Training images are in `train` or `training`, test images in `test`, `testing`, `val`, `valid` or
      `validation`, in lower or upper case. If several folders match a part, the first in this order is read, and a
      warning names the others.
    - **Classes** are the folders in the training part, sorted by name. Names are compared and returned in Unicode form
      NFC. A class without images in one part keeps its number, and `load` warns.
    - **Images.** All images below a class folder belong to that class, ordered by relative path, component by component
      in form NFC. Links to files and folders are followed. Each folder is read once per class, so link loops end.
    - **Files.** A file whose suffix is an image's (`SUFFIXES`) or whose first bytes are (`SIGNATURES`) must be a readable
      image. All others are skipped, and so are entries whose name starts with a dot and the folders in `SYSTEM_FOLDERS`.
      One warning names them.
    - **Pixels.** Of an animation the first frame is read. The EXIF orientation is applied. Images are converted to RGB,
      unless all of both parts are 8-bit grey (PIL mode L). Transparency is dropped as by `image.convert("RGB")`: pixels
      keep their stored colours, even if they are fully transparent.

    Args:
        path: The folder.
        size: Height and width in pixels to scale every image to (bilinear). None: all must have one size.

    Raises:
        ValueError: Names the folder or file. A part is missing or has no images; the test part has a class that the
            training part lacks; two names are equal in form NFC, or are not UTF-8; a link is broken; an entry is neither
            a file nor a folder; an image is damaged, has 16 bits per channel or more (PNG, TIFF), or more pixels than
            PIL.Image.MAX_IMAGE_PIXELS; images differ in size.
        OSError: A file or folder cannot be opened.
        ImportError: Pillow is not installed; names the extra that installs it.
    """
    if size is not None:
        check_int("size", size, 1)
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError('a folder of images needs the package pillow: pip install "kcd-ext[train]"') from error
    train, test = _find_part(path, TRAIN), _find_part(path, TEST)
    skipped = SkippedEntries()
    classes = [_class_folders(part, skipped) for part in (train, test)]
    _check_classes(train, test, *classes)
    names = tuple(sorted(classes[0]))
    check_class_names(path.resolve().name, names)
    parts = [_find_images(part, names, folders, skipped) for part, folders in zip((train, test), classes, strict=True)]
    skipped.warn(path)
    files = [file for part in parts for file in part]
    mode = "L" if all(file.grey for file in files) else "RGB"
    if size is None:
        _check_sizes(path, files)
    first = parts[0][0].path if size is None else None
    shape = (size, size) if first is None else load_upright(first, mode).size
    arrays = [
        (_load_pixels(part, mode, shape, first), np.array([file.label for file in part], dtype=np.int64))
        for part in parts
    ]
    return assemble(path.resolve().name, *arrays, len(names), names)


# --- folders ----------------------------------------------------------------------------------------------------------


def _find_part(path: Path, names: Sequence[str]) -> Path:
    """Return the folder of a part: the first of `names` that exists, in lower or upper case."""
    folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    found = sorted((name for name in folders if name.lower() in names), key=lambda name: names.index(name.lower()))
    if not found:
        has = f"it has the folders {join_names(list(map(repr, folders)))}" if folders else "it has no folders"
        raise ValueError(
            f"{path}: must have a folder {names[0]} (or {', '.join(names[1:])}); {has}; "
            "the layout is train/<class>/<images> and test/<class>/<images>"
        )
    same = [name for name in found if name.lower() == found[0].lower()]
    if len(same) > 1:
        raise ValueError(f"{path}: must have one folder {found[0].lower()}, got {' and '.join(same)}")
    if len(found) > 1:
        warnings.warn(f"{path}: read {found[0]} and ignored {', '.join(found[1:])}", stacklevel=2)
    return path / found[0]


def _class_folders(part: Path, skipped: SkippedEntries) -> dict[str, Path]:
    """Return the class folders by name, in form NFC."""
    folders, files = _list_entries(part, skipped)
    classes: dict[str, Path] = {}
    for folder in folders:
        name = unicodedata.normalize("NFC", folder.name)
        if name in classes:
            both = " and ".join(ascii(path.name) for path in (classes[name], folder))
            raise ValueError(f"{part}: {both} are the same name in Unicode form NFC; join or rename these folders")
        classes[name] = folder
    for file in files:
        if is_image(file):
            skipped.add(OUTSIDE_CLASSES, f"{part.name}/{file.name}")
        else:
            skipped.add(NOT_AN_IMAGE, file.name)
    if not classes:
        raise ValueError(f"{part}: must have a folder of images for every class, but has none")
    return classes


def _check_classes(
    train: Path, test: Path, train_classes: Mapping[str, Path], test_classes: Mapping[str, Path]
) -> None:
    """Raise ValueError for a class that only the test part has; name similar classes of the training part."""
    unknown = sorted(set(test_classes) - set(train_classes))
    if not unknown:
        return
    folded = set(map(_fold_name, unknown))
    similar = [repr(name) for name in sorted(train_classes) if _fold_name(name) in folded]
    hint = f"; it has {join_names(similar)}: names must agree in case and spaces" if similar else ""
    raise ValueError(
        f"{test}: every class must have a folder in {train.name} too, which has none for "
        f"{join_names(list(map(repr, unknown)))}{hint}"
    )


def _fold_name(name: str) -> str:
    """Return a name without case, spaces and typographic variants."""
    return "".join(unicodedata.normalize("NFKC", name).casefold().split())


def _list_entries(folder: Path, skipped: SkippedEntries) -> tuple[list[Path], list[Path]]:
    """Return the folders and the files in a folder, each sorted by name.

    Raises:
        ValueError: An entry is neither, or a broken link.
    """
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                skipped.add(NOT_AN_IMAGE, entry.name)
            elif entry.is_dir():
                if entry.name.lower() in SYSTEM_FOLDERS:
                    skipped.add(NOT_AN_IMAGE, entry.name)
                else:
                    folders.append(folder / entry.name)
            else:
                if not entry.is_file():
                    check_regular(entry.path)
                files.append(folder / entry.name)
    return folders, files


def _list_files(folder: Path, part: Path, skipped: SkippedEntries) -> list[Path]:
    """Return all files below a class folder by relative path. Each folder is read once, even if several links lead to it."""
    root, seen = Path(os.path.realpath(part)), set()
    found, waiting = [], deque([folder])
    while waiting:
        current = waiting.pop()
        real = os.path.realpath(current)
        if real in seen or root.is_relative_to(real):
            skipped.add(REPEATED, str(current.relative_to(part.parent)))
            continue
        seen.add(real)
        folders, files = _list_entries(current, skipped)
        waiting.extendleft(path for path in folders if path.is_symlink())  # after real folders, if not read by then
        waiting.extend(path for path in reversed(folders) if not path.is_symlink())
        found += files
    depth = len(folder.parts)
    return sorted(found, key=lambda path: [(unicodedata.normalize("NFC", name), name) for name in path.parts[depth:]])


# --- images -----------------------------------------------------------------------------------------------------------


def _find_images(
    part: Path, names: Sequence[str], folders: Mapping[str, Path], skipped: SkippedEntries
) -> list[ImageFile]:
    """Return the images of a part by class, then by relative path. Only the files' headers are read."""
    found = []
    for label, name in enumerate(names):
        for file in _list_files(folders[name], part, skipped) if name in folders else ():
            if not is_image(file):
                skipped.add(NOT_AN_IMAGE, file.name)
                continue
            with _open_image(file) as image:
                _check_bit_depth(image)
                found.append(ImageFile(file, label, image.mode == "L", image.size))
    if not found:
        raise ValueError(f"{part}: must contain images, but has none")
    return found


def is_image(file: Path) -> bool:
    """Return whether a file must be an image, by its suffix or its first bytes."""
    if file.suffix.lower() in SUFFIXES:
        return True
    with file.open("rb") as opened:
        return SIGNATURES.match(opened.read(16)) is not None


def _check_bit_depth(image: Any) -> None:
    """Raise ValueError for an image of 16 bits per channel or more, of which PIL would keep at most the upper 8.

    These are images that PIL reads into a wider mode, and PNG and TIFF files whose stored format PIL names.
    """
    stored = "".join(str(tile[3]) for tile in getattr(image, "tile", ()))
    if image.mode.startswith(WIDE_MODES) or WIDE_STORAGE.search(stored):
        raise ValueError(f"its pixels must have 8 bits per channel, got {stored or image.mode} (PIL's name)")


def _check_sizes(path: Path, files: Sequence[ImageFile]) -> None:
    """Raise ValueError if sizes differ by more than a rotation, which EXIF may undo."""
    by_size = {tuple(sorted(file.size)): file for file in reversed(files)}  # the first file of each size
    if len(by_size) == 1:
        return
    low, high = (extreme(by_size.values(), key=lambda file: math.prod(file.size)) for extreme in (min, max))
    raise ValueError(
        f"{path}: images must have one size, got {len(by_size)}, "
        f"from {_format_size(low.size)} ({low.path.relative_to(path)}) to {_format_size(high.size)} "
        f"({high.path.relative_to(path)}); size (--size) scales all to one size"
    )


def _load_pixels(files: list[ImageFile], mode: str, size: tuple[int, int], first: Path | None) -> np.ndarray:
    """Return the pixels of all files, `(n, h, w, c)` uint8.

    Args:
        files: The images.
        mode: PIL mode to convert them to.
        size: Width and height.
        first: The file that has this size, which all must have. None: scale all to `size`.
    """
    from PIL.Image import Resampling

    width, height = size
    pixels = np.empty((len(files), height, width, len(mode)), dtype=np.uint8)
    for row, file in zip(pixels, files, strict=True):
        image = load_upright(file.path, mode)
        if image.size != size:
            if first is not None:
                raise ValueError(
                    f"{file.path}: must be {_format_size(size)} pixels like {first}, got {_format_size(image.size)}; "
                    "size (--size) scales all to one size"
                )
            image = image.resize(size, Resampling.BILINEAR)
        row[...] = np.asarray(image).reshape(row.shape)
    return pixels


def load_upright(path: Path, mode: str) -> Any:
    """Return the image with its EXIF orientation applied, in this mode. Raises ValueError, naming the file, as `read` does."""
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
    with _open_image(path) as image:
        _check_bit_depth(image)
        image.load()  # EXIF can follow the pixels
        try:
            turn = turns.get(image.getexif().get(ORIENTATION))
        except SyntaxError:  # the EXIF block is not EXIF; viewers ignore it too
            turn = None
        return (image if turn is None else image.transpose(turn)).convert(mode)


@contextmanager
def _open_image(path: Path) -> Iterator[Any]:
    """Open the image at `path`. Convert any of its errors to a ValueError that names the file."""
    from PIL import Image, UnidentifiedImageError

    with path.open("rb") as file, warnings.catch_warnings():
        # Pillow warns about odd metadata and dropped transparency. It also only warns, at first, about too many pixels.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as image:
                yield image
        except UnidentifiedImageError as error:  # its message names the file object, not the file
            reason = "it is empty" if os.fstat(file.fileno()).st_size == 0 else "Pillow does not know its format"
            raise ValueError(f"{path}: cannot be read as an image: {reason}") from error
        except Exception as error:  # Pillow's readers raise any exception for malformed bytes
            raise ValueError(f"{path}: cannot be read as an image: {one_line(error)}") from error


def _format_size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
