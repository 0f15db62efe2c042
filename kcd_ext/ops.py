"""torch.library's side of the raw operators: shapes without data (fake kernels) and derivatives.

The operators themselves are in csrc/torch/ops.cpp.  They take a tensor that is absent as an empty one of dtype bool.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    _are_functorch_transforms_active,
    _dispatch_tls_is_dispatch_key_included,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _set_tracing_state,
)
from torch.autograd import forward_ad

from . import _extension
from .arguments import REDUCTIONS

build_info, _small = _extension.load()
has_small_loss = _small is not None
_WITH_CUDA = bool(build_info["cuda_architectures"]) and torch.version.hip is None  # ROCm's devices call themselves cuda

_ALLOCATION = re.compile(r"kcd_ext: allocating (-?\d+) bytes on .* failed")  # csrc/torch/abi.h


def _raising_out_of_memory(operator: Callable) -> Callable:
    """Return the operator as a function that raises torch.OutOfMemoryError, or on the CPU what torch raises, without memory."""

    def call(*arguments):
        try:
            return operator(*arguments)
        except RuntimeError as error:
            found = _ALLOCATION.search(str(error))
            if found is None:
                raise
            device = next(x.device for x in arguments if isinstance(x, Tensor))
            torch.empty(int(found[1]), dtype=torch.uint8, device=device)  # raises in torch's own words
            raise torch.OutOfMemoryError(str(error)) from error  # there was too little, and by now there is enough

    return call


# Carry their derivative: for torch.compile and torch.jit.trace.
condensed_kd = torch.ops.kcd_ext.condensed_kd.default
condensed_kd_backward = torch.ops.kcd_ext.condensed_kd_backward.default
# Carry none.
condensed_kd_forward = _raising_out_of_memory(torch.ops.kcd_ext.condensed_kd_forward.default)
condensed_kd_with_gradient = _raising_out_of_memory(
    torch.ops.kcd_ext.condensed_kd_with_gradient.default
)  # on the CPU alone
condensed_kd_gradient = _raising_out_of_memory(torch.ops.kcd_ext.condensed_kd_gradient.default)
condensed_kd_gradient_ = _raising_out_of_memory(torch.ops.kcd_ext.condensed_kd_gradient_.default)
row_stats = _raising_out_of_memory(torch.ops.kcd_ext.row_stats.default)
select_topk = _raising_out_of_memory(torch.ops.kcd_ext.select_topk.default)
reduce_rows = _raising_out_of_memory(torch.ops.kcd_ext.reduce_rows.default)


def register_recorded_operators(device: str) -> torch.library.Library:
    """Give the operators that carry their derivative the kernels of those that carry none, out of memory handled.

    A compiled graph calls them by the dispatcher, so that only a kernel in Python can raise torch.OutOfMemoryError there. On
    CUDA they have no other. Returns the registration, which lasts as long as it does.
    """
    library = torch.library.Library("kcd_ext", "IMPL")
    library.impl(condensed_kd, condensed_kd_forward, device)
    library.impl(condensed_kd_backward, condensed_kd_gradient, device)
    return library


_recorded_operators = register_recorded_operators("CUDA") if build_info["cuda_architectures"] else None

with torch.inference_mode(False):  # a tensor made in that mode could never be saved for a backward pass
    _ABSENT = torch.empty(0, dtype=torch.bool, device="cpu")

_PLAIN = (Tensor, torch.nn.Parameter)
_PRE_DISPATCH = DispatchKey.PreDispatch

ENTROPY, KL, STATS = 0, 1, 7  # csrc/kernels.h, enum Stats: two of its rows, and how many there are
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
    """Whether `condensed_kd_with_gradient` is there for these logits: on the CPU, and not for tensors without numbers."""
    return logits.is_cpu and type(logits) in _PLAIN


def accumulator_of(student: Tensor) -> torch.dtype:
    """float64 for float64 logits, else float32."""
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def is_tracing() -> bool:
    """Return whether torch.jit.trace records operators."""
    return not torch.compiler.is_compiling() and _get_tracing_state() is not None


def operators_are_watched() -> bool:
    """Return whether a tracer or a mode of torch's watches operators. It takes what they do not compute for a constant."""
    return bool(
        _len_torch_dispatch_stack()
        or _get_tracing_state() is not None
        or _dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
    )


@contextmanager
def untraced() -> Iterator[None]:
    """Hide what runs inside from torch.jit.trace: checks of arguments, whose look at shapes it would record.

    torch names the values of a graph by the variables that it finds them in, and takes two names for two graphs.
    """
    state = _get_tracing_state()
    _set_tracing_state(None)
    try:
        yield
    finally:
        _set_tracing_state(state)


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


def _per_row(student: Tensor, dtype: torch.dtype) -> Tensor:
    return student.new_empty(student.shape[:-1], dtype=dtype)


