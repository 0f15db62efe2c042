"""torch.library's side of the raw operators: shapes without data (fake kernels) and derivatives.

The operators themselves are in csrc/torch/ops.cpp.  They take a tensor that is absent as an empty one of dtype bool.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _extension

build_info = _extension.load()

condensed_kd = torch.ops.kcd_ext.condensed_kd.default
condensed_kd_forward = torch.ops.kcd_ext.condensed_kd_forward.default
condensed_kd_backward = torch.ops.kcd_ext.condensed_kd_backward.default
condensed_kd_gradient = torch.ops.kcd_ext.condensed_kd_gradient.default
condensed_kd_gradient_ = torch.ops.kcd_ext.condensed_kd_gradient_.default
row_stats = torch.ops.kcd_ext.row_stats.default
select_topk = torch.ops.kcd_ext.select_topk.default
reduce_rows = torch.ops.kcd_ext.reduce_rows.default

SAVED_ROWS = 5  # csrc/kernels.h: Saved
REDUCTION_NONE = 2


def absent(like: Tensor) -> Tensor:
    """What stands for a tensor that is not there."""
    return like.new_empty(0, dtype=torch.bool)


def accumulator_of(student: Tensor) -> torch.dtype:
    """float64 for float64 logits, else float32."""
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def _per_row(student: Tensor, dtype: torch.dtype) -> Tensor:
    return student.new_empty(student.shape[:-1], dtype=dtype)


def _fake_rows(student: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulator_of(student)
    value = _per_row(student, dtype if score.dtype == torch.bool else score.dtype)
    return value, _per_row(student, dtype), _per_row(student, dtype), student.new_empty((SAVED_ROWS, value.numel()), dtype=dtype)


def _fake_loss(student: Tensor, reduction: int) -> Tensor:
    dtype = accumulator_of(student)
    return _per_row(student, dtype) if reduction == REDUCTION_NONE else student.new_empty((), dtype=dtype)


@torch.library.register_fake(condensed_kd)
@torch.library.register_fake(condensed_kd_forward)
def _fake_forward(student, teacher, labels, score, row_weight, rows, *options):
    value, entropy, kl, saved = _fake_rows(student, score)
    n_selected = student.new_empty((), dtype=torch.int64)
    divisors = student.new_empty(2, dtype=torch.float64)
    loss = _fake_loss(student, reduction=options[-1])
    return loss, value, entropy, kl, _per_row(student, torch.bool), n_selected, saved, divisors


@torch.library.register_fake(condensed_kd_backward)
@torch.library.register_fake(condensed_kd_gradient)
def _fake_gradient(grad_output, student, *_):
    return student.new_empty(student.shape)


@torch.library.register_fake(condensed_kd_gradient_)
def _fake_gradient_in_place(*_):
    return None


@torch.library.register_fake(row_stats)
def _fake_row_stats(student, teacher, labels, score, rows, temperature, value, ignore_index):
    ranked, entropy, kl, saved = _fake_rows(student, score)
    with_labels = labels.dtype != torch.bool
    cross_entropy = torch.empty_like(entropy) if with_labels else student.new_empty(0, dtype=entropy.dtype)
    return ranked, entropy, kl, cross_entropy, _per_row(student, torch.bool), saved


@torch.library.register_fake(select_topk)
def _fake_select(value, candidate, keep_fraction, keep_count):
    return value.new_empty(value.shape, dtype=torch.bool)


@torch.library.register_fake(reduce_rows)
def _fake_reduce(student, labels, row_weight, selected, kl, cross_entropy, divisors, *options):
    return _fake_loss(student, reduction=options[-1])


# ---- derivatives


def _save_for_backward(ctx, inputs, output):
    student, teacher, labels, _, row_weight, rows, temperature, _, _, _, kd_weight, ce_weight, ignore_index, _ = inputs
    _, *knowledge = output
    selected, saved, divisors = output[4], output[6], output[7]
    ctx.save_for_backward(student, teacher, labels, row_weight, rows, selected, saved, divisors)
    ctx.options = (temperature, kd_weight, ce_weight, ignore_index)
    ctx.n_inputs = len(inputs)
    ctx.mark_non_differentiable(*knowledge)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, *_):
    gradient = None
    if grad_output is not None:
        gradient = condensed_kd_backward(grad_output.contiguous(), *ctx.saved_tensors, *ctx.options)
    return gradient, *(None,) * (ctx.n_inputs - 1)


def _no_second_derivative(ctx, *_):
    raise RuntimeError(
        "condensed_kd_loss has no second derivative: for that use kcd_ext.reference.condensed_kd_loss, the same function in"
        " plain PyTorch"
    )


torch.library.register_autograd(condensed_kd, _backward, setup_context=_save_for_backward)
torch.library.register_autograd(condensed_kd_backward, _no_second_derivative)


class Forward(NamedTuple):
    """A loss that is computed, and what its gradient is made from."""

    loss: Tensor
    saved: tuple[Tensor, ...]  # teacher, labels, row_weight, rows, selected, saved, divisors
    options: tuple[float, float, float, int]  # temperature, kd_weight, ce_weight, ignore_index
    inplace: bool


class GradientOfStudent(torch.autograd.Function):
    """Ties a loss that is computed to the student's logits.

    The eager path's door to autograd: torch.library's own wrapper costs 60 us a call, half of what small batches take.
    """

    @staticmethod
    def forward(ctx, student: Tensor, forward: Forward) -> Tensor:
        """The loss."""
        ctx.save_for_backward(student, *forward.saved)
        ctx.options, ctx.inplace = forward.options, forward.inplace
        ctx.set_materialize_grads(False)
        return forward.loss

    @staticmethod
    def backward(ctx, grad_output: Tensor | None) -> tuple[Tensor | None, None]:
        """The gradient with respect to the student's logits, (..., C) in their dtype."""
        if grad_output is None:
            return None, None
        student, *rest = ctx.saved_tensors  # raises where an earlier backward pass overwrote the logits
        grad_output = grad_output.contiguous()
        if ctx.inplace:
            student = student.detach()
            condensed_kd_gradient_(grad_output, student, *rest, *ctx.options)
            torch.autograd.graph.increment_version(student)
            return student, None
        gradient = condensed_kd_backward if torch.is_grad_enabled() else condensed_kd_gradient
        return gradient(grad_output, student, *rest, *ctx.options), None
