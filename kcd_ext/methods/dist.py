"""Distillation from a stronger teacher (DIST; Huang et al., NeurIPS 2022): correlations instead of equal probabilities."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checks import check_bool, check_finite, check_fraction, check_positive
from .features import at_least_float32, full_precision
from .kd import standardized
from .protocol import Batch, Method, Outcome, entropy
from .selection import select_batch_rows, take_rows

EPSILON = 1e-8  # added to the product of two lengths before it divides, as in the published code


class StrongerTeacherDistillation(Method):
    """Distillation from a stronger teacher (DIST), Huang et al., NeurIPS 2022.

        loss = ce_weight * CE + T^2 * (beta * INTER + gamma * INTRA)

    The knowledge value is the student's entropy. With both networks' probabilities at temperature T, as matrices with one row
    per sample and one column per class, and Pearson's correlation r:

        INTER = 1 - mean over the rows of r(teacher's row, student's row)
        INTRA = 1 - mean over the columns of r(teacher's column, student's column).

    So the student may be less confident than the teacher, as long as it ranks alike: the classes of a sample, and the samples
    of a class. A row or column without spread has r = 0 and no gradient; so has each column of a batch of one sample.

    Loss and defaults follow the authors' code (hunto/DIST_KD): T^2 for both terms, beta = gamma = T = 1, and T = 4 for
    CIFAR-100. The denominator of r has their 1e-8 too: it mutes classes that no sample of a batch is likely to have.

    Args:
        temperature: T of the probabilities, > 0; 1 in the authors' code, 4 for CIFAR-100.
        ce_weight: Weight of the cross entropy, finite.
        beta: Weight of the correlation between classes (INTER), finite.
        gamma: Weight of the correlation between samples (INTRA), finite.
        batch_keep: Fraction of each batch that the teacher runs on and that is compared, in (0, 1]: the rows of highest student
            entropy (`selection.select_batch_rows`). 1: all rows.
        label_smoothing: Label smoothing of the cross entropy, in [0, 1].
        standardize: Compare the z-scores of each row's logits instead of the logits (`kd.standardized`).

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """

    takes_soft_labels = True

    def __init__(
        self,
        temperature: float = 1.0,
        ce_weight: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        batch_keep: float = 1.0,
        label_smoothing: float = 0.0,
        standardize: bool = False,
    ):
        super().__init__()
        self.set_options(check_positive, temperature=temperature)
        self.set_options(check_finite, ce_weight=ce_weight, beta=beta, gamma=gamma)
        self.set_options(check_fraction, batch_keep=batch_keep)
        self.set_label_smoothing(label_smoothing, ce_weight)
        self.set_options(check_bool, standardize=standardize)

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """Return the loss of a batch. `terms` are "inter" and "intra", without weights and T^2."""
        logits = student(batch.x)
        rows = select_batch_rows(logits, self.batch_keep)
        with torch.no_grad():
            target = teacher(take_rows(batch.x, rows))
        with full_precision(logits):
            compared = [standardized(x) if self.standardize else x for x in (take_rows(logits, rows), target)]
            q, p = ((at_least_float32(x) / self.temperature).softmax(1) for x in compared)
            inter, intra = 1 - correlations(q, p).mean(), 1 - correlations(q.T, p.T).mean()
            cross_entropy = functional.cross_entropy(
                at_least_float32(logits), batch.label, label_smoothing=self.label_smoothing
            )
        loss = self.ce_weight * cross_entropy + self.temperature**2 * (self.beta * inter + self.gamma * intra)
        return Outcome(loss, logits.detach(), entropy(logits), {"inter": inter.detach(), "intra": intra.detach()})


def correlations(one: Tensor, other: Tensor) -> Tensor:
    """Return Pearson's correlation (r,) of each row of two matrices (r, n), differentiable in both. 0 for a row without spread."""
    one, other = (x - x.mean(1, keepdim=True) for x in (one, other))
    lengths = (torch.linalg.vector_norm(x, dim=1) for x in (one, other))
    return (one * other).sum(1) / (next(lengths) * next(lengths) + EPSILON)
