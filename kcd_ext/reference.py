"""`condensed_kd_loss` in plain PyTorch, for any device and any order of differentiation.

It is the fallback for what the fused operator does not support, and the reference that the operator is tested against. Like any
eager formula it reads the logits several times and keeps every intermediate.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import arguments
from .knowledge import Knowledge

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# Below this log-probability float64 rounds to 0: the class has no probability in any dtype.
_LOG_UNDERFLOW = -1075 * math.log(2)


def _entropy(logits: Tensor) -> Tensor:
    """Return log Z - sum(e^x x) / Z with x = logits - max and Z = sum(e^x).

    For a confident row Z is barely above 1; `log1p` of the tail keeps the digits that `log(Z)` would lose.
    """
    x = logits - logits.amax(-1, keepdim=True)
    zero, e, is_maximum = torch.zeros_like(x), x.exp(), x == 0
    maxima, tail = is_maximum.sum(-1), torch.where(is_maximum, zero, e).sum(-1)
    log_sum = torch.where(maxima == 1, tail.log1p(), (maxima + tail).log())
    return log_sum - torch.where(x == -torch.inf, zero, e * x).sum(-1) / (maxima + tail)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    # Subtract the maximum before dividing: with a large offset the division would round away the differences.
    return F.log_softmax((logits - logits.detach().amax(-1, keepdim=True)) / temperature, -1)


def _kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_q, log_p = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    p = log_p.exp()
    zero = torch.zeros_like(log_p)
    impossible = log_p < _LOG_UNDERFLOW
    # The divergence is infinite if only the student rules a class out, even if p itself underflows to 0.
    underflow = (log_q == -torch.inf) & (p == 0) & ~impossible
    infinite = torch.where(underflow, torch.full_like(log_p, torch.inf), zero).sum(-1)
    return (p * torch.where(impossible | underflow, zero, log_p - log_q)).sum(-1) + infinite


def _sort_key(value: Tensor) -> Tensor:
    """Return the values with -0 replaced by +0. torch sorts NaN above +inf, as the ranking requires."""
    return torch.where(value == 0, torch.zeros_like(value), value)


def select(value: Tensor, candidate: Tensor, keep: arguments.Keep) -> Tensor:
    """Select the `k` candidates of highest value: NaN first, ties in row order.

    Args:
        value: Knowledge values of shape `(n,)`.
        candidate: Candidate rows, bool of shape `(n,)`.
        keep: Number of rows to select, as `arguments.check_keep` returns it.

    Returns:
        The selected rows, bool of shape `(n,)`.
    """
    selected = torch.zeros_like(candidate)
    rows = candidate.nonzero().squeeze(1)
    k = keep.of(len(rows))
    order = torch.sort(_sort_key(value.detach()[rows]), descending=True, stable=True).indices
    selected[rows[order[:k]]] = True
    return selected


def _gather(local: Tensor, group: "ProcessGroup | None") -> Tensor:
    if group is None:
        return local
    import torch.distributed as dist

    parts = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts)


def _check_indices(labels: Tensor | None, rows: Tensor | None, classes: int, n: int, ignore_index: int) -> None:
    if labels is not None:
        bad = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise IndexError(
                f"labels[{row}] is {int(labels[row])}: it must be in [0, {classes}) or be ignore_index {ignore_index}"
            )
    if rows is not None:
        bad = (rows < -1) | (rows >= n)
        if bad.any():
            i = int(bad.nonzero()[0])
            raise IndexError(f"rows[{i}] is {int(rows[i])}: it must be in [0, {n}), or be -1 to be skipped")
        counts = torch.bincount(rows[rows >= 0], minlength=n)
        if (counts > 1).any():
            raise ValueError(f"rows names row {int((counts > 1).nonzero()[0])} more than once")


def _cross_entropy(student: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Return -sum_c t_c log pi_c of each row. A class with target 0 adds 0, even if the student rules it out."""
    if not labels.is_floating_point():
        if label_smoothing == 0:
            return -F.log_softmax(student, -1).gather(1, labels[:, None]).squeeze(1)
        labels = torch.zeros_like(student, requires_grad=False).scatter(1, labels[:, None], 1)
    target = (1 - label_smoothing) * labels.to(student.dtype) + label_smoothing / student.shape[1]
    x = student - student.detach().amax(-1, keepdim=True)
    return target.sum(-1) * x.logsumexp(-1) - torch.where(target == 0, torch.zeros_like(x), target * x).sum(-1)


