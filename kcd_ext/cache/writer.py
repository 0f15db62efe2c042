"""`TeacherCacheWriter`: appends records to a cache."""

import os
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from ..checks import check_int
from ..describe import describe
from . import entropies
from .kinds import RowError
from .reader import TeacherCache
from .shards import ENTRY, SINGLE, Header, Shard, write_header

BUFFER_SIZE, BUFFER_SECONDS = 4 * 2**20, 10  # records are written once they are this many bytes, or this old


class TeacherCacheWriter:
    """A writer of a teacher cache. Use it as a context manager.

    It continues the cache in a folder, if there is one with the same header. Records are written in blocks of 4 MiB, every
    ten seconds, with `flush` and at the end. A writer that is killed loses at most those that are not written yet. Several
    writers, also in several processes, may write to one cache at the same time.

    Args:
        path: The cache's folder; it is created if it does not exist.
        kind: What a record holds: "dense", the logits of all classes.
        classes: V, the number of classes.
        dtype: The dtype of the stored logits: float16, bfloat16 or float32.
        temperature: The temperature at which the teacher's entropy is stored, > 0.
        about: JSON that describes what the cache is made of, such as digests of teacher and data. It is part of the header.

    Raises:
        TypeError, ValueError: An argument has the wrong type or is out of range, `path` holds a cache with another header (the
            message names the first difference), or a file of that cache is damaged.
        OSError: A file cannot be read or written.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        kind: str = "dense",
        classes: int,
        dtype: str = "float16",
        temperature: float = 1.0,
        about: Mapping[str, object] | None = None,
    ):
        self.path = Path(path)
        self.header = Header(kind, classes, dtype, temperature, about or {})
        self._codec = self.header.codec()
        write_header(self.path, self.header)
        self._earlier = TeacherCache(self.path)
        self._own: dict[int, tuple[int, int, int]] = {}  # id -> size, rows and checksum
        self._records: list[bytes] = []
        self._entries: list[tuple[int, ...]] = []
        self._buffered, self._flushed = 0, time.monotonic()
        self._shard: Shard | None = None
        self._closed = False

    def __contains__(self, sample_id: int) -> bool:
        """Return whether the cache has a record of this sample; of other writers, those from before this one was made."""
        return sample_id in self._own or sample_id in self._earlier

    def __enter__(self) -> "TeacherCacheWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, sample_id: int, logits: Tensor) -> None:
        """Add the record of a sample.

        Args:
            sample_id: An integer >= 0.
            logits: The teacher's, (V,) or (length, V) with length >= 1, of any floating-point dtype, on any device. -inf
                masks a class.

        Raises:
            TypeError, ValueError: An argument does not fit, a logit is NaN, +inf or too large for the dtype, or the sample has
                another record already. The same record again is ignored.
            OSError: The records cannot be written. Earlier ones are intact.
        """
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise TypeError(f"logits must be a floating-point tensor, got {describe(logits)}")
        self.write_batch([sample_id], logits[None])

    def write_batch(self, sample_ids: Sequence[int] | Tensor, logits: Tensor) -> None:
        """Add the records of b samples: (b, V) or (b, length, V). Otherwise as `write`."""
        if self._closed:
            raise ValueError(f"{self.path}: this writer is closed")
        if isinstance(sample_ids, Tensor):
            sample_ids = sample_ids.tolist()
        ids = [check_int("sample_id", number, 0) for number in sample_ids]
        classes = self.header.classes
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise TypeError(f"logits must be a floating-point tensor, got {describe(logits)}")
        if (
            logits.dim() not in (2, 3)
            or len(logits) != len(ids)
            or logits.shape[-1] != classes
            or 0 in logits.shape[1:]
        ):
            raise ValueError(
                f"logits must have shape ({classes},) or (length, {classes}), got {tuple(logits.shape[1:])}"
            )
        if not ids:
            return
        rows = SINGLE if logits.dim() == 2 else logits.shape[1]
        flat = logits.detach().cpu().reshape(-1, classes)
        try:
            encoded = self._codec.encode(flat).reshape(len(ids), -1)
        except RowError as error:
            raise ValueError(f"sample {ids[error.row // abs(rows)]}: {error}") from None
        codes = entropies.encode(flat, self.header.temperature).reshape(len(ids), -1)
        for sample_id, record in zip(ids, np.concatenate((encoded, codes), 1), strict=True):
            self._add(sample_id, rows, record.tobytes())

    def _add(self, sample_id: int, rows: int, record: bytes) -> None:
        description = (len(record), rows, zlib.crc32(record))
        known = self._own.get(sample_id) or (self._earlier.describe(sample_id) if sample_id in self._earlier else None)
        if known is not None:
            if known != description:
                raise ValueError(f"{self.path} already has another record of sample {sample_id}")
            return
        self._own[sample_id] = description
        self._records.append(record)
        self._entries.append((sample_id, 0, *description, 0))
        self._buffered += len(record)
        if self._buffered >= BUFFER_SIZE or time.monotonic() - self._flushed > BUFFER_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the records added so far to the disk. Raises OSError if that fails; earlier records are intact."""
        records, entries = self._records, np.array(self._entries, ENTRY)
        self._records, self._entries, self._buffered, self._flushed = [], [], 0, time.monotonic()
        if not records:
            return
        try:
            self._shard = self._shard or Shard(self.path)
            self._shard.append(records, entries)
        except OSError:
            self._closed = True  # what follows a half-written record has no known offset
            raise

    def close(self) -> None:
        """Write the remaining records and close the files. Raises OSError as `flush` does."""
        try:
            if not self._closed:
                self.flush()
        finally:
            self._closed = True
            if self._shard is not None:
                self._shard.close()
