"""Self-supervised knowledge distillation (SSKD; Xu et al., ECCV 2020): rotated views, and which image each one shows."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checks import (
    check_bool,
    check_finite,
    check_fractions,
    check_int,
    check_non_negative,
    check_positive,
    check_unit_interval,
)
from .features import FeatureMethod, full_precision, unit_rows
from .kd import distill_rows, kd_loss, of_all_rows, standardized
from .protocol import Batch, Outcome, Pretraining
from .selection import select_batch_rows, take_rows

VIEWS = 4  # rotations by 0, 90, 180 and 270 degrees; the first is the normal view, the others are transformed


class SelfSupervisedKnowledgeDistillation(FeatureMethod):
    """Self-supervised knowledge distillation (SSKD), Xu et al., ECCV 2020.

        loss = ce_weight * CE + kd_weight * KD
             + transformed_weight * TF + similarity_weight * SS

    The knowledge value of a sample is the student's entropy on its normal view. Each of KD, TF and SS is
    T^2 * mean KL(teacher || student) with its own temperature T:

    - KD: of the normal views' logits. CE is on the same logits.
    - TF: of the transformed views' logits.
    - SS: of the similarities of each transformed view to all normal views of the batch. A similarity is the cosine of two
      embeddings, which two-layer heads compute from the penultimate features. The teacher's head is trained first
      (`pretraining`) to tell which image a view shows, by the cross entropy of the plain cosines. The student's head trains
      with the student.

    TF and SS are means over selected rows: all rows where the teacher is right, and a given ratio of those where it is wrong.
    These are the rows of lowest error level, the number of classes (TF) or images (SS) that the teacher ranks above the truth.
    Ties go to the lower row. Rows are ordered by image, then by angle. (The authors' first code kept the ratio of the right
    rows by mistake, and was corrected. The number of wrong rows kept is rounded down, as there.)

    Two differences from the authors' code: all views are rotations of one augmented image, while theirs crops each view on
    its own; and a mean over no rows is 0, while theirs is NaN.

    The student sees all 4 b views in one forward pass, so its normalisation layers see them together too.

    Args:
        temperature: T of the normal views' KL (KD), > 0.
        transformed_temperature: T of the transformed views' KL (TF), > 0.
        similarity_temperature: T of the similarities' KL (SS), > 0.
        ce_weight: Weight of the cross entropy, finite; 0.1 as published.
        kd_weight: Weight of the normal views' KL (KD), finite; 0.9 as published.
        transformed_weight: Weight of the transformed views' KL (TF), finite; 2.7 as published.
        similarity_weight: Weight of the similarities' KL (SS), finite; 10 as published.
        transformed_ratio: Fraction to keep of those TF rows where the teacher is wrong, in [0, 1].
        similarity_ratio: Fraction to keep of those SS rows where the teacher is wrong, in [0, 1].
        head_epochs: Epochs for the teacher's head, >= 1.
        head_lr: Learning rate for the teacher's head, >= 0.
        head_milestones: Fractions of `head_epochs` at which `head_lr` drops to a tenth. On the command line, write several
            as "0.5,0.75", and none as "".
        batch_keep: Fraction of each batch that the teacher runs on, in (0, 1]: the images whose normal views have the
            highest student entropy (`selection.select_batch_rows`). KD, TF and SS use all views of these images and no
            others. 1: all images.
        student_layer: The student's layer whose input is embedded, a name in `named_modules()` (`features.Tap`). None: the last
            linear layer.
        teacher_layer: The same for the teacher.
        label_smoothing: Label smoothing of the cross entropy, in [0, 1].
        standardize: Compare the z-scores of each row's logits in KD and TF (`kd.standardized`, Sun et al., CVPR 2024).

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        transformed_temperature: float = 4.0,
        similarity_temperature: float = 0.5,
        ce_weight: float = 0.1,
        kd_weight: float = 0.9,
        transformed_weight: float = 2.7,
        similarity_weight: float = 10.0,
        transformed_ratio: float = 1.0,
        similarity_ratio: float = 0.75,
        head_epochs: int = 60,
        head_lr: float = 0.05,
        head_milestones: Sequence[float] | float | str = (0.5, 0.75),
        batch_keep: float = 1.0,
        student_layer: str | None = None,
        teacher_layer: str | None = None,
        label_smoothing: float = 0.0,
        standardize: bool = False,
    ):
        super().__init__(student_layer, teacher_layer, batch_keep)
        self.set_options(
            check_positive,
            temperature=temperature,
            transformed_temperature=transformed_temperature,
            similarity_temperature=similarity_temperature,
        )
        self.set_options(
            check_finite,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            transformed_weight=transformed_weight,
            similarity_weight=similarity_weight,
        )
        self.set_options(check_unit_interval, transformed_ratio=transformed_ratio, similarity_ratio=similarity_ratio)
        self.set_label_smoothing(label_smoothing, ce_weight)
        self.set_options(check_bool, standardize=standardize)
        self.head_epochs = check_int("head_epochs", head_epochs, 1)
        self.set_options(check_non_negative, head_lr=head_lr)
        self.head_milestones = check_fractions(
            "head_milestones", head_milestones, "fractions of head_epochs in [0, 1], such as 0.5,0.75"
        )

    def prepare(self, student: nn.Module, teacher: nn.Module | None, samples: Iterable[Batch]) -> None:
        """Build both heads. Raises ValueError if x is not a batch of square images."""
        super().prepare(student, teacher, samples)
        device = next(iter(samples)).x.device
        self.student_head = _make_head(self.student_width).to(device)
        self.teacher_head = _make_head(self.teacher_width).to(device)

    def network_input(self, x: Tensor) -> Tensor:
        """Return the views (4 b, c, h, h) of images (b, c, h, h), the four views of an image in consecutive rows.

        Raises ValueError for any other shape.
        """
        if x.dim() != 4 or x.shape[-1] != x.shape[-2]:
            raise ValueError(f"sskd rotates images: x must be square images (b, c, h, h), got shape {tuple(x.shape)}")
        return torch.stack([x.rot90(turns, (-2, -1)) for turns in range(VIEWS)], 1).flatten(0, 1)

    def pretraining(self) -> tuple[Pretraining, ...]:
        """Return the plan for the teacher's head; 60 epochs as published."""
        return (Pretraining(self.teacher_head, self._head_loss, self.head_epochs, self.head_lr, self.head_milestones),)

    def _head_loss(self, teacher: nn.Module | None, batch: Batch) -> Tensor:
        """Return the cross entropy () of the cosines (3 b, b) of transformed to normal views; the truth is each view's image."""
        _, features = self.teacher_forward(teacher, self.network_input(batch.x))
        with full_precision(features):
            similarity = _cosines(self.teacher_head(features.float()))
            return functional.cross_entropy(similarity, _true_images(similarity))

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """Return the loss of a batch.

        `terms` are "kl", "transformed" and "similarity", the three mean KL divergences in nats, without their weights and T^2.
        """
        views = self.network_input(batch.x)
        logits, features = self.student_forward(student, views)
        normal, transformed = _normal_and_transformed(logits)
        rows = select_batch_rows(normal, self.batch_keep)
        target_logits, target_features = self.teacher_forward(teacher, _take_images(views, rows))
        target_normal, target_transformed = _normal_and_transformed(target_logits)

        weights = {"temperature": self.temperature, "kd_weight": self.kd_weight, "ce_weight": self.ce_weight}
        weights |= {"label_smoothing": self.label_smoothing, "standardize": self.standardize}
        loss, value, kl = distill_rows(normal, target_normal, batch.label, rows, **weights)
        with full_precision(logits):
            similarity = _cosines(self.student_head(_take_images(features, rows).float()))
            with torch.no_grad():
                target_similarity = _cosines(self.teacher_head(target_features.float()))
        label = take_rows(batch.label, rows)[:, None].expand(-1, VIEWS - 1).flatten()
        compared = (take_rows(transformed, rows).flatten(0, 1), target_transformed.flatten(0, 1))
        transformed_kl = _selected_kl(
            *(standardized(x) if self.standardize else x for x in compared),
            truth=label,
            ratio=self.transformed_ratio,
            temperature=self.transformed_temperature,
        )
        similarity_kl = _selected_kl(
            similarity,
            target_similarity,
            truth=_true_images(similarity),
            ratio=self.similarity_ratio,
            temperature=self.similarity_temperature,
        )
        loss = loss + self.transformed_weight * self.transformed_temperature**2 * transformed_kl
        loss = loss + self.similarity_weight * self.similarity_temperature**2 * similarity_kl
        terms = {"kl": kl.mean(), "transformed": transformed_kl.detach(), "similarity": similarity_kl.detach()}
        return Outcome(loss, normal.detach(), value, terms, kl=of_all_rows(kl, rows))


