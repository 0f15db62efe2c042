"""Checks of the options that several methods have: every message names the option, what it got and what it takes."""

import math

from ..condensation.checks import real


def check_temperature(name: str, value: float) -> float:
    """A finite number > 0; raises TypeError or ValueError."""
    return real(name, value, "a finite number > 0", 5e-324)


def check_weight(name: str, value: float) -> float:
    """A finite number; raises TypeError or ValueError."""
    return real(name, value, "a finite number", -math.inf)


def check_batch_keep(batch_keep: float) -> float:
    """A number in (0, 1], which `selection.choose` takes; raises TypeError or ValueError."""
    return real("batch_keep", batch_keep, "a number in (0, 1]", 5e-324, 1)
