"""The training loop: train the method's own parts, then the student, and validate the student after every epoch."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..randomness import seeded
from .diagnosis import check_held_out_logits, has_finite_maximum, teacher_warning
from .distributed import autocast, broadcast_buffers, gradient_sync, reshard, sum_over_ranks
from .phases import Phase
from .recipe import Recipe
from .run import Run, count_rows
from .setup import open_run
from .step_reports import report_steps
from .summary import Summary


def train_run(run: Run, progress: Callable[[dict], None] | None) -> Summary:
    """Train a run to its last epoch and return its summary."""
    for phase in run.phases:  # the method's own pretraining, then the student
        for epoch in phase.upcoming_epochs():
            with seeded(run.recipe.seed, phase.seed_offset + epoch, run.rank, device=run.device):
                metrics = train_epoch(run, phase, epoch) | phase.end_epoch()
                if phase.trains_student:
                    with phase.validating(metrics):
                        metrics |= validate(run, epoch)
            line = run.save(phase, metrics)
            if progress is not None and run.is_main:
                progress(line)
    return run.finish()


def train_epoch(run: Run, phase: Phase, epoch: int) -> dict[str, object]:
    """Train a phase's module for an epoch. Return the learning rate and the means over all samples and ranks."""
    phase.begin_epoch(epoch)
    with run.timed("seconds"), count_rows(run.student) as student_rows, count_rows(run.teacher) as teacher_rows:
        for batch, share, ends_step in run.batches(phase, epoch):
            with gradient_sync(run.accelerator, phase.step, ends_step):
                with autocast(run.accelerator):
                    outcome = phase.step(run.teacher, batch)
                loss = phase.record(batch, outcome)
                run.accelerator.backward(loss if share == 1 else loss * share)
            if ends_step:
                phase.take_step()
        means = phase.means()  # waits for the device; steps never do
        broadcast_buffers(run.accelerator, run.module)
    run.add_rows(student_rows, teacher_rows)
    return {phase.epoch_key: epoch + 1, "lr": phase.lr} | means


def validate(run: Run, epoch: int) -> dict[str, float]:
    """Return the student's accuracy on the test set and, if there is one, on the validation set."""
    accuracies = {}
    for part, name in (("test", "accuracy"), ("val", "val_accuracy")):
        if part in run.held_out:
            accuracies[name], non_finite = evaluate(run, run.student, part)
            check_held_out_logits(run, part, non_finite, epoch)
    return accuracies


def evaluate(run: Run, network: nn.Module, part: str = "test", labels: list[Tensor] | None = None) -> tuple[float, int]:
    """Return a network's accuracy on a held-out set, and the number of samples whose highest logit is not finite.

    Args:
        run: The run.
        network: The network. It stays in evaluation mode.
        part: The set: `test` or `val`.
        labels: A list to which this rank's labels are appended.

    Returns:
        The accuracy in percent, rounded to four decimals, and the number of samples.

    Raises:
        ValueError: A batch's labels are not one number per sample.
    """
    network.eval()
    counts = torch.zeros(3, dtype=torch.int64, device=run.device)
    with torch.no_grad():
        for batch in run.eval_batches(part, run.rank, run.accelerator.num_processes):
            logits = network(batch.x)
            predicted = logits.argmax(-1)
            if batch.label.shape != predicted.shape:
                raise ValueError(
                    f"{part} labels must have shape {tuple(predicted.shape)}, got {tuple(batch.label.shape)}"
                )
            own = batch.index >= 0  # the others are padding repeats
            counts += torch.stack([(predicted == batch.label) & own, own, ~has_finite_maximum(logits) & own]).sum(1)
            if labels is not None:
                labels.append(batch.label[own])
    correct, samples, non_finite = sum_over_ranks(run.accelerator, counts)
    return round(100 * correct / samples, 4), int(non_finite)


