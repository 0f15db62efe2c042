"""The training loop: `distill` trains a method's own parts, then the student, and evaluates it after every epoch."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..randomness import seeded
from .diagnosis import check_answers, doubt_about, is_sound
from .distributed import accumulating, autocast, broadcast_buffers, optimizer_step, reshard, sum_over_ranks
from .phases import Phase
from .recipe import Recipe
from .run import Run, count_rows
from .setup import open_run
from .summary import Summary


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
    with open_run(student, teacher, train, test, recipe, output, resume) as run:
        run.report_outputs()
        measure_teacher(run)
        run.begin(about or {})
        for phase in run.phases:  # a method's own pretraining, then the student
            for epoch in phase.remaining_epochs():
                with seeded(recipe.seed, phase.stream + epoch, run.rank, device=run.device):
                    metrics = train_epoch(run, phase, epoch) | phase.end_epoch()
                    if phase.trains_student:
                        metrics["accuracy"], unsound = evaluate(run, run.student)
                        check_answers(run, unsound, epoch)
                line = run.save(phase, metrics)
                if progress is not None and run.is_main:
                    progress(line)
        return run.finish()


def train_epoch(run: Run, phase: Phase, epoch: int) -> dict[str, object]:
    """Train a phase's module for an epoch; return the learning rate and the means over all samples and processes."""
    phase.begin_epoch(epoch)
    with run.timed("seconds"), count_rows(run.student) as student_rows, count_rows(run.teacher) as teacher_rows:
        for batch, share, ends_step in run.batches(phase, epoch):
            with accumulating(run.accelerator, phase.step, ends_step):
                with autocast(run.accelerator):
                    outcome = phase.step(run.teacher, batch)
                loss = phase.record(batch, outcome)
                run.accelerator.backward(loss if share == 1 else loss * share)
            if ends_step:
                optimizer_step(run.accelerator, phase.optimizer, run.module)
        means = phase.means()  # waits for the device, as no step does
        broadcast_buffers(run.accelerator, run.module)
    run.count(student_rows, teacher_rows)
    return {phase.counter: epoch + 1, "lr": phase.lr} | means


def evaluate(run: Run, network: nn.Module, labels: list[Tensor] | None = None) -> tuple[float, int]:
    """Return a network's accuracy on the test set and how many samples' highest logit is not finite.

    The accuracy is in percent, to four decimals. A list `labels` gets the labels of this process. Leaves the network in
    evaluation mode. Raises ValueError for labels that are not one number a sample.
    """
    network.eval()
    counts = torch.zeros(3, dtype=torch.int64, device=run.device)
    with torch.no_grad():
        for batch in run.test_batches(run.rank, run.accelerator.num_processes):
            logits = network(batch.x)
            predicted = logits.argmax(-1)
            if batch.label.shape != predicted.shape:
                raise ValueError(f"labels must have shape {tuple(predicted.shape)}, got {tuple(batch.label.shape)}")
            own = batch.index >= 0  # the others are repeats
            counts += torch.stack([(predicted == batch.label) & own, own, ~is_sound(logits) & own]).sum(1)
            if labels is not None:
                labels.append(batch.label[own])
    correct, samples, unsound = sum_over_ranks(run.accelerator, counts)
    return round(100 * correct / samples, 4), int(unsound)


def measure_teacher(run: Run) -> None:
    """Measure the given teacher, unless a resumed run has done so; warn where it can teach little."""
    if "teacher" not in run.outputs or run.teacher_accuracy is not None:
        return
    networks = {name: output.network for name, output in run.outputs.items()}
    labels: list[Tensor] = []
    run.teacher_accuracy, _ = evaluate(run, networks["teacher"], labels)
    labels = torch.cat(labels)
    classes = labels[(labels >= 0) & (labels < run.classes)].bincount(minlength=run.classes)
    student = evaluate(run, networks["student"])[0] if not run.begun else None
    reshard(*networks.values())
    doubt = doubt_about(run.teacher_accuracy, student, sum_over_ranks(run.accelerator, classes))
    if doubt and run.is_main:
        warnings.warn(doubt, stacklevel=3)


distill.__doc__ = """Train the student, in place, as the recipe says, and validate it after every epoch.

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
