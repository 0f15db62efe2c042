"""Schedules: how many samples each stage keeps. Every schedule is a pure function."""

from __future__ import annotations

import math
from collections.abc import Callable


def final_size(num_samples: int, keep: float) -> int:
    """Return the smallest size any schedule reaches: int(keep·N), at least 1."""
    return max(1, int(keep * num_samples))


def reference(stage: int, now: int, num_samples: int, keep: float, stages: int) -> int:
    """Return n_now - int(N·(1 - keep)/stages): the equal steps of the authors' code, evaluated in float64 as theirs.

    With N = 50 000, keep = 0.7 and six stages of 40 epochs, the epochs have 50 000, 47 500, 45 000, 42 500, 40 000 and
    37 500 samples. That is 87.5 % of full training: 35 000 samples are reached only after the last epoch.
    """
    return now - int(num_samples * (1 - keep) / stages)


def cosine(stage: int, now: int, num_samples: int, keep: float, stages: int) -> int:
    """Return the size on half a cosine from N at stage 0 to the final size at stage `stages`.

    The first and the last steps are small.
    """
    final = final_size(num_samples, keep)
    return final + int((num_samples - final) * (1 + math.cos(math.pi * min(1.0, stage / stages))) / 2)


def immediate(stage: int, now: int, num_samples: int, keep: float, stages: int) -> int:
    """Return the final size: it is reached at the first stage."""
    return final_size(num_samples, keep)


SCHEDULES: dict[str, Callable[[int, int, int, float, int], int]] = {
    "reference": reference,
    "cosine": cosine,
    "immediate": immediate,
}


def stage_size(schedule: str, stage: int, now: int, num_samples: int, keep: float, stages: int) -> int:
    """Return how many samples condensation step `stage` keeps.

    Args:
        schedule: A key of `SCHEDULES`.
        stage: Number of the condensation step, from 1.
        now: Samples kept before it.
        num_samples: N, the size of the data set.
        keep: The fraction to keep in the end.
        stages: Condensation steps over which the set shrinks.

    Returns:
        The size, never above `now` and never below the final size.
    """
    size = SCHEDULES[schedule](stage, now, num_samples, keep, stages)
    return max(final_size(num_samples, keep), min(now, size))
