"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) from their official archives or folders.

Archives are read without unpacking them to disk. Layouts and checksums of the archives are those of
https://www.cs.toronto.edu/~kriz/cifar.html. Checksums of the files in the Python versions are those that torchvision
checks. CIFAR-100 has its 100 fine labels.
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
PIXELS = 3 * SIDE * SIDE  # the red, green and blue plane, each row by row


@dataclass(frozen=True)
class File:
    """A file in an archive."""

    name: str
    images: int = 0
    """Number of images in the file."""
    md5: str | None = None
    """MD5 of the file, checked when a folder is read. None: none is published, so only its length is checked."""


@dataclass(frozen=True)
class Edition:
    """A version of a data set: an official archive, and the folder in it."""

    data_set: str
    classes: int
    archive: str
    md5: str
    """MD5 of the archive."""
    folder: str
    train: tuple[File, ...]
    test: File
    names: File
    """The file with the class names."""
    read_images: Callable[[bytes], tuple[np.ndarray, np.ndarray]]
    """Returns pixels `(n, PIXELS)` uint8 and labels `(n,)` from a file's bytes. Raises ValueError."""
    read_names: Callable[[bytes], tuple[str, ...]]
    """Returns the class names from a file's bytes. Raises ValueError."""


# --- the binary version: records -------------------------------------------------------------------------------------


def _read_records(label_bytes: int, raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels and labels. A record has `label_bytes` labels, of which the last one is the finest, then pixels."""
    length = label_bytes + PIXELS
    if len(raw) % length:
        raise ValueError(f"it must contain complete records of {length} bytes, got {len(raw)} bytes")
    records = np.frombuffer(raw, dtype=np.uint8).reshape(-1, length)
    return records[:, label_bytes:], records[:, label_bytes - 1]


def _read_lines(raw: bytes) -> tuple[str, ...]:
    return tuple(raw.decode("ascii").split())


# --- the Python version: pickles --------------------------------------------------------------------------------------


# The globals in a pickle of an array. Python 2 wrote numpy.core, which NumPy 2 calls numpy._core.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED_GLOBALS = {
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
}


class _Unpickler(pickle.Unpickler):
    """An unpickler of plain values and arrays. It imports nothing and raises ValueError for any other global."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _ALLOWED_GLOBALS:
            raise ValueError(f"the pickle names {module}.{name}, which is not allowed")
        return _ALLOWED_GLOBALS[module, name]


def _unpickle(raw: bytes) -> dict[bytes, object]:
    """Return the dict in a Python 2 pickle. Its published checksum has matched, so its structure is not checked again."""
    return _Unpickler(io.BytesIO(raw), encoding="bytes").load()


def _read_batch(label_key: bytes, raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    batch = _unpickle(raw)
    return batch[b"data"], np.array(batch[label_key])


def _read_label_names(key: bytes, raw: bytes) -> tuple[str, ...]:
    return tuple(name.decode("ascii") for name in _unpickle(raw)[key])


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
        read_images=partial(_read_batch, b"labels"),
        read_names=partial(_read_label_names, b"label_names"),
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
        read_images=partial(_read_records, 1),
        read_names=_read_lines,
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
        read_images=partial(_read_batch, b"fine_labels"),
        read_names=partial(_read_label_names, b"fine_label_names"),
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
        read_images=partial(_read_records, 2),
        read_names=_read_lines,
    ),
)


# --- reading ----------------------------------------------------------------------------------------------------------


def cifar10() -> ImageData:
    """Return CIFAR-10: 50000 images of 32x32x3 to train, padded by 4, cropped and flipped; 10000 to test; 10 classes."""
    return find("cifar10")


def cifar100() -> ImageData:
    """Return CIFAR-100: 50000 images of 32x32x3 to train, padded by 4, cropped and flipped; 10000 to test; 100 classes."""
    return find("cifar100")


def find(data_set: str, editions: Sequence[Edition] = EDITIONS) -> ImageData:
    """Return the first edition of a data set found in the folder $KCD_DATA, or in `./data` if KCD_DATA is not set.

    Raises:
        FileNotFoundError: No edition is there; names the files, the folder that was searched, and their source.
        ValueError, OSError: As `read`.
    """
    editions = [edition for edition in editions if edition.data_set == data_set]
    variable = os.environ.get("KCD_DATA")
    root = Path(variable or "data")
    for edition in editions:
        for name in (edition.folder, edition.archive):
            if (root / name).exists():
                return read(root / name, editions)
    archives = " or ".join(edition.archive for edition in editions)
    reason = "the folder in KCD_DATA" if variable else "KCD_DATA is not set"
    raise FileNotFoundError(
        f"{data_set} needs {archives} from {URL}, or the folder in it: not found in {root.resolve()} ({reason})"
    )


