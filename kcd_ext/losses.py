"""The distillation loss that knows what is worth distilling: KL, knowledge value, selection and gradient in one operator."""

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import arguments, ops
from .arguments import LossOptions
from .describe import describe
from .knowledge import Knowledge
from .torch_internals import transforms_are_active, untraced

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_SCORES = len(arguments.VALUES)  # the operators' number for scores; a name's is its place in VALUES


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
    """Distillation of the rows worth it: temperature-scaled KL over the `keep` rows of highest knowledge value.

    Every leading index of the logits is a row: a sample, or a token.  With p = softmax(y/T), q = softmax(z/T) of teacher
    logits y and student logits z, S the selected rows and the valid rows those whose label is not `ignore_index`,

        loss = ce_weight * mean_valid CE_i + kd_weight * T² * mean_S row_weight_i * KL(p_i || q_i).

    One read of the logits gives loss, values and selection; the backward pass reads selected rows only (with labels, valid
    ones too). On the CPU, where at least a quarter of the rows are selected, that one read gives the gradient as well.
    Selection by the student's entropy is Knowledge Condensation Distillation's (Li et al., ECCV 2022, Eq. 7).

    Args:
        student_logits: (..., C), or with the classes in `class_dim`; float32, float64, float16 or bfloat16; differentiable.
            Read in place where the classes of a row lie side by side and the rows at no more than two strides, so that
            `logits[:, :-1]` is not copied.
        teacher_logits: as student_logits, of any of these dtypes; a constant. With `rows`, (m, C).
        temperature: T > 0.
        keep: a float in (0, 1]: k = max(1, int(keep * n)) of the n candidates; an int >= 1: k = min(keep, n). Candidates
            are the valid rows, with `rows` those among them. Ties go to the lower row.
        value: what rows are ranked by, highest first: "entropy" of softmax(z), "teacher_entropy" of softmax(y), "kl",
            "cross_entropy", or a floating-point tensor (...) of scores. A row that is not a number (NaN in either's logits,
            +inf, all -inf) has value NaN and ranks first, so that it reaches the loss. A class whose teacher probability
            is 0 even in float64, by -inf or by a mask of large negative logits, adds nothing, whatever the student says.
        labels: int64 (...): adds the cross entropy of softmax(z), and makes rows labelled `ignore_index` invalid.
        kd_weight, ce_weight: 1 and 0 without labels, 0.9 and 0.1 with them, as in KCD's recipe.
        row_weight: floating-point or bool (...), multiplies KL_i; a constant. Where it (or kd_weight) is 0 an infinite
            KL counts 0, one that is not a number stays.
        rows: int64 (m,), unique: the rows of the flattened student that `teacher_logits` holds, as `select_rows` gives them;
            entries of -1 are skipped.
        ignore_index: the label of rows that count for nothing; they are not read.
        reduction: "mean" (above), "sum" (the same without the two divisions), or "none": (...) with
            ce_weight * CE_i + [i in S] * kd_weight * T² * row_weight_i * KL_i.
        group: a torch.distributed process group: k and the means are global over its ranks, which must have equal numbers
            of rows; scaled so that DistributedDataParallel's averaged gradient is that of one process on all rows.
        inplace: the backward pass overwrites the student's logits with the gradient and allocates none. They must not be a
            leaf nor be needed by anything else; a second backward pass raises.
        class_dim: the dimension of the classes: 1 for segmentation logits (B, C, H, W), whose rows are then the pixels
            (B, H, W). None: the last one. Logits whose classes lie apart in memory are copied once.
        return_knowledge: also return the rows' Knowledge.

    Returns:
        The loss: float64 if the student is, else float32; a scalar, or (...) for reduction "none". No valid row and no
        candidate give 0. With `return_knowledge` a pair of it and Knowledge (value, entropy, kl, selected, n_selected).

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or range; nothing has been computed.
        IndexError: on the CPU, a label or an entry of rows is out of range. On CUDA, where checking would wait for the device,
            such a label makes that row's cross entropy and gradient NaN, such an entry of rows is skipped, and a row named
            twice has a KL of NaN; nothing is read out of bounds.
        RuntimeError: a second or a forward derivative is asked for, or one inside a torch.func transform; use
            `kcd_ext.reference.condensed_kd_loss`.

    Warns:
        UserWarning: logits of four dimensions or more come without `class_dim`, or there is only one class, whose probability
            is always 1. Not under torch.compile.

    Under torch.jit.trace the graph calls the operator, with its derivative, and takes batches of any size; `inplace` and `group`
    raise there. Under torch.compile an option that changes from call to call (an annealed temperature) compiles anew each
    time, as any Python number does; a weight that changes is better multiplied outside.
    """
    options = arguments.check_loss_options(
        temperature, keep, kd_weight, ce_weight, labels is not None, ignore_index, reduction
    )
    result = None
    if not (inplace or torch.compiler.is_compiling()) and row_weight is None and rows is None and group is None:
        result = _fast_path(student_logits, teacher_logits, labels, value, options, class_dim)
    if result is None:
        result = _dispatched(
            student_logits,
            teacher_logits,
            options,
            value=value,
            labels=labels,
            row_weight=row_weight,
            rows=rows,
            group=group,
            inplace=inplace,
            class_dim=class_dim,
        )
    loss, student, state = result
    return (loss, _knowledge(state, student, value)) if return_knowledge else loss


