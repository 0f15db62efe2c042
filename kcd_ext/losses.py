"""The distillation loss that knows what is worth distilling: KL, knowledge value, selection and gradient in one operator."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from . import arguments, ops
from .arguments import Keep, Weights
from .knowledge import Knowledge

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_VALUE = {name: number for number, name in enumerate(arguments.VALUES)}
_SCORE = len(arguments.VALUES)
_REDUCTION = {name: number for number, name in enumerate(arguments.REDUCTIONS)}


class _Inputs(NamedTuple):
    """The tensors of a call as the operators take them."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    score: Tensor
    row_weight: Tensor
    rows: Tensor


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
    return_knowledge: bool = False,
) -> Tensor | tuple[Tensor, Knowledge]:
    """Distillation of the rows worth it: temperature-scaled KL over the `keep` rows of highest knowledge value.

    Every leading index of the logits is a row: a sample, or a token.  With p = softmax(y/T), q = softmax(z/T) of teacher
    logits y and student logits z, S the selected rows and the valid rows those whose label is not `ignore_index`,

        loss = ce_weight * mean_valid CE_i + kd_weight * T² * mean_S row_weight_i * KL(p_i || q_i).

    One read of the logits gives loss, values and selection; the backward pass reads selected rows only (with labels, valid
    ones too).  Selection by the student's entropy is Knowledge Condensation Distillation's (Li et al., ECCV 2022, Eq. 7).

    Args:
        student_logits: (..., C), float32, float64, float16 or bfloat16; differentiable. Read in place where the classes of
            a row lie side by side and the rows at no more than two strides, so that `logits[:, :-1]` is not copied.
        teacher_logits: as student_logits, of any of these dtypes; a constant. With `rows`, (m, C).
        temperature: T > 0.
        keep: a float in (0, 1]: k = max(1, int(keep * n)) of the n candidates; an int >= 1: k = min(keep, n). Candidates
            are the valid rows, with `rows` those among them. Ties go to the lower row.
        value: what rows are ranked by, highest first: "entropy" of softmax(z), "teacher_entropy" of softmax(y), "kl",
            "cross_entropy", or a floating-point tensor (...) of scores. A row that is not a number (NaN in either's logits,
            +inf, all -inf) has value NaN and ranks first, so that it reaches the loss.
        labels: int64 (...): adds the cross entropy of softmax(z), and makes rows labelled `ignore_index` invalid.
        kd_weight, ce_weight: 1 and 0 without labels, 0.9 and 0.1 with them, as in KCD's recipe.
        row_weight: floating-point or bool (...), multiplies KL_i; a constant.
        rows: int64 (m,), unique: the rows of the flattened student that `teacher_logits` holds, as `select_rows` gives them;
            entries of -1 are skipped.
        ignore_index: the label of rows that count for nothing; they are not read.
        reduction: "mean" (above), "sum" (the same without the two divisions), or "none": (...) with
            ce_weight * CE_i + [i in S] * kd_weight * T² * row_weight_i * KL_i.
        group: a torch.distributed process group: k and the means are global over its ranks, which must have equal numbers
            of rows; scaled so that DistributedDataParallel's averaged gradient is that of one process on all rows.
        inplace: the backward pass overwrites the student's logits with the gradient and allocates none. They must not be a
            leaf nor be needed by anything else; a second backward pass raises.
        return_knowledge: also return the rows' Knowledge.

    Returns:
        The loss: float64 if the student is, else float32; a scalar, or (...) for reduction "none". No valid row and no
        candidate give 0. With `return_knowledge` a pair of it and Knowledge (value, entropy, kl, selected, n_selected).

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or range; nothing has been computed.
        IndexError: on the CPU, a label or an entry of rows is out of range (on CUDA that row's cross entropy is NaN).
        RuntimeError: a second derivative is asked for; use `kcd_ext.reference.condensed_kd_loss`.
    """
    arguments.check_logits("student_logits", student_logits)
    arguments.check_teacher(student_logits, teacher_logits, rows)
    _check_device(student_logits)
    arguments.check_labels(student_logits, labels)
    arguments.check_value(student_logits, value, labels)
    arguments.check_row_weight(student_logits, row_weight)
    temperature = arguments.check_temperature(temperature)
    kept = arguments.check_keep(keep)
    weights = arguments.check_weights(kd_weight, ce_weight, labels)
    arguments.check_reduction(reduction)
    ignore_index = arguments.check_ignore_index(ignore_index)
    arguments.check_group(group)
    with_gradient = student_logits.requires_grad and torch.is_grad_enabled()
    if inplace:
        _check_inplace(student_logits, with_gradient)

    absent = ops.absent(student_logits)
    inputs = _Inputs(
        _readable(student_logits),
        _readable(teacher_logits.detach()),
        absent if labels is None else labels.contiguous(),
        _score(value, absent),
        absent if row_weight is None else row_weight.detach().to(ops.accumulator_of(student_logits)).contiguous(),
        absent if rows is None else rows.contiguous(),
    )
    value_kind = _SCORE if isinstance(value, Tensor) else _VALUE[value]
    options = (temperature, kept, value_kind, weights, ignore_index, _REDUCTION[reduction])
    compute = _over_group if group is not None else _compiled if torch.compiler.is_compiling() else _eager
    loss, knowledge = compute(inputs, *options, with_gradient, inplace, group)
    if not return_knowledge:
        return loss
    if isinstance(value, Tensor):
        knowledge = knowledge._replace(value=knowledge.value.to(value.dtype))
    return loss, knowledge


