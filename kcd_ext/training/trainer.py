"""The loop: student and teacher in, a distilled student and its summary out. The only place that knows accelerate."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset

from .. import methods
from ..condensation import Condensation, CondensedSampler, KnowledgeCondenser
from ..data import IndexedDataset
from ..methods import Batch, Method, Outcome
from ..registry import one_line
from .batches import NoBatchOfOne
from .checkpoint import Checkpoint
from .checks import check_networks, indexed
from .device import accelerator_on
from .folder import RunFolder
from .identity import identity_of
from .randomness import seeded
from .recipe import Condense, Recipe
from .summary import Summary

PREPARING = 2**32  # in the place of an epoch's number: the randomness before the first epoch


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    train: Dataset,
    test: Dataset,
    recipe: Recipe,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    progress: Callable[[dict], None] | None = None,
) -> Summary:
    """Trains the student, in place, as the recipe says, and validates it after every epoch.

    Args:
        student: any module, a batch of x -> logits (b, classes). All of it is trained in training mode, in whatever
            mode it comes (a part that must stay in evaluation mode overrides `train`), except parameters that require
            no gradient. Ends on the training device, in evaluation mode.
        teacher: the same, or None where the method asks no teacher. Never trained, always in evaluation mode; ends as
            the student does. It shares no parameters with the student.
        train, test: map-style data sets of `(x, label)`, labels int64 in [0, classes); an `IndexedDataset` is taken as
            it is, so that raw items can be mixed before they are transformed.
        recipe: every number of the run.
        output: a folder for config.json, metrics.jsonl and checkpoint/, written after every epoch, and
            student.safetensors (the last epoch's) and summary.json at the end. None: nothing is written.
        resume: goes on from the checkpoint in `output`, if there is one; on the CPU bit for bit as if it had never
            been interrupted. Recipe, teacher, data, precision and number of processes must be those it began with; the
            student's weights are the checkpoint's. A finished run returns at once.
        progress: called on the main process after every epoch with its line of metrics.jsonl.

    Several processes (`accelerate launch`, `torchrun`): every one calls `distill` with the same arguments; the first
    one writes. Every parameter of the student must then have a part in the loss, or require no gradient. Every batch is
    a step: gradients are not accumulated, whatever accelerate's configuration says.

    Python's, NumPy's and torch's generators and torch's settings are afterwards as they were before.

    Raises:
        TypeError, ValueError: an argument does not fit. What one sample shows is checked before anything is written.
        FileExistsError: `output` holds a run and `resume` is False, or files of something else.
        FloatingPointError: the loss or a weight is no longer finite; the last checkpoint is intact.
        OSError: a file cannot be written; those of the last epoch are intact.
    """
    method = methods.build(recipe.method, recipe.options)
    train, test = indexed("train", train), indexed("test", test)
    if teacher is None and method.needs_teacher:
        raise ValueError(f"teacher must be a torch.nn.Module: method {recipe.method!r} asks one, got None")
    with accelerator_on(recipe.device) as accelerator, seeded(recipe.seed, PREPARING, device=accelerator.device):
        classes = check_networks(student, teacher, train, test, accelerator.device)
        identity = identity_of(recipe, teacher, train, test, accelerator) if output is not None else {}
        folder = RunFolder(Path(output), identity, resume) if output is not None else None
        run = _Run(accelerator, student, teacher, method, train, test, recipe, classes)
        if folder is not None and folder.found is not None:
            run.restore(folder.found)
        accelerator.wait_for_everyone()  # all have looked into the folder before one writes there
        if folder is not None and accelerator.is_main_process:
            folder.begin()
        while run.epoch < recipe.epochs:
            line = run.advance()
            if accelerator.is_main_process:
                if folder is not None:
                    folder.keep(run.history, run.checkpoint(identity))
                if progress is not None:
                    progress(line)
        summary = run.summary()
        if folder is not None and accelerator.is_main_process:
            folder.finish(student, type(train.dataset).__name__, summary)
        accelerator.wait_for_everyone()
        return summary


class Step(nn.Module):
    """Student and method as one module, called once a step: several processes wrap it whole.

    A method that called the student inside a wrapper of the student's own would bypass the reduction of gradients. The
    teacher is handed in with each call, and so is neither trained nor wrapped nor saved.
    """

    def __init__(self, student: nn.Module, method: Method):
        super().__init__()
        self.student = student
        self.method = method

    def forward(self, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """The method's outcome of the batch."""
        return self.method(self.student, teacher, batch)


class _Batches:
    """A loader's batches by name, as often as one asks."""

    def __init__(self, loader: DataLoader):
        self.loader = loader

    def __iter__(self) -> Iterator[Batch]:
        return map(Batch._make, self.loader)


class _Run:
    """Everything that changes while a student is trained, an epoch at a time."""

    def __init__(
        self,
        accelerator: Accelerator,
        student: nn.Module,
        teacher: nn.Module | None,
        method: Method,
        train: IndexedDataset,
        test: IndexedDataset,
        recipe: Recipe,
        classes: int,
    ):
        self.accelerator = accelerator
        self.classes = classes
        self.recipe = recipe
        self.student = student
        self.teacher = teacher
        self.history: list[dict] = []

        device = accelerator.device
        # Without condensation the same condenser waits for an epoch that never comes: one order of samples for all.
        condense = recipe.condense or Condense(keep=1.0, every=recipe.epochs + 1)
        self.condenser = condense.build(len(train), seed=recipe.seed, device=device)
        # The sampler stays unsharded: accelerate shards its batches, and both together would lose samples.
        self.sampler = CondensedSampler(self.condenser, seed=recipe.seed)
        # Of several processes it fills up the last batches, so none is left with a single sample.
        cut = NoBatchOfOne if accelerator.num_processes == 1 else partial(BatchSampler, drop_last=False)
        options = {"num_workers": recipe.num_workers, "pin_memory": device.type == "cuda"}
        batch_sampler = cut(self.sampler, recipe.batch_size)
        self.loader = accelerator.prepare(DataLoader(train, batch_sampler=batch_sampler, **options))
        self.batches = _Batches(self.loader)
        self.test_loader = accelerator.prepare(DataLoader(test, batch_size=recipe.batch_size, **options))
        method.prepare(student.to(device), teacher, self.batches)
        self.module = Step(student, method).to(device)  # not the wrapped one: names in checkpoints stay the same
        # A method may keep the teacher, or a part of it, as a part of its own.
        untrained = set(map(id, teacher.parameters())) if teacher is not None else set()
        self.parameters = [p for p in self.module.parameters() if p.requires_grad and id(p) not in untrained]
        optimizer = torch.optim.SGD(
            self.parameters,
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        self.step, self.optimizer = accelerator.prepare(self.module, optimizer)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)

    def advance(self) -> dict:
        """Trains and validates one more epoch; its line of metrics."""
        epoch, device = self.epoch, self.accelerator.device
        before = self.history[-1] if self.history else {"sample_visits": 0, "teacher_visits": 0, "seconds": 0.0}
        # A function of the seed and the epoch: no generator needs to be saved. Ranks differ, as in dropout they should.
        with seeded(self.recipe.seed, epoch, self.accelerator.process_index, device=device):
            start = time.perf_counter()
            with _counted(self.teacher) as teacher_rows:
                samples, means = self._train(epoch)
            condensation = self.condenser.step()
            seconds = time.perf_counter() - start
            accuracy = accuracy_of(self.student, self.test_loader, self.accelerator)
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"the loss is not finite after epoch {epoch + 1} ({means['loss']}): a smaller lr than {self.recipe.lr}?"
            )
        if not torch.stack([parameter.isfinite().all() for parameter in self.parameters]).all():
            raise FloatingPointError(
                f"weights are not finite after epoch {epoch + 1}: a smaller lr than {self.recipe.lr}?"
            )
        line = {
            "epoch": epoch + 1,
            "lr": self.recipe.lr_at(epoch),
            **means,
            "accuracy": accuracy,
            "samples": samples,
            "sample_visits": before["sample_visits"] + samples,
            "teacher_visits": before["teacher_visits"] + sum(teacher_rows) * self.accelerator.num_processes,
            "seconds": round(before["seconds"] + seconds, 3),
            "non_finite": self.condenser.non_finite,
            "condensation": _describe(condensation, self.condenser, self.classes),
        }
        self.history.append(line)
        return line

    def _train(self, epoch: int) -> tuple[int, dict]:
        """Samples seen on all processes, and means of loss, accuracy and terms. Asks the device once, at the end."""
        self.step.train()
        if self.teacher is not None:
            self.teacher.eval()  # should the method keep it as a part of its own
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr_at(epoch)
        # On the prepared loader: it sets its sampler's epoch from its own count, which a resumed run does not share.
        self.loader.set_epoch(epoch)
        kept = len(self.sampler)
        visited, rows, totals, terms = 0, 0, torch.zeros((), device=self.accelerator.device), ()
        for number, batch in enumerate(self.batches):
            batch, own = self._without_repeats(batch, number, kept)
            outcome = self.step(self.teacher, batch)
            self.optimizer.zero_grad()
            self.accelerator.backward(outcome.loss)
            self.optimizer.step()
            self.condenser.update(batch.index, outcome.value)

            visited += own
            rows += len(batch.label)
            correct = 100 * (outcome.logits.argmax(-1) == batch.label).double().mean()
            terms = outcome.terms
            totals = totals + len(batch.label) * torch.stack([outcome.loss.detach(), correct, *terms.values()])
        totals = torch.cat([totals.new_tensor([visited, rows]), totals])
        samples, rows, *sums = self.accelerator.reduce(totals, "sum").tolist()
        loss, accuracy, *rest = (x / rows for x in sums)
        terms = {name: x if math.isfinite(x) else None for name, x in zip(terms, rest, strict=True)}  # JSON has no NaN
        return int(samples), {"loss": loss, "train_accuracy": accuracy, "terms": terms}

    def _without_repeats(self, batch: Batch, number: int, kept: int) -> tuple[Batch, int]:
        """Marks what accelerate repeats so that all processes have equally many full batches: index -1, no visit.

        It deals whole batches out in turn, so a row's place among the `kept` samples of the epoch is known. Returns the
        batch and how many of its rows are no repeats.
        """
        rows = len(batch.index)
        if self.accelerator.num_processes == 1:
            return batch, rows
        first = (number * self.accelerator.num_processes + self.accelerator.process_index) * self.recipe.batch_size
        place = torch.arange(first, first + rows, device=batch.index.device)
        return batch._replace(index=batch.index.where(place < kept, -1)), min(max(kept - first, 0), rows)

    def checkpoint(self, identity: dict) -> Checkpoint:
        """All of this that the next epoch needs."""
        return Checkpoint(
            epoch=self.epoch,
            model=self.module.state_dict(),
            training={"optimizer": self.optimizer.state_dict(), "condenser": self.condenser.state_dict()},
            run={**identity, "history": self.history},
        )

    def restore(self, found: Checkpoint) -> None:
        """Goes on from there. Raises ValueError where the networks or the condenser are others."""
        try:
            self.module.load_state_dict(found.model)
        except RuntimeError as error:
            raise ValueError(f"student is not the one of the checkpoint: {one_line(error)}") from error
        self.optimizer.load_state_dict(found.training["optimizer"])
        self.condenser.load_state_dict(found.training["condenser"])
        self.history = list(found.run["history"])

    def summary(self) -> Summary:
        """What the run came to so far."""
        accuracy = [line["accuracy"] for line in self.history]
        last = self.history[-1]
        return Summary(
            method=self.recipe.label,
            seed=self.recipe.seed,
            accuracy_last=accuracy[-1],
            accuracy_best=max(accuracy),
            sample_visits=last["sample_visits"],
            teacher_visits=last["teacher_visits"],
            seconds=last["seconds"],
            history=self.history,
            condenser=self.condenser,
        )


