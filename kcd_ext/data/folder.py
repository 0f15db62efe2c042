"""Data sets in a folder of image files by class: train/<class>/.../<file>, val/… and test/…, or <class>/.../<file>."""

import os
import re
import unicodedata
import warnings
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..describe import join_names
from ..files import check_regular
from .decoding import Paths
from .image_files import assemble_files
from .images import ImageData, check_class_names
from .reading import Reading
from .splits import ADVICE

# Folder names of each part, in order of preference.
PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
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


def read(path: Path, reading: Reading) -> ImageData:
    """Return the data set in the folder `path`; training images are neither cropped nor flipped.

    - **Parts.** Training images are in `train` or `training`, validation images in `val`, `valid` or `validation`, test
      images in `test` or `testing`, in lower or upper case. If several folders match a part, the first in this order is
      read, and a warning names the others. If only `val` is there, it is the test set. If none of these folders is there,
      the classes are the folders in `path`, from which `reading` must split off images. A folder `train` without folders in
      it is then a class too, if there are other classes.
    - **Classes** are the folders in the training part, sorted by name. Names are compared and returned in Unicode form
      NFC. A class without images in one part keeps its number, and `load` warns.
    - **Images.** All images below a class folder belong to that class, ordered by relative path, component by component
      in form NFC. Links to files and folders are followed. Each folder is read once per class, so link loops end.
    - **Files.** A file whose suffix is an image's (`SUFFIXES`) or whose first bytes are (`SIGNATURES`) must be a readable
      image. All others are skipped, and so are entries whose name starts with a dot and the folders in `SYSTEM_FOLDERS`.
      One warning names them.
    - **Pixels.** Of an animation the first frame is read. The EXIF orientation is applied. Images are converted to RGB,
      unless all of all parts are 8-bit grey (PIL mode L). Transparency is dropped as by `image.convert("RGB")`: pixels
      keep their stored colours, even if they are fully transparent.

    Args:
        path: The folder.
        reading: The options of `load`.

    Raises:
        ValueError: Names the folder or file. A part is missing or has no images; another part has a class that the
            training part lacks; two names are equal in form NFC, or are not UTF-8; a link is broken; an entry is neither
            a file nor a folder; an image is damaged, has 16 bits per channel or more (PNG, TIFF), or more pixels than
            PIL.Image.MAX_IMAGE_PIXELS; images differ in size.
        OSError: A file or folder cannot be opened.
        ImportError: Pillow is not installed; names the extra that installs it.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError('a folder of images needs the package pillow: pip install "kcd-ext[train]"') from error
    parts = _find_parts(path, reading)
    skipped = SkippedEntries()
    classes = {part: _class_folders(folder, skipped) for part, folder in parts.items()}
    for part in classes:
        _check_classes(parts["train"], parts[part], classes["train"], classes[part])
    names = tuple(sorted(classes["train"]))
    check_class_names(path.resolve().name, names)
    images = {part: _find_images(folder, names, classes[part], skipped) for part, folder in parts.items()}
    skipped.warn(path)
    files = {part: Paths([file for file, _ in found]) for part, found in images.items()}
    labels = {part: np.array([label for _, label in found], dtype=np.int64) for part, found in images.items()}
    return assemble_files(path, path.resolve().name, files, labels, names, len(names), reading)


# --- folders ----------------------------------------------------------------------------------------------------------


def _find_parts(path: Path, reading: Reading) -> dict[str, Path]:
    """Return the folder of every part. Raises ValueError if there is nothing to train on, or nothing to test."""
    folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    parts = {part: folder for part in PARTS if (folder := _find_part(path, folders, PARTS[part])) is not None}
    splits = reading.val_fraction is not None or reading.test_fraction is not None
    if splits and folders and not any(map(_has_folders, parts.values())) and len(folders) > len(parts):
        return {"train": path}  # a class may have the name of a part, such as train among the vehicles
    has = f"it has the folders {join_names(list(map(repr, folders)))}" if folders else "it has no folders"
    if "train" not in parts:
        hint = f"; for <class>/<images> without parts, {ADVICE}" if folders and not parts else ""
        raise ValueError(
            f"{path}: must have a folder train (or training); {has}; "
            f"the layout is train/<class>/<images> and test/<class>/<images>{hint}"
        )
    if len(parts) == 1 and not splits:
        others = [*PARTS["test"], *PARTS["val"]][1:]
        raise ValueError(f"{path}: must have a folder test (or {', '.join(others)}); {has}; without one, {ADVICE}")
    return parts


def _has_folders(folder: Path) -> bool:
    """Return whether a folder contains folders that are not hidden."""
    return any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir())


def _find_part(path: Path, folders: Sequence[str], names: Sequence[str]) -> Path | None:
    """Return the folder of a part: the first of `names` that is one of `folders`, in lower or upper case."""
    found = sorted((name for name in folders if name.lower() in names), key=lambda name: names.index(name.lower()))
    if not found:
        return None
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
    train: Path, other: Path, train_classes: Mapping[str, Path], other_classes: Mapping[str, Path]
) -> None:
    """Raise ValueError for a class that only the other part has; name similar classes of the training part."""
    unknown = sorted(set(other_classes) - set(train_classes))
    if not unknown:
        return
    folded = set(map(_fold_name, unknown))
    similar = [repr(name) for name in sorted(train_classes) if _fold_name(name) in folded]
    hint = f"; it has {join_names(similar)}: names must agree in case and spaces" if similar else ""
    raise ValueError(
        f"{other}: every class must have a folder in {train.name} too, which has none for "
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
) -> list[tuple[Path, int]]:
    """Return the images of a part and their labels, by class, then by relative path."""
    found = []
    for label, name in enumerate(names):
        for file in _list_files(folders[name], part, skipped) if name in folders else ():
            if is_image(file):
                found.append((file, label))
            else:
                skipped.add(NOT_AN_IMAGE, file.name)
    if not found:
        raise ValueError(f"{part}: must contain images, but has none")
    return found


def is_image(file: Path) -> bool:
    """Return whether a file must be an image, by its suffix or its first bytes."""
    if file.suffix.lower() in SUFFIXES:
        return True
    with file.open("rb") as opened:
        return SIGNATURES.match(opened.read(16)) is not None
