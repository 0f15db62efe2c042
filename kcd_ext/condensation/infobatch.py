"""The control that prunes without condensing: InfoBatch, a new random choice every epoch, made good by weights."""

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

    A sample whose last loss is below the mean of all last losses is left out of the next epoch with probability
    r = 1 - keep; if it stays, its loss counts 1/keep times, so that the expected gradient is that of all samples. A
    sample at or above the mean always stays and counts once. In the last `anneal` of the run, from epoch
    floor((1 - anneal)·epochs) on (the first is 0), all samples stay and count once; the authors' delta is 1 - anneal.

    It takes neither `min_per_class` nor `warmup`: what is left out of one epoch is drawn anew for the next.

    Every epoch is a stage. `update` is to be fed with losses (`measure`), and the loss of every sample is to be
    multiplied by its `sample_weight` before the mean over the batch. `values` are the last losses: of several in one
    epoch their mean, of a sample not visited the one it had. Nothing is mixed.

    `step` returns a `Condensation` after every epoch that changes what is kept: `kept` has the highest loss first,
    `dropped` is what was kept in the epoch that ends and is not in the next, the highest loss first. What was left out
    before and is again is in neither, and what comes back may be more than what is dropped.

    As the authors' code: strictly below the mean; the factor 1/keep; r = 0.5 and delta = 0.875 by default; the losses
    are those of the augmented batch before the optimiser's step. Different, on purpose:

    - Every sample is drawn for itself with probability r, as the paper writes it; their code leaves out a number that
      is fixed, the share r of those below the mean, rounded up, which makes the expected weight a little less than 1.
    - A choice is a pure function of (seed, epoch) and the losses; theirs reseeds NumPy's global generator every epoch.
    - A sample without a loss yet always stays and is not in the mean; theirs has the loss 3 to begin with. So equal
      losses drop nothing, and the first epoch has all samples, in both.
    - Processes meet in one all-reduce an epoch; theirs gathers losses and, as floating point, indices every batch.
    - In the annealed epochs all weights are 1 at once; theirs keep those of the last choice where delta·epochs is no
      whole number.
    - Losses that are not finite are left out and counted.

    Args:
        num_samples: N, the size of the data set.
        keep: the probability that a sample of low loss stays, in (0, 1]; r = 1 - keep. 1 prunes nothing.
        epochs: of the whole run, which `anneal` is a part of.
        anneal: the part of the run in the end that has all samples, in [0, 1].
        seed: of the choice, in [0, 2^64).
        device, group: as for `KnowledgeCondenser`.

    Raises:
        TypeError, ValueError: an argument is out of range, named with what it got and what it takes.

    Warns:
        RuntimeWarning: in a run so short that nothing is ever pruned.
    """

    measure = "losses"

    _arguments = ("num_samples", "keep", "epochs", "anneal", "seed")
    _table_type = LastLossTable
    _unvisited = "stay until they have a loss; give update() the losses of every sample"

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
        # No exponent: the score is the last loss.
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
        # floor((1 - anneal)·epochs), without the rounding of 1 - anneal, which can make it one less.
        self._annealed = self._epochs - math.ceil(self._anneal * self._epochs)
        pruned = self._annealed > 1  # the first epoch has all samples anyway
        if not pruned and self._keep < 1 and self._anneal < 1 and self._num_samples > 1:
            warnings.warn(
                f"epochs={self._epochs}, anneal={self._anneal}: all samples stay from epoch {self._annealed} on, so "
                f"nothing is ever pruned; take more epochs or a smaller anneal",
                RuntimeWarning,
                stacklevel=2,
            )

    def select(self) -> tuple[Tensor, Tensor] | None:
        """What stays in the next epoch, and what of this one does not; None: the same samples stay."""
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
        """What each sample's loss is multiplied by: (N,) float32 on the table's device.

        1/keep for a sample that stays by chance, 1 for one that stays anyway, 0 for one that is left out. Waits for the
        device, so it is to be asked for once an epoch.
        """
        with torch.inference_mode(False), torch.no_grad():  # a weight that a loss can be multiplied by in any mode
            weight = torch.zeros(self.num_samples, dtype=torch.float32, device="cpu")
            weight[self._kept] = 1.0
            weight[self._prunable(self.epoch)] *= 1 / self._keep
            return weight.to(self._table.folded[0].device)

    def _prunable(self, epoch: int) -> Tensor:
        """The samples that `epoch` may leave out, by the losses before it: (N,) bool on the CPU, so alike everywhere."""
        losses, visits = (part.cpu() for part in self._table.folded)
        seen = visits > 0
        if epoch >= self._annealed or not seen.any():
            return torch.zeros_like(seen)
        # Above the lowest, so that rounding cannot put the mean of equal losses above them. The exact sum, rounded once,
        # is the same for any number of threads.
        above = losses - losses[seen].min()
        return seen & (above < math.fsum(above[seen].tolist()) / int(seen.sum()))
