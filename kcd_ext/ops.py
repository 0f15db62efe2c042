"""torch.library's side of the operators: shapes without data (fake kernels), the derivative, and the eager fast path.

The operators themselves are in csrc/torch/ops.cpp.  They take a tensor that is absent as an empty one of dtype bool.
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
HAS_FAST_PATH: bool = hasattr(_compiled, "condensed_kd")  # csrc/fast_path.h: this torch publishes what it needs
_WITH_CUDA = bool(build_info["cuda_architectures"]) and torch.version.hip is None  # ROCm's devices call themselves cuda

_ALLOCATION = re.compile(r"kcd_ext: allocating (-?\d+) bytes on .* failed")  # csrc/torch/abi.h


def _kernel_of(operator: Callable) -> Callable:
    """Return the operator without its derivative, as a function.

    Without memory it raises torch.OutOfMemoryError, or on the CPU what torch raises.
    """

    def call(*arguments):
        recorded = BelowAutograd is None or torch.compiler.is_compiling()  # torch.compile would break the graph there
        try:
            with nullcontext() if recorded else BelowAutograd():
                return operator(*arguments)
        except RuntimeError as error:
            found = _ALLOCATION.search(str(error))
            if found is None:
                raise
            device = next(x.device for x in arguments if isinstance(x, Tensor))
            torch.empty(int(found[1]), dtype=torch.uint8, device=device)  # raises in torch's own words
            raise torch.OutOfMemoryError(str(error)) from error  # there was too little, and by now there is enough

    return call


condensed_kd = _kernel_of(torch.ops.kcd_ext.condensed_kd.default)
condensed_kd_backward = _kernel_of(torch.ops.kcd_ext.condensed_kd_backward.default)
condensed_kd_backward_ = _kernel_of(torch.ops.kcd_ext.condensed_kd_backward_.default)
row_stats = _kernel_of(torch.ops.kcd_ext.row_stats.default)
select_topk = _kernel_of(torch.ops.kcd_ext.select_topk.default)
reduce_rows = _kernel_of(torch.ops.kcd_ext.reduce_rows.default)

# With their derivatives, as torch.compile and torch.jit.trace record them.
recorded_condensed_kd = torch.ops.kcd_ext.condensed_kd.default
recorded_condensed_kd_backward = torch.ops.kcd_ext.condensed_kd_backward.default

with torch.inference_mode(False):  # a tensor made in that mode could never be saved for a backward pass
    _ABSENT = torch.empty(0, dtype=torch.bool, device="cpu")

_PLAIN = (Tensor, torch.nn.Parameter)
REDUCTION_NONE = REDUCTIONS.index("none")


def absent(like: Tensor) -> Tensor:
    """What stands for a tensor that is not there: one for all plain tensors, since making it takes 3 us.

    A compiled graph on a GPU gets one of its own there: with a tensor on the CPU among its inputs it may not become a CUDA graph.
    """
    plain = type(like) in _PLAIN and (like.is_cpu or not torch.compiler.is_compiling())
    return _ABSENT if plain else like.new_empty(0, dtype=torch.bool)


def has_kernels_for(logits: Tensor) -> bool:
    """Whether this build has kernels for the device the logits are on."""
    return logits.is_cpu or (_WITH_CUDA and logits.is_cuda)


def writes_gradient_ahead(logits: Tensor) -> bool:
    """Whether `condensed_kd` takes `with_gradient` for these logits: on the CPU, and not for tensors without numbers."""
    return logits.is_cpu and type(logits) in _PLAIN


def accumulator_of(student: Tensor) -> torch.dtype:
    """float64 for float64 logits, else float32."""
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def is_tracing() -> bool:
    """Return whether torch.jit.trace records operators."""
    return not torch.compiler.is_compiling() and torch.jit.is_tracing()


def given(*inputs: Tensor) -> tuple[Tensor | None, ...]:
    """Return the tensors, with None for those that are absent."""
    return tuple(None if x.dtype == torch.bool else x for x in inputs)


# ---- the state: one tensor of bytes, laid out as csrc/kernels.h says

_COUNTS, _STATS, _ENTROPY, _KL = _compiled.STATE


def with_selection(state: Tensor, counts: Tensor, selected: Tensor) -> Tensor:
    """Return the state with a selection, for which it was computed without one.

    Args:
        state: as `row_stats` leaves it.
        counts: int64 (2,), how many rows are selected and how many are valid.
        selected: bool (...).
    """
    rest = state[_COUNTS * 8 : state.numel() - selected.numel()]
    return torch.cat((counts.view(torch.uint8), rest, selected.reshape(-1).to(torch.uint8)))


class StateArrays(NamedTuple):
    """What a state holds of every row, (...) the shape of the logits without their classes."""

    value: Tensor
    """(...) what rows are ranked by: of the scores' dtype, or the accumulator's."""
    entropy: Tensor
    """(...) of the accumulator's dtype."""
    kl: Tensor
    """(...) of the accumulator's dtype."""
    selected: Tensor
    """bool (...)."""
    n_selected: Tensor
    """int64 scalar: how many of these rows are selected."""


