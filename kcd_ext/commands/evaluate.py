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

from .. import files, terminal
from ..checks import check_int
from ..data.images import ImageData, load
from ..environment import MOST_THREADS, threads, versions
from ..evaluation import TEMPERATURES, Evaluation, checked_temperatures, evaluate
from ..reports import page, runs
from ..reports.runs import Normalisation
from ..reports.tables import as_text
from ..training.batches import feed_of
from ..training.distributed import accelerator_on
from ..training.fingerprint import digest, digest_of_samples
from ..training.folder import WEIGHTS
from ..training.run import MIN_EVAL_BATCH_SIZE
from ..training.summary import Summary
from . import teachers
from .progress import note
from .report import Report
from .study import REPORT, TEACHER
from .teachers import Teacher
from .threads import Threads, announcement, batch_flops, by_rule

SEED = 0  # of weights that those of a file replace
CANNOT = (
    TypeError,
    ValueError,
    RuntimeError,
    ImportError,
    OSError,
)  # be evaluated: what a run that does not fit raises
# What `load` takes.
DATA = {"spec": str, "size": int | None, "padding": int | None, "flip": bool | None}
DATA |= dict.fromkeys(Normalisation._fields, tuple | None)


@dataclass(frozen=True)
class Evaluate:
    """Measures what finished runs have really distilled, on the test images of each.

    How often student and teacher agree, how far their probabilities and features are apart, how well both are
    calibrated, and which classes have lost. Written to evaluation.json of every run and into its page.
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]")]
    """Folders of kcd distill, kcd teacher or kcd demo, or a folder of such folders."""
    teacher: str | None = None
    """The folder of a trained run, or a file of weights. None: the teacher that the run was distilled from."""
    teacher_network: str | None = None
    """Whose weights --teacher holds. None: what the folder says, else that of the run's own teacher."""
    temperatures: tuple[float, ...] = TEMPERATURES
    """Those at which probabilities are compared, from 0.001 to 1000."""
    layers: Annotated[tuple[str, ...], arg(metavar="[STUDENT=TEACHER ...]")] = ()
    """Layers whose outputs are compared, by their paths in both networks, or penultimate (what goes into the last linear
    layer) or logits. None given: the stages of both, paired from the last one backwards, these two after them."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu or cuda."""
    threads: int | None = None
    """Threads of torch on the CPU. None: one for every 16 GFLOPs of a batch."""

    def run(self) -> None:
        """Checks everything, evaluates, writes and prints a table. Of several runs those that cannot be are left out.

        Networks and data that config.json calls `module:function` are imported, as `kcd distill` has imported them.

        Raises:
            TypeError, ValueError: an option does not fit, a run that was named itself cannot be evaluated, none of those in
                a folder can, or a file that the page needs is damaged; nothing is written then.
            FileExistsError: another command is running in a folder.
            OSError: a file cannot be read or written.
        """
        pairs = self._checked()
        asked: dict[Path, Path] = {}
        pages = self._pages(asked)
        with ExitStack() as stack:
            for home in pages:
                stack.enter_context(files.alone_in(home))
            plans, left_out = self._plans(list(asked.values()))
            _check_targets(pages, plans)
            for line in dict.fromkeys(line for plan in plans for line in plan.of_teacher.told(plan.data)):
                note(line)
            device = stack.enter_context(accelerator_on(self.device, "no")).device
            found: list[tuple[_Plan, Evaluation, Threads]] = []
            for plan in plans:
                try:
                    chosen = Threads(self.threads) if self.threads is not None else by_rule(plan.flops(device), "batch")
                    with threads(chosen.count):
                        found.append((plan, plan.evaluated(device, self.temperatures, pairs), chosen))
                except CANNOT as error:
                    left_out.append(self._left_out(plan.run.folder, error))
            if not found:
                raise ValueError(f"there is nothing to evaluate: {left_out[0]}")
            if line := announcement((_shown(plan.run.folder), chosen) for plan, _, chosen in found):
                note(line)
            _check_targets(pages, [plan for plan, *_ in found])
            for plan, evaluation, chosen in found:
                plan.write(evaluation, chosen.count)
            done = {plan.run.folder.resolve() for plan, *_ in found}
            pages = {home: held for home, held in pages.items() if done & {folder.resolve() for folder in held}}
            whole = {home: _write_page(home / REPORT[0], folders) for home, folders in pages.items()}
            summaries = [plan.named() for plan, *_ in found]
        terminal.show(*as_text(page.evaluation_table(summaries)), "")
        terminal.show(*page.notes_on_teachers(summaries), *(f"left out: {note}" for note in left_out))
        for home, has_column in whole.items():
            older = "" if has_column else " (an older page, whose table of results kcd report alone makes anew)"
            terminal.show(f"report: {home / REPORT[0]}{older}")

    def _pages(self, asked: dict[Path, Path]) -> dict[Path, list[Path]]:
        """The runs by the folder that has their page; `asked` takes those to be evaluated, each once.

        A page that is there already and shows one of them too, as that of all seeds does, is among these.
        """
        pages: dict[Path, list[Path]] = {}
        for path in self.runs:
            pages |= runs.pages(path)
        for folders in pages.values():
            for folder in folders:
                asked.setdefault(folder.resolve(), folder)
        known = {home.resolve() for home in pages}
        for folder in asked.values():
            for home in runs.homes(folder):
                if (home / REPORT[0]).exists() and home.resolve() not in known:
                    known.add(home.resolve())
                    pages[home] = runs.find(home)
        return pages

    def _checked(self) -> list[tuple[str, str]] | None:
        """The pairs of layers; raises TypeError or ValueError for what takes no run to find out."""
        checked_temperatures(self.temperatures)
        if not self.runs:
            raise ValueError("kcd evaluate needs the folder of a run at least")
        if self.teacher_network is not None and self.teacher is None:
            raise ValueError(f"teacher_network={self.teacher_network!r} has no effect without teacher")
        if self.threads is not None:
            check_int("threads", self.threads, 1, MOST_THREADS)
        for text in self.layers:
            if text.count("=") != 1:
                raise ValueError(f"layers must be as STUDENT=TEACHER, a path in each network, got {text!r}")
        return [tuple(text.split("=")) for text in self.layers] or None

    def _plans(self, folders: Sequence[Path]) -> tuple[list["_Plan"], list[str]]:
        """What is to be done; and what there is nothing to do for, and why.

        Raises ValueError where that was named itself, not found in a folder of several, or where there is nothing else.
        """
        loaded, found = cache(_loaded), cache(teachers.find)  # runs of several seeds share both
        plans, left_out = [], []
        for folder in folders:
            run = runs.read(folder)
            try:
                plans.append(self._plan(run, loaded, found))
            except CANNOT as error:
                left_out.append(self._left_out(folder, error))
        if not plans:
            raise ValueError(f"there is nothing to evaluate: {left_out[0]}")
        return plans, left_out

    def _left_out(self, folder: Path, error: Exception) -> str:
        """Which run, and why, in one line. Raises it as a ValueError where the run was named itself."""
        why = str(error).partition("\n")[0]
        told = f"{_shown(folder)}: {why}"
        if folder in self.runs:
            raise ValueError(told) from error
        return told

    def _plan(self, run: runs.Run, loaded: Callable, found: Callable) -> "_Plan":
        """Raises one of CANNOT where the run cannot be evaluated."""
        weights, told = run.folder / WEIGHTS, _Told.by(run)
        if run.summary is None or run.unfinished or not weights.is_file():
            raise ValueError(f"is no finished run: it has no {WEIGHTS}, or fewer epochs than it was to have")
        if self.teacher is None and told.digest is None:
            raise ValueError("was distilled from no teacher: --teacher says whom to compare its student with")
        data = loaded(**told.checked_data())
        if told.test_samples != digest_of_samples(data.test):
            raise ValueError(f"was tested on other images than those that {told.data['spec']!r} holds now")
        runs.check_weights(run.folder)
        student = Teacher(told.checked_student(), teachers.read(weights).tensors, weights)
        if self.teacher is None:
            teacher = _own_teacher(run.folder, told, data, found)
        else:
            teacher = found(self.teacher, self.teacher_network, told.teacher_network)
            if teacher.origin is None:
                raise ValueError(
                    f"teacher must be the folder of a trained run or a file of weights, got {self.teacher!r}"
                )
        network = teacher.build(data, SEED)
        if told.teacher_normalisation is not None and digest(network.state_dict()) == told.digest:
            teacher = replace(teacher, normalisation=told.teacher_normalisation)  # given images as in training
            network = teacher.build(data, SEED)
        return _Plan(run, data, student, teacher, student.build(data, SEED), network)


