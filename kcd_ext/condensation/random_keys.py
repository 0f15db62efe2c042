"""Random numbers that are a pure function of what they are for: no generator state to carry, save or lose."""

from __future__ import annotations

import numpy as np
from numpy.random.bit_generator import ISeedSequence

MAX_SEED = 2**64 - 1
ORDER, RANKING, PRUNING, VIEWS = 0, 1, 2, 3  # streams: the same seed and step never give two uses the same numbers


def random_keys(count: int, *, seed: int, step: int, stream: int) -> np.ndarray:
    """(count,) uint64 keys, a pure function of (seed, step, stream).

    Philox is a counter-based generator, and NumPy promises the raw stream of a bit generator for good (NEP 19), which
    it does not for shuffles and permutations: sorting by these keys gives the same order in every release.
    """
    counter = np.array([0, 0, 0, stream], dtype=np.uint64)
    return np.random.Philox(_Key(seed, step), counter=counter).random_raw(count)


class _Key(ISeedSequence):
    """Gives Philox its key as it is. Given as `key` alone, NumPy also asks the system for entropy that nobody needs."""

    def __init__(self, *words: int):
        self._words = words

    def generate_state(self, n_words: int, dtype: type = np.uint64) -> np.ndarray:
        return np.array(self._words, dtype=dtype)
