"""The protocol of a distillation method: a module that turns a batch into a loss and a knowledge value for each sample."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_unit_interval, check_used


class Batch(NamedTuple):
    """A batch of b samples."""

    x: Tensor
    """(b, ...), the input of the networks."""
    label: Tensor
    """(b,) int64; or (b, classes) float32 probabilities, only if the method's `takes_soft_labels` is True."""
    index: Tensor
    """(b,) int64, indices in the data set; -1 marks a repeat that only pads."""
    weight: Tensor | None = None
    """(b,) float32, the factor of each sample's loss; None: 1 for all."""


@dataclass
class Outcome:
    """The result of a method for one batch of b samples."""

    loss: Tensor
    """(), differentiable."""
    logits: Tensor
    """(b, classes), the student's, detached."""
    value: Tensor
    """(b,) float, the knowledge value of each sample, detached."""
    terms: dict[str, Tensor] = field(default_factory=dict)
    """Name -> (), detached: parts of the loss, each a column in the metrics."""
    losses: Tensor | None = None
    """(b,), each sample's loss before its weight, detached; None without `batch.weight`."""
    kl: Tensor | None = None
    """(b,), each sample's KL divergence at the loss's temperature, in nats, detached; None if the method does not give it."""


@dataclass(frozen=True)
class Pretraining:
    """A part of a method that is trained before the student, and is constant afterwards."""

    part: nn.Module
    """The part to train, a module of the method."""
    loss: Callable[[nn.Module | None, Batch], Tensor]
    """(teacher, batch) -> (), the loss to minimise. The teacher is frozen and in evaluation mode, unless it is `part`."""
    epochs: int
    """The number of epochs."""
    lr: float
    """The initial learning rate of SGD, whatever the optimizer of the student is."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Fractions of `epochs` at which the learning rate drops to a tenth."""


class Method(nn.Module):
    """A distillation method. Its own parameters, if any, are trained together with the student's.

    The trainer knows no method by name. To use your own, name it `module:Class` in the recipe. To give it a short name, add
    a file beside this one and a line to `kcd_ext.methods.REGISTRY`.
    """

    needs_teacher = True
    """False: `distill` accepts teacher=None."""
    weighs_samples = False
    """True: `forward` applies `batch.weight` and sets `Outcome.losses`."""
    takes_soft_labels = False
    """True: `batch.label` may be the probabilities of all classes, as mixup makes them."""
    flops_known = True
    """False: a row costs more, or less, than one forward pass of the teacher and one step of the student."""
    compiles_teacher = True
    """False: a recipe's `compile` does not compile the teacher."""
    batch_keep = 1.0
    """The fraction of each batch that the teacher runs on."""

    def set_options(self, check: Callable[[str, object], object], **options: object) -> None:
        """Set each option as an attribute, to the value that `check(name, value)` returns.

        `check` is a function of `kcd_ext.checks`. It raises for values that are not allowed.
        """
        for name, value in options.items():
            setattr(self, name, check(name, value))

    def set_label_smoothing(self, label_smoothing: float, ce_weight: float = 1.0) -> None:
        """Set the attribute `label_smoothing`, a number in [0, 1]. Raise ValueError if a `ce_weight` of 0 makes it useless."""
        self.set_options(check_unit_interval, label_smoothing=label_smoothing)
        check_used("label_smoothing", label_smoothing, 0, ce_weight == 0, "ce_weight=0")

    def prepare(self, student: nn.Module, teacher: nn.Module | None, samples: Iterable[Batch]) -> None:
        """Probe shapes and build the method's own parts. Called once before training, also when a run resumes.

        State that must survive a checkpoint has to be a parameter or a buffer. Leave student and teacher unchanged. Most
        methods do not need this.

        Args:
            student: The student.
            teacher: The teacher, or None.
            samples: Batches on the training device, of the whole training set on every rank. Each sample comes once, by
                ascending index, unmixed. You can iterate as often as you like. Images of an `ImageSet` are neither cropped
                nor flipped; items of other data sets pass through their own transforms, which may augment. If all labels
                are in memory, `samples.labels` holds them, (n,) int64 by index, so you need not load any sample for them.
        """

    def teacher_of(self, teacher: nn.Module | None) -> nn.Module | None:
        """Return the network to use as the teacher. Called after `prepare`.

        If it is not the given teacher, it must be one of the method's own parts.
        """
        return teacher

    def pretraining(self) -> tuple[Pretraining, ...]:
        """Return the parts to train before the student, in order. Called after `prepare`."""
        return ()

    def lr_factor(self, epoch: int, epochs: int) -> float | None:
        """Return the factor of the recipe's `lr` in an epoch, 0 <= epoch < epochs. None: the recipe's schedule applies.

        A warm-up of the recipe multiplies it.
        """
        return None

    def begin(self, epoch: int, epochs: int) -> None:
        """Start an epoch of the student, 0 <= epoch < epochs. Called before each one, also the first after a resume.

        Anything that changes during a run must be a function of these two numbers, so that a resumed run continues alike.
        """

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """Return the loss of a batch. The student is in training mode, the teacher in evaluation mode.

        Do not wait for the device: no `.item()`, no branch on a tensor's value.

        Before the first epoch the trainer rehearses one step: it calls `begin` and `forward` on a few samples and then
        restores parameters, buffers and attributes of the method and the networks.
        """
        raise NotImplementedError

    def release(self) -> None:
        """Undo what `prepare` did to the networks, such as hooks. Called once at the end, also after a failure."""


def entropy(logits: Tensor) -> Tensor:
    """Return KCD's knowledge value (Li et al., ECCV 2022, Eq. 7): H = -sum_c p_c log p_c at temperature 1, in nats.

    (b, classes) -> (b,), detached. A class of probability 0 adds 0.
    """
    probability = logits.detach().softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return torch.special.entr(probability).sum(-1)
