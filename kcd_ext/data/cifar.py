"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) out of their official archives, which are unpacked nowhere, or folders.

The layouts and the archives' sums are those of https://www.cs.toronto.edu/~kriz/cifar.html, the sums of the files in
the Python versions those that torchvision checks. CIFAR-100 has its 100 fine labels.
"""

import hashlib
import io
import os
import pickle
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..describe import one_line
from ..files import open_regular, read_regular
from .images import ImageData, assemble

URL = "https://www.cs.toronto.edu/~kriz/"
SIDE = 32
PIXELS = 3 * SIDE * SIDE  # red, green, blue, each by rows


@dataclass(frozen=True)
class File:
    """One of the files in an archive."""

    name: str
    images: int = 0
    """How many it holds."""
    md5: str | None = None
    """None: no sum of it is published, its length alone is checked. That is for folders: archives have their own."""


@dataclass(frozen=True)
class Edition:
    """An official archive, and the folder in it."""

    data_set: str
    classes: int
    archive: str
    md5: str
    """Of the archive."""
    folder: str
    train: tuple[File, ...]
    test: File
    names: File
    """Holds the names of the classes."""
    read_images: Callable[[bytes], tuple[np.ndarray, np.ndarray]]
    """A file's bytes -> pixels (n, PIXELS) uint8, labels (n,) integers. Raises ValueError."""
    read_names: Callable[[bytes], tuple[str, ...]]
    """A file's bytes -> names of the classes. Raises ValueError."""


# --- the binary version: records -------------------------------------------------------------------------------------


def _records(label_bytes: int, raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    """A record is `label_bytes` labels, of which the last one is the finest, and the pixels."""
    length = label_bytes + PIXELS
    if len(raw) % length:
        raise ValueError(f"it must hold whole records of {length} bytes, got {len(raw)} bytes")
    records = np.frombuffer(raw, dtype=np.uint8).reshape(-1, length)
    return records[:, label_bytes:], records[:, label_bytes - 1]


def _lines(raw: bytes) -> tuple[str, ...]:
    return tuple(raw.decode("ascii").split())


# --- the Python version: pickles --------------------------------------------------------------------------------------


# What a pickle of an array names. Python 2 wrote numpy.core, which NumPy 2 calls numpy._core.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ADMITTED = {
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
}


class _Unpickler(pickle.Unpickler):
    """Reads plain values and arrays. Raises ValueError where the pickle names anything else, and imports nothing."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _ADMITTED:
            raise ValueError(f"the pickle names {module}.{name}, which is not admitted")
        return _ADMITTED[module, name]


def _unpickled(raw: bytes) -> dict[bytes, object]:
    """The dict in a pickle of Python 2. It has passed its published sum, so what is in it is not checked again."""
    return _Unpickler(io.BytesIO(raw), encoding="bytes").load()


def _batch(label_key: bytes, raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    held = _unpickled(raw)
    return held[b"data"], np.array(held[label_key])


def _label_names(key: bytes, raw: bytes) -> tuple[str, ...]:
    return tuple(name.decode("ascii") for name in _unpickled(raw)[key])


EDITIONS = (
    Edition(
        data_set="cifar10",
        classes=10,
        archive="cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        train=(
            File("data_batch_1", 10000, "c99cafc152244af753f735de768cd75f"),
            File("data_batch_2", 10000, "d4bba439e000b95fd0a9bffe97cbabec"),
            File("data_batch_3", 10000, "54ebc095f3ab1f0389bbae665268c751"),
            File("data_batch_4", 10000, "634d18415352ddfa80567beed471001a"),
            File("data_batch_5", 10000, "482c414d41f54cd18b22e5b47cb7c3cb"),
        ),
        test=File("test_batch", 10000, "40351d587109b95175f43aff81a1287e"),
        names=File("batches.meta", md5="5ff9c542aee3614f3951f8cda6e48888"),
        read_images=partial(_batch, b"labels"),
        read_names=partial(_label_names, b"label_names"),
    ),
    Edition(
        data_set="cifar10",
        classes=10,
        archive="cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        folder="cifar-10-batches-bin",
        train=tuple(File(f"data_batch_{number}.bin", 10000) for number in range(1, 6)),
        test=File("test_batch.bin", 10000),
        names=File("batches.meta.txt"),
        read_images=partial(_records, 1),
        read_names=_lines,
    ),
    Edition(
        data_set="cifar100",
        classes=100,
        archive="cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        train=(File("train", 50000, "16019d7e3df5f24257cddd939b257f8d"),),
        test=File("test", 10000, "f0ef6b0ae62326f3e7ffdfab6717acfc"),
        names=File("meta", md5="7973b15100ade9c7d40fb424638fde48"),
        read_images=partial(_batch, b"fine_labels"),
        read_names=partial(_label_names, b"fine_label_names"),
    ),
    Edition(
        data_set="cifar100",
        classes=100,
        archive="cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        folder="cifar-100-binary",
        train=(File("train.bin", 50000),),
        test=File("test.bin", 10000),
        names=File("fine_label_names.txt"),
        read_images=partial(_records, 2),
        read_names=_lines,
    ),
)


# --- what is read -----------------------------------------------------------------------------------------------------


def cifar10() -> ImageData:
    """CIFAR-10: 50000 images of 32x32x3 to train on, padded by 4, cropped and flipped; 10000 to test; 10 classes."""
    return find("cifar10")


def cifar100() -> ImageData:
    """CIFAR-100: 50000 images of 32x32x3 to train on, padded by 4, cropped and flipped; 10000 to test; 100 classes."""
    return find("cifar100")


def find(data_set: str, editions: Sequence[Edition] = EDITIONS) -> ImageData:
    """The first edition of a data set that lies in the folder KCD_DATA, or without that variable in `data`.

    Raises:
        FileNotFoundError: there is none; says which files are wanted, where they were looked for, and where they come
            from.
        ValueError, OSError: as `read`.
    """
    editions = [edition for edition in editions if edition.data_set == data_set]
    named = os.environ.get("KCD_DATA")
    root = Path(named or "data")
    for edition in editions:
        for name in (edition.folder, edition.archive):
            if (root / name).exists():
                return read(root / name, editions)
    wanted = " or ".join(edition.archive for edition in editions)
    place = "the folder that KCD_DATA names" if named else "KCD_DATA is not set"
    raise FileNotFoundError(
        f"{data_set} needs {wanted} from {URL}, or the folder in it: not found in {root.resolve()} ({place})"
    )


def read(path: Path, editions: Sequence[Edition] = EDITIONS) -> ImageData:
    """The data set in an archive or extracted folder.

    `editions`: what can be read, with the sums it must have.

    Raises:
        ValueError: `path` is none of the editions, or differs from what was published, or cannot be decoded; names the
            file.
        OSError: a file is missing or cannot be read.
    """
    if path.is_dir():
        edition = _extracted(path, editions)
        if edition is None:
            raise ValueError(f"{path}: must be {' or '.join(edition.folder for edition in editions)}")
        return _collect(edition, path, _in_folder(edition, path))
    with open_regular(path) as file:
        edition = _published(path, file, editions)
        return _collect(edition, path, _in_archive(edition, path, file))


def is_extracted(path: Path) -> bool:
    """Whether the folder is one that was in an archive."""
    return _extracted(path, EDITIONS) is not None


def _extracted(path: Path, editions: Sequence[Edition]) -> Edition | None:
    """By its name, or by its files of images: where images lie by class, one of these is a folder, or is not there."""
    for edition in editions:
        files = (path / file.name for file in (edition.train[0], edition.test))
        if path.name == edition.folder or all(file.is_file() for file in files):
            return edition
    return None


def _published(path: Path, file: BinaryIO, editions: Sequence[Edition]) -> Edition:
    """The edition whose archive this file is, by its sum, whatever its name."""
    digest = hashlib.md5(usedforsecurity=False)
    while block := file.read(1 << 20):
        digest.update(block)
    file.seek(0)
    md5 = digest.hexdigest()
    for edition in editions:
        if edition.md5 == md5:
            return edition
    for edition in editions:
        if edition.archive == path.name:
            raise ValueError(
                f"{path}: damaged or not complete: its md5 is {md5}, must be {edition.md5}; "
                f"get it again from {URL}{edition.archive}"
            )
    known = ", ".join(edition.archive for edition in editions)
    raise ValueError(f"{path}: must be an .npz file or one of {known}; it is none of these by its md5, {md5}")


def _in_folder(edition: Edition, path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and contents of every file there should be."""
    for file in (*edition.train, edition.test, edition.names):
        raw = read_regular(path / file.name)
        md5 = hashlib.md5(raw, usedforsecurity=False).hexdigest()
        if file.md5 not in (None, md5):
            raise ValueError(f"{path / file.name}: damaged or not complete: its md5 is {md5}, must be {file.md5}")
        yield file.name, raw


