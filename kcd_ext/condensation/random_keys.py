"""Counter-based random keys: a pure function of their purpose, so there is no generator state to save or lose."""

from __future__ import annotations

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor

MAX_SEED = 2**64 - 1
# Streams: each use has its own numbers, even for equal seed and step.
ORDER, RANKING, PRUNING, VIEWS, AUGMENTATION, BATCH_MIXING = 0, 1, 2, 3, 4, 5
LOW_31_BITS = 2**31 - 1  # 31 bits times a number of choices still fits int64


def random_keys(count: int, *, seed: int, step: int, stream: int) -> np.ndarray:
    """Return `(count,)` uint64 keys, a pure function of `(seed, step, stream)`.

    Philox is a counter-based generator. NumPy promises that the raw stream of a bit generator never changes (NEP 19).
    It does not promise that for shuffles and permutations. Sorting by these keys therefore gives the same order in
    every release.
    """
    counter = np.array([0, 0, 0, stream], dtype=np.uint64)
    return np.random.Philox(_FixedKey(seed, step), counter=counter).random_raw(count)


def random_bits(index: Tensor, count: int = 1, *, seed: int, step: int, stream: int) -> list[Tensor]:
    """Return `count` tensors with 64 random bits per index as int64, a pure function of `(seed, step, stream, index)`.

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): the index-th number after a state that is a random key. Tensor integers
    wrap around as SplitMix64's do. `>>` copies the sign, so the copied bits are masked.
    """
    keys = random_keys(count, seed=seed, step=step, stream=stream).view(np.int64).tolist()
    return [_mix_bits(index * _signed(0x9E3779B97F4A7C15) + key) for key in keys]


def scale_bits(bits: Tensor, choices: int) -> Tensor:
    """Return the lowest 31 bits as a number in 0 ... choices - 1, uniform to within one part in 2^31 / choices."""
    return ((bits & LOW_31_BITS) * choices) >> 31


def _mix_bits(z: Tensor) -> Tensor:
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & (2**33 - 1))


def _signed(word: int) -> int:
    """Return the int64 with the same 64 bits."""
    return word - 2**64 if word >= 2**63 else word


class _FixedKey(ISeedSequence):
    """A seed sequence that gives Philox its key unchanged.

    With the argument `key`, NumPy would also request entropy from the system, which is not needed here.
    """

    def __init__(self, *words: int):
        self._words = words

    def generate_state(self, n_words: int, dtype: type = np.uint64) -> np.ndarray:
        return np.array(self._words, dtype=dtype)
