"""The `kcd evaluate` command: compare finished students with their teachers on test images."""

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, TypeVar

import torch
from torch import nn
from tyro.conf import Positional, arg

from .. import files, terminal
from ..checks import check_int
from ..data.images import ImageData, load
from ..describe import one_line
from ..environment import MAX_THREADS, threads, versions
from ..evaluation import TEMPERATURES, Evaluation, check_temperatures, evaluate
from ..models.weights import load_weights
from ..reports import page, runs, tables
from ..reports.comparison import compare
from ..reports.tables import as_text
from ..students import WEIGHTS, check_weights
from ..training.batches import batch_source
from ..training.distributed import accelerator_on
from ..training.fingerprint import digest, digest_of_samples
from ..training.run import MIN_EVAL_BATCH_SIZE
from . import teachers
from .progress import note, reading_bar
from .study import REPORT_FILES
from .teachers import Teacher
from .threads import Threads, announcement, batch_flops, threads_for

Result = TypeVar("Result")

SEED = 0  # for initial weights, which the stored ones replace
# Raised for a run that cannot be evaluated.
EVALUATION_ERRORS = (TypeError, ValueError, RuntimeError, ImportError, OSError)


@dataclass(frozen=True)
class Evaluate:
    """Measure how well finished students match their teachers, on the test images of each run.

    The command measures how often student and teacher agree, how far their probabilities and features differ, how well
    both are calibrated, and which classes lost accuracy. It writes evaluation.json into every run folder and updates the
    reports.
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]")]
    """Run folders of kcd distill, kcd teacher or kcd demo, or a folder of run folders."""
    teacher: str | None = None
    """A finished run's folder or a weights file. None: the teacher that the run was distilled from."""
    teacher_network: str | None = None
    """The network of the weights in --teacher. None: the one named in its folder, else that of the run's own teacher."""
    temperatures: tuple[float, ...] = TEMPERATURES
    """Temperatures at which probabilities are compared, in [0.001, 1000]."""
    layers: Annotated[
        tuple[str, ...],
        arg(
            metavar="[STUDENT=TEACHER ...]",
            help="Pairs of layers whose outputs are compared. A layer is a module path, penultimate (the input of the last linear "
            "layer) or logits. Default: the stages of both networks, paired from the last one backwards, then penultimate and "
            "logits.",
        ),
    ] = ()
    device: str = "auto"
    """auto (CUDA if available), cpu or cuda."""
    threads: int | None = None
    """Torch's CPU threads. None: one for every 16 GFLOPs of a batch."""

    def run(self) -> None:
        """Check everything, evaluate, write the results and print a table.

        A run in a folder of runs is skipped if it cannot be evaluated. Networks and data that config.json names as
        `module:function` are imported, as in `kcd distill`.

        Raises:
            TypeError, ValueError: an option is invalid, a run given by its own path cannot be evaluated, no run in a folder
                can, or a file that a report needs is damaged; nothing has been written.
            FileExistsError: another command is running in a folder.
            OSError: a file cannot be read or written.
        """
        layers = self._layers()
        run_dirs = list({folder.resolve(): folder for path in self.runs for folder in runs.find(path)}.values())
        report_dirs = self._report_dirs(run_dirs)
        skipped: list[str] = []
        with ExitStack() as stack:
            for folder in report_dirs:
                stack.enter_context(files.folder_lock(folder))
            load_once, find_once = (
                cache(partial(load, progress=reading_bar)),
                cache(teachers.find),
            )  # runs with several seeds share both
            plans = self._attempt(run_dirs, lambda folder: self._plan(folder, load_once, find_once), skipped)
            report_dirs = _check_reports(report_dirs, plans)
            for line in dict.fromkeys(
                line for plan in plans.values() for line in plan.teacher_source.notes_on(plan.data)
            ):
                note(line)
            device = stack.enter_context(accelerator_on(self.device, "no")).device
            done = self._attempt(plans, lambda f: plans[f].evaluate(device, self.temperatures, layers), skipped)
            if line := announcement((_display_name(folder), chosen) for folder, (_, chosen) in done.items()):
                note(line)
            report_dirs = _check_reports(report_dirs, done)
            for folder, (evaluation, chosen) in done.items():
                plans[folder].write(evaluation, chosen.count)
            for folder in report_dirs:
                page.write(folder / REPORT_FILES[0], [folder])
            summaries = [replace(runs.with_evaluation(plans[each].run), method=_display_name(each)) for each in done]
        terminal.print_lines(*as_text(tables.evaluation_table(summaries)), "")
        terminal.print_lines(*tables.notes_on_teachers(summaries), *(f"skipped: {reason}" for reason in skipped))
        terminal.print_lines(*(f"report: {folder / REPORT_FILES[0]}" for folder in report_dirs))

    def _layers(self) -> list[tuple[str, str]] | None:
        """Return the pairs of layers. Raises TypeError or ValueError for an option that is invalid whatever the runs are."""
        check_temperatures(self.temperatures)
        if not self.runs:
            raise ValueError("kcd evaluate needs at least one run folder")
        if self.teacher_network is not None and self.teacher is None:
            raise ValueError(f"teacher_network={self.teacher_network!r} has no effect without teacher")
        if self.threads is not None:
            check_int("threads", self.threads, 1, MAX_THREADS)
        for text in self.layers:
            if text.count("=") != 1:
                raise ValueError(f"layers must be STUDENT=TEACHER, a module path in each network, got {text!r}")
        return [tuple(text.split("=")) for text in self.layers] or None

    def _report_dirs(self, run_dirs: Sequence[Path]) -> list[Path]:
        """Return the folders whose reports will be written: those given, and those of existing reports that show a run."""
        found = {folder.resolve(): folder for path in self.runs for folder in runs.runs_by_report(path)}
        for folder in (folder for run_dir in run_dirs for folder in runs.report_dirs(run_dir)):
            if (folder / REPORT_FILES[0]).exists():
                found.setdefault(folder.resolve(), folder)
        return list(found.values())

    def _attempt(
        self, folders: Iterable[Path], step: Callable[[Path], Result], skipped: list[str]
    ) -> dict[Path, Result]:
        """Return the results of a step by folder. If it fails for a folder, append the reason to `skipped`, in one line.

        Raises ValueError if the step fails for a run given by its own path, or for all runs.
        """
        results = {}
        for folder in folders:
            try:
                results[folder] = step(folder)
            except EVALUATION_ERRORS as error:
                skipped.append(f"{_display_name(folder)}: {one_line(error)}")
                if folder in self.runs:
                    raise ValueError(skipped[-1]) from error
        if not results:
            raise ValueError(f"nothing to evaluate: {skipped[0]}")
        return results

    def _plan(
        self, folder: Path, load_data: Callable[..., ImageData], find_teacher: Callable[..., Teacher]
    ) -> "_EvaluationPlan":
        """Load the networks and images of a run. Raises one of EVALUATION_ERRORS if the run cannot be evaluated."""
        run, weights = runs.read(folder), folder / WEIGHTS
        metadata = run.metadata
        if run.summary is None or run.unfinished or not weights.is_file():
            raise ValueError(f"the run is not finished: it has no {WEIGHTS} or fewer epochs than planned")
        if self.teacher is None and metadata.teacher is None:
            raise ValueError("the run has no teacher: give --teacher to compare its student with one")
        if "spec" not in metadata.data:
            raise ValueError(
                "config.json does not name the data set, because no command wrote it: call kcd_ext.evaluation.evaluate with "
                "the networks and images"
            )
        data, recorded = load_data(**metadata.data), metadata.config.get("test_samples")
        if recorded != digest_of_samples(data.test, recorded):
            raise ValueError(f"the run was tested on other images than {metadata.data['spec']!r} contains now")
        check_weights(folder)
        if metadata.student is None:
            raise ValueError("config.json does not say which network was trained, so its weights cannot be loaded")
        student = Teacher(metadata.student, load_weights(weights).tensors, weights, config=metadata.student_config)
        if self.teacher is None:
            teacher = _find_own_teacher(run, data, find_teacher)
        else:
            teacher = find_teacher(self.teacher, self.teacher_network, metadata.teacher_network)
            if teacher.origin is None:
                raise ValueError(
                    f"teacher must be the folder of a finished run or a weights file, got {self.teacher!r}"
                )
        network = teacher.build(data, SEED)
        if metadata.teacher_normalisation is not None and digest(network.state_dict()) == metadata.teacher:
            # The teacher gets its images resized and normalised as when it taught the student.
            given = {"normalisation": metadata.teacher_normalisation, "resizing": metadata.teacher_resizing}
            teacher = replace(teacher, **given)
            network = teacher.build(data, SEED)
        return _EvaluationPlan(run, data, teacher, student.build(data, SEED), network, self.threads)


