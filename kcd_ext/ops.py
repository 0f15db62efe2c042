"""The Python side of the operators: fake kernels for torch.library, the derivative, and the eager fast path.

`csrc/torch/ops.cpp` registers the operators. Their schemas have no optional tensors: an empty bool tensor means "absent".
"""

import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from . import _extension
from .arguments import REDUCTIONS
from .torch_internals import BelowAutograd, dispatch_is_plain

_compiled = _extension.load()
build_info: dict = _compiled.build_info()
# False if this torch lacks the DLPack functions that csrc/fast_path.h needs.
HAS_FAST_PATH: bool = hasattr(_compiled, "condensed_kd")
_WITH_CUDA = bool(build_info["cuda_architectures"]) and torch.version.hip is None  # ROCm devices are called cuda, too

_ALLOCATION_ERROR = re.compile(r"kcd_ext: allocating (-?\d+) bytes on .* failed")  # raised by csrc/torch/abi.h


def _without_autograd(operator: Callable) -> Callable:
    """Return a function that calls the operator below autograd.

    If an allocation fails, the function raises what torch raises: torch.OutOfMemoryError, or a RuntimeError on the CPU.
    """

    def call(*arguments):
        # BelowAutograd would break the graph of torch.compile.
        with_autograd = BelowAutograd is None or torch.compiler.is_compiling()
        try:
            with nullcontext() if with_autograd else BelowAutograd():
                return operator(*arguments)
        except RuntimeError as error:
            found = _ALLOCATION_ERROR.search(str(error))
            if found is None:
                raise
            device = next(x.device for x in arguments if isinstance(x, Tensor))
            torch.empty(int(found[1]), dtype=torch.uint8, device=device)  # fails likewise, with torch's own message
            raise torch.OutOfMemoryError(str(error)) from error  # memory was freed in the meantime

    return call


condensed_kd = _without_autograd(torch.ops.kcd_ext.condensed_kd.default)
condensed_kd_backward = _without_autograd(torch.ops.kcd_ext.condensed_kd_backward.default)
condensed_kd_backward_ = _without_autograd(torch.ops.kcd_ext.condensed_kd_backward_.default)
row_stats = _without_autograd(torch.ops.kcd_ext.row_stats.default)
select_topk = _without_autograd(torch.ops.kcd_ext.select_topk.default)
reduce_rows = _without_autograd(torch.ops.kcd_ext.reduce_rows.default)

# With their derivatives: torch.compile and torch.jit.trace record these.
traceable_condensed_kd = torch.ops.kcd_ext.condensed_kd.default
traceable_condensed_kd_backward = torch.ops.kcd_ext.condensed_kd_backward.default

with torch.inference_mode(False):  # autograd cannot save a tensor created in inference mode
    _ABSENT = torch.empty(0, dtype=torch.bool, device="cpu")

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
REDUCTION_NONE = REDUCTIONS.index("none")


def absent(like: Tensor) -> Tensor:
    """Return an empty bool tensor, which means "absent" to the operators.

    Plain tensors share one, because creating it takes 3 us. A compiled graph on a GPU gets one on its device: a CPU tensor
    among its inputs would rule out CUDA graphs.
    """
    plain = type(like) in _PLAIN_TYPES and (like.is_cpu or not torch.compiler.is_compiling())
    return _ABSENT if plain else like.new_empty(0, dtype=torch.bool)


def has_kernels_for(logits: Tensor) -> bool:
    """Return whether this build has kernels for the device of the logits."""
    return logits.is_cpu or (_WITH_CUDA and logits.is_cuda)


def supports_gradient_in_forward(logits: Tensor) -> bool:
    """Return whether `condensed_kd` supports `with_gradient` for these logits: plain tensors on the CPU, no fake ones."""
    return logits.is_cpu and type(logits) in _PLAIN_TYPES


def accumulator_dtype(student: Tensor) -> torch.dtype:
    """Return float64 for float64 logits, else float32."""
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def is_tracing() -> bool:
    """Return whether torch.jit.trace is recording."""
    return not torch.compiler.is_compiling() and torch.jit.is_tracing()


def absent_to_none(*inputs: Tensor) -> tuple[Tensor | None, ...]:
    """Return the tensors, with None for absent ones."""
    return tuple(None if x.dtype == torch.bool else x for x in inputs)


# ---- the state: one tensor of bytes, whose layout csrc/kernels.h defines

_COUNTS, _STATS, _ENTROPY, _KL = _compiled.STATE