def read(path: Path, editions: Sequence[Edition] = EDITIONS) -> ImageData:
    """Return the data set in an archive or extracted folder.

    Args:
        path: The archive, under any file name, or the folder.
        editions: The supported editions, with their checksums.

    Raises:
        ValueError: `path` is none of the editions, differs from the published files, or cannot be decoded; names the
            file.
        OSError: A file is missing or cannot be read.
    """
    if path.is_dir():
        edition = _edition_of_folder(path, editions)
        if edition is None:
            raise ValueError(f"{path}: must be {' or '.join(edition.folder for edition in editions)}")
        return _assemble(edition, path, _read_folder(edition, path))
    with open_regular(path) as file:
        edition = _edition_of_archive(path, file, editions)
        return _assemble(edition, path, _read_archive(edition, path, file))


def is_extracted(path: Path) -> bool:
    """Return whether the folder comes from an archive."""
    return _edition_of_folder(path, EDITIONS) is not None


def _edition_of_folder(path: Path, editions: Sequence[Edition]) -> Edition | None:
    """Return the edition of a folder by its name, or by its image files.

    In a folder of images by class, one of these names is a folder or does not exist.
    """
    for edition in editions:
        files = (path / file.name for file in (edition.train[0], edition.test))
        if path.name == edition.folder or all(file.is_file() for file in files):
            return edition
    return None


def _edition_of_archive(path: Path, file: BinaryIO, editions: Sequence[Edition]) -> Edition:
    """Return the edition of an archive by its checksum, under any file name."""
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
                f"{path}: damaged or incomplete: its md5 is {md5}, must be {edition.md5}; "
                f"download it again from {URL}{edition.archive}"
            )
    known = ", ".join(edition.archive for edition in editions)
    raise ValueError(f"{path}: must be an .npz file or one of {known}; its md5, {md5}, is none of theirs")


def _read_folder(edition: Edition, path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every required file."""
    for file in (*edition.train, edition.test, edition.names):
        raw = read_regular(path / file.name)
        md5 = hashlib.md5(raw, usedforsecurity=False).hexdigest()
        if file.md5 not in (None, md5):
            raise ValueError(f"{path / file.name}: damaged or incomplete: its md5 is {md5}, must be {file.md5}")
        yield file.name, raw


def _read_archive(edition: Edition, path: Path, file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every file, in one pass over the archive."""
    try:
        with tarfile.open(fileobj=file, mode="r:gz") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                if folder == edition.folder and member.isfile():
                    yield name, archive.extractfile(member).read()
    except Exception as error:  # gzip, zlib and tarfile raise any exception for malformed bytes
        raise ValueError(f"{path}: damaged or incomplete: {one_line(error)}") from error


def _assemble(edition: Edition, path: Path, contents: Iterator[tuple[str, bytes]]) -> ImageData:
    """Return the data set from the contents of its files, in any order."""
    missing = {file.name: file for file in (*edition.train, edition.test, edition.names)}
    ends = np.cumsum([file.images for file in missing.values()]).tolist()
    rows = {file: slice(end - file.images, end) for file, end in zip(missing.values(), ends, strict=True)}
    images = np.empty((ends[-1], SIDE, SIDE, 3), dtype=np.uint8)
    labels = np.empty(ends[-1], dtype=np.int64)
    names: tuple[str, ...] = ()
    for name, raw in contents:
        file = missing.pop(name, None)  # None: not required
        try:
            if file is edition.names:
                names = _class_names(edition, raw)
            elif file is not None:
                pixels, labels[rows[file]] = _images(edition, file, raw)
                images[rows[file]] = pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from error
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} missing")
    train, test = (slice(0, rows[edition.test].start), rows[edition.test])
    data = ((images[part], labels[part]) for part in (train, test))
    return assemble(edition.data_set, *data, edition.classes, names, padding=4, flip=True)


def _images(edition: Edition, file: File, raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = edition.read_images(raw)
    if pixels.shape != (file.images, PIXELS) or labels.shape != (file.images,):
        raise ValueError(
            f"it must contain {file.images} images of {PIXELS} numbers and as many labels, "
            f"got {pixels.shape} and {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= edition.classes:
        raise ValueError(f"labels must be in [0, {edition.classes}), got {labels.min()} to {labels.max()}")
    return pixels, labels


def _class_names(edition: Edition, raw: bytes) -> tuple[str, ...]:
    names = edition.read_names(raw)
    if len(names) != edition.classes:
        raise ValueError(f"it must contain {edition.classes} class names, got {len(names)}")
    return names
