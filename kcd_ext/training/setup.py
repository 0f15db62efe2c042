"""Everything that comes before the first epoch and writes nothing: checks, the state of a run, a step that is undone."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from .. import methods
from ..condensation import KnowledgeCondenser
from ..data import IndexedDataset
from ..data.images import ImageSet
from ..methods import Method
from ..module_state import Layout
from ..networks import forward_flops, hookable, logits_alone, usual_modes
from ..randomness import seeded
from .batches import Feed, Samples, feed_of
from .checks import check_method, check_networks, check_storable, indexed
from .distributed import Accelerator, accelerator_on, is_sharded, labels_in, reshard
from .fingerprint import fingerprint
from .folder import RunFolder
from .phases import PRETRAINING_SEED_OFFSET, PretrainingPhase, StudentPhase, StudentStep
from .recipe import PRECISIONS, Recipe
from .rehearsal import Rehearsal
from .run import Run

SETUP_SEED = PRETRAINING_SEED_OFFSET - 1  # in the place of an epoch's number: before the first epoch


def check_run(student: nn.Module, teacher: nn.Module | None, train: Dataset, test: Dataset, recipe: Recipe) -> None:
    """Raise what `distill` raises with these arguments before it writes anything.

    For commands that do other work first, such as training the teacher. Nothing is compiled.
    """
    with open_run(student, teacher, train, test, replace(recipe, compile=False), None, False):
        pass


def build_method(recipe: Recipe) -> Method:
    """Return the recipe's method; raise TypeError or ValueError where it cannot serve the recipe."""
    keep = recipe.condense.batch_keep
    if "batch_keep" in recipe.options:
        raise ValueError(
            f"options must not hold batch_keep={recipe.options['batch_keep']!r}: it is condense.batch_keep"
        )
    method = methods.build(recipe.method, {**recipe.options, **({"batch_keep": keep} if keep < 1 else {})})
    check_method(method, recipe)
    return method


@contextmanager
def open_run(*arguments: object) -> Iterator[Run]:
    """Yield a run, at its start or restored from its checkpoint; afterwards the process and the networks are as before.

    Takes the arguments of `distill` up to `resume`, and raises what it raises before anything is written.
    """
    with ExitStack() as stack:
        yield _opened(stack, *arguments)


def _opened(
    stack: ExitStack,
    student: nn.Module,
    teacher: nn.Module | None,
    train: Dataset,
    test: Dataset,
    recipe: Recipe,
    output: str | Path | None,
    resume: bool,
) -> Run:
    method = build_method(recipe)
    dataset = type(getattr(train, "dataset", train)).__name__
    train, test = indexed("train", train), indexed("test", test)
    if teacher is None and method.needs_teacher:
        raise ValueError(f"teacher must be a torch.nn.Module: method {recipe.method!r} asks one, got None")
    given = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    stack.enter_context(usual_modes())
    outputs = {name: stack.enter_context(logits_alone(name, network)) for name, network in given.items()}
    networks = {name: output.network for name, output in outputs.items()}
    layouts = {name: Layout(network) for name, network in given.items() if not is_sharded(network)}
    for layout in layouts.values():
        stack.callback(layout.restore)
    accelerator = stack.enter_context(accelerator_on(recipe.device, PRECISIONS[recipe.precision]))
    stack.enter_context(seeded(recipe.seed, SETUP_SEED, device=accelerator.device))
    classes = check_networks(networks["student"], networks.get("teacher"), train, test, accelerator.device)
    for hook in outputs.values():
        hook.act_where_found()
    folder = None
    if output is not None:
        check_storable("student", student)
        facts = fingerprint(recipe, teacher, train, test, accelerator)
        opened = RunFolder.opened(Path(output), facts, resume, accelerator.is_main_process)
        folder = stack.enter_context(opened)
    stack.callback(method.release)

    condenser, feeds = _data(stack, recipe, train, test, accelerator)
    x = next(iter(feeds["train"].eval_batches(1))).x
    countable = method.flops_known and not any(map(is_sharded, given.values()))
    flops = dict.fromkeys(("student", "teacher"))  # a method may bring a teacher of its own
    if countable:
        flops |= {name: forward_flops(network, x) for name, network in given.items()}
    method.prepare(student.to(accelerator.device), teacher, Samples(feeds["train"], recipe.batch_size))
    method.to(accelerator.device)
    reshard(student, teacher)
    # Freeze the teacher only now: prepare() may have copied it for training, or made it a part of the method.
    stack.enter_context(_frozen(teacher))
    asked = method.teacher_of(teacher)
    if asked is teacher:
        asked = networks.get("teacher")
    elif asked is not None:
        if not is_sharded(asked):
            layouts["teacher"] = Layout(asked)
        asked = hookable(asked)

    run = Run(
        recipe=recipe,
        accelerator=accelerator,
        method=method,
        outputs=outputs,
        classes=classes,
        condenser=condenser,
        feed=feeds["train"],
        test_feed=feeds["test"],
        folder=folder,
        dataset=dataset,
        teacher=asked,
        module=StudentStep(student, method, networks["student"]),
        flops=flops,
    )
    for plan in method.pretraining():
        run.phases.append(PretrainingPhase(run, plan))
    run.phases.append(StudentPhase(run))
    # Convolutions run faster with a pixel's channels side by side, on CPUs as on tensor cores.
    rehearsal = Rehearsal(run)
    rehearsal.choose_layouts([*layouts.values()] if x.dim() == 4 else [])
    for hook in outputs.values():
        if not hook.acts_in:
            hook.remove()  # torch.compile would split a network there
    if recipe.compile:
        _compile(run, rehearsal)
    for phase in run.phases:
        phase.prepare()
    if folder is not None:
        check_storable("method", method)
        _check_all_see(folder, accelerator)
        if (found := folder.pop_checkpoint()) is not None:
            run.restore(found)
    return run