def _eager(inputs, temperature, keep, value, weights, ignore_index, reduction, with_gradient, inplace, _group):
    """One process: one operator, then a node of autograd where a gradient is wanted."""
    loss, ranked, entropy, kl, selected, n_selected, saved, divisors = ops.condensed_kd_forward(
        *inputs, temperature, *keep, value, *weights, ignore_index, reduction
    )
    if with_gradient:
        options = (temperature, *weights, ignore_index)
        loss = _attach(inputs, loss, selected, saved, divisors, options, inplace)
    return loss, Knowledge(ranked, entropy, kl, selected, n_selected)


def _compiled(inputs, temperature, keep, value, weights, ignore_index, reduction, _with_gradient, _inplace, _group):
    """Under torch.compile: the operator that carries its derivative, one node of the graph a direction."""
    loss, ranked, entropy, kl, selected, n_selected, _, _ = ops.condensed_kd(
        *inputs, temperature, *keep, value, *weights, ignore_index, reduction
    )
    return loss, Knowledge(ranked, entropy, kl, selected, n_selected)


def _over_group(inputs, temperature, keep: Keep, value, weights: Weights, ignore_index, reduction, with_gradient, inplace, group):
    """Several processes: each reads its rows, values are gathered (never logits), every rank selects among all of them."""
    student, teacher, labels, score, row_weight, rows = inputs
    detached = student.detach()
    ranked, entropy, kl, cross_entropy, candidate, saved = ops.row_stats(
        detached, teacher, labels, score, rows, temperature, value, ignore_index
    )
    valid = torch.ones_like(candidate) if labels.dtype == torch.bool else labels != ignore_index
    selected, divisors = _select_over_group(ranked, candidate, valid, keep, reduction, group)
    loss = ops.reduce_rows(
        detached, labels, row_weight, selected, kl, cross_entropy, divisors, temperature, *weights, ignore_index, reduction
    )
    if with_gradient:
        loss = _attach(inputs, loss, selected, saved, divisors, (temperature, *weights, ignore_index), inplace)
    return loss, Knowledge(ranked, entropy, kl, selected, selected.sum())


def _select_over_group(ranked, candidate, valid, keep, reduction, group) -> tuple[Tensor, Tensor]:
    """This rank's selected rows, and what its sums are divided by: the global counts over the number of ranks."""
    import torch.distributed as dist

    size, rank, n = dist.get_world_size(group), dist.get_rank(group), ranked.numel()
    local = torch.stack([ranked.reshape(-1), candidate.reshape(-1).to(ranked.dtype), valid.reshape(-1).to(ranked.dtype)])
    everywhere = [torch.empty_like(local) for _ in range(size)]
    dist.all_gather(everywhere, local, group=group)
    values, candidates, valids = torch.cat(everywhere, dim=1)  # ties by (rank, row)
    chosen = ops.select_topk(values.contiguous(), candidates.bool(), *keep)
    if _REDUCTION["mean"] == reduction:
        divisors = torch.stack([chosen.sum(), valids.sum()]).to(torch.float64) / size
    else:
        divisors = ranked.new_ones(2, dtype=torch.float64)
    return chosen[rank * n : (rank + 1) * n].view(ranked.shape), divisors


def _attach(inputs: _Inputs, loss, selected, saved, divisors, options, inplace) -> Tensor:
    tensors = (inputs.teacher, inputs.labels, inputs.row_weight, inputs.rows, selected, saved, divisors)
    return ops.GradientOfStudent.apply(inputs.student, ops.Forward(loss, tensors, options, inplace))


