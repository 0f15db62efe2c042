"""The options of `load` for files and folders, and the memory that images may take."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import nextafter

from .. import processes
from ..checks import SMALLEST_FLOAT, check_choice, check_float, check_int, is_int
from ..describe import describe
from ..environment import available_memory
from .resizing import RESIZES

UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
BYTES = re.compile(r"([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
TAKES_BYTES = "a number of bytes >= 0, such as 500MB, 4GB or 4GiB"
SHARE_OF_MEMORY = 4  # images and their mixed copy then take half of what is available


@dataclass(frozen=True)
class Reading:
    """How the images of a file or folder are read: options of `load`, checked on construction.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range, or has no effect.
    """

    size: int | None = None
    resize: str | None = None
    val_fraction: float | None = None
    test_fraction: float | None = None
    memory: int | str | None = None
    image_column: str | None = None
    label_column: str | None = None
    normalisation: tuple | None = None
    """Mean and std that will replace the images' own, which then need not be computed."""
    progress: Callable[..., AbstractContextManager] | None = None

    def __post_init__(self) -> None:
        if self.size is not None:
            check_int("size", self.size, 1)
        if self.resize is not None:
            check_choice("resize", self.resize, RESIZES)
            if self.size is None:
                raise ValueError(f"resize={self.resize!r} has no effect without size (--size)")
        for name in ("val_fraction", "test_fraction"):
            if (fraction := getattr(self, name)) is not None:
                check_float(name, fraction, "a number in (0, 1)", SMALLEST_FLOAT, nextafter(1, 0))
        if self.memory is not None:
            parse_bytes("memory", self.memory)
        for name in ("image_column", "label_column"):
            if not isinstance(getattr(self, name), str | None):
                raise TypeError(f"{name} must be the name of a column, got {describe(getattr(self, name))}")
        if self.progress is not None and not callable(self.progress):
            raise TypeError(f"progress must be callable or None, got {describe(self.progress)}")

    @property
    def resize_or_default(self) -> str | None:
        """How images are resized; None: they are not."""
        return None if self.size is None else self.resize or "crop"

    @property
    def memory_limit(self) -> int:
        """The number of bytes that images may take in memory.

        By default, a quarter of the memory that is available on this machine, divided among the processes of the command.
        """
        if self.memory is not None:
            return parse_bytes("memory", self.memory)
        return available_memory() // (SHARE_OF_MEMORY * processes.local_world_size())

    def check_unused(self, names: tuple[str, ...], kind: str, source: object) -> None:
        """Raise ValueError if one of these options is given: they are for data of this kind, which `source` is not."""
        for name in names:
            if (value := getattr(self, name)) is not None:
                raise ValueError(f"{name} is for {kind}, which {source} is not, got {name}={value!r}")

    def progress_over(self, total: int, what: str) -> AbstractContextManager:
        """Return a context of an object whose `update(count)` reports progress."""
        if self.progress is None:
            return nullcontext(_Silent())
        return self.progress(total=total, desc=what)


class _Silent:
    def update(self, count: int) -> None:
        """Report nothing."""


def parse_bytes(name: str, value: object) -> int:
    """Return a number of bytes from an integer or a text. Units: B, kB, MB, GB and TB (powers of 1000), KiB … TiB (of 1024).

    Raises:
        TypeError: `value` is neither an integer nor a string.
        ValueError: It is negative, or is not of this form.
    """
    if isinstance(value, str):
        found = BYTES.fullmatch(value.strip())
        try:
            number = float(found[1])
            return int(number * (1024 if found[3] else 1000) ** UNITS[found[2].lower()])
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{name} must be {TAKES_BYTES}, got {value!r}") from None
    if not is_int(value):
        raise TypeError(f"{name} must be {TAKES_BYTES}, got {describe(value)}")
    if value < 0:
        raise ValueError(f"{name} must be {TAKES_BYTES}, got {value}")
    return int(value)
