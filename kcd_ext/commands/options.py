"""Options that several commands take: images, a recipe, where its runs lie and how many threads they have."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import Fixed, FlagCreatePairsOff, Suppress, arg

from .. import methods, models, processes
from ..checks import check_int
from ..data.images import ImageData, load
from ..registry import unknown
from ..training.device import MOST_THREADS
from ..training.recipe import Condense, Recipe
from .study import Run, Study

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


@dataclass(frozen=True)
class RecipeArgs(Recipe):
    """A recipe as the command line says it."""

    options: Annotated[Mapping[str, str], arg(metavar="[NAME VALUE ...]")] = field(default_factory=dict)
    """Arguments of the method, as: temperature 4 kd_weight 0.9. With --method, --help lists those of a method."""
    seed: int = 0
    """Decides the initial weights, the order of the samples and all other randomness."""
    num_workers: Suppress[Fixed[int]] = 0
    """There is nothing to load: all that a command trains on lies in memory."""

    def defaults(self) -> "RecipeArgs":
        """The defaults of what is not given, which the method decides."""
        return replace(RecipeArgs(), condense=Condense()) if self.method.startswith(CONDENSED) else RecipeArgs()

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

    def check_unread(self, words: Sequence[str]) -> None:
        """Raise ValueError if one of the words, which are no options of the command, is an option of the method."""
        names = [option.name for option in self.method_options()[1]] if words else []
        for word in words:
            option = word.partition("=")[0]
            name = option.lstrip("-").replace("-", "_")
            if option.startswith("--") and name in names:
                raise ValueError(
                    f"unrecognized option {option}: method {self.method} takes it, as --options {name} VALUE"
                )

    def resolve_method(self) -> "RecipeArgs":
        """Return the recipe with the `kc-` prefix removed from `method`, and the method's options as it takes them."""
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
class TrainingOptions:
    """What `kcd distill` and `kcd teacher` share."""

    images: Annotated[Images, arg(name="")] = field(default_factory=Images)
    recipe: Annotated[RecipeArgs, arg(name="")] = field(default_factory=RecipeArgs)
    output: Path | None = None
    """The folder for the results. None: one in runs/, named after the data, the network, the method or teacher, and the seed."""
    resume: Annotated[bool, FlagCreatePairsOff] = False
    """Goes on with what an interrupted command of the same options has left there."""
    threads: int | None = None
    """Threads of torch on the CPU. None: those of the run that goes on, else one for every 16 GFLOPs of a training step."""

    def run(self) -> None:
        """Check everything, train, write the report and print the table.

        Raises:
            TypeError, ValueError, ImportError, FileExistsError: an option does not fit; nothing has been written then.
            OSError: a file cannot be written; what was finished before is intact.
            KeyboardInterrupt: with a message that says how to go on.
        """
        with processes.report_on_rank_zero():
            study = self.study().checked()
        study.run()

    def study(self) -> Study:
        """Return the runs that the options ask for. Raises as `run` does."""
        raise NotImplementedError

    def study_of(self, command: str, data: ImageData, runs: Sequence[Run], output: Path) -> Study:
        """Return these runs with the options of this command."""
        return Study(
            command=command,
            options=json.loads(json.dumps(asdict(self), default=str)),
            data=data,
            data_options={"spec": self.images.data, "size": self.images.size},
            runs=runs,
            output=output,
            resume=self.resume,
            threads=checked_threads(self.threads),
        )

    def folder(self, *names: object) -> Path:
        """Return `output` or, if it is not given, a folder in runs/ named after the data and these."""
        parts = (Path(self.images.data).name, *map(str, names))
        return self.output or Path("runs") / "-".join(re.sub(r"[^\w.-]+", "-", part) for part in parts)


def _numbers(words: tuple[str, ...] | None) -> list[float] | str | None:
    """Words, or parts of them between commas, as numbers; as text where one of them is none."""
    if words is None:
        return None
    try:
        return [float(part) for word in words for part in word.split(",")]
    except ValueError:
        return " ".join(words)


def checked_threads(threads: int | None) -> int | None:
    return None if threads is None else check_int("threads", threads, 1, MOST_THREADS)