def arrays_of(state: Tensor, student: Tensor, value_dtype: torch.dtype) -> StateArrays:
    """Return copies of the arrays of what `condensed_kd` or `row_stats` left of these logits.

    The caller may change them, or keep one without the rest. torch.jit.trace records view_copy, but no view of another dtype.
    """
    if not torch.compiler.is_compiling() and fast_path_is_open():
        copies = _compiled.knowledge(state, student)
        if copies is not NotImplemented:
            return StateArrays(*copies)
    accumulator, shape = accumulator_of(student), student.shape[:-1]
    stats = value_dtype.itemsize  # bytes of a row before
    selected = stats + _STATS * accumulator.itemsize
    rows = state[_COUNTS * 8 :].view(selected + 1, *shape)

    def array(first: int, dtype: torch.dtype) -> Tensor:
        return torch.view_copy(rows[first : first + dtype.itemsize].reshape(-1), dtype).view(shape)

    entropy, kl = (array(stats + i * accumulator.itemsize, accumulator) for i in (_ENTROPY, _KL))
    chosen = rows[selected] != 0  # no view: the C++ that torch.compile writes for one does not compile
    return StateArrays(array(0, value_dtype), entropy, kl, chosen, chosen.sum())


def ranked_dtype(student: Tensor, score: Tensor) -> torch.dtype:
    """Return the dtype of a state's values."""
    return accumulator_of(student) if score.dtype == torch.bool else score.dtype


def _state_bytes(student: Tensor, score: Tensor) -> int:
    row = ranked_dtype(student, score).itemsize + _STATS * accumulator_of(student).itemsize + 1
    return _COUNTS * 8 + math.prod(student.shape[:-1]) * row


# ---- memory layouts


def lies_in_place(logits: Tensor) -> bool:
    """Return whether the kernels can read logits (..., C) in place: classes side by side, rows at no more than two strides."""
    if logits.is_contiguous():
        return True
    sizes, strides = logits.shape, logits.stride()
    if sizes[-1] > 1 and strides[-1] != 1:
        return False
    runs = 0
    expected = None
    for size, stride in zip(reversed(sizes[:-1]), reversed(strides[:-1]), strict=True):
        if size == 1:
            continue
        if stride != expected:
            runs += 1
        expected = size * stride
    return runs <= 2


def readable(logits: Tensor) -> Tensor:
    """Return the logits, copied where the kernels could not read them.

    A graph that torch.jit.trace records copies in any case: what it records must read logits of every layout.
    """
    return logits if not is_tracing() and lies_in_place(logits) else logits.contiguous()


# ---- fake kernels


def _fake_state(student: Tensor, score: Tensor) -> Tensor:
    return student.new_empty(_state_bytes(student, score), dtype=torch.uint8)


def _fake_loss(student: Tensor, reduction: int) -> Tensor:
    return student.new_empty(student.shape[:-1] if reduction == REDUCTION_NONE else (), dtype=accumulator_of(student))


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
        0 if labels.dtype == torch.bool else student.shape[:-1], dtype=accumulator_of(student)
    )
    return _fake_state(student, score), cross_entropy, student.new_empty(student.shape[:-1], dtype=torch.bool)


@torch.library.register_fake("kcd_ext::select_topk")
def _fake_select(value, *_):
    return value.new_empty(value.shape, dtype=torch.bool)


