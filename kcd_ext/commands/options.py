"""Options that several commands take: images, a recipe, threads."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import Fixed, FlagCreatePairsOff, Suppress, arg

from .. import methods, models
from ..checks import check_int
from ..data.images import ImageData, load
from ..registry import unknown
from ..training.device import MOST_THREADS
from ..training.recipe import Condense, Recipe

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
        return slug(Path(self.data).name)


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


def as_json(command: object) -> dict:
    return json.loads(json.dumps(asdict(command), default=str))


def slug(name: str) -> str:
    """As a part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", name)
