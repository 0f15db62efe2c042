"""`kcd evaluate`: finished students beside their teachers, on images that neither was trained on."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated

import torch
from torch import nn
from tyro.conf import Positional, arg

from ..condensation.checks import whole
from ..data.images import ImageData, load
from ..environment import versions
from ..evaluation import TEMPERATURES, Evaluation, evaluate
from . import report, runs, storage, teachers
from .batches import feed_of
from .compare import Report
from .device import accelerator_on, threads
from .identity import digest, digest_of_samples
from .job import REPORT, TEACHER
from .summary import Summary, as_text
from .teachers import WEIGHTS, Teacher
from .trainer import EVALUATED

SEED = 0  # of weights that those of a file replace
DATA = {"spec": str, "size": int | None, "padding": int | None, "flip": bool | None}  # what `load` takes


@dataclass(frozen=True)
class Evaluate:
    """Measures what finished runs have really distilled, on the test images of each.

    How often student and teacher agree, how far their probabilities and features are apart, how well both are
    calibrated, and which classes have lost. Written to evaluation.json of every run and into its report.
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]")]
    """Folders of kcd distill, kcd teacher or kcd demo, or a folder of such folders."""
    teacher: str | None = None
    """The folder of a trained run, or a file of weights. None: the teacher that the run was distilled from."""
    teacher_network: str | None = None
    """Whose weights --teacher holds. None: what the folder says, else that of the run's own teacher."""
    temperatures: tuple[float, ...] = TEMPERATURES
    """Those at which probabilities are compared."""
    layers: Annotated[tuple[str, ...], arg(metavar="[STUDENT=TEACHER ...]")] = ()
    """Layers whose outputs are compared, by their paths in both networks. None given: the stages of both, paired from
    the last one backwards, the features before the classifier, and the logits."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu or cuda."""
    threads: int | None = None
    """Threads of torch on the CPU. None: as many as torch takes."""

    def run(self) -> None:
        """Checks everything, evaluates, writes and prints a table.

        Networks and data that config.json calls `module:function` are imported, as `kcd distill` has imported them.

        Raises:
            TypeError, ValueError, RuntimeError, ImportError: an option or a run does not fit; nothing is written then.
            FileExistsError: another command is running in a folder.
            OSError: a file cannot be read or written.
        """
        pairs = self._checked()
        pages: dict[Path, list[Path]] = {}
        for path in self.runs:
            pages |= runs.pages(path)
        with ExitStack() as stack:
            for home in pages:
                stack.enter_context(storage.alone_in(home))
                if (home / REPORT[0]).exists():
                    report.check_page(home / REPORT[0])
            plans, left_out = self._plans([folder for folders in pages.values() for folder in folders])
            stack.enter_context(threads(self.threads))
            device = stack.enter_context(accelerator_on(self.device, "no")).device
            found = [plan.evaluated(device, self.temperatures, pairs) for plan in plans]
            for plan, evaluation in zip(plans, found, strict=True):
                plan.write(evaluation)
            done = {plan.run.folder.resolve() for plan in plans}
            pages = {home: held for home, held in pages.items() if done & {folder.resolve() for folder in held}}
            for home, folders in pages.items():
                _write_page(home / REPORT[0], folders)
        summaries = [plan.named(evaluation) for plan, evaluation in zip(plans, found, strict=True)]
        print(as_text(report.evaluation_table(summaries)), end="\n\n")
        for note in left_out:
            print(f"left out: {note}")
        for home in pages:
            print(f"report: {home / REPORT[0]}")

    def _checked(self) -> list[tuple[str, str]] | None:
        """The pairs of layers; raises TypeError or ValueError for what takes no run to find out."""
        if not self.runs:
            raise ValueError("kcd evaluate needs the folder of a run at least")
        if self.teacher_network is not None and self.teacher is None:
            raise ValueError(f"teacher_network={self.teacher_network!r} has no effect without teacher")
        if self.threads is not None:
            whole("threads", self.threads, 1)
        for text in self.layers:
            if text.count("=") != 1:
                raise ValueError(f"layers must be as STUDENT=TEACHER, a path in each network, got {text!r}")
        return [tuple(text.split("=")) for text in self.layers] or None

    def _plans(self, folders: Sequence[Path]) -> tuple[list["_Plan"], list[str]]:
        """What is to be done, once for every run; and what there is nothing to do for, and why.

        Raises ValueError where that was named itself, not found in a folder of several, or where there is nothing else.
        """
        unique: dict[Path, Path] = {}
        for folder in folders:
            unique.setdefault(folder.resolve(), folder)
        loaded, found = cache(_loaded), cache(teachers.find)  # runs of several seeds share both
        plans, left_out = [], []
        for folder in unique.values():
            run, told = runs.read(folder), _Told.by(folder)
            why = self._why_not(run, told)
            if not why:
                plans.append(self._plan(run, told, loaded, found))
            elif folder in self.runs:
                raise ValueError(f"{folder} {why}")
            else:
                left_out.append(f"{folder} {why}")
                runs.evaluation_of(folder)  # damaged, it would keep the page from being written
        if not plans:
            raise ValueError(f"there is nothing to evaluate: {left_out[0]}")
        return plans, left_out

    def _why_not(self, run: runs.Run, told: "_Told") -> str:
        if run.summary is None or run.unfinished or not (run.folder / WEIGHTS).is_file():
            return f"is no finished run: it has no {WEIGHTS}, or fewer epochs than it was to have"
        if self.teacher is None and told.digest is None:
            return "was distilled from no teacher: --teacher says whom to compare its student with"
        return ""

    def _plan(self, run: runs.Run, told: "_Told", loaded: Callable, found: Callable) -> "_Plan":
        data = loaded(**told.checked_data())
        if told.test_samples != digest_of_samples(data.test):
            raise ValueError(f"{run.folder} was tested on other images than those that {told.data['spec']!r} holds now")
        weights = run.folder / WEIGHTS
        student = Teacher(told.checked_student(), teachers.read(weights), weights)
        if self.teacher is None:
            teacher = _own_teacher(run.folder, told, data, found)
        else:
            teacher = found(self.teacher, self.teacher_network, told.teacher_network)
            if teacher.origin is None:
                raise ValueError(
                    f"teacher must be the folder of a trained run or a file of weights, got {self.teacher!r}"
                )
        return _Plan(run, data, student, teacher, student.build(data, SEED), teacher.build(data, SEED))