@torch.library.register_fake("kcd_ext::reduce_rows")
def _fake_reduce(student, *options):
    return _fake_loss(student, reduction=options[-2])


# ---- the derivative: one function, for eager calls, process groups and recorded graphs


def with_derivative(
    loss: Tensor,
    student: Tensor,
    inputs: tuple[Tensor | None, ...],
    state: Tensor,
    options: tuple,
    inplace: bool = False,
    gradient: Tensor | None = None,
) -> Tensor:
    """Return the loss, differentiable with respect to the student's logits.

    Args:
        loss: computed without autograd.
        student: the logits it is a function of.
        inputs: teacher, labels, row_weight, rows, as the operators take them; None for those that are absent.
        state: as `condensed_kd` leaves it, nobody else's: hooks of saved tensors do not see it.
        options: the operators' temperature, kd_weight, ce_weight, ignore_index, reduction and number of processes.
        inplace: whether the gradient overwrites the logits.
        gradient: that of the loss for an incoming gradient of 1, if the forward pass wrote it. It is handed over.
    """
    # Autograd cannot save tensors made in inference mode; nor can they be changed before the backward pass.
    saved, constants = inputs, None
    for x in inputs:
        if x is not None and x.is_inference():
            saved, constants = [None if x is None or x.is_inference() else x for x in inputs], inputs
            break
    # Whether a gradient times a number is the same as computed with it: bfloat16 would be rounded once more.
    scales = student.dtype != torch.bfloat16
    ahead = None if gradient is None else [gradient]  # a list, whose pop() is thread-safe
    apply = CondensedKD.apply if torch.compiler.is_compiling() else _apply
    # In a tuple, because autograd handles every tensor that it sees.
    return apply(student, (loss, saved, (constants, state, options, inplace, scales, ahead)))


class CondensedKD(torch.autograd.Function):
    """The derivative of `condensed_kd`, with respect to the student's logits alone."""

    @staticmethod
    def forward(ctx, student: Tensor, computed: tuple) -> Tensor:
        """Return the loss that `with_derivative` was given."""
        loss, saved, ctx.call = computed
        ctx.save_for_backward(student, *saved)
        return loss

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:
        """Return the gradient with respect to the student's logits, (..., C) in their dtype."""
        differentiable = torch.is_grad_enabled()
        _, _, options, inplace, scales, ahead = ctx.call
        if ahead is not None and not differentiable and dispatch_is_plain():
            factor = grad_output.tolist()  # sooner than item(), which dispatches
            if factor == 1:
                return _take_gradient(ctx, ahead, grad_output), None
            # What is not finite would make rows NaN that are not selected.
            if scales and math.isfinite(factor):
                return _take_gradient(ctx, ahead, grad_output).mul_(factor), None
        saved = _unpack(ctx)  # raises where an earlier backward pass overwrote the logits
        if inplace:
            if differentiable:
                _refuse_second_derivative()
            return _backward_in_place(grad_output, saved, options), None
        operator = recorded_condensed_kd_backward if differentiable else condensed_kd_backward
        return _backward(operator, grad_output, *saved, options), None


# Function.apply handles torch.func's transforms first, which are refused before this is reached.
_apply = super(torch.autograd.Function, CondensedKD).apply


def _take_gradient(ctx, ahead: list[Tensor], grad_output: Tensor) -> Tensor:
    """Return the gradient that the forward pass wrote; in further backward passes the same bits, computed anew."""
    try:
        return ahead.pop()
    except IndexError:
        return _backward(condensed_kd_backward, torch.ones_like(grad_output), *_unpack(ctx), ctx.call[2])


def _unpack(ctx) -> tuple[Tensor | None, ...]:
    """Return student, teacher, labels, row_weight, rows and state. Runs the unpack hooks of saved tensors: call it once."""
    constants, state, *_ = ctx.call
    if constants is None:
        return *ctx.saved_tensors, state
    student, *saved = ctx.saved_tensors
    return student, *(constant if x is None else x for x, constant in zip(saved, constants, strict=True)), state


