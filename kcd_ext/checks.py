"""Checks of arguments: every message names the argument, what it got and what it takes."""

from __future__ import annotations

import math
from numbers import Integral, Real

from .describe import brief, describe

INT64_MAX = 2**63 - 1


def check_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """`value` as an int in [low, high] (without `high`, up to the largest int64); a bool is not a number.

    Raises TypeError (not an integer) or ValueError (out of range).
    """
    takes = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be {takes}, got {describe(value)}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {takes}, got {brief(value)}")
    if high is None and value > INT64_MAX:
        raise ValueError(f"{name} must be an integer that int64 can hold, got {brief(value)}")
    return int(value)


def check_float(name: str, value: object, takes: str, low: float, high: float = math.inf) -> float:
    """`value` as a finite float in [low, high], described to the reader as `takes`; a bool is not a number.

    Raises TypeError (not a number) or ValueError (not finite or out of range).
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {takes}, got {describe(value)}")
    try:
        number = float(value)
    except OverflowError:  # an integer or a fraction beyond the largest double
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high:
        raise ValueError(f"{name} must be {takes}, got {brief(value)}")
    return number


def check_bool(name: str, value: object) -> bool:
    """`value`, which must be True or False. Raises TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")
    return value
