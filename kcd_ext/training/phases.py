"""The phases of a run: each trains one module for some epochs. First a method's own parts, then the student."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..condensation import Condensation, KnowledgeCondenser
from ..methods import Batch, Method, Outcome, Pretraining
from .averaging import Averages
from .batch_mixing import BatchMixer, draw_uniforms
from .batches import split_evenly
from .checks import check_outcome
from .diagnosis import check_finite
from .distributed import full_state_dict, gather_labels, optimizer_step, prepare, reshard, shard_like
from .optimizers import SGD_WEIGHT_DECAY, kind_of, parameters_of, sgd
from .recipe import milestones_passed
from .summary import best_epoch

if TYPE_CHECKING:
    from .recipe import Recipe
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

    - `lr_at(epoch, fraction)`: return the learning rate of a step, after this fraction of the epoch's steps.
    - `steps_before(epoch)`: return the optimizer steps of all epochs before this one.
    - `record(batch, outcome)`: add a step's results to sums on the device and return its loss.
    - `means()`: return the epoch's metrics.

    Args:
        run: The run that the phase belongs to.
        module: Called with the teacher and a batch in every step.
        optimizer: The optimizer of its parameters.
        lr: The initial learning rate. Groups of parameters with another one keep the ratio.
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
        optimizer: torch.optim.Optimizer,
        lr: float,
        epochs: range,
        history: list[dict],
    ):
        self.run = run
        self.module = module
        # Not prepared by accelerate: its wrapper searches the disk for packages in every step.
        self.optimizer = optimizer
        self.parameters = parameters_of(optimizer)
        self.initial_lr = lr
        self.epochs = epochs
        self.history = history
        self._lr_ratios = [float(group["lr"]) / lr if lr else 1.0 for group in optimizer.param_groups]

    def prepare(self) -> None:
        """Prepare the first epoch: set `step`, the module wrapped for several ranks."""
        self.step = prepare(self.run.accelerator, self.module)
        self.optimizer.zero_grad()  # the caller may have left gradients

    def remaining_epochs(self) -> range:
        """Return the epochs that have no metrics yet."""
        return self.epochs[max(0, len(self.history) - self.epochs.start) :]

    def upcoming_epochs(self) -> Iterator[int]:
        """Yield the next epoch that has no metrics yet, until there is none."""
        while remaining := self.remaining_epochs():
            yield remaining[0]

    def begin_epoch(self, epoch: int) -> None:
        """Set modes and clear the sums."""
        self.epoch = epoch
        self.lr = self.lr_at(epoch, 0.0)
        if self.run.teacher is not None:
            self.run.teacher.eval()  # the method may have made it a part of itself, and train mode reaches parts
        self.rows, self.sums = 0, torch.zeros(1, device=self.run.device)

    def training_batches(self, batches: Iterable[Batch], count: int, epoch: int) -> Iterator[Batch]:
        """Yield an epoch's `count` batches as they are trained on."""
        yield from batches

    def begin_steps(self, steps: int) -> None:
        """Begin the epoch's optimizer steps, of which there are `steps`."""
        self.steps, self.steps_done, self.started = steps, 0, time.perf_counter()

    def take_step(self) -> None:
        """Take an optimizer step with its own learning rate, and call the run's step hooks."""
        self.step_lr = self.lr_at(self.epoch, self.steps_done / self.steps)
        for group, ratio in zip(self.optimizer.param_groups, self._lr_ratios, strict=True):
            group["lr"] = self.step_lr * ratio
        optimizer_step(self.run.accelerator, self.optimizer, self.run.module, self.run.recipe.clip_norm)
        self.steps_done += 1
        for hook in self.run.step_hooks:
            hook(self)

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
        epochs, recipe = range(first, first + plan.epochs), run.recipe
        # The plan's learning rate is one of SGD.
        weight_decay = recipe.weight_decay if recipe.optimizer == "sgd" else SGD_WEIGHT_DECAY
        optimizer = sgd([*plan.part.parameters()], plan.lr, recipe.momentum, weight_decay)
        super().__init__(run, PretrainingStep(plan), optimizer, plan.lr, epochs, run.pretraining_history)
        plan.part.requires_grad_(False)  # until its first epoch

    def lr_at(self, epoch: int, fraction: float) -> float:
        """Return the learning rate, which falls to a tenth at every milestone of the plan."""
        passed = milestones_passed(self.plan.milestones, epoch - self.epochs.start, self.plan.epochs)
        return self.initial_lr * 0.1**passed

    def steps_before(self, epoch: int) -> int:
        """Return the steps of earlier epochs of pretraining. All of them visit every sample."""
        return epoch * self.steps

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
        self.trained = {name: p for name, p in run.module.named_parameters() if p.requires_grad}
        recipe = run.recipe
        optimizer = self.new_optimizer(recipe)
        super().__init__(run, run.module, optimizer, recipe.lr, range(recipe.epochs), run.history)
        self.mixer = BatchMixer.of(recipe, run.classes)
        self.averages: Averages | None = None
        self.best: Mapping[str, Tensor] | None = None  # with keep_best: the student's state after the best epoch

    def new_optimizer(self, recipe: "Recipe") -> torch.optim.Optimizer:
        """Return an optimizer of the trained parameters, without state. Raises TypeError or ValueError if it does not fit."""
        return kind_of(recipe.optimizer).build([*self.trained.values()], recipe.lr, recipe)

    def prepare(self) -> None:
        """Prepare the first epoch. The weights of the student are the first averages."""
        super().prepare()
        if self.run.recipe.ema:
            own = {name: parameter for name, parameter in self.trained.items() if name.startswith("student.")}
            self.averages = Averages(self.run.recipe.ema, own)

    def remaining_epochs(self) -> range:
        """Return the epochs that have no metrics yet; none if the recipe's `patience` is over."""
        remaining, patience = super().remaining_epochs(), self.run.recipe.patience
        stopped = patience is not None and self.history and len(self.history) - best_epoch(self.history) >= patience
        return remaining[:0] if stopped else remaining

    def lr_at(self, epoch: int, fraction: float) -> float:
        """Return the learning rate from the method's own schedule if it has one, else from the recipe's."""
        return self.run.recipe.lr_at(epoch, fraction, self._lr_factor)

    def steps_before(self, epoch: int) -> int:
        """Return the steps of earlier epochs, computed from their number of samples."""
        recipe, ranks = self.run.recipe, self.run.accelerator.num_processes
        rows = [(line["samples"] + line["padding"]) // ranks for line in self.history[:epoch]]
        return sum(len(split_evenly(count, recipe.batch_size * recipe.gradient_accumulation)) for count in rows)

    def take_step(self) -> None:
        """Take an optimizer step, and update the averages."""
        super().take_step()
        if self.averages is not None:
            self.averages.update()

    @contextmanager
    def validating(self, metrics: Mapping[str, object]) -> Iterator[None]:
        """Give the student the weights to validate inside the context: its averages, if there are any.

        The context adds the accuracies to the epoch's `metrics`. At its end the student's state is copied if the recipe keeps
        the best and this epoch is. Every rank must call this method.
        """
        with nullcontext() if self.averages is None else self.averages.applied():
            reshard(self.module.student)
            yield
            if self.run.recipe.keep_best and best_epoch([*self.history, metrics]) == metrics["epoch"]:
                state = full_state_dict(self.module.student.state_dict())
                self.best = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
        reshard(self.module.student)  # what a sharded root has gathered are still the averages

    def finish(self) -> None:
        """Give the student the weights that the run ends with: the best, the averaged or the last ones."""
        student = self.module.student
        if self.best is not None:
            own = student.state_dict()
            student.load_state_dict({name: shard_like(own[name], tensor) for name, tensor in self.best.items()})
        elif self.averages is not None:
            self.averages.copy_to_parameters()

    def begin_epoch(self, epoch: int) -> None:
        """Call the method's `begin`, and prepare the lists of visits for the condenser."""
        run = self.run
        self._lr_factor = run.method.lr_factor(epoch, run.recipe.epochs)
        run.method.begin(epoch, run.recipe.epochs)
        self.module.train()
        for phase in run.phases[:-1]:
            phase.freeze()
        super().begin_epoch(epoch)
        self.sample_weight = run.sample_weight
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
        averaged = {} if self.averages is None else {"ema": self.averages.last_decay}
        return {"non_finite": condenser.non_finite, "condensation": metrics, **averaged}


def condensation_metrics(condensation: Condensation, condenser: KnowledgeCondenser, classes: int) -> dict[str, object]:
    """Return the metrics of a condensation step: sizes, samples kept per class, histogram of all knowledge values so far.

    The histogram has the same bins at every stage, from 0 to the largest possible entropy, log(classes). Values outside
    count in the outer bins. It is None if the values are not entropies.
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
