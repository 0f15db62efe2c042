"""The `kcd distill` command: distil a student from a teacher, with one seed or several."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from .. import models
from ..cache import TeacherCache
from ..checks import check_int
from ..registry import unknown_name_error
from ..training.recipe import Recipe
from ..training.setup import build_method
from ..training.teacher_cache import check_views
from . import presets, teachers
from .options import NETWORKS, TEACHER_METHOD, Images, TeacherInput, TrainingOptions
from .study import TEACHER, PlannedRun, Study
from .teachers import Teacher


@dataclass(frozen=True)
class Distill(TrainingOptions):
    """Distil a student from a teacher, with one seed or several, and write a report.

    A teacher that is not trained yet is trained first, with cross entropy and the same optimizer and schedule, and saved beside the
    student. PRESET names a pair of networks of the paper and its training options. Your options override those of PRESET.
    """

    preset: Annotated[
        Positional[str],
        arg(metavar="[PRESET]", help=f"A pair of the paper's CIFAR-100 comparison: {', '.join(presets.PRESETS)}."),
    ] = ""
    teacher: Annotated[
        str | None,
        arg(
            help="The teacher: a finished run's folder, a weights file (.safetensors, .pt, .pth), a folder of transformers "
            "(hf:FOLDER), or a network to train first, by name (see --student). None: the teacher of PRESET or the default for the "
            "data (digits, mnist5k)."
        ),
    ] = None
    teacher_network: str | None = None
    """The network of the weights in --teacher. None: the one named in the run's folder; for a file that of PRESET or the data."""
    teacher_cache: Path | None = None
    """Folder of `kcd cache` with the logits of a teacher, which then does not run at all. Not with --teacher."""
    teacher_lr: float | None = None
    """Learning rate of a teacher that is trained first. None: --lr."""
    teacher_input: Annotated[TeacherInput, arg(name="")] = field(default_factory=TeacherInput)
    student: Annotated[
        str | None,
        arg(help=f"The student: {NETWORKS}. None: the student of PRESET or the default for the data."),
    ] = None
    student_weights: Annotated[
        Path | None,
        arg(
            help="A weights file or a finished run's folder to start the student from; a head for another number of classes "
            "starts from the seed. None: the weights in the folder of an hf: network, else all from the seed."
        ),
    ] = None
    seeds: int = 1
    """Number of runs, with consecutive seeds from --seed on. They share their teacher."""

    def defaults(self) -> "Distill":
        """Return the defaults of all options: those of PRESET and of a `kc-` prefix. Raises ValueError for an unknown PRESET."""
        default = Distill(recipe=self.recipe.defaults())
        if self.preset:
            pair = self._pair
            recipe, images, teacher_lr = default.recipe, Images("cifar100"), None
            if self.recipe.optimizer == "sgd":  # the pair's learning rates are of SGD
                recipe = replace(recipe, lr=pair.lr)
                teacher_lr = pair.teacher_lr if pair.teacher_lr != pair.lr else None
            own = {"teacher": pair.teacher, "student": pair.student, "teacher_lr": teacher_lr}
            default = replace(default, recipe=recipe, images=images, **own)
        return default

    @property
    def _pair(self) -> presets.Pair | None:
        """The networks of PRESET or, without one, the default pair for the data."""
        if not self.preset:
            return presets.DEFAULT_PAIRS.get(self.images.data)
        if self.preset not in presets.PRESETS:
            raise unknown_name_error("preset", self.preset, presets.PRESETS)
        return presets.PRESETS[self.preset]

    def study(self) -> Study:
        """Return the runs of the students, preceded by that of an untrained teacher. Raises as `run` does."""
        check_int("seeds", self.seeds, 1)
        self.teacher_input.check()
        data = self.images.load()
        first = self.recipe.resolve_method()
        recipes = [replace(first, seed=seed) for seed in range(first.seed, first.seed + self.seeds)]
        student, teacher = self._network("student"), None
        needs_teacher = build_method(first).needs_teacher
        if needs_teacher and first.label == TEACHER:
            raise ValueError(f"name must not be {TEACHER!r}: tables use it for the teacher")
        cache = None if self.teacher_cache is None else TeacherCache(self.teacher_cache)
        if needs_teacher and cache is None:
            teacher = teachers.find(
                self._network("teacher"), self.teacher_network, self._pair.teacher if self._pair else None
            )
        self._check_effect(first, teacher, cache)
        if teacher is not None:
            teacher = self.teacher_input.apply(teacher)
        start = teachers.find_start(student, self.student_weights, "student_weights")
        data = self.images.normalised_for(start, data)
        if cache is not None:
            check_views(cache, data.train, recipes[-1].seed)  # the last run must not fail after hours
        seeds = dict.fromkeys((recipes[0].seed, recipes[-1].seed))
        output = self.folder(student, first.label, *seeds)
        runs, teaching = [], {"teacher": teacher, "teacher_cache": cache}
        if teacher is not None and teacher.origin is None:
            teaching["teacher_folder"] = output / TEACHER
            lr = first.lr if self.teacher_lr is None else self.teacher_lr
            supervised = replace(first, name=TEACHER, method=TEACHER_METHOD, options={}, condense=None, lr=lr)
            runs = [PlannedRun(teacher.network, supervised, output / TEACHER)]
        for recipe in recipes:
            folder = output if self.seeds == 1 else output / f"seed-{recipe.seed}"
            runs.append(PlannedRun(student, recipe, folder, **teaching, start=start))
        return self.study_of("kcd distill", data, runs, output)

    def _check_effect(self, recipe: Recipe, teacher: Teacher | None, cache: TeacherCache | None) -> None:
        """Raise ValueError for options of the teacher that have no effect."""
        defaults = self.defaults()
        own = {name: getattr(self, name) for name in ("teacher", "teacher_network", "teacher_lr")}
        given = {name: value for name, value in own.items() if value != getattr(defaults, name)}
        for name, value in (given | self.teacher_input.given()).items():
            if cache is not None:
                raise ValueError(f"{name}={value!r} has no effect with teacher_cache: the teacher does not run")
            if teacher is None:
                raise ValueError(f"{name}={value!r} has no effect with method {recipe.method!r}, which uses no teacher")
            if name == "teacher_lr" and teacher.origin is not None:
                raise ValueError(f"{name}={value!r} has no effect: teacher {self.teacher!r} is already trained")

    def _network(self, role: str) -> str:
        """Return the network of the student or teacher, given or by default. Raises ValueError if there is no default."""
        named = getattr(self, role)
        if named is None and self._pair:
            named = getattr(self._pair, role)
        if named is None:
            raise ValueError(f"--{role} is required: there is no default network for data {self.images.data!r}")
        return models.canonical(named) if role == "student" else named
