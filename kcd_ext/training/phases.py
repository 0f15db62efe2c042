"""The phases of a run: each trains one module for some epochs. First a method's own parts, then the student."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..condensation import Condensation, KnowledgeCondenser
from ..methods import Batch, Method, Outcome, Pretraining
from .batch_mixing import BatchMixer, draw_uniforms
from .checks import check_outcome
from .diagnosis import check_finite
from .distributed import gather_labels, prepare
from .recipe import milestones_passed

if TYPE_CHECKING:
    from .run import Run

PRETRAINING_SEED_OFFSET = 2**32 + 1  # pretraining never shares random numbers with training


class StudentStep(nn.Module):
    """Student and method as one module, called once per step. Several ranks wrap it as one.

    If only the student were wrapped, a method that calls the module inside would bypass the reduction of gradients. The
    teacher is an argument, so it is neither trained nor wrapped nor saved.

    Args:
        student: The student; its parameters are saved.
        method: The method; its parameters are saved.
        callee: The module that `forward` passes to the method: the student, or a wrapper or compiled form of it.
    """

    def __init__(self, student: nn.Module, method: Method, callee: nn.Module):
        super().__init__()
        self.student = student
        self.method = method
        self.callee = [callee]  # a list hides it from nn.Module: otherwise its parameters would be saved twice

    def forward(self, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """Return the method's outcome of the batch."""
        return self.method(self.callee[0], teacher, batch)


class PretrainingStep(nn.Module):
    """A method's own part and its pretraining loss as one module, which several ranks can wrap."""

    def __init__(self, plan: Pretraining):
        super().__init__()
        self.part = plan.part
        self._loss = plan.loss

    def forward(self, teacher: nn.Module | None, batch: Batch) -> Tensor:
        """Return the loss of the batch."""
        return self._loss(teacher, batch)


