"""`condensed_kd_loss` once more in plain PyTorch: any device, twice differentiable; oracle and fallback.

It reads the logits several times and keeps every intermediate, as any eager formula does.
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


# The logarithm of the smallest number that float64 tells from 0: below it a class has no probability in any type.
_VANISHING = -1075 * math.log(2)


def _entropy(logits: Tensor) -> Tensor:
    """log Z - sum e^x x / Z over x = logits - max, Z = sum e^x: in a confident row log1p keeps the digits of its small tail."""
    x = logits - logits.amax(-1, keepdim=True)
    zero, e, at_maximum = torch.zeros_like(x), x.exp(), x == 0
    ones, tail = at_maximum.sum(-1), torch.where(at_maximum, zero, e).sum(-1)
    log_sum = torch.where(ones == 1, tail.log1p(), (ones + tail).log())
    return log_sum - torch.where(x == -torch.inf, zero, e * x).sum(-1) / (ones + tail)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    # The maximum goes before the division, which would round logits of a large offset.
    return F.log_softmax((logits - logits.detach().amax(-1, keepdim=True)) / temperature, -1)


def _kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_q, log_p = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    p = log_p.exp()
    zero = torch.zeros_like(log_p)
    absent = log_p < _VANISHING
    # Where the student has no mass and the teacher has, the divergence is infinite, even where p itself underflows to 0.
    underflow = (log_q == -torch.inf) & (p == 0) & ~absent
    infinite = torch.where(underflow, torch.full_like(log_p, torch.inf), zero).sum(-1)
    return (p * torch.where(absent | underflow, zero, log_p - log_q)).sum(-1) + infinite


def _key(value: Tensor) -> Tensor:
    """Values with every NaN above +inf, -0 equal to +0, for a stable descending sort (ties: the lower row)."""
    return torch.where(value == 0, torch.zeros_like(value), value)


def select(value: Tensor, candidate: Tensor, keep: arguments.Keep) -> Tensor:
    """bool (n,): the k candidates of highest value, NaN first, ties to the lower row."""
    selected = torch.zeros_like(candidate)
    rows = candidate.nonzero().squeeze(1)
    k = keep.of(len(rows))
    order = torch.sort(
        _key(value.detach()[rows]), descending=True, stable=True
    ).indices  # torch sorts NaN as the largest
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
                f"labels[{row}] is {int(labels[row])}: it must lie in [0, {classes}) or be ignore_index {ignore_index}"
            )
    if rows is not None:
        bad = (rows < -1) | (rows >= n)
        if bad.any():
            i = int(bad.nonzero()[0])
            raise IndexError(f"rows[{i}] is {int(rows[i])}: it must lie in [0, {n}), or be -1 to be skipped")
        named = rows[rows >= 0]
        counts = torch.bincount(named, minlength=n)
        if (counts > 1).any():
            raise ValueError(f"rows names row {int((counts > 1).nonzero()[0])} more than once")


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
    ignore_index: int = -100,
    reduction: str = "mean",
    group: "ProcessGroup | None" = None,
    inplace: bool = False,
    class_dim: int | None = None,
    return_knowledge: bool = False,
) -> Tensor | tuple[Tensor, Knowledge]:
    """The function of the same name in `kcd_ext`, in plain PyTorch; see there for arguments, shapes and errors.

    Any device and any differentiable order.  `inplace=True` raises ValueError: autograd needs the logits it read.
    """
    class_dim_from_0 = arguments.check_loss_tensors(
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
        temperature, keep, kd_weight, ce_weight, labels is not None, ignore_index, reduction
    )
    if inplace:
        raise ValueError("inplace=True is not possible in the reference: plain autograd needs the logits it read")
    arguments.warn_about_classes(student_logits, class_dim)
    student_logits = arguments.classes_last(student_logits, class_dim_from_0)
    if rows is None:
        teacher_logits = arguments.classes_last(teacher_logits, class_dim_from_0)

    shape, classes = student_logits.shape[:-1], student_logits.shape[-1]
    accumulator = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    student = student_logits.reshape(-1, classes).to(accumulator)
    n = student.shape[0]
    flat_labels = None if labels is None else labels.reshape(-1)
    _check_indices(flat_labels, rows, classes, n, ignore_index)

    valid = (
        torch.ones(n, dtype=torch.bool, device=student.device) if flat_labels is None else flat_labels != ignore_index
    )
    candidate = valid
    teacher = teacher_logits.detach().to(accumulator)
    if rows is None:
        teacher = teacher.reshape(-1, classes)
    else:
        # The teacher's rows in the student's order; rows it does not hold stand in as zeros and are no candidates.
        named = rows >= 0
        held = torch.zeros_like(valid).index_fill(0, rows[named], True)
        teacher = torch.zeros_like(student, requires_grad=False).index_copy(0, rows[named], teacher[named])
        candidate = valid & held
    nan = torch.full((n,), torch.nan, dtype=accumulator, device=student.device)

    # Rows that are read into nothing are replaced before any formula: a NaN there would reach the gradients as 0 * NaN.
    safe_student = torch.where(valid[:, None], student, torch.zeros_like(student))
    log_probabilities = F.log_softmax(safe_student, -1)
    with torch.no_grad():
        entropy = torch.where(valid, _entropy(safe_student), nan)
    zeros = torch.zeros_like(student)
    with torch.no_grad():
        seen_teacher = torch.where(candidate[:, None], teacher, zeros)
        kl = _kl(torch.where(candidate[:, None], student, zeros), seen_teacher, options.temperature)
    cross_entropy = torch.zeros_like(nan)
    if flat_labels is not None:
        index = torch.where(valid, flat_labels, torch.zeros_like(flat_labels))
        cross_entropy = -log_probabilities.gather(1, index[:, None]).squeeze(1)
        cross_entropy = torch.where(valid, cross_entropy, torch.zeros_like(cross_entropy))

    with torch.no_grad():
        if isinstance(value, Tensor):
            score = value.detach().reshape(-1).clone()
        else:
            formulas = {
                "entropy": lambda: entropy,
                "teacher_entropy": lambda: _entropy(seen_teacher),
                "kl": lambda: kl,
                "cross_entropy": lambda: cross_entropy.detach(),
            }
            score = formulas[value]().clone()
        # A row that is not a number ranks first whatever is asked for, so that it reaches the loss.
        score[~candidate | entropy.isnan() | kl.isnan()] = torch.nan

        selected = select(_gather(score, group), _gather(candidate, group), options.keep)
        n_valid, n_selected, world = _gather(valid, group).sum(), selected.sum(), 1 if group is None else group.size()
        if group is not None:
            selected = selected[group.rank() * n : (group.rank() + 1) * n]

    # Only selected rows take part in the differentiable formula.
    chosen = selected[:, None]
    divergence = _kl(torch.where(chosen, student, zeros), torch.where(chosen, teacher, zeros), options.temperature)
    weight = torch.ones_like(kl) if row_weight is None else row_weight.detach().reshape(-1).to(accumulator)
    weight = options.weights.kd * torch.where(selected, weight, torch.zeros_like(weight))
    # A weight of 0 takes a row out, unless its divergence is not a number: NaN is never hidden.
    divergence = torch.where((weight == 0) & ~divergence.isnan(), torch.zeros_like(kl), divergence)
    kd = options.temperature**2 * weight * divergence
    ce = options.weights.ce * cross_entropy if options.weights.ce else torch.zeros_like(cross_entropy)
    if reduction == "none":
        loss = (ce + kd).reshape(shape)
    elif reduction == "sum":
        loss = ce.sum() + kd.sum()
    else:
        loss = ce.sum() * world / n_valid.clamp(min=1) + kd.sum() * world / n_selected.clamp(min=1)
    if not return_knowledge:
        return loss
    kl = torch.where(candidate, kl, nan)
    return loss, Knowledge(
        score.reshape(shape), entropy.reshape(shape), kl.reshape(shape), selected.reshape(shape), selected.sum()
    )
