"""Attention transfer (Zagoruyko and Komodakis, ICLR 2017): where in the image each stage of the networks is active."""

from torch import Tensor, nn

from ..checks import check_finite, check_float
from .features import StageMethod, at_least_float32, full_precision, pool_to_common_size, unit_rows
from .protocol import Batch, Outcome
from .row_losses import outcome_of_rows
from .selection import select_batch_rows, take_rows


class AttentionTransfer(StageMethod):
    """Activation-based attention transfer (AT), Zagoruyko and Komodakis, ICLR 2017.

        loss = ce_weight * CE + at_weight * AT

    The knowledge value is the student's entropy. The attention map of a sample's maps F (c, h, w) is

        A = mean over the channels of |F|^power, flattened and divided by its length,

    and AT is the sum over the pairs of layers of the mean of (A_student - A_teacher)^2 over samples and positions. If two maps
    differ in height or width, both are averaged to the smaller one first (adaptive average pooling of F).

    Loss and defaults follow RepDistiller's code, which follows the authors' (mean instead of sum over the channels, squared
    differences, weight 1000). Differences: maps may differ in size in either direction and need not be square, and a sample
    whose maps are zeros has A = 0 and passes no gradient.

    Args:
        ce_weight: Weight of the cross entropy, finite; 1 in RepDistiller's comparison.
        at_weight: Weight of AT, finite; 1000 in the same comparison.
        power: Exponent of the activations, finite and >= 1.
        batch_keep: Fraction of each batch that the teacher runs on and whose maps are compared, in (0, 1]: the rows of
            highest student entropy (`selection.select_batch_rows`). 1: all rows.
        label_smoothing: Label smoothing of the cross entropy, in [0, 1].
        student_layers: The student's layers whose outputs are compared, names in `named_modules()` with commas between them,
            e.g. layer1,layer2. Both networks need the same number of layers. None: the network's `stages`, which all
            networks in `kcd_ext.models` have.
        teacher_layers: The same for the teacher.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """

    weighs_samples = True
    takes_soft_labels = True

    def __init__(
        self,
        ce_weight: float = 1.0,
        at_weight: float = 1000.0,
        power: float = 2.0,
        batch_keep: float = 1.0,
        label_smoothing: float = 0.0,
        student_layers: str | None = None,
        teacher_layers: str | None = None,
    ):
        super().__init__(student_layers, teacher_layers, batch_keep)
        self.set_options(check_finite, ce_weight=ce_weight, at_weight=at_weight)
        self.power = check_float("power", power, "a finite number >= 1", 1)
        self.set_label_smoothing(label_smoothing, ce_weight)

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """Return the loss of a batch. `terms["at"]` is AT without its weight."""
        logits, maps = self.student_forward(student, batch.x)
        rows = select_batch_rows(logits, self.batch_keep)
        _, targets = self.teacher_forward(teacher, take_rows(batch.x, rows))
        with full_precision(logits):
            losses = sum(
                attention_losses(take_rows(x, rows), target, self.power)
                for x, target in zip(maps, targets, strict=True)
            )
            options = {"ce_weight": self.ce_weight, "label_smoothing": self.label_smoothing}
            return outcome_of_rows(batch, logits, rows, {"at": losses}, {"at": self.at_weight}, **options)


def attention_losses(student: Tensor, teacher: Tensor, power: float) -> Tensor:
    """Return the mean squared difference (b,) of two maps' attention, at least float32. Maps: (b, any, any, any)."""
    student, teacher = pool_to_common_size(at_least_float32(student), at_least_float32(teacher))
    return (_attention(student, power) - _attention(teacher, power)).square().mean(1)


def _attention(maps: Tensor, power: float) -> Tensor:
    """Return the attention (b, h * w) of maps (b, c, h, w), of length 1."""
    activity = maps * maps if power == 2 else maps.abs().pow(power)
    # Not `mean(1)`: autograd writes the gradient of that mean out in full, perhaps in another layout than that of the maps.
    return unit_rows((activity.sum(1) / maps.shape[1]).flatten(1), offset=0)
