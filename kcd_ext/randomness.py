"""Reproducible randomness: generators seeded by numbers, without side effects on the caller's generators."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(*numbers: int, device: str | torch.device = "cpu") -> Iterator[None]:
    """Seed the generators of Python, NumPy and torch inside the context, and restore them afterwards.

    An epoch that runs in `seeded(seed, epoch)` needs no generator state in its checkpoint: dropout, transforms of the data set and
    the seeds of workers repeat exactly.

    Args:
        *numbers: Integers in [0, 2**64) that together determine the seeds.
        device: Device whose generator is seeded in addition to the CPU's.
    """
    device = torch.device(device)
    # Encode the count and two words per number. SeedSequence alone splits large numbers into words and pads with zeros, so that
    # different numbers would give equal seeds: (2**32,) equals (0, 1), and (1,) equals (1, 0).
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
