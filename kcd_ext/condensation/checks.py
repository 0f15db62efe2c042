"""Checks of arguments: every message names the argument, what it got and what it takes."""

from __future__ import annotations

import math
from numbers import Integral, Real

from ..describe import brief, describe


def whole(name: str, value: object, low: int, high: int | None = None) -> int:
    """`value` as an int in [low, high] (no upper bound without `high`); a bool is not a number.

    Raises TypeError (not an integer) or ValueError (out of range).
    """
    takes = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be {takes}, got {describe(value)}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {takes}, got {brief(value)}")
    return int(value)


def real(name: str, value: object, takes: str, low: float, high: float = math.inf) -> float:
    """`value` as a finite float in [low, high], described to the reader as `takes`; a bool is not a number.

    Raises TypeError (not a number) or ValueError (not finite or out of range).
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {takes}, got {describe(value)}")
    if not -math.inf < value < math.inf or not low <= value <= high:  # math.isfinite overflows at integers of any size
        raise ValueError(f"{name} must be {takes}, got {brief(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be {takes}, got an integer beyond the largest double") from None


def flag(name: str, value: object) -> bool:
    """`value`, which must be True or False. Raises TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")
    return value
