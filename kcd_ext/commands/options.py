"""Options that commands share: images, the recipe, the output folder and the number of threads."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, arg

from .. import methods, models, processes
from ..checks import check_int
from ..data.images import ImageData, ImageSet, load
from ..data.views import check_normalisation
from ..environment import MAX_THREADS
from ..registry import unknown_name_error
from ..training.logs import check_log
from ..training.recipe import Condense, Recipe
from .progress import reading_bar
from .study import PlannedRun, Study
from .teachers import Start, Teacher

CONDENSED_PREFIX = "kc-"  # before a method: condensed as in the paper
TEACHER_METHOD = "ce"  # cross entropy, without a teacher
NETWORKS = (
    f"{', '.join(models.REGISTRY)}; timm:NAME, torchvision:NAME or hf:FOLDER; or module:function, which gets num_classes and "
    "in_channels if it takes them"
)
READING = (
    "size",
    "resize",
    "val_fraction",
    "test_fraction",
    "image_column",
    "label_column",
)  # options that choose images


@dataclass(frozen=True)
class Images:
    """A data set and the augmentation of its training images."""

    data: Annotated[
        str,
        arg(
            help="The images: mnist5k, digits, cifar10, cifar100 (archives are looked up in $KCD_DATA, else in ./data), the path "
            "of an archive, an .npz file, a folder of images or a data set that Hugging Face datasets saved, or module:function."
        ),
    ] = "mnist5k"
    augment: Annotated[
        str | None,
        arg(
            help="Augmentation of training images: crop-flip (--padding, --flip), none, or a policy after crop and flip: "
            "randaugment, trivialaugment. None: as usual for the data set (CIFAR: crop-flip, others: none)."
        ),
    ] = None
    padding: int | None = None
    """Random crops: pixels of black border around training images; 0: none. None: as usual for the data set (CIFAR: 4)."""
    flip: Annotated[bool, FlagCreatePairsOff] = False
    """Flip half of the training images horizontally. Without --flip and --no-flip: as usual for the data set."""
    no_flip: Annotated[bool, FlagCreatePairsOff] = False
    """Do not flip training images."""
    size: int | None = None
    """Height and width to resize the images of a folder to. None: all must have the same size."""
    resize: str | None = None
    """How --size resizes: crop scales the shorter side and crops the centre, squash scales both sides. None: crop."""
    val_fraction: float | None = None
    """Share of the training images of every class to validate with. None: the data set's validation images, if it has any."""
    test_fraction: float | None = None
    """Likewise to test with, for data without test images. None: without them, the images of --val-fraction test too."""
    memory: str | None = None
    """Bytes that images of a folder may take in memory, such as 4GB; more stay on disk. None: a quarter of the free memory."""
    image_column: str | None = None
    """The column with the images of a Hugging Face data set. None: the only one of the type Image."""
    label_column: str | None = None
    """The column with its labels. None: the only one of the type ClassLabel."""
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
        options = {name: getattr(self, name) for name in READING}
        return load(
            self.data,
            augment=self.augment,
            padding=self.padding,
            flip=flip,
            mean=mean,
            std=std,
            memory=self.memory,
            progress=reading_bar,
            **options,
        )

    def as_arguments(self, data: ImageData) -> dict[str, object]:
        """Return the arguments of `load` that give `data` again, except those of its views. Defaults are left out."""
        options = {name: getattr(self, name) for name in READING} | {"resize": data.resize}
        return {"spec": self.data, "size": self.size} | {
            name: value for name, value in options.items() if value is not None
        }

    def normalised_for(self, start: Start | None, data: ImageData) -> ImageData:
        """Return the images, without --mean normalised as for the weights that their network starts from."""
        return data if start is None or self.mean is not None else start.normalise(data)


