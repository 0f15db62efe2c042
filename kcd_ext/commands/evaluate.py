"""`kcd evaluate`: finished students beside their teachers, on images that neither was trained on."""

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, TypeVar

import torch
from torch import nn
from tyro.conf import Positional, arg

from .. import files, terminal
from ..checks import check_int
from ..data.images import ImageData, load
from ..describe import one_line
from ..environment import MOST_THREADS, threads, versions
from ..evaluation import TEMPERATURES, Evaluation, checked_temperatures, evaluate
from ..reports import page, runs, tables
from ..reports.comparison import compare
from ..reports.tables import as_text
from ..training.batches import feed_of
from ..training.distributed import accelerator_on
from ..training.fingerprint import digest, digest_of_samples
from ..training.folder import WEIGHTS
from ..training.run import MIN_EVAL_BATCH_SIZE
from . import teachers
from .progress import note
from .study import REPORT
from .teachers import Teacher
from .threads import Threads, announcement, batch_flops, by_rule

Result = TypeVar("Result")

SEED = 0  # of weights that those of a file replace
CANNOT = (TypeError, ValueError, RuntimeError, ImportError, OSError)  # what a run that cannot be evaluated raises


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
        """Check everything, evaluate, write and print a table. Of several runs those that cannot be evaluated are left out.

        Networks and data that config.json calls `module:function` are imported, as `kcd distill` has imported them.

        Raises:
            TypeError, ValueError: an option does not fit, a run that was named itself cannot be evaluated, none of those in
                a folder can, or a file that a report needs is damaged; nothing is written then.
            FileExistsError: another command is running in a folder.
            OSError: a file cannot be read or written.
        """
        layers = self._layers()
        asked = list({folder.resolve(): folder for path in self.runs for folder in runs.find(path)}.values())
        homes = self._homes(asked)
        left_out: list[str] = []
        with ExitStack() as stack:
            for home in homes:
                stack.enter_context(files.folder_lock(home))
            loaded, found = cache(load), cache(teachers.find)  # runs of several seeds share both
            plans = self._attempted(asked, lambda folder: self._plan(folder, loaded, found), left_out)
            homes = _checked_homes(homes, plans)
            for line in dict.fromkeys(line for plan in plans.values() for line in plan.source.notes_on(plan.data)):
                note(line)
            device = stack.enter_context(accelerator_on(self.device, "no")).device
            done = self._attempted(plans, lambda f: plans[f].evaluated(device, self.temperatures, layers), left_out)
            if line := announcement((_shown(folder), chosen) for folder, (_, chosen) in done.items()):
                note(line)
            homes = _checked_homes(homes, done)
            for folder, (evaluation, chosen) in done.items():
                plans[folder].write(evaluation, chosen.count)
            for home in homes:
                page.write(home / REPORT[0], [home])
            summaries = [replace(runs.with_evaluation(plans[each].run), method=_shown(each)) for each in done]
        terminal.show(*as_text(tables.evaluation_table(summaries)), "")
        terminal.show(*tables.notes_on_teachers(summaries), *(f"left out: {reason}" for reason in left_out))
        terminal.show(*(f"report: {home / REPORT[0]}" for home in homes))

    def _layers(self) -> list[tuple[str, str]] | None:
        """Return the pairs of layers. Raise TypeError or ValueError for an option that is wrong whatever the runs are."""
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

    def _homes(self, asked: Sequence[Path]) -> list[Path]:
        """Return the folders whose reports are to be written: of what was named, and of other reports that show a run of it."""
        homes = {home.resolve(): home for path in self.runs for home in runs.runs_by_report(path)}
        for home in (home for folder in asked for home in runs.report_dirs(folder)):
            if (home / REPORT[0]).exists():
                homes.setdefault(home.resolve(), home)
        return list(homes.values())

    def _attempted(
        self, folders: Iterable[Path], step: Callable[[Path], Result], left_out: list[str]
    ) -> dict[Path, Result]:
        """Return the results of a step by folder. Where it cannot be taken, `left_out` gets the reason, in one line.

        Raises ValueError where it cannot for a run that was named itself, not found in a folder of several, or for any.
        """
        results = {}
        for folder in folders:
            try:
                results[folder] = step(folder)
            except CANNOT as error:
                left_out.append(f"{_shown(folder)}: {one_line(error)}")
                if folder in self.runs:
                    raise ValueError(left_out[-1]) from error
        if not results:
            raise ValueError(f"there is nothing to evaluate: {left_out[0]}")
        return results

    def _plan(self, folder: Path, loaded: Callable[..., ImageData], found: Callable[..., Teacher]) -> "_Plan":
        """Raise one of CANNOT where the run in a folder cannot be evaluated."""
        run, weights = runs.read(folder), folder / WEIGHTS
        metadata = run.metadata
        if run.summary is None or run.unfinished or not weights.is_file():
            raise ValueError(f"is no finished run: it has no {WEIGHTS}, or fewer epochs than it was to have")
        if self.teacher is None and metadata.teacher is None:
            raise ValueError("was distilled from no teacher: --teacher says whom to compare its student with")
        if "spec" not in metadata.data:
            raise ValueError(
                "config.json does not say which images the run was tested on: kcd_ext.evaluation.evaluate takes networks and "
                "images themselves"
            )
        data = loaded(**metadata.data)
        if metadata.config.get("test_samples") != digest_of_samples(data.test):
            raise ValueError(f"was tested on other images than those that {metadata.data['spec']!r} holds now")
        runs.check_weights(folder)
        if metadata.student is None:
            raise ValueError("config.json does not say which network was trained, so its weights cannot be read")
        student = Teacher(metadata.student, teachers.read(weights).tensors, weights)
        if self.teacher is None:
            teacher = _own_teacher(run, data, found)
        else:
            teacher = found(self.teacher, self.teacher_network, metadata.teacher_network)
            if teacher.origin is None:
                raise ValueError(
                    f"teacher must be the folder of a trained run or a file of weights, got {self.teacher!r}"
                )
        network = teacher.build(data, SEED)
        if metadata.teacher_normalisation is not None and digest(network.state_dict()) == metadata.teacher:
            teacher = replace(teacher, normalisation=metadata.teacher_normalisation)  # given images as in training
            network = teacher.build(data, SEED)
        return _Plan(run, data, teacher, student.build(data, SEED), network, self.threads)


