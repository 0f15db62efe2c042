"""Run several trainings as one command: the teacher first, methods and seeds, in parallel, with resume and one report."""

import json
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import nn

from .. import files, models, processes, terminal
from ..cache import TeacherCache
from ..data.images import ImageData
from ..data.preprocessing import Preprocessing
from ..data.views import Views
from ..environment import threads, versions
from ..models.weights import load_weights
from ..reports import page, ranking, runs
from ..reports.runs import RUN_GLOBS, TEACHER, Normalisation
from ..reports.tables import as_text
from ..students import MODEL, WEIGHTS, Model
from ..training.fingerprint import check_same_run, digest_of_samples
from ..training.folder import ENTRIES
from ..training.logs import open_log
from ..training.loop import distill
from ..training.recipe import Recipe
from ..training.setup import build_method, check_run
from ..training.teacher_cache import is_plain_beside_views
from . import teachers
from .progress import Bar, note, warnings_as_notes
from .teachers import Start, Teacher
from .threads import Threads, announcement, batch_flops, choose_threads

REPORT_FILES = ("report.html", "report.png")


@dataclass(frozen=True)
class PlannedRun:
    """A network to train, with its recipe, folder and teacher."""

    network: str
    """Name of the network."""
    recipe: Recipe
    folder: Path
    teacher: Teacher | None = None
    teacher_folder: Path | None = None
    """Folder of the earlier run that trains the teacher; None: `teacher` has its weights."""
    teacher_cache: TeacherCache | None = None
    """The teacher's logits, instead of `teacher`."""
    start: Start | None = None
    """The weights that the network starts from; None: those of the recipe's seed."""


