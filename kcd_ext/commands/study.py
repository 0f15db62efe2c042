"""The runs of a command: a student by every seed and, where nobody has trained it, their teacher first."""

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import torch

from .. import files, processes, terminal
from ..data.images import ImageData, ImageSet
from ..reports import page, ranking, runs
from ..reports.runs import TEACHER, Normalisation
from ..reports.tables import as_text
from ..training.device import threads
from ..training.folder import ENTRIES, WEIGHTS
from ..training.identity import check_same, digest_of_samples
from ..training.loop import check_run, distill
from ..training.recipe import Recipe
from ..training.summary import Summary, results
from . import teachers
from .progress import Bar, bar_over, note, warnings_as_notes
from .teachers import Teacher
from .threads import Threads, announcement, choose, step_flops

REPORT = ("report.html", "report.png")


@dataclass(frozen=True)
class Job:
    """Everything is known, nothing is trained or written yet."""

    command: str
    options: Mapping[str, object]
    """The command's own, JSON."""
    data: ImageData
    data_options: Mapping[str, object]
    """What `load` made it of: spec, size."""
    student: str
    """A network by name."""
    teacher: Teacher | None
    teacher_recipe: Recipe | None
    """How the teacher is trained, if it is not yet."""
    recipes: Sequence[Recipe]
    """One for each seed."""
    output: Path
    """The folder of the run or, of several seeds, of their folders."""
    resume: bool
    threads: int | None
    """That the user asks for."""
    chosen: Mapping[Path, Threads] = field(default_factory=dict)
    """Those of the run in each folder, once `checked`."""

    def checked(self) -> "Job":
        """Find out all that takes no training to find out; nothing is written. Return the job, its threads chosen.

        Raises:
            TypeError, ValueError, ImportError: data, networks, method and recipe do not fit each other.
            FileExistsError: `output` holds a run and is not to be resumed, or something else.
        """
        self._check_output()
        recipe, data = self.recipes[0], self.data
        with threads(self.threads or 1), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the runs will warn of the same
            if self._trains_teacher:
                try:
                    check_run(self._teacher(), None, data.train, data.test, self.teacher_recipe)
                except (TypeError, ValueError) as error:
                    raise type(error)(
                        f"teacher {self.teacher}, which is trained first as a student is: {error}"
                    ) from error
            check_run(self._student(recipe.seed), self._teacher(), data.train, data.test, recipe)
        return replace(self, chosen=self._choose_threads())

    def run(self) -> None:
        """Trains, writes the report and prints the table.

        Raises:
            FileExistsError: another command is running in `output`, or has left something there since `check`.
            OSError: a file cannot be written; what was finished before is intact.
            KeyboardInterrupt: with a message that says how to go on.
        """
        first = processes.rank() == 0
        with files.folder_lock(self.output) if first else nullcontext():
            if first:
                self._check_output()
                if self.resume and not self._taken():
                    note(f"nothing to resume in {self.output}: starting anew")
                for line in [] if self.teacher is None else self.teacher.told(self.data):
                    note(line)
                if line := announcement((recipe.label, self.chosen[folder]) for _, recipe, folder in self._runs()):
                    note(line)
            try:
                with warnings_as_notes():
                    summaries = list(self._summaries())
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"--resume goes on with what is in {self.output}") from None
            if first:
                self._report(summaries)

    def _choose_threads(self) -> dict[Path, Threads]:
        """Choose the threads of the run in each folder. Raises ValueError where a config.json there is damaged."""
        if self.threads is not None:
            return {folder: Threads(self.threads) for _, _, folder in self._runs()}
        teacher, recipe = self._teacher(), self.recipes[0]

        def flops(network: torch.nn.Module, of: torch.nn.Module | None) -> int | None:
            return step_flops(network, of, self.data.train, recipe.batch_size, recipe.device)

        costs = {recipe.label: flops(self._student(recipe.seed), teacher)}  # of every seed
        if self._trains_teacher:
            costs[TEACHER] = flops(teacher, None)
        return choose({folder: recipe.label for _, recipe, folder in self._runs()}, costs)

    def _check_output(self) -> None:
        for path in (self.output, *self.output.parents):
            if path.is_symlink() and not path.exists():
                raise FileExistsError(f"output {path} is a link to {os.readlink(path)}, which is not there")
        if self.output.exists() and not self.output.is_dir():
            raise FileExistsError(f"output {self.output} is a file: choose another --output")
        taken = self._taken()
        if taken and not self.resume:
            raise FileExistsError(
                f"output {self.output} holds a {taken[0]} already: --resume goes on with a run, or choose another --output"
            )
        alone, several = (self.output / "config.json").exists(), self._seed_folders()
        if several if len(self.recipes) == 1 else alone:
            held = "several seeds" if several else "a single run"
            raise FileExistsError(
                f"output {self.output} holds {held}: give the same --seeds, or choose another --output"
            )
        others = [name for name in several if name not in [folder.name for _, _, folder in self._runs()]]
        if others:
            raise FileExistsError(
                f"output {self.output} holds {others[0]}, which is none of these seeds: give the same --seed and as many "
                "--seeds at least, or choose another --output"
            )
        for network, recipe, folder in self._runs():
            if (folder / "config.json").exists():
                self._check_begun(network, recipe, folder)

    def _check_begun(self, network: str, recipe: Recipe, folder: Path) -> None:
        """Raises ValueError where the run in a folder differs from this one in what is known before there is a teacher."""
        config = runs.metadata_of(folder).config
        there = config.get("about") or {}
        there = {**(there.get("data") or {}), **there, **config}
        here = about(self.command, self.data, self.data_options, network, None)
        facts = {"student": network, **here["data"], "train": len(self.data.train), "test": len(self.data.test)}
        moved = there.get("spec") != facts["spec"]
        if moved and there.get("train_samples") == digest_of_samples(self.data.train):
            del facts["spec"]  # the same images, wherever they lie by now
        facts = {name: fact for name, fact in facts.items() if name in there}  # not all that a library's run need say
        facts |= {"processes": processes.world_size(), "recipe": recipe.as_json()}
        check_same(there, json.loads(json.dumps(facts)), folder)

    def _taken(self) -> list[str]:
        """What is in `output` under a name that this job would write to."""
        names = (*ENTRIES, TEACHER, *REPORT)
        return [name for name in names if (self.output / name).exists()] + self._seed_folders()

    def _seed_folders(self) -> list[str]:
        return sorted(config.parent.name for config in self.output.glob("seed-*/config.json"))

    def _runs(self) -> list[tuple[str, Recipe, Path]]:
        """All that will be: which network, how and in which folder; the teacher's first, if it is to be trained."""
        alone = len(self.recipes) == 1
        students = [(self.student, r, self.output if alone else self.output / f"seed-{r.seed}") for r in self.recipes]
        if not self._trains_teacher:
            return students
        return [(self.teacher.network, self.teacher_recipe, self.output / TEACHER), *students]

    @property
    def _trains_teacher(self) -> bool:
        return self.teacher is not None and self.teacher.origin is None

    def _student(self, seed: int) -> torch.nn.Module:
        return teachers.build(self.student, self.data, seed)

    def _teacher(self) -> torch.nn.Module | None:
        return None if self.teacher is None else self.teacher.build(self.data, self.recipes[0].seed)

    def _summaries(self) -> Iterator[Summary]:
        """Train one after the other: the teacher, if nobody has yet, and a student by every seed. Yield the students'."""
        to_do, found = self._runs(), self.teacher
        teacher_run = self._teacher_run(found.origin) if found is not None and not self._trains_teacher else {}
        with bar_over(len(to_do), self.recipes[0].epochs) as bar:
            if self._trains_teacher:
                network, recipe, folder = to_do.pop(0)
                self._distilled(network, None, recipe, folder, bar, {})
                # As every process finds it, and every later run: the file of the first one.
                found = replace(found, weights=teachers.read(folder / WEIGHTS).tensors, origin=folder)
                teacher_run = runs.fingerprint(folder)
            for network, recipe, folder in to_do:
                yield self._distilled(network, found, recipe, folder, bar, teacher_run)

    def _teacher_run(self, origin: Path) -> dict[str, str]:
        """Return the fingerprint of the teacher's own run, where it is of these images, however normalised; else nothing."""
        if not (origin / "metrics.jsonl").exists():
            return {}
        run, images = runs.read(origin), self.data.test
        own = self.teacher.differing(self.data)
        if own is not None:
            images = ImageSet(images.images, images.labels, replace(images.views, mean=own.mean, std=own.std))
        if run.metadata.config.get("test_samples") == digest_of_samples(images):
            return runs.fingerprint(origin)
        dataset = (run.metadata.config.get("about") or {}).get("dataset")
        of = "other images" if dataset in (None, self.data.name) else dataset
        note(f"warning: teacher {origin} was trained on {of}, not on this {self.data.name}")
        return {}

    def _distilled(
        self,
        network: str,
        teacher: Teacher | None,
        recipe: Recipe,
        folder: Path,
        bar: Bar,
        teacher_run: Mapping[str, str],
    ) -> Summary:
        with threads(self.chosen[folder].count):
            summary = distill(
                teachers.build(network, self.data, recipe.seed),
                None if teacher is None else teacher.build(self.data, recipe.seed),
                self.data.train,
                self.data.test,
                recipe,
                output=folder,
                resume=self.resume,
                progress=bar.begin(f"{recipe.label}, seed {recipe.seed}"),
                about=about(
                    self.command,
                    self.data,
                    self.data_options,
                    network,
                    None if teacher is None else self.teacher,
                    {recipe.label: self.chosen[home].count for _, recipe, home in self._runs()},
                    {"title": f"{recipe.label} on {self.data.name}: {network}", "options": self.options},
                    teacher_run,
                ),
            )
        bar.end()
        if processes.number() == 0:
            ranking.write(folder, summary, self.data.train, self.data.class_names)
        return summary

    def _report(self, summaries: Sequence[Summary]) -> None:
        if len(summaries) > 1:
            seeds = [recipe.seed for recipe in self.recipes]
            files.write_json(self.output / "summary.json", results(self.data.name, seeds, summaries))
        report = page.write(self.output / REPORT[0], [self.output])
        terminal.show(*as_text(report.tables[0]), *report.notes, "", f"report: {self.output / REPORT[0]}")


