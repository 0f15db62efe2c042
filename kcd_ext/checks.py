"""Checks of numbers, choices and booleans. Every message names the argument, what it takes and what it got."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real

from .describe import brief, describe, did_you_mean

INT64_MAX = 2**63 - 1
SMALLEST_FLOAT = 5e-324  # the smallest float > 0


def is_int(value: object) -> bool:
    """Return whether `value` is an integer (NumPy's included, bool excluded)."""
    return isinstance(value, (int, Integral)) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether `value` is a real number (NumPy's included, bool excluded)."""
    return isinstance(value, (float, int, Real)) and not isinstance(value, bool)


def check_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """Return `value` as an int in [low, high]. Without `high` the limit is the largest int64.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is out of range.
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
    """Return `value` as a finite float in [low, high]. Messages describe the range as `takes`.

    The checks of ranges below raise the same errors.

    Raises:
        TypeError: `value` is not a number.
        ValueError: `value` is not finite or out of range.
    """
    if not is_number(value):
        raise TypeError(f"{name} must be {takes}, got {describe(value)}")
    try:
        number = float(value)
    except OverflowError:  # an int or a Fraction beyond the range of float64
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high:
        raise ValueError(f"{name} must be {takes}, got {brief(value)}")
    return number


def check_finite(name: str, value: object) -> float:
    """Return a finite number as a float."""
    return check_float(name, value, "a finite number", -math.inf)


def check_positive(name: str, value: object) -> float:
    """Return a finite number > 0 as a float."""
    return check_float(name, value, "a finite number > 0", SMALLEST_FLOAT)


def check_non_negative(name: str, value: object) -> float:
    """Return a finite number >= 0 as a float."""
    return check_float(name, value, "a finite number >= 0", 0)


def check_fraction(name: str, value: object) -> float:
    """Return a number in (0, 1] as a float."""
    return check_float(name, value, "a number in (0, 1]", SMALLEST_FLOAT, 1)


def check_unit_interval(name: str, value: object) -> float:
    """Return a number in [0, 1] as a float."""
    return check_float(name, value, "a number in [0, 1]", 0, 1)


def check_percent(name: str, value: object) -> float:
    """Return a number in [0, 100] as a float."""
    return check_float(name, value, "a number in [0, 100]", 0, 100)


def check_fractions(name: str, value: Sequence[float] | float | str, takes: str) -> tuple[float, ...]:
    """Return numbers in [0, 1] from a sequence, a single number, or a string with commas.

    Command-line options pass several numbers as "0.5,0.75", and "" for none. Messages describe the range as `takes`. Raises as
    `check_float` does.
    """
    if isinstance(value, str):
        try:
            value = [float(part) for part in value.split(",")] if value.strip() else []
        except ValueError:
            raise ValueError(f"{name} must be {takes}, got {brief(value)}") from None
    return tuple(check_float(name, part, takes, 0, 1) for part in (value if isinstance(value, Sequence) else (value,)))


def check_bool(name: str, value: object) -> bool:
    """Return `value`, or raise TypeError unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")
    return value


def check_device(device: object) -> str:
    """Return `device`. Raise ValueError unless it is "auto", "cpu" or "cuda"."""
    if not isinstance(device, str) or device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {brief(device)}")
    return device


def check_choice(name: str, value: object, choices: Iterable[str]) -> str:
    """Return `value`, or raise ValueError unless it is one of `choices`. The message suggests the nearest choice."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {brief(value)}{did_you_mean(value, choices)}"
        )
    return value


def check_used(name: str, value: object, default: object, unused: bool, reason: str) -> None:
    """Raise ValueError if an unused option differs from its default."""
    if unused and value != default:
        raise ValueError(f"{name}={brief(value)} has no effect with {reason}")
