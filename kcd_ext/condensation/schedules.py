"""How many samples every stage keeps. A schedule is a pure function; the condenser knows none of them by name."""

from __future__ import annotations

import math
from collections.abc import Callable


def final_size(num_samples: int, keep: float) -> int:
    """The size no schedule goes below: int(keep·N), at least 1."""
    return max(1, int(keep * num_samples))


def reference(stage: int, now: int, num_samples: int, keep: float, stages: int) -> int:
    """The authors' equal steps: n_now - int(N·(1 - keep)/stages), their expression, in float64 as theirs.

    N = 50 000, keep = 0.7, six stages of 40 epochs: 50 000, 47 500, 45 000, 42 500, 40 000, 37 500 samples an epoch,
    which is 87.5 % of full training; 35 000 are left only after the last epoch.
    """
    return now - int(num_samples * (1 - keep) / stages)


def cosine(stage: int, now: int, num_samples: int, keep: float, stages: int) -> int:
    """Half a cosine from N (stage 0) down to the final size at stage `stages`: gentle first and last."""
    final = final_size(num_samples, keep)
    return final + int((num_samples - final) * (1 + math.cos(math.pi * min(1.0, stage / stages))) / 2)


def immediate(stage: int, now: int, num_samples: int, keep: float, stages: int) -> int:
    """The final size from the first stage on."""
    return final_size(num_samples, keep)


SCHEDULES: dict[str, Callable[[int, int, int, float, int], int]] = {
    "reference": reference,
    "cosine": cosine,
    "immediate": immediate,
}


def stage_size(schedule: str, stage: int, now: int, num_samples: int, keep: float, stages: int) -> int:
    """Samples kept by E-step number `stage` (the first is 1) when `now` are kept before it.

    Never above `now` and never below the final size.
    """
    wanted = SCHEDULES[schedule](stage, now, num_samples, keep, stages)
    return max(final_size(num_samples, keep), min(now, wanted))
