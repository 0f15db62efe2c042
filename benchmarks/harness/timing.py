"""Rounds in which the candidates take turns, and the summary of their times. Needs no torch."""

import random
import statistics
import time
from collections.abc import Callable

Seconds = tuple[float, ...]
"""Seconds of one call, for each direction that is measured in it."""


class Deadline:
    """A point in time, `seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds until then; 0 afterwards."""
        return max(0.0, self._end - time.monotonic())


def interleave(
    functions: dict[str, Callable[[], Seconds]], deadline: Deadline, rounds: tuple[int, int]
) -> dict[str, list[Seconds]]:
    """Return the results of every function over rounds that call each function once, in a new random order.

    A warm-up round comes first and does not count. The fewest rounds are run even past the deadline.

    Args:
        functions: name -> function.
        deadline: no further round starts after it.
        rounds: fewest, most.
    """
    fewest, most = rounds
    samples: dict[str, list[Seconds]] = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(0).shuffle
    for function in functions.values():
        function()
    for done in range(most):
        if done >= fewest and deadline.left() == 0:
            break
        shuffle(order)  # so that no candidate always follows the same one
        for name in order:
            samples[name].append(functions[name]())
    return samples


def summary(samples: list[float]) -> dict[str, float]:
    """Return the median and the quartiles of seconds, in microseconds."""
    low, median, high = (round(x * 1e6, 2) for x in statistics.quantiles(samples, n=4))
    return {"median_us": median, "low_us": low, "high_us": high}
