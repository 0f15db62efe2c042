"""`kcd distill` and `kcd teacher`: what the user may say, and the job that it means."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import Fixed, FlagCreatePairsOff, Positional, Suppress, arg

from .. import methods, models, processes
from ..condensation.checks import whole
from ..data.images import ImageData, load
from ..registry import unknown
from . import pairs, teachers
from .device import MOST_THREADS
from .job import TEACHER, Job
from .recipe import Condense, Recipe
from .teachers import Teacher
from .trainer import build_method

CONDENSED = "kc-"  # before a method: condensed as in the paper
ALONE = "ce"  # the method that trains a teacher
NETWORKS = ", ".join(models.REGISTRY)


@dataclass(frozen=True)
class Images:
    """A data set, and what its training images go through."""

    data: str = "mnist5k"
    """The images: mnist5k, digits, cifar10, cifar100 (their archives are looked for in $KCD_DATA, else ./data), an
    archive, .npz file or folder of images, or module:function."""
    padding: int | None = None
    """Training images are cropped at random out of themselves with so many pixels of black around; 0: they are not.
    None: as is usual for the data set (4 for CIFAR)."""
    flip: Annotated[bool, FlagCreatePairsOff] = False
    """Half of the training images are mirrored. Neither --flip nor --no-flip: as is usual for the data set."""
    no_flip: Annotated[bool, FlagCreatePairsOff] = False
    """None are."""
    size: int | None = None
    """Images of a folder are resized to so many pixels a side. None: all must have one size."""
    mean: Annotated[tuple[str, ...] | None, arg(metavar="NUMBER [NUMBER ...]")] = None
    """Networks take (pixels / 255 - mean) / std: one number or one for every channel, or imagenet or half (0.5), which
    bring their std. None: the mean and standard deviation of the training images."""
    std: Annotated[tuple[str, ...] | None, arg(metavar="NUMBER [NUMBER ...]")] = None
    """See --mean, with which it is given."""

    def load(self) -> ImageData:
        """Raises TypeError, ValueError, ImportError, OSError where there are no such images."""
        if self.flip and self.no_flip:
            raise ValueError("take --flip or --no-flip, not both")
        flip = True if self.flip else False if self.no_flip else None
        mean, std = _numbers(self.mean), _numbers(self.std)
        return load(self.data, padding=self.padding, flip=flip, size=self.size, mean=mean, std=std)

    def as_json(self) -> dict[str, object]:
        """What `load` made the images of, but for their views, which they know themselves."""
        return {"spec": self.data, "size": self.size}

    @property
    def slug(self) -> str:
        """For the name of a folder."""
        return _slug(Path(self.data).name)


@dataclass(frozen=True)
class Said(Recipe):
    """A recipe as the command line says it."""

    options: Annotated[Mapping[str, str], arg(metavar="[NAME VALUE ...]")] = field(default_factory=dict)
    """Arguments of the method, as: temperature 4 kd_weight 0.9. With --method, --help lists those of a method."""
    seed: int = 0
    """Decides the initial weights, the order of the samples and all other randomness."""
    num_workers: Suppress[Fixed[int]] = 0
    """There is nothing to load: all that a command trains on lies in memory."""

    def implied(self) -> "Said":
        """The defaults of what is not given, which the method decides."""
        return replace(Said(), condense=Condense()) if self.method.startswith(CONDENSED) else Said()

    @property
    def plain_method(self) -> str:
        """The method's own name, without what goes before it. Raises ValueError for a name that is unknown."""
        method = self.method.removeprefix(CONDENSED)
        if not method:
            raise ValueError(f"method must be named after {CONDENSED}, as in {CONDENSED}kd, got {self.method!r}")
        if method not in methods.REGISTRY and ":" not in method:
            condensed = [f"{CONDENSED}{name}" for name in methods.REGISTRY]
            otherwise = f"write module:Class, each with {CONDENSED} before it or not"
            raise unknown("method", self.method, methods.REGISTRY, otherwise, condensed)
        return method

    def method_options(self) -> tuple[str, list[methods.Option]]:
        """The method's name, and the options that `--options` takes for it. Raises as `methods.build` does."""
        own = {option.name for option in fields(Condense)}  # a command has them already
        found = methods.options_of(self.plain_method)
        return self.method, [option for option in found if option.name not in own]

    def of_method(self) -> "Said":
        """With the method's own name, what goes before it taken away."""
        method = self.plain_method
        if method == self.method and not self.condense.shrinks_the_set:  # where keep is 1 because nobody gave it
            for option in fields(self.condense):
                chosen = getattr(self.condense, option.name)
                if option.name not in ("keep", "batch_keep") and chosen != option.default:
                    raise ValueError(
                        f"condense.{option.name}={chosen!r} has no effect with condense.keep=1: "
                        f"take --method {CONDENSED}{method}, or a --condense.keep < 1"
                    )
        return replace(self, method=method, options=methods.as_typed(method, self.options))


