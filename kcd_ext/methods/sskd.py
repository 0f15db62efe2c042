"""Distillation with self-supervision (Xu et al., SSKD, ECCV 2020): rotated views, and which image each one is of."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checks import (
    check_finite,
    check_fractions,
    check_int,
    check_non_negative,
    check_positive,
    check_unit_interval,
)
from .features import FeatureMethod, full_precision, unit_rows
from .kd import distill_rows, kd_loss
from .protocol import Batch, Outcome, Pretraining
from .selection import select_batch_rows, take_rows

VIEWS = 4  # an image turned by 0, 90, 180 and 270 degrees; the first is the normal view, the others are transformed


class SelfSupervisedKnowledgeDistillation(FeatureMethod):
    """loss = ce_weight * CE + kd_weight * KD + transformed_weight * TF + similarity_weight * SS.

    The value of a sample is the student's entropy on its normal view.

    Each with its own temperature T, as T^2 * mean KL(teacher || student):

    - KD: of the normal views' logits; CE is theirs too.
    - TF: of the transformed views' logits.
    - SS: of the transformed views' similarities to the batch's normal views, cosines of two-layer heads on the
      penultimate features. The teacher's head is trained first (`pretraining`) to tell which image a view is of, by
      the cross entropy of the cosines as they are; the student's trains with the student.

    TF and SS are means over the rows where the teacher is right, and of those where it is wrong over the given ratio with
    the least error level, which is how many classes (TF) or images (SS) it puts before the truth; the lower row first among
    equals. Rows are ordered by image, then by angle. (The authors' code first kept by mistake the share of the right ones,
    and was corrected; the number kept is rounded down as there.)

    Different from the authors' code: the views are turns of one augmented image, theirs crops each by itself; a mean
    over no rows is 0, theirs NaN.

    The student sees all 4 b views in one forward pass, its normalisations too.

    Args:
        temperature, transformed_temperature, similarity_temperature: T > 0 of KD, TF and SS.
        ce_weight, kd_weight, transformed_weight, similarity_weight: finite; 0.1, 0.9, 2.7 and 10 as published.
        transformed_ratio, similarity_ratio: how much of the rows where the teacher is wrong is kept, in [0, 1].
        head_epochs, head_lr, head_milestones: of the teacher's head; see `Pretraining`. A command, whose options are
            numbers and strings, gives several milestones with commas between them, "0.5,0.75", and "" for none.
        batch_keep: the fraction of every batch that the teacher is asked about, in (0, 1], by the entropy of the
            normal views, the highest first (`selection.select_batch_rows`): KD, TF and SS are those of all views of these images,
            among themselves. 1: all.
        student_layer, teacher_layer: whose input the features are (`features.Tap`); None: the last linear layer's.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
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
        self.head_epochs = check_int("head_epochs", head_epochs, 1)
        self.set_options(check_non_negative, head_lr=head_lr)
        self.head_milestones = check_fractions(
            "head_milestones", head_milestones, "fractions of head_epochs in [0, 1], as 0.5,0.75"
        )

    def prepare(self, student: nn.Module, teacher: nn.Module | None, samples: Iterable[Batch]) -> None:
        """Builds both heads. Raises ValueError where x is not a batch of square images."""
        super().prepare(student, teacher, samples)
        device = next(iter(samples)).x.device
        self.student_head = _head(self.student_width).to(device)
        self.teacher_head = _head(self.teacher_width).to(device)

    def input_of(self, x: Tensor) -> Tensor:
        """The views (4 b, c, h, h) of images (b, c, h, h), those of an image side by side.

        Raises ValueError where x is something else.
        """
        if x.dim() != 4 or x.shape[-1] != x.shape[-2]:
            raise ValueError(f"sskd turns images: x must be square ones, (b, c, h, h), got shape {tuple(x.shape)}")
        return torch.stack([x.rot90(turns, (-2, -1)) for turns in range(VIEWS)], 1).flatten(0, 1)

    def pretraining(self) -> tuple[Pretraining, ...]:
        """The teacher's head; 60 epochs as published."""
        return (Pretraining(self.teacher_head, self._head_loss, self.head_epochs, self.head_lr, self.head_milestones),)

    def _head_loss(self, teacher: nn.Module | None, batch: Batch) -> Tensor:
        """(), cross entropy of the cosines (3 b, b) of transformed to normal views, each view's own image the truth."""
        _, features = self.teacher_forward(teacher, self.input_of(batch.x))
        with full_precision(features):
            similarity = _similarities(self.teacher_head(features.float()))
            return functional.cross_entropy(similarity, _images_of(similarity))

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """`terms`: "kl", "transformed" and "similarity", the three mean KL divergences in nats, without their weights and T^2."""
        views = self.input_of(batch.x)
        logits, features = self.student_forward(student, views)
        normal, transformed = _normal_and_transformed(logits)
        rows = select_batch_rows(normal, self.batch_keep)
        target_logits, target_features = self.teacher_forward(teacher, _of_images(views, rows))
        target_normal, target_transformed = _normal_and_transformed(target_logits)

        weights = {"temperature": self.temperature, "kd_weight": self.kd_weight, "ce_weight": self.ce_weight}
        loss, value, kl = distill_rows(normal, target_normal, batch.label, rows, **weights)
        with full_precision(logits):
            similarity = _similarities(self.student_head(_of_images(features, rows).float()))
            with torch.no_grad():
                target_similarity = _similarities(self.teacher_head(target_features.float()))
        label = take_rows(batch.label, rows)[:, None].expand(-1, VIEWS - 1).flatten()
        transformed_kl = _selected_kl(
            take_rows(transformed, rows).flatten(0, 1),
            target_transformed.flatten(0, 1),
            truth=label,
            ratio=self.transformed_ratio,
            temperature=self.transformed_temperature,
        )
        similarity_kl = _selected_kl(
            similarity,
            target_similarity,
            truth=_images_of(similarity),
            ratio=self.similarity_ratio,
            temperature=self.similarity_temperature,
        )
        loss = loss + self.transformed_weight * self.transformed_temperature**2 * transformed_kl
        loss = loss + self.similarity_weight * self.similarity_temperature**2 * similarity_kl
        terms = {"kl": kl, "transformed": transformed_kl.detach(), "similarity": similarity_kl.detach()}
        return Outcome(loss, normal.detach(), value, terms)


