"""Plain training with labels: the student on its own, and how teachers are trained."""

from torch import nn
from torch.nn import functional

from .protocol import Batch, Method, Outcome, entropy


class CrossEntropy(Method):
    """Plain training with labels: loss = CE, the cross entropy. Needs no teacher.

    The knowledge value of a sample is the network's entropy, so condensation works here too.

    With `batch.weight` the loss is mean_i(weight_i * CE_i), and `Outcome.losses` holds the CE_i. Without it, `losses` is
    None.

    Args:
        label_smoothing: Label smoothing of the cross entropy, in [0, 1].

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """

    needs_teacher = False
    weighs_samples = True
    takes_soft_labels = True

    def __init__(self, label_smoothing: float = 0.0):
        super().__init__()
        self.set_label_smoothing(label_smoothing)

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """Return the loss of a batch. A teacher, if there is one, is not called."""
        logits = student(batch.x)
        smoothing = self.label_smoothing
        if batch.weight is None:
            losses, loss = None, functional.cross_entropy(logits, batch.label, label_smoothing=smoothing)
        else:
            losses = functional.cross_entropy(logits, batch.label, reduction="none", label_smoothing=smoothing)
            loss = (batch.weight * losses).mean()
        return Outcome(loss, logits.detach(), entropy(logits), losses=None if losses is None else losses.detach())