@dataclass(frozen=True)
class Distill:
    """Distils a student from a teacher, by one seed or several, and writes a report.

    A teacher that is not trained yet is trained first, with cross entropy by the same schedule, and kept beside the
    student. RECIPE is a pair of networks with the options of the paper; options given beside it override its own.
    """

    preset: Annotated[
        Positional[str],
        arg(metavar="[RECIPE]", help=f"A pair of the paper's comparison on CIFAR-100: {', '.join(pairs.RECIPES)}."),
    ] = ""
    images: Annotated[Images, arg(name="")] = Images()
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
    output: Path | None = None
    """The folder for the results. None: runs/DATA-STUDENT-METHOD-SEED."""
    resume: Annotated[bool, FlagCreatePairsOff] = False
    """Goes on with what an interrupted command of the same options has left there."""
    threads: int | None = None
    """Threads of torch on the CPU. None: those of the run that goes on, else one for every 16 GFLOPs of a training step."""
    recipe: Annotated[Said, arg(name="")] = field(default_factory=Said)

    def implied(self) -> "Distill":
        """The defaults of all options that are not given: those of RECIPE, and of kc- before the method.

        Raises ValueError for a RECIPE that there is not.
        """
        default = Distill(recipe=self.recipe.implied())
        if self.preset:
            pair = self._pair
            recipe, images = replace(default.recipe, lr=pair.lr), Images("cifar100")
            teacher_lr = pair.teacher_lr if pair.teacher_lr != pair.lr else None
            own = {"teacher": pair.teacher, "student": pair.student, "teacher_lr": teacher_lr}
            default = replace(default, recipe=recipe, images=images, **own)
        return default

    def method_options(self) -> tuple[str, list[methods.Option]]:
        """As `Said.method_options`."""
        return self.recipe.method_options()

    def run(self) -> None:
        """Checks everything, trains, writes the report and prints the table.

        Raises:
            TypeError, ValueError, ImportError, FileExistsError: an option does not fit; nothing has been written then.
            OSError: a file cannot be written; what was finished before is intact.
            KeyboardInterrupt: with a message that says how to go on.
        """
        with processes.first_one_says():
            job = self._job().checked()
        job.run()

    @property
    def _pair(self) -> pairs.Pair | None:
        """The networks of RECIPE or, without one, of the data."""
        if not self.preset:
            return pairs.OF_DATA.get(self.images.data)
        if self.preset not in pairs.RECIPES:
            raise unknown("recipe", self.preset, pairs.RECIPES)
        return pairs.RECIPES[self.preset]

    def _job(self) -> Job:
        whole("seeds", self.seeds, 1)
        data = self.images.load()
        first = self.recipe.of_method()
        recipes = [replace(first, seed=seed) for seed in range(first.seed, first.seed + self.seeds)]
        student, teacher = self._network("student"), None
        if build_method(first).needs_teacher:
            if first.label == TEACHER:
                raise ValueError(f"name must not be {TEACHER!r}: that is what tables call the teacher")
            teacher = teachers.find(
                self._network("teacher"), self.teacher_network, self._pair.teacher if self._pair else None
            )
        self._check_effect(first, teacher)
        lr = first.lr if self.teacher_lr is None else self.teacher_lr
        return Job(
            command="kcd distill",
            options=_as_json(self),
            data=data,
            data_options=self.images.as_json(),
            student=student,
            teacher=teacher,
            teacher_recipe=replace(first, name=TEACHER, method=ALONE, options={}, condense=None, lr=lr),
            recipes=recipes,
            output=self._default_output(student, recipes) if self.output is None else self.output,
            resume=self.resume,
            threads=_checked_threads(self.threads),
        )

    def _check_effect(self, recipe: Recipe, teacher: Teacher | None) -> None:
        """Raises ValueError for what the user has said of a teacher that there is not, or is trained already."""
        implied = self.implied()
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

    def _default_output(self, student: str, recipes: list[Recipe]) -> Path:
        seeds = "-".join(dict.fromkeys((str(recipes[0].seed), str(recipes[-1].seed))))
        return Path("runs") / "-".join((self.images.slug, _slug(student), _slug(recipes[0].label), seeds))


