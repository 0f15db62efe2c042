"""Probabilistic knowledge transfer (Passalis and Tefas, ECCV 2018): which samples of a batch resemble each other."""

from torch import Tensor, nn
from torch.nn import functional

from ..checks import check_finite
from .features import FeatureMethod, full_precision, unit_rows
from .protocol import Batch, Outcome, entropy
from .selection import select_batch_rows, take_rows

EPSILON = 1e-7  # added to both probabilities inside the logarithm, as in the published code


class ProbabilisticKnowledgeTransfer(FeatureMethod):
    """Probabilistic knowledge transfer (PKT) of the penultimate features, Passalis and Tefas, ECCV 2018.

        loss = ce_weight * CE + pkt_weight * PKT

    The knowledge value is the student's entropy. For the features f of a batch, let K_ij = (1 + cos(f_i, f_j)) / 2 (Eq. 6
    with the cosine kernel, i = j included), and P_ij = K_ij / sum_j K_ij. Then

        PKT = mean_ij P_ij * log((P_ij + 1e-7) / (Q_ij + 1e-7)).

    P is the teacher's, Q the student's. The mean runs over all b * b pairs, as in the published code (RepDistiller's, after
    the authors'); it is not a sum over j. So PKT is the batch's mean KL divergence divided by b, and the published weight of
    30000 belongs to that.

    Args:
        ce_weight: Weight of the cross entropy, finite; 1 in RepDistiller's comparison, which KCD builds on.
        pkt_weight: Weight of the similarity term, PKT, finite; 30000 in the same comparison.
        batch_keep: Fraction of each batch that the teacher runs on and whose features are compared, in (0, 1]: the rows of
            highest student entropy (`selection.select_batch_rows`). 1: all rows.
        student_layer: The student's layer whose input is compared, a name in `named_modules()` (`features.Tap`). None: the last
            linear layer.
        teacher_layer: The same for the teacher.
        label_smoothing: Label smoothing of the cross entropy, in [0, 1].

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """

    takes_soft_labels = True

    def __init__(
        self,
        ce_weight: float = 1.0,
        pkt_weight: float = 30000.0,
        batch_keep: float = 1.0,
        student_layer: str | None = None,
        teacher_layer: str | None = None,
        label_smoothing: float = 0.0,
    ):
        super().__init__(student_layer, teacher_layer, batch_keep)
        self.set_options(check_finite, ce_weight=ce_weight, pkt_weight=pkt_weight)
        self.set_label_smoothing(label_smoothing, ce_weight)

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """Return the loss of a batch. `terms["pkt"]` is PKT without its weight."""
        logits, features = self.student_forward(student, batch.x)
        rows = select_batch_rows(logits, self.batch_keep)
        _, target = self.teacher_forward(teacher, take_rows(batch.x, rows))
        pkt = transfer_loss(take_rows(features, rows), target)
        cross_entropy = functional.cross_entropy(logits, batch.label, label_smoothing=self.label_smoothing)
        loss = self.ce_weight * cross_entropy + self.pkt_weight * pkt
        return Outcome(loss, logits.detach(), entropy(logits), {"pkt": pkt.detach()})


def transfer_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return PKT of features (b, d) and (b, e): (), at least float32, differentiable in both."""
    with full_precision(student):
        q, p = _similarities(student), _similarities(teacher)
        # The logarithm of one quotient near 1 is more precise than the difference of two logarithms.
        return (p * ((p + EPSILON) / (q + EPSILON)).log()).mean()


def _similarities(features: Tensor) -> Tensor:
    """Return probabilities (b, b), one row per sample."""
    directions = unit_rows(features)
    kernel = (directions @ directions.T + 1) / 2
    return kernel / kernel.sum(1, keepdim=True)
