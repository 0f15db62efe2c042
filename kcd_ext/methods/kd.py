"""Knowledge distillation (Hinton et al., 2015): the teacher's softened answers beside the labels."""

import torch
from torch import Tensor, nn

from .. import reference
from ..losses import condensed_kd_loss
from ..ops import has_kernels_for
from .options import check_batch_keep, check_temperature, check_weight
from .protocol import Batch, Method, Outcome
from .selection import choose, of_rows


class KnowledgeDistillation(Method):
    """loss = ce_weight * CE + kd_weight * T^2 * KL(teacher || student), means over the batch; value: student's entropy.

    With `batch.weight` it is mean_i(weight_i * losses_i), losses_i = ce_weight * CE_i + kd_weight * T^2 * KL_i, and
    `Outcome.losses` holds them. Without, there are no `losses`: one operator gives the mean, and they would cost another.

    With `batch_keep` < 1 the mean of the KL is that of the k chosen rows, in losses_i as b/k * [i is chosen] * KL_i.

    Args:
        temperature: T > 0; 4 in the recipe of KCD.
        kd_weight, ce_weight: finite; 0.9 and 0.1 in the recipe of KCD.
        batch_keep: the fraction of every batch that the teacher is asked about, in (0, 1], by the student's entropy,
            the highest first (`selection.choose`). 1: all.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """

    weighs_samples = True

    def __init__(
        self, temperature: float = 4.0, kd_weight: float = 0.9, ce_weight: float = 0.1, batch_keep: float = 1.0
    ):
        super().__init__()
        self.temperature = check_temperature("temperature", temperature)
        self.kd_weight = check_weight("kd_weight", kd_weight)
        self.ce_weight = check_weight("ce_weight", ce_weight)
        self.batch_keep = check_batch_keep(batch_keep)

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """`terms["kl"]`: the mean KL divergence at temperature T, in nats, without its weight and T^2."""
        logits = student(batch.x)
        rows = choose(logits, self.batch_keep)
        with torch.no_grad():
            teacher_logits = teacher(of_rows(batch.x, rows))
        options = {"temperature": self.temperature, "labels": batch.label, "rows": rows, "ce_weight": self.ce_weight}
        if batch.weight is None:
            loss, knowledge = kd_loss(
                logits, teacher_logits, **options, kd_weight=self.kd_weight, return_knowledge=True
            )
            losses = None
        else:
            # A mean over the batch, here and below, that is the chosen rows' own mean of the KL.
            kd_weight = self.kd_weight * len(logits) / len(teacher_logits)
            losses, knowledge = kd_loss(
                logits, teacher_logits, **options, kd_weight=kd_weight, reduction="none", return_knowledge=True
            )
            loss, losses = (batch.weight * losses).mean(), losses.detach()
        terms = {"kl": of_rows(knowledge.kl, rows).detach().mean()}
        return Outcome(loss, logits.detach(), knowledge.entropy.detach(), terms, losses)


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, **options):
    """`kcd_ext.condensed_kd_loss` where it has kernels; elsewhere the reference, which gives the same numbers."""
    fused = has_kernels_for(student_logits)
    return (condensed_kd_loss if fused else reference.condensed_kd_loss)(student_logits, teacher_logits, **options)
