"""What a distillation method is: a module that turns a batch into a loss, and says what every sample was worth."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Batch(NamedTuple):
    """Some samples."""

    x: Tensor  # (b, ...) what the networks take
    label: Tensor  # (b,) int64
    index: Tensor  # (b,) int64, the sample's place in the data set; -1 marks a repeat that only pads
    weight: Tensor | None = None  # (b,) float32, what each sample's loss is multiplied by; None: 1 for all


@dataclass
class Outcome:
    """What a method makes of one batch of b samples."""

    loss: Tensor  # () differentiable
    logits: Tensor  # (b, classes) the student's, detached
    value: Tensor  # (b,) float, the knowledge value of every sample, detached
    terms: dict[str, Tensor] = field(default_factory=dict)  # name -> (), detached: parts of the loss worth a column
    losses: Tensor | None = (
        None  # (b,) every sample's own loss before its weight, detached; None: without `batch.weight`
    )


@dataclass(frozen=True)
class Pretraining:
    """A part of a method that is trained before the student is, and is a constant from then on."""

    part: nn.Module
    loss: Callable[[nn.Module | None, Batch], Tensor]
    """(teacher, batch) -> (), what is minimised. The teacher is in evaluation mode and a constant, unless it is `part`."""
    epochs: int
    lr: float
    milestones: tuple[float, ...] = (0.5, 0.75)  # fractions of `epochs` at which the learning rate falls to a tenth


class Method(nn.Module):
    """What is distilled, and how. Its own parameters, if it has any, train together with the student's.

    The trainer knows no method by name. A new one is a file beside this one and a line in `kcd_ext.methods.REGISTRY`;
    one of your own needs neither: name it `module:Class` in the recipe.
    """

    needs_teacher = True  # False: `distill` takes teacher=None
    weighs_samples = False  # True: `forward` heeds `batch.weight` and gives `Outcome.losses`
    flops_known = True  # False: more is computed than one pass of the teacher and one step of the student a row
    compiles_teacher = True  # False: a recipe's `compile` leaves the teacher alone
    batch_keep = 1.0  # the fraction of every batch that the teacher is asked about

    def set_options(self, check: Callable[[str, object], object], **options: object) -> None:
        """Set each option as an attribute: what `check(name, value)`, one of `kcd_ext.checks`, returns of it or raises."""
        for name, value in options.items():
            setattr(self, name, check(name, value))

    def prepare(self, student: nn.Module, teacher: nn.Module | None, samples: Iterable[Batch]) -> None:
        """Called once before training, also before a resumed run goes on: probe shapes, build the method's own parts.

        `samples` yields batches of the whole training set, on every process all of it, each sample once by ascending
        index, mixed with nothing, on the training device; as often as one asks. Images of an `ImageSet` are neither
        cropped nor flipped; items of other data sets come through their own transforms, which may augment them. Where
        all labels lie in memory, `samples.labels` are they, (n,) int64 by index: who wants no more loads no sample.

        What is trained or collected here and must survive a checkpoint is a parameter or a buffer. The student and the
        teacher stay as they are. Most methods need nothing of this.
        """

    def teacher_of(self, teacher: nn.Module | None) -> nn.Module | None:
        """The network that is asked in the teacher's place from then on, asked after `prepare`; one of the method's own parts
        where it is another than the teacher."""
        return teacher

    def pretraining(self) -> tuple[Pretraining, ...]:
        """What is to be trained first, one after the other, asked after `prepare`."""
        return ()

    def lr_factor(self, epoch: int, epochs: int) -> float | None:
        """What the recipe's `lr` is multiplied by in an epoch, 0 <= epoch < epochs. None: its milestones say."""
        return None

    def begin(self, epoch: int, epochs: int) -> None:
        """Called before every epoch of the student, 0 <= epoch < epochs, also the first one after a resume.

        What changes in the course of a run is a function of these two alone, so that a run that goes on finds it again.
        """

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """The loss of a batch. The student is in training mode, the teacher in evaluation mode.

        Nothing here may wait for the device: no `.item()`, no branch on a tensor's value. Before the first epoch the
        trainer calls it, after `begin`, for a step on a few samples that it undoes: parameters, buffers and attributes of
        the method and the networks are then what they were.
        """
        raise NotImplementedError

    def release(self) -> None:
        """Called once at the end, also after a failure: gives back what `prepare` took (hooks on the networks)."""


def entropy(logits: Tensor) -> Tensor:
    """The knowledge value of KCD (Li et al., ECCV 2022, Eq. 7): H = -sum_c p log p at temperature 1, in nats.

    (b, classes) -> (b,), detached. A class of probability 0 adds 0.
    """
    probability = logits.detach().softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return torch.special.entr(probability).sum(-1)