def with_selection(state: Tensor, counts: Tensor, selected: Tensor) -> Tensor:
    """Return a copy of a state with a selection filled in.

    Args:
        state: State of `row_stats`, which selects nothing.
        counts: Numbers of selected and of valid rows, int64 (2,).
        selected: Selected rows, bool (...).
    """
    rest = state[_COUNTS * 8 : state.numel() - selected.numel()]
    return torch.cat((counts.view(torch.uint8), rest, selected.reshape(-1).to(torch.uint8)))


class StateArrays(NamedTuple):
    """The per-row arrays of a state. Their shape (...) is that of the logits without the classes."""

    value: Tensor
    """Knowledge values (...), in the dtype of the scores or of the accumulator."""
    entropy: Tensor
    """The student's entropies (...), in the accumulator's dtype."""
    kl: Tensor
    """KL divergences (...), in the accumulator's dtype."""
    selected: Tensor
    """Selected rows, bool (...)."""
    n_selected: Tensor
    """Number of selected rows, an int64 scalar."""


def unpack_state(state: Tensor, student: Tensor, value_dtype: torch.dtype) -> StateArrays:
    """Return copies of the arrays in the state that `condensed_kd` or `row_stats` computed for these logits.

    Copies, so that the caller may modify them or keep one without the others. `view_copy`, because torch.jit.trace cannot
    record a view of another dtype.
    """
    if not torch.compiler.is_compiling() and can_use_fast_path():
        copies = _compiled.knowledge(state, student)
        if copies is not NotImplemented:
            return StateArrays(*copies)
    accumulator, shape = accumulator_dtype(student), student.shape[:-1]
    # Offsets in bytes per row: the values come first, then the statistics, then the selection.
    stats_offset = value_dtype.itemsize
    selected_offset = stats_offset + _STATS * accumulator.itemsize
    rows = state[_COUNTS * 8 :].view(selected_offset + 1, *shape)

    def array(offset: int, dtype: torch.dtype) -> Tensor:
        return torch.view_copy(rows[offset : offset + dtype.itemsize].reshape(-1), dtype).view(shape)

    entropy, kl = (array(stats_offset + i * accumulator.itemsize, accumulator) for i in (_ENTROPY, _KL))
    selected = rows[selected_offset] != 0  # not a view: torch.compile generates invalid C++ for a bool view
    return StateArrays(array(0, value_dtype), entropy, kl, selected, selected.sum())


def value_dtype(student: Tensor, score: Tensor) -> torch.dtype:
    """Return the dtype of the values in a state."""
    return accumulator_dtype(student) if score.dtype == torch.bool else score.dtype


def _state_bytes(student: Tensor, score: Tensor) -> int:
    row_bytes = value_dtype(student, score).itemsize + _STATS * accumulator_dtype(student).itemsize + 1
    return _COUNTS * 8 + math.prod(student.shape[:-1]) * row_bytes


# ---- memory layouts


def is_readable_in_place(logits: Tensor) -> bool:
    """Return whether the kernels can read logits (..., C) in place: adjacent classes, and rows with at most two strides."""
    if logits.is_contiguous():
        return True
    sizes, strides = logits.shape, logits.stride()
    if sizes[-1] > 1 and strides[-1] != 1:
        return False
    row_strides = 0
    mergeable = None  # the stride of a dimension that continues the one inside it
    for size, stride in zip(reversed(sizes[:-1]), reversed(strides[:-1]), strict=True):
        if size == 1:
            continue
        if stride != mergeable:
            row_strides += 1
        mergeable = size * stride
    return row_strides <= 2


def make_readable(logits: Tensor) -> Tensor:
    """Return the logits, or a contiguous copy if the kernels cannot read them in place.

    A graph of torch.jit.trace always copies, because it must work for logits of every layout.
    """
    return logits if not is_tracing() and is_readable_in_place(logits) else logits.contiguous()


def make_readable_labels(labels: Tensor) -> Tensor:
    """Return labels as the operators take them: contiguous class indices, or probabilities as `make_readable` returns them."""
    return make_readable(labels) if labels.is_floating_point() else labels.contiguous()


# ---- fake kernels


def _fake_state(student: Tensor, score: Tensor) -> Tensor:
    return student.new_empty(_state_bytes(student, score), dtype=torch.uint8)


def _fake_loss(student: Tensor, reduction: int) -> Tensor:
    return student.new_empty(
        student.shape[:-1] if reduction == REDUCTION_NONE else (), dtype=accumulator_dtype(student)
    )


@torch.library.register_fake("kcd_ext::condensed_kd")
def _fake_condensed_kd(student, teacher, labels, score, row_weight, rows, *options):
    *_, reduction, _, with_gradient = options
    gradient = student.new_empty(student.shape if with_gradient else 0)
    return _fake_loss(student, reduction), _fake_state(student, score), gradient


@torch.library.register_fake("kcd_ext::condensed_kd_backward")
def _fake_backward(grad_output, student, *_):
    return student.new_empty(student.shape)


