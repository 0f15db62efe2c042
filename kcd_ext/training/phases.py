"""What a run trains, one after the other: the parts of a method that are trained first, then the student."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..condensation import Condensation, KnowledgeCondenser
from ..methods import Batch, Method, Outcome, Pretraining
from .checks import check_outcome
from .diagnosis import check_finite
from .distributed import labels_in, prepare
from .recipe import milestones_passed

if TYPE_CHECKING:
    from .run import Run

PRETRAINING_SEED_OFFSET = 2**32 + 1  # so that pretraining never shares random numbers with training


class StudentStep(nn.Module):
    """Student and method as one module, called once a step: several processes wrap it whole.

    A method that called the student inside a wrapper of the student's own would bypass the reduction of gradients. The
    teacher is an argument, and so is neither trained nor wrapped nor saved.
    """

    def __init__(self, student: nn.Module, method: Method, called: nn.Module):
        super().__init__()
        self.student = student
        self.method = method
        self.called = [called]  # the student, or what was compiled of it; a list hides it, so it is saved once

    def forward(self, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """Return the method's outcome of the batch."""
        return self.method(self.called[0], teacher, batch)


class PretrainingStep(nn.Module):
    """A part of a method that is trained first, and its loss, for several processes to wrap."""

    def __init__(self, plan: Pretraining):
        super().__init__()
        self.part = plan.part
        self._loss = plan.loss

    def forward(self, teacher: nn.Module | None, batch: Batch) -> Tensor:
        """Return the loss of the batch."""
        return self._loss(teacher, batch)


