"""Rounds in which the candidates take turns, and what is said of their times.  Nothing of torch is needed."""

import random
import statistics
import time
from collections.abc import Callable

Seconds = tuple[float, ...]
"""Of one call, for each of the directions that are measured in it."""


class Deadline:
    """A point in time, so many seconds from now."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until then; 0 afterwards."""
        return max(0.0, self._end - time.monotonic())


def in_turns(
    functions: dict[str, Callable[[], Seconds]], deadline: Deadline, rounds: tuple[int, int]
) -> dict[str, list[Seconds]]:
    """What every function gives, over rounds in which each is called once, in another order each time.

    The fewest rounds are made even past the deadline, and one before them that does not count.

    Args:
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
        shuffle(order)  # nobody always follows the same one
        for name in order:
            samples[name].append(functions[name]())
    return samples


def summary(samples: list[float]) -> dict[str, float]:
    """Median and the middle half of seconds, in microseconds."""
    low, median, high = (round(x * 1e6, 2) for x in statistics.quantiles(samples, n=4))
    return {"median_us": median, "low_us": low, "high_us": high}
