"""The cases to measure: shapes of logits with fractions of rows to keep, the extents of a run, and its sweeps."""

import math
from typing import NamedTuple

import torch

from .floors import Job, num_selected

KEEP = 0.7
DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}


class Shape(NamedTuple):
    """Shape and dtype of the logits, their labels, and the number of threads."""

    rows: int
    classes: int
    dtype: torch.dtype = torch.float32
    ignored: float | None = None
    """The fraction of labels that are ignored; None: no labels."""
    threads: int | None = None
    """On a CPU; None: the run's number."""

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Parse ROWSxCLASSES[:DTYPE][:labels=FRACTION].

        Raises:
            ValueError: `text` has another form.
        """
        size, *rest = text.split(":")
        sizes = size.split("x")
        if len(sizes) != 2 or not all(part.isdecimal() and int(part) > 0 for part in sizes):
            raise ValueError(f"a shape must be ROWSxCLASSES[:DTYPE][:labels=FRACTION], got {text!r}")
        shape = cls(*map(int, sizes))
        for part in rest:
            if part in DTYPES:
                shape = shape._replace(dtype=DTYPES[part])
            elif part.startswith("labels="):
                shape = shape._replace(ignored=fraction(part.removeprefix("labels=")))
            else:
                raise ValueError(f"{part!r} in {text!r} must be labels=FRACTION or one of {', '.join(DTYPES)}")
        return shape

    @property
    def dtype_name(self) -> str:
        """The dtype without the prefix "torch."."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def n_ignored(self) -> int:
        """Number of rows whose label is ignored."""
        return round((self.ignored or 0) * self.rows)

    def __str__(self) -> str:
        labels = "" if self.ignored is None else f":labels={self.ignored:g}"
        return f"{self.rows}x{self.classes}:{self.dtype_name}{labels}"


class Case(NamedTuple):
    """A shape, and the fraction of its rows to select."""

    shape: Shape
    keep: float = KEEP

    def __str__(self) -> str:
        return f"{self.shape}, keep {self.keep}"

    def job(self, *, backward: bool) -> Job:
        """Return the job whose floor is computed."""
        shape, valid = self.shape, self.shape.rows - self.shape.n_ignored
        k, labelled = num_selected(self.keep, valid), shape.ignored is not None
        return Job(shape.rows, shape.classes, shape.dtype.itemsize, valid, k, labelled, backward)


def fraction(text: str) -> float:
    """Parse a number in [0, 1).

    Raises:
        ValueError: `text` is anything else.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < 1:
        raise ValueError(f"the fraction of ignored labels must be in [0, 1), got {text}")
    return number


# ---- extents


class Extent(NamedTuple):
    """The defaults of a run."""

    shapes: tuple[Shape, ...]
    """Shapes of the main table."""
    memory: tuple[Shape, ...]
    """Shapes whose peak memory is measured."""
    seconds: float
    """Seconds per shape."""


FULL = Extent(
    (
        Shape(64, 100),
        Shape(256, 100),
        Shape(256, 1000),
        Shape(4096, 1000),
        Shape(4096, 1000, ignored=0.1),
        Shape(1024, 32_000),
        Shape(512, 128_256, torch.bfloat16),
    ),
    memory=(Shape(1024, 32_000),),
    seconds=4.0,
)
SHORT = Extent(
    (Shape(64, 100), Shape(256, 1000), Shape(4096, 1000), Shape(4096, 1000, ignored=0.1)), memory=(), seconds=1.0
)


# ---- sweeps: name -> function from the number of threads to the cases

_BASE = Shape(4096, 1000)
_LOGITS, _MOST_ROWS = 2**22, 2**16


def _classes(_: int) -> list[Case]:
    """Return shapes with the same number of logits, as far as `_MOST_ROWS` allows."""
    return [Case(Shape(min(_MOST_ROWS, _LOGITS // n), n)) for n in (10, *(4**i for i in range(3, 10)))]


def _threads(most: int) -> list[Case]:
    """Return one case for each power of two, and one for all threads."""
    powers = [2**i for i in range(most.bit_length()) if 2**i < most]
    return [Case(_BASE._replace(threads=n)) for n in (*powers, most)]


SWEEPS = {
    "rows": lambda _: [Case(Shape(rows, 1000)) for rows in (1, 8, 64, 512, 4096, 16384)],
    "classes": _classes,
    "dtype": lambda _: [Case(_BASE._replace(dtype=dtype)) for dtype in DTYPES.values()],
    "keep": lambda _: [Case(_BASE, keep) for keep in (1.0, 0.7, 0.2)],
    "threads": _threads,
}