def measure_teacher(run: Run) -> None:
    """Measure the given teacher, unless the run to resume did, and warn if it can teach little."""
    if "teacher" not in run.outputs or run.teacher_accuracy is not None:
        return
    networks = {name: output.network for name, output in run.outputs.items()}
    labels: list[Tensor] = []
    run.teacher_accuracy, _ = evaluate(run, networks["teacher"], labels=labels)
    labels = torch.cat(labels)
    classes = labels[(labels >= 0) & (labels < run.classes)].bincount(minlength=run.classes)
    student = evaluate(run, networks["student"])[0] if not run.has_metrics else None
    reshard(*networks.values())
    doubt = teacher_warning(run.teacher_accuracy, student, sum_over_ranks(run.accelerator, classes))
    if doubt and run.is_main:
        warnings.warn(doubt, stacklevel=3)  # the caller of distill


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    train: Dataset,
    test: Dataset,
    recipe: Recipe,
    *,
    val: Dataset | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    progress: Callable[[dict], None] | None = None,
    progress_every: int | None = None,
    about: Mapping[str, object] | None = None,
) -> Summary:
    """Train the student in place, as the recipe says, and validate it after every epoch.

    Before it writes anything, `distill` takes one training step on the first samples, in the precision of the run, and
    undoes it. So an argument that does not fit fails at once, in one line that names the student, the teacher or the
    method. The step also decides in which memory layout each network runs.

    **Your process.** Afterwards the generators of Python, NumPy and torch, and torch's settings, are as they were
    before. Your autocast, gradient and inference modes, default dtype and default device have no effect inside.

    **Several processes** (`torchrun`, `accelerate launch`). Every process calls `distill` with the same arguments; rank
    0 writes.

    - Each kept sample is visited once per epoch, by one rank. Up to one sample per rank is repeated, so that all ranks
      have the same number (`padding` in metrics.jsonl). The value table leaves these repeats out.
    - Every parameter of the student must take part in the loss or have `requires_grad=False`.
    - Buffers (running statistics) are each rank's own during an epoch, and rank 0's after it.

    Args:
        student: Any module that maps a batch of x to logits (b, classes).

            - *Modes.* All of it is trained in training mode, whatever its mode is now, except parameters with
              `requires_grad=False`. A part that must stay in evaluation mode overrides `train`. It ends in evaluation
              mode.
            - *Outputs.* If it gives more than logits, always or only in training mode, the logits in its output are
              used, with a `UserWarning`: the entry or attribute `logits` of a mapping, a named tuple or a transformers
              `ModelOutput`, or the first element of another tuple or list. A method that uses the full output in
              training mode gets it.
            - *Memory.* It ends on the training device, in its original memory layout. During training its convolutions
              are channels-last, unless it cannot run so. A student that `fully_shard` (FSDP) has sharded is trained
              sharded.
        teacher: A network as `student`, or None if the method needs no teacher. It is in evaluation mode, its
            parameters require no gradient during the run, and it ends as the student does. It must share no parameters
            with the student. Its accuracy on `test` is measured once, before training (`Summary.teacher_accuracy`).
        train: A map-style data set of `(x, label)`. Labels are int64 in [0, classes) and collate to (b,) or (b, 1).

            - *Any data set* is loaded item by item. The recipe's `num_workers` processes hold a copy of it for the
              whole run.
            - *An `IndexedDataset`* is used unchanged, so that raw items can be mixed before they are transformed. They
              must share one shape and dtype, unless `condense.epsilon` is 0.
            - *An `ImageSet`* (from `kcd_ext.data.images.load`, for example) is moved to the training device as a
              whole and needs no loader. Its images are mixed, cropped, flipped and normalised there, one batch at a time.
            - *`ImageFiles`* stay on disk and give the same result. `num_workers` processes decode and mix them; with 0, one
              per processor, at most 8.
        test: A data set as `train`. The student's accuracy on it is measured after every epoch.
        recipe: All numbers of the run.
        val: A data set as `train`, for validation: `val_accuracy` is measured after every epoch and chooses the best one.
            `keep_best` and `patience` need it, so that the test set chooses nothing. None: there is no validation set.
        output: The run folder. config.json is written before the first epoch, metrics.jsonl and checkpoint/ after every
            epoch, student.safetensors (the student that the run ends with) and summary.json at the end. All processes
            must see the same folder. None: nothing is written.
        resume: Resume from the checkpoint in `output`, if there is one. On the CPU the result is bit for bit that of an
            uninterrupted run. Recipe, teacher, data and precision must not change. The student's weights come from the
            checkpoint, and the same parameters must be trained. With another number of processes `batch_size` and
            `gradient_accumulation` may change too. A finished run returns at once.
        progress: Called on rank 0 after every epoch with its line of metrics.jsonl. After a pretraining epoch it gets
            the line of pretraining.jsonl, with "pretraining" instead of "epoch".
        progress_every: `progress` also gets a line after every so many optimizer steps, counted over all epochs: "step",
            "epoch" (or "pretraining"), "lr", and since the last such line of the epoch the mean "loss" and
            "samples_per_second" of all processes. Only these steps wait for the device. None: no such lines.
        about: JSON to store under "about" in config.json, for readers of the folder. A resumed run may change it. Its
            entry "dataset" names the data in summary.json.

    Returns:
        The accuracies, visits, times and history of the run.

    Raises:
        TypeError, ValueError: An argument does not fit, or the student, the teacher or the method fails in the first
            step. What this step shows is raised before anything is written.
        FileExistsError: `output` holds a run and `resume` is False, or it holds other files, or another process is
            running there.
        FloatingPointError: The loss, a weight or a sample is not finite. The last checkpoint is intact.
        OSError: A file cannot be written. Those of the last epoch are intact.

    Warns:
        UserWarning: Before training, if the teacher is hardly better on `test` than the most frequent class, or no
            better than the student already is. Its images are then probably normalised differently than in its training,
            or its classes are in another order.
    """
    with open_run(student, teacher, train, test, recipe, output, resume, val) as run:
        report_steps(run, progress, progress_every)
        run.warn_about_outputs()
        measure_teacher(run)
        run.start(about or {})
        return train_run(run, progress)
