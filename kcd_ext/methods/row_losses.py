"""The outcome of a method whose loss is a mean over the rows of a batch, so that the rows can be weighted."""

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional

from .features import at_least_float32
from .protocol import Batch, Outcome, entropy


def outcome_of_rows(
    batch: Batch,
    logits: Tensor,
    rows: Tensor | None,
    losses: Mapping[str, Tensor],
    weights: Mapping[str, float],
    *,
    ce_weight: float,
    label_smoothing: float,
) -> Outcome:
    """Return the outcome of loss = ce_weight * CE + sum_t weight_t * mean loss_t. Its value is the student's entropy.

    CE is the mean over the batch, each loss_t the mean over the selected rows. With `batch.weight` the loss is
    mean_i(weight_i * losses_i), where `Outcome.losses` holds losses_i = ce_weight * CE_i + sum_t weight_t * loss_t,i, and
    loss_t,i counts as b/k * [i is selected] * loss_t,i.

    Args:
        batch: The batch of b samples.
        logits: (b, classes), the student's.
        rows: (k,) indices of the selected rows. None: all of them.
        losses: Name of a term -> (k,) its loss of each selected row.
        weights: Name of a term -> its weight.
        ce_weight: Weight of the cross entropy.
        label_smoothing: That of `torch.nn.functional.cross_entropy`.
    """
    smoothing = {"label_smoothing": label_smoothing}
    terms = {name: loss.detach().mean() for name, loss in losses.items()}
    if batch.weight is None:
        loss = ce_weight * functional.cross_entropy(at_least_float32(logits), batch.label, **smoothing)
        loss = sum((weights[name] * each.mean() for name, each in losses.items()), loss)
        return Outcome(loss, logits.detach(), entropy(logits), terms)
    total = ce_weight * functional.cross_entropy(at_least_float32(logits), batch.label, reduction="none", **smoothing)
    for name, each in losses.items():
        own = weights[name] * len(total) / len(each) * each
        total = total + own if rows is None else total.index_add(0, rows, own.to(total.dtype))
    return Outcome((batch.weight * total).mean(), logits.detach(), entropy(logits), terms, total.detach())


def warm_up(epoch: int, warmup: int) -> float:
    """Return the factor of a loss that grows linearly in the first `warmup` epochs: min((epoch + 1) / warmup, 1)."""
    return min((epoch + 1) / warmup, 1.0) if warmup else 1.0
