"""Where the candidates are measured: shapes of the logits, fractions of rows to keep, directions; what a run measures of them."""

from typing import NamedTuple

import torch

from .floors import Job, selected

KEEP = 0.7
DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}


class Shape(NamedTuple):
    """What the logits are, and how many threads work on them."""

    rows: int
    classes: int
    dtype: torch.dtype = torch.float32
    ignored: float | None = None
    """There are labels, of which this fraction is ignored; None: no labels."""
    threads: int | None = None
    """On a CPU, in place of the run's number."""

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Of ROWSxCLASSES[:DTYPE][:labels=FRACTION].

        Raises:
            ValueError: it is something else.
        """
        size, *rest = text.split(":")
        sizes = size.split("x")
        if len(sizes) != 2 or not all(part.isdecimal() and int(part) > 0 for part in sizes):
            raise ValueError(f"a shape is ROWSxCLASSES[:DTYPE][:labels=FRACTION], got {text!r}")
        shape = cls(*map(int, sizes))
        for part in rest:
            if part in DTYPES:
                shape = shape._replace(dtype=DTYPES[part])
            elif part.startswith("labels="):
                shape = shape._replace(ignored=fraction(part.removeprefix("labels=")))
            else:
                raise ValueError(f"{part!r} in the shape {text!r} is none of {', '.join(DTYPES)}, labels=FRACTION")
        return shape

    @property
    def dtype_name(self) -> str:
        """Without torch's name before it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def n_ignored(self) -> int:
        """Rows whose label is ignored."""
        return round((self.ignored or 0) * self.rows)

    def __str__(self) -> str:
        labels = "" if self.ignored is None else f":labels={self.ignored:g}"
        return f"{self.rows}x{self.classes}:{self.dtype_name}{labels}"


class Place(NamedTuple):
    """A shape, and the fraction of its rows that is selected."""

    shape: Shape
    keep: float = KEEP

    def __str__(self) -> str:
        return f"{self.shape}, keep {self.keep}"

    def job(self, *, backward: bool) -> Job:
        """For the floor."""
        shape, valid = self.shape, self.shape.rows - self.shape.n_ignored
        k, labelled = selected(self.keep, valid), shape.ignored is not None
        return Job(shape.rows, shape.classes, shape.dtype.itemsize, valid, k, labelled, backward)


def fraction(text: str) -> float:
    """A number in [0, 1).

    Raises:
        ValueError: it is something else.
    """
    number = float(text)
    if not 0 <= number < 1:
        raise ValueError(f"the fraction of labels that are ignored must lie in [0, 1), got {text}")
    return number


# ---- extents


class Extent(NamedTuple):
    """What is measured unless something else is asked for."""

    shapes: tuple[Shape, ...]
    """Of the main table."""
    memory: tuple[Shape, ...]
    seconds: float
    """At each shape."""


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


# ---- sweeps: name -> places, given how many threads there are

_BASE = Shape(4096, 1000)
_LOGITS, _MOST_ROWS = 2**22, 2**16


def _classes(_: int) -> list[Place]:
    """At one number of logits, as far as that does not take too many rows."""
    return [Place(Shape(min(_MOST_ROWS, _LOGITS // n), n)) for n in (10, *(4**i for i in range(3, 10)))]


def _threads(most: int) -> list[Place]:
    """Powers of two, and all."""
    powers = [2**i for i in range(most.bit_length()) if 2**i < most]
    return [Place(_BASE._replace(threads=n)) for n in (*powers, most)]


SWEEPS = {
    "rows": lambda _: [Place(Shape(rows, 1000)) for rows in (1, 8, 64, 512, 4096, 16384)],
    "classes": _classes,
    "dtype": lambda _: [Place(_BASE._replace(dtype=dtype)) for dtype in DTYPES.values()],
    "keep": lambda _: [Place(_BASE, keep) for keep in (1.0, 0.7, 0.2)],
    "threads": _threads,
}