def evaluate_students(
    folders: Sequence[Path], *, data: ImageData, device: str = "auto", threads: int | None = None
) -> None:
    """Compare students with the teachers that they were distilled from, and write evaluation.json into each folder.

    A run that cannot be evaluated, such as one that diverged, is noted on stderr. The caller has locked the folders and
    writes the reports.

    Args:
        folders: Run folders of a command.
        data: The images of these runs.
        device: auto, cpu or cuda.
        threads: Torch's CPU threads. None: chosen as in `kcd evaluate`.

    Raises:
        OSError: a result cannot be written.
    """
    find_once = cache(teachers.find)
    with accelerator_on(device, "no") as accelerator:
        for folder in folders:
            try:
                plan = Evaluate((folder,), threads=threads)._plan(folder, lambda **_: data, find_once)
                evaluation, chosen = plan.evaluate(accelerator.device, TEMPERATURES, None)
            except EVALUATION_ERRORS as error:
                note(f"{folder} is not evaluated: {one_line(error)}")
            else:
                plan.write(evaluation, chosen.count)


@dataclass(frozen=True)
class _EvaluationPlan:
    """A student and its teacher, loaded but not evaluated yet."""

    run: runs.Run
    data: ImageData
    teacher_source: Teacher
    student: nn.Module
    teacher: nn.Module
    threads: int | None

    def evaluate(
        self, device: torch.device, temperatures: Sequence[float], layers: Sequence[tuple[str, str]] | None
    ) -> tuple[Evaluation, Threads]:
        """Return the evaluation and the threads that computed it. Raises as `kcd_ext.evaluation.evaluate` does."""
        if self.threads is not None:
            chosen = Threads(self.threads)
        else:
            networks = [(1, self.student), (1, self.teacher)]
            chosen = threads_for(batch_flops(networks, self.data.test, MIN_EVAL_BATCH_SIZE, device.type), "batch")
        with threads(chosen.count):
            evaluation = evaluate(
                self.student.to(device),
                self.teacher.to(device),
                batch_source(self.data.test, None, device, 0).eval_batches(MIN_EVAL_BATCH_SIZE),
                temperatures=temperatures,
                layers=layers,
                class_names=self.data.class_names,
            )
        return evaluation, chosen

    def write(self, evaluation: Evaluation, threads: int) -> None:
        """Write evaluation.json."""
        content = {
            "data": self.data.name,
            "test_samples": self.run.metadata.config["test_samples"],
            "student_network": self.run.metadata.student,
            "student": digest(self.student.state_dict()),
            "teacher_network": self.teacher_source.network,
            "teacher_path": str(self.teacher_source.origin),
            "teacher": digest(self.teacher.state_dict()),
            "run": runs.fingerprint(self.run.folder),
            "evaluation": evaluation.as_json(),
            "threads": threads,
            "versions": versions(),
        }
        files.write_json(self.run.folder / runs.EVALUATION, content)