@dataclass(frozen=True)
class Study:
    """A plan of several runs. Creating it trains and writes nothing."""

    command: str
    options: Mapping[str, object]
    """Options of the command, as JSON values."""
    data: ImageData
    data_options: Mapping[str, object]
    """Arguments of `load` that gave `data`: spec, size, and others that differ from their default."""
    runs: Sequence[PlannedRun]
    """The runs in order: a teacher's run precedes those of its students."""
    output: Path
    """The run folder of a single student, or the parent of all run folders."""
    resume: bool
    threads: int | None = None
    """Torch's CPU threads for each run; None: chosen by the rule of `choose_threads`."""
    title: str = ""
    """Title of the report; empty: named after the run."""
    keeps_previous: bool = False
    """Whether to move a finished study of the same command in `output` to OUTPUT.previous; other files in it stay."""
    side_by_side: int = 1
    """Number of runs to train at the same time; above 1 each gets its own process."""
    log: Sequence[str] = ()
    """Names of the logs of every run: keys of `LOGS`, or module:Class."""
    progress_every: int | None = None
    """Optimizer steps between lines of progress within an epoch; None: none."""
    finish: Callable[[Sequence[Path]], None] | None = None
    """Called with the folders of the distilled students after all training, before the report is written."""
    deadline: float | None = None
    """Time of `time.monotonic` at which training is interrupted; None: never."""
    chosen_threads: Mapping[Path, Threads] = field(default_factory=dict)
    """The threads of the run in each folder; `checked` sets them."""

    def checked(self) -> "Study":
        """Check everything that needs no training, without writing. Return the study with its threads chosen.

        Raises:
            TypeError, ValueError, ImportError: data, networks, method and recipe do not fit each other.
            FileExistsError: `output` holds other files, or a study while `resume` is off.
        """
        self._check_output()
        with threads(self.threads or 1), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the runs repeat these warnings
            for run in self._one_per_label():
                self._check_run(run)
        return replace(self, chosen_threads=self._choose_threads())

    def run(self) -> None:
        """Train, write the report and print the table.

        Raises:
            FileExistsError: another command is running in `output`, or has written there since `checked`.
            OSError: a file cannot be written; finished runs and the last checkpoint are intact.
            KeyboardInterrupt: the study was interrupted; the message says how to resume.
        """
        is_rank_zero = processes.rank() == 0
        if is_rank_zero and self._replaces_finished():
            self._move_aside()
        with files.folder_lock(self.output) if is_rank_zero else nullcontext():
            if is_rank_zero:
                self._check_output()
                self._announce()
            try:
                with warnings_as_notes():
                    self._train_all()
                    if self.finish is not None and is_rank_zero:
                        self.finish([run.folder for run in self.runs if run.recipe.method != "ce"])
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"run the command again with --resume to continue in {self.output}") from None
            if is_rank_zero and any((run.folder / "metrics.jsonl").exists() for run in self.runs):
                self._report()

    # --- before training ----------------------------------------------------------------------------------------------

    def _one_per_label(self) -> list[PlannedRun]:
        """Return the first run of each label. The others differ only in their seed."""
        return list({run.recipe.label: run for run in reversed(self.runs)}.values())[::-1]

    def _networks(self, run: PlannedRun) -> tuple[nn.Module, nn.Module | TeacherCache | None]:
        """Build student and teacher. A teacher that is not trained yet gets the seed's initial weights."""
        student, _ = teachers.build_student(run.network, run.start, self.data, run.recipe.seed)
        if run.teacher_cache is not None:
            return student, run.teacher_cache
        teacher = run.teacher
        if run.teacher_folder is not None and (weights := run.teacher_folder / WEIGHTS).exists():
            # Read the file of the first run, so that every process and every later run gets the same weights.
            teacher = replace(teacher, weights=load_weights(weights).tensors, origin=run.teacher_folder)
        return student, None if teacher is None else teacher.build(self.data, run.recipe.seed)

    def _check_run(self, run: PlannedRun) -> None:
        """Check that networks, data and recipe of a run fit each other. Raises as `check_run` does."""
        try:
            check_run(*self._networks(run), self.data.train, self.data.test, run.recipe, self.data.val)
        except (TypeError, ValueError) as error:
            if not self._is_teacher(run):
                raise
            raise type(error)(f"teacher {run.network}, which this command trains first: {error}") from error

    def _is_teacher(self, run: PlannedRun) -> bool:
        """Return whether another run uses this one as its teacher."""
        return run.folder in [other.teacher_folder for other in self.runs]

    def _choose_threads(self) -> dict[Path, Threads]:
        """Return the threads of the run in each folder. Raises ValueError if a config.json in it is damaged."""
        if self.threads is not None:
            teacher_threads = self.threads * self.side_by_side  # a teacher's run has the processors to itself
            return {
                run.folder: Threads(teacher_threads if self._is_teacher(run) else self.threads) for run in self.runs
            }
        flops = {}
        for run in self._one_per_label():
            (student, teacher), recipe = self._networks(run), run.recipe
            # The backward pass is counted as two forward passes.
            runs_teacher = build_method(recipe).needs_teacher and run.teacher_cache is None
            passes = [(3, student), (1, teacher if runs_teacher else None)]
            flops[recipe.label] = batch_flops(passes, self.data.train, recipe.batch_size, recipe.device)
        return choose_threads({run.folder: run.recipe.label for run in self.runs}, flops)

    def _announce(self) -> None:
        """Print what the user should know before training: a fresh start, remarks on teachers, the threads."""
        if self.resume and not self._existing_entries():
            note(f"nothing to resume in {self.output}: starting from the beginning")
        for network, start in {(run.network, id(run.start)): (run.network, run.start) for run in self.runs}.values():
            for line in teachers.build_student(network, start, self.data, 0)[1]:
                note(line)
        trained = {run.teacher.origin: run.teacher for run in self.runs if run.teacher and run.teacher.origin}
        for teacher in trained.values():
            for line in teacher.notes_on(self.data):
                note(line)
            if other := self._other_test_images(teacher.origin, teacher):
                note(
                    f"warning: teacher {teacher.origin} was trained on {other}, not on these images of {self.data.name}"
                )
        if any(is_plain_beside_views(run.teacher_cache, self.data.train) for run in self.runs if run.teacher_cache):
            note(
                "the teacher cache has the logits of plain images, the student sees random views of them: kcd cache --views stores "
                "the logits of the same pixels"
            )
        if line := announcement((run.recipe.label, self.chosen_threads[run.folder]) for run in self.runs):
            note(line)

    # --- the folder -----------------------------------------------------------------------------------------------------

    @property
    def _summarised_runs(self) -> list[PlannedRun]:
        """The runs whose results the summary.json of `output` collects; empty if `output` is itself a run folder."""
        if any(run.folder == self.output for run in self.runs):
            return []
        return [run for run in self.runs if run.folder != self.output / TEACHER]

    def _check_output(self) -> None:
        """Raise FileExistsError or ValueError unless this study may write to `output`."""
        if self.output.resolve().parent == self.output.resolve():
            raise ValueError(f"output must not be the root folder, got {self.output}")
        for path in (self.output, *self.output.parents):
            if path.is_symlink() and not path.exists():
                raise FileExistsError(f"output {path} is a broken link to {os.readlink(path)}")
        otherwise = "or choose another --output"
        if self.output.exists() and not self.output.is_dir():
            raise FileExistsError(f"output {self.output} is a file: choose another --output")
        if self._replaces_finished():
            self._check_previous()
            return
        existing = self._existing_entries()
        if existing and not self.resume:
            raise FileExistsError(
                f"output {self.output} already holds {existing[0]}: give --resume to continue its run, {otherwise}"
            )
        config = self.output / "config.json"
        content = files.read_json(config) if self._summarised_runs and config.exists() else {"command": self.command}
        if content.get("command") != self.command:
            found = "a single run" if "recipe" in content else f"a config.json that {self.command} did not write"
            raise FileExistsError(f"output {self.output} holds {found}: give the same --seeds, {otherwise}")
        folders = [run.folder for run in self.runs]
        if others := [folder for folder in self._run_folders() if folder not in folders]:
            found = f"{others[0].relative_to(self.output)}, which is not one of these runs"
            found = "several seeds" if self.output in folders else found
            raise FileExistsError(f"output {self.output} holds {found}: give the same --seeds, {otherwise}")
        for run in self.runs:
            if (run.folder / "config.json").exists():
                self._check_resumable(run)

    def _existing_entries(self) -> list[str]:
        """Return the entries of `output` whose names this study would write to."""
        names = [name for name in (*ENTRIES, TEACHER, *REPORT_FILES) if (self.output / name).exists()]
        return names + [str(folder.relative_to(self.output)) for folder in self._run_folders()]

    def _run_folders(self) -> list[Path]:
        """Return the folders of all runs below `output`."""
        return sorted(config.parent for glob in RUN_GLOBS for config in self.output.glob(glob))

    def _check_resumable(self, run: PlannedRun) -> None:
        """Raise ValueError if the run in a folder differs from this one, as far as is known before a teacher is trained."""
        metadata = runs.metadata_of(run.folder)
        config, about = metadata.config, metadata.config.get("about") or {}
        resize = {
            name: value for name, value in metadata.data.items() if name == "resize"
        }  # older versions did not write it
        recorded = {**(about.get("data") or {}), **resize, **about, **config}
        facts = {**self._about_data(), "student": run.network}
        facts |= {"train": len(self.data.train), "test": len(self.data.test)}
        facts |= {} if self.data.val is None else {"val": len(self.data.val)}
        moved, samples = recorded.get("spec") != facts["spec"], recorded.get("train_samples")
        if moved and samples == digest_of_samples(self.data.train, samples):
            del facts["spec"]  # the same images under another path
        facts = {
            name: fact for name, fact in facts.items() if name in (*recorded, "val")
        }  # a library's run may record fewer
        facts |= {"processes": processes.world_size(), "recipe": run.recipe.as_json()}
        check_same_run(recorded, json.loads(json.dumps(facts)), run.folder)

    def _replaces_finished(self) -> bool:
        """Return whether this study starts again where a finished one of the same command is, which it moves aside."""
        config = self.output / "config.json"
        if not self.keeps_previous or self.resume or not (config.exists() and (self.output / REPORT_FILES[0]).exists()):
            return False
        return files.read_json(config).get("command") == self.command

    @property
    def _previous(self) -> Path:
        """The folder OUTPUT.previous."""
        output = Path(os.path.realpath(self.output))
        return output.with_name(f"{output.name}.previous")

    def _check_previous(self) -> None:
        """Raise FileExistsError unless the finished study can be moved to OUTPUT.previous."""
        if Path.cwd().is_relative_to(self.output.resolve()):
            raise FileExistsError(
                f"output {self.output} holds a finished run and is the current folder: choose another --output"
            )
        previous = self._previous
        found = {path.name for path in previous.iterdir()} if previous.exists() else set()
        config = previous / "config.json"
        if foreign := sorted(found - {*ENTRIES, *REPORT_FILES, files.LOCK}):
            raise FileExistsError(f"{previous} holds {foreign[0]}: move it away, or choose another --output")
        if found and not (config.exists() and files.read_json(config).get("command") == self.command):
            raise FileExistsError(
                f"{previous} was not written by {self.command}: move it away, or choose another --output"
            )

    def _move_aside(self) -> None:
        """Move the finished study in `output` to OUTPUT.previous. The user's own files stay."""
        output, previous = Path(os.path.realpath(self.output)), self._previous
        with files.folder_lock(output):
            if not self._replaces_finished():  # another command has just moved it
                return
            older = previous.with_name(f".{previous.name}.older")  # kept until it is replaced, as a rename can fail
            if previous.exists():
                files.remove(older)  # left by a command that was killed here
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
                if path.name not in (*ENTRIES, *REPORT_FILES):  # the user's own files
                    path.rename(output / path.name)

    # --- training -------------------------------------------------------------------------------------------------------

    def _train_all(self) -> None:
        """Train the runs in order. With `side_by_side` > 1, students that are not finished are trained in parallel."""
        sequential = [run for run in self.runs if self.side_by_side == 1 or self._is_teacher(run)]
        with Bar(len(self.runs), self.runs[0].recipe.epochs) as bar:
            for run in sequential:
                self._train(run, bar.start(f"{run.recipe.label}, seed {run.recipe.seed}"))
                bar.finish()
                self._write_summary()
            pending = [
                run for run in self.runs if run not in sequential and self._is_due(run) and not _is_finished(run)
            ]
            if not pending:
                return
            # Use processes, because the number of threads and the random generators are global to a process.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(self.side_by_side, context, initializer=_terminate_with_parent) as pool:
                running: set[Future] = set()
                while pending or running:
                    # Queue no run in the pool: a worker would start it after Ctrl-C.
                    while pending and len(running) < self.side_by_side:
                        running.add(pool.submit(self._train_in_worker, pending.pop(0)))
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                        bar.finish()
                        self._write_summary()

    def _train(self, run: PlannedRun, progress: Callable[[dict], None] | None = None) -> None:
        """Train a run until the deadline. If it is finished, only check that it is the planned one."""
        if self._is_due(run):
            deadline = None if _is_finished(run) else self.deadline
            with threads(self.chosen_threads[run.folder].count):
                _call_until(deadline, partial(self._distill, run, progress))

    def _train_in_worker(self, run: PlannedRun) -> None:
        with warnings_as_notes():
            self._train(run)

    def _distill(self, run: PlannedRun, progress: Callable[[dict], None] | None) -> None:
        with ExitStack() as logs:
            subscribers = [] if progress is None else [progress]
            subscribers += [logs.enter_context(open_log(name, run.folder)) for name in self.log]
            summary = distill(
                *self._networks(run),
                self.data.train,
                self.data.test,
                run.recipe,
                val=self.data.val,
                output=run.folder,
                resume=self.resume,
                progress=lambda line: [subscriber(line) for subscriber in subscribers],
                progress_every=self.progress_every,
                about=self._about(run),
            )
        if processes.rank() == 0:
            ranking.write(run.folder, summary, self.data.train, self.data.class_names)
            files.write_json(run.folder / MODEL, self._model(run).as_json())

    def _model(self, run: PlannedRun) -> Model:
        """Return the description of a run's student."""
        views, resize = self.data.test.views, self.data.resize or "crop"
        preprocessing = Preprocessing(*self.data.test.shape[:2], views.mean, views.std, resize)
        config = models.config(run.network)
        return Model(run.network, self.data.num_classes, preprocessing, self.data.class_names, config)

    def _is_due(self, run: PlannedRun) -> bool:
        """Return whether to train or check a run: it is finished, or there is time left and its teacher is trained."""
        if self.deadline is None or _is_finished(run):
            return True
        trained = run.teacher_folder is None or (run.teacher_folder / WEIGHTS).exists()
        return trained and time.monotonic() < self.deadline

    def _write_summary(self) -> None:
        """Write the command and the results of all finished runs to `output`, if runs have subfolders.

        Write nothing before the first run has finished: another rank may still check whether `output` is free.
        """
        done = [run for run in self._summarised_runs if _is_finished(run)]
        if processes.rank() > 0 or not done:
            return
        results = [files.read_json(run.folder / "summary.json")["results"][0] for run in done]
        seeds = list(dict.fromkeys(run.recipe.seed for run in self._summarised_runs))
        lines = [
            {"method": run.recipe.label, "seed": run.recipe.seed, **line}
            for run in done
            for line in files.read_lines(run.folder / "metrics.jsonl")
        ]
        options = {name: value for name, value in self.options.items() if name != "resume"}
        config = {"command": self.command, "options": options, "versions": versions()}
        files.write_json(self.output / "config.json", config)
        files.write_lines(self.output / "metrics.jsonl", lines)
        files.write_json(self.output / "summary.json", {"dataset": self.data.name, "seeds": seeds, "results": results})

    def _report(self) -> None:
        """Write the report and print its table."""
        report = page.write(self.output / REPORT_FILES[0], [self.output])
        terminal.print_lines(*as_text(report.tables[0]), *report.notes, "", f"report: {self.output / REPORT_FILES[0]}")

    # --- the content of config.json ----------------------------------------------------------------------------------------

    def _about(self, run: PlannedRun) -> dict[str, object]:
        """Return the entry "about" of a run's config.json, from which other commands load its data and networks.

        - "data": arguments of `load` that give its images.
        - "teacher_path": the path of the teacher's weights; None if this command trains them beside the run.
        - the entries of `Teacher.about_input`, on the images that the teacher gets.
        - "student_config": what `models.build` needs besides the student's name; missing if the name is enough.
        - "student_weights": the path of the weights that the student starts from; missing without.
        - "teacher_run": the fingerprint of the teacher's own run on these images.
        - "threads": the threads of all runs of the command, by label and in order. An interrupted command can resume on
          another machine before it has started them all.
        - "page": entries that reports show unchanged.
        """
        teacher, views, added = run.teacher, self.data.test.views, {}
        if (network_config := models.config(run.network)) is not None:
            added["student_config"] = network_config
        if run.start is not None:
            added["student_weights"] = str(run.start.origin.absolute())
        teacher_input = {"teacher_normalisation": None} if teacher is None else teacher.about_input(self.data)
        return {
            "command": self.command,
            "dataset": self.data.name,
            "data": self._about_data(),
            "student": run.network,
            "teacher": None if teacher is None else str(teacher),
            "teacher_network": None if teacher is None else teacher.network,
            "teacher_path": self._teacher_path(run),
            **teacher_input,
            **added,
            "teacher_run": {} if teacher is None else self._teacher_fingerprint(run),
            **_about_cache(run.teacher_cache),
            "threads": {other.recipe.label: self.chosen_threads[other.folder].count for other in self.runs},
            "page": {
                "command": self.command,
                "normalisation": {"mean": views.mean, "std": views.std},
                "class_names": self.data.class_names,
                "title": self.title or f"{run.recipe.label} on {self.data.name}: {run.network}",
                "options": self.options,
            },
        }

    def _about_data(self) -> dict[str, object]:
        """Return the arguments of `load` that give the images again."""
        views = self.data.train.views
        own = _normalisation(views)
        same = own == _normalisation(self.data.test.views)  # otherwise no single mean and std describes both sets
        return {
            **{"size": None, **self.data_options},
            **{"padding": views.padding, "flip": views.flip, "augment": self.data.augment},
            **{name: list(numbers) if same else None for name, numbers in own._asdict().items()},
        }

    def _teacher_path(self, run: PlannedRun) -> str | None:
        """Return the path of the teacher's weights, or None if this command trains them beside the run."""
        if run.teacher_folder in (None, run.folder / TEACHER, run.folder.parent / TEACHER):
            return str(run.teacher.origin.absolute()) if run.teacher and run.teacher.origin else None
        return str(run.teacher_folder.absolute())

    def _teacher_fingerprint(self, run: PlannedRun) -> dict[str, str]:
        """Return the fingerprint of the teacher's own run, or {} unless that run had the same test images."""
        folder = run.teacher_folder or run.teacher.origin
        is_run = (folder / "metrics.jsonl").exists()
        return runs.fingerprint(folder) if is_run and not self._other_test_images(folder, run.teacher) else {}

    def _other_test_images(self, folder: Path, teacher: Teacher) -> str:
        """Return the name of the test set of a teacher's run if it had other images, ignoring normalisation; else ""."""
        if not (folder / "metrics.jsonl").exists():
            return ""
        own, images, config = (
            teacher.different_normalisation(self.data),
            self.data.test,
            runs.metadata_of(folder).config,
        )
        if own is not None and len(own.mean) == len(images.views.mean):
            images = images.with_views(replace(images.views, mean=own.mean, std=own.std))
        dataset = (config.get("about") or {}).get("dataset")
        recorded = config.get("test_samples")
        same = recorded == digest_of_samples(images, recorded)
        return "" if same else "other images" if dataset in (None, self.data.name) else dataset


def _about_cache(cache: TeacherCache | None) -> dict[str, object]:
    """Return the entries of "about" on the teacher whose logits a cache has: its network, path and images."""
    if cache is None:
        return {}
    source = cache.about.get("source") or {}
    known = {name: source[name] for name in source if name.startswith("teacher")}
    return {**known, "teacher_cache": str(cache.path.absolute())}


def _normalisation(views: Views) -> Normalisation:
    return Normalisation(views.mean, views.std)


def _is_finished(run: PlannedRun) -> bool:
    return (run.folder / "summary.json").exists()


def _terminate_with_parent() -> None:
    """Terminate this pool worker when its parent process ends. Otherwise it would train on as an orphan."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _call_until(deadline: float | None, work: Callable[[], None]) -> None:
    """Call `work` and interrupt it at the deadline, as Ctrl-C does. Raises KeyboardInterrupt only for Ctrl-C itself.

    Args:
        deadline: a time of `time.monotonic`; None: never interrupt.
        work: the function to call.
    """
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