@dataclass(frozen=True)
class _Plan:
    """A student and its teacher, ready to be evaluated; nothing was computed yet."""

    run: runs.Run
    data: ImageData
    source: Teacher
    student: nn.Module
    teacher: nn.Module
    threads: int | None

    def evaluated(
        self, device: torch.device, temperatures: Sequence[float], layers: Sequence[tuple[str, str]] | None
    ) -> tuple[Evaluation, Threads]:
        """Return the evaluation, and the threads by which it was computed. Raise as `evaluate` does."""
        if self.threads is not None:
            chosen = Threads(self.threads)
        else:
            networks = [(1, self.student), (1, self.teacher)]
            chosen = by_rule(batch_flops(networks, self.data.test, MIN_EVAL_BATCH_SIZE, device.type), "batch")
        with threads(chosen.count):
            evaluation = evaluate(
                self.student.to(device),
                self.teacher.to(device),
                feed_of(self.data.test, None, device, 0).eval_batches(MIN_EVAL_BATCH_SIZE),
                temperatures=temperatures,
                layers=layers,
                class_names=self.data.class_names,
            )
        return evaluation, chosen

    def write(self, evaluation: Evaluation, threads: int) -> None:
        """Write evaluation.json."""
        content = {
            "data": self.data.name,
            "test_samples": digest_of_samples(self.data.test),
            "student_network": self.run.metadata.student,
            "student": digest(self.student.state_dict()),
            "teacher_network": self.source.network,
            "teacher_path": str(self.source.origin),
            "teacher": digest(self.teacher.state_dict()),
            "run": runs.fingerprint(self.run.folder),
            "evaluation": evaluation.as_json(),
            "threads": threads,
            "versions": versions(),
        }
        files.write_json(self.run.folder / runs.EVALUATION, content)


def _shown(folder: Path) -> str:
    """Return the folder as it was given; its own name where that was `.` or `..`."""
    return folder.resolve().name if folder.name in ("", "..") else str(folder)


def _own_teacher(run: runs.Run, data: ImageData, found: Callable[..., Teacher]) -> Teacher:
    """Return the teacher that a run was distilled from. Raise ValueError where none of its places has the weights."""
    metadata, looked = run.metadata, []
    places = runs.teacher_dirs(run.folder, metadata.teacher_path)
    for path in places:
        if not (path / WEIGHTS if path.is_dir() else path).is_file():
            continue
        try:
            teacher = found(str(path), metadata.teacher_network, None)
            has = digest(teacher.build(data, SEED).state_dict())
        except ValueError as error:
            looked.append(str(error))
            continue
        if has == metadata.teacher:
            return teacher
        looked.append(f"{path} has other weights ({has})")
    where = "; ".join(looked) or f"none is in {', '.join(map(str, places))}"
    raise ValueError(
        f"the teacher that it was distilled from (weights {metadata.teacher}) is not found, {where}: --teacher says which"
    )


def _checked_homes(homes: Sequence[Path], evaluated: Collection[Path]) -> list[Path]:
    """Return the folders whose reports show one of these runs.

    Raises ValueError where what is about to be written cannot be, or such a report cannot show what is there already.
    """
    outdated = {folder.resolve() for folder in evaluated}
    homes = [home for home in homes if outdated & {folder.resolve() for folder in runs.find(home)}]
    for target in [*(f / runs.EVALUATION for f in evaluated), *(home / name for home in homes for name in REPORT)]:
        if target.is_dir():
            raise ValueError(f"{target} is no file")
    for home in homes:
        compare([home], outdated)
    return homes
