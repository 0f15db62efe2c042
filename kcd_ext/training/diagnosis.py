"""Why training cannot go well: numbers that are not finite, and teachers that can teach little."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..methods import Batch, Outcome
from .distributed import full_state_dict, local

if TYPE_CHECKING:
    from .phases import Phase
    from .run import Run


class NotFiniteError(ValueError):
    """The first step of a run holds NaN or an infinity."""


def is_sound(logits: Tensor) -> Tensor:
    """Return whether the highest of a sample's logits (b, classes) is finite, (b,) bool; other classes may have -inf."""
    return logits.amax(-1).isfinite()


def check_start(
    outcome: Outcome,
    batch: Batch,
    gradients: Mapping[str, Tensor],
    student: nn.Module,
    teacher: nn.Module | None,
    method: str,
) -> None:
    """Raise NotFiniteError, naming the cause, where a loss or gradient is not finite before anything is trained."""
    if _all_finite([outcome.loss, *gradients.values()]):
        return
    broken = [name for name, gradient in gradients.items() if not _all_finite([gradient])]
    causes = (
        _broken_sample("train", batch),
        _broken_weights("student", student),
        None if teacher is None else _broken_weights("teacher", teacher),
        None
        if is_sound(outcome.logits).all()
        else "student gives logits that are not finite, from finite weights and samples",
        None if teacher is None else _broken_answer("teacher", teacher, "train", batch),
        None
        if outcome.loss.isfinite()
        else f"method {method!r} gives a loss of {outcome.loss.item()}, from finite logits",
        *(f"method {method!r} gives {name} a gradient that is not finite" for name in broken),
    )
    raise NotFiniteError(f"nothing can be trained: {next(filter(None, causes))}")


def check_finite(run: "Run", phase: "Phase", loss: float) -> None:
    """Raise FloatingPointError, with the cause, where the loss or a parameter is not finite after an epoch."""
    when = f"after {phase.name} {len(phase.history) + 1}"
    what = f"the loss is not finite {when} ({loss})"
    if math.isfinite(loss):
        broken = torch.stack([~local(parameter).isfinite().all() for parameter in phase.parameters]).any()
        if not run.sum([broken])[0]:
            return
        what = f"weights are not finite {when}"
    trained = {*map(id, phase.parameters)}
    is_constant = run.teacher is not None and trained.isdisjoint(map(id, run.teacher.parameters()))
    asked = {"teacher": run.teacher} if is_constant else {}  # one that is trained is no cause
    cause = first_broken("train", run.feed.eval_batches(run.recipe.batch_size), asked)
    raise FloatingPointError(f"{what}: {cause or f'a smaller lr than {phase.initial_lr}?'}")


def check_answers(run: "Run", unsound: int, epoch: int) -> None:
    """Raise FloatingPointError where a test sample is not finite; warn where only the student's answer is not.

    `unsound`: the number of test samples whose highest logit is not finite after the epoch.
    """
    if not unsound:
        return
    if (cause := first_broken("test", run.test_batches(), {})) is not None:
        raise FloatingPointError(f"the accuracy after epoch {epoch + 1} means nothing: {cause}")
    cause = first_broken("test", run.test_batches(), {"student": run.student})  # on every process: it may be sharded
    if run.is_main:
        text = f"after epoch {epoch + 1} {unsound} test samples have no finite logits: {cause}"
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def first_broken(part: str, batches: Iterable[Batch], networks: Mapping[str, nn.Module]) -> str | None:
    """Return which is the first sample that is not finite, or whose logits by one of these networks are not; None: none.

    The networks are called in evaluation mode, in which they stay.
    """
    for batch in batches:
        found = _broken_sample(part, batch)
        for name, network in networks.items():
            found = found or _broken_answer(name, network, part, batch)
        if found:
            return found
    return None


def _broken_sample(part: str, batch: Batch) -> str | None:
    finite = batch.x.isfinite().reshape(len(batch.x), -1).all(1)
    if finite.all():
        return None
    place = int(finite.int().argmin())
    return f"{part}[{int(batch.index[place])}] holds {_kind_of(batch.x[place])}"


def _broken_weights(name: str, network: nn.Module) -> str | None:
    for path, tensor in chain(network.named_parameters(), network.named_buffers()):
        if not _all_finite([tensor]):
            return f"the {name}'s {path} holds {_kind_of(full_state_dict(tensor.detach()))} before training"
    return None


def _broken_answer(name: str, network: nn.Module, part: str, batch: Batch) -> str | None:
    with torch.no_grad():
        sound = is_sound(network.eval()(batch.x))
    if sound.all():
        return None
    place = int(batch.index[int(sound.int().argmin())])
    return f"the {name} gives logits that are not finite for {part}[{place}], which is finite"


def _kind_of(tensor: Tensor) -> str:
    return "NaN" if tensor.isnan().any() else "an infinity"


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    return bool(torch.stack([full_state_dict(tensor.detach()).isfinite().all() for tensor in tensors]).all())


def doubt_about(teacher: float, student: float | None, labels: Sequence[float]) -> str:
    """Return why a teacher can teach little, in one line; empty where nothing says so.

    Args:
        teacher: its accuracy on the test set, percent.
        student: that of the student before training; None: not known.
        labels: how many test samples each class has.

    Chance is the share of the most frequent class, or one of all classes. A teacher is near it if it has gone less than a
    tenth of the way from there to 100 %, or not two standard errors of a guesser's accuracy.
    """
    samples = sum(labels)
    if not samples:
        return ""
    chance = max(max(labels) / samples, 1 / len(labels))
    near = chance + max(0.1 * (1 - chance), 2 * math.sqrt(chance * (1 - chance) / samples))
    if teacher <= 100 * near:
        than = f"where the most frequent class alone has {100 * chance:.1f} %"
    elif student is not None and teacher <= student:
        than = f"no more than the student before training ({student:.1f} %)"
    else:
        return ""
    return (
        f"the teacher's accuracy on the test set is {teacher:.1f} %, {than}: is it given images normalised as those it was "
        f"trained on (--mean and --std, or mean and std of kcd_ext.data.load), and are its classes in this order?"
    )
