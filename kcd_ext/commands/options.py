"""Options that commands share: images, the recipe, the output folder and the number of threads."""

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
from ..environment import MAX_THREADS
from ..registry import unknown_name_error
from ..training.recipe import Condense, Recipe
from .study import PlannedRun, Study
from .teachers import Start

CONDENSED_PREFIX = "kc-"  # before a method: condensed as in the paper
TEACHER_METHOD = "ce"  # cross entropy, without a teacher
NETWORKS = (
    f"{', '.join(models.REGISTRY)}; timm:NAME, torchvision:NAME or hf:FOLDER; or module:function, which gets num_classes and "
    "in_channels if it takes them"
)


@dataclass(frozen=True)
class Images:
    """A data set and the augmentation of its training images."""

    data: Annotated[
        str,
        arg(
            help="The images: mnist5k, digits, cifar10, cifar100 (archives are looked up in $KCD_DATA, else in ./data), the path "
            "of an archive, an .npz file or a folder of images, or module:function."
        ),
    ] = "mnist5k"
    padding: int | None = None
    """Random crops: pixels of black border around training images; 0: none. None: as usual for the data set (CIFAR: 4)."""
    flip: Annotated[bool, FlagCreatePairsOff] = False
    """Flip half of the training images horizontally. Without --flip and --no-flip: as usual for the data set."""
    no_flip: Annotated[bool, FlagCreatePairsOff] = False
    """Do not flip training images."""
    size: int | None = None
    """Resize the images of a folder to this many pixels per side. None: all must have the same size."""
    mean: Annotated[
        tuple[str, ...] | None,
        arg(
            metavar="NUMBER [NUMBER ...]",
            help="Networks get (pixels / 255 - mean) / std. One number, or one per channel; imagenet and half (0.5) also set std. "
            "None: mean and standard deviation of the training images.",
        ),
    ] = None
    std: Annotated[tuple[str, ...] | None, arg(metavar="NUMBER [NUMBER ...]")] = None
    """Standard deviation; give it together with --mean."""

    def load(self) -> ImageData:
        """Load the images. Raises TypeError, ValueError, ImportError or OSError if that fails."""
        if self.flip and self.no_flip:
            raise ValueError("give --flip or --no-flip, not both")
        flip = True if self.flip else False if self.no_flip else None
        mean, std = parse_numbers(self.mean), parse_numbers(self.std)
        return load(self.data, padding=self.padding, flip=flip, size=self.size, mean=mean, std=std)

    def normalised_for(self, start: Start | None, data: ImageData) -> ImageData:
        """Return the images, without --mean normalised as for the weights that their network starts from."""
        return data if start is None or self.mean is not None else start.normalise(data)


