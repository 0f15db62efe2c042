"""Several runs of one command: by methods and seeds, the teacher first, side by side, resumed, and one page of all."""

import json
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import nn

from .. import files, processes, terminal
from ..data.images import ImageData, ImageSet
from ..data.views import Views
from ..environment import threads, versions
from ..reports import page, ranking, runs
from ..reports.runs import RUN_GLOBS, TEACHER, Normalisation
from ..reports.tables import as_text
from ..training.fingerprint import check_same, digest_of_samples
from ..training.folder import ENTRIES, WEIGHTS
from ..training.loop import distill
from ..training.recipe import Recipe
from ..training.setup import build_method, check_run
from . import teachers
from .progress import Bar, note, warnings_as_notes
from .teachers import Teacher
from .threads import Threads, announcement, batch_flops, choose

REPORT = ("report.html", "report.png")


@dataclass(frozen=True)
class Run:
    """A network to be trained."""

    network: str
    """By name."""
    recipe: Recipe
    folder: Path
    teacher: Teacher | None = None
    teacher_folder: Path | None = None
    """Where the weights of the teacher are once an earlier run has trained it; None: `teacher` has them."""


@dataclass(frozen=True)
class Study:
    """Runs that are planned: nothing is trained or written yet."""

    command: str
    options: Mapping[str, object]
    """The command's own, JSON."""
    data: ImageData
    data_options: Mapping[str, object]
    """What `load` made it of: spec, size."""
    runs: Sequence[Run]
    """In their order: that of a teacher comes before those that it teaches."""
    output: Path
    """The folder of the only student, or of the folders of all runs."""
    resume: bool
    threads: int | None = None
    """Of torch's, for each run; None: as many as it needs."""
    title: str = ""
    """Of the page; empty: each run's own."""
    keeps_previous: bool = False
    """Whether a finished study of the same command in `output` is moved to OUTPUT.previous; other files there stay."""
    side_by_side: int = 1
    """How many runs are trained at a time, each in a process of its own if there are several."""
    deadline: float | None = None
    """When training is interrupted, by `time.monotonic`."""
    chosen: Mapping[Path, Threads] = field(default_factory=dict)
    """The threads of the run in each folder, once `checked`."""

    def checked(self) -> "Study":
        """Find out all that takes no training to find out; nothing is written. Return the study, its threads chosen.

        Raises:
            TypeError, ValueError, ImportError: data, networks, method and recipe do not fit each other.
            FileExistsError: `output` holds a study and is not to be resumed, or something else.
        """
        self._check_output()
        with threads(self.threads or 1), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the runs will warn of the same
            for run in self._kinds():
                self._check_run(run)
        return replace(self, chosen=self._choose_threads())

    def run(self) -> None:
        """Train, write the report and print the table.

        Raises:
            FileExistsError: another command is running in `output`, or has left something there since `checked`.
            OSError: a file cannot be written; what was finished before is intact.
            KeyboardInterrupt: with a message that says how to go on.
        """
        first = processes.rank() == 0
        if first and self._has_finished():
            self._move_aside()
        with files.folder_lock(self.output) if first else nullcontext():
            if first:
                self._check_output()
                self._announce()
            try:
                with warnings_as_notes():
                    self._train_all()
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"--resume goes on with what is in {self.output}") from None
            if first and any((run.folder / "metrics.jsonl").exists() for run in self.runs):
                self._report()

    # --- before training ----------------------------------------------------------------------------------------------

    def _kinds(self) -> list[Run]:
        """Return the first run of every label: others differ from it in the seed alone."""
        return list({run.recipe.label: run for run in reversed(self.runs)}.values())[::-1]

    def _networks(self, run: Run) -> tuple[nn.Module, nn.Module | None]:
        """Return student and teacher, the latter with weights of the seed where it is not trained yet."""
        student = teachers.build(run.network, self.data, run.recipe.seed)
        teacher = run.teacher
        if run.teacher_folder is not None and (weights := run.teacher_folder / WEIGHTS).exists():
            # As every process finds it, and every later run: the file of the first one.
            teacher = replace(teacher, weights=teachers.read(weights).tensors, origin=run.teacher_folder)
        return student, None if teacher is None else teacher.build(self.data, run.recipe.seed)

    def _check_run(self, run: Run) -> None:
        try:
            check_run(*self._networks(run), self.data.train, self.data.test, run.recipe)
        except (TypeError, ValueError) as error:
            if not self._is_teacher(run):
                raise
            raise type(error)(f"teacher {run.network}, which is trained first as a student is: {error}") from error

    def _is_teacher(self, run: Run) -> bool:
        return run.folder in [other.teacher_folder for other in self.runs]

    def _choose_threads(self) -> dict[Path, Threads]:
        """Choose the threads of the run in each folder. Raises ValueError where a config.json there is damaged."""
        if self.threads is not None:
            alone = self.threads * self.side_by_side  # nothing runs beside a teacher
            return {run.folder: Threads(alone if self._is_teacher(run) else self.threads) for run in self.runs}
        flops = {}
        for run in self._kinds():
            (student, teacher), recipe = self._networks(run), run.recipe
            # The backward pass is counted as two forward passes.
            passes = [(3, student), (1, teacher if build_method(recipe).needs_teacher else None)]
            flops[recipe.label] = batch_flops(passes, self.data.train, recipe.batch_size, recipe.device)
        return choose({run.folder: run.recipe.label for run in self.runs}, flops)

    def _announce(self) -> None:
        if self.resume and not self._taken():
            note(f"nothing to resume in {self.output}: starting anew")
        given = {run.teacher.origin: run.teacher for run in self.runs if run.teacher and run.teacher.origin}
        for teacher in given.values():
            for line in teacher.notes_on(self.data):
                note(line)
            if of := self._other_images(teacher.origin, teacher):
                note(f"warning: teacher {teacher.origin} was trained on {of}, not on this {self.data.name}")
        if line := announcement((run.recipe.label, self.chosen[run.folder]) for run in self.runs):
            note(line)

    # --- the folder -----------------------------------------------------------------------------------------------------

    @property
    def _collected(self) -> list[Run]:
        """The runs whose results stand in the summary.json of `output`: none where a run is there itself."""
        if any(run.folder == self.output for run in self.runs):
            return []
        return [run for run in self.runs if run.folder != self.output / TEACHER]

    def _check_output(self) -> None:
        if self.output.resolve().parent == self.output.resolve():
            raise ValueError(f"output must be a folder below the root, got {self.output}")
        for path in (self.output, *self.output.parents):
            if path.is_symlink() and not path.exists():
                raise FileExistsError(f"output {path} is a link to {os.readlink(path)}, which is not there")
        otherwise = "or choose another --output"
        if self.output.exists() and not self.output.is_dir():
            raise FileExistsError(f"output {self.output} is a file: choose another --output")
        if self._has_finished():
            self._check_previous()
            return
        taken = self._taken()
        if taken and not self.resume:
            raise FileExistsError(
                f"output {self.output} holds a {taken[0]} already: --resume goes on with a run, {otherwise}"
            )
        config = self.output / "config.json"
        content = files.read_json(config) if self._collected and config.exists() else {"command": self.command}
        if content.get("command") != self.command:
            found = "a single run" if "recipe" in content else f"a config.json that is not of {self.command}"
            raise FileExistsError(f"output {self.output} holds {found}: give the same --seeds, {otherwise}")
        folders = [run.folder for run in self.runs]
        if others := [folder for folder in self._folders_of_runs() if folder not in folders]:
            found = f"{others[0].relative_to(self.output)}, which is none of these runs"
            found = "several seeds" if self.output in folders else found
            raise FileExistsError(f"output {self.output} holds {found}: give the same --seeds, {otherwise}")
        for run in self.runs:
            if (run.folder / "config.json").exists():
                self._check_begun(run)

    def _taken(self) -> list[str]:
        """Return what is in `output` under a name that this study would write to."""
        names = [name for name in (*ENTRIES, TEACHER, *REPORT) if (self.output / name).exists()]
        return names + [str(folder.relative_to(self.output)) for folder in self._folders_of_runs()]

    def _folders_of_runs(self) -> list[Path]:
        return sorted(config.parent for glob in RUN_GLOBS for config in self.output.glob(glob))

    def _check_begun(self, run: Run) -> None:
        """Raise ValueError where the run in a folder differs from this one in what is known before there is a teacher."""
        config = runs.metadata_of(run.folder).config
        there = config.get("about") or {}
        there = {**(there.get("data") or {}), **there, **config}
        facts = {**self._about_data(), "student": run.network}
        facts |= {"train": len(self.data.train), "test": len(self.data.test)}
        moved = there.get("spec") != facts["spec"]
        if moved and there.get("train_samples") == digest_of_samples(self.data.train):
            del facts["spec"]  # the same images, wherever they lie by now
        facts = {name: fact for name, fact in facts.items() if name in there}  # not all that a library's run need say
        facts |= {"processes": processes.world_size(), "recipe": run.recipe.as_json()}
        check_same(there, json.loads(json.dumps(facts)), run.folder)

    def _has_finished(self) -> bool:
        """Return whether a finished study of the same command is in `output`, to be kept while this one begins anew."""
        config = self.output / "config.json"
        if not self.keeps_previous or self.resume or not (config.exists() and (self.output / REPORT[0]).exists()):
            return False
        return files.read_json(config).get("command") == self.command

    @property
    def _previous(self) -> Path:
        output = Path(os.path.realpath(self.output))
        return output.with_name(f"{output.name}.previous")

    def _check_previous(self) -> None:
        if Path.cwd().is_relative_to(self.output.resolve()):
            raise FileExistsError(
                f"output {self.output} holds a finished run and is the current folder: choose another --output"
            )
        previous = self._previous
        found = {path.name for path in previous.iterdir()} if previous.exists() else set()
        config = previous / "config.json"
        if foreign := sorted(found - {*ENTRIES, *REPORT, files.LOCK}):
            raise FileExistsError(f"{previous} holds a {foreign[0]}: move it away, or choose another --output")
        if found and not (config.exists() and files.read_json(config).get("command") == self.command):
            raise FileExistsError(f"{previous} is not of {self.command}: move it away, or choose another --output")

    def _move_aside(self) -> None:
        output, previous = Path(os.path.realpath(self.output)), self._previous
        with files.folder_lock(output):
            if not self._has_finished():  # by now: another command has moved it
                return
            older = previous.with_name(f".{previous.name}.older")  # until its place is taken: a rename can fail
            if previous.exists():
                files.remove(older)  # of a command that was killed here
                previous.rename(older)
            try:
                output.rename(previous)
            except OSError:
                if older.exists():
                    older.rename(previous)
                raise
            files.remove(older)
            (previous / files.LOCK).unlink(missing_ok=True)
            output.mkdir()
            for path in previous.iterdir():
                if path.name not in (*ENTRIES, *REPORT):  # the user's own
                    path.rename(output / path.name)

    # --- training -------------------------------------------------------------------------------------------------------

    def _train_all(self) -> None:
        """Train the runs in their order. Side by side are those that teach nobody, if they are not finished."""
        here = [run for run in self.runs if self.side_by_side == 1 or self._is_teacher(run)]
        with Bar(len(self.runs), self.runs[0].recipe.epochs) as bar:
            for run in here:
                self._train(run, bar.begin(f"{run.recipe.label}, seed {run.recipe.seed}"))
                bar.end()
                self._collect()
            apart = [run for run in self.runs if run not in here and self._is_due(run) and not _is_finished(run)]
            if not apart:
                return
            # Processes of their own: the number of threads and the generators of random numbers are those of a process.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(self.side_by_side, context, initializer=_end_with_parent) as pool:
                begun: set[Future] = set()
                while apart or begun:
                    # No run waits in the pool: a worker would begin it after Ctrl-C.
                    while apart and len(begun) < self.side_by_side:
                        begun.add(pool.submit(self._train_apart, apart.pop(0)))
                    ended, begun = wait(begun, return_when=FIRST_COMPLETED)
                    for future in ended:
                        future.result()
                        bar.end()
                        self._collect()

    def _train(self, run: Run, progress: Callable[[dict], None] | None = None) -> None:
        """Train a run until the deadline or, if it is finished, check that it is this one."""
        if self._is_due(run):
            deadline = None if _is_finished(run) else self.deadline
            with threads(self.chosen[run.folder].count):
                _call_until(deadline, partial(self._distill, run, progress))

    def _train_apart(self, run: Run) -> None:
        with warnings_as_notes():
            self._train(run)

    def _distill(self, run: Run, progress: Callable[[dict], None] | None) -> None:
        summary = distill(
            *self._networks(run),
            self.data.train,
            self.data.test,
            run.recipe,
            output=run.folder,
            resume=self.resume,
            progress=progress,
            about=self._about(run),
        )
        if processes.rank() == 0:
            ranking.write(run.folder, summary, self.data.train, self.data.class_names)

    def _is_due(self, run: Run) -> bool:
        """Return whether a run is to be begun, or looked at: there is time, and its teacher is trained."""
        if self.deadline is None or _is_finished(run):
            return True
        trained = run.teacher_folder is None or (run.teacher_folder / WEIGHTS).exists()
        return trained and time.monotonic() < self.deadline

    def _collect(self) -> None:
        """Write the command, and the results of the runs that are finished, where runs have folders of their own.

        Before the first run has ended another rank may still look whether `output` is free.
        """
        done = [run for run in self._collected if _is_finished(run)]
        if processes.rank() > 0 or not done:
            return
        found = [files.read_json(run.folder / "summary.json")["results"][0] for run in done]
        seeds = list(dict.fromkeys(run.recipe.seed for run in self._collected))
        lines = [
            {"method": run.recipe.label, "seed": run.recipe.seed, **line}
            for run in done
            for line in files.read_lines(run.folder / "metrics.jsonl")
        ]
        options = {name: value for name, value in self.options.items() if name != "resume"}
        config = {"command": self.command, "options": options, "versions": versions()}
        files.write_json(self.output / "config.json", config)
        files.write_lines(self.output / "metrics.jsonl", lines)
        files.write_json(self.output / "summary.json", {"dataset": self.data.name, "seeds": seeds, "results": found})

    def _report(self) -> None:
        report = page.write(self.output / REPORT[0], [self.output])
        terminal.show(*as_text(report.tables[0]), *report.notes, "", f"report: {self.output / REPORT[0]}")

    # --- what config.json says ------------------------------------------------------------------------------------------

    def _about(self, run: Run) -> dict[str, object]:
        """Return what config.json says of a run, so that it can be read without its command: `load(**data)` gives its images.

        "teacher_path" is where the teacher's weights were read; None where the command has trained them beside the run.
        "teacher_normalisation" is that of the images which the teacher was given. "teacher_run" is the fingerprint of the
        teacher's own run on these images. "threads" are those of all runs of the command, by label, in their order: one
        that is interrupted may go on elsewhere before it has begun them all. "page" is what reports show as it is.
        """
        teacher, views = run.teacher, self.data.test.views
        given = None if teacher is None else teacher.differing(self.data) or _normalisation(self.data.train.views)
        return {
            "command": self.command,
            "dataset": self.data.name,
            "data": self._about_data(),
            "student": run.network,
            "teacher": None if teacher is None else str(teacher),
            "teacher_network": None if teacher is None else teacher.network,
            "teacher_path": self._teacher_path(run),
            "teacher_normalisation": None if given is None else given._asdict(),
            "teacher_run": {} if teacher is None else self._teacher_run(run),
            "threads": {other.recipe.label: self.chosen[other.folder].count for other in self.runs},
            "page": {
                "command": self.command,
                "normalisation": {"mean": views.mean, "std": views.std},
                "class_names": self.data.class_names,
                "title": self.title or f"{run.recipe.label} on {self.data.name}: {run.network}",
                "options": self.options,
            },
        }

    def _about_data(self) -> dict[str, object]:
        views = self.data.train.views
        own = _normalisation(views)
        alike = own == _normalisation(self.data.test.views)  # else no two numbers give both parts again
        return {
            **{"size": None, **self.data_options, "padding": views.padding, "flip": views.flip},
            **{name: list(numbers) if alike else None for name, numbers in own._asdict().items()},
        }

    def _teacher_path(self, run: Run) -> str | None:
        if run.teacher_folder in (None, run.folder / TEACHER, run.folder.parent / TEACHER):
            return str(run.teacher.origin.absolute()) if run.teacher and run.teacher.origin else None
        return str(run.teacher_folder.absolute())

    def _teacher_run(self, run: Run) -> dict[str, str]:
        folder = run.teacher_folder or run.teacher.origin
        is_run = (folder / "metrics.jsonl").exists()
        return runs.fingerprint(folder) if is_run and not self._other_images(folder, run.teacher) else {}

    def _other_images(self, folder: Path, teacher: Teacher) -> str:
        """Return what the run in a teacher's folder was tested on, if not on these images, however normalised; else nothing."""
        if not (folder / "metrics.jsonl").exists():
            return ""
        own, images, config = teacher.differing(self.data), self.data.test, runs.metadata_of(folder).config
        if own is not None:
            images = ImageSet(images.images, images.labels, replace(images.views, mean=own.mean, std=own.std))
        dataset = (config.get("about") or {}).get("dataset")
        same = config.get("test_samples") == digest_of_samples(images)
        return "" if same else "other images" if dataset in (None, self.data.name) else dataset


def _normalisation(views: Views) -> Normalisation:
    return Normalisation(views.mean, views.std)


def _is_finished(run: Run) -> bool:
    return (run.folder / "summary.json").exists()


def _end_with_parent() -> None:
    """Terminate this worker of a pool once the process that started it has ended: no one would give it work, or stop it."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _call_until(deadline: float | None, work: Callable[[], None]) -> None:
    """Call `work`, and leave it as Ctrl-C does at a time of `time.monotonic`; None: never. Ctrl-C itself is raised."""
    if deadline is None:
        return work()
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, deadline - time.monotonic()))
            work()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        if time.monotonic() < deadline:
            raise
    finally:
        signal.signal(signal.SIGALRM, before)
