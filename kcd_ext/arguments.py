"""Argument checks that `condensed_kd_loss`, `select_rows` and the reference share. They run before any kernel."""

import functools
import math
import sys
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import INT64_MAX, is_int, is_number
from .describe import brief, describe

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
VALUES = ("entropy", "teacher_entropy", "kl", "cross_entropy")
REDUCTIONS = ("mean", "sum", "none")
FLOAT32_MAX = float(torch.finfo(torch.float32).max)
DEFAULT_IGNORE_INDEX = -100
TEMPERATURE_RANGE = 1e-18, 1e18  # keeps T, 1/T and T² normal numbers in float32


class Keep(NamedTuple):
    """The number of rows to select of n candidates: `min(count, n)`, or `max(1, int(fraction * n))` if `count` is 0."""

    fraction: float
    count: int

    def of(self, n: int) -> int:
        """Return the number of rows to select of n candidates."""
        if n == 0:
            return 0
        return min(self.count, n) if self.count else max(1, int(self.fraction * n))


class Weights(NamedTuple):
    """The weights of the distillation term and of the cross entropy."""

    kd: float
    ce: float


def check_logits(name: str, logits: Tensor, class_dim: int | None = None) -> None:
    """Raise unless `logits` are a floating-point tensor (..., C) with C >= 1, or with the classes in `class_dim`."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a tensor of logits (..., classes), got {describe(logits)}")
    if logits.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {logits.dtype}")
    if logits.layout is not torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got layout {logits.layout}; use {name}.to_dense()")
    if logits.dim() == 0 or logits.shape[class_dim_of(logits, class_dim)] == 0:
        raise ValueError(f"{name} must have shape (..., classes) with at least one class, got {tuple(logits.shape)}")


def check_class_dim(class_dim: int | None) -> None:
    """Raise TypeError unless `class_dim` is None or an integer (NumPy's included, bool excluded)."""
    if class_dim is not None and not is_int(class_dim):
        raise TypeError(f"class_dim must be an int or None, got {describe(class_dim)}")


def class_dim_of(student: Tensor, class_dim: int | None) -> int:
    """Return the index of the class dimension, counted from 0."""
    check_class_dim(class_dim)
    n = student.dim()
    if class_dim is None:
        return n - 1
    if not -n <= class_dim < n:
        raise ValueError(
            f"class_dim must be in [-{n}, {n}) for student_logits of shape {tuple(student.shape)}, got {brief(class_dim)}"
        )
    return int(class_dim) % n


# Modules between the user's call and `warn_about_classes`.
_INTERNAL_MODULES = (__name__, f"{__package__}.losses", f"{__package__}.reference", "torch.nn.modules.module")


def _warn(message: str) -> None:
    """Warn at the line of the user's call, also if it goes through CondensedKDLoss and torch's `Module.__call__`."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__") in _INTERNAL_MODULES:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def warn_about_classes(student: Tensor, class_dim: int | None) -> None:
    """Warn if the class dimension is probably not the one the caller means. Call this from public functions only.

    Silent under torch.compile, whose graph a warning would break.
    """
    if torch.compiler.is_compiling():
        return
    if class_dim is None and student.dim() > 3:
        _warn(
            f"student_logits of shape {tuple(student.shape)} are read with the classes in the last dimension: pass class_dim=1 for"
            " (batch, classes, height, width), or class_dim=-1 if the classes are last"
        )
    dim = class_dim_of(student, class_dim)
    if student.shape[dim] == 1:
        _warn(
            f"student_logits of shape {tuple(student.shape)} have one class, whose probability is always 1: loss and gradient are"
            f" 0. A binary classifier needs two logits, for example torch.cat((torch.zeros_like(z), z), {dim})"
        )


def check_both_logits(student: Tensor, teacher: Tensor, rows: Tensor | None, class_dim: int | None = None) -> int:
    """Check both logits; the teacher's must have the student's shape, or (m, C) with `rows` (m,).

    Returns the index of the student's class dimension, counted from 0.
    """
    check_logits("student_logits", student, class_dim)
    check_logits("teacher_logits", teacher, class_dim if rows is None else None)
    dim = class_dim_of(student, class_dim)
    if rows is None and teacher.shape == student.shape and teacher.device == student.device:
        return dim  # the common case; the rest finds the error to report
    if teacher.device != student.device:
        raise ValueError(
            f"teacher_logits are on {teacher.device}, student_logits on {student.device}: move one of them"
        )
    teacher_classes = teacher.shape[dim if rows is None and teacher.dim() == student.dim() else -1]
    if teacher_classes != student.shape[dim]:
        common = min(teacher_classes, student.shape[dim])
        prefix = "..., " if dim == student.dim() - 1 else ":, " * dim
        matching_dims = [d for d in range(student.dim()) if student.shape[d] == teacher_classes]
        if rows is not None and matching_dims:
            raise ValueError(
                f"teacher_logits have {teacher_classes} classes, student_logits {tuple(student.shape)} have"
                f" {student.shape[dim]} in dimension {dim}; if they are in dimension {matching_dims[0]}, pass"
                f" class_dim={matching_dims[0]}"
            )
        raise ValueError(
            f"teacher_logits have {teacher_classes} classes, student_logits {student.shape[dim]}: if the first {common} classes"
            f" mean the same in both (a padded vocabulary), slice them, as in logits[{prefix}:{common}]"
        )
    if rows is None:
        if teacher.shape != student.shape:
            raise ValueError(
                f"teacher_logits must have the shape of student_logits, {tuple(student.shape)}, got {tuple(teacher.shape)}"
                " (pass rows= if the teacher ran on some rows only)"
            )
        return dim
    check_rows(student, rows)
    if teacher.dim() != 2 or teacher.shape[0] != rows.shape[0]:
        raise ValueError(
            f"teacher_logits must have shape ({rows.shape[0]}, {student.shape[dim]}), one row per entry of rows,"
            f" got {tuple(teacher.shape)}"
        )
    return dim


def check_rows(student: Tensor, rows: Tensor) -> None:
    """Raise unless `rows` are int64 (m,) on the student's device. The kernel checks the entries."""
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
        raise TypeError(f"rows must be an int64 tensor (m,), got {describe(rows)}")
    if rows.dim() != 1:
        raise ValueError(f"rows must have one dimension, got shape {tuple(rows.shape)}")
    if rows.device != student.device:
        raise ValueError(f"rows are on {rows.device}, student_logits on {student.device}: move one of them")


def _rows_shape(student: Tensor, class_dim: int) -> tuple[int, ...]:
    return (*student.shape[:class_dim], *student.shape[class_dim + 1 :])


def _check_per_row(name: str, x: Tensor, student: Tensor, class_dim: int) -> None:
    shape = _rows_shape(student, class_dim)
    if x.shape != shape:
        fitting_dims = [d for d in range(student.dim()) if d != class_dim and _rows_shape(student, d) == x.shape]
        advice = ""
        if fitting_dims:
            current = "the last dimension" if class_dim == student.dim() - 1 else f"dimension {class_dim}"
            other = 1 if 1 in fitting_dims else fitting_dims[0]
            advice = (
                f": the classes of student_logits {tuple(student.shape)} are read from {current}; if they are in dimension"
                f" {other}, pass class_dim={other}"
            )
        raise ValueError(f"{name} must have one entry per row, shape {shape}, got {tuple(x.shape)}{advice}")
    if x.device != student.device:
        raise ValueError(f"{name} is on {x.device}, student_logits on {student.device}: move one of them")


def are_probabilities(labels: Tensor | None) -> bool:
    """Return whether labels are probabilities (..., C) instead of class indices (...): whether their dtype is floating-point."""
    return isinstance(labels, Tensor) and labels.is_floating_point()


def check_labels(student: Tensor, labels: Tensor, class_dim: int) -> None:
    """Raise unless `labels` are int64 class indices (...), or floating-point probabilities in the shape of the student."""
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, *DTYPES):
        raise TypeError(
            "labels must be an int64 tensor of class indices, or float32, float64, float16 or bfloat16 probabilities, got"
            f" {describe(labels)}"
        )
    if not are_probabilities(labels):
        if labels.dim() == student.dim() and labels.shape == student.shape:
            raise ValueError(
                f"labels must have one class index per row, shape {_rows_shape(student, class_dim)}, or be floating-point"
                f" probabilities; got {labels.dtype} of shape {tuple(labels.shape)}: for one-hot labels pass labels.float()"
            )
        return _check_per_row("labels", labels, student, class_dim)
    if labels.layout is not torch.strided:
        raise TypeError(f"labels must be a strided tensor, got layout {labels.layout}; use labels.to_dense()")
    if labels.shape != student.shape:
        raise ValueError(
            f"labels of a floating-point dtype are probabilities and must have the shape of student_logits,"
            f" {tuple(student.shape)}, got {tuple(labels.shape)} (class indices are int64)"
        )
    if labels.device != student.device:
        raise ValueError(f"labels are on {labels.device}, student_logits on {student.device}: move one of them")
    if labels.requires_grad:
        raise ValueError("labels must not require grad: they are constants; pass labels.detach()")


