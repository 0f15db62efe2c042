"""The loop: student and teacher in, a distilled student and its summary out. The only place that knows accelerate."""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from .. import methods
from ..condensation import Condensation, CondensedSampler, KnowledgeCondenser
from ..data import IndexedDataset
from ..data.images import ImageSet
from ..methods import Batch, Method, Outcome, Pretraining
from ..networks import LogitsAlone, hookable, logits_alone, usual_modes
from ..registry import one_line
from . import sharding
from .batches import Samples, cut, feed_of
from .checkpoint import Checkpoint
from .checks import broken, check_method, check_networks, check_outcome, check_storable, indexed, is_sound
from .device import accelerator_on, autocast
from .flops import forward_flops
from .folder import RunFolder
from .identity import identity_of
from .layout import Layout
from .randomness import seeded
from .recipe import PRECISIONS, Recipe, passed
from .rehearsal import Rehearsal, rehearse
from .summary import Summary

PREPARING = 2**32  # in the place of an epoch's number: before the first epoch, and from here on pretraining's epochs
REHEARSAL = PREPARING - 1  # for the step that is undone
EVALUATED = 250  # samples of a batch without gradients, at least
NOTHING_YET = {"sample_visits": 0, "teacher_visits": 0, "flops": 0, "seconds": 0.0, "condensation_seconds": 0.0}


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
    about: Mapping[str, object] | None = None,
) -> Summary:
    """Trains the student, in place, as the recipe says, and validates it after every epoch.

    Args:
        student: any module, a batch of x -> logits (b, classes). All of it is trained in training mode, in whatever
            mode it comes (a part that must stay in evaluation mode overrides `train`), except parameters that require
            no gradient. Ends on the training device, in evaluation mode, its tensors in the memory layout in which they
            came; meanwhile those of its convolutions are channels-last, unless it cannot run so. One that `fully_shard`
            has cut into pieces (FSDP) is trained so. Where it gives more, in training mode or always, the logits in it
            are used, with a UserWarning: `logits` of a mapping, a named tuple or a `ModelOutput` of transformers, the
            first element of another tuple or list. A method that takes all of it in training mode gets all of it.
        teacher: the same, or None where the method asks no teacher. Never trained, its parameters require no gradient
            meanwhile, always in evaluation mode; ends as the student does. It shares no parameters with the student. Its
            accuracy on `test` is measured before training, once (`Summary.teacher_accuracy`).
        train, test: map-style data sets of `(x, label)`, labels int64 in [0, classes), which collate to (b,) or (b, 1);
            an `IndexedDataset` is taken as it is, so that raw items can be mixed before they are transformed: they must
            have one shape and dtype, unless `condense.epsilon` is 0. An `ImageSet` (of `kcd_ext.data.images.load`, say)
            is moved to the training device as a whole and needs no loader: mixed, cropped, flipped and normalised
            there, a batch at a time. Worker processes (`num_workers`) hold a copy of the data set from the beginning of
            the run to its end.
        recipe: every number of the run.
        output: a folder for config.json, metrics.jsonl and checkpoint/, written after every epoch, and
            student.safetensors (the last epoch's) and summary.json at the end. None: nothing is written. Several
            processes must all see the same folder.
        resume: goes on from the checkpoint in `output`, if there is one; on the CPU bit for bit as if it had never
            been interrupted. Recipe, teacher, data and precision must be those it began with; the student's weights
            are the checkpoint's, and the same of them must be trained. The number of processes may be another one, and
            then `batch_size` and `gradient_accumulation` too. A finished run returns at once.
        progress: called on the main process after every epoch with its line of metrics.jsonl, and after every epoch of
            a method's own pretraining with that of pretraining.jsonl, which has "pretraining" in place of "epoch".
        about: JSON that config.json holds under "about", for whoever reads the folder; a resumed run may change it. Its
            "dataset" names the data in summary.json.

    Several processes (`accelerate launch`, `torchrun`): every one calls `distill` with the same arguments; the first
    one writes. Every kept sample is visited once an epoch by one of them; up to one sample each is repeated so that all
    have equally many ("padding" in metrics.jsonl), and left out of the value table. Every parameter of the student must
    then have a part in the loss, or require no gradient. Running statistics (buffers) are each process's own during an
    epoch and the first one's after it.

    Warns (UserWarning) before training where the teacher is hardly better on `test` than the most frequent class, or no better
    than the student is already: then its images are normalised otherwise than those it was trained on, or its classes are in
    another order.

    Python's, NumPy's and torch's generators and torch's settings are afterwards as they were before. The caller's autocast,
    gradient and inference modes, default dtype and default device have no effect inside.

    Before anything is written, one training step is taken on the first samples, in the precision of the run, and undone.
    It also settles in which memory layout each network runs.

    Raises:
        TypeError, ValueError: an argument does not fit, or the student, the teacher or the method fails in that step.
            What it shows is found before anything is written.
        FileExistsError: `output` holds a run and `resume` is False, or files of something else, or another process is
            running there.
        FloatingPointError: the loss or a weight is no longer finite, or a sample is not; the last checkpoint is intact.
        OSError: a file cannot be written; those of the last epoch are intact.
    """
    with ExitStack() as stack:
        run, folder, identity = _opened_run(stack, student, teacher, train, test, recipe, output, resume)
        accelerator = run.accelerator
        run.report_outputs()
        run.measure_teacher()
        accelerator.wait_for_everyone()  # all have looked into the folder before one writes there
        writes = folder is not None and accelerator.is_main_process
        if writes and not run.finished:  # of a finished run everything stays as it was written
            folder.begin(recipe.label, about or {}, run.teacher_accuracy)
        while not run.finished:
            line = run.advance()
            checkpoint = run.checkpoint(identity) if folder is not None else None
            if writes:
                folder.keep(run.pretraining_history, run.history, checkpoint)
            if progress is not None and accelerator.is_main_process:
                progress(line)
        summary = run.summary()
        weights = sharding.whole(student.state_dict())
        if writes:
            folder.finish(weights, str((about or {}).get("dataset", _name_of(train))), summary)
        accelerator.wait_for_everyone()
        return summary


