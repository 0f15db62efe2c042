"""Random numbers that are a pure function of what they are for: no generator state to carry, save or lose."""

from __future__ import annotations

import numpy as np

MAX_SEED = 2**64 - 1
ORDER, RANKING, PRUNING, VIEWS = 0, 1, 2, 3  # streams: the same seed and step never give two uses the same numbers


def random_keys(count: int, *, seed: int, step: int, stream: int) -> np.ndarray:
    """(count,) uint64 keys, a pure function of (seed, step, stream).

    Philox is a counter-based generator, and NumPy promises the raw stream of a bit generator for good (NEP 19), which
    it does not for shuffles and permutations: sorting by these keys gives the same order in every release.
    """
    key = np.array([seed, step], dtype=np.uint64)
    counter = np.array([0, 0, 0, stream], dtype=np.uint64)
    return np.random.Philox(counter=counter, key=key).random_raw(count)
