"""Batches of equal sizes."""

from __future__ import annotations

from itertools import pairwise


def split_evenly(count: int, size: int) -> list[slice]:
    """Split `count` samples into the fewest parts of at most `size`. Part sizes differ by at most one.

    A last batch of a few samples would weigh as much as a full one in the optimizer, in batch statistics and in losses
    over pairs of samples. Such steps can undo what a student has learnt.

    No part is a single sample, which batch normalisation cannot train on, unless `size` or `count` is 1. So an odd
    number of samples in pairs has one part of three.
    """
    parts = -(-count // size) if size == 1 else min(-(-count // size), max(1, count // 2))
    bounds = [count * part // parts for part in range(parts + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]