@dataclass(frozen=True)
class _Told:
    """What a run's config.json says; nothing of it was tried yet."""

    student: object
    data: Mapping[str, object]
    test_samples: object
    digest: str | None
    """Of the teacher's weights; None: there was no teacher."""
    teacher_network: str | None
    teacher_path: str | None
    teacher_normalisation: Normalisation | None
    """Of the images that the teacher was given; None: a run of before it was recorded, or no teacher."""

    @classmethod
    def by(cls, run: runs.Run) -> "_Told":
        """Raises ValueError where the file is damaged."""
        config = run.config
        about = config.get("about") or {}
        network, path = about.get("teacher_network"), about.get("teacher_path")
        teacher = about.get("teacher")
        if network is None and isinstance(teacher, str):  # a run of before there were these two
            network, _, path = teacher.partition(" of ")
        texts = {"teacher": config.get("teacher"), "teacher_network": network or None, "teacher_path": path or None}
        for name, text in texts.items():
            if text is not None and not isinstance(text, str):
                raise ValueError(f"config.json is damaged: {name} must be text, got {text!r:.40}")
        data, path = about.get("data") or {}, run.folder / "config.json"
        found = about.get("teacher_normalisation")
        given = None if found is None else runs.checked_normalisation(path, found)
        if data.get("mean") is not None:
            data = {**data, **runs.checked_normalisation(path, data)._asdict()}
        return cls(about.get("student"), data, config.get("test_samples"), *texts.values(), given)

    def checked_student(self) -> str:
        """The student's network. Raises ValueError where it is not told."""
        if not isinstance(self.student, str):
            raise ValueError("config.json does not say which network was trained, so its weights cannot be read")
        return self.student

    def checked_data(self) -> dict[str, object]:
        """What `load` takes. Raises ValueError where it is something else."""
        if "spec" not in self.data:
            raise ValueError(
                "config.json does not say which images the run was tested on: kcd_ext.evaluation.evaluate takes networks and "
                "images themselves"
            )
        for name, value in self.data.items():
            if name not in DATA or not isinstance(value, DATA[name]):
                raise ValueError(f"config.json is damaged: data must not hold {name}={value!r:.40}")
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
        """Raises as `evaluate` does."""
        return evaluate(
            self.student.to(device),
            self.teacher.to(device),
            feed_of(self.data.test, None, device, 0).eval_batches(MIN_EVAL_BATCH_SIZE),
            temperatures=temperatures,
            layers=layers,
            class_names=self.data.class_names,
        )

    def flops(self, device: torch.device) -> int | None:
        """Return those that the CPU does for a batch."""
        return batch_flops([(1, self.student), (1, self.teacher)], self.data.test, MIN_EVAL_BATCH_SIZE, device.type)

    def write(self, evaluation: Evaluation, threads: int) -> None:
        content = {
            "data": self.data.name,
            "test_samples": digest_of_samples(self.data.test),
            "student_network": self.of_student.network,
            "student": digest(self.student.state_dict()),
            "teacher_network": self.of_teacher.network,
            "teacher_path": str(self.of_teacher.origin),
            "teacher": digest(self.teacher.state_dict()),
            "run": runs.student_of(self.run.folder),
            "evaluation": evaluation.as_json(),
            "threads": threads,
            "versions": versions(),
        }
        files.write_json(self.run.folder / runs.EVALUATION, content)

    def named(self) -> Summary:
        """What was written, by its folder, which tells runs of all commands apart."""
        return runs.evaluated(replace(self.run.summary, method=_shown(self.run.folder)), self.run.folder)


