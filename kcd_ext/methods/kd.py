"""Knowledge distillation (Hinton et al., 2015): the teacher's softened answers beside the labels."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import reference
from ..arguments import check_number, check_temperature
from ..knowledge import Knowledge
from ..losses import condensed_kd_loss
from ..ops import has_kernels_for
from .protocol import Batch, Method, Outcome


class KnowledgeDistillation(Method):
    """loss = ce_weight * CE + kd_weight * T^2 * KL(teacher || student), means over the batch; value: student's entropy.

    Args:
        temperature: T > 0; 4 in the recipe of KCD.
        kd_weight, ce_weight: finite; 0.9 and 0.1 in the recipe of KCD.
    """

    def __init__(self, temperature: float = 4.0, kd_weight: float = 0.9, ce_weight: float = 0.1):
        super().__init__()
        self.temperature = check_temperature(temperature)
        self.kd_weight = check_number("kd_weight", kd_weight)
        self.ce_weight = check_number("ce_weight", ce_weight)

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """`terms["kl"]`: the mean KL divergence at temperature T, in nats, without its weight and T^2."""
        with torch.no_grad():
            teacher_logits = teacher(batch.x)
        logits = student(batch.x)
        loss, knowledge = _loss_for(logits)(
            logits,
            teacher_logits,
            temperature=self.temperature,
            labels=batch.label,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            return_knowledge=True,
        )
        return Outcome(loss, logits.detach(), knowledge.entropy.detach(), {"kl": knowledge.kl.detach().mean()})


def _loss_for(logits: Tensor) -> Callable[..., tuple[Tensor, Knowledge]]:
    """The fused operator where it has kernels; elsewhere the reference gives the same numbers."""
    return condensed_kd_loss if has_kernels_for(logits) else reference.condensed_kd_loss