def _backward(operator, grad_output, student, teacher, labels, row_weight, rows, state, options):
    """Call a backward operator with saved tensors, which an unpack hook may return in any memory layout; None: absent."""
    if operator is condensed_kd_backward and row_weight is None and rows is None and fast_path_is_open():
        gradient = _compiled.condensed_kd_backward(grad_output, student, teacher, labels, state, options)
        if gradient is not NotImplemented:
            return gradient
    per_row = (absent(student) if x is None else x.contiguous() for x in (labels, row_weight, rows, state))
    return operator(grad_output.contiguous(), readable(student), readable(teacher), *per_row, *options)


def _backward_in_place(grad_output: Tensor, saved: tuple[Tensor | None, ...], options: tuple) -> Tensor:
    # The dispatcher cannot negate lazily for an operator that returns nothing.
    grad_output, student, *saved = (x if x is None else x.detach().resolve_neg() for x in (grad_output, *saved))
    student = readable(student)
    _backward(condensed_kd_backward_, grad_output, student, *saved, options)
    torch.autograd.graph.increment_version(student)
    return student


def _refuse_second_derivative(*_):
    raise RuntimeError(
        "condensed_kd_loss has no second derivative: for that use kcd_ext.reference.condensed_kd_loss, the same function in"
        " plain PyTorch"
    )


class _NoSecondDerivative(torch.autograd.Function):
    """Ties a gradient to what it is a function of, so that its derivative raises instead of being 0."""

    @staticmethod
    def forward(ctx, computed: tuple, *inputs: Tensor) -> Tensor:
        return computed[0]

    backward = staticmethod(_refuse_second_derivative)


def _condensed_kd_by_autograd(student, teacher, labels, score, row_weight, rows, *options):
    with BelowAutograd():
        loss, state, gradient = condensed_kd(student, teacher, labels, score, row_weight, rows, *options)
    if torch.is_grad_enabled() and student.requires_grad:
        loss = with_derivative(loss, student, given(teacher, labels, row_weight, rows), state, options[3:-1])
    return loss, state, gradient


def _backward_by_autograd(grad_output, student, *rest):
    with BelowAutograd():
        gradient = condensed_kd_backward(grad_output, student, *rest)
    if torch.is_grad_enabled() and (grad_output.requires_grad or student.requires_grad):
        gradient = _NoSecondDerivative.apply((gradient,), grad_output, student)
    return gradient


def _setup_context(ctx, inputs, output):
    student, teacher, labels, _, row_weight, rows, *options = inputs
    loss, state, gradient = output
    saved = given(teacher, labels, row_weight, rows)
    CondensedKD.forward(ctx, student, (loss, saved, (None, state, tuple(options[3:-1]), False, False, None)))
    ctx.mark_non_differentiable(state, gradient)
    ctx.set_materialize_grads(False)


def _backward_of_all(ctx, grad_output, *_):
    gradient = None if grad_output is None else CondensedKD.backward(ctx, grad_output)[0]
    return gradient, *(None,) * 15


# What a compiled graph, torch.jit.trace and torch.ops call. Its kernels are in Python to raise torch.OutOfMemoryError there too,
# which those of torch.library.register_autograd do not.
if BelowAutograd is not None:
    _autograd_kernels = torch.library.Library("kcd_ext", "IMPL")
    _autograd_kernels.impl("condensed_kd", _condensed_kd_by_autograd, "Autograd")
    _autograd_kernels.impl("condensed_kd_backward", _backward_by_autograd, "Autograd")
else:
    torch.library.register_autograd("kcd_ext::condensed_kd", _backward_of_all, setup_context=_setup_context)
    torch.library.register_autograd("kcd_ext::condensed_kd_backward", _refuse_second_derivative)


# ---- the eager fast path: csrc/fast_path.cpp


def fast_path_is_open() -> bool:
    """Return whether calls may bypass the dispatcher: outside tracing, dispatch modes and functorch transforms."""
    return HAS_FAST_PATH and dispatch_is_plain()


# (student, teacher, labels or None, keep, value, options, with_gradient) -> what `condensed_kd` returns, or NotImplemented, and the
# operator then reports any error. keep and options are tuples of its arguments. Supports plain CPU tensors up to 1 MB.
fast_path: Callable | None = getattr(_compiled, "condensed_kd", None)