def about(
    command: str,
    data: ImageData,
    options: Mapping[str, object],
    student: str,
    teacher: Teacher | None,
    threads: Mapping[str, int] = MappingProxyType({}),
    page: Mapping[str, object] = MappingProxyType({}),
    teacher_run: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, object]:
    """What config.json says of a run, so that it can be read without its command: `load(**data)` gives its images.

    "teacher_path" is where the teacher's weights were read; None where the command itself has trained them, beside the run.
    "teacher_normalisation" is that of the images which the teacher was given. "threads" are those of all runs of the command, by
    label, in their order: one that is interrupted may go on elsewhere before it has begun them all. "teacher_run" is the
    fingerprint of the teacher's own run on these images. "page" is what reports show as it is: "title", "options" and more.
    """
    views, trained = data.train.views, teacher is not None and teacher.origin is not None
    own = Normalisation(views.mean, views.std)
    alike = own == Normalisation(data.test.views.mean, data.test.views.std)  # else no two numbers give both parts again
    given = None if teacher is None else teacher.differing(data) or own
    return {
        "command": command,
        "dataset": data.name,
        "data": {
            **{"size": None, **options, "padding": views.padding, "flip": views.flip},
            **{name: list(numbers) if alike else None for name, numbers in own._asdict().items()},
        },
        "student": student,
        "teacher": None if teacher is None else str(teacher),
        "teacher_network": None if teacher is None else teacher.network,
        "teacher_path": str(teacher.origin.absolute()) if trained else None,
        "teacher_normalisation": None if given is None else given._asdict(),
        "threads": dict(threads),
        "teacher_run": dict(teacher_run),
        "page": {
            "command": command,
            "normalisation": {"mean": data.test.views.mean, "std": data.test.views.std},
            "class_names": data.class_names,
            **page,
        },
    }