def _shown(folder: Path) -> str:
    """The folder as it was given; by its own name where that was `.` or `..`."""
    return folder.resolve().name if folder.name in ("", "..") else str(folder)


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
        f"the teacher that it was distilled from (weights {told.digest}) is not found, {where}: --teacher says which"
    )


def _check_targets(pages: Mapping[Path, Sequence[Path]], plans: Sequence[_Plan]) -> None:
    """Raises ValueError where what is about to be written cannot be, or the pages cannot show what is there already."""
    planned = {plan.run.folder.resolve() for plan in plans}
    for home, folders in pages.items():
        if (home / REPORT[0]).exists():
            page.check_page(home / REPORT[0])
        elif (home / REPORT[1]).is_dir():
            raise ValueError(f"{home / REPORT[1]} is no file")
        for folder in folders:
            if folder.resolve() not in planned:
                _shown_on_page(folder)
            elif (folder / runs.EVALUATION).is_dir():
                raise ValueError(f"{folder / runs.EVALUATION} is no file")


def _shown_on_page(folder: Path) -> Summary | None:
    run = runs.read(folder)
    return None if run.summary is None else runs.evaluated(run.summary, folder)


def _write_page(target: Path, folders: Sequence[Path]) -> bool:
    """Puts the evaluations of these runs into their page, which is made where there is none.

    Says whether its table of results has them too, which one that an older version has made has not.
    """
    if not target.exists():
        Report((target.parent,), target).write()
        return True
    summaries = [summary for summary in map(_shown_on_page, folders) if summary is not None]
    return page.place_evaluations(target, summaries)