def accuracy_of(network: nn.Module, loader: Iterable, accelerator: Accelerator) -> float:
    """Percent of the samples of a prepared loader whose label has the highest logit, to four decimals.

    Leaves evaluation mode on. Raises ValueError for labels that are not one number a sample.
    """
    network.eval()
    correct = []
    with torch.no_grad():
        for x, label, _ in loader:
            predicted = network(x).argmax(-1)
            if label.shape != predicted.shape:
                raise ValueError(f"labels must have shape {tuple(predicted.shape)}, got {tuple(label.shape)}")
            correct.append(accelerator.gather_for_metrics(predicted == label))
    return round(100 * torch.cat(correct).double().mean().item(), 4)


@contextmanager
def _counted(network: nn.Module | None) -> Iterator[list[int]]:
    """The number of rows of every batch that the network is asked about inside."""
    rows: list[int] = []
    if network is None:
        yield rows
        return
    hook = network.register_forward_hook(lambda _module, _inputs, logits: rows.append(len(logits)))
    try:
        yield rows
    finally:
        hook.remove()


def _describe(condensation: Condensation | None, condenser: KnowledgeCondenser, classes: int) -> dict | None:
    """An E-step in numbers, with the histogram of the values of all samples visited so far.

    Its bins are the same at every stage, from 0 to the largest entropy there is; other values count in the outer ones.
    """
    if condensation is None:
        return None
    values, high = condenser.values[condenser.counts > 0].cpu().numpy(), math.log(max(classes, 2))
    counts, edges = np.histogram(values.clip(0, high), bins=40, range=(0, high))
    return {
        "stage": condensation.stage,
        "kept": len(condensation.kept),
        "dropped": len(condensation.dropped),
        "mixed": len(condensation.mixed),
        "values": {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()},
    }