class Phase:
    """A module that is trained for some epochs: its step, its optimizer and its lines of metrics.

    A subclass has `lr_at(epoch)`, the learning rate; `record(batch, outcome)`, which notes what a step gave, on the device,
    and returns its loss; and `means()`, what the line of metrics says of it.

    Args:
        run: what the phase is a part of.
        module: called with the teacher and a batch at every step.
        parameters: what the optimizer changes.
        lr: the learning rate at the start.
        epochs: the numbers of its epochs in `history`.
        history: the lines of all epochs of its kind.
    """

    counter: str  # the entry of a line of metrics that is the epoch's number, from 1 on
    name: str  # of an epoch, in errors
    stream = 0  # added to an epoch's number where random numbers are drawn
    trains_student = False
    sample_weight: Tensor | None = None  # (N,) what the samples' losses are multiplied by; None: 1 for all

    def __init__(
        self,
        run: "Run",
        module: nn.Module,
        parameters: Sequence[nn.Parameter],
        lr: float,
        epochs: range,
        history: list[dict],
    ):
        self.run = run
        self.module = module
        self.parameters = parameters
        self.initial_lr = lr
        self.epochs = epochs
        self.history = history
        options = {"momentum": run.recipe.momentum, "weight_decay": run.recipe.weight_decay}
        # Not prepared: accelerate's wrapper looks for packages on the disk at every step.
        self.optimizer = torch.optim.SGD(parameters, lr, **options)

    def prepare(self) -> None:
        """Get ready for the first epoch: `step` is the module as several processes call it."""
        self.step = prepare(self.run.accelerator, self.module)
        self.optimizer.zero_grad()  # what the caller's own training left behind

    def remaining_epochs(self) -> range:
        """Return the numbers of the epochs that have no line of metrics yet."""
        return self.epochs[max(0, len(self.history) - self.epochs.start) :]

    def begin_epoch(self, epoch: int) -> None:
        """Set modes and the learning rate, and clear the sums."""
        self.lr = self.lr_at(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        if self.run.teacher is not None:
            self.run.teacher.eval()  # should the method have made it a part of its own
        self.rows, self.sums = 0, torch.zeros(1, device=self.run.device)

    def end_epoch(self) -> dict[str, object]:
        """Return what else the line of metrics has. Raise FloatingPointError where training has diverged."""
        check_finite(self.run, self, self.loss)
        return {}

    def _add(self, rows: int, *means: Tensor) -> None:
        self.rows += rows
        self.sums = self.sums + rows * torch.stack(means)

    def _reduced(self) -> tuple[int, int, list[float]]:
        """Return the rows of all processes, how many of them are padding, and the means over them; keep that of the loss."""
        rows, padding, *sums = self.run.sum([self.rows, self.run.sampler.padding, *self.sums])
        self.loss, *others = (x / rows for x in sums)
        return int(rows), int(padding), others


class PretrainingPhase(Phase):
    """The training of one part of a method, which is a constant before and afterwards."""

    counter = "pretraining"
    name = "pretraining epoch"
    stream = PRETRAINING_SEED_OFFSET

    def __init__(self, run: "Run", plan: Pretraining):
        first = run.phases[-1].epochs.stop if run.phases else 0
        self.plan = plan
        epochs, parameters = range(first, first + plan.epochs), [*plan.part.parameters()]
        super().__init__(run, PretrainingStep(plan), parameters, plan.lr, epochs, run.pretraining_history)
        plan.part.requires_grad_(False)  # until its first epoch

    def lr_at(self, epoch: int) -> float:
        """Return a tenth of the rate at every milestone of the plan."""
        passed = milestones_passed(self.plan.milestones, epoch - self.epochs.start, self.plan.epochs)
        return self.initial_lr * 0.1**passed

    def begin_epoch(self, epoch: int) -> None:
        """Let the part be trained."""
        super().begin_epoch(epoch)
        self.plan.part.requires_grad_(True).train()

    def record(self, batch: Batch, loss: Tensor) -> Tensor:
        """Note the loss, and return it."""
        self._add(len(batch.label), loss.detach())
        return loss

    def means(self) -> dict[str, object]:
        """Return the mean loss. Waits for the device."""
        self._reduced()
        return {"loss": self.loss}

    def end_epoch(self) -> dict[str, object]:
        """Make the part a constant again."""
        self.freeze()
        return super().end_epoch()

    def freeze(self) -> None:
        """Make the part a constant."""
        self.plan.part.requires_grad_(False).eval()

    def prepare(self) -> None:
        """See `Phase`: wrappers look for what requires a gradient."""
        self.plan.part.requires_grad_(True)
        super().prepare()
        self.freeze()


class StudentPhase(Phase):
    """The training of the student, together with the parameters of the method."""

    counter = name = "epoch"
    trains_student = True

    def __init__(self, run: "Run"):
        trained = {name: p for name, p in run.module.named_parameters() if p.requires_grad}
        super().__init__(run, run.module, [*trained.values()], run.recipe.lr, range(run.recipe.epochs), run.history)
        self.trained = [*trained]

    def lr_at(self, epoch: int) -> float:
        """Return the rate of the method's own schedule, if it has one, else of the recipe's milestones."""
        factor = self.run.method.lr_factor(epoch, self.run.recipe.epochs)
        return self.run.recipe.lr_at(epoch) if factor is None else self.initial_lr * factor

    def begin_epoch(self, epoch: int) -> None:
        """Begin the method's epoch, and collect what the condenser gets in the end."""
        run = self.run
        run.method.begin(epoch, run.recipe.epochs)
        self.module.train()
        for phase in run.phases[:-1]:
            phase.freeze()
        super().begin_epoch(epoch)
        self.sample_weight = run.condenser.sample_weight
        self.visits: list[tuple[Tensor, Tensor]] = []
        # The labels of items that are loaded one by one: the first epoch shows them all.
        collects = run.recipe.condense.shrinks_the_set and run.condenser.labels is None and epoch == 0
        self.labels: list[tuple[Tensor, Tensor]] | None = [] if collects else None

    def record(self, batch: Batch, outcome: Outcome) -> Tensor:
        """Note loss, accuracy, terms and values, and return the loss."""
        method, measure = self.run.recipe.method, self.run.condenser.measure
        if not self.visits:
            check_outcome(outcome, batch, measure, method)
            self.terms = [*outcome.terms]
        if outcome.terms.keys() != {*self.terms}:
            raise ValueError(f"method {method!r} must give the terms {self.terms}, got {[*outcome.terms]}")
        self.visits.append((batch.index, getattr(outcome, measure)))
        if self.labels is not None:
            self.labels.append((batch.index, batch.label))
        accuracy = 100 * (outcome.logits.argmax(-1) == batch.label).double().mean()
        terms = [outcome.terms[name] for name in self.terms]
        self._add(len(batch.label), outcome.loss.detach(), accuracy, *terms)
        return outcome.loss

    def means(self) -> dict[str, object]:
        """Return the mean loss, accuracy and terms, and how many samples were visited. Waits for the device."""
        rows, padding, (accuracy, *terms) = self._reduced()
        self.run.totals["sample_visits"] += rows - padding
        terms = [term if math.isfinite(term) else None for term in terms]  # JSON has no NaN
        return {
            "loss": self.loss,
            "train_accuracy": accuracy,
            "terms": dict(zip(self.terms, terms, strict=True)),
            "samples": rows - padding,
            "padding": padding,
        }

    def end_epoch(self) -> dict[str, object]:
        """Feed the condenser and take its step; return what it decided."""
        run, condenser = self.run, self.run.condenser
        with run.timed("seconds"), run.timed("condensation_seconds"):
            # A whole epoch's visits at once: a few operations on long tensors instead of many on short ones.
            condenser.update(*map(torch.cat, zip(*self.visits, strict=True)))
            if self.labels:
                labels = labels_in(self.labels, condenser.num_samples, run.accelerator)
                if labels.min() >= 0:  # negative ones are no classes
                    condenser.set_labels(labels)
            condensation = condenser.step()
        super().end_epoch()
        described = None if condensation is None else describe(condensation, condenser, run.classes)
        return {"non_finite": condenser.non_finite, "condensation": described}


def describe(condensation: Condensation, condenser: KnowledgeCondenser, classes: int) -> dict[str, object]:
    """Return an E-step in numbers: sizes, samples kept of every class, histogram of all knowledge values so far.

    The histogram's bins are the same at every stage, from 0 to the largest entropy there is; other values count in the
    outer ones. It is None where samples are selected by something else.
    """
    histogram = None
    if condenser.measure == "value":
        values, high = condenser.values[condenser.counts > 0].cpu().numpy(), math.log(max(classes, 2))
        counts, edges = np.histogram(values.clip(0, high), bins=40, range=(0, high))
        histogram = {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()}
    per_class = condenser.kept_per_class
    if per_class is not None:
        per_class = [*per_class.tolist(), *[0] * (classes - len(per_class))]
    sizes = {name: len(getattr(condensation, name)) for name in ("kept", "dropped", "mixed")}
    return {"stage": condensation.stage, **sizes, "classes": per_class, "values": histogram}