def _data(
    stack: ExitStack,
    recipe: Recipe,
    train: IndexedDataset | ImageSet,
    test: IndexedDataset | ImageSet,
    accelerator: Accelerator,
) -> tuple[KnowledgeCondenser, dict[str, Feed]]:
    """Return the condenser of the training set, and the feeds of both sets; `stack` closes these."""
    condense, device, workers = recipe.condense, accelerator.device, recipe.num_workers
    labels = None
    if condense.shrinks_the_set and isinstance(train, ImageSet):
        labels = train.labels
    elif condense.shrinks_the_set and condense.min_per_class:  # all items are loaded once
        with closing(feed_of(train, None, device, workers, name="train")) as feed:
            batches = feed.eval_batches(recipe.batch_size, accelerator.process_index, accelerator.num_processes)
            labels = labels_in([(batch.index, batch.label) for batch in batches], len(train), accelerator)
    # Without condensation the same condenser keeps everything: one order of samples for all.
    condenser = condense.build(len(train), seed=recipe.seed, device=device, epochs=recipe.epochs, labels=labels)
    if labels is not None:
        condenser.set_labels(labels)
    mixes = condense.shrinks_the_set and condenser.config.get("epsilon", 0) > 0
    feeds = {
        "train": feed_of(train, condenser, device, workers, name="train", mixes=mixes),
        "test": feed_of(test, None, device, workers, name="test"),
    }
    for feed in feeds.values():
        stack.callback(feed.close)
    return condenser, feeds


def _compile(run: Run, rehearsal: Rehearsal) -> None:
    # For batches of any size at once: else the first two sizes decide what is compiled, and a resumed run meets others.
    run.module.called = [torch.compile(run.student, dynamic=True)]
    if run.teacher is not None and run.method.compiles_teacher:
        run.teacher = torch.compile(run.teacher, dynamic=True)
    if run.accelerator.num_processes == 1:
        # Once more, at the size that is then trained with, for it is compiled for this size. Several processes compile
        # other parts of it, inside their wrapper.
        rehearsal.take(rehearsal.batch_size, tests=False)


def _check_all_see(folder: RunFolder, accelerator: Accelerator) -> None:
    """Raise ValueError where the processes have found different checkpoints. Every process must call it."""
    epochs = accelerator.gather(torch.tensor([folder.epoch], device=accelerator.device)).tolist()
    if len(set(epochs)) > 1:
        raise ValueError(
            f"output {folder.path}: the processes found runs of {epochs} epochs there: it must be a folder that all share"
        )


@contextmanager
def _frozen(network: nn.Module | None) -> Iterator[None]:
    """Let no parameter of the network require a gradient inside the context."""
    trained = [] if network is None else [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
