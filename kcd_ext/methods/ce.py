"""Plain training with labels: the student on its own, and how teachers are trained."""

from torch import nn
from torch.nn import functional

from .protocol import Batch, Method, Outcome, entropy


class CrossEntropy(Method):
    """Plain training with labels: loss = CE, the cross entropy. Needs no teacher.

    The knowledge value of a sample is the network's entropy, so condensation works here too.

    With `batch.weight` the loss is mean_i(weight_i * CE_i), and `Outcome.losses` holds the CE_i. Without it, `losses` is
    None.
    """

    needs_teacher = False
    weighs_samples = True
    takes_soft_labels = True

    def __init__(self):
        super().__init__()

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """Return the loss of a batch. A teacher, if there is one, is not called."""
        logits = student(batch.x)
        if batch.weight is None:
            losses, loss = None, functional.cross_entropy(logits, batch.label)
        else:
            losses = functional.cross_entropy(logits, batch.label, reduction="none")
            loss = (batch.weight * losses).mean()
        return Outcome(loss, logits.detach(), entropy(logits), losses=None if losses is None else losses.detach())