def select_rows(
    student_logits: Tensor,
    *,
    keep: float | int,
    value: str | Tensor = "entropy",
    labels: Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Knowledge]:
    """The rows worth asking the teacher about, before it runs: the entropy-first half of `condensed_kd_loss`.

        index, knowledge = select_rows(student(x), keep=0.3)
        named = index[index >= 0]                   # on the CPU; see Returns
        loss = condensed_kd_loss(z, teacher(x[named]), rows=named)

    It spares (1 - keep) of the teacher's forward pass.

    Args:
        student_logits: (..., C), as in `condensed_kd_loss`; nothing is differentiated.
        keep, labels, ignore_index: as in `condensed_kd_loss`.
        value: "entropy", "cross_entropy" (with labels) or a floating-point tensor (...) of scores.

    Returns:
        index: int64 (k_max,), the selected rows of the flattened student in ascending order, then -1. Its length depends on
            shapes alone, max(1, int(keep * B)) or min(keep, B) of all B rows, so that nothing waits for the device; it is
            what `rows=` takes. Where ignored rows leave fewer to select, the rest is -1.
        knowledge: Knowledge, kl all NaN.

    Raises:
        TypeError, ValueError, IndexError: as `condensed_kd_loss`; a value that needs a teacher is a ValueError.
    """
    arguments.check_logits("student_logits", student_logits)
    _check_device(student_logits)
    arguments.check_labels(student_logits, labels)
    arguments.check_value(student_logits, value, labels)
    if isinstance(value, str) and value in ("teacher_entropy", "kl"):
        raise ValueError(f"value={value!r} needs the teacher's logits, which select_rows is there to spare; use condensed_kd_loss")
    kept = arguments.check_keep(keep)
    ignore_index = arguments.check_ignore_index(ignore_index)

    student = _readable(student_logits.detach())
    absent = ops.absent(student)
    value_kind = _SCORE if isinstance(value, Tensor) else _VALUE[value]
    labels = absent if labels is None else labels.contiguous()
    ranked, entropy, kl, _, candidate, _ = ops.row_stats(
        student, absent, labels, _score(value, absent), absent, 1.0, value_kind, ignore_index
    )
    selected = ops.select_topk(ranked, candidate, *kept)
    n_selected = selected.sum()
    if isinstance(value, Tensor):
        ranked = ranked.to(value.dtype)
    # Selected rows first, in order; how many entries there are depends on the number of rows alone.
    order = torch.sort(selected.reshape(-1), descending=True, stable=True).indices[: kept.of(selected.numel())]
    position = torch.arange(order.shape[0], device=order.device)
    index = torch.where(position < n_selected, order, torch.full_like(order, -1))
    return index, Knowledge(ranked, entropy, kl, selected, n_selected)


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
        return_knowledge: bool = False,
    ) -> None:
        super().__init__()
        arguments.check_temperature(temperature)
        arguments.check_keep(keep)
        if value not in arguments.VALUES:
            raise ValueError(f"value must be one of {', '.join(arguments.VALUES)}, got {value!r}; pass scores to the call")
        for name, weight in (("kd_weight", kd_weight), ("ce_weight", ce_weight)):
            if weight is not None:
                arguments.check_number(name, weight)
        arguments.check_ignore_index(ignore_index)
        arguments.check_reduction(reduction)
        arguments.check_group(group)
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
        return condensed_kd_loss(student_logits, teacher_logits, labels=labels, row_weight=row_weight, rows=rows, **options)

    def extra_repr(self) -> str:
        """The options that are set."""
        return ", ".join(f"{name}={option!r}" for name, option in self.options.items() if option is not None)


def _score(value: str | Tensor, absent: Tensor) -> Tensor:
    """Scores as float32 or, without loss, float64: half precision is exact in float32."""
    if isinstance(value, str):
        return absent
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    return value.detach().to(dtype).contiguous()


def _lies_in_place(logits: Tensor) -> bool:
    """Whether the kernels can read the logits where they lie: classes side by side, rows at no more than two strides."""
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


def _readable(logits: Tensor) -> Tensor:
    return logits if _lies_in_place(logits) else logits.contiguous()


def _check_device(student: Tensor) -> None:
    if not student.is_cpu:
        raise ValueError(
            f"this build of kcd_ext has kernels for the CPU, got logits on {student.device}: use kcd_ext.reference, the same"
            " functions in plain PyTorch for any device"
        )


def _check_inplace(student: Tensor, with_gradient: bool) -> None:
    if torch.compiler.is_compiling():
        raise ValueError("inplace=True is not possible under torch.compile, which plans memory by itself: leave it False")
    if not with_gradient:
        return
    if student.is_leaf:
        raise ValueError("inplace=True would overwrite student_logits, a leaf that requires grad: pass a module's output")
    overlapping = any(size > 1 and stride == 0 for size, stride in zip(student.shape, student.stride(), strict=True))
    if overlapping or not _lies_in_place(student):
        raise ValueError(
            f"inplace=True needs student_logits whose rows lie apart and whose classes lie side by side, got shape"
            f" {tuple(student.shape)} with strides {student.stride()}"
        )
