"""Decoupled knowledge distillation (Zhao et al., CVPR 2022): the target class against the rest, and the rest among itself."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..checks import check_bool, check_finite, check_fraction, check_int, check_positive
from .features import at_least_float32, full_precision
from .kd import of_all_rows, standardized
from .protocol import Batch, Method, Outcome, teacher_logits
from .row_losses import outcome_of_rows, warm_up
from .selection import select_batch_rows, take_rows


class DecoupledKnowledgeDistillation(Method):
    """Decoupled knowledge distillation (DKD), Zhao et al., CVPR 2022.

        loss = ce_weight * CE + ramp * T^2 * (alpha * TCKD + beta * NCKD)

    The knowledge value is the student's entropy. KL(teacher || student) at temperature T splits into two parts. For a sample
    of class t, let p be the teacher's probabilities and q the student's:

        TCKD = p_t log(p_t / q_t) + (1 - p_t) log((1 - p_t) / (1 - q_t))
        NCKD = sum over i != t of p~_i log(p~_i / q~_i),

    where p~_i = p_i / (1 - p_t), likewise q~. KL is TCKD + (1 - p_t) NCKD; here NCKD has a weight of its own. Both are means
    over the batch. In the first `warmup` epochs, the ramp is (epoch + 1) / warmup, then 1.

    Loss, defaults and ramp follow the authors' code, mdistiller. All is computed from logarithms of probabilities, so it is
    finite for all finite logits. (mdistiller takes the logarithm of a probability, which is -inf once that rounds to 0, and
    subtracts 1000 from the target's logit, which leaves it among the rest if it leads by more.)

    Args:
        temperature: T of the softened probabilities, > 0; 4 as published.
        ce_weight: Weight of the cross entropy, finite; 1 as published.
        alpha: Weight of the target class (TCKD), finite; 1 as published.
        beta: Weight of the other classes (NCKD), finite; 8 as published for CIFAR-100, where the best value depends on the pair
            of networks.
        warmup: Number of epochs in which the distillation term grows to its weight, >= 0; 20 of 240 as published. 0: no ramp.
        batch_keep: Fraction of each batch that the teacher runs on, in (0, 1]: the rows of highest student entropy
            (`selection.select_batch_rows`). 1: all rows.
        label_smoothing: Label smoothing of the cross entropy, in [0, 1].
        standardize: Compare the z-scores of each row's logits instead of the logits (`kd.standardized`).

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """

    weighs_samples = True
    teacher_logits_suffice = True

    def __init__(
        self,
        temperature: float = 4.0,
        ce_weight: float = 1.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        warmup: int = 20,
        batch_keep: float = 1.0,
        label_smoothing: float = 0.0,
        standardize: bool = False,
    ):
        super().__init__()
        self.set_options(check_positive, temperature=temperature)
        self.set_options(check_finite, ce_weight=ce_weight, alpha=alpha, beta=beta)
        self.warmup = check_int("warmup", warmup, 0)
        self.set_options(check_fraction, batch_keep=batch_keep)
        self.set_label_smoothing(label_smoothing, ce_weight)
        self.set_options(check_bool, standardize=standardize)
        self.ramp = 1.0

    def begin(self, epoch: int, epochs: int) -> None:
        """Set the ramp."""
        self.ramp = warm_up(epoch, self.warmup)

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """Return the loss of a batch.

        `terms` are "tckd" and "nckd", TCKD and NCKD in nats, without weights, T^2 and ramp, and "kl", the KL divergence that
        they are parts of.

        Raises:
            ValueError: There is only one class.
        """
        logits = student(batch.x)
        rows = select_batch_rows(logits, self.batch_keep)
        target = teacher_logits(teacher, batch, rows)
        with full_precision(logits):
            compared = [standardized(x) if self.standardize else x for x in (take_rows(logits, rows), target)]
            tckd, nckd, kl = decoupled_divergences(*compared, take_rows(batch.label, rows), self.temperature)
            scale = self.ramp * self.temperature**2
            weights = {"tckd": scale * self.alpha, "nckd": scale * self.beta}
            losses = {"tckd": tckd, "nckd": nckd}
            options = {"ce_weight": self.ce_weight, "label_smoothing": self.label_smoothing}
            outcome = outcome_of_rows(batch, logits, rows, losses, weights, **options)
        return replace(outcome, terms={**outcome.terms, "kl": kl.mean()}, kl=of_all_rows(kl, rows))


def decoupled_divergences(
    student: Tensor, teacher: Tensor, label: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return TCKD, NCKD and KL of each row, in nats, at least float32. A class of teacher probability 0 adds 0.

    Args:
        student: Logits (r, classes), at least two classes. Gradients flow to these.
        teacher: Logits (r, classes), constant.
        label: (r,) int64.
        temperature: T > 0.

    Returns:
        TCKD (r,), NCKD (r,), and KL (r,), detached: TCKD + (1 - p_t) NCKD.
    """
    if student.shape[1] < 2:
        raise ValueError(f"dkd compares at least two classes, got logits of shape {tuple(student.shape)}")
    is_target = torch.zeros_like(teacher, dtype=torch.bool).scatter(1, label[:, None], True)
    (q, q_rest), (p, p_rest) = (_log_probabilities(x, is_target, temperature) for x in (student, teacher.detach()))
    tckd, nckd = _divergence(p, q), _divergence(p_rest, q_rest)
    weight_of_rest = p[:, 1].exp()
    return tckd, nckd, (tckd + (weight_of_rest * nckd).masked_fill(weight_of_rest == 0, 0)).detach()


def _log_probabilities(logits: Tensor, is_target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log (p_t, 1 - p_t), (r, 2), and log p~, (r, classes), -inf for the target."""
    x = at_least_float32(logits) / temperature
    rest = x.masked_fill(is_target, -torch.inf)
    target_and_rest = torch.stack([x.masked_fill(~is_target, 0).sum(1), rest.logsumexp(1)], 1)
    return target_and_rest.log_softmax(1), rest.log_softmax(1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return sum p log(p / q) of each row. Entries with p = 0 add 0."""
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(1)
