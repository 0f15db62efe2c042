"""What a data set stores of its samples: labels, arrays, file names and sizes. It identifies the data without loading the items."""

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data import ImageFiles, IndexedDataset
from ..data.images import LabelledImages
from .fingerprint import DIGESTED_FILES, digest

PLAIN = (str, bytes, bool, int, float, complex, np.generic, Path)
CONTAINERS = (list, tuple)


def digests_of_stored(dataset: IndexedDataset | LabelledImages) -> dict[str, str]:
    """Return a digest of each thing that a data set stores for its samples, by the name of its attribute.

    These are arrays and tensors whose first dimension is the samples', and sequences and tables with an entry for each sample, of
    numbers, strings, arrays or tuples of these; in the data set and in those that it wraps. Everything else is left out, such
    as transforms and dictionaries. The path of a file stands for its name and size, wherever it is. Of a memory-mapped array 64
    rows are read. Of images on disk the names and sizes of the files are taken.
    """
    if isinstance(dataset, ImageFiles):
        return {"files": _digest_of_list([dataset.files.stamp(index) for index in range(len(dataset))])}
    if isinstance(dataset, LabelledImages):
        return {}  # their digest covers every pixel
    return dict(_stored("dataset", dataset.dataset, len(dataset), set()))


def differing_part(there: object, own: Mapping[str, str]) -> str | None:
    """Return the name of the first thing with another digest; None if all that both have agree."""
    there = there if isinstance(there, Mapping) else {}
    return next((name for name in own if there.get(name, own[name]) != own[name]), None)


def _stored(name: str, value: object, count: int, seen: set[int]) -> Iterator[tuple[str, str]]:
    """Yield the name and digest of all that `value` stores of `count` samples."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor | np.ndarray) or hasattr(value, "to_numpy"):
        if _length(value) == count and (found := _digest_of_array(value)):
            yield name, found
    elif isinstance(value, CONTAINERS) and len(value) == count:
        if found := _digest_of_list(value):
            yield name, found
    elif isinstance(value, CONTAINERS):  # such as the data sets of a ConcatDataset, or the tensors of a TensorDataset
        for position, part in enumerate(value):
            if not isinstance(part, CONTAINERS):
                yield from _stored(f"{name}[{position}]", part, count, seen)
    elif hasattr(value, "__dict__") and hasattr(value, "__getitem__") and (length := _length(value)) is not None:
        for attribute, part in sorted(vars(value).items()):
            yield from _stored(f"{name}.{attribute}", part, length, seen)


def _length(value: object) -> int | None:
    try:
        return len(value)
    except Exception:  # of a class of the user's, or an array without dimensions
        return None


def _digest_of_array(value: object) -> str | None:
    """Return the digest of a tensor, an array or a table of pandas or polars."""
    try:
        if isinstance(value, Tensor):
            return digest({"": value})
        array = value if isinstance(value, np.ndarray) else np.asarray(value.to_numpy())
    except Exception:  # a sparse tensor, or a table that has no numbers and strings
        return None
    if array.dtype.kind in "OSU":
        return _digest_of_list(array.tolist())
    if isinstance(array, np.memmap):
        array = array[np.unique(np.linspace(0, len(array) - 1, DIGESTED_FILES).astype(int))]
    heading = f"{array.dtype.str} {array.shape}".encode()
    return hashlib.sha256(heading + np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def _digest_of_list(values: list | tuple) -> str | None:
    """Return the digest of nested lists of plain values and arrays; None if anything else is among them."""
    sha = hashlib.sha256()
    try:
        for value in values:
            sha.update(_encoded(value))
    except TypeError:  # perhaps entries that are filled in as items are loaded
        return None
    return sha.hexdigest()[:16]


def _encoded(value: object) -> bytes:
    """Return bytes that identify a value. Raises TypeError for one that is neither plain nor a container of such."""
    if isinstance(value, CONTAINERS):
        return b"(" + b",".join(map(_encoded, value)) + b")"
    if isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind not in "OSU"):
        return digest({"": torch.as_tensor(value)}).encode()
    if not isinstance(value, PLAIN):
        raise TypeError(f"{type(value).__name__} has no digest")
    if isinstance(value, str | Path):
        path = os.fspath(value)
        return repr(_name_and_size(path) if os.sep in path else path).encode()  # a bare word is rarely a file
    return repr(value.item() if isinstance(value, np.generic) else value).encode()


def _name_and_size(path: str) -> tuple[str, int] | str:
    """Return the name and size of a regular file; of anything else the path."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return path
    return (os.path.basename(path), found.st_size) if stat.S_ISREG(found.st_mode) else path