@dataclass(frozen=True)
class RecipeArgs(Recipe):
    """A recipe as given on the command line."""

    method: str = "kd"
    """kd, pkt, crd, sskd, pwkd, iekd, ie-dml, kr, ce (labels only) or module:Class; the prefix kc- condenses: kc-kd."""
    options: Annotated[Mapping[str, str], arg(metavar="[NAME VALUE ...]")] = field(default_factory=dict)
    """Options of the method, for example: temperature 4 kd_weight 0.9. List them with --method METHOD --help."""
    seed: int = 0
    """Seed of the initial weights, the order of the samples and all other randomness."""
    num_workers: Suppress[Fixed[int]] = 0
    """Always 0: a command keeps its images in memory."""

    def defaults(self) -> "RecipeArgs":
        """Return the defaults of all options, which depend on the method."""
        return replace(RecipeArgs(), condense=Condense()) if self.method.startswith(CONDENSED_PREFIX) else RecipeArgs()

    @property
    def plain_method(self) -> str:
        """The method's name without the `kc-` prefix. Raises ValueError for an unknown name."""
        method = self.method.removeprefix(CONDENSED_PREFIX)
        if not method:
            raise ValueError(
                f"method must have a name after {CONDENSED_PREFIX}, as in {CONDENSED_PREFIX}kd, got {self.method!r}"
            )
        if method not in methods.REGISTRY and ":" not in method:
            condensed = [f"{CONDENSED_PREFIX}{name}" for name in methods.REGISTRY]
            otherwise = f"write module:Class; a prefix {CONDENSED_PREFIX} turns condensation on"
            raise unknown_name_error("method", self.method, methods.REGISTRY, otherwise, condensed)
        return method

    def method_options(self) -> tuple[str, list[methods.Option]]:
        """Return the method's name and the options that it takes after `--options`. Raises as `methods.build` does."""
        condense_options = {option.name for option in fields(Condense)}  # they have options of the command
        found = methods.options_of(self.plain_method)
        return self.method, [option for option in found if option.name not in condense_options]

    def check_unread(self, words: Sequence[str]) -> None:
        """Raise ValueError if one of the words that the command does not know is an option of the method."""
        names = [option.name for option in self.method_options()[1]] if words else []
        for word in words:
            option = word.partition("=")[0]
            name = option.lstrip("-").replace("-", "_")
            if option.startswith("--") and name in names:
                raise ValueError(
                    f"unrecognized option {option}: pass it to method {self.method} as --options {name} VALUE"
                )

    def resolve_method(self) -> "RecipeArgs":
        """Return the recipe with the `kc-` prefix removed from `method` and the method's options converted to their types.

        Raises ValueError for an option of condensation that has no effect because nothing is condensed.
        """
        method = self.plain_method
        if method == self.method and not self.condense.drops_samples:  # keep=1 is the default without the prefix
            for option in fields(self.condense):
                chosen = getattr(self.condense, option.name)
                if option.name not in ("keep", "batch_keep") and chosen != option.default:
                    raise ValueError(
                        f"condense.{option.name}={chosen!r} has no effect with condense.keep=1: "
                        f"use --method {CONDENSED_PREFIX}{method} or --condense.keep < 1"
                    )
        return replace(self, method=method, options=methods.convert_options(method, self.options))


@dataclass(frozen=True)
class TrainingOptions:
    """The options that `kcd distill` and `kcd teacher` share."""

    images: Annotated[Images, arg(name="")] = field(default_factory=Images)
    recipe: Annotated[RecipeArgs, arg(name="")] = field(default_factory=RecipeArgs)
    output: Path | None = None
    """Folder for the results. None: runs/DATA-NETWORK-METHOD-SEED, with "teacher" as the method of kcd teacher."""
    resume: Annotated[bool, FlagCreatePairsOff] = False
    """Continue an interrupted command that was started with the same options."""
    threads: int | None = None
    """Torch's CPU threads. None: as before for a resumed run, else one for every 16 GFLOPs of a training step."""

    def run(self) -> None:
        """Check everything, train, write the report and print the table.

        Raises:
            TypeError, ValueError, ImportError, FileExistsError: an option is invalid; nothing has been written.
            OSError: a file cannot be written; finished runs and the last checkpoint are intact.
            KeyboardInterrupt: the run was interrupted; the message says how to resume.
        """
        with processes.report_on_rank_zero():
            study = self.study().checked()
        study.run()

    def study(self) -> Study:
        """Return the requested runs. Raises as `run` does."""
        raise NotImplementedError

    def study_of(self, command: str, data: ImageData, runs: Sequence[PlannedRun], output: Path) -> Study:
        """Return a study of these runs, with the options of this command."""
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
        """Return `output` or, by default, a folder in runs/ named after the data and these names."""
        parts = (Path(self.images.data).name, *map(str, names))
        return self.output or Path("runs") / "-".join(re.sub(r"[^\w.-]+", "-", part) for part in parts)


def parse_numbers(words: tuple[str, ...] | None) -> list[float] | str | None:
    """Return words, split at commas, as numbers, or as one text if one of them is not a number."""
    if words is None:
        return None
    try:
        return [float(part) for word in words for part in word.split(",")]
    except ValueError:
        return " ".join(words)


def checked_threads(threads: int | None) -> int | None:
    """Return `threads` if it is None or a valid number of threads. Raises TypeError or ValueError otherwise."""
    return None if threads is None else check_int("threads", threads, 1, MAX_THREADS)
