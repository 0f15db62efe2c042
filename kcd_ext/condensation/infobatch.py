"""InfoBatch: the control that prunes without condensing, with a new random selection every epoch."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from ..checks import check_int, check_unit_interval
from .condenser import KnowledgeCondenser
from .random_keys import PRUNING, random_keys
from .table import LastLossTable


class InfoBatch(KnowledgeCondenser):
    """Unbiased dynamic pruning by loss: Qin et al., InfoBatch, ICLR 2024 (arXiv 2303.04947), as a condenser.

    - A sample whose last loss is below the mean of all last losses is left out of the next epoch with probability
      r = 1 - keep. If it stays, its loss is multiplied by 1/keep, so the expected gradient is that of all samples.
    - A sample at or above the mean always stays, with weight 1.
    - In the last `anneal` of the run, from epoch floor((1 - anneal)·epochs) on (the first epoch is 0), all samples stay
      with weight 1. The authors' delta is 1 - anneal.

    Every epoch is a stage. Pass losses to `update` (`measure`), and multiply every sample's loss by its `sample_weight`
    before the mean over the batch. `values` are the last losses: the mean of several in one epoch; for a sample not
    visited, the previous one. Nothing is mixed. There is neither `min_per_class` nor `warmup`, because the selection is
    redrawn every epoch.

    `step` returns a `Condensation` after every epoch that changes the kept set. `kept` and `dropped` have the highest
    loss first. `dropped` are the samples of the epoch that ended that are not in the next one. A sample left out of both
    epochs is in neither, and more samples can return than are dropped.

    As in the authors' code: strictly below the mean; the factor 1/keep; r = 0.5 and delta = 0.875 by default; the losses
    are those of the augmented batch before the optimiser's step. Different on purpose:

    - Every sample is drawn independently with probability r, as in the paper. Their code leaves out a fixed number, the
      share r of the samples below the mean, rounded up, which makes the expected weight slightly less than 1.
    - The selection is a pure function of (seed, epoch) and the losses. Theirs reseeds NumPy's global generator every
      epoch.
    - A sample without a loss always stays and does not count in the mean. Theirs starts with the loss 3. In both, equal
      losses drop nothing, and the first epoch has all samples.
    - Ranks communicate with one all-reduce per epoch. Theirs gathers losses and, as floating point, indices every batch.
    - In the annealed epochs all weights are 1 at once. Theirs keep those of the last selection if delta·epochs is not an
      integer.
    - Losses that are not finite are left out and counted.

    Args:
        num_samples: N, the size of the data set.
        keep: Probability that a sample of low loss stays, in (0, 1]; r = 1 - keep. 1 prunes nothing.
        epochs: Length of the run, of which `anneal` is a fraction.
        anneal: Fraction of the run, at its end, that uses all samples, in [0, 1].
        seed: Seed of the selection, in [0, 2^64).
        device: Device of the value table, as for `KnowledgeCondenser`.
        group: Process group, as for `KnowledgeCondenser`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.

    Warns:
        RuntimeWarning: The run is so short that nothing is ever pruned.
    """

    measure = "losses"

    _arguments = ("num_samples", "keep", "epochs", "anneal", "seed")
    _table_type = LastLossTable
    _never_visited_advice = "stay until they have a loss; pass the losses of every sample to update()"

    def __init__(
        self,
        num_samples: int,
        *,
        keep: float = 0.5,
        epochs: int,
        anneal: float = 0.125,
        seed: int = 0,
        device: torch.device | str | None = None,
        group: torch.distributed.ProcessGroup | None = None,
    ):
        # alpha=0: the score is the last loss.
        super().__init__(
            num_samples,
            keep=keep,
            every=1,
            schedule="immediate",
            alpha=0.0,
            epsilon=0.0,
            seed=seed,
            device=device,
            group=group,
        )
        self._epochs = check_int("epochs", epochs, 1)
        self._anneal = check_unit_interval("anneal", anneal)
        # floor((1 - anneal)·epochs) without rounding 1 - anneal, which can make it smaller by one.
        self._anneal_start = self._epochs - math.ceil(self._anneal * self._epochs)
        prunes = self._anneal_start > 1  # the first epoch has all samples anyway
        if not prunes and self._keep < 1 and self._anneal < 1 and self._num_samples > 1:
            warnings.warn(
                f"epochs={self._epochs}, anneal={self._anneal}: all samples stay from epoch {self._anneal_start} on, so "
                f"nothing is ever pruned; use more epochs or a smaller anneal",
                RuntimeWarning,
                stacklevel=2,
            )

    def select(self) -> tuple[Tensor, Tensor] | None:
        """Return the samples of the next epoch and those of this one that are left out; None if the set is the same."""
        epoch = self.epoch + 1
        keys = random_keys(self.num_samples, seed=self._seed, step=epoch, stream=PRUNING)
        drawn = torch.from_numpy((keys >> 11) * 2.0**-53 < self._keep)  # 53 bits: exact in float64
        stays = drawn | ~self._prunable(epoch)
        stayed = torch.zeros_like(stays).index_fill_(0, self._kept, True)
        if torch.equal(stays, stayed):
            return None
        order = self.ranking()
        return order[stays[order]], order[(stayed & ~stays)[order]]

    @property
    def sample_weight(self) -> Tensor:
        """The factor of every sample's loss: `(N,)` float32 on the table's device.

        1/keep for a sample that stays by chance, 1 for one that always stays, 0 for one that is left out. It synchronises
        with the device, so read it once per epoch.
        """
        with torch.inference_mode(False), torch.no_grad():  # an ordinary tensor, so losses can use it in any mode
            weight = torch.zeros(self.num_samples, dtype=torch.float32, device="cpu")
            weight[self._kept] = 1.0
            weight[self._prunable(self.epoch)] *= 1 / self._keep
            return weight.to(self._table.merged[0].device)

    def _prunable(self, epoch: int) -> Tensor:
        """Return which samples `epoch` may leave out: `(N,)` bool, computed on the CPU to be equal on every rank."""
        losses, visits = (part.cpu() for part in self._table.merged)
        seen = visits > 0
        if epoch >= self._anneal_start or not seen.any():
            return torch.zeros_like(seen)
        # Subtract the lowest loss, so that rounding cannot put the mean of equal losses above them. fsum is the exact
        # sum, rounded once: the same for any number of threads.
        above = losses - losses[seen].min()
        return seen & (above < math.fsum(above[seen].tolist()) / int(seen.sum()))