def condensed_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    keep: float | int = 1.0,
    value: str | Tensor = "entropy",
    labels: Tensor | None = None,
    kd_weight: float | None = None,
    ce_weight: float | None = None,
    row_weight: Tensor | None = None,
    rows: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    group: "ProcessGroup | None" = None,
    inplace: bool = False,
    class_dim: int | None = None,
    return_knowledge: bool = False,
) -> Tensor | tuple[Tensor, Knowledge]:
    """Return the same loss as `kcd_ext.condensed_kd_loss`, in plain PyTorch.

    It runs on any device. It is differentiable any number of times, in reverse and forward mode and with `torch.func.grad`, `jvp`
    and `hessian`, but not with `vmap` over the loss. It is slower, and needs several times the memory of the logits.

    Args:
        student_logits: Shape `(..., C)`, or with the classes in `class_dim`.
        teacher_logits: Same shape, or `(m, C)` with `rows`. Treated as constant.
        temperature: Softening temperature.
        keep: How many candidates to select: a fraction in (0, 1] as a float, or a number of rows as an int >= 1.
        value: What ranks the rows: a name, or a tensor of scores of shape `(...)`.
        labels: Class indices, int64 of shape `(...)`, or probabilities, floating-point in the shape of `student_logits`.
        kd_weight: Weight of the distillation term. Default: 1, or 0.9 with `labels`.
        ce_weight: Weight of the cross entropy. Default: 0, or 0.1 with `labels`.
        row_weight: Factor of each row's KL divergence, shape `(...)`. Treated as constant.
        rows: Indices of the rows that `teacher_logits` holds, int64 of shape `(m,)`.
        label_smoothing: A number in [0, 1] that smooths the labels of the cross entropy.
        ignore_index: Label of rows to ignore.
        reduction: `"mean"`, `"sum"` or `"none"`.
        group: A `torch.distributed` process group over whose rows to select and average.
        inplace: Must be False: plain autograd needs the logits.
        class_dim: Dimension of the classes; the last one by default.
        return_knowledge: Also return the rows' `Knowledge`.

    Returns:
        The loss, or the pair `(loss, knowledge)` with `return_knowledge=True`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or range, `rows` names a row twice, or `inplace` is True.
        IndexError: A label or an entry of `rows` is out of range, on every device.

    Warns:
        UserWarning: As `kcd_ext.condensed_kd_loss`.
    """
    class_dim_index = arguments.check_loss_tensors(
        student_logits,
        teacher_logits,
        value=value,
        labels=labels,
        row_weight=row_weight,
        rows=rows,
        group=group,
        class_dim=class_dim,
    )
    options = arguments.check_loss_options(
        temperature, keep, value, labels, kd_weight, ce_weight, label_smoothing, ignore_index, reduction
    )
    if inplace:
        raise ValueError("inplace=True is not supported by the reference: plain autograd needs the logits")
    arguments.warn_about_classes(student_logits, class_dim)
    student_logits = arguments.classes_last(student_logits, class_dim_index)
    if rows is None:
        teacher_logits = arguments.classes_last(teacher_logits, class_dim_index)

    shape, classes = student_logits.shape[:-1], student_logits.shape[-1]
    accumulator = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    student = student_logits.reshape(-1, classes).to(accumulator)
    n = student.shape[0]
    probabilities = indices = None
    if arguments.are_probabilities(labels):
        probabilities = arguments.classes_last(labels, class_dim_index).reshape(-1, classes)
    elif labels is not None:
        indices = labels.reshape(-1)
    _check_indices(indices, rows, classes, n, ignore_index)

    valid = torch.ones(n, dtype=torch.bool, device=student.device) if indices is None else indices != ignore_index
    candidate = valid
    teacher = teacher_logits.detach().to(accumulator)
    if rows is None:
        teacher = teacher.reshape(-1, classes)
    else:
        # Scatter the teacher's rows into the student's order. The other rows become zeros and are not candidates.
        used = rows >= 0
        has_teacher = torch.zeros_like(valid).index_fill(0, rows[used], True)
        teacher = torch.zeros_like(student, requires_grad=False).index_copy(0, rows[used], teacher[used])
        candidate = valid & has_teacher
    nan = torch.full((n,), torch.nan, dtype=accumulator, device=student.device)

    # Replace rows that do not count before any formula: a NaN in them would reach the gradients as 0 * NaN.
    safe_student = torch.where(valid[:, None], student, torch.zeros_like(student))
    with torch.no_grad():
        entropy = torch.where(valid, _entropy(safe_student), nan)
    zeros = torch.zeros_like(student)
    with torch.no_grad():
        safe_teacher = torch.where(candidate[:, None], teacher, zeros)
        kl = _kl(torch.where(candidate[:, None], student, zeros), safe_teacher, options.temperature)
    cross_entropy = torch.zeros_like(nan)
    if labels is not None:
        targets = torch.where(valid, indices, torch.zeros_like(indices)) if probabilities is None else probabilities
        cross_entropy = _cross_entropy(safe_student, targets, options.label_smoothing)
        cross_entropy = torch.where(valid, cross_entropy, torch.zeros_like(cross_entropy))

    with torch.no_grad():
        if isinstance(value, Tensor):
            score = value.detach().reshape(-1).clone()
        else:
            formulas = {
                "entropy": lambda: entropy,
                "teacher_entropy": lambda: _entropy(safe_teacher),
                "kl": lambda: kl,
                "cross_entropy": lambda: cross_entropy.detach(),
            }
            score = formulas[value]().clone()
        # A row with NaN ranks first under every `value`, so that it reaches the loss.
        score[~candidate | entropy.isnan() | kl.isnan()] = torch.nan

        selected = select(_gather(score, group), _gather(candidate, group), options.keep)
        n_valid, n_selected = _gather(valid, group).sum(), selected.sum()
        world_size = 1 if group is None else group.size()
        if group is not None:
            selected = selected[group.rank() * n : (group.rank() + 1) * n]

    # The differentiable formula sees selected rows only.
    mask = selected[:, None]
    divergence = _kl(torch.where(mask, student, zeros), torch.where(mask, teacher, zeros), options.temperature)
    weight = torch.ones_like(kl) if row_weight is None else row_weight.detach().reshape(-1).to(accumulator)
    weight = options.weights.kd * torch.where(selected, weight, torch.zeros_like(weight))
    # A weight of 0 removes a row, even an infinite one, but never hides NaN.
    divergence = torch.where((weight == 0) & ~divergence.isnan(), torch.zeros_like(kl), divergence)
    kd = options.temperature**2 * weight * divergence
    ce = options.weights.ce * cross_entropy if options.weights.ce else torch.zeros_like(cross_entropy)
    if reduction == "none":
        loss = (ce + kd).reshape(shape)
    elif reduction == "sum":
        loss = ce.sum() + kd.sum()
    else:
        loss = ce.sum() * world_size / n_valid.clamp(min=1) + kd.sum() * world_size / n_selected.clamp(min=1)
    if not return_knowledge:
        return loss
    kl = torch.where(candidate, kl, nan)
    return loss, Knowledge(
        score.reshape(shape), entropy.reshape(shape), kl.reshape(shape), selected.reshape(shape), selected.sum()
    )
