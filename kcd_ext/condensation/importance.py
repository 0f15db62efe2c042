"""Importance sampling: every epoch draws samples with probabilities that grow with their value, and weights their losses."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .condenser import KnowledgeCondenser
from .random_keys import PRUNING, random_keys
from .schedules import final_size

FLOOR = 0.25  # every sample's share of the mean value, added to its own: bounds the weights of samples of low value


class ImportanceCondenser(KnowledgeCondenser):
    """Unbiased selection by value: every epoch draws k = int(keep·N) samples, valuable ones with a higher probability.

    - The first epoch has all samples, also the epochs until `warmup`. Then every epoch is a stage.
    - With v_i the mean value of sample i over its visits (Eq. 12), w_i = max(v_i, 0) + mean(max(v, 0))/4. The inclusion
      probability is π_i = min(1, c·w_i), with c such that Σ π_i = k. If all values are 0, all are drawn alike.
    - A sample without a value, because it was never visited or no value was finite, has π_i = 1. If there are k or more of
      these, all samples are drawn alike.
    - Systematic sampling in the order of the indices draws exactly k samples from one random number, a function of
      (seed, epoch).
    - The loss of a drawn sample has the weight k/(N·π_i) (`sample_weight`). So the expectation of the mean over the drawn
      samples is the mean over all N samples (Horvitz and Thompson, 1952), while a ranking teaches another mean.

    Probabilities are multiples of a power of two that is at most 2^-51·k. They add up to k exactly, and samples are drawn
    with exactly these probabilities.

    Nothing is mixed. `Condensation.kept` and `dropped` have the highest value first; `dropped` are the samples of the epoch
    that ended that are not in the next one. More samples may return than are dropped.

    Args:
        num_samples: N, the size of the data set.
        keep: Fraction of the samples that an epoch draws, in (0, 1]. 1 draws all.
        warmup: No draw before the end of epoch `warmup` (the first epoch is 1).
        seed: Seed of the draws, in [0, 2^64).
        device: Device of the value table, as for `KnowledgeCondenser`.
        group: Process group, as for `KnowledgeCondenser`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """

    _arguments = ("num_samples", "keep", "warmup", "seed")
    _never_visited_advice = (
        "are drawn in every epoch until they have a value; pass the values of every sample to update()"
    )

    def __init__(
        self,
        num_samples: int,
        *,
        keep: float = 0.7,
        warmup: int = 0,
        seed: int = 0,
        device: torch.device | str | None = None,
        group: torch.distributed.ProcessGroup | None = None,
    ):
        # alpha=0: the score is the value.
        super().__init__(
            num_samples,
            keep=keep,
            every=1,
            schedule="immediate",
            alpha=0.0,
            epsilon=0.0,
            warmup=warmup,
            seed=seed,
            device=device,
            group=group,
        )

    @property
    def probability(self) -> Tensor:
        """The inclusion probabilities π_i of the current epoch: `(N,)` float64 on the CPU; 1 before the first draw."""
        if not self.stage:
            return torch.ones(self.num_samples, dtype=torch.float64, device="cpu")
        parts, whole = self._inclusion()
        return torch.from_numpy(parts / whole)

    @property
    def sample_weight(self) -> Tensor | None:
        """The factor of every sample's loss: `(N,)` float32 on the table's device.

        k/(N·π_i) for a drawn sample, 0 for the others. It synchronises with the device, so read it once per epoch.
        """
        with torch.inference_mode(False), torch.no_grad():  # an ordinary tensor, so losses can use it in any mode
            weight = torch.zeros(self.num_samples, dtype=torch.float32, device="cpu")
            share = len(self._kept) / self.num_samples
            weight[self._kept] = (share / self.probability[self._kept]).float()
            return weight.to(self._table.merged[0].device)

    def select(self) -> tuple[Tensor, Tensor] | None:
        """Return the samples of the next epoch and those of this one that are left out; None if the set is the same."""
        parts, whole = self._inclusion()
        key = int(random_keys(1, seed=self._seed, step=self.epoch + 1, stream=PRUNING)[0])
        drawn = torch.from_numpy(systematic_sample(parts, whole, key % whole))
        before = torch.zeros_like(drawn).index_fill_(0, self._kept, True)
        if torch.equal(drawn, before):
            return None
        order = self.ranking()
        return order[drawn[order]], order[(before & ~drawn)[order]]

    def _inclusion(self) -> tuple[np.ndarray, int]:
        """Return `inclusion_parts` of the merged values: computed on the CPU, so the same on every rank."""
        values, visits = (part.cpu().numpy() for part in self._table.merged)
        return inclusion_parts(values, visits > 0, final_size(self.num_samples, self._keep))

    def _vanished_class_warnings(self) -> list[str]:
        return []  # a class that an epoch does not draw may be drawn in the next one


class UniformCondenser(ImportanceCondenser):
    """A new random set in every epoch: the control that shows what the values of an `ImportanceCondenser` are worth.

    Every epoch draws int(keep·N) samples, each with the same probability. All losses have weight 1. Arguments are those of
    `ImportanceCondenser`. A `RandomCondenser` keeps its random set for a stage.
    """

    ranks_by_value = False

    @property
    def sample_weight(self) -> None:
        """None: all weights are 1."""
        return None

    def _inclusion(self) -> tuple[np.ndarray, int]:
        count = self.num_samples
        return inclusion_parts(np.zeros(count), np.ones(count, dtype=bool), final_size(count, self._keep))


def inclusion_parts(values: np.ndarray, known: np.ndarray, count: int) -> tuple[np.ndarray, int]:
    """Return the inclusion probabilities of an `ImportanceCondenser` as integers that add up to exactly `count` wholes.

    Every operation is exact or correctly rounded, so the result is the same on every machine.

    Args:
        values: `(N,)` float64, finite.
        known: `(N,)` bool, False for a sample without a value.
        count: k, the number of samples to draw, in [1, N].

    Returns:
        parts: `(N,)` int64 in [1, whole]; π_i = parts_i / whole.
        whole: A power of two, at most 2^51.
    """
    whole = 1 << (52 - count.bit_length())
    parts = np.full(len(values), whole, dtype=np.int64)
    remaining = count - int((~known).sum())
    if remaining <= 0:
        known, remaining, values = np.ones_like(known), count, np.zeros_like(values)
    rows = np.flatnonzero(known)
    if len(rows):
        parts[rows] = _round_to_sum(_capped(_weights(values[rows]), remaining), whole, remaining * whole)
    return parts, whole


def systematic_sample(parts: np.ndarray, whole: int, start: int) -> np.ndarray:
    """Return the sample i whose interval [Σ_{j<i} parts_j, Σ_{j<=i} parts_j) contains start + m·whole for an integer m.

    For a `start` that is uniform in [0, whole), sample i is drawn with probability exactly parts_i/whole.

    Args:
        parts: `(N,)` int64 in [0, whole], a multiple of `whole` in total.
        whole: The parts of probability 1.
        start: In [0, whole).

    Returns:
        `(N,)` bool, with Σ parts / whole samples drawn.
    """
    bounds = np.concatenate(([0], np.cumsum(parts)))
    points_below = -((start - bounds) // whole)  # of start, start + whole, start + 2·whole …
    return np.diff(points_below) > 0


def _weights(values: np.ndarray) -> np.ndarray:
    """Return max(v, 0) + mean(max(v, 0))/4, divided by the largest v so that nothing overflows or underflows."""
    positive = np.maximum(values, 0.0)
    largest = positive.max()
    if largest == 0:
        return np.ones_like(values)
    scaled = positive / largest
    return scaled + FLOOR * (math.fsum(scaled) / len(scaled))


def _capped(weights: np.ndarray, count: int) -> np.ndarray:
    """Return min(1, c·w_i), where c makes the sum `count` (<= number of weights)."""
    descending = np.sort(weights)[::-1]
    rest = np.cumsum(descending[::-1])[::-1]  # Σ of this weight and all smaller ones
    below = (count - np.arange(len(weights))) * descending < rest  # c·w < 1 if all larger weights are capped
    capped = int(below.argmax()) if below.any() else len(weights)
    if capped == len(weights):
        return np.ones_like(weights)
    return np.minimum(1.0, weights * ((count - capped) / math.fsum(descending[capped:])))


def _round_to_sum(probability: np.ndarray, whole: int, total: int) -> np.ndarray:
    """Return probability·whole as integers in [1, whole] with the sum `total`. Lower indices take up the remainder."""
    parts = np.clip(np.rint(probability * whole).astype(np.int64), 1, whole)
    while missing := total - int(parts.sum()):
        step = 1 if missing > 0 else -1
        adjustable = np.flatnonzero((parts < whole) & (parts + step >= 1))  # what is certain to be drawn stays so
        parts[adjustable[: abs(missing)]] += step
    return parts
