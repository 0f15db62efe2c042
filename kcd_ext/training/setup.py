"""The start of a run: checks, its state, and the rehearsal. Nothing here writes a file."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from .. import methods
from ..condensation import KnowledgeCondenser
from ..data import IndexedDataset
from ..data.images import LabelledImages
from ..methods import Method
from ..module_state import Layout
from ..networks import forward_flops, hookable, logits_only, usual_modes
from ..randomness import seeded
from .batches import BatchSource, Samples, batch_source
from .checks import as_indexed, check_method, check_networks, check_storable, check_validation
from .distributed import Accelerator, accelerator_on, gather_labels, is_sharded, reshard
from .fingerprint import fingerprint
from .folder import RunFolder, recorded_samples
from .phases import PRETRAINING_SEED_OFFSET, PretrainingPhase, StudentPhase, StudentStep
from .recipe import PRECISIONS, Recipe
from .rehearsal import Rehearsal
from .run import Run

SETUP_SEED = PRETRAINING_SEED_OFFSET - 1  # used instead of an epoch; no epoch has this number


def check_run(
    student: nn.Module,
    teacher: nn.Module | None,
    train: Dataset,
    test: Dataset,
    recipe: Recipe,
    val: Dataset | None = None,
) -> None:
    """Check the arguments of `distill`, and raise the errors that it raises before it writes anything.

    Commands call it before long work, such as training the teacher. Nothing is compiled.
    """
    with open_run(student, teacher, train, test, replace(recipe, compile=False), None, False, val):
        pass


def build_method(recipe: Recipe) -> Method:
    """Return the recipe's method.

    Raises:
        TypeError, ValueError: The method or one of its options does not fit the recipe.
    """
    for option, field in (("batch_keep", "condense.batch_keep"), ("label_smoothing", "label_smoothing of the recipe")):
        if option in recipe.options:
            raise ValueError(f"options must not contain {option}, got {recipe.options[option]!r}: set {field} instead")
    keep, smoothing = recipe.condense.batch_keep, recipe.label_smoothing
    own = ({"batch_keep": keep} if keep < 1 else {}) | ({"label_smoothing": smoothing} if smoothing > 0 else {})
    if smoothing > 0 and methods.unknown_options(recipe.method, ["label_smoothing"])[0]:
        raise ValueError(
            f"label_smoothing={smoothing} has no effect with method {recipe.method!r}, which has no argument label_smoothing"
        )
    method = methods.build(recipe.method, {**recipe.options, **own})
    check_method(method, recipe)
    return method


@contextmanager
def open_run(*arguments: object) -> Iterator[Run]:
    """Yield a run, new or restored from its checkpoint. Restore the process and the networks afterwards.

    Takes the arguments of `distill` up to `resume`, then `val`, and raises the errors that it raises before it writes anything.
    """
    with ExitStack() as stack:
        yield _set_up(stack, *arguments)


def _set_up(
    stack: ExitStack,
    student: nn.Module,
    teacher: nn.Module | None,
    train: Dataset,
    test: Dataset,
    recipe: Recipe,
    output: str | Path | None,
    resume: bool,
    val: Dataset | None,
) -> Run:
    method = build_method(recipe)
    check_validation(recipe, val)
    dataset = type(getattr(train, "dataset", train)).__name__
    train, test = as_indexed("train", train), as_indexed("test", test)
    val = None if val is None else as_indexed("val", val)
    held_out = {"test": test} | ({} if val is None else {"val": val})
    if teacher is None and method.needs_teacher:
        raise ValueError(f"teacher must be a torch.nn.Module for method {recipe.method!r}, got None")
    given = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    stack.enter_context(usual_modes())
    outputs = {name: stack.enter_context(logits_only(name, network)) for name, network in given.items()}
    networks = {name: output.network for name, output in outputs.items()}
    layouts = {name: Layout(network) for name, network in given.items() if not is_sharded(network)}
    for layout in layouts.values():
        stack.callback(layout.restore)
    accelerator = stack.enter_context(accelerator_on(recipe.device, PRECISIONS[recipe.precision]))
    stack.enter_context(seeded(recipe.seed, SETUP_SEED, device=accelerator.device))
    classes = check_networks(networks["student"], networks.get("teacher"), train, held_out, accelerator.device)
    for hook in outputs.values():
        hook.restrict_to_found_modes()
    folder = None
    if output is not None:
        check_storable("student", student)
        recorded = recorded_samples(Path(output)) if resume else {}
        facts = fingerprint(recipe, teacher, train, test, accelerator, val, recorded)
        opened = RunFolder.locked(Path(output), facts, resume, accelerator.is_main_process)
        folder = stack.enter_context(opened)
    stack.callback(method.release)

    condenser, sources = _build_data(stack, recipe, train, held_out, accelerator)
    train_source = sources.pop("train")
    x = next(iter(train_source.eval_batches(1))).x
    countable = method.flops_known and not any(map(is_sharded, given.values()))
    flops = dict.fromkeys(("student", "teacher"))  # a teacher that the method makes stays None
    if countable:
        flops |= {name: forward_flops(network, x) for name, network in given.items()}
    method.prepare(student.to(accelerator.device), teacher, Samples(train_source, recipe.batch_size))
    method.to(accelerator.device)
    reshard(student, teacher)
    # Freeze the teacher only now: prepare() may have copied it for training, or made it a part of the method.
    stack.enter_context(_frozen(teacher))
    called_teacher = method.teacher_of(teacher)
    if called_teacher is teacher:
        called_teacher = networks.get("teacher")
    elif called_teacher is not None:
        if not is_sharded(called_teacher):
            layouts["teacher"] = Layout(called_teacher)
        called_teacher = hookable(called_teacher)

    run = Run(
        recipe=recipe,
        accelerator=accelerator,
        method=method,
        outputs=outputs,
        classes=classes,
        condenser=condenser,
        train_source=train_source,
        held_out=sources,
        folder=folder,
        dataset=dataset,
        teacher=called_teacher,
        module=StudentStep(student, method, networks["student"]),
        flops=flops,
    )
    for plan in method.pretraining():
        run.phases.append(PretrainingPhase(run, plan))
    run.phases.append(StudentPhase(run))
    # Convolutions run faster in channels-last, on CPUs as on tensor cores.
    rehearsal = Rehearsal(run)
    rehearsal.choose_layouts([*layouts.values()] if x.dim() == 4 else [])
    for hook in outputs.values():
        if not hook.acts_in:
            hook.remove()  # a hook would break torch.compile's graph
    if recipe.compile:
        _compile(run, rehearsal)
    for phase in run.phases:
        phase.prepare()
    if folder is not None:
        check_storable("method", method)
        _check_shared(folder, accelerator)
        if (found := folder.pop_checkpoint()) is not None:
            run.restore(found)
    return run


def _build_data(
    stack: ExitStack,
    recipe: Recipe,
    train: IndexedDataset | LabelledImages,
    held_out: Mapping[str, IndexedDataset | LabelledImages],
    accelerator: Accelerator,
) -> tuple[KnowledgeCondenser, dict[str, BatchSource]]:
    """Return the condenser of the training set, and the sources of all sets, which `stack` closes."""
    condense, device, workers = recipe.condense, accelerator.device, recipe.num_workers
    labels = None
    if condense.drops_samples and isinstance(train, LabelledImages):
        labels = train.labels
    elif condense.drops_samples and condense.min_per_class:  # load all items once
        with closing(batch_source(train, None, device, workers, name="train")) as source:
            batches = source.eval_batches(recipe.batch_size, accelerator.process_index, accelerator.num_processes)
            labels = gather_labels([(batch.index, batch.label) for batch in batches], len(train), accelerator)
    # Without condensation the condenser keeps all samples. So all runs of a seed begin with the same sample order.
    condenser = condense.build(len(train), seed=recipe.seed, device=device, epochs=recipe.epochs, labels=labels)
    if labels is not None:
        condenser.set_labels(labels)
    mixes = condense.drops_samples and condenser.config.get("epsilon", 0) > 0
    sources = {
        "train": batch_source(train, condenser, device, workers, name="train", mixes=mixes),
        **{part: batch_source(dataset, None, device, workers, name=part) for part, dataset in held_out.items()},
    }
    for source in sources.values():
        stack.callback(source.close)
    return condenser, sources


def _compile(run: Run, rehearsal: Rehearsal) -> None:
    # Dynamic from the start: otherwise the first two batch sizes decide what is compiled, and a resumed run sees others.
    run.module.callee = [torch.compile(run.student, dynamic=True)]
    if run.teacher is not None and run.method.compiles_teacher:
        run.teacher = torch.compile(run.teacher, dynamic=True)
    if run.accelerator.num_processes == 1:
        # Compile now, at the size of the first batch. With several ranks the wrapper splits the graph elsewhere, so this
        # would compile in vain.
        rehearsal.take_step(rehearsal.batch_size, validate=False)


def _check_shared(folder: RunFolder, accelerator: Accelerator) -> None:
    """Raise ValueError if the ranks found different checkpoints. Every rank must call this function."""
    epochs = accelerator.gather(torch.tensor([folder.epoch], device=accelerator.device)).tolist()
    if len(set(epochs)) > 1:
        raise ValueError(
            f"output {folder.path}: the processes found runs of {epochs} epochs there: all of them must see the same folder"
        )


@contextmanager
def _frozen(network: nn.Module | None) -> Iterator[None]:
    """Set `requires_grad` of all parameters to False inside the context."""
    frozen = [] if network is None else [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