@torch.library.register_fake("kcd_ext::condensed_kd_backward_")
def _fake_backward_in_place(*_):
    return None


@torch.library.register_fake("kcd_ext::row_stats")
def _fake_row_stats(student, teacher, labels, score, *_):
    cross_entropy = student.new_empty(
        0 if labels.dtype == torch.bool else student.shape[:-1], dtype=accumulator_dtype(student)
    )
    return _fake_state(student, score), cross_entropy, student.new_empty(student.shape[:-1], dtype=torch.bool)


@torch.library.register_fake("kcd_ext::select_topk")
def _fake_select(value, *_):
    return value.new_empty(value.shape, dtype=torch.bool)


@torch.library.register_fake("kcd_ext::reduce_rows")
def _fake_reduce(student, *options):
    return _fake_loss(student, reduction=options[-2])


# ---- the derivative, shared by eager calls, process groups and traced graphs


def attach_autograd(
    loss: Tensor,
    student: Tensor,
    inputs: tuple[Tensor | None, ...],
    state: Tensor,
    options: tuple,
    inplace: bool = False,
    gradient: Tensor | None = None,
) -> Tensor:
    """Return the loss as a differentiable function of the student's logits.

    Args:
        loss: Loss computed without autograd.
        student: Logits to differentiate with respect to.
        inputs: Teacher, labels, row_weight and rows, as the operators take them; None if absent.
        state: State of `condensed_kd`. Must not be shared: hooks for saved tensors do not see it.
        options: Temperature, kd_weight, ce_weight, label_smoothing, ignore_index, reduction and number of processes of the
            operators.
        inplace: Whether the gradient overwrites the logits.
        gradient: Gradient for an incoming gradient of 1, if the forward pass computed it. Ownership passes to autograd.
    """
    # Autograd cannot save tensors created in inference mode, and need not: they cannot be modified before the backward pass.
    saved, constants = inputs, None
    for x in inputs:
        if x is not None and x.is_inference():
            saved, constants = [None if x is None or x.is_inference() else x for x in inputs], inputs
            break
    # Scaling a finished gradient would round bfloat16 twice.
    scalable = student.dtype != torch.bfloat16
    ready_gradient = None if gradient is None else [gradient]  # a list, because its pop() is thread-safe
    apply = CondensedKDFunction.apply if torch.compiler.is_compiling() else _apply
    # In a tuple, which autograd does not look into: each tensor argument costs time.
    return apply(student, (loss, saved, (constants, state, options, inplace, scalable, ready_gradient)))


class CondensedKDFunction(torch.autograd.Function):
    """The derivative of `condensed_kd` with respect to the student's logits."""

    @staticmethod
    def forward(ctx, student: Tensor, computed: tuple) -> Tensor:
        """Return the loss, which has been computed before."""
        loss, saved, ctx.call = computed
        ctx.save_for_backward(student, *saved)
        return loss

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the student's logits, (..., C) in their dtype."""
        differentiable = torch.is_grad_enabled()
        _, _, options, inplace, scalable, ready_gradient = ctx.call
        if ready_gradient is not None and not differentiable and dispatch_is_plain():
            factor = grad_output.tolist()  # faster than item(), which dispatches
            if factor == 1:
                return _pop_gradient(ctx, ready_gradient, grad_output), None
            # An infinite or NaN factor would turn the zeros of unselected rows into NaN.
            if scalable and math.isfinite(factor):
                return _pop_gradient(ctx, ready_gradient, grad_output).mul_(factor), None
        saved = _unpack_saved(ctx)  # raises if an earlier backward pass overwrote the logits
        if inplace:
            if differentiable:
                _refuse_second_derivative()
            return _backward_in_place(grad_output, saved, options), None
        operator = traceable_condensed_kd_backward if differentiable else condensed_kd_backward
        return _call_backward(operator, grad_output, *saved, options), None


# Skips the check of Function.apply for torch.func transforms, which `condensed_kd_loss` has refused by now.
_apply = super(torch.autograd.Function, CondensedKDFunction).apply


def _pop_gradient(ctx, ready_gradient: list[Tensor], grad_output: Tensor) -> Tensor:
    """Return the gradient of the forward pass. Further backward passes recompute it, with the same bits."""
    try:
        return ready_gradient.pop()
    except IndexError:
        return _call_backward(condensed_kd_backward, torch.ones_like(grad_output), *_unpack_saved(ctx), ctx.call[2])


def _unpack_saved(ctx) -> tuple[Tensor | None, ...]:
    """Return student, teacher, labels, row_weight, rows and state. Call it once: it runs the unpack hooks of saved tensors."""
    constants, state, *_ = ctx.call
    if constants is None:
        return *ctx.saved_tensors, state
    student, *saved = ctx.saved_tensors
    return student, *(constant if x is None else x for x, constant in zip(saved, constants, strict=True)), state