def _display_name(folder: Path) -> str:
    """Return the folder as given, or its name if that was `.` or `..`."""
    return folder.resolve().name if folder.name in ("", "..") else str(folder)


def _find_own_teacher(run: runs.Run, data: ImageData, find_teacher: Callable[..., Teacher]) -> Teacher:
    """Return the teacher that a run was distilled from. Raises ValueError if no known path has its weights."""
    metadata, rejected = run.metadata, []
    paths = runs.teacher_dirs(run.folder, metadata.teacher_path)
    for path in paths:
        if not teachers.has_weights(path):
            continue
        try:
            teacher = find_teacher(str(path), metadata.teacher_network, None)
            weights = digest(teacher.build(data, SEED).state_dict())
        except ValueError as error:
            rejected.append(str(error))
            continue
        if weights == metadata.teacher:
            return teacher
        rejected.append(f"{path} has other weights ({weights})")
    reason = "; ".join(rejected) or f"no weights in {', '.join(map(str, paths))}"
    raise ValueError(f"its teacher (weights {metadata.teacher}) was not found: {reason}; give its path with --teacher")


def _check_reports(report_dirs: Sequence[Path], run_dirs: Collection[Path]) -> list[Path]:
    """Return the folders whose reports show one of these runs.

    Raises ValueError if a file to write is a folder, or if such a report shows a run with a damaged file.
    """
    outdated = {folder.resolve() for folder in run_dirs}
    found = [folder for folder in report_dirs if outdated & {run.resolve() for run in runs.find(folder)}]
    targets = [
        *(run / runs.EVALUATION for run in run_dirs),
        *(folder / name for folder in found for name in REPORT_FILES),
    ]
    for target in targets:
        if target.is_dir():
            raise ValueError(f"{target} must be a file, but is a folder")
    for folder in found:
        compare([folder], outdated)
    return found
