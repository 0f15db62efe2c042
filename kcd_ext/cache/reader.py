"""`TeacherCache`: reads a cache, in any order and from any number of processes."""

import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..checks import check_int, is_int
from ..describe import brief
from . import entropies
from .shards import ENTRY, HEADER, SINGLE, damage, data_file, index_file, read_header, read_index, shard_numbers


class TeacherCache:
    """A teacher cache: a read-only mapping from sample ids to the teacher's logits.

    `cache[sample_id]` is a tensor (V,) or (length, V) in the stored dtype, as it was written. Files are memory-mapped. The
    header and the lengths of all files are checked when the cache is opened, a record when it is first read, or all by `verify`. A
    cache can be sent to other processes; it shows the records that were complete when it was opened.

    Args:
        path: The cache's folder.

    Raises:
        ValueError: The folder holds no cache, a file is damaged, two writers gave a sample different records, or another
            version wrote the cache. The message names the file. When a record is read: its checksum does not match.
        OSError: A file cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.header = read_header(self.path)
        self._codec = self.header.codec()
        numbers = shard_numbers(self.path)
        found = [read_index(self.path, number) for number in numbers]
        entries = np.concatenate(found) if found else np.empty(0, ENTRY)
        shards = np.repeat(np.array(numbers, np.int64), [len(part) for part in found])
        misfits = np.flatnonzero(entries["size"] != abs(entries["rows"]) * (self._codec.row_size + 1))  # 1: the entropy
        if len(misfits):
            raise ValueError(
                f"{self.path / HEADER} does not fit the record of sample {entries['id'][misfits[0]]}: its classes or dtype are "
                "not those of the cache"
            )
        order = entries["id"].argsort(kind="stable")
        entries, shards = entries[order], shards[order]
        repeated = np.flatnonzero(entries["id"][1:] == entries["id"][:-1])
        for position in repeated.tolist():
            one, other = entries[position], entries[position + 1]
            if any(one[name] != other[name] for name in ("size", "rows", "crc")):
                files = sorted({index_file(self.path, int(shards[p])).name for p in (position, position + 1)})
                raise ValueError(f"{self.path} has different records of sample {one['id']}, in {' and '.join(files)}")
        first = np.delete(np.arange(len(entries)), repeated + 1)
        self._entries, self._shards = entries[first], shards[first]
        self._verified = np.zeros(len(self._entries), bool)
        self._maps: dict[int, np.ndarray] = {}

    def __reduce__(self):
        return type(self), (self.path,)

    @property
    def about(self) -> Mapping[str, object]:
        """What the cache is made of, as its writer described it."""
        return self.header.about

    @property
    def classes(self) -> int:
        """V, the number of classes."""
        return self.header.classes

    @property
    def ids(self) -> np.ndarray:
        """The sample ids, ascending, int64 (n,)."""
        return self._entries["id"]

    @property
    def lengths(self) -> np.ndarray:
        """The length of each sample's record, in the order of `ids`, int64 (n,); -1 for a record (V,)."""
        return self._entries["rows"]

    @property
    def digest(self) -> str:
        """A digest of the header and of all records' checksums: 16 hexadecimal digits."""
        sha = sha256(repr(self.header).encode())
        for name in ("id", "size", "rows", "crc"):
            sha.update(np.ascontiguousarray(self._entries[name]))
        return sha.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids.tolist())

    def __contains__(self, sample_id: object) -> bool:
        if not is_int(sample_id):
            return False
        position = int(np.searchsorted(self.ids, sample_id))
        return position < len(self) and int(self.ids[position]) == sample_id

    def __getitem__(self, sample_id: int) -> Tensor:
        """Return a sample's logits. Raises KeyError if the cache has none."""
        (position,) = self._positions([sample_id])
        logits = self._codec.decode(self._rows_of(position))
        return logits[0] if self.lengths[position] == SINGLE else logits

    def batch(self, ids: Sequence[int] | Tensor, lengths: Sequence[int] | Tensor | None = None) -> Tensor:
        """Return the logits of several samples, in the stored dtype.

        Args:
            ids: b sample ids, in any order, also repeatedly.
            lengths: The number of leading rows to take of each sample, >= 0, at most what is stored. None: all rows.

        Returns:
            (b, V) for records (V,); otherwise (b, L, V), where L is the greatest length. Rows beyond a sample's length are 0.

        Raises:
            KeyError: A sample has no record.
            ValueError: The samples' records differ in their dimensions, or a length is out of range.
        """
        parts = self._leading(ids, lengths, self._codec.decode, self._rows_of)
        return pad_sequence(parts, batch_first=True) if parts[0].dim() == 2 else torch.stack(parts)

    def entropy(self, ids: Sequence[int] | Tensor, lengths: Sequence[int] | Tensor | None = None) -> Tensor:
        """Return the teacher's entropies in nats, float32, at the header's temperature, to within log(V) / 510.

        Args:
            ids: As for `batch`.
            lengths: As for `batch`.

        Returns:
            (b,) or (b, L), padded with 0. Raises as `batch` does.
        """

        def decode(codes: np.ndarray) -> Tensor:
            return entropies.decode(codes, self.classes)

        parts = self._leading(ids, lengths, decode, self._entropies_of)
        return pad_sequence(parts, batch_first=True) if parts[0].dim() == 1 else torch.stack(parts)

    def rows(self, ids: np.ndarray, row: int = 0) -> Tensor:
        """Return one row of each record, (b, V) in the stored dtype: gathered at once, for training loops.

        Args:
            ids: int64 (b,), sample ids.
            row: The row of each record, counted from 0.

        Raises:
            KeyError: A sample has no record.
            IndexError: A record has no such row.
        """
        positions = self._positions(ids)
        entries, shards = self._entries[positions], self._shards[positions]
        if len(entries) and not 0 <= row < (fewest := int(abs(entries["rows"]).min())):
            raise IndexError(f"row must be in [0, {fewest}), got {row}")
        for position in positions[~self._verified[positions]].tolist():
            self._record(position)
        start, size = entries["offset"] + row * self._codec.row_size, self._codec.row_size
        gathered = np.empty((len(entries), size), np.uint8)
        for shard in np.unique(shards).tolist():
            chosen = shards == shard
            gathered[chosen] = _windows(self._map(shard), size)[start[chosen]]
        return self._codec.decode(gathered)

    def describe(self, sample_id: int) -> tuple[int, int, int]:
        """Return the size, the length and the checksum of a sample's record. Raises KeyError if there is none."""
        (position,) = self._positions([sample_id])
        return tuple(int(self._entries[position][name]) for name in ("size", "rows", "crc"))

    def verify(self) -> None:
        """Read all records that have not been read, in the order of the files, and compare them with their checksums.

        Raises:
            ValueError: A record is damaged; names the file, the sample and the remedy.
        """
        order = np.lexsort((self._entries["offset"], self._shards))
        for position in order[~self._verified[order]].tolist():
            self._record(position)

    # --- records ---

    def _positions(self, ids: Sequence[int] | Tensor | np.ndarray) -> np.ndarray:
        ids = np.asarray(ids)
        if ids.size and not np.issubdtype(ids.dtype, np.integer):
            raise TypeError(f"ids must be integers, got {ids.dtype}")
        positions = np.searchsorted(self.ids, ids)
        if len(self):
            missing = self.ids[positions.clip(max=len(self) - 1)] != ids
        else:
            missing = np.ones(ids.shape, bool)
        if missing.any():
            raise KeyError(f"{self.path} has no record of sample {ids[missing][0]}")
        return positions

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(data_file(self.path, shard), np.uint8, "r")
        return self._maps[shard]

    def _record(self, position: int) -> np.ndarray:
        """Return the bytes of a record. Checks them against their checksum at the first time."""
        entry, shard = self._entries[position], int(self._shards[position])
        record = self._map(shard)[entry["offset"] : entry["offset"] + entry["size"]]
        if not self._verified[position]:
            if zlib.crc32(record) != entry["crc"]:
                file = data_file(self.path, shard)
                raise damage(self.path, shard, file, f"the record of sample {entry['id']} does not match its checksum")
            self._verified[position] = True
        return record

    def _rows_of(self, position: int) -> np.ndarray:
        """Return the encoded rows of a record, uint8 (length, row size)."""
        length = abs(int(self.lengths[position]))
        return self._record(position)[: length * self._codec.row_size].reshape(length, -1)

    def _entropies_of(self, position: int) -> np.ndarray:
        """Return the encoded entropies of a record's rows, uint8 (length,)."""
        return self._record(position)[-abs(int(self.lengths[position])) :]

    def _leading(
        self,
        ids: Sequence,
        lengths: Sequence | None,
        decode: Callable[[np.ndarray], Tensor],
        encoded: Callable[[int], np.ndarray],
    ) -> list[Tensor]:
        """Return the leading rows of each sample, decoded; without the dimension for the length if records have none."""
        positions = self._positions(ids)
        if not len(positions):
            raise ValueError("ids must have at least one sample, got none")
        stored = self.lengths[positions]
        single = stored == SINGLE
        if single.any() and not single.all():
            raise ValueError(f"records must all be (V,) or all (length, V), got both in {self.path}")
        if lengths is None:
            lengths = abs(stored)
        elif single.any():
            raise ValueError(f"lengths must be None for records without a length, got {brief(lengths)}")
        lengths = np.asarray(lengths).tolist()
        if len(lengths) != len(positions):
            raise ValueError(f"lengths must be {len(positions)} numbers, one per id, got {len(lengths)}")
        parts = []
        for position, length, limit in zip(positions.tolist(), lengths, abs(stored).tolist(), strict=True):
            check_int("lengths", length, 0, limit)
            parts.append(decode(encoded(position)[:length]))
        return [part[0] for part in parts] if single.any() else parts


def _windows(data: np.ndarray, size: int) -> np.ndarray:
    """Return all windows of `size` bytes, by their start: a view, which copies nothing."""
    return np.lib.stride_tricks.sliding_window_view(data, size)