def check_run(student: nn.Module, teacher: nn.Module | None, train: Dataset, test: Dataset, recipe: Recipe) -> None:
    """Raise what `distill` raises with these arguments before it writes anything.

    For whoever has other work to do first, such as training the teacher. Nothing is compiled.
    """
    with ExitStack() as stack:
        _opened_run(stack, student, teacher, train, test, replace(recipe, compile=False), None, False)


def _opened_run(
    stack: ExitStack,
    student: nn.Module,
    teacher: nn.Module | None,
    train: Dataset,
    test: Dataset,
    recipe: Recipe,
    output: str | Path | None,
    resume: bool,
) -> tuple["_Run", RunFolder | None, dict]:
    """Everything that comes before the first epoch and writes nothing: the run, its folder, and what it resumes by."""
    method = build_method(recipe)
    train, test = indexed("train", train), indexed("test", test)
    if teacher is None and method.needs_teacher:
        raise ValueError(f"teacher must be a torch.nn.Module: method {recipe.method!r} asks one, got None")
    stack.enter_context(usual_modes())
    networks = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    outputs = {name: stack.enter_context(logits_alone(name, network)) for name, network in networks.items()}
    layouts = {name: Layout(network) for name, network in networks.items()}
    for layout in layouts.values():
        stack.callback(layout.restore)
    accelerator = stack.enter_context(accelerator_on(recipe.device, PRECISIONS[recipe.precision]))
    stack.enter_context(seeded(recipe.seed, PREPARING, device=accelerator.device))
    called = [outputs[name].network if name in outputs else None for name in ("student", "teacher")]
    classes = check_networks(*called, train, test, accelerator.device)
    for hook in outputs.values():
        hook.act_where_found()
    if output is not None:
        check_storable("student", student)
    identity = identity_of(recipe, teacher, train, test, accelerator) if output is not None else {}
    folder = None
    if output is not None:
        opened = RunFolder.opened(Path(output), identity, resume, accelerator.is_main_process)
        folder = stack.enter_context(opened)
    stack.callback(method.release)
    resumed = folder is not None and folder.epoch > 0
    run = _Run(accelerator, student, teacher, method, train, test, recipe, classes, outputs, layouts, resumed, stack)
    if folder is not None:
        check_storable("method", method)
        run.check_all_see(folder)
        if (found := folder.take()) is not None:
            run.restore(found)
    return run, folder, identity


def build_method(recipe: Recipe) -> Method:
    """The recipe's method; raises TypeError or ValueError where it cannot serve the recipe."""
    keep = recipe.condense.batch_keep
    if "batch_keep" in recipe.options:
        raise ValueError(
            f"options must not hold batch_keep={recipe.options['batch_keep']!r}: it is condense.batch_keep"
        )
    method = methods.build(recipe.method, {**recipe.options, **({"batch_keep": keep} if keep < 1 else {})})
    check_method(method, recipe)
    return method


