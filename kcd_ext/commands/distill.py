"""`kcd distill`: a student from a teacher, by one seed or several."""

from dataclasses import dataclass, replace
from typing import Annotated

from tyro.conf import Positional, arg

from .. import models
from ..checks import check_int
from ..registry import unknown
from ..training.loop import build_method
from ..training.recipe import Recipe
from . import presets, teachers
from .options import ALONE, NETWORKS, Images, TrainingOptions
from .study import TEACHER, Run, Study
from .teachers import Teacher


@dataclass(frozen=True)
class Distill(TrainingOptions):
    """Distils a student from a teacher, by one seed or several, and writes a report.

    A teacher that is not trained yet is trained first, with cross entropy by the same schedule, and kept beside the
    student. RECIPE is a pair of networks with the options of the paper; options given beside it override its own.
    """

    preset: Annotated[
        Positional[str],
        arg(metavar="[RECIPE]", help=f"A pair of the paper's comparison on CIFAR-100: {', '.join(presets.RECIPES)}."),
    ] = ""
    teacher: str | None = None
    """The folder of a trained run, a file of weights (.safetensors, .pt, .pth), or a network, by name (see --student) or
    as module:function, that is trained first. None: the recipe's, or that which goes with the data (digits, mnist5k)."""
    teacher_network: str | None = None
    """Whose weights --teacher holds. None: what the folder says, else the network of the recipe or the data."""
    teacher_lr: float | None = None
    """The learning rate of a teacher that is trained first. None: --lr."""
    student: Annotated[
        str | None,
        arg(
            help=f"A network: {NETWORKS}, or module:function, which takes in_channels and num_classes. None: the recipe's, or "
            "that which goes with the data."
        ),
    ] = None
    seeds: int = 1
    """How many runs: with --seed, the one after it, and so on. They share their teacher."""

    def defaults(self) -> "Distill":
        """The defaults of all options that are not given: those of RECIPE, and of kc- before the method.

        Raises ValueError for a RECIPE that there is not.
        """
        default = Distill(recipe=self.recipe.defaults())
        if self.preset:
            pair = self._pair
            recipe, images = replace(default.recipe, lr=pair.lr), Images("cifar100")
            teacher_lr = pair.teacher_lr if pair.teacher_lr != pair.lr else None
            own = {"teacher": pair.teacher, "student": pair.student, "teacher_lr": teacher_lr}
            default = replace(default, recipe=recipe, images=images, **own)
        return default

    @property
    def _pair(self) -> presets.Pair | None:
        """The networks of RECIPE or, without one, of the data."""
        if not self.preset:
            return presets.OF_DATA.get(self.images.data)
        if self.preset not in presets.RECIPES:
            raise unknown("recipe", self.preset, presets.RECIPES)
        return presets.RECIPES[self.preset]

    def study(self) -> Study:
        """Return the students' runs, after that of their teacher if it is not trained yet. Raises as `run` does."""
        check_int("seeds", self.seeds, 1)
        data = self.images.load()
        first = self.recipe.resolve_method()
        recipes = [replace(first, seed=seed) for seed in range(first.seed, first.seed + self.seeds)]
        student, teacher = self._network("student"), None
        if build_method(first).needs_teacher:
            if first.label == TEACHER:
                raise ValueError(f"name must not be {TEACHER!r}: that is what tables call the teacher")
            teacher = teachers.find(
                self._network("teacher"), self.teacher_network, self._pair.teacher if self._pair else None
            )
        self._check_effect(first, teacher)
        seeds = dict.fromkeys((recipes[0].seed, recipes[-1].seed))
        output = self.folder(student, first.label, *seeds)
        runs, taught = [], {"teacher": teacher}
        if teacher is not None and teacher.origin is None:
            taught["teacher_folder"] = output / TEACHER
            lr = first.lr if self.teacher_lr is None else self.teacher_lr
            alone = replace(first, name=TEACHER, method=ALONE, options={}, condense=None, lr=lr)
            runs = [Run(teacher.network, alone, output / TEACHER)]
        for recipe in recipes:
            folder = output if self.seeds == 1 else output / f"seed-{recipe.seed}"
            runs.append(Run(student, recipe, folder, **taught))
        return self.study_of("kcd distill", data, runs, output)

    def _check_effect(self, recipe: Recipe, teacher: Teacher | None) -> None:
        """Raises ValueError for what the user has said of a teacher that there is not, or is trained already."""
        implied = self.defaults()
        for name in ("teacher", "teacher_network", "teacher_lr"):
            said = getattr(self, name)
            if said == getattr(implied, name):
                continue
            if teacher is None:
                raise ValueError(f"{name}={said!r} has no effect with method {recipe.method!r}, which asks no teacher")
            if name == "teacher_lr" and teacher.origin is not None:
                raise ValueError(f"{name}={said!r} has no effect with teacher {self.teacher!r}, which is trained")

    def _network(self, role: str) -> str:
        named = getattr(self, role)
        if named is None and self._pair:
            named = getattr(self._pair, role)
        if named is None:
            raise ValueError(f"--{role} must be given: no pair of networks goes with data {self.images.data!r}")
        return models.canonical(named) if role == "student" else named