@dataclass(frozen=True)
class Train:
    """Trains a teacher with cross entropy. Its folder is what --teacher of `kcd distill` takes."""

    network: Annotated[
        str | None,
        arg(
            help=f"A network: {NETWORKS}, or module:function, which takes in_channels and num_classes. None: that which goes "
            "with the data (digits, mnist5k)."
        ),
    ] = None
    output: Path | None = None
    """The folder for the results. None: runs/DATA-NETWORK-teacher-SEED."""
    resume: Annotated[bool, FlagCreatePairsOff] = False
    """Goes on with what an interrupted command of the same options has left there."""
    threads: int | None = None
    """Threads of torch on the CPU. None: those of the run that goes on, else one for every 16 GFLOPs of a training step."""
    images: Annotated[Images, arg(name="")] = Images()
    recipe: Annotated[Said, arg(name="")] = field(default_factory=lambda: Said(method=ALONE))

    def implied(self) -> "Train":
        """The defaults of all options that are not given."""
        return Train(recipe=replace(self.recipe.implied(), method=ALONE))

    def method_options(self) -> tuple[str, list[methods.Option]]:
        """As `Said.method_options`."""
        return self.recipe.method_options()

    def run(self) -> None:
        """As `Distill.run`."""
        with processes.first_one_says():
            job = self._job().checked()
        job.run()

    def _job(self) -> Job:
        data, pair = self.images.load(), pairs.OF_DATA.get(self.images.data)
        network = pair.teacher if self.network is None and pair else models.canonical(self.network)
        if network is None:
            raise ValueError(f"--network must be given: none goes with data {self.images.data!r}")
        recipe = replace(self.recipe.of_method(), name=self.recipe.name or TEACHER)
        if build_method(recipe).needs_teacher:
            raise ValueError(f"method {recipe.method!r} needs a teacher: take {ALONE}, or kcd distill")
        name = "-".join((self.images.slug, _slug(network), TEACHER, str(recipe.seed)))
        return Job(
            command="kcd teacher",
            options=_as_json(self),
            data=data,
            data_options=self.images.as_json(),
            student=network,
            teacher=None,
            teacher_recipe=None,
            recipes=[recipe],
            output=Path("runs") / name if self.output is None else self.output,
            resume=self.resume,
            threads=_checked_threads(self.threads),
        )


def _numbers(words: tuple[str, ...] | None) -> list[float] | str | None:
    """Words, or parts of them between commas, as numbers; as text where one of them is none."""
    if words is None:
        return None
    try:
        return [float(part) for word in words for part in word.split(",")]
    except ValueError:
        return " ".join(words)


def _checked_threads(threads: int | None) -> int | None:
    return None if threads is None else whole("threads", threads, 1, MOST_THREADS)


def _as_json(command: Distill | Train) -> dict:
    return json.loads(json.dumps(asdict(command), default=str))


def _slug(name: str) -> str:
    """As a part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", name)
