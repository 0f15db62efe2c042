"""No distillation: cross entropy with the labels. The student alone, and how a teacher is trained."""

from torch import nn
from torch.nn import functional

from .protocol import Batch, Method, Outcome, entropy


class CrossEntropy(Method):
    """loss = cross entropy; the value of a sample is the network's entropy, so that condensation works here too."""

    needs_teacher = False

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """The teacher, if there is one, is not asked."""
        logits = student(batch.x)
        loss = functional.cross_entropy(logits, batch.label)
        return Outcome(loss, logits.detach(), entropy(logits))
