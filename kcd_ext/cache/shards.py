"""Shards: the files that hold the records of one writer.

A shard is a data file, to which records are appended, and an index, to which an entry is appended once its record is on the
disk. A writer that is killed leaves a record without an entry, or a part of an entry; readers ignore both.
"""

import json
import math
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from uuid import uuid4

import numpy as np

from ..checks import check_choice, check_int, check_positive
from ..describe import brief
from ..files import json_bytes, read_json, read_regular
from .kinds import KINDS

FORMAT = 1
HEADER = "cache.json"
ALIGNMENT = 8  # bytes; rows can then be read in place
# One record. `rows` is -1 for a record of one row without a dimension for the length. `crc` is the CRC-32 of the record's bytes,
# `check` that of the entry's bytes before it.
ENTRY = np.dtype([("id", "<i8"), ("offset", "<i8"), ("size", "<i8"), ("rows", "<i8"), ("crc", "<u4"), ("check", "<u4")])
CHECKED = ENTRY.itemsize - 4
SINGLE = -1  # `rows` of a record without a dimension for the length


@dataclass(frozen=True)
class Header:
    """What a cache is made of. All writers of a cache have the same header.

    Raises:
        TypeError, ValueError: A field has the wrong type or is out of range.
    """

    kind: str
    classes: int
    dtype: str
    temperature: float = 1.0
    about: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        check_int("classes", self.classes, 1, 2**31 - 1)
        object.__setattr__(self, "temperature", check_positive("temperature", self.temperature))
        if not isinstance(self.about, Mapping):
            raise TypeError(f"about must be a mapping, got {type(self.about).__name__}")
        object.__setattr__(self, "about", json.loads(json_bytes(self.about)))  # as readers will see it
        self.codec()

    def codec(self):
        """Return the kind's encoder and decoder. Raises ValueError for a dtype that the kind does not store."""
        return KINDS[self.kind](self.classes, self.dtype)

    def as_json(self) -> dict[str, object]:
        """Return the content of the header's file."""
        content = {"format": FORMAT, **asdict(self), "about": dict(self.about)}
        return content | {"checks": {name: _checksum(value) for name, value in _checked(content).items()}}


def _checked(content: Mapping[str, object]) -> dict[str, object]:
    """Return the values in a header's file that have a checksum, by name: each field, and each entry of `about`."""
    fields = {name: value for name, value in content.items() if name not in ("about", "checks")}
    about = content["about"]
    return fields | (
        {f"about.{name}": about[name] for name in about} if isinstance(about, Mapping) else {"about": about}
    )


def _checksum(value: object) -> int:
    """Return the CRC-32 of a value as JSON in ASCII, without spaces, keys sorted."""
    return zlib.crc32(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def read_header(path: Path) -> Header:
    """Return the header of the cache in a folder.

    Raises:
        ValueError: The folder holds no cache, the header is damaged, or another version wrote it.
        OSError: The header cannot be read.
    """
    file = path / HEADER
    if not file.exists() and not file.is_symlink():
        raise ValueError(f"{path} is not a teacher cache: it has no {HEADER}")

    def parse(content: dict) -> Header | str:
        written, kind = content.pop("format"), content["kind"]
        if written != FORMAT:
            return f"of format {brief(written)}, and this version of kcd_ext reads format {FORMAT}"
        if kind not in KINDS:
            return f"of kind {brief(kind)}, and this version of kcd_ext reads {', '.join(KINDS)}"
        values, checks = _checked({"format": written, **content}), content.pop("checks")
        for name in {**values, **checks}:
            if checks.get(name) != _checksum(values.get(name)):
                got = f"{name}={brief(values[name])}" if name in values else f"it has no {name}, which"
                raise ValueError(f"{got} does not match its checksum; restore it, or make the cache in another folder")
        return Header(**content)

    header = read_json(file, parse)
    if isinstance(header, str):
        raise ValueError(f"{path} is a teacher cache {header}")
    return header


def write_header(path: Path, header: Header) -> None:
    """Write the header of a cache unless the folder has one.

    Raises:
        ValueError: The folder has another header; names the first difference.
        OSError: The header cannot be written.
    """
    path.mkdir(parents=True, exist_ok=True)
    if not (path / HEADER).exists():
        # A link fails if another writer was first, and its target is complete from the start.
        temporary = path / f".{HEADER}.{uuid4().hex}"
        try:
            with open(temporary, "xb") as file:
                file.write(json_bytes(header.as_json()))
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, path / HEADER)
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                os.rename(temporary, path / HEADER)
        finally:
            temporary.unlink(missing_ok=True)
    found = first_difference("", read_header(path).as_json(), header.as_json())
    if found:
        name, there, here = found
        name = name.removeprefix("about.")
        raise ValueError(f"{path} was made with {name}={brief(there)}, got {name}={brief(here)}: choose another folder")