def _fake_rows(student: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulator_of(student)
    value = _per_row(student, dtype if score.dtype == torch.bool else score.dtype)
    return value, student.new_empty((STATS, value.numel()), dtype=dtype)


def _fake_loss(student: Tensor, reduction: int) -> Tensor:
    dtype = accumulator_of(student)
    return _per_row(student, dtype) if reduction == REDUCTION_NONE else student.new_empty((), dtype=dtype)


@torch.library.register_fake(condensed_kd)
@torch.library.register_fake("kcd_ext::condensed_kd_forward")
def _fake_forward(student, teacher, labels, score, row_weight, rows, *options):
    value, stats = _fake_rows(student, score)
    loss = _fake_loss(student, reduction=options[-2])
    return loss, value, stats, _per_row(student, torch.bool), student.new_empty(2, dtype=torch.int64)


@torch.library.register_fake("kcd_ext::condensed_kd_with_gradient")
def _fake_forward_with_gradient(student, *arguments):
    return *_fake_forward(student, *arguments), student.new_empty(student.shape)


@torch.library.register_fake(condensed_kd_backward)
@torch.library.register_fake("kcd_ext::condensed_kd_gradient")
def _fake_gradient(grad_output, student, *_):
    return student.new_empty(student.shape)


@torch.library.register_fake("kcd_ext::condensed_kd_gradient_")
def _fake_gradient_in_place(*_):
    return None


@torch.library.register_fake("kcd_ext::row_stats")
def _fake_row_stats(student, teacher, labels, score, *_):
    value, stats = _fake_rows(student, score)
    cross_entropy = student.new_empty(0 if labels.dtype == torch.bool else student.shape[:-1], dtype=stats.dtype)
    return value, stats, cross_entropy, _per_row(student, torch.bool)


@torch.library.register_fake("kcd_ext::select_topk")
def _fake_select(value, *_):
    return value.new_empty(value.shape, dtype=torch.bool)


@torch.library.register_fake("kcd_ext::reduce_rows")
def _fake_reduce(student, *options):
    return _fake_loss(student, reduction=options[-2])


# ---- derivatives


def _save_for_backward(ctx, inputs, output):
    student, teacher, labels, _, row_weight, rows, _, _, _, *options = inputs
    _, value, stats, selected, counts = output
    ctx.save_for_backward(student, teacher, labels, row_weight, rows, selected, stats, counts)
    ctx.options = options
    ctx.n_inputs = len(inputs)
    ctx.mark_non_differentiable(value, stats, selected, counts)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, *_):
    gradient = None
    if grad_output is not None:
        gradient = _gradient(condensed_kd_backward, grad_output, *ctx.saved_tensors, ctx.options)
    return gradient, *(None,) * (ctx.n_inputs - 1)


def _gradient(operator, grad_output, student, teacher, labels, row_weight, rows, selected, stats, counts, options):
    """Call a backward operator with saved tensors, which an unpack hook may return in any memory layout."""
    per_row = (x.contiguous() for x in (labels, row_weight, rows, selected, stats, counts))
    return operator(grad_output.contiguous(), readable(student), readable(teacher), *per_row, *options)


def _no_second_derivative(ctx, *_):
    raise RuntimeError(
        "condensed_kd_loss has no second derivative: for that use kcd_ext.reference.condensed_kd_loss, the same function in"
        " plain PyTorch"
    )


torch.library.register_autograd(condensed_kd, _backward, setup_context=_save_for_backward)
torch.library.register_autograd(condensed_kd_backward, _no_second_derivative)


class GradientOfStudent(torch.autograd.Function):
    """Ties a loss that is computed to the student's logits; `with_gradient` applies it.

    The eager path's door to autograd: torch.library's own wrapper costs 60 us a call, more than a small batch takes.
    """

    @staticmethod
    def forward(ctx, student: Tensor, computed: tuple) -> Tensor:
        """The loss, out of what `with_gradient` puts together: in a tuple, since autograd handles every tensor it sees."""
        loss, saved, ctx.constants, ctx.state, ctx.options, ctx.inplace, ctx.gradient = computed
        ctx.ahead = ctx.gradient is not None
        ctx.scales = student.dtype != torch.bfloat16
        ctx.save_for_backward(student, *saved)
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx, grad_output: Tensor | None) -> tuple[Tensor | None, None]:
        """The gradient with respect to the student's logits, (..., C) in their dtype."""
        if grad_output is None:
            return None, None
        if ctx.ahead and not torch.is_grad_enabled() and not operators_are_watched():
            factor = _number(grad_output)
            # bfloat16 would be rounded once more; what is not finite would make rows NaN that are not selected.
            if factor == 1 or (math.isfinite(factor) and ctx.scales):
                gradient, ctx.gradient = ctx.gradient, None  # handed over, once
                if gradient is None:  # another backward pass through a graph that is kept: the same bits
                    gradient = _gradient(condensed_kd_gradient, torch.ones_like(grad_output), *_saved(ctx), ctx.options)
                return gradient if factor == 1 else gradient.mul_(factor), None
        student, *saved = _saved(ctx)  # raises where an earlier backward pass overwrote the logits
        if ctx.inplace:
            if torch.is_grad_enabled():
                _no_second_derivative(ctx)
            # The dispatcher cannot negate lazily for an operator that returns nothing.
            grad_output, student, *saved = (x.detach().resolve_neg() for x in (grad_output, student, *saved))
            student = readable(student)
            _gradient(condensed_kd_gradient_, grad_output, student, *saved, ctx.options)
            torch.autograd.graph.increment_version(student)
            return student, None
        operator = condensed_kd_backward if torch.is_grad_enabled() else condensed_kd_gradient
        return _gradient(operator, grad_output, student, *saved, ctx.options), None


