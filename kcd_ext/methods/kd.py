"""Knowledge distillation (Hinton et al., 2015): the student matches the teacher's softened probabilities and the labels."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import reference
from ..checks import check_bool, check_finite, check_fraction, check_positive
from ..losses import condensed_kd_loss
from ..ops import has_kernels_for
from .features import at_least_float32, unit_rows
from .protocol import Batch, Method, Outcome, entropy
from .selection import select_batch_rows, take_rows

DEVIATION_OFFSET = 1e-7  # added to a standard deviation before it divides, as in the published code


class KnowledgeDistillation(Method):
    """Knowledge distillation (KD), Hinton et al., 2015.

        loss = ce_weight * CE + kd_weight * T^2 * KL(teacher || student)

    Both terms are means over the batch. The knowledge value is the student's entropy.

    - With `batch_keep` < 1, KL is the mean over the k selected rows.
    - With `batch.weight`, the loss is mean_i(weight_i * losses_i), where losses_i = ce_weight * CE_i + kd_weight * T^2 * KL_i
      and `Outcome.losses` holds the losses_i. If `batch_keep` < 1 too, KL_i counts as b/k * [i is selected] * KL_i.
    - Without `batch.weight`, `Outcome.losses` is None: one operator gives the mean, and per-row losses would need a second.
    - With `standardize`, KL compares the z-scores of both networks' logits (`standardized`; Sun et al., CVPR 2024, who use
      temperature=2 and kd_weight=9). The cross entropy and the knowledge value are those of the logits themselves.

    Args:
        temperature: T of the softened probabilities, > 0; 4 in KCD's recipe.
        kd_weight: Weight of the KL term, finite; 0.9 in KCD's recipe.
        ce_weight: Weight of the cross entropy, finite; 0.1 in KCD's recipe.
        batch_keep: Fraction of each batch that the teacher runs on, in (0, 1]: the rows of highest student entropy
            (`selection.select_batch_rows`). 1: all rows.
        label_smoothing: Label smoothing of the cross entropy, in [0, 1].
        standardize: Compare the z-scores of each row's logits instead of the logits.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """

    weighs_samples = True
    takes_soft_labels = True

    def __init__(
        self,
        temperature: float = 4.0,
        kd_weight: float = 0.9,
        ce_weight: float = 0.1,
        batch_keep: float = 1.0,
        label_smoothing: float = 0.0,
        standardize: bool = False,
    ):
        super().__init__()
        self.set_options(check_positive, temperature=temperature)
        self.set_options(check_finite, kd_weight=kd_weight, ce_weight=ce_weight)
        self.set_options(check_fraction, batch_keep=batch_keep)
        self.set_label_smoothing(label_smoothing, ce_weight)
        self.set_options(check_bool, standardize=standardize)

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """Return the loss of a batch.

        `terms["kl"]` is the mean KL divergence at temperature T, in nats, without its weight and T^2.
        """
        logits = student(batch.x)
        rows = select_batch_rows(logits, self.batch_keep)
        with torch.no_grad():
            teacher_logits = teacher(take_rows(batch.x, rows))
        weights = {"temperature": self.temperature, "kd_weight": self.kd_weight, "ce_weight": self.ce_weight}
        weights |= {"label_smoothing": self.label_smoothing, "standardize": self.standardize}
        if batch.weight is None:
            loss, value, kl = distill_rows(logits, teacher_logits, batch.label, rows, **weights)
            return Outcome(loss, logits.detach(), value, {"kl": kl.mean()}, kl=of_all_rows(kl, rows))
        # Scaled so that the mean over the batch equals the mean over the selected rows.
        weights["kd_weight"] = self.kd_weight * len(logits) / len(teacher_logits)
        losses, value, kl = distill_rows(logits, teacher_logits, batch.label, rows, **weights, reduction="none")
        loss, terms = (batch.weight * losses).mean(), {"kl": kl.mean()}
        return Outcome(loss, logits.detach(), value, terms, losses.detach(), of_all_rows(kl, rows))


def distill_rows(
    logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor,
    rows: Tensor | None = None,
    standardize: bool = False,
    **options: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the KD loss, the student's entropies and the KL divergences.

    Args:
        logits: (b, classes), the student's.
        teacher_logits: (k, classes), constants, for the rows in `rows`.
        label: (b,) int64, or (b, classes) probabilities.
        rows: (k,) indices of the rows that the teacher ran on. None: all b rows.
        standardize: KL compares the z-scores of each row's logits (`standardized`).
        options: Arguments of `kcd_ext.condensed_kd_loss`.

    Returns:
        The loss, ce_weight * CE + kd_weight * T^2 * KL; the entropies (b,), detached; the KL divergences (k,) in nats of the
            rows that the teacher ran on, detached.
    """
    options |= {"rows": rows, "return_knowledge": True}
    if not standardize:
        loss, knowledge = kd_loss(logits, teacher_logits, labels=label, **options)
        return loss, knowledge.entropy.detach(), take_rows(knowledge.kl, rows).detach()
    ce_weight, smoothing = options.pop("ce_weight"), options.pop("label_smoothing", 0.0)
    loss, knowledge = kd_loss(standardized(logits), standardized(teacher_logits), **options)
    reduction = options.get("reduction", "mean")
    x = at_least_float32(logits)
    cross_entropy = functional.cross_entropy(x, label, reduction=reduction, label_smoothing=smoothing)
    return loss + ce_weight * cross_entropy, entropy(logits), take_rows(knowledge.kl, rows).detach()


def of_all_rows(kl: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """Return `Outcome.kl`: the divergences if the teacher ran on all rows, else None."""
    return kl if rows is None else None


def standardized(logits: Tensor) -> Tensor:
    """Return the z-scores of each row of logits (Sun et al., CVPR 2024): z = (x - mean) / (standard deviation + 1e-7).

    Mean and standard deviation (that of a sample, with C - 1) are those of the row's C classes. (r, C) -> (r, C), at least
    float32, differentiable. A row of equal logits has z = 0 and passes no gradient. A row with NaN or an infinity becomes NaN.
    """
    x = at_least_float32(logits)
    scale = math.sqrt(max(x.shape[-1] - 1, 1))  # a length is the standard deviation times this
    return scale * unit_rows(x - x.mean(-1, keepdim=True), offset=scale * DEVIATION_OFFSET)


def distill_if_weighted(
    logits: Tensor, teacher_logits: Tensor, label: Tensor, rows: Tensor | None, **weights: float
) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor | None]:
    """Return loss and value of `distill_rows`, the mean KL as a term, and `Outcome.kl`. If kd_weight is 0, skip the KL.

    `weights` are temperature, kd_weight, ce_weight and, optionally, label_smoothing and standardize.
    """
    if weights["kd_weight"] == 0:
        smoothing = weights.get("label_smoothing", 0.0)
        cross_entropy = functional.cross_entropy(at_least_float32(logits), label, label_smoothing=smoothing)
        return weights["ce_weight"] * cross_entropy, entropy(logits), {}, None
    loss, value, kl = distill_rows(logits, teacher_logits, label, rows, **weights)
    return loss, value, {"kl": kl.mean()}, of_all_rows(kl, rows)


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, **options):
    """Call `kcd_ext.condensed_kd_loss` if it has kernels for the device, else the reference, which gives the same numbers."""
    fused = has_kernels_for(student_logits)
    return (condensed_kd_loss if fused else reference.condensed_kd_loss)(student_logits, teacher_logits, **options)