@dataclass(frozen=True)
class _Told:
    """What a run's config.json says; nothing of it was tried yet."""

    path: Path
    student: object
    data: Mapping[str, object]
    test_samples: object
    digest: str | None
    """Of the teacher's weights; None: there was no teacher."""
    teacher_network: str | None
    teacher_path: str | None

    @classmethod
    def by(cls, folder: Path) -> "_Told":
        """Raises ValueError where the file is damaged."""
        config = runs.config_of(folder)
        about = config.get("about") or {}
        network, path = about.get("teacher_network"), about.get("teacher_path")
        teacher = about.get("teacher")
        if network is None and isinstance(teacher, str):  # a run of before there were these two
            network, _, path = teacher.partition(" of ")
        texts = {"teacher": config.get("teacher"), "teacher_network": network or None, "teacher_path": path or None}
        for name, text in texts.items():
            if text is not None and not isinstance(text, str):
                raise ValueError(f"{folder / 'config.json'} is damaged: {name} must be text, got {text!r:.40}")
        data = about.get("data") or {}
        return cls(folder / "config.json", about.get("student"), data, config.get("test_samples"), *texts.values())

    def checked_student(self) -> str:
        """The student's network. Raises ValueError where it is not told."""
        if not isinstance(self.student, str):
            raise ValueError(f"{self.path} does not say which network was trained, so its weights cannot be read")
        return self.student

    def checked_data(self) -> dict[str, object]:
        """What `load` takes. Raises ValueError where it is something else."""
        if "spec" not in self.data:
            raise ValueError(f"{self.path} does not say which images the run was tested on")
        for name, value in self.data.items():
            if name not in DATA or not isinstance(value, DATA[name]):
                raise ValueError(f"{self.path} is damaged: data must not hold {name}={value!r:.40}")
        return dict(self.data)


@dataclass(frozen=True)
class _Plan:
    """A student and its teacher, ready to be evaluated; nothing was computed yet."""

    run: runs.Run
    data: ImageData
    of_student: Teacher
    of_teacher: Teacher
    student: nn.Module
    teacher: nn.Module

    def evaluated(
        self, device: torch.device, temperatures: Sequence[float], layers: Sequence[tuple[str, str]] | None
    ) -> Evaluation:
        """Raises as `evaluate` does, and names the run."""
        try:
            return evaluate(
                self.student.to(device),
                self.teacher.to(device),
                feed_of(self.data.test, None, device, 0).plain(EVALUATED),
                temperatures=temperatures,
                layers=layers,
                class_names=self.data.class_names,
            )
        except RuntimeError as error:  # of the layers: what does not fit is bad input here
            raise ValueError(f"{self.run.folder}: {error}") from error

    def write(self, evaluation: Evaluation) -> None:
        content = {
            "data": self.data.name,
            "test_samples": digest_of_samples(self.data.test),
            "student_network": self.of_student.network,
            "student": digest(self.student.state_dict()),
            "teacher_network": self.of_teacher.network,
            "teacher_path": str(self.of_teacher.origin),
            "teacher": digest(self.teacher.state_dict()),
            "evaluation": evaluation.as_json(),
            "versions": versions(),
        }
        storage.write_json(self.run.folder / runs.EVALUATION, content)

    def named(self, evaluation: Evaluation) -> Summary:
        """By its folder, which tells runs of all commands apart."""
        return replace(self.run.summary, method=str(self.run.folder), evaluation=evaluation)


def _loaded(**options: object) -> ImageData:
    return load(options.pop("spec"), **options)


def _own_teacher(folder: Path, told: _Told, data: ImageData, found: Callable) -> Teacher:
    """The teacher that a run was distilled from: beside it, or where config.json says it was.

    Raises ValueError where none of these has its weights.
    """
    places: dict[Path, str | None] = {folder / TEACHER: None, folder.resolve().parent / TEACHER: None}
    if told.teacher_path is not None:
        places[Path(told.teacher_path)] = told.teacher_network
    looked = []
    for path, network in places.items():
        weights = path / WEIGHTS if path.is_dir() else path
        if not weights.is_file():
            continue
        try:
            teacher = found(str(path), network, None)
            has = digest(teacher.build(data, SEED).state_dict())
        except ValueError as error:
            looked.append(str(error))
            continue
        if has == told.digest:
            return teacher
        looked.append(f"{path} has other weights ({has})")
    where = "; ".join(looked) or f"none is in {', '.join(map(str, places))}"
    raise ValueError(
        f"{folder}: the teacher that it was distilled from (weights {told.digest}) is not found, {where}: --teacher says which"
    )


def _write_page(page: Path, folders: Sequence[Path]) -> None:
    """Puts the evaluations of these runs into their page, which is made where there is none."""
    if not page.exists():
        Report((page.parent,), page).write()
        return
    found = [runs.read(folder) for folder in folders]
    summaries = [replace(run.summary, evaluation=runs.evaluation_of(run.folder)) for run in found if run.summary]
    report.place_evaluations(page, summaries)
