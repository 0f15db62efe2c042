"""Kinds of records: how the rows of a record become bytes, and back. A new kind is a class and a line in `KINDS`."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks import check_choice


class Storage(NamedTuple):
    """The storage of a number: the dtype in torch, and the integers that hold its bits in NumPy, which lacks bfloat16."""

    dtype: torch.dtype
    bits: np.dtype


DTYPES: Mapping[str, Storage] = {
    "float16": Storage(torch.float16, np.dtype("<i2")),
    "bfloat16": Storage(torch.bfloat16, np.dtype("<i2")),
    "float32": Storage(torch.float32, np.dtype("<i4")),
}


class RowError(ValueError):
    """The error of a row that cannot be stored. `row` is its number."""

    def __init__(self, row: int, message: str):
        super().__init__(message)
        self.row = row


class Dense:
    """The logits of all classes.

    Args:
        classes: V, the number of classes.
        dtype: A key of `DTYPES`.

    Attributes:
        row_size: The bytes of a row.
    """

    def __init__(self, classes: int, dtype: str):
        self.classes = classes
        self.name = check_choice("dtype", dtype, DTYPES)
        self.storage = DTYPES[dtype]
        self.row_size = classes * self.storage.bits.itemsize

    def encode(self, logits: Tensor) -> np.ndarray:
        """Return the bytes of rows: (n, V) of any floating-point dtype on the CPU -> uint8 (n, row_size).

        Raises:
            RowError: A logit is NaN or +inf, or a finite one is too large for the dtype.
        """
        stored = logits.to(self.storage.dtype)
        valid = (logits < torch.inf) & (stored.isinf() == logits.isinf())
        if not valid.all():
            row, column = (~valid).nonzero()[0].tolist()
            largest = torch.finfo(self.storage.dtype).max
            takes = f"at most {largest:.6g} in size for dtype {self.name!r}, or -inf for a masked class"
            raise RowError(row, f"logits must be {takes}, got {logits[row, column].item()}")
        integers = torch.int16 if self.storage.bits.itemsize == 2 else torch.int32
        return stored.contiguous().view(integers).numpy().astype(self.storage.bits, copy=False).view(np.uint8)

    def decode(self, data: np.ndarray) -> Tensor:
        """Return rows from their bytes: uint8 (n, row_size) -> (n, V), a copy."""
        native = np.ascontiguousarray(data).view(self.storage.bits).astype(self.storage.bits.newbyteorder("="))
        return torch.from_numpy(native).view(self.storage.dtype)


KINDS = {"dense": Dense}
