"""Explanations of failed or doubtful training: non-finite numbers, and teachers that can teach little."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..methods import Batch, Outcome
from .distributed import full_state_dict, local_shard

if TYPE_CHECKING:
    from .phases import Phase
    from .run import Run


class NotFiniteError(ValueError):
    """The error of a first step that contains NaN or an infinity."""


def has_finite_maximum(logits: Tensor) -> Tensor:
    """Return whether the highest logit of each sample is finite: (b, classes) -> (b,) bool. Others may be -inf."""
    return logits.amax(-1).isfinite()


def check_first_step(
    outcome: Outcome,
    batch: Batch,
    gradients: Mapping[str, Tensor],
    student: nn.Module,
    teacher: nn.Module | None,
    method: str,
) -> None:
    """Raise NotFiniteError, naming the cause, if the loss or a gradient of the first step is not finite."""
    if _all_finite([outcome.loss, *gradients.values()]):
        return
    broken = [name for name, gradient in gradients.items() if not _all_finite([gradient])]
    causes = (
        _non_finite_sample("train", batch),
        _non_finite_weights("student", student),
        None if teacher is None else _non_finite_weights("teacher", teacher),
        None
        if has_finite_maximum(outcome.logits).all()
        else "the student gives logits that are not finite, from finite weights and samples",
        None if teacher is None else _non_finite_logits("teacher", teacher, "train", batch),
        None
        if outcome.loss.isfinite()
        else f"method {method!r} gives a loss of {outcome.loss.item()}, from finite logits",
        *(f"method {method!r} gives {name} a gradient that is not finite" for name in broken),
    )
    raise NotFiniteError(f"training cannot start: {next(filter(None, causes))}")


def check_finite(run: "Run", phase: "Phase", loss: float) -> None:
    """Raise FloatingPointError, with the cause, if the loss or a parameter is not finite after an epoch."""
    when = f"after {phase.name} {len(phase.history) + 1}"
    problem = f"the loss is not finite {when} ({loss})"
    if math.isfinite(loss):
        broken = torch.stack([~local_shard(parameter).isfinite().all() for parameter in phase.parameters]).any()
        if not run.sum([broken])[0]:
            return
        problem = f"weights are not finite {when}"
    trained = {*map(id, phase.parameters)}
    is_constant = run.teacher is not None and trained.isdisjoint(map(id, run.teacher.parameters()))
    suspects = {"teacher": run.teacher} if is_constant else {}  # a teacher that is trained is a victim, not a cause
    cause = first_non_finite("train", run.train_source.eval_batches(run.recipe.batch_size), suspects)
    raise FloatingPointError(f"{problem}: {cause or f'a smaller lr than {phase.initial_lr} may help'}")


def check_held_out_logits(run: "Run", part: str, non_finite: int, epoch: int) -> None:
    """Raise FloatingPointError if a held-out sample is not finite; warn if only the student's logits are not.

    Args:
        run: The run.
        part: The set: `test` or `val`.
        non_finite: The number of its samples without a finite highest logit after the epoch.
        epoch: The epoch, counted from 0.
    """
    if not non_finite:
        return
    if (cause := first_non_finite(part, run.eval_batches(part), {})) is not None:
        raise FloatingPointError(f"the accuracy after epoch {epoch + 1} means nothing: {cause}")
    # On every rank: the student may be sharded.
    cause = first_non_finite(part, run.eval_batches(part), {"student": run.student})
    if run.is_main:
        text = f"{non_finite} {part} samples have no finite logits after epoch {epoch + 1}: {cause}"
        warnings.warn(text, RuntimeWarning, stacklevel=5)  # the caller of distill


def first_non_finite(part: str, batches: Iterable[Batch], networks: Mapping[str, nn.Module]) -> str | None:
    """Describe the first sample that is not finite, or for which a network's logits are not; None if there is none.

    Networks are called in evaluation mode and stay in it.
    """
    for batch in batches:
        found = _non_finite_sample(part, batch)
        for name, network in networks.items():
            found = found or _non_finite_logits(name, network, part, batch)
        if found:
            return found
    return None


def _non_finite_sample(part: str, batch: Batch) -> str | None:
    finite = batch.x.isfinite().reshape(len(batch.x), -1).all(1)
    if finite.all():
        return None
    position = int(finite.int().argmin())
    return f"{part}[{int(batch.index[position])}] holds {_nan_or_infinity(batch.x[position])}"


def _non_finite_weights(name: str, network: nn.Module) -> str | None:
    for path, tensor in chain(network.named_parameters(), network.named_buffers()):
        if not _all_finite([tensor]):
            return f"the {name}'s {path} holds {_nan_or_infinity(full_state_dict(tensor.detach()))} before training"
    return None


def _non_finite_logits(name: str, network: nn.Module, part: str, batch: Batch) -> str | None:
    with torch.no_grad():
        finite = has_finite_maximum(network.eval()(batch.x))
    if finite.all():
        return None
    index = int(batch.index[int(finite.int().argmin())])
    return f"the {name} gives logits that are not finite for {part}[{index}], which is finite"


def _nan_or_infinity(tensor: Tensor) -> str:
    return "NaN" if tensor.isnan().any() else "an infinity"


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    return bool(torch.stack([full_state_dict(tensor.detach()).isfinite().all() for tensor in tensors]).all())


def teacher_warning(teacher: float, student: float | None, labels: Sequence[float]) -> str:
    """Return a warning about a teacher that can teach little, in one line, or an empty string.

    Chance is the share of the most frequent class, and at least one over the number of classes. A teacher is near
    chance if it covers less than a tenth of the way from there to 100 %, or if it is less than two standard errors of a
    guesser's accuracy above chance.

    Args:
        teacher: The teacher's accuracy on the test set, in percent.
        student: The student's accuracy before training, in percent. None: unknown.
        labels: The number of test samples of each class.
    """
    samples = sum(labels)
    if not samples:
        return ""
    chance = max(max(labels) / samples, 1 / len(labels))
    near = chance + max(0.1 * (1 - chance), 2 * math.sqrt(chance * (1 - chance) / samples))
    if teacher <= 100 * near:
        comparison = f"and always guessing the most frequent class gives {100 * chance:.1f} %"
    elif student is not None and teacher <= student:
        comparison = f"no more than the student before training ({student:.1f} %)"
    else:
        return ""
    return (
        f"the teacher's accuracy on the test set is {teacher:.1f} %, {comparison}: are its images normalised as in its "
        f"training (--teacher-mean and --teacher-std, or kcd_ext.models.renormalise), and its classes in the same order?"
    )