def _in_archive(edition: Edition, path: Path, file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Name and contents of every file there is, in one pass over the archive."""
    try:
        with tarfile.open(fileobj=file, mode="r:gz") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                if folder == edition.folder and member.isfile():
                    yield name, archive.extractfile(member).read()
    except Exception as error:  # gzip, zlib and tarfile raise what they like at bytes that make no sense
        raise ValueError(f"{path}: damaged or not complete: {one_line(error)}") from error


def _collect(edition: Edition, path: Path, contents: Iterator[tuple[str, bytes]]) -> ImageData:
    """The data set out of the contents of its files, in whichever order they come."""
    missing = {file.name: file for file in (*edition.train, edition.test, edition.names)}
    ends = np.cumsum([file.images for file in missing.values()]).tolist()
    place = {file: slice(end - file.images, end) for file, end in zip(missing.values(), ends, strict=True)}
    images = np.empty((ends[-1], SIDE, SIDE, 3), dtype=np.uint8)
    labels = np.empty(ends[-1], dtype=np.int64)
    names: tuple[str, ...] = ()
    for name, raw in contents:
        file = missing.pop(name, None)  # None: one that nobody needs
        try:
            if file is edition.names:
                names = _checked_names(edition, raw)
            elif file is not None:
                pixels, labels[place[file]] = _checked_images(edition, file, raw)
                images[place[file]] = pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from error
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} missing")
    train, test = (slice(0, place[edition.test].start), place[edition.test])
    data = ((images[part], labels[part]) for part in (train, test))
    return assemble(edition.data_set, *data, edition.classes, names, padding=4, flip=True)


def _checked_images(edition: Edition, file: File, raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = edition.read_images(raw)
    if pixels.shape != (file.images, PIXELS) or labels.shape != (file.images,):
        raise ValueError(
            f"it must hold {file.images} images of {PIXELS} numbers and as many labels, "
            f"got {pixels.shape} and {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= edition.classes:
        raise ValueError(f"labels must lie in [0, {edition.classes}), got {labels.min()} to {labels.max()}")
    return pixels, labels


def _checked_names(edition: Edition, raw: bytes) -> tuple[str, ...]:
    names = edition.read_names(raw)
    if len(names) != edition.classes:
        raise ValueError(f"it must hold {edition.classes} names of classes, got {len(names)}")
    return names
