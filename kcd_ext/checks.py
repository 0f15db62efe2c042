"""Checks of numbers, choices and booleans: every message names the argument, what it got and what it takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real

from .describe import brief, describe, did_you_mean

INT64_MAX = 2**63 - 1
SMALLEST = 5e-324  # the least float > 0


def is_int(value: object) -> bool:
    """Return whether `value` is an integer, NumPy's too; a bool is none."""
    return isinstance(value, (int, Integral)) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether `value` is a real number, NumPy's too; a bool is none."""
    return isinstance(value, (float, int, Real)) and not isinstance(value, bool)


def check_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """Return `value` as an int in [low, high] (without `high`, up to the largest int64).

    Raises TypeError (not an integer) or ValueError (out of range).
    """
    takes = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    if not is_int(value):
        raise TypeError(f"{name} must be {takes}, got {describe(value)}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {takes}, got {brief(value)}")
    if high is None and value > INT64_MAX:
        raise ValueError(f"{name} must be an integer that int64 can hold, got {brief(value)}")
    return int(value)


def check_float(name: str, value: object, takes: str, low: float, high: float = math.inf) -> float:
    """Return `value` as a finite float in [low, high], described to the reader as `takes`.

    Raises TypeError (not a number) or ValueError (not finite or out of range), as the checks of ranges below do.
    """
    if not is_number(value):
        raise TypeError(f"{name} must be {takes}, got {describe(value)}")
    try:
        number = float(value)
    except OverflowError:  # an integer or a fraction beyond the largest double
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high:
        raise ValueError(f"{name} must be {takes}, got {brief(value)}")
    return number


def check_finite(name: str, value: object) -> float:
    """Return a finite number as a float."""
    return check_float(name, value, "a finite number", -math.inf)


def check_positive(name: str, value: object) -> float:
    """Return a finite number > 0 as a float."""
    return check_float(name, value, "a finite number > 0", SMALLEST)


def check_non_negative(name: str, value: object) -> float:
    """Return a finite number >= 0 as a float."""
    return check_float(name, value, "a finite number >= 0", 0)


def check_fraction(name: str, value: object) -> float:
    """Return a number in (0, 1] as a float."""
    return check_float(name, value, "a number in (0, 1]", SMALLEST, 1)


def check_unit_interval(name: str, value: object) -> float:
    """Return a number in [0, 1] as a float."""
    return check_float(name, value, "a number in [0, 1]", 0, 1)


def check_percent(name: str, value: object) -> float:
    """Return a number in [0, 100] as a float."""
    return check_float(name, value, "a number in [0, 100]", 0, 100)


def check_fractions(name: str, given: Sequence[float] | float | str, takes: str) -> tuple[float, ...]:
    """Return numbers in [0, 1], given as a sequence, as one number alone, or as text with commas between them.

    A command, whose options are numbers and strings, gives several as "0.5,0.75", and "" for none. `takes` describes them
    to the reader. Raises as `check_float` does.
    """
    if isinstance(given, str):
        try:
            given = [float(part) for part in given.split(",")] if given.strip() else []
        except ValueError:
            raise ValueError(f"{name} must be {takes}, got {brief(given)}") from None
    return tuple(check_float(name, part, takes, 0, 1) for part in (given if isinstance(given, Sequence) else (given,)))


def check_bool(name: str, value: object) -> bool:
    """Return `value`, which must be True or False. Raises TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")
    return value


def check_choice(name: str, value: object, choices: Iterable[str]) -> str:
    """Return `value`, which must be one of these strings. Raises ValueError, which names the nearest."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {brief(value)}{did_you_mean(value, choices)}"
        )
    return value


def check_used(name: str, value: object, usual: object, unused: bool, reason: str) -> None:
    """Raise ValueError for an option that differs from its default `usual` where nothing uses it."""
    if unused and value != usual:
        raise ValueError(f"{name}={brief(value)} has no effect with {reason}")