def _make_head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def _normal_and_transformed(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split all views (4 b, c) into normal ones (b, c) and transformed ones (b, 3, c)."""
    normal, transformed = x.unflatten(0, (-1, VIEWS)).split((1, VIEWS - 1), 1)
    return normal.squeeze(1), transformed


def _take_images(x: Tensor, rows: Tensor | None) -> Tensor:
    """Return the views (4 k, ...) of the images `rows` (k,) from all views (4 b, ...). None: all of them."""
    return x if rows is None else take_rows(x.unflatten(0, (-1, VIEWS)), rows).flatten(0, 1)


def _cosines(embeddings: Tensor) -> Tensor:
    """Return the cosines (3 b, b) of each transformed view to each normal view, from embeddings (4 b, d)."""
    normal, transformed = _normal_and_transformed(unit_rows(embeddings))
    return transformed.flatten(0, 1) @ normal.T


def _true_images(similarity: Tensor) -> Tensor:
    """Return the index (3 b,) of the image that each transformed view shows."""
    return torch.arange(len(similarity), device=similarity.device) // (VIEWS - 1)


def _selected_kl(student: Tensor, teacher: Tensor, *, truth: Tensor, ratio: float, temperature: float) -> Tensor:
    """Return the mean KL divergence () at this temperature, in nats, over the rows of `select_least_wrong`.

    Args:
        student: Scores (r, c).
        teacher: Scores (r, c).
        truth: (r,).
        ratio: See `select_least_wrong`.
        temperature: T > 0.
    """
    if student.shape[1] == 1:  # a batch of one image has one similarity
        return 0 * student.sum()
    selected, number = select_least_wrong(teacher, truth, ratio)
    total = kd_loss(student, teacher, temperature=temperature, row_weight=selected, reduction="sum")
    return total / (temperature**2 * number.clamp(min=1))


def select_least_wrong(score: Tensor, truth: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Select the rows where the truth has the highest score, and the fraction `ratio` of the others that are least wrong.

    A row is the less wrong, the fewer scores exceed that of its truth. Ties go to the lower row.

    Args:
        score: (r, c). A row whose truth has the score NaN counts as right, so that it reaches the loss.
        truth: int64 (r,).
        ratio: In [0, 1]; the number of other rows selected is rounded down.

    Returns:
        A mask, bool (r,), and the number of selected rows, int64 ().
    """
    level = (score > score.gather(1, truth[:, None])).sum(1)
    right = (level == 0).sum()
    number = right + ((len(level) - right).double() * ratio).long()
    first = torch.arange(len(level), device=level.device) < number
    return torch.zeros_like(first).scatter(0, level.argsort(stable=True), first), number
