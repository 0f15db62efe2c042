"""No distillation: cross entropy with the labels. The student alone, and how a teacher is trained."""

from torch import nn
from torch.nn import functional

from .protocol import Batch, Method, Outcome, entropy


class CrossEntropy(Method):
    """loss = cross entropy; the value of a sample is the network's entropy, so that condensation works here too.

    With `batch.weight` it is mean_i(weight_i * CE_i), and `Outcome.losses` are the CE_i; without, there are no `losses`.
    """

    needs_teacher = False
    weighs_samples = True

    def __init__(self):
        super().__init__()

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """The teacher, if there is one, is not asked."""
        logits = student(batch.x)
        if batch.weight is None:
            losses, loss = None, functional.cross_entropy(logits, batch.label)
        else:
            losses = functional.cross_entropy(logits, batch.label, reduction="none")
            loss = (batch.weight * losses).mean()
        return Outcome(loss, logits.detach(), entropy(logits), losses=None if losses is None else losses.detach())