def check_row_weight(student: Tensor, row_weight: Tensor, class_dim: int) -> None:
    """Raise unless `row_weight` is a floating-point or bool tensor (...), one entry per row."""
    if not isinstance(row_weight, Tensor) or not (row_weight.is_floating_point() or row_weight.dtype == torch.bool):
        raise TypeError(f"row_weight must be a floating-point or bool tensor, got {describe(row_weight)}")
    _check_per_row("row_weight", row_weight, student, class_dim)


def check_value(student: Tensor, value: str | Tensor, labels: Tensor | None, class_dim: int) -> None:
    """Raise unless `value` is one of VALUES or a floating-point tensor (...) of scores."""
    if isinstance(value, Tensor):
        if value.dtype not in DTYPES:
            raise TypeError(f"value must be a name or a floating-point tensor of scores, got {describe(value)}")
        _check_per_row("value", value, student, class_dim)
        return
    if not isinstance(value, str):
        raise TypeError(f"value must be a name or a floating-point tensor of scores, got {describe(value)}")
    if value not in VALUES:
        raise ValueError(f"value must be one of {', '.join(VALUES)} or a tensor of scores, got {brief(value)}")
    if value == "cross_entropy" and labels is None:
        raise ValueError("value='cross_entropy' needs labels, got labels=None")


