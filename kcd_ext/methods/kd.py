"""Knowledge distillation (Hinton et al., 2015): the teacher's softened answers beside the labels."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import reference
from ..checks import check_finite, check_fraction, check_positive
from ..losses import condensed_kd_loss
from ..ops import has_kernels_for
from .features import at_least_float32
from .protocol import Batch, Method, Outcome, entropy
from .selection import select_batch_rows, take_rows


class KnowledgeDistillation(Method):
    """loss = ce_weight * CE + kd_weight * T^2 * KL(teacher || student), means over the batch; value: student's entropy.

    With `batch.weight` it is mean_i(weight_i * losses_i), losses_i = ce_weight * CE_i + kd_weight * T^2 * KL_i, and
    `Outcome.losses` holds them. Without, there are no `losses`: one operator gives the mean, and they would cost another.

    With `batch_keep` < 1 the mean of the KL is that of the k chosen rows, in losses_i as b/k * [i is chosen] * KL_i.

    Args:
        temperature: T > 0; 4 in the recipe of KCD.
        kd_weight, ce_weight: finite; 0.9 and 0.1 in the recipe of KCD.
        batch_keep: the fraction of every batch that the teacher is asked about, in (0, 1], by the student's entropy,
            the highest first (`selection.select_batch_rows`). 1: all.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """

    weighs_samples = True

    def __init__(
        self, temperature: float = 4.0, kd_weight: float = 0.9, ce_weight: float = 0.1, batch_keep: float = 1.0
    ):
        super().__init__()
        self.set_options(check_positive, temperature=temperature)
        self.set_options(check_finite, kd_weight=kd_weight, ce_weight=ce_weight)
        self.set_options(check_fraction, batch_keep=batch_keep)

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """`terms["kl"]`: the mean KL divergence at temperature T, in nats, without its weight and T^2."""
        logits = student(batch.x)
        rows = select_batch_rows(logits, self.batch_keep)
        with torch.no_grad():
            teacher_logits = teacher(take_rows(batch.x, rows))
        weights = {"temperature": self.temperature, "kd_weight": self.kd_weight, "ce_weight": self.ce_weight}
        if batch.weight is None:
            loss, value, kl = distill_rows(logits, teacher_logits, batch.label, rows, **weights)
            return Outcome(loss, logits.detach(), value, {"kl": kl})
        # A mean over the batch that is the chosen rows' own mean of the KL.
        weights["kd_weight"] = self.kd_weight * len(logits) / len(teacher_logits)
        losses, value, kl = distill_rows(logits, teacher_logits, batch.label, rows, **weights, reduction="none")
        return Outcome((batch.weight * losses).mean(), logits.detach(), value, {"kl": kl}, losses.detach())


def distill_rows(
    logits: Tensor, teacher_logits: Tensor, label: Tensor, rows: Tensor | None = None, **options: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ce_weight * CE + kd_weight * T^2 * KL, the student's entropies (b,) and the mean KL (), the latter detached.

    logits (b, classes), label (b,) int64; teacher_logits (k, classes) are constants, and those of `rows` (k,), None: of all.
    `options` are those of `kcd_ext.condensed_kd_loss`. The mean is over the rows that the teacher was asked about, in nats.
    """
    loss, knowledge = kd_loss(logits, teacher_logits, labels=label, rows=rows, return_knowledge=True, **options)
    return loss, knowledge.entropy.detach(), take_rows(knowledge.kl, rows).detach().mean()


def distill_optionally(
    logits: Tensor, teacher_logits: Tensor, label: Tensor, rows: Tensor | None, **weights: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return loss and value of `distill_rows`, and the mean KL as a term; no KL is computed if kd_weight is 0.

    `weights` are temperature, kd_weight and ce_weight.
    """
    if weights["kd_weight"] == 0:
        cross_entropy = functional.cross_entropy(at_least_float32(logits), label)
        return weights["ce_weight"] * cross_entropy, entropy(logits), {}
    loss, value, kl = distill_rows(logits, teacher_logits, label, rows, **weights)
    return loss, value, {"kl": kl}


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, **options):
    """`kcd_ext.condensed_kd_loss` where it has kernels; elsewhere the reference, which gives the same numbers."""
    fused = has_kernels_for(student_logits)
    return (condensed_kd_loss if fused else reference.condensed_kd_loss)(student_logits, teacher_logits, **options)