# Both ways return the loss with its derivative, the student's logits with their classes last, and the state.


def _fast_path(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    value: str | Tensor,
    options: LossOptions,
    class_dim: int | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Fast path for small CPU batches; None if an option is unsupported. The operator validates the arguments."""
    if not ops.fast_path_is_open():
        return None  # before anything that a tracer would record
    if not (isinstance(student, Tensor) and isinstance(value, str) and value in arguments.VALUES):
        return None
    if class_dim is None and student.dim() > 3:
        return None  # the caller is warned
    if class_dim is not None and not (type(class_dim) is int and class_dim == -1):
        return None
    if value == "cross_entropy" and labels is None:
        return None
    if getattr(teacher, "requires_grad", False) or _has_tangent(student):
        return None
    differentiable = student.requires_grad and torch.is_grad_enabled()
    ahead = differentiable and student.dim() > 0 and _writes_gradient(student, options)
    value_kind = arguments.VALUES.index(value)
    result = ops.fast_path(student, teacher, labels, options.keep, value_kind, options.operators, ahead)
    if result is NotImplemented:
        return None
    loss, state, gradient = result
    if differentiable:
        inputs = teacher, labels, None, None
        loss = ops.with_derivative(loss, student, inputs, state, options.operators, gradient=gradient)
    return loss, student, state


def _dispatched(
    student: Tensor,
    teacher: Tensor,
    options: LossOptions,
    *,
    value: str | Tensor,
    labels: Tensor | None,
    row_weight: Tensor | None,
    rows: Tensor | None,
    group: "ProcessGroup | None",
    inplace: bool,
    class_dim: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """By torch's dispatcher: any device and option, torch.compile and torch.jit.trace."""
    with untraced() if ops.is_tracing() else nullcontext():
        classes = arguments.check_loss_tensors(
            student,
            teacher,
            value=value,
            labels=labels,
            row_weight=row_weight,
            rows=rows,
            group=group,
            class_dim=class_dim,
        )
        _check_kernels(student)
        arguments.warn_about_classes(student, class_dim)
    student = arguments.classes_last(student, classes)
    if rows is None:
        teacher = arguments.classes_last(teacher, classes)
    differentiable = student.requires_grad and torch.is_grad_enabled()
    if inplace:
        _check_inplace(student, teacher, differentiable)
    if group is not None and ops.is_tracing():
        raise RuntimeError("group cannot be traced by torch.jit.trace, which records no collectives: leave it None")

    absent = ops.absent(student)
    student = ops.readable(student)
    teacher = teacher.detach() if teacher.requires_grad else teacher
    inputs = (
        ops.readable(teacher),
        absent if labels is None else labels.contiguous(),
        absent if isinstance(value, str) else _score(value, student),
        absent if row_weight is None else row_weight.detach().to(ops.accumulator_of(student)).contiguous(),
        absent if rows is None else rows.contiguous(),
    )
    value_kind = arguments.VALUES.index(value) if isinstance(value, str) else _SCORES
    if group is None and (torch.compiler.is_compiling() or ops.is_tracing()):
        # One node of the graph a direction: the operator carries its derivative.
        loss, state, _ = ops.recorded_condensed_kd(
            student, *inputs, *options.keep, value_kind, *options.operators, False
        )
        return loss, student, state
    _refuse_transforms(student)
    if group is None:
        ahead = differentiable and not inplace and _writes_gradient(student, options)
        arguments_of_operator = (*inputs, *options.keep, value_kind, *options.operators, ahead)
        loss, state, gradient = ops.condensed_kd(student.detach(), *arguments_of_operator)
        backward, gradient = options.operators, gradient if ahead else None
    else:
        loss, state, backward = _over_group(student.detach(), inputs, value_kind, options, group)
        gradient = None
    if differentiable:
        teacher, labels, _, row_weight, rows = inputs
        given = ops.given(teacher, labels, row_weight, rows)
        loss = ops.with_derivative(loss, student, given, state, backward, inplace, gradient)
    return loss, student, state


def _writes_gradient(student: Tensor, options: LossOptions) -> bool:
    """Whether the forward pass writes the gradient too, from exponentials it has at hand.

    On the CPU, and where at least a quarter of the rows are selected: it guesses which as it reads them, and with fewer the
    backward pass has less to do than that costs. Not in float16, whose gradient may need the factor of the backward pass to
    have digits at all.
    """
    per_row = options.operators[-2] == ops.REDUCTION_NONE  # with a factor a row
    if per_row or student.dtype == torch.float16 or not ops.writes_gradient_ahead(student):
        return False
    fraction, count = options.keep
    return 4 * count >= student.numel() // max(1, student.shape[-1]) if count else fraction >= 0.25


def _over_group(
    student: Tensor, inputs: tuple[Tensor, ...], value: int, options: LossOptions, group: "ProcessGroup"
) -> tuple[Tensor, Tensor, tuple]:
    """Several processes: each reads its rows, values are gathered (never logits), every rank selects among all of them.

    Returns the loss, the state, and the options of its backward pass.
    """
    import torch.distributed as dist

    size, rank = dist.get_world_size(group), dist.get_rank(group)
    teacher, labels, score, row_weight, rows = inputs
    state, cross_entropy, candidate = ops.row_stats(
        student, teacher, labels, score, rows, options.temperature, value, options.ignore_index
    )
    own = ops.arrays_of(state, student, ops.ranked_dtype(student, score)).value
    valid = torch.ones_like(candidate) if labels.dtype == torch.bool else labels != options.ignore_index

    local = torch.stack([x.reshape(-1).to(own.dtype) for x in (own, candidate, valid)])
    everywhere = [torch.empty_like(local) for _ in range(size)]
    dist.all_gather(everywhere, local, group=group)
    values, candidates, valids = torch.cat(everywhere, dim=1)  # in the order (rank, row), which settles ties
    chosen = ops.select_topk(values.contiguous(), candidates.bool(), *options.keep)

    counts = torch.stack([chosen.sum(), valids.sum(dtype=torch.int64)])
    n = own.numel()
    state = ops.with_selection(state, counts, chosen[rank * n : (rank + 1) * n])
    backward = (*options.operators[:-1], float(size))
    loss = ops.reduce_rows(student, labels, row_weight, state, cross_entropy, *backward)
    return loss, state, backward


def _knowledge(state: Tensor, student: Tensor, value: str | Tensor) -> Knowledge:
    """Return copies, so that the caller may change them; autograd has saved the state."""
    ranked, *rest = ops.arrays_of(state, student, _score_dtype(value, student))
    return Knowledge(ranked.to(value.dtype) if isinstance(value, Tensor) else ranked, *rest)


def select_rows(
    student_logits: Tensor,
    *,
    keep: float | int,
    value: str | Tensor = "entropy",
    labels: Tensor | None = None,
    ignore_index: int = -100,
    class_dim: int | None = None,
) -> tuple[Tensor, Knowledge]:
    """The rows worth asking the teacher about, before it runs: the entropy-first half of `condensed_kd_loss`.

        index, knowledge = select_rows(student(x), keep=0.3)
        named = index[index >= 0]                   # on the CPU; see Returns
        loss = condensed_kd_loss(z, teacher(x[named]), rows=named)

    It spares (1 - keep) of the teacher's forward pass.

    Args:
        student_logits: (..., C), as in `condensed_kd_loss`; nothing is differentiated.
        keep, labels, ignore_index, class_dim: as in `condensed_kd_loss`.
        value: "entropy", "cross_entropy" (with labels) or a floating-point tensor (...) of scores.

    Returns:
        index: int64 (k_max,), the selected rows of the flattened student in ascending order, then -1. Its length depends on
            shapes alone, max(1, int(keep * B)) or min(keep, B) of all B rows, so that nothing waits for the device; it is
            what `rows=` takes. Where ignored rows leave fewer to select, the rest is -1.
        knowledge: Knowledge, kl all NaN.

    Raises:
        TypeError, ValueError, IndexError: as `condensed_kd_loss`; a value that needs a teacher is a ValueError.
        RuntimeError: under torch.jit.trace, which would fix the length of `index`.

    Warns:
        UserWarning: as `condensed_kd_loss`.
    """
    arguments.check_logits("student_logits", student_logits, class_dim)
    classes = arguments.class_dim_of(student_logits, class_dim)
    arguments.check_value(student_logits, value, labels, classes)
    if labels is not None:
        arguments.check_labels(student_logits, labels, classes)
    _check_kernels(student_logits)
    if isinstance(value, str) and value in ("teacher_entropy", "kl"):
        raise ValueError(
            f"value={value!r} needs the teacher's logits, which select_rows is there to spare; use condensed_kd_loss"
        )
    kept = arguments.check_keep(keep)
    ignore_index = arguments.check_ignore_index(ignore_index)
    if ops.is_tracing():
        raise RuntimeError(
            "select_rows cannot be traced by torch.jit.trace, which would fix the length of the index: use torch.compile or"
            " torch.export"
        )
    arguments.warn_about_classes(student_logits, class_dim)

    student = ops.readable(arguments.classes_last(student_logits.detach(), classes))
    absent = ops.absent(student_logits)
    labels = absent if labels is None else labels.contiguous()
    score, value_kind = (
        (absent, arguments.VALUES.index(value)) if isinstance(value, str) else (_score(value, student), _SCORES)
    )
    state, _, candidate = ops.row_stats(student, absent, labels, score, absent, 1.0, value_kind, ignore_index)
    ranked = ops.arrays_of(state, student, ops.ranked_dtype(student, score)).value
    selected = ops.select_topk(ranked, candidate, *kept)
    # Selected rows first, in order; how many entries there are depends on the number of rows alone.
    order = torch.sort(selected.reshape(-1), descending=True, stable=True).indices[: kept.of(selected.numel())]
    position = torch.arange(order.shape[0], device=order.device)
    knowledge = _knowledge(state, student, value)
    no_teacher = torch.full_like(knowledge.entropy, math.nan)
    knowledge = knowledge._replace(kl=no_teacher, selected=selected, n_selected=selected.sum())
    return torch.where(position < knowledge.n_selected, order, torch.full_like(order, -1)), knowledge


class CondensedKDLoss(nn.Module):
    """`condensed_kd_loss` with its options held: `loss = criterion(student_logits, teacher_logits, labels=labels)`.

    Options are checked when they are given; what changes from batch to batch (labels, row_weight, rows, a score tensor as
    value) is passed to the call.
    """

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        keep: float | int = 1.0,
        value: str = "entropy",
        kd_weight: float | None = None,
        ce_weight: float | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        group: "ProcessGroup | None" = None,
        inplace: bool = False,
        class_dim: int | None = None,
        return_knowledge: bool = False,
    ) -> None:
        super().__init__()
        arguments.check_temperature(temperature)
        arguments.check_keep(keep)
        if not isinstance(value, str) or value not in arguments.VALUES:
            raise ValueError(
                f"value must be one of {', '.join(arguments.VALUES)}, got {describe(value)}; pass scores to the call"
            )
        for name, weight in (("kd_weight", kd_weight), ("ce_weight", ce_weight)):
            if weight is not None:
                arguments.check_number(name, weight)
        arguments.check_ignore_index(ignore_index)
        arguments.check_reduction(reduction)
        arguments.check_group(group)
        arguments.check_class_dim(class_dim)
        self.options = {
            "temperature": temperature,
            "keep": keep,
            "value": value,
            "kd_weight": kd_weight,
            "ce_weight": ce_weight,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "group": group,
            "inplace": inplace,
            "class_dim": class_dim,
            "return_knowledge": return_knowledge,
        }

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        labels: Tensor | None = None,
        row_weight: Tensor | None = None,
        rows: Tensor | None = None,
        value: str | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Knowledge]:
        """As `condensed_kd_loss`; `value` takes the place of the module's where it is given."""
        options = self.options if value is None else {**self.options, "value": value}
        return condensed_kd_loss(
            student_logits, teacher_logits, labels=labels, row_weight=row_weight, rows=rows, **options
        )

    def extra_repr(self) -> str:
        """The options that are set."""
        return ", ".join(f"{name}={option!r}" for name, option in self.options.items() if option is not None)