def check_float32(name: str, x: float) -> float:
    """Return a finite real number within float32's range as a float (NumPy's included, bool excluded)."""
    if not is_number(x):
        raise TypeError(f"{name} must be a number, got {describe(x)}")
    if not -math.inf < x < math.inf:  # torch.compile cannot trace math.isfinite
        raise ValueError(f"{name} must be finite, got {brief(x)}")
    try:
        number = float(x)  # compare as a float: NumPy would convert the bounds to float16 and overflow
    except OverflowError:
        number = math.inf
    if not -FLOAT32_MAX <= number <= FLOAT32_MAX:
        raise ValueError(f"{name} must be within the range of float32, got {brief(x)}")
    return number


def check_temperature(temperature: float) -> float:
    """Return a temperature in TEMPERATURE_RANGE as a float."""
    temperature = check_float32("temperature", temperature)
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    low, high = TEMPERATURE_RANGE
    if not low <= temperature <= high:
        raise ValueError(f"temperature must be in [{low:g}, {high:g}], got {temperature}")
    return temperature


def check_keep(keep: float | int) -> Keep:
    """Return a `Keep`: a float in (0, 1] is a fraction of the candidates, an int >= 1 a number of rows."""
    if not is_number(keep):
        raise TypeError(f"keep must be a float in (0, 1] or an int >= 1, got {describe(keep)}")
    if is_int(keep) and keep >= 1:
        return Keep(1.0, min(int(keep), INT64_MAX))
    if is_int(keep) or not 0 < keep <= 1:
        hint = " (a number of rows must be an int)" if keep > 1 else ""
        raise ValueError(f"keep must be a float in (0, 1] or an int >= 1, got {describe(keep)}{hint}")
    return Keep(float(keep), 0)


def check_weights(kd_weight: float | None, ce_weight: float | None, with_labels: bool) -> Weights:
    """Return the weights, which must be finite. The defaults are 1 and 0, or 0.9 and 0.1 with labels (the paper's recipe)."""
    kd = (0.9 if with_labels else 1.0) if kd_weight is None else check_float32("kd_weight", kd_weight)
    ce = (0.1 if with_labels else 0.0) if ce_weight is None else check_float32("ce_weight", ce_weight)
    if ce != 0 and not with_labels:
        raise ValueError(f"ce_weight={ce} needs labels, got labels=None")
    return Weights(kd, ce)


def check_label_smoothing(label_smoothing: float) -> float:
    """Return a number in [0, 1] as a float (NumPy's included, bool excluded)."""
    if not is_number(label_smoothing):
        raise TypeError(f"label_smoothing must be a number, got {describe(label_smoothing)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {brief(label_smoothing)}")
    return float(label_smoothing)


def check_smoothing_is_used(label_smoothing: float, labels: Tensor | None, ce_weight: float, value: object) -> None:
    """Raise ValueError if label smoothing would have no effect."""
    if label_smoothing == 0:
        return
    if labels is None:
        raise ValueError(f"label_smoothing={label_smoothing} needs labels, got labels=None")
    if ce_weight == 0 and not (isinstance(value, str) and value == "cross_entropy"):
        raise ValueError(
            f"label_smoothing must be 0 if nothing uses the cross entropy, got {label_smoothing} with ce_weight=0 and a value"
            " other than 'cross_entropy'"
        )