def _head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def _normal_and_transformed(x: Tensor) -> tuple[Tensor, Tensor]:
    """(4 b, c) of all views, those of an image side by side -> (b, c) and (b, 3, c)."""
    normal, transformed = x.unflatten(0, (-1, VIEWS)).split((1, VIEWS - 1), 1)
    return normal.squeeze(1), transformed


def _of_images(x: Tensor, rows: Tensor | None) -> Tensor:
    """(4 b, ...) of all views -> (4 k, ...), those of the images `rows` (k,)."""
    return x if rows is None else take_rows(x.unflatten(0, (-1, VIEWS)), rows).flatten(0, 1)


def _similarities(embeddings: Tensor) -> Tensor:
    """(4 b, d) of all views -> (3 b, b), the cosines of every transformed to every normal view."""
    normal, transformed = _normal_and_transformed(unit_rows(embeddings))
    return transformed.flatten(0, 1) @ normal.T


def _images_of(similarity: Tensor) -> Tensor:
    """(3 b,) which image each transformed view is of."""
    return torch.arange(len(similarity), device=similarity.device) // (VIEWS - 1)


def _selected_kl(student: Tensor, teacher: Tensor, *, truth: Tensor, ratio: float, temperature: float) -> Tensor:
    """(), the mean KL divergence at this temperature, in nats, over the rows that `least_wrong` selects.

    student, teacher: (r, c) scores; truth: (r,).
    """
    if student.shape[1] == 1:  # the similarities of a batch of one image
        return 0 * student.sum()
    selected, number = least_wrong(teacher, truth, ratio)
    total = kd_loss(student, teacher, temperature=temperature, row_weight=selected, reduction="sum")
    return total / (temperature**2 * number.clamp(min=1))


def least_wrong(score: Tensor, truth: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """The rows where the truth has the highest score, and of the others `ratio` with the least scores before it.

    Args:
        score: (r, c). A row whose truth's score is NaN counts as right, so that it reaches the loss.
        truth: int64 (r,).
        ratio: in [0, 1]; their number is rounded down. Among equals the lower row is first.

    Returns:
        bool (r,), and how many are selected, int64 ().
    """
    level = (score > score.gather(1, truth[:, None])).sum(1)
    right = (level == 0).sum()
    number = right + ((len(level) - right).double() * ratio).long()
    first = torch.arange(len(level), device=level.device) < number
    return torch.zeros_like(first).scatter(0, level.argsort(stable=True), first), number
