"""What a distillation method is: a module that turns a batch into a loss, and says what every sample was worth."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Batch(NamedTuple):
    """Some samples, as `IndexedDataset` gives them."""

    x: Tensor  # (b, ...) what the networks take
    label: Tensor  # (b,) int64
    index: Tensor  # (b,) int64, the sample's place in the data set; -1 marks a repeat that only pads


@dataclass
class Outcome:
    """What a method makes of one batch of b samples."""

    loss: Tensor  # () differentiable
    logits: Tensor  # (b, classes) the student's, detached
    value: Tensor  # (b,) float, the knowledge value of every sample, detached
    terms: dict[str, Tensor] = field(default_factory=dict)  # name -> (), detached: parts of the loss worth a column


class Method(nn.Module):
    """What is distilled, and how. Its own parameters, if it has any, train together with the student's.

    The trainer knows no method by name. A new one is a file beside this one and a line in `kcd_ext.methods.REGISTRY`;
    one of your own needs neither: name it `module:Class` in the recipe.
    """

    needs_teacher = True  # False: `distill` takes teacher=None

    def prepare(self, student: nn.Module, teacher: nn.Module | None, loader: Iterable[Batch]) -> None:
        """Called once before training: probe shapes, build and pre-train the method's own parts.

        `loader` yields batches of the training set on the training device. The student and the teacher stay as they
        are. Most methods need nothing of this.
        """

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """The loss of a batch. The student is in training mode, the teacher in evaluation mode.

        Nothing here may wait for the device: no `.item()`, no branch on a tensor's value.
        """
        raise NotImplementedError


def entropy(logits: Tensor) -> Tensor:
    """The knowledge value of KCD (Li et al., ECCV 2022, Eq. 7): H = -sum_c p log p at temperature 1, in nats.

    (b, classes) -> (b,), detached. A class of probability 0 adds 0.
    """
    probability = logits.detach().softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return torch.special.entr(probability).sum(-1)