@dataclass(frozen=True)
class TeacherInput:
    """The images that the teacher's weights were trained on."""

    teacher_size: Annotated[
        int | None,
        arg(
            help="Pixels per side of the images that the weights in --teacher were trained on; the teacher's images are resized "
            "to it. None: as its library's weights (timm:, torchvision:, hf:), else the size of the images in --data."
        ),
    ] = None
    teacher_mean: Annotated[
        tuple[str, ...] | None,
        arg(
            metavar="NUMBER [NUMBER ...]",
            help="Normalisation of the images that the weights in --teacher were trained on, as --mean. None: as its library's "
            "weights (timm:, torchvision:, hf:), else that of the images in --data. A run's folder records its own.",
        ),
    ] = None
    teacher_std: Annotated[tuple[str, ...] | None, arg(metavar="NUMBER [NUMBER ...]")] = None
    """Standard deviation; give it together with --teacher-mean."""

    def check(self) -> None:
        """Raise TypeError or ValueError for an invalid option."""
        self._normalisation()
        if self.teacher_size is not None:
            check_int("teacher_size", self.teacher_size, 1)

    def given(self) -> dict[str, object]:
        """Return the options that were given, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def apply(self, teacher: Teacher) -> Teacher:
        """Return the teacher for these images. Raises ValueError for an option that has no effect on it."""
        for name in self.given():
            if teacher.origin is None:
                raise ValueError(f"{name} has no effect: the teacher is trained first, on the student's images")
            if teacher.is_run and teacher.normalisation is not None:
                raise ValueError(
                    f"{name} has no effect: the run in {teacher.origin} records the images of its training"
                )
        return teacher.with_input(self._normalisation(), self.teacher_size)

    def _normalisation(self) -> tuple[Sequence[float], Sequence[float]] | None:
        return check_normalisation(parse_numbers(self.teacher_mean), parse_numbers(self.teacher_std), "teacher_")


@dataclass(frozen=True)
class RecipeArgs(Recipe):
    """A recipe as given on the command line."""

    method: str = "kd"
    """kd, dkd, dist, pkt, crd, sskd, at, fitnet, reviewkd, kr, iekd, ie-dml, pwkd, ce, module:Class; kd+at adds; kc- condenses."""
    options: Annotated[Mapping[str, str], arg(metavar="[NAME VALUE ...]")] = field(default_factory=dict)
    """Options of the method, for example: temperature 4 kd_weight 0.9. List them with --method METHOD --help."""
    seed: int = 0
    """Seed of the initial weights, the order of the samples and all other randomness."""
    num_workers: int = 0
    """Processes that decode images on disk (--memory), for training and as many for testing. 0: one per processor, at most 8."""

    def defaults(self) -> "RecipeArgs":
        """Return the defaults of all options, which depend on the method."""
        return replace(RecipeArgs(), condense=Condense()) if self.method.startswith(CONDENSED_PREFIX) else RecipeArgs()

    def _usual(self, name: str) -> None:
        """Return None: `resolve_method` fills in `lr` and `weight_decay` when the optimizer is known."""

    @property
    def plain_method(self) -> str:
        """The method's name without the `kc-` prefix. Raises ValueError for an unknown name."""
        method = self.method.removeprefix(CONDENSED_PREFIX)
        if not method:
            raise ValueError(
                f"method must have a name after {CONDENSED_PREFIX}, as in {CONDENSED_PREFIX}kd, got {self.method!r}"
            )
        for part in methods.split_name(method):
            if part not in methods.REGISTRY and ":" not in part:
                condensed = [f"{CONDENSED_PREFIX}{name}" for name in methods.REGISTRY]
                otherwise = f"write module:Class; a prefix {CONDENSED_PREFIX} turns condensation on"
                wrong = self.method if part == method else part
                raise unknown_name_error("method", wrong, methods.REGISTRY, otherwise, condensed)
        return method

    def method_options(self) -> tuple[str, list[methods.Option]]:
        """Return the method's name and the options that it takes after `--options`. Raises as `methods.build` does."""
        found = methods.options_of(self.plain_method)
        # Set with --condense.batch-keep and --label-smoothing.
        elsewhere = ("batch_keep", "label_smoothing")
        return self.method, [option for option in found if option.name.rpartition(".")[2] not in elsewhere]

    def check_unread(self, words: Sequence[str]) -> None:
        """Raise ValueError if one of the words that the command does not know is an option of the method."""
        names = [option.name for option in self.method_options()[1]] if words else []
        for word in words:
            option = word.partition("=")[0]
            own = option.lstrip("-").replace("-", "_")
            name = next((name for name in names if own in (name, name.rpartition(".")[2])), None)
            if option.startswith("--") and name is not None:
                raise ValueError(
                    f"unrecognized option {option}: pass it to method {self.method} as --options {name} VALUE"
                )

    def resolve_method(self) -> "RecipeArgs":
        """Return the recipe without the `kc-` prefix of `method`, with the method's options converted and no default left open.

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
        usual = {
            name: super(RecipeArgs, self)._usual(name) for name in ("lr", "weight_decay") if getattr(self, name) is None
        }
        return replace(self, method=method, options=methods.convert_options(method, self.options), **usual)


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
    log: tuple[str, ...] = ()
    """Where to write every epoch's metrics besides the run folder: tensorboard (to OUTPUT/tensorboard), or module:Class."""
    progress_every: int | None = None
    """Also show and log loss and learning rate after every so many training steps. None: after every epoch only."""

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
        """Return a study of these runs, with the options of this command. Raises ValueError for an option that has no effect."""
        if self.progress_every is not None:
            check_int("progress_every", self.progress_every, 1)
        for name in self.log:
            check_log(name)
        if self.recipe.num_workers and isinstance(data.train, ImageSet):
            raise ValueError(f"num_workers={self.recipe.num_workers} has no effect on images in memory (see --memory)")
        return Study(
            command=command,
            options=json.loads(json.dumps(asdict(self), default=str)),
            data=data,
            data_options=self.images.as_arguments(data),
            runs=runs,
            output=output,
            resume=self.resume,
            threads=checked_threads(self.threads),
            log=self.log,
            progress_every=self.progress_every,
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