def first_difference(name: str, there: object, here: object) -> tuple[str, object, object] | None:
    """Return the path at which two JSON values first differ, and both values; None if they are equal."""
    if there == here:
        return None
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        parts = [(f"{name}.{key}" if name else key, there.get(key), here.get(key)) for key in {**there, **here}]
        return next((found for part in parts if (found := first_difference(*part))), (name, there, here))
    return name, there, here


def shard_numbers(path: Path, suffix: str = ".index") -> list[int]:
    """Return the numbers of the shards in a folder that have a file with this suffix, ascending."""
    numbers = [file.stem.removeprefix("shard-") for file in path.glob(f"shard-*{suffix}")]
    return sorted(int(number) for number in numbers if number.isdecimal())


def data_file(path: Path, number: int) -> Path:
    """Return the path of a shard's data."""
    return path / f"shard-{number:04d}.data"


def index_file(path: Path, number: int) -> Path:
    """Return the path of a shard's index."""
    return path / f"shard-{number:04d}.index"


def damage(path: Path, number: int, file: Path, reason: str) -> ValueError:
    """Return the error of a damaged file of a shard, with its remedy."""
    both = " and ".join(file_of(path, number).name for file_of in (data_file, index_file))
    return ValueError(f"{file} is damaged: {reason}; remove {both}, and run the command that made the cache again")


def entries_as_bytes(entries: np.ndarray) -> bytes:
    """Return entries with their checks set."""
    raw = bytearray(entries.tobytes())
    for start in range(0, len(raw), ENTRY.itemsize):
        raw[start + CHECKED : start + ENTRY.itemsize] = zlib.crc32(raw[start : start + CHECKED]).to_bytes(4, "little")
    return bytes(raw)


def read_index(path: Path, number: int) -> np.ndarray:
    """Return the entries of a shard's complete records.

    Entries that a killed writer left half-written at the end are ignored.

    Raises:
        ValueError: The index is damaged, or the data are shorter than it says; names the file.
        OSError: A file cannot be read.
    """
    index, data = index_file(path, number), data_file(path, number)
    raw = read_regular(index)
    view = memoryview(raw)
    complete = [
        zlib.crc32(view[start : start + CHECKED])
        == int.from_bytes(view[start + CHECKED : start + ENTRY.itemsize], "little")
        for start in range(0, len(raw) - ENTRY.itemsize + 1, ENTRY.itemsize)
    ]
    while complete and not complete[-1]:
        complete.pop()
    if not all(complete):
        raise damage(path, number, index, f"entry {complete.index(False)} does not match its checksum")
    entries = np.frombuffer(raw, ENTRY, len(complete))
    needed = int((entries["offset"] + entries["size"]).max(initial=0))
    if needed and (size := data.stat().st_size if data.exists() else 0) < needed:
        raise damage(path, number, data, f"it has {size} bytes, its index needs {needed}")
    return entries


class Shard:
    """A new shard of a cache, for one writer.

    Args:
        path: The cache's folder.
    """

    def __init__(self, path: Path):
        number = max(shard_numbers(path, ".data"), default=-1) + 1
        while True:
            try:
                self._data = open(data_file(path, number), "xb")
                break
            except FileExistsError:  # another writer has just taken this number
                number += 1
        self._index = open(index_file(path, number), "xb")
        self.size = 0

    def append(self, records: list[bytes], entries: np.ndarray) -> None:
        """Append records, then their entries. The offsets of the entries are set here.

        Raises:
            OSError: A file cannot be written. Earlier records are intact; the shard cannot be used any more.
        """
        for number, record in enumerate(records):
            entries[number]["offset"] = self.size
            self.size += math.ceil(len(record) / ALIGNMENT) * ALIGNMENT
        padded = b"".join(record.ljust(math.ceil(len(record) / ALIGNMENT) * ALIGNMENT, b"\0") for record in records)
        for file, content in ((self._data, padded), (self._index, entries_as_bytes(entries))):
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:  # the error of a full disk carries no file name
                raise OSError(error.errno, error.strerror, file.name) from error

    def close(self) -> None:
        """Close the files."""
        for file in (self._data, self._index):
            with suppress(OSError):  # of a failed write, reported by `append`
                file.close()