def check_ignore_index_is_used(ignore_index: int) -> None:
    """Raise unless `ignore_index` is the default. For probabilities, which have no index to ignore."""
    if ignore_index != DEFAULT_IGNORE_INDEX:
        raise ValueError(
            f"ignore_index must be left at {DEFAULT_IGNORE_INDEX} if labels are probabilities, which have no index to ignore,"
            f" got {brief(ignore_index)}; a row of zeros adds nothing to the cross entropy"
        )


def check_reduction(reduction: str) -> str:
    """Return a reduction, which must be one of REDUCTIONS."""
    if not isinstance(reduction, str):
        raise TypeError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {describe(reduction)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {brief(reduction)}")
    return reduction


def check_ignore_index(ignore_index: int) -> int:
    """Return an integer that int64 can hold (NumPy's included, bool excluded)."""
    if not is_int(ignore_index):
        raise TypeError(f"ignore_index must be an int, got {describe(ignore_index)}")
    if not -INT64_MAX - 1 <= ignore_index <= INT64_MAX:
        raise ValueError(f"ignore_index must fit in int64, got {brief(ignore_index)}")
    return int(ignore_index)


def check_group(group: object) -> None:
    """Raise unless `group` is None or a torch.distributed process group of this rank."""
    if group is None:
        return
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group must be None unless torch.distributed is initialised")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed process group of this rank, or None, got {describe(group)}")


class LossOptions(NamedTuple):
    """The non-tensor options of a loss, checked, with defaults filled in."""

    temperature: float
    keep: Keep
    weights: Weights
    label_smoothing: float
    ignore_index: int
    operators: tuple[float, float, float, float, int, int, float]
    """Arguments of the raw operators: temperature, kd_weight, ce_weight, label_smoothing, ignore_index, index of the reduction,
    world size."""


def _loss_options(
    temperature, keep, kd_weight, ce_weight, with_labels, label_smoothing, ignore_index, reduction
) -> LossOptions:
    temperature, keep = check_temperature(temperature), check_keep(keep)
    weights = check_weights(kd_weight, ce_weight, with_labels)
    label_smoothing = check_label_smoothing(label_smoothing)
    ignore_index, reduction = check_ignore_index(ignore_index), check_reduction(reduction)
    operators = (temperature, *weights, label_smoothing, ignore_index, REDUCTIONS.index(reduction), 1.0)
    return LossOptions(temperature, keep, weights, label_smoothing, ignore_index, operators)


# Options rarely change between steps, and a lookup takes a tenth of the checks' time: this matters if a batch takes 50 us. Typed,
# because 1, 1.0 and True are equal as keys.
_cached_loss_options = functools.lru_cache(maxsize=128, typed=True)(_loss_options)


def check_loss_options(
    temperature, keep, value, labels, kd_weight, ce_weight, label_smoothing, ignore_index, reduction
) -> LossOptions:
    """Check the non-tensor options of `condensed_kd_loss` and return them."""
    options = (temperature, keep, kd_weight, ce_weight, labels is not None, label_smoothing, ignore_index, reduction)
    checked = _look_up_loss_options(*options)
    if checked.label_smoothing:
        check_smoothing_is_used(checked.label_smoothing, labels, checked.weights.ce, value)
    if labels is not None and are_probabilities(labels):
        check_ignore_index_is_used(checked.ignore_index)
    return checked


def _look_up_loss_options(*options: object) -> LossOptions:
    if torch.compiler.is_compiling():
        return _loss_options(*options)
    try:
        return _cached_loss_options(*options)
    except TypeError:  # of a wrong type, or not hashable: the uncached checks report the real error
        pass
    return _loss_options(*options)


def check_loss_tensors(
    student: Tensor,
    teacher: Tensor,
    *,
    value: str | Tensor,
    labels: Tensor | None,
    row_weight: Tensor | None,
    rows: Tensor | None,
    group: object,
    class_dim: int | None,
) -> int:
    """Check the tensors of `condensed_kd_loss`. Return the index of the student's class dimension, counted from 0."""
    dim = check_both_logits(student, teacher, rows, class_dim)
    if not (isinstance(value, str) and value == "entropy"):
        check_value(student, value, labels, dim)
    if labels is not None:
        check_labels(student, labels, dim)
    if row_weight is not None:
        check_row_weight(student, row_weight, dim)
    if group is not None:
        check_group(group)
    return dim


def classes_last(logits: Tensor, class_dim: int) -> Tensor:
    """Return a view of the logits with the classes last."""
    return logits if class_dim == logits.dim() - 1 else logits.movedim(class_dim, -1)
