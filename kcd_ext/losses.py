"""The fused distillation loss: KL divergence, knowledge value, selection and gradient in one operator."""

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


# The operators take `value` as an integer: the position of its name in VALUES, or this one for a tensor of scores.
_SCORE_KIND = len(arguments.VALUES)


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
    """Return the distillation loss over the rows that are most worth distilling.

    Use it instead of `F.kl_div` on softened logits. It ranks the rows of a batch by a *knowledge value*, selects the `keep`
    highest, and distils only those:

        loss = ce_weight * mean of CE_i over the valid rows
             + kd_weight * T² * mean of row_weight_i * KL(p_i || q_i)
               over the selected rows

    - A *row* is one leading index of the logits: a sample, a token or a pixel.
    - `p = softmax(teacher_logits / T)` and `q = softmax(student_logits / T)`, with `T = temperature`.
    - `CE_i` is the cross entropy of `softmax(student_logits)` and the row's label: a class index or a probability of each
      class, smoothed by `label_smoothing`.
    - A row is *valid* unless its label is `ignore_index`. Without labels every row is valid.
    - A *candidate* is a valid row that the teacher has scored. Without `rows` these are all valid rows.

    The default selects by the student's entropy, as Knowledge Condensation Distillation does
    ([Li et al., ECCV 2022](https://arxiv.org/abs/2207.05409), Eq. 7).

    The forward pass reads the logits once. The backward pass reads only selected rows, and with labels all valid ones. On the
    CPU, if at least a quarter of the rows are selected, the forward pass already computes the gradient.

    Args:
        student_logits: Shape `(..., C)`, or with the classes in `class_dim`. Must be float32, float64, float16 or bfloat16.
            Gradients flow to this argument only. Strided views such as `logits[:, :-1]` are read in place, as long as the
            classes of a row are adjacent in memory and the rows have at most two strides. Other layouts are copied once.
        teacher_logits: Same shape as `student_logits`, or `(m, C)` with `rows`. Any of the four dtypes. Treated as constant.
        temperature: Softening temperature `T`, between 1e-18 and 1e18.
        keep: How many of the `n` candidates to select. A float in (0, 1] selects `max(1, int(keep * n))` rows, an int >= 1
            selects `min(keep, n)`. Equal values are selected in row order.
        value: What ranks the rows, highest first. Either a name or a tensor:

            - `"entropy"`: entropy of `softmax(student_logits)`;
            - `"teacher_entropy"`: entropy of `softmax(teacher_logits)`;
            - `"kl"`: the row's KL divergence at temperature `T`;
            - `"cross_entropy"`: the row's cross entropy with its label smoothing, needs `labels`;
            - a floating-point tensor of shape `(...)` with one score per row.
        labels: Class indices, int64 of shape `(...)`, or probabilities, floating-point in the shape of `student_logits`. Adds
            the cross entropy to the loss. Probabilities are constants and need not sum to 1. They are read in place under
            the same conditions as the logits.
        kd_weight: Weight of the distillation term. Default: 1, or 0.9 with `labels` (the paper's recipe).
        ce_weight: Weight of the cross entropy. Default: 0, or 0.1 with `labels`.
        row_weight: Factor of each row's KL divergence. Floating-point or bool tensor of shape `(...)`, treated as constant.
        rows: Indices of the rows that `teacher_logits` holds, int64 of shape `(m,)` without repeats, counted in the
            flattened student. Pass the index of `select_rows`. Entries of -1 are skipped.
        label_smoothing: A number `s` in [0, 1]. The cross entropy is then taken with the targets `(1 - s) * label + s / C`, as
            in `torch.nn.functional.cross_entropy`.
        ignore_index: Label of rows to ignore. Their logits are never read. Must be left at -100 if labels are probabilities.
        reduction: `"mean"` is the formula above. `"sum"` leaves out both divisions. `"none"` returns shape `(...)` with
            `ce_weight * CE_i`, plus `kd_weight * T² * row_weight_i * KL_i` in selected rows.
        group: A `torch.distributed` process group. `keep` and the means then count the rows of all ranks, so that
            DistributedDataParallel's averaged gradient equals that of one process on all rows. Every rank must pass the
            same number of rows.
        inplace: Let the backward pass overwrite `student_logits` with their gradient instead of allocating one. The logits
            must not be a leaf, and nothing else may need them. A second backward pass raises.
        class_dim: Dimension of the classes; the last one by default. Pass 1 for segmentation logits `(B, C, H, W)`: each
            pixel is then a row, and per-row tensors have shape `(B, H, W)`. Logits are copied once unless their classes are
            adjacent in memory.
        return_knowledge: Also return the `Knowledge` of every row.

    Returns:
        The loss in float64 if the student's logits are float64, else in float32. It is a scalar, or has shape `(...)` with
            `reduction="none"`. A mean over no rows counts 0. With `return_knowledge=True`, the pair `(loss, knowledge)`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or range, or arguments contradict each other. On the CPU also if
            `rows` names a row twice. Nothing has been computed yet.
        IndexError: A label or an entry of `rows` is out of range (CPU only; see the notes for CUDA).
        RuntimeError: A second or forward-mode derivative or a `torch.func` transform was requested, or torch.jit.trace meets
            `group`. Use `kcd_ext.reference` for these derivatives.

    Warns:
        UserWarning: Logits of four or more dimensions come without `class_dim`, or there is only one class, whose
            probability is always 1. Silent under torch.compile.

    Examples:
        Distil the less certain half of the batch:

        >>> import torch
        >>> from kcd_ext import condensed_kd_loss
        >>> student = torch.tensor([[9.0, 0.0, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[8.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
        >>> loss, knowledge = condensed_kd_loss(student, teacher, keep=0.5, return_knowledge=True)
        >>> knowledge.selected
        tensor([False,  True])
        >>> loss.backward()
        >>> student.grad.count_nonzero(dim=1)
        tensor([0, 3])

        Add the cross entropy. The defaults are 0.9 and 0.1, a label of -100 ignores its row:

        >>> loss = condensed_kd_loss(student, teacher, labels=torch.tensor([0, -100]), temperature=2.0)

    Notes:
        **NaN and infinity.** A candidate whose student or teacher logits contain NaN or +inf, or are all -inf, has value NaN.
        It ranks first, so that the loss shows it. A class adds nothing to the KL divergence if its teacher probability is 0
        even in float64, because the logit is -inf or a large negative mask. An infinite KL divergence counts 0 if
        `row_weight` or `kd_weight` is 0; NaN stays NaN. A class whose target is 0 adds nothing to the cross entropy, even if
        its student logit is -inf; `torch.nn.functional.cross_entropy` returns NaN there if labels are probabilities.

        **CUDA.** Checking indices would synchronise with the device. A label out of range makes the cross entropy and the
        gradient of its row NaN, an entry of `rows` out of range is skipped, and a row named twice gets a KL divergence of
        NaN. Nothing is read out of bounds.

        **Graphs.** torch.compile sees one node per direction. An option that changes between calls (an annealed temperature)
        recompiles each time, as any Python number does; multiply a changing weight outside. torch.jit.trace records the
        operator with its derivative, for batches of any size. Both refuse `inplace=True`.
    """
    options = arguments.check_loss_options(
        temperature, keep, value, labels, kd_weight, ce_weight, label_smoothing, ignore_index, reduction
    )
    result = None
    if not (inplace or torch.compiler.is_compiling()) and row_weight is None and rows is None and group is None:
        result = _fast_path(student_logits, teacher_logits, labels, value, options, class_dim)
    if result is None:
        result = _dispatch(
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


# Both paths return the differentiable loss, the student's logits with the classes last, and the state.


def _fast_path(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    value: str | Tensor,
    options: LossOptions,
    class_dim: int | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Run a small CPU batch past the dispatcher. Return None if a call is unsupported; the dispatcher then validates it."""
    if not ops.can_use_fast_path():
        return None  # must come first: a tracer would record the checks below
    if not (isinstance(student, Tensor) and isinstance(value, str) and value in arguments.VALUES):
        return None
    if class_dim is None and student.dim() > 3:
        return None  # the other path warns about these
    if class_dim is not None and not (type(class_dim) is int and class_dim == -1):
        return None
    if value == "cross_entropy" and labels is None:
        return None
    if getattr(teacher, "requires_grad", False) or getattr(labels, "requires_grad", False) or _has_tangent(student):
        return None
    differentiable = student.requires_grad and torch.is_grad_enabled()
    with_gradient = differentiable and student.dim() > 0 and _gradient_in_forward(student, options)
    value_kind = arguments.VALUES.index(value)
    result = ops.fast_path(student, teacher, labels, options.keep, value_kind, options.operators, with_gradient)
    if result is NotImplemented:
        return None
    loss, state, gradient = result
    if differentiable:
        inputs = teacher, labels, None, None
        loss = ops.attach_autograd(loss, student, inputs, state, options.operators, gradient=gradient)
    return loss, student, state


def _dispatch(
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
    """Run through torch's dispatcher: supports every device and option, torch.compile and torch.jit.trace."""
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
        _check_device(student)
        arguments.warn_about_classes(student, class_dim)
    student = arguments.classes_last(student, classes)
    if rows is None:
        teacher = arguments.classes_last(teacher, classes)
    if arguments.are_probabilities(labels):
        labels = arguments.classes_last(labels, classes)
    differentiable = student.requires_grad and torch.is_grad_enabled()
    if inplace:
        _check_inplace(student, {"teacher_logits": teacher, "labels": labels}, differentiable)
    if group is not None and ops.is_tracing():
        raise RuntimeError("group is not supported by torch.jit.trace, which records no collectives: leave it None")

    absent = ops.absent(student)
    student = ops.make_readable(student)
    teacher = teacher.detach() if teacher.requires_grad else teacher
    inputs = (
        ops.make_readable(teacher),
        absent if labels is None else ops.make_readable_labels(labels),
        absent if isinstance(value, str) else _prepare_score(value, student),
        absent if row_weight is None else row_weight.detach().to(ops.accumulator_dtype(student)).contiguous(),
        absent if rows is None else rows.contiguous(),
    )
    value_kind = arguments.VALUES.index(value) if isinstance(value, str) else _SCORE_KIND
    if group is None and (torch.compiler.is_compiling() or ops.is_tracing()):
        # The operator carries its own derivative, so that a graph has one node per direction.
        loss, state, _ = ops.traceable_condensed_kd(
            student, *inputs, *options.keep, value_kind, *options.operators, False
        )
        return loss, student, state
    _check_no_transforms(student)
    if group is None:
        with_gradient = differentiable and not inplace and _gradient_in_forward(student, options)
        operator_arguments = (*inputs, *options.keep, value_kind, *options.operators, with_gradient)
        loss, state, gradient = ops.condensed_kd(student.detach(), *operator_arguments)
        backward_options, gradient = options.operators, gradient if with_gradient else None
    else:
        loss, state, backward_options = _run_over_group(student.detach(), inputs, value_kind, options, group)
        gradient = None
    if differentiable:
        teacher, labels, _, row_weight, rows = inputs
        saved = ops.absent_to_none(teacher, labels, row_weight, rows)
        loss = ops.attach_autograd(loss, student, saved, state, backward_options, inplace, gradient)
    return loss, student, state


def _gradient_in_forward(student: Tensor, options: LossOptions) -> bool:
    """Return whether the forward pass should also compute the gradient, whose exponentials it has anyway.

    The CPU kernel guesses the selected rows while it reads them. That pays off if at least a quarter of them are selected;
    below that the backward pass is cheaper. Not in float16: such a gradient may underflow unless the backward pass scales it.
    """
    scaled_per_row = options.operators[-2] == ops.REDUCTION_NONE
    if scaled_per_row or student.dtype == torch.float16 or not ops.supports_gradient_in_forward(student):
        return False
    fraction, count = options.keep
    return 4 * count >= student.numel() // max(1, student.shape[-1]) if count else fraction >= 0.25


def _run_over_group(
    student: Tensor, inputs: tuple[Tensor, ...], value_kind: int, options: LossOptions, group: "ProcessGroup"
) -> tuple[Tensor, Tensor, tuple]:
    """Run on all ranks of a group: each reads its own rows, gathers the values (never logits) and selects among all rows.

    Returns:
        The loss, the state, and the options of the backward pass.
    """
    import torch.distributed as dist

    size, rank = dist.get_world_size(group), dist.get_rank(group)
    teacher, labels, score, row_weight, rows = inputs
    state, cross_entropy, candidate = ops.row_stats(
        student,
        teacher,
        labels,
        score,
        rows,
        options.temperature,
        value_kind,
        options.ignore_index,
        options.label_smoothing,
    )
    local_value = ops.unpack_state(state, student, ops.value_dtype(student, score)).value
    valid = labels != options.ignore_index if labels.dtype == torch.int64 else torch.ones_like(candidate)

    local = torch.stack([x.reshape(-1).to(local_value.dtype) for x in (local_value, candidate, valid)])
    gathered = [torch.empty_like(local) for _ in range(size)]
    dist.all_gather(gathered, local, group=group)
    values, candidates, valids = torch.cat(gathered, dim=1)  # ordered by (rank, row), which breaks ties
    selected = ops.select_topk(values.contiguous(), candidates.bool(), *options.keep)

    counts = torch.stack([selected.sum(), valids.sum(dtype=torch.int64)])
    n = local_value.numel()
    state = ops.with_selection(state, counts, selected[rank * n : (rank + 1) * n])
    backward_options = (*options.operators[:-1], float(size))
    loss = ops.reduce_rows(student, labels, row_weight, state, cross_entropy, *backward_options)
    return loss, state, backward_options


def _knowledge(state: Tensor, student: Tensor, value: str | Tensor) -> Knowledge:
    """Return copies of the state's arrays: the caller may modify them, but autograd still needs the state."""
    row_value, *rest = ops.unpack_state(state, student, _score_dtype(value, student))
    return Knowledge(row_value.to(value.dtype) if isinstance(value, Tensor) else row_value, *rest)


def select_rows(
    student_logits: Tensor,
    *,
    keep: float | int,
    value: str | Tensor = "entropy",
    labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_dim: int | None = None,
) -> tuple[Tensor, Knowledge]:
    """Select the rows most worth distilling before the teacher runs.

    This is the student's half of `condensed_kd_loss`. Run the teacher on the selected rows only
    and save the fraction `1 - keep` of its forward passes.

    Args:
        student_logits: Shape `(..., C)`, or with the classes in `class_dim`, as in `condensed_kd_loss`. Not differentiated.
        keep: How many of the `n` valid rows to select. A float in (0, 1] selects `max(1, int(keep * n))`, an int >= 1
            selects `min(keep, n)`.
        value: What ranks the rows, highest first: `"entropy"`, `"cross_entropy"` (needs `labels`), or a floating-point
            tensor of shape `(...)` with one score per row.
        labels: Class indices, int64 of shape `(...)`, or probabilities, floating-point in the shape of `student_logits`. Rows
            labelled `ignore_index` are never selected.
        label_smoothing: As in `condensed_kd_loss`; only with `value="cross_entropy"`.
        ignore_index: Label of rows to ignore. Must be left at -100 if labels are probabilities.
        class_dim: Dimension of the classes; the last one by default.

    Returns:
        index: int64 `(k_max,)`: the selected rows of the flattened student in ascending order, then -1 if ignored rows leave
            fewer to select. Pass it as `rows=`. `k_max` is `max(1, int(keep * B))` or `min(keep, B)` for all `B` rows: it
            depends on shapes only, so that nothing waits for the device.
        knowledge: The rows' `Knowledge`; `kl` is NaN everywhere.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or range, or `value` needs the teacher.
        IndexError: A label is out of range (CPU only, as in `condensed_kd_loss`).
        RuntimeError: Called under torch.jit.trace, which would fix the length of `index`.

    Warns:
        UserWarning: As `condensed_kd_loss`.

    Examples:
        >>> import torch
        >>> from kcd_ext import condensed_kd_loss, select_rows
        >>> student, teacher = torch.nn.Linear(8, 5), torch.nn.Linear(8, 5)
        >>> x = torch.randn(10, 8)
        >>> logits = student(x)
        >>> index, knowledge = select_rows(logits, keep=0.3)
        >>> index.shape
        torch.Size([3])
        >>> loss = condensed_kd_loss(logits, teacher(x[index]), rows=index)

        With ignored rows `index` may end in -1. On the CPU drop these entries before they index `x`:

        >>> index = index[index >= 0]
    """
    arguments.check_logits("student_logits", student_logits, class_dim)
    classes = arguments.class_dim_of(student_logits, class_dim)
    arguments.check_value(student_logits, value, labels, classes)
    if labels is not None:
        arguments.check_labels(student_logits, labels, classes)
    _check_device(student_logits)
    if isinstance(value, str) and value in ("teacher_entropy", "kl"):
        raise ValueError(
            f"value must not need the teacher in select_rows, which runs before it; got {value!r}: use condensed_kd_loss"
        )
    checked_keep = arguments.check_keep(keep)
    label_smoothing = arguments.check_label_smoothing(label_smoothing)
    arguments.check_smoothing_is_used(label_smoothing, labels, 0, value)
    ignore_index = arguments.check_ignore_index(ignore_index)
    if arguments.are_probabilities(labels):
        arguments.check_ignore_index_is_used(ignore_index)
        labels = arguments.classes_last(labels, classes)
    if ops.is_tracing():
        raise RuntimeError(
            "select_rows is not supported by torch.jit.trace, which would fix the length of the index: use torch.compile or"
            " torch.export"
        )
    arguments.warn_about_classes(student_logits, class_dim)

    student = ops.make_readable(arguments.classes_last(student_logits.detach(), classes))
    absent = ops.absent(student_logits)
    labels = absent if labels is None else ops.make_readable_labels(labels)
    score, value_kind = (
        (absent, arguments.VALUES.index(value))
        if isinstance(value, str)
        else (_prepare_score(value, student), _SCORE_KIND)
    )
    options = (1.0, value_kind, ignore_index, label_smoothing)
    state, _, candidate = ops.row_stats(student, absent, labels, score, absent, *options)
    row_value = ops.unpack_state(state, student, ops.value_dtype(student, score)).value
    selected = ops.select_topk(row_value, candidate, *checked_keep)
    # A stable sort puts the selected rows first, in order. The length depends on the number of rows only.
    order = torch.sort(selected.reshape(-1), descending=True, stable=True).indices[: checked_keep.of(selected.numel())]
    position = torch.arange(order.shape[0], device=order.device)
    knowledge = _knowledge(state, student, value)
    no_teacher = torch.full_like(knowledge.entropy, math.nan)
    knowledge = knowledge._replace(kl=no_teacher, selected=selected, n_selected=selected.sum())
    return torch.where(position < knowledge.n_selected, order, torch.full_like(order, -1)), knowledge


class CondensedKDLoss(nn.Module):
    """A module that applies `condensed_kd_loss` with fixed options.

    Options go to the constructor, which checks them. Tensors that change from batch to batch (`labels`, `row_weight`, `rows`
    and scores as `value`) go to the call.

    Args:
        temperature: Softening temperature, between 1e-18 and 1e18.
        keep: How many candidates to select: a fraction in (0, 1] as a float, or a number of rows as an int >= 1.
        value: What ranks the rows: `"entropy"`, `"teacher_entropy"`, `"kl"` or `"cross_entropy"`. Pass scores to the call.
        kd_weight: Weight of the distillation term. Default: 1, or 0.9 with labels.
        ce_weight: Weight of the cross entropy. Default: 0, or 0.1 with labels.
        label_smoothing: A number in [0, 1] that smooths the labels of the cross entropy.
        ignore_index: Label of rows to ignore.
        reduction: `"mean"`, `"sum"` or `"none"`.
        group: A `torch.distributed` process group over whose rows to select and average.
        inplace: Whether the backward pass overwrites the student's logits with their gradient.
        class_dim: Dimension of the classes; the last one by default.
        return_knowledge: Whether to return the pair `(loss, knowledge)`.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.

    Examples:
        >>> import torch
        >>> from kcd_ext import CondensedKDLoss
        >>> criterion = CondensedKDLoss(keep=0.7, temperature=4.0)
        >>> student, teacher = torch.randn(10, 5, requires_grad=True), torch.randn(10, 5)
        >>> loss = criterion(student, teacher, labels=torch.arange(10) % 5)
        >>> loss.backward()
    """

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        keep: float | int = 1.0,
        value: str = "entropy",
        kd_weight: float | None = None,
        ce_weight: float | None = None,
        label_smoothing: float = 0.0,
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
                arguments.check_float32(name, weight)
        arguments.check_label_smoothing(label_smoothing)
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
            "label_smoothing": label_smoothing,
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
        """Return `condensed_kd_loss` of these tensors, with the options of the module.

        Args:
            student_logits: Shape `(..., C)`, or with the classes in `class_dim`.
            teacher_logits: Same shape, or `(m, C)` with `rows`.
            labels: Class indices, int64 of shape `(...)`, or probabilities, floating-point in the shape of `student_logits`.
            row_weight: Factor of each row's KL divergence, shape `(...)`.
            rows: Indices of the rows that `teacher_logits` holds, int64 of shape `(m,)`.
            value: Overrides the module's `value`: a name, or a tensor of scores of shape `(...)`.

        Returns:
            The loss, or the pair `(loss, knowledge)` with `return_knowledge=True`.
        """
        options = self.options if value is None else {**self.options, "value": value}
        return condensed_kd_loss(
            student_logits, teacher_logits, labels=labels, row_weight=row_weight, rows=rows, **options
        )

    def extra_repr(self) -> str:
        """Return the options that are not None, for `repr`."""
        return ", ".join(f"{name}={option!r}" for name, option in self.options.items() if option is not None)


def _prepare_score(value: Tensor, student: Tensor) -> Tensor:
    """Return scores as the operators take them: contiguous, and never narrower than the accumulator, so that none is rounded."""
    return value.detach().to(_score_dtype(value, student)).contiguous()


def _score_dtype(value: str | Tensor, student: Tensor) -> torch.dtype:
    is_double = isinstance(value, Tensor) and value.dtype == torch.float64
    return torch.float64 if is_double else ops.accumulator_dtype(student)


def _check_device(student: Tensor) -> None:
    if ops.has_kernels_for(student):
        return
    built = "CPU and CUDA" if ops.build_info["cuda_architectures"] else "CPU only (this build was made without nvcc)"
    raise ValueError(
        f"kcd_ext has kernels for {built}, got logits on {student.device}: use kcd_ext.reference, the same function in plain"
        " PyTorch for any device"
    )


def _check_inplace(student: Tensor, constants: dict[str, Tensor | None], differentiable: bool) -> None:
    if torch.compiler.is_compiling() or ops.is_tracing():
        raise ValueError(
            "inplace=True is not supported under torch.compile, which plans memory itself, nor under torch.jit.trace: leave"
            " it False"
        )
    if not differentiable:
        return
    base = student if student._base is None else student._base
    if student.is_leaf or (base.is_leaf and base.requires_grad):
        raise ValueError("inplace=True would overwrite student_logits, a leaf that requires grad (or a view of one)")
    if not ops.is_readable_in_place(student) or _overlaps_itself(student):
        raise ValueError(
            f"inplace=True needs student_logits with disjoint rows and adjacent classes in memory, got shape"
            f" {tuple(student.shape)} with strides {student.stride()}"
        )
    for name, x in constants.items():
        if x is not None and student.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            raise ValueError(f"inplace=True would overwrite {name}, which share the memory of student_logits")


def _overlaps_itself(logits: Tensor) -> bool:
    """Return whether elements may share memory: the stride of a dimension is less than the extent of those inside it."""
    extent = 1
    for stride, size in sorted((s, n) for s, n in zip(logits.stride(), logits.shape, strict=True) if n > 1):
        if stride < extent:
            return True
        extent = stride * (size - 1) + extent
    return False


def _has_tangent(student: Tensor) -> bool:
    return forward_ad.unpack_dual(student).tangent is not None


def _check_no_transforms(student: Tensor) -> None:
    """Raise for derivatives that the operator lacks; torch would silently return 0 for them."""
    if transforms_are_active() or _has_tangent(student):
        raise RuntimeError(
            "condensed_kd_loss supports neither forward-mode derivatives nor torch.func transforms: use"
            " kcd_ext.reference.condensed_kd_loss, the same function in plain PyTorch"
        )