def _call_backward(operator, grad_output, student, teacher, labels, row_weight, rows, state, options):
    """Call a backward operator with saved tensors. An unpack hook may have changed their memory layout. None means absent."""
    if operator is condensed_kd_backward and row_weight is None and rows is None and can_use_fast_path():
        gradient = _compiled.condensed_kd_backward(grad_output, student, teacher, labels, state, options)
        if gradient is not NotImplemented:
            return gradient
    labels = absent(student) if labels is None else make_readable_labels(labels)
    per_row = (absent(student) if x is None else x.contiguous() for x in (row_weight, rows, state))
    return operator(
        grad_output.contiguous(), make_readable(student), make_readable(teacher), labels, *per_row, *options
    )


def _backward_in_place(grad_output: Tensor, saved: tuple[Tensor | None, ...], options: tuple) -> Tensor:
    # The dispatcher cannot resolve the lazy negation bit for an operator that returns nothing.
    grad_output, student, *saved = (x if x is None else x.detach().resolve_neg() for x in (grad_output, *saved))
    student = make_readable(student)
    _call_backward(condensed_kd_backward_, grad_output, student, *saved, options)
    torch.autograd.graph.increment_version(student)
    return student


def _refuse_second_derivative(*_):
    raise RuntimeError(
        "condensed_kd_loss has no second derivative: use kcd_ext.reference.condensed_kd_loss, the same function in plain"
        " PyTorch"
    )


class _NoSecondDerivative(torch.autograd.Function):
    """A function that connects a gradient to its inputs, so that differentiating it raises instead of returning 0."""

    @staticmethod
    def forward(ctx, computed: tuple, *inputs: Tensor) -> Tensor:
        return computed[0]

    backward = staticmethod(_refuse_second_derivative)


def _condensed_kd_autograd_kernel(student, teacher, labels, score, row_weight, rows, *options):
    with BelowAutograd():
        loss, state, gradient = condensed_kd(student, teacher, labels, score, row_weight, rows, *options)
    if torch.is_grad_enabled() and student.requires_grad:
        loss = attach_autograd(loss, student, absent_to_none(teacher, labels, row_weight, rows), state, options[3:-1])
    return loss, state, gradient


def _backward_autograd_kernel(grad_output, student, *rest):
    with BelowAutograd():
        gradient = condensed_kd_backward(grad_output, student, *rest)
    if torch.is_grad_enabled() and (grad_output.requires_grad or student.requires_grad):
        gradient = _NoSecondDerivative.apply((gradient,), grad_output, student)
    return gradient


def _fallback_setup_context(ctx, inputs, output):
    student, teacher, labels, _, row_weight, rows, *options = inputs
    loss, state, gradient = output
    saved = absent_to_none(teacher, labels, row_weight, rows)
    CondensedKDFunction.forward(ctx, student, (loss, saved, (None, state, tuple(options[3:-1]), False, False, None)))
    ctx.mark_non_differentiable(state, gradient)
    ctx.set_materialize_grads(False)


def _fallback_backward(ctx, grad_output, *_):
    gradient = None if grad_output is None else CondensedKDFunction.backward(ctx, grad_output)[0]
    return gradient, *(None,) * 16


# Compiled graphs, torch.jit.trace and torch.ops call these kernels. Unlike torch.library.register_autograd, they raise
# torch.OutOfMemoryError there as well.
if BelowAutograd is not None:
    _autograd_kernels = torch.library.Library("kcd_ext", "IMPL")
    _autograd_kernels.impl("condensed_kd", _condensed_kd_autograd_kernel, "Autograd")
    _autograd_kernels.impl("condensed_kd_backward", _backward_autograd_kernel, "Autograd")
else:
    torch.library.register_autograd("kcd_ext::condensed_kd", _fallback_backward, setup_context=_fallback_setup_context)
    torch.library.register_autograd("kcd_ext::condensed_kd_backward", _refuse_second_derivative)


# ---- the eager fast path: csrc/fast_path.cpp


def can_use_fast_path() -> bool:
    """Return whether calls may bypass the dispatcher: not under tracing, dispatch modes or functorch transforms."""
    return HAS_FAST_PATH and dispatch_is_plain()


# Called with (student, teacher, labels or None, keep, value, options, with_gradient); keep and options are tuples of the
# operator's arguments. Returns what `condensed_kd` returns, or NotImplemented: the dispatcher then reports any error. Supports
# plain CPU tensors up to 1 MB.
fast_path: Callable | None = getattr(_compiled, "condensed_kd", None)
