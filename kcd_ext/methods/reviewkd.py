"""Knowledge review (ReviewKD; Chen et al., CVPR 2021): the student's deep stages help its early ones to match the teacher."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checks import check_finite, check_int
from .features import StageMethod, at_least_float32, full_precision
from .normalisation import BatchNormalisation
from .protocol import Batch, Outcome
from .row_losses import outcome_of_rows, warm_up
from .selection import select_batch_rows, take_rows

LEVELS = (4, 2, 1)  # sizes of the pooled maps that the hierarchical context loss compares, after the full ones


class KnowledgeReview(StageMethod):
    """Knowledge review (ReviewKD), Chen et al., CVPR 2021.

        loss = ce_weight * CE + ramp * review_weight * REVIEW

    The knowledge value is the student's entropy. The levels are the maps of the named layers, and the last of them averaged
    to one pixel. From the deepest level to the first, a module (`AttentionFusion`), trained with the student, fuses a level's
    map with what the level below it returned, and predicts the teacher's map. REVIEW is the sum over the levels of the
    hierarchical context loss: the mean squared error of the maps, and of both averaged to 4 x 4, 2 x 2 and 1 x 1 pixels (only
    to sizes below their own), with weights 1, 1/2, 1/4, ..., divided by the sum of the weights.

    In the first `warmup` epochs, the ramp is (epoch + 1) / warmup, then 1.

    Modules, loss and defaults follow the authors' code, also in mdistiller. Differences: the teacher's maps are the outputs of
    the named layers, while theirs are taken before the last activation of a stage; and maps need not be square.

    The modules add to the FLOPs of a step, so they are not counted.

    Args:
        ce_weight: Weight of the cross entropy, finite; 1 as published.
        review_weight: Weight of REVIEW, finite; 1 is mdistiller's default, and the published experiments tune it for each
            pair of networks, from 0.6 to 8.
        mid_channels: Largest number of channels inside the modules, >= 1; 512 as published. The number of the student's
            deepest map, if that is smaller.
        warmup: Number of epochs in which REVIEW grows to its weight, >= 0; 20 of 240 as published. 0: no ramp.
        batch_keep: Fraction of each batch that the teacher runs on and whose maps are compared, in (0, 1]: the rows of
            highest student entropy (`selection.select_batch_rows`). 1: all rows.
        label_smoothing: Label smoothing of the cross entropy, in [0, 1].
        student_layers: The student's layers whose outputs are compared, from early to deep, names in `named_modules()` with
            commas between them, e.g. layer1,layer2. Both networks need the same number of layers. None: the network's
            `stages`, which all networks in `kcd_ext.models` have.
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
        review_weight: float = 1.0,
        mid_channels: int = 512,
        warmup: int = 20,
        batch_keep: float = 1.0,
        label_smoothing: float = 0.0,
        student_layers: str | None = None,
        teacher_layers: str | None = None,
    ):
        super().__init__(student_layers, teacher_layers, batch_keep)
        self.set_options(check_finite, ce_weight=ce_weight, review_weight=review_weight)
        self.mid_channels = check_int("mid_channels", mid_channels, 1)
        self.warmup = check_int("warmup", warmup, 0)
        self.set_label_smoothing(label_smoothing, ce_weight)
        self.ramp = 1.0

    def prepare(self, student: nn.Module, teacher: nn.Module | None, samples: Iterable[Batch]) -> None:
        """Tap both networks and build a module for each level."""
        super().prepare(student, teacher, samples)
        own, target = ([shape[0] for shape in shapes] for shapes in (self.student_shapes, self.teacher_shapes))
        own, target = [*own, own[-1]], [*target, target[-1]]
        mid = min(self.mid_channels, own[-1])
        self.fusions = nn.ModuleList(
            AttentionFusion(channels, mid, out, fuses=level < len(own) - 1)
            for level, (channels, out) in enumerate(zip(own, target, strict=True))
        ).to(next(iter(samples)).x.device)

    def begin(self, epoch: int, epochs: int) -> None:
        """Set the ramp."""
        self.ramp = warm_up(epoch, self.warmup)

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """Return the loss of a batch. `terms["review"]` is REVIEW without its weight and ramp."""
        logits, maps = self.student_forward(student, batch.x)
        rows = select_batch_rows(logits, self.batch_keep)
        _, targets = self.teacher_forward(teacher, take_rows(batch.x, rows))
        losses = self.review([take_rows(x, rows) for x in maps], targets)
        weights = {"review": self.ramp * self.review_weight}
        options = {"ce_weight": self.ce_weight, "label_smoothing": self.label_smoothing}
        return outcome_of_rows(batch, logits, rows, {"review": losses}, weights, **options)

    def review(self, maps: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Return REVIEW of each sample (k,), at least float32, from both networks' maps (k, c, h, w)."""
        maps, targets = ([*found, found[-1].mean((2, 3), keepdim=True)] for found in (maps, targets))
        total, deeper = 0, None
        for fusion, x, target in reversed([*zip(self.fusions, maps, targets, strict=True)]):
            predicted, deeper = fusion(x, deeper, target.shape[-2:])
            with full_precision(predicted):
                total = total + hierarchical_context_losses(at_least_float32(predicted), at_least_float32(target))
        return total


class AttentionFusion(nn.Module):
    """The attention-based fusion (ABF) of a level with the level below it.

    Args:
        in_channels: Channels of the student's map.
        mid_channels: Channels of the fused map.
        out_channels: Channels of the teacher's map.
        fuses: False for the deepest level, which has nothing to fuse with.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, fuses: bool):
        super().__init__()
        self.narrow = nn.Conv2d(in_channels, mid_channels, 1, bias=False)
        self.narrow_norm = BatchNormalisation(mid_channels)
        self.attention = nn.Conv2d(2 * mid_channels, 2, 1) if fuses else None
        self.predict = nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False)
        self.predict_norm = BatchNormalisation(out_channels)
        for convolution in (self.narrow, self.predict):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, x: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the predicted and the fused map, in the module's own dtype outside autocast.

        Args:
            x: The student's map (b, in_channels, h, w).
            deeper: The fused map (b, mid_channels, any, any) of the next deeper level; None for the deepest.
            size: Height and width of the teacher's map.
        """
        x = self.narrow_norm(self.narrow(x.to(self.narrow.weight.dtype)))
        if self.attention is not None:
            deeper = functional.interpolate(deeper, x.shape[-2:], mode="nearest")
            share = self.attention(torch.cat([x, deeper], 1)).sigmoid()
            x = x * share[:, :1] + deeper * share[:, 1:]
        if x.shape[-2:] != tuple(size):
            x = functional.interpolate(x, tuple(size), mode="nearest")
        return self.predict_norm(self.predict(x)), x


def hierarchical_context_losses(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the hierarchical context loss (b,) of maps (b, c, h, w) of one shape."""
    losses, weights = [_squared_errors(student, teacher)], [1.0]
    for size in LEVELS:
        if size < min(student.shape[-2:]):
            losses.append(_squared_errors(*(functional.adaptive_avg_pool2d(x, size) for x in (student, teacher))))
            weights.append(weights[-1] / 2)
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)


def _squared_errors(one: Tensor, other: Tensor) -> Tensor:
    """Return the mean squared difference (b,) of each sample's entries."""
    return (one - other).square().flatten(1).mean(1)