def _score(value: Tensor, student: Tensor) -> Tensor:
    """Return scores as the operators take them, exactly: at least as wide as the accumulator."""
    return value.detach().to(_score_dtype(value, student)).contiguous()


def _score_dtype(value: str | Tensor, student: Tensor) -> torch.dtype:
    is_double = isinstance(value, Tensor) and value.dtype == torch.float64
    return torch.float64 if is_double else ops.accumulator_of(student)


def _check_kernels(student: Tensor) -> None:
    if ops.has_kernels_for(student):
        return
    built = "and CUDA" if ops.build_info["cuda_architectures"] else "alone in this build, which was made without nvcc"
    raise ValueError(
        f"kcd_ext has kernels for the CPU {built}, got logits on {student.device}: use kcd_ext.reference, the same function"
        " in plain PyTorch for any device"
    )


def _check_inplace(student: Tensor, teacher: Tensor, differentiable: bool) -> None:
    if torch.compiler.is_compiling() or ops.is_tracing():
        raise ValueError(
            "inplace=True is not possible under torch.compile, which plans memory by itself, nor under torch.jit.trace: leave"
            " it False"
        )
    if not differentiable:
        return
    base = student if student._base is None else student._base  # what a view is of
    if student.is_leaf or (base.is_leaf and base.requires_grad):
        raise ValueError("inplace=True would overwrite student_logits, a leaf that requires grad (or a view of one)")
    if not ops.lies_in_place(student) or _overlaps_itself(student):
        raise ValueError(
            f"inplace=True needs student_logits whose rows lie apart and whose classes lie side by side, got shape"
            f" {tuple(student.shape)} with strides {student.stride()}"
        )
    if student.untyped_storage().data_ptr() == teacher.untyped_storage().data_ptr():
        raise ValueError("inplace=True would overwrite teacher_logits, which share the memory of student_logits")


def _overlaps_itself(logits: Tensor) -> bool:
    """Whether two elements may be one: a dimension's stride is less than the extent of those inside it."""
    extent = 1
    for stride, size in sorted((s, n) for s, n in zip(logits.stride(), logits.shape, strict=True) if n > 1):
        if stride < extent:
            return True
        extent = stride * (size - 1) + extent
    return False


def _has_tangent(student: Tensor) -> bool:
    return forward_ad.unpack_dual(student).tangent is not None


def _refuse_transforms(student: Tensor) -> None:
    """The operator has one derivative, the reverse one: another would silently come out as 0."""
    if transforms_are_active() or _has_tangent(student):
        raise RuntimeError(
            "condensed_kd_loss has no forward derivative and no rule for torch.func's transforms: for those use"
            " kcd_ext.reference.condensed_kd_loss, the same function in plain PyTorch"
        )
