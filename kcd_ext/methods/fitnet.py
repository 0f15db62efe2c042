"""FitNets (Romero et al., ICLR 2015): a middle stage of the student predicts the teacher's maps."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from ..checks import check_bool, check_finite
from .features import StageMethod, at_least_float32, full_precision, pool_to_common_size
from .normalisation import BatchNormalisation
from .protocol import Batch, Outcome
from .row_losses import outcome_of_rows
from .selection import select_batch_rows, take_rows


class FitNets(StageMethod):
    """FitNets (hints), Romero et al., ICLR 2015.

        loss = ce_weight * CE + hint_weight * HINT

    The knowledge value is the student's entropy. A regressor, trained with the student, predicts the teacher's maps of one
    layer from the student's: a 1x1 convolution, batch normalisation and ReLU. HINT is the mean squared error over samples,
    channels and positions, summed over the pairs of layers if you name several. If two maps differ in height or width, both
    are averaged to the smaller one first (adaptive average pooling).

    Loss, regressor and weights follow RepDistiller's code, which mdistiller shares: the hint is learnt together with the
    labels. The paper instead trains the student's first half on the hint alone, then the whole student by KD: first train
    with ce_weight=0, then with kd, to do that. Difference: for maps of different sizes RepDistiller's regressor has a
    convolution with a stride or a larger kernel, and refuses most sizes.

    A regressor adds to the FLOPs of a step, so they are not counted.

    Args:
        ce_weight: Weight of the cross entropy, finite; 1 in RepDistiller's comparison.
        hint_weight: Weight of HINT, finite; 100 in the same comparison.
        relu: End the regressor in ReLU, as the layers of most networks do. False: for layers with negative outputs.
        batch_keep: Fraction of each batch that the teacher runs on and whose maps are compared, in (0, 1]: the rows of
            highest student entropy (`selection.select_batch_rows`). 1: all rows.
        label_smoothing: Label smoothing of the cross entropy, in [0, 1].
        student_layers: The student's layers whose outputs are compared, names in `named_modules()` with commas between them,
            e.g. layer2. Both networks need the same number of layers. None: the middle one of the network's `stages`, which
            all networks in `kcd_ext.models` have; of an even number the earlier one.
        teacher_layers: The same for the teacher.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """

    weighs_samples = True
    takes_soft_labels = True
    flops_known = False

    def __init__(
        self,
        ce_weight: float = 1.0,
        hint_weight: float = 100.0,
        relu: bool = True,
        batch_keep: float = 1.0,
        label_smoothing: float = 0.0,
        student_layers: str | None = None,
        teacher_layers: str | None = None,
    ):
        super().__init__(student_layers, teacher_layers, batch_keep)
        self.set_options(check_finite, ce_weight=ce_weight, hint_weight=hint_weight)
        self.set_options(check_bool, relu=relu)
        self.set_label_smoothing(label_smoothing, ce_weight)

    def default_layers(self, stages: Sequence[str]) -> Sequence[str]:
        """Return the middle stage."""
        return stages[(len(stages) - 1) // 2 :][:1]

    def prepare(self, student: nn.Module, teacher: nn.Module | None, samples: Iterable[Batch]) -> None:
        """Tap both networks and build the regressors."""
        super().prepare(student, teacher, samples)
        self.regressors = nn.ModuleList(
            Regressor(own[0], target[0], self.relu)
            for own, target in zip(self.student_shapes, self.teacher_shapes, strict=True)
        ).to(next(iter(samples)).x.device)

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """Return the loss of a batch. `terms["hint"]` is HINT without its weight."""
        logits, maps = self.student_forward(student, batch.x)
        rows = select_batch_rows(logits, self.batch_keep)
        _, targets = self.teacher_forward(teacher, take_rows(batch.x, rows))
        losses = sum(
            _hint_losses(regressor, take_rows(x, rows), target)
            for regressor, x, target in zip(self.regressors, maps, targets, strict=True)
        )
        options = {"ce_weight": self.ce_weight, "label_smoothing": self.label_smoothing}
        return outcome_of_rows(batch, logits, rows, {"hint": losses}, {"hint": self.hint_weight}, **options)


class Regressor(nn.Sequential):
    """A 1x1 convolution, batch normalisation and optionally ReLU: maps (b, in_channels, h, w) -> (b, out_channels, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, relu: bool):
        super().__init__(nn.Conv2d(in_channels, out_channels, 1), BatchNormalisation(out_channels), *[nn.ReLU()] * relu)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the predicted maps, in the regressor's own dtype outside autocast."""
        return super().forward(maps.to(self[0].weight.dtype))


def _hint_losses(regressor: Regressor, maps: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error (b,) of each sample's predicted maps, at least float32."""
    maps, target = pool_to_common_size(maps, target)
    predicted = regressor(maps)
    with full_precision(predicted):
        return (at_least_float32(predicted) - at_least_float32(target)).square().flatten(1).mean(1)