def _number(grad_output: Tensor) -> float:
    """Read where it lies: on the CPU there is nothing to wait for. NaN where several come as one (is_grads_batched)."""
    try:
        return grad_output.detach().numpy().item()
    except RuntimeError:
        return math.nan


def _saved(ctx) -> list[Tensor]:
    """Return what a backward operator takes behind grad_output. Unpacks the saved tensors: call it once."""
    student, *saved = ctx.saved_tensors
    saved = [constant if x is None else x for x, constant in zip(saved, ctx.constants, strict=True)]
    return [student, *saved, *ctx.state]


class GradientOfSmall(torch.autograd.Function):
    """`GradientOfStudent` for a loss of `small_loss`: all in C, but for what is rare."""

    forward = _small and staticmethod(_small.small_attach)

    @staticmethod
    def backward(ctx, grad_output: Tensor | None) -> tuple[Tensor | None, None, None]:
        """The gradient with respect to the student's logits, (..., C) in their dtype."""
        if grad_output is None:
            return None, None, None
        differentiable = torch.is_grad_enabled()
        gradient = _small.small_backward(ctx, grad_output, differentiable or operators_are_watched())
        if type(gradient) is tuple:  # what the operators take in its place
            student, teacher, labels, *rest, options = gradient
            operator = condensed_kd_backward if differentiable else condensed_kd_gradient
            saved = (student, teacher, _ABSENT if labels is None else labels, _ABSENT, _ABSENT, *rest)
            gradient = _gradient(operator, grad_output, *saved, options)
        return gradient, None, None


# Function.apply handles torch.func's transforms first, which are refused before this is reached.
_apply_without_transforms = super(torch.autograd.Function, GradientOfStudent).apply

_apply_small_without_transforms = super(torch.autograd.Function, GradientOfSmall).apply


def small_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    keep: tuple[float, int],
    value: int,
    options: tuple,
    differentiable: bool,
    ahead: bool,
    few_dimensions: bool,
) -> Tensor | None:
    """The loss by the door for small calls, with its derivative if it is to be `differentiable`; None where that does not serve.

    It serves plain tensors on the CPU, of up to 1 MB, outside of torch's transforms. Where `operators_are_watched` call the
    operators in its place.

    Args:
        student, teacher, labels: as `condensed_kd_loss` takes them, not checked.
        keep, value, options: as the operators take them.
        ahead: whether the forward pass writes the gradient.
        few_dimensions: whether logits of four dimensions or more are left to the operator.
    """
    plain = type(student) in _PLAIN and type(teacher) in _PLAIN and not teacher.requires_grad
    if not plain or (labels is not None and type(labels) not in _PLAIN):
        return None
    if _are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return None
    state = _small.small_forward(student, teacher, labels, keep, value, options, ahead, few_dimensions)
    if state is NotImplemented:
        return None
    if not differentiable:
        return _small.small_loss(state)
    return _apply_small_without_transforms(student, (teacher, labels), state)


def with_gradient(
    loss: Tensor,
    student: Tensor,
    inputs: tuple[Tensor, ...],
    state: tuple[Tensor, ...],
    options: tuple,
    inplace: bool,
    gradient: Tensor | None = None,
) -> Tensor:
    """The loss, differentiable with respect to the student's logits.

    Args:
        loss: computed without autograd.
        student: the logits it is a function of.
        inputs: teacher, labels, row_weight, rows, as the operators take them.
        state: selected, stats, counts, as the operators take them.
        options: the operators' temperature, kd_weight, ce_weight, ignore_index, reduction and number of processes.
        inplace: whether the gradient overwrites the logits.
        gradient: that of the loss, where it is at hand.
    """
    # Saved are the same tensors as by the door for small calls, since activation checkpointing may compute a loss by one way and
    # again by the other. Tensors made in inference mode cannot be saved for a backward pass; nor can they be changed before it.
    constants = [x if x.dtype == torch.bool or x.is_inference() else None for x in inputs]
    saved = [x if constant is None else None for x, constant in zip(inputs, constants, strict=True)]
    apply = GradientOfStudent.apply if torch.compiler.is_compiling() else _apply_without_transforms
    return apply(student, (loss, saved, constants, state, options, inplace, gradient))
