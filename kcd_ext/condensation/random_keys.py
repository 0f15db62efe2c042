"""Counter-based random keys: a pure function of their purpose, so there is no generator state to save or lose."""

from __future__ import annotations

import numpy as np
from numpy.random.bit_generator import ISeedSequence

MAX_SEED = 2**64 - 1
ORDER, RANKING, PRUNING, VIEWS = 0, 1, 2, 3  # streams: each use has its own numbers, even for equal seed and step


def random_keys(count: int, *, seed: int, step: int, stream: int) -> np.ndarray:
    """Return `(count,)` uint64 keys, a pure function of `(seed, step, stream)`.

    Philox is a counter-based generator. NumPy promises that the raw stream of a bit generator never changes (NEP 19).
    It does not promise that for shuffles and permutations. Sorting by these keys therefore gives the same order in
    every release.
    """
    counter = np.array([0, 0, 0, stream], dtype=np.uint64)
    return np.random.Philox(_FixedKey(seed, step), counter=counter).random_raw(count)


class _FixedKey(ISeedSequence):
    """A seed sequence that gives Philox its key unchanged.

    With the argument `key`, NumPy would also request entropy from the system, which is not needed here.
    """

    def __init__(self, *words: int):
        self._words = words

    def generate_state(self, n_words: int, dtype: type = np.uint64) -> np.ndarray:
        return np.array(self._words, dtype=dtype)
