"""Randomness that is a function of numbers alone, and that leaves no trace in the caller's process."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(*numbers: int, device: str | torch.device = "cpu") -> Iterator[None]:
    """Inside, the generators of Python, NumPy and torch (CPU and `device`) are seeded by these numbers in [0, 2**64).

    Afterwards they are as they were. An epoch that runs in `seeded(seed, epoch)` needs no generator state in its
    checkpoint: dropout, the transforms of the data set and the workers' seeds are what they were the first time.
    """
    device = torch.device(device)
    # Two words for each and their count before them: SeedSequence by itself cuts large numbers into words and fills up
    # with zeros, so (2**32,) would be (0, 1) and (1,) would be (1, 0).
    words = [len(numbers), *(word for number in numbers for word in (number % 2**32, number // 2**32))]
    seeds = np.random.SeedSequence(words).generate_state(3, np.uint64)
    states = random.getstate(), np.random.get_state()
    cuda = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            random.seed(int(seeds[0]))
            np.random.seed(int(seeds[1]) % 2**32)
            torch.default_generator.manual_seed(int(seeds[2]) % 2**63)
            for index in cuda:
                torch.cuda.default_generators[index].manual_seed(int(seeds[2]) % 2**63)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
