"""Checks of the options that several methods have: every message names the option, what it got and what it takes."""

import math
from collections.abc import Sequence

from ..checks import check_float
from ..describe import brief


def check_temperature(name: str, value: float) -> float:
    """A finite number > 0; raises TypeError or ValueError."""
    return check_float(name, value, "a finite number > 0", 5e-324)


def check_weight(name: str, value: float) -> float:
    """A finite number; raises TypeError or ValueError."""
    return check_float(name, value, "a finite number", -math.inf)


def check_used(name: str, value: object, usual: object, unused: bool, reason: str) -> None:
    """Raises ValueError for an option that was chosen where nothing uses it."""
    if unused and value != usual:
        raise ValueError(f"{name}={brief(value)} has no effect with {reason}")


def check_batch_keep(batch_keep: float) -> float:
    """A number in (0, 1], which `selection.choose` takes; raises TypeError or ValueError."""
    return check_float("batch_keep", batch_keep, "a number in (0, 1]", 5e-324, 1)


def fractions(name: str, given: Sequence[float] | float | str, takes: str) -> tuple[float, ...]:
    """Numbers in [0, 1], given as a sequence, as one number alone, or as text with commas between them.

    A command, whose options are numbers and strings, gives several as "0.5,0.75", and "" for none. `takes` describes them
    to the reader. Raises TypeError or ValueError.
    """
    if isinstance(given, str):
        try:
            given = [float(part) for part in given.split(",")] if given.strip() else []
        except ValueError:
            raise ValueError(f"{name} must be {takes}, got {brief(given)}") from None
    return tuple(check_float(name, part, takes, 0, 1) for part in (given if isinstance(given, Sequence) else (given,)))