class Step(nn.Module):
    """Student and method as one module, called once a step: several processes wrap it whole.

    A method that called the student inside a wrapper of the student's own would bypass the reduction of gradients. The
    teacher is handed in with each call, and so is neither trained nor wrapped nor saved.
    """

    def __init__(self, student: nn.Module, method: Method, called: nn.Module):
        super().__init__()
        self.student = student
        self.method = method
        self._called = [called]  # the student, or what was compiled of it; a list hides it, so it is saved once

    def forward(self, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """The method's outcome of the batch."""
        return self.method(self._called[0], teacher, batch)


class _PretrainingStep(nn.Module):
    """The part of a method that is trained first, and its loss, for several processes to wrap."""

    def __init__(self, plan: Pretraining):
        super().__init__()
        self.part = plan.part
        self._loss = plan.loss

    def forward(self, teacher: nn.Module | None, batch: Batch) -> Tensor:
        return self._loss(teacher, batch)


@dataclass(frozen=True)
class _Phase:
    """What is trained before the student: `plan`, from epoch `start` of pretraining on."""

    plan: Pretraining
    start: int
    step: nn.Module
    optimizer: torch.optim.Optimizer


class _Run:
    """Everything that changes while a student is trained, an epoch at a time."""

    def __init__(
        self,
        accelerator: Accelerator,
        student: nn.Module,
        teacher: nn.Module | None,
        method: Method,
        train: IndexedDataset | ImageSet,
        test: IndexedDataset | ImageSet,
        recipe: Recipe,
        classes: int,
        outputs: Mapping[str, LogitsAlone],
        layouts: Mapping[str, Layout],
        resumed: bool,
        stack: ExitStack,
    ):
        """`stack` ends with the run, and gives back what is taken here. `resumed`: a checkpoint's weights are to come.

        Raises what `Rehearsal.take` does.
        """
        self.accelerator = accelerator
        self.classes = classes
        self.recipe = recipe
        self.student = student
        self.method = method
        self.given_teacher = None if teacher is None else outputs["teacher"].network
        self.given_student = outputs["student"].network
        self.outputs = [*outputs.values()]
        self.teacher_accuracy: float | None = None
        self.history: list[dict] = []
        self.pretraining_history: list[dict] = []
        self._unsound = 0  # test samples of the last epoch whose logits are not finite

        device, ranks = accelerator.device, accelerator.num_processes
        # Without condensation the same condenser keeps everything: one order of samples for all.
        labels = self._labels_known_of(train)
        self.condenser = recipe.condense.build(
            len(train), seed=recipe.seed, device=device, epochs=recipe.epochs, labels=labels
        )
        if labels is not None:
            self.condenser.set_labels(labels)
        self.sampler = CondensedSampler(
            self.condenser, seed=recipe.seed, rank=accelerator.process_index, world_size=ranks
        )
        workers = recipe.num_workers
        mixes = recipe.condense.shrinks_the_set and self.condenser.config.get("epsilon", 0) > 0
        self.feed = feed_of(train, self.condenser, device, workers, name="train", mixes=mixes)
        self.test_feed = feed_of(test, None, device, workers, name="test")
        for feed in (self.feed, self.test_feed):
            stack.callback(feed.close)

        x = next(iter(self.feed.plain(1))).x
        self.flops = tuple(
            forward_flops(net, x) if net is not None and method.flops_known else None for net in (student, teacher)
        )
        method.prepare(student.to(device), teacher, Samples(self.feed, recipe.batch_size))
        method.to(device)
        for network in (student, teacher):
            if network is not None:
                sharding.reshard(network)
        # From here on, so that a copy that the method has made may be trained, and the teacher as a part of it is not.
        stack.enter_context(_frozen(teacher))
        given, teacher = teacher, method.teacher_of(teacher)
        self.asked = None  # the network that is called for the teacher's logits
        if teacher is not None:
            self.asked = outputs["teacher"].network if teacher is given else hookable(teacher)
            if teacher is not given:
                layouts = {**layouts, "teacher": Layout(teacher)}
        plans = method.pretraining()
        # For any size of a batch at once: else the first two sizes met decide what is compiled, and a run that goes on
        # meets others first.
        compiled = partial(torch.compile, dynamic=True) if recipe.compile else _as_it_is
        self.called = compiled(outputs["student"].network)
        self.teacher = self.asked if self.asked is None or not method.compiles_teacher else compiled(self.asked)
        self.module = Step(student, method, self.called)  # not the wrapped one: names in checkpoints stay the same
        # Convolutions run faster with a pixel's channels side by side, on CPUs as on tensor cores.
        self._rehearse(plans, layouts if x.dim() == 4 else {}, outputs, resumed)
        self.phases: list[_Phase] = []
        for plan in plans:
            plan.part.requires_grad_(True)
            prepared = self._prepared(_PretrainingStep(plan), [*plan.part.parameters()], plan.lr)
            self.phases.append(_Phase(plan, sum(phase.plan.epochs for phase in self.phases), *prepared))
            plan.part.requires_grad_(False)  # a constant for what is trained after it
        self.trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.parameters = [*self.trained.values()]
        self.step, self.optimizer = self._prepared(self.module, self.parameters, recipe.lr)

    def _rehearse(
        self,
        plans: Sequence[Pretraining],
        layouts: Mapping[str, Layout],
        outputs: Mapping[str, LogitsAlone],
        resumed: bool,
    ) -> None:
        """Chooses the layouts by a step that is undone."""
        student, ranks = outputs["student"].network, self.accelerator.num_processes
        rehearsal = Rehearsal(
            step=Step(self.student, self.method, student),
            student=student,
            teacher=self.asked,
            method=self.method,
            label=self.recipe.method,
            plans=plans,
            epochs=self.recipe.epochs,
            autocast=partial(autocast, self.accelerator),
            scaled=self.accelerator.scaler is not None,
            measure=self.condenser.measure,
            every_gradient=ranks > 1,
            fresh=not resumed,
        )

        first_of = cache(lambda feed, size: feed.first(size))

        def take(size: int, rehearsal: Rehearsal = rehearsal, tests: bool = True) -> None:
            with seeded(self.recipe.seed, REHEARSAL, device=self.accelerator.device):
                batch = self._weighed(first_of(self.feed, size))
                rehearsal.take(batch, first_of(self.test_feed, size) if tests else None)

        self.sampler.set_epoch(0, consumed=0)
        first = cut(len(self.sampler), self.recipe.batch_size * self.recipe.gradient_accumulation)[0]
        whole = cut(first.stop, self.recipe.batch_size)[0].stop  # the first batch of the run
        # What is in pieces is in no state for another attempt after one that failed.
        sizes = [whole] if sharding.is_sharded(self.student) else sorted({min(2, whole), whole})
        rehearse(take, sizes, [*layouts.values()], [*outputs.values()])
        for output in outputs.values():
            if not output.acts_in:
                output.remove()  # torch.compile would split a network there
        if self.recipe.compile and ranks == 1:
            # Once more what is compiled, at the size that is then trained with, for it is compiled for this size. Several
            # processes compile other parts of it, inside their wrapper.
            as_compiled = replace(
                rehearsal,
                step=Step(self.student, self.method, self.called),
                student=self.called,
                teacher=self.teacher,
            )
            take(whole, as_compiled, tests=False)

    def _weighed(self, batch: Batch) -> Batch:
        """With the weights that the condenser gives its samples in this epoch."""
        weight = self.condenser.sample_weight
        return batch if weight is None else _with_weight(batch, weight)

    def _labels_known_of(self, train: IndexedDataset | ImageSet) -> Tensor | np.ndarray | None:
        """The class of every sample, (N,) int64; None: nothing needs it, or the first epoch will show it.

        Where `min_per_class` asks for the labels of items, all of them are loaded once.
        """
        condense, ranks = self.recipe.condense, self.accelerator.num_processes
        if not condense.shrinks_the_set:
            return None
        if isinstance(train, ImageSet):
            return train.labels
        if not condense.min_per_class:
            return None
        feed = feed_of(train, None, self.accelerator.device, self.recipe.num_workers, name="train")
        try:
            batches = feed.plain(self.recipe.batch_size, self.accelerator.process_index, ranks)
            return self._labels_in([(batch.index, batch.label) for batch in batches], len(train))
        finally:
            feed.close()

    def _labels_in(self, seen: Iterable[tuple[Tensor, Tensor]], count: int) -> Tensor:
        """The class of each of `count` samples, (count,) int64 on the CPU, from what all processes have seen of them."""
        index, label = map(torch.cat, zip(*seen, strict=True))
        labels = torch.zeros(count, dtype=torch.int64, device=index.device)
        labels[index[index >= 0]] = label[index >= 0]
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(labels)  # every sample is on one process, the repeats left out
        return labels.cpu()

    def _prepared(
        self, module: nn.Module, parameters: list[nn.Parameter], lr: float
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The module wrapped for several processes (a sharded one reduces its gradients itself), and its optimizer."""
        recipe = self.recipe
        optimizer = torch.optim.SGD(parameters, lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        optimizer.zero_grad()  # what the caller's own training left behind
        # The optimizer stays as it is: accelerate's wrapper looks for packages on the disk at every step.
        if sharding.is_sharded(module):
            return module, optimizer
        prepared = self.accelerator.prepare(module)
        if isinstance(prepared, DistributedDataParallel):
            # Once an epoch is enough for running statistics; a method's memory banks would travel with every step.
            prepared.broadcast_buffers = False
        return prepared, optimizer

    @property
    def phase(self) -> _Phase | None:
        """What is trained next of all that comes before the student; None: nothing is left."""
        done = len(self.pretraining_history)
        return next((phase for phase in self.phases if done < phase.start + phase.plan.epochs), None)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.phase is None and len(self.history) >= self.recipe.epochs

    def advance(self) -> dict:
        """One more epoch, of pretraining or of the student; its line of metrics."""
        return self._advance_student() if self.phase is None else self._advance_pretraining(self.phase)

    def _before(self) -> dict:
        """The running sums so far."""
        return next((lines[-1] for lines in (self.history, self.pretraining_history) if lines), NOTHING_YET)

    def _advance_pretraining(self, phase: _Phase) -> dict:
        epoch, device, plan = len(self.pretraining_history), self.accelerator.device, phase.plan
        before = self._before()
        _set_lr(phase.optimizer, plan.lr * 0.1 ** passed(plan.milestones, epoch - phase.start, plan.epochs))
        if self.teacher is not None:
            self.teacher.eval()
        plan.part.requires_grad_(True).train()
        with seeded(self.recipe.seed, PREPARING + 1 + epoch, self.accelerator.process_index, device=device):
            start = time.perf_counter()
            total, rows = torch.zeros((), device=device), 0
            with _counted(self.teacher) as teacher_rows:
                for batch, share, closes in self._batches(PREPARING + 1 + epoch)[1]:
                    with self._gradients(phase.step, closes):
                        with autocast(self.accelerator):
                            loss = phase.step(self.teacher, batch)
                        self.accelerator.backward(loss if share == 1 else loss * share)
                    if closes:
                        self._descend(phase.optimizer)
                    total, rows = total + loss.detach() * len(batch.label), rows + len(batch.label)
            self._share_buffers()
            loss = self._sum([total])[0] / (rows * self.accelerator.num_processes)
            seconds = time.perf_counter() - start
        plan.part.requires_grad_(False).eval()
        self._check_finite(loss, list(plan.part.parameters()), f"pretraining epoch {epoch + 1}", plan.lr)
        asked = sum(teacher_rows) * self.accelerator.num_processes
        line = {
            "pretraining": epoch + 1,
            "lr": phase.optimizer.param_groups[0]["lr"],
            "loss": loss,
            "sample_visits": before["sample_visits"],
            "teacher_visits": before["teacher_visits"] + asked,
            "flops": _added(before["flops"], (self.flops[1], asked)),
            "seconds": round(before["seconds"] + seconds, 3),
            "condensation_seconds": before["condensation_seconds"],
        }
        self.pretraining_history.append(line)
        return line

    def _advance_student(self) -> dict:
        epoch, device, ranks = len(self.history), self.accelerator.device, self.accelerator.num_processes
        before = self._before()
        self.method.begin(epoch, self.recipe.epochs)
        # A function of the seed and the epoch: no generator needs to be saved. Ranks differ, as in dropout they should.
        with seeded(self.recipe.seed, epoch, self.accelerator.process_index, device=device):
            start = time.perf_counter()
            with _counted(self.called) as student_rows, _counted(self.teacher) as teacher_rows:
                samples, padding, means, visits, seen, ordering = self._train(epoch)
            condensing = time.perf_counter()
            # A whole epoch's visits at once: a few operations on long tensors instead of many on short ones.
            self.condenser.update(*map(torch.cat, zip(*visits, strict=True)))
            if seen:
                labels = self._labels_in(seen, self.condenser.num_samples)
                if labels.min() >= 0:  # negative ones are no classes
                    self.condenser.set_labels(labels)
            condensation = self.condenser.step()
            end = time.perf_counter()
            self._share_buffers()
            accuracy = self._accuracy()
        self._check_finite(means["loss"], self.parameters, f"epoch {epoch + 1}", self.recipe.lr)
        self._check_answers(f"epoch {epoch + 1}")
        shown, asked = ranks * sum(student_rows), ranks * sum(teacher_rows)
        trained = None if self.flops[0] is None else 3 * self.flops[0]
        line = {
            "epoch": epoch + 1,
            "lr": self._lr_at(epoch),
            **means,
            "accuracy": accuracy,
            "samples": samples,
            "padding": padding,
            "sample_visits": before["sample_visits"] + samples,
            "teacher_visits": before["teacher_visits"] + asked,
            "flops": _added(before["flops"], (trained, shown), (self.flops[1], asked)),
            "seconds": round(before["seconds"] + end - start, 3),
            "condensation_seconds": round(before["condensation_seconds"] + end - condensing + ordering, 4),
            "non_finite": self.condenser.non_finite,
            "condensation": _describe(condensation, self.condenser, self.classes),
        }
        self.history.append(line)
        return line

    def _lr_at(self, epoch: int) -> float:
        """By the method's own schedule, if it has one, else by the recipe's milestones."""
        factor = self.method.lr_factor(epoch, self.recipe.epochs)
        return self.recipe.lr_at(epoch) if factor is None else self.recipe.lr * factor

    def _batches(self, epoch: int) -> tuple[float, Iterator[tuple[Batch, float, bool]]]:
        """Seconds that the order took, and the epoch's batches: each with its share in its step, and whether it ends one.

        A step is the mean over all its samples, however they were cut into batches.
        """
        start = time.perf_counter()
        self.sampler.set_epoch(epoch, consumed=0)
        entries = self.feed.entries(self.sampler)
        ordering = time.perf_counter() - start
        size, batches, shares, closes = self.recipe.batch_size, [], [], []
        for step in cut(len(self.sampler), size * self.recipe.gradient_accumulation):
            count = step.stop - step.start
            parts = cut(count, size)
            batches += [slice(step.start + part.start, step.start + part.stop) for part in parts]
            shares += [(part.stop - part.start) / count for part in parts]
            closes += [part is parts[-1] for part in parts]
        return ordering, zip(self.feed.epoch(entries, batches, self.recipe.seed, epoch), shares, closes, strict=True)

    def _train(
        self, epoch: int
    ) -> tuple[int, int, dict, list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]], float]:
        """An epoch: samples seen and repeats that padded on all processes, means of loss, accuracy and terms, what the
        condenser is to be told, labels by index that it has still to learn, and the seconds that the order took. Asks the
        device once, at the end."""
        self.step.train()
        for phase in self.phases:
            phase.plan.part.eval()
        if self.teacher is not None:
            self.teacher.eval()  # should the method keep it as a part of its own
        _set_lr(self.optimizer, self._lr_at(epoch))
        weight = self.condenser.sample_weight
        ordering, batches = self._batches(epoch)
        # Of items that are loaded one by one: in the first epoch all of them are seen.
        collects = self.recipe.condense.shrinks_the_set and self.condenser.labels is None and epoch == 0
        seen = []
        visits, rows, totals, terms = [], 0, torch.zeros((), device=self.accelerator.device), ()
        for batch, share, closes in batches:
            if weight is not None:
                batch = _with_weight(batch, weight)
            with self._gradients(self.step, closes):
                with autocast(self.accelerator):
                    outcome = self.step(self.teacher, batch)
                if not visits:
                    check_outcome(outcome, batch, self.condenser.measure, self.recipe.method)
                self.accelerator.backward(outcome.loss if share == 1 else outcome.loss * share)
            if closes:
                self._descend(self.optimizer)
            rows += len(batch.label)
            correct = 100 * (outcome.logits.argmax(-1) == batch.label).double().mean()
            if visits and outcome.terms.keys() != terms.keys():
                raise ValueError(
                    f"method {self.recipe.method!r} must give the terms {[*terms]}, got {[*outcome.terms]}"
                )
            visits.append((batch.index, getattr(outcome, self.condenser.measure)))
            if collects:
                seen.append((batch.index, batch.label))
            terms = outcome.terms
            totals = totals + len(batch.label) * torch.stack([outcome.loss.detach(), correct, *terms.values()])
        padding = self.sampler.padding
        rows, padding, *sums = self._sum([rows, padding, *totals])
        loss, accuracy, *rest = (x / rows for x in sums)
        terms = {name: x if math.isfinite(x) else None for name, x in zip(terms, rest, strict=True)}  # JSON has no NaN
        means = {"loss": loss, "train_accuracy": accuracy, "terms": terms}
        return int(rows - padding), int(padding), means, visits, seen, ordering

    @contextmanager
    def _gradients(self, module: nn.Module, closes: bool) -> Iterator[None]:
        """Inside, gradients are reduced over the processes only where a step ends."""
        waits = not closes and self.accelerator.num_processes > 1 and not sharding.is_sharded(module)
        with self.accelerator.no_sync(module) if waits else nullcontext():
            yield

    def _descend(self, optimizer: torch.optim.Optimizer) -> None:
        if self.accelerator.num_processes > 1 and sharding.is_sharded(self.module):
            sharding.average_gradients([p for group in optimizer.param_groups for p in group["params"]])
        if self.accelerator.scaler is None:
            optimizer.step()
        else:  # of float16: leaves out a step whose gradients overflowed
            self.accelerator.scaler.step(optimizer)
            self.accelerator.scaler.update()
        optimizer.zero_grad()

    def _sum(self, numbers: Iterable[Tensor | float]) -> list[float]:
        """Over all processes, in float64."""
        device = self.accelerator.device
        numbers = torch.stack([torch.as_tensor(n, dtype=torch.float64, device=device) for n in numbers])
        return self.accelerator.reduce(numbers, "sum").tolist()

    def _check_finite(self, loss: float, parameters: list[nn.Parameter], when: str, lr: float) -> None:
        """Raises FloatingPointError, with the cause, where the loss or a parameter is not finite."""
        what = f"the loss is not finite after {when} ({loss})"
        if math.isfinite(loss):
            found = torch.stack([~sharding.local(parameter).isfinite().all() for parameter in parameters]).any()
            if not self._sum([found])[0]:
                return
            what = f"weights are not finite after {when}"
        trained, asked = {*map(id, parameters)}, {}
        if self.asked is not None and trained.isdisjoint(map(id, self.asked.parameters())):
            asked = {"teacher": self.asked}  # no answer for what has just made it so
        cause = broken("train", self.feed.plain(self.recipe.batch_size), asked)
        raise FloatingPointError(f"{what}: {cause or f'a smaller lr than {lr}?'}")

    def _share_buffers(self) -> None:
        """The first process's running statistics for all: they are validated and saved, and a resumed run has them."""
        if self.accelerator.num_processes > 1:
            for buffer in self.module.buffers():
                if sharding.local(buffer) is buffer:
                    torch.distributed.broadcast(buffer, src=0)

    def _accuracy(self) -> float:
        return accuracy_of(self.called, self._test_batches(), self._sum, self._note_unsound)

    def _test_batches(self) -> Iterator[Batch]:
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        return self.test_feed.plain(max(EVALUATED, self.recipe.batch_size), rank, ranks)

    def report_outputs(self) -> None:
        """Warn of what networks give beside their logits."""
        if self.accelerator.is_main_process:
            for output in self.outputs:
                output.report()

    def measure_teacher(self) -> None:
        """Measures the teacher as it was given, unless that is done, and warns where it can teach little.

        Every process must call it.
        """
        if self.given_teacher is None or self.teacher_accuracy is not None:
            return
        labels = torch.zeros(self.classes, dtype=torch.int64, device=self.accelerator.device)
        accuracy = accuracy_of(self.given_teacher, _counting(self._test_batches(), labels), self._sum)
        counts = self._sum(labels)
        self.teacher_accuracy = accuracy
        student = None
        if not self.history and not self.pretraining_history:
            student = accuracy_of(self.given_student, self._test_batches(), self._sum)
        for network in (self.given_student, self.given_teacher):
            sharding.reshard(network)
        doubt = doubt_about(accuracy, student, counts)
        if doubt and self.accelerator.is_main_process:
            warnings.warn(doubt, stacklevel=3)

    def _note_unsound(self, count: int) -> None:
        self._unsound = count

    def _check_answers(self, when: str) -> None:
        """Raises FloatingPointError where a test sample is not finite; warns where only the student's answer is not."""
        count, self._unsound = self._unsound, 0
        if not count:
            return
        size = max(EVALUATED, self.recipe.batch_size)
        if (cause := broken("test", self.test_feed.plain(size), {})) is not None:
            raise FloatingPointError(f"the accuracy after {when} means nothing: {cause}")
        cause = broken(
            "test", self.test_feed.plain(size), {"student": self.called}
        )  # every process: it can be in pieces
        if self.accelerator.is_main_process:
            warnings.warn(
                f"after {when} {count} test samples have no finite logits: {cause}", RuntimeWarning, stacklevel=3
            )

    def checkpoint(self, identity: dict) -> Checkpoint:
        """All of this that the next epoch needs. With a sharded student every process must call it."""
        optimizer = self.optimizer if self.phase is None else self.phase.optimizer
        scaler = self.accelerator.scaler
        return Checkpoint(
            epoch=len(self.pretraining_history) + len(self.history),
            model=sharding.whole(self.module.state_dict()),
            training={
                "optimizer": _complete(sharding.whole(optimizer.state_dict())),
                "scaler": {} if scaler is None else scaler.state_dict(),
                "condenser": self.condenser.state_dict(),
                "trained": [*self.trained],
            },
            run={
                **identity,
                "teacher_accuracy": self.teacher_accuracy,
                "threads": torch.get_num_threads(),
                "pretraining": self.pretraining_history,
                "history": self.history,
            },
        )

    def check_all_see(self, folder: RunFolder) -> None:
        """Raises ValueError where the processes have found different checkpoints. Every process must call it."""
        epoch = torch.tensor([folder.epoch], device=self.accelerator.device)
        epochs = self.accelerator.gather(epoch).tolist()
        if len(set(epochs)) > 1:
            raise ValueError(
                f"output {folder.path}: the processes found runs of {epochs} epochs there: it must be a folder that all share"
            )

    def restore(self, found: Checkpoint) -> None:
        """Go on from there.

        Raises ValueError where the networks or the condenser are others, or an entry is missing or of another kind.

        Warns:
            RuntimeWarning: on the CPU, where torch has another number of threads than before.
        """
        _check_same_parts(found, self.module.state_dict())
        for name in sorted({*found.training["trained"]} ^ self.trained.keys()):
            now, then = ("is", "was not") if name in self.trained else ("is not", "was")
            raise ValueError(f"{name} {now} to be trained, but {then} before: requires_grad must be as it was")
        history, pretraining = list(found.run["history"]), list(found.run["pretraining"])
        planned = sum(phase.plan.epochs for phase in self.phases)
        if len(history) > self.recipe.epochs or len(pretraining) > planned or (history and len(pretraining) < planned):
            epochs = f"{len(pretraining)} epochs of pretraining and {len(history)} of training"
            raise found.damage("run.json", f"it has {epochs} of {planned} and {self.recipe.epochs}")
        self.history, self.pretraining_history = history, pretraining
        self.teacher_accuracy = found.run["teacher_accuracy"]
        optimizer = self.optimizer if self.phase is None else self.phase.optimizer
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        momenta = found.momenta(held)
        scaler, scale = self.accelerator.scaler, found.training["scaler"]
        if scaler is not None and scale and not _is_of_scaler(scale, scaler.state_dict()):
            raise found.damage("training.pt", f"scaler must hold finite numbers {[*scaler.state_dict()]}")
        state = found.training["condenser"]
        done = state.get("epoch")
        if type(done) is not int or done != len(history):
            got = done if isinstance(done, int) else type(done).__name__
            raise found.damage("training.pt", f"condenser.epoch must be {len(history)}, got {got}")
        try:
            self.condenser.load_state_dict(state)
        except (TypeError, ValueError, LookupError, RuntimeError) as error:  # one of the user's own can raise anything
            raise found.damage("training.pt", f"condenser: {one_line(error)}") from error
        self.module.load_state_dict(sharding.in_pieces_of(self.module.state_dict(), found.model))
        pieces = {i: {"momentum_buffer": sharding.pieces_as(held[i], buffer)} for i, buffer in momenta.items()}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": pieces})
        if scaler is not None and scale:
            scaler.load_state_dict(scale)
        threads = torch.get_num_threads()
        on_cpu = self.accelerator.device.type == "cpu"
        if on_cpu and not self.finished and found.run["threads"] != threads:
            warnings.warn(
                f"{found.source} was written with {found.run['threads']} threads of torch, this process has {threads}: "
                "the run goes on, but not bit for bit as it would have with as many",
                RuntimeWarning,
                stacklevel=3,
            )

    def summary(self) -> Summary:
        """What the run came to so far."""
        accuracy = [line["accuracy"] for line in self.history]
        last = self.history[-1]
        return Summary(
            method=self.recipe.label,
            seed=self.recipe.seed,
            accuracy_last=accuracy[-1],
            accuracy_best=max(accuracy),
            **{name: last[name] for name in NOTHING_YET},
            teacher_accuracy=self.teacher_accuracy,
            history=self.history,
            condenser=self.condenser,
        )


def accuracy_of(
    network: nn.Module,
    batches: Iterable[Batch],
    summed: Callable[[list], list[float]],
    unsound: Callable[[int], None] = lambda count: None,
) -> float:
    """Percent of the samples whose label has the highest logit, to four decimals; repeats (index -1) do not count.

    `summed` adds numbers over all processes. `unsound` is called with the number of samples whose highest logit is not
    finite, if there are any. Leaves evaluation mode on. Raises ValueError for labels that are not one number a sample.
    """
    network.eval()
    correct, count, broken_ones = [], [], []
    with torch.no_grad():
        for batch in batches:
            logits = network(batch.x)
            predicted = logits.argmax(-1)
            if batch.label.shape != predicted.shape:
                raise ValueError(f"labels must have shape {tuple(predicted.shape)}, got {tuple(batch.label.shape)}")
            own = batch.index >= 0
            correct.append(((predicted == batch.label) & own).sum())
            count.append(own.sum())
            broken_ones.append((~is_sound(logits) & own).sum())
    right, all_of_them, number = summed([torch.stack(part).sum() for part in (correct, count, broken_ones)])
    if number:
        unsound(int(number))
    return round(100 * right / all_of_them, 4)


def _counting(batches: Iterable[Batch], counts: Tensor) -> Iterator[Batch]:
    """The same batches; `counts` (classes,) int64 is raised by the labels of those that were used, repeats left out."""
    for batch in batches:
        yield batch
        labels = batch.label[batch.index >= 0]
        counts += labels[(labels >= 0) & (labels < len(counts))].bincount(minlength=len(counts))


def doubt_about(teacher: float, student: float | None, labels: Sequence[float]) -> str:
    """Why a teacher can teach little, in one line; empty where nothing says so.

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


@contextmanager
def _frozen(network: nn.Module | None) -> Iterator[None]:
    """Inside, its parameters require no gradient: neither where a method keeps it as a part of its own."""
    trained = [] if network is None else [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _check_same_parts(found: Checkpoint, here: Mapping[str, Tensor]) -> None:
    """Raises ValueError, naming the first difference, where a checkpoint is of another student or method."""
    for name in [*here, *sorted(found.model)]:
        shapes = [tuple(state[name].shape) if name in state else None for state in (found.model, here)]
        if shapes[0] != shapes[1]:
            was, is_ = ("missing" if shape is None else f"of shape {shape}" for shape in shapes)
            raise ValueError(f"student is not the one of the checkpoint: {name} is {was} there, {is_} here")
        if found.model[name].dtype != here[name].dtype:
            dtypes = f"{found.model[name].dtype} there, {here[name].dtype} here"
            raise ValueError(f"student is not the one of the checkpoint: {name} is {dtypes}")


def _complete(state: dict) -> dict:
    """An optimizer's state_dict with an entry for every parameter: one that got no gradient yet has no momentum."""
    count = sum(len(group["params"]) for group in state["param_groups"])
    without = {"momentum_buffer": None}
    return {**state, "state": {position: state["state"].get(position) or without for position in range(count)}}


def _is_of_scaler(state: Mapping[str, object], own: Mapping[str, object]) -> bool:
    numbers = [value for value in state.values() if type(value) in (int, float) and 0 <= value < math.inf]
    return state.keys() == own.keys() and len(numbers) == len(state)


def _as_it_is(network: nn.Module) -> nn.Module:
    return network


def _with_weight(batch: Batch, weight: Tensor) -> Batch:
    return batch._replace(weight=weight[batch.index].where(batch.index >= 0, 1))


@contextmanager
def _counted(network: nn.Module | None) -> Iterator[list[int]]:
    """The number of rows of every batch that the network is asked about inside."""
    rows: list[int] = []
    if network is None:
        yield rows
        return
    hook = network.register_forward_hook(
        lambda _module, inputs, given: rows.append(len(given if isinstance(given, Tensor) else inputs[0]))
    )
    try:
        yield rows
    finally:
        hook.remove()


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _added(before: int | None, *costs: tuple[int | None, int]) -> int | None:
    """`before` and so many rows at so much each; None where a cost that is needed is not known."""
    if before is None or any(cost is None and rows for cost, rows in costs):
        return None
    return before + sum(cost * rows for cost, rows in costs if rows)


def _name_of(dataset: IndexedDataset | ImageSet) -> str:
    return type(getattr(dataset, "dataset", dataset)).__name__


def _describe(condensation: Condensation | None, condenser: KnowledgeCondenser, classes: int) -> dict | None:
    """An E-step in numbers, with the samples kept of every class and the histogram of all knowledge values so far.

    Its bins are the same at every stage, from 0 to the largest entropy there is; other values count in the outer ones.
    Where samples are selected by something else there is none.
    """
    if condensation is None:
        return None
    histogram = None
    if condenser.measure == "value":
        values, high = condenser.values[condenser.counts > 0].cpu().numpy(), math.log(max(classes, 2))
        counts, edges = np.histogram(values.clip(0, high), bins=40, range=(0, high))
        histogram = {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()}
    per_class = condenser.kept_per_class
    if per_class is not None:
        per_class = [*per_class.tolist(), *[0] * (classes - len(per_class))]
    return {
        "stage": condensation.stage,
        "kept": len(condensation.kept),
        "dropped": len(condensation.dropped),
        "mixed": len(condensation.mixed),
        "classes": per_class,
        "values": histogram,
    }