class Phase:
    """A module that is trained for some epochs, with its optimizer and its metrics.

    Subclasses implement:

    - `lr_at(epoch)`: return the learning rate.
    - `record(batch, outcome)`: add a step's results to sums on the device and return its loss.
    - `means()`: return the epoch's metrics.

    Args:
        run: The run that the phase belongs to.
        module: Called with the teacher and a batch in every step.
        parameters: The parameters that the optimizer changes.
        lr: The initial learning rate.
        epochs: The positions of its epochs in `history`.
        history: The metrics of all epochs of this kind, shared by all pretraining phases.
    """

    epoch_key: str  # the metrics entry that counts epochs, from 1
    name: str  # what errors call an epoch
    seed_offset = 0  # added to the epoch where random numbers are drawn
    trains_student = False
    sample_weight: Tensor | None = None  # (N,) factors of the samples' losses; None: 1 for all

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
        # Not prepared by accelerate: its wrapper searches the disk for packages in every step.
        self.optimizer = torch.optim.SGD(parameters, lr, **options)

    def prepare(self) -> None:
        """Prepare the first epoch: set `step`, the module wrapped for several ranks."""
        self.step = prepare(self.run.accelerator, self.module)
        self.optimizer.zero_grad()  # the caller may have left gradients

    def remaining_epochs(self) -> range:
        """Return the epochs that have no metrics yet."""
        return self.epochs[max(0, len(self.history) - self.epochs.start) :]

    def begin_epoch(self, epoch: int) -> None:
        """Set modes and the learning rate, and clear the sums."""
        self.lr = self.lr_at(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        if self.run.teacher is not None:
            self.run.teacher.eval()  # the method may have made it a part of itself, and train mode reaches parts
        self.rows, self.sums = 0, torch.zeros(1, device=self.run.device)

    def training_batches(self, batches: Iterable[Batch], count: int, epoch: int) -> Iterator[Batch]:
        """Yield an epoch's `count` batches as they are trained on."""
        yield from batches

    def end_epoch(self) -> dict[str, object]:
        """Return further metrics. Raise FloatingPointError if training has diverged."""
        check_finite(self.run, self, self.loss)
        return {}

    def _accumulate(self, rows: int, *means: Tensor) -> None:
        self.rows += rows
        self.sums = self.sums + rows * torch.stack(means)

    def _reduce(self) -> tuple[int, int, list[float]]:
        """Set `loss` to its mean over all ranks. Return their rows, their padding rows, and the means of the other sums."""
        rows, padding, *sums = self.run.sum([self.rows, self.run.sampler.padding, *self.sums])
        self.loss, *others = (x / rows for x in sums)
        return int(rows), int(padding), others


class PretrainingPhase(Phase):
    """The training of one part of a method. The part is frozen before and afterwards."""

    epoch_key = "pretraining"
    name = "pretraining epoch"
    seed_offset = PRETRAINING_SEED_OFFSET

    def __init__(self, run: "Run", plan: Pretraining):
        first = run.phases[-1].epochs.stop if run.phases else 0
        self.plan = plan
        epochs, parameters = range(first, first + plan.epochs), [*plan.part.parameters()]
        super().__init__(run, PretrainingStep(plan), parameters, plan.lr, epochs, run.pretraining_history)
        plan.part.requires_grad_(False)  # until its first epoch

    def lr_at(self, epoch: int) -> float:
        """Return the learning rate, which falls to a tenth at every milestone of the plan."""
        passed = milestones_passed(self.plan.milestones, epoch - self.epochs.start, self.plan.epochs)
        return self.initial_lr * 0.1**passed

    def begin_epoch(self, epoch: int) -> None:
        """Unfreeze the part."""
        super().begin_epoch(epoch)
        self.plan.part.requires_grad_(True).train()

    def record(self, batch: Batch, loss: Tensor) -> Tensor:
        """Add the loss to the sums, and return it."""
        self._accumulate(len(batch.label), loss.detach())
        return loss

    def means(self) -> dict[str, object]:
        """Return the mean loss. Waits for the device."""
        self._reduce()
        return {"loss": self.loss}

    def end_epoch(self) -> dict[str, object]:
        """Freeze the part."""
        self.freeze()
        return super().end_epoch()

    def freeze(self) -> None:
        """Freeze the part: no gradients, evaluation mode."""
        self.plan.part.requires_grad_(False).eval()

    def prepare(self) -> None:
        """Prepare the first epoch, with gradients enabled: wrappers look for parameters that require one."""
        self.plan.part.requires_grad_(True)
        super().prepare()
        self.freeze()


class StudentPhase(Phase):
    """The training of the student and of the method's parameters."""

    epoch_key = name = "epoch"
    trains_student = True

    def __init__(self, run: "Run"):
        trained = {name: p for name, p in run.module.named_parameters() if p.requires_grad}
        super().__init__(run, run.module, [*trained.values()], run.recipe.lr, range(run.recipe.epochs), run.history)
        self.trained = [*trained]
        self.mixer = BatchMixer.of(run.recipe, run.classes)

    def lr_at(self, epoch: int) -> float:
        """Return the learning rate from the method's own schedule if it has one, else from the recipe's milestones."""
        factor = self.run.method.lr_factor(epoch, self.run.recipe.epochs)
        return self.run.recipe.lr_at(epoch) if factor is None else self.initial_lr * factor

    def begin_epoch(self, epoch: int) -> None:
        """Call the method's `begin`, and prepare the lists of visits for the condenser."""
        run = self.run
        run.method.begin(epoch, run.recipe.epochs)
        self.module.train()
        for phase in run.phases[:-1]:
            phase.freeze()
        super().begin_epoch(epoch)
        self.sample_weight = run.condenser.sample_weight
        self.visits: list[tuple[Tensor, Tensor]] = []
        # The first epoch sees every label of a data set that is loaded item by item.
        collects = run.recipe.condense.drops_samples and run.condenser.labels is None and epoch == 0
        self.labels: list[tuple[Tensor, Tensor]] | None = [] if collects else None

    def training_batches(self, batches: Iterable[Batch], count: int, epoch: int) -> Iterator[Batch]:
        """Yield the batches, mixed if the recipe asks for it. Keep their labels for the condenser if it needs them."""
        draws = draw_uniforms(count, seed=self.run.recipe.seed, epoch=epoch) if self.mixer else [None] * count
        for batch, uniforms in zip(batches, draws, strict=True):
            if self.labels is not None:
                self.labels.append((batch.index, batch.label))
            yield batch if uniforms is None else self.mixer.mix(batch, uniforms)

    def record(self, batch: Batch, outcome: Outcome) -> Tensor:
        """Add loss, accuracy and terms to the sums, keep the values for the condenser, and return the loss."""
        method, measure = self.run.recipe.method, self.run.condenser.measure
        if not self.visits:
            check_outcome(outcome, batch, measure, method)
            self.terms = [*outcome.terms]
        if outcome.terms.keys() != {*self.terms}:
            raise ValueError(
                f"method {method!r} must return the terms {self.terms} in every step, got {[*outcome.terms]}"
            )
        self.visits.append((batch.index, getattr(outcome, measure)))
        label = (
            batch.label if batch.label.dim() == 1 else batch.label.argmax(-1)
        )  # of a mix: the class of the largest share
        accuracy = 100 * (outcome.logits.argmax(-1) == label).double().mean()
        terms = [outcome.terms[name] for name in self.terms]
        self._accumulate(len(batch.label), outcome.loss.detach(), accuracy, *terms)
        return outcome.loss

    def means(self) -> dict[str, object]:
        """Return the mean loss, accuracy and terms, and the number of visits. Waits for the device."""
        rows, padding, (accuracy, *terms) = self._reduce()
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
        """Update the condenser, take its step, and return the resulting condensation."""
        run, condenser = self.run, self.run.condenser
        with run.timed("seconds"), run.timed("condensation_seconds"):
            # All visits of the epoch at once: a few operations on long tensors instead of many on short ones.
            condenser.update(*map(torch.cat, zip(*self.visits, strict=True)))
            if self.labels:
                labels = gather_labels(self.labels, condenser.num_samples, run.accelerator)
                if labels.min() >= 0:  # negative labels are not classes
                    condenser.set_labels(labels)
            condensation = condenser.step()
        super().end_epoch()
        metrics = None if condensation is None else condensation_metrics(condensation, condenser, run.classes)
        return {"non_finite": condenser.non_finite, "condensation": metrics}


def condensation_metrics(condensation: Condensation, condenser: KnowledgeCondenser, classes: int) -> dict[str, object]:
    """Return the metrics of a condensation step: sizes, samples kept per class, histogram of all knowledge values so far.

    The histogram has the same bins at every stage, from 0 to the largest possible entropy, log(classes). Values outside
    count in the outer bins. It is None if samples are not selected by knowledge value.
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
