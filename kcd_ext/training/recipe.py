"""The training configuration: every number that decides a run's result, checked on construction."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields

from ..checks import check_bool, check_choice, check_device, check_float, check_int, check_positive, check_used
from ..condensation.options import Condense
from ..condensation.random_keys import MAX_SEED
from ..describe import brief, describe, did_you_mean
from ..registry import unknown_name_error
from .optimizers import OPTIMIZERS, kind_of

PRECISIONS = {"auto": None, "float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # -> accelerate's names


def milestones_passed(milestones: Iterable[float], epoch: int, epochs: int) -> int:
    """Return how many milestones, given as fractions of `epochs`, have passed when `epoch` begins (0 <= epoch < epochs).

    0.07 of 100 epochs is 7, although `0.07 * 100` is slightly larger in floating point.
    """
    return sum(epoch >= round(milestone * epochs, 9) for milestone in milestones)


# The factor of `lr` before warm-up: (recipe, epoch, epochs done) -> factor. `done` is `epoch` plus the fraction of its steps.
SCHEDULES = {
    "milestones": lambda recipe, epoch, done: (
        recipe.gamma ** milestones_passed(recipe.milestones, epoch, recipe.epochs)
    ),
    "cosine": lambda recipe, epoch, done: _half_cosine(
        (done - recipe.warmup_epochs) / (recipe.epochs - recipe.warmup_epochs)
    ),
    "constant": lambda recipe, epoch, done: 1.0,
}


def _half_cosine(fraction: float) -> float:
    """Return half a cosine from 1 to 0 as `fraction` goes from 0 to 1; 1 below."""
    return 0.5 * (1 + math.cos(math.pi * max(0.0, fraction)))


@dataclass(frozen=True)
class Recipe:
    """The training configuration of a student. The defaults are those of KCD on CIFAR-100 (Li et al., ECCV 2022).

    A method's own pretraining keeps its own schedule and stochastic gradient descent; only `clip_norm` reaches it, and
    `momentum` and `weight_decay` if `optimizer` is sgd.

    Recipes compare by their fields. They are not hashable, because `options` is a mapping. `lr` and `weight_decay` that are
    None become numbers, so `dataclasses.replace` keeps them: give both if you replace `optimizer`, or None for its usual ones.

    Raises:
        TypeError, ValueError: A field has the wrong type or is out of range. The message names the field, what it takes
            and what it got.
    """

    method: str = "kd"
    """kd, dkd, dist, pkt, crd, sskd, at, fitnet, reviewkd, kr, iekd, ie-dml, pwkd, ce (labels), module:Class, or a sum: kd+at."""
    options: Mapping[str, float | str] = field(default_factory=dict)
    """Keyword arguments of the method, for example {"temperature": 4.0}; of one of several, {"kd.temperature": 4.0}."""
    condense: Condense = field(default_factory=lambda: Condense(keep=1.0))
    """Knowledge condensation. By default, or with None, every epoch visits the complete training set."""
    epochs: int = 240
    """Passes over the training set, or over what condensation keeps of it."""
    batch_size: int = 64
    """Largest number of samples per batch and process. Batch sizes of an epoch differ by at most one."""
    gradient_accumulation: int = 1
    """Batches per optimizer step. The loss of a step is the mean over all its samples."""
    optimizer: str = "sgd"
    """sgd, adamw, or module:function, called with the parameters and lr, such as torch.optim:RAdam."""
    lr: float | None = None
    """Learning rate, after the warm-up and before the schedule. None: 0.05 for sgd, else 0.001."""
    momentum: float = 0.9
    """Momentum of sgd."""
    weight_decay: float | None = None
    """L2 penalty of sgd, or decoupled decay of adamw, which spares biases and normalisation. None: 5e-4 for sgd, 0.05 for adamw."""
    schedule: str = "milestones"
    """Course of the learning rate: milestones, cosine (to 0, changed in every step) or constant. Not if the method has its own."""
    milestones: tuple[float, ...] = (0.625, 0.75, 0.875)
    """Fractions of `epochs` at which `gamma` multiplies the learning rate (150, 180, 210 of 240). Not if the method has its own."""
    gamma: float = 0.1
    """Factor of the learning rate at a milestone."""
    warmup_epochs: float = 0.0
    """The first epochs, of all `epochs`, in which the learning rate rises from 0, changed in every step."""
    clip_norm: float | None = None
    """Scale the gradients of a step down if the norm of all of them together is larger. None: never."""
    ema: float = 0.0
    """Validate and save an exponential moving average of the student's weights with this decay per step, such as 0.999. 0: none."""
    keep_best: bool = False
    """End with the weights of the epoch that is best on the validation set, instead of those of the last epoch."""
    patience: int | None = None
    """Stop after this many epochs without a better accuracy on the validation set. None: train all epochs."""
    mixup: float = 0.0
    """Mixup: alpha of Beta(alpha, alpha), the shares of two blended images, such as 0.2. 0: off. Not for crd, dkd and sskd."""
    cutmix: float = 0.0
    """CutMix: alpha of the share of an image beside a box of another one, such as 1. 0: off. With mixup, batches draw one."""
    label_smoothing: float = 0.0
    """Smoothing of the labels in the method's cross entropy: each class gets this share divided by their number. 0: none."""
    seed: int = 0
    """Seed of the sample order and of all randomness in training. It does not affect the networks' initial weights."""
    device: str = "auto"
    """auto (CUDA if available), cpu or cuda."""
    precision: str = "auto"
    """Autocast of the networks: float32, bfloat16 or float16. auto: that of accelerate launch, else float32."""
    compile: bool = False
    """Compile student and teacher with torch.compile, for any batch size; not the growing teacher of pwkd."""
    num_workers: int = 0
    """Workers that load items: as many for training as for testing, started once per run. Random transforms depend on it."""
    name: str = ""
    """Name of the run in tables and files. Empty: from method and selection, such as kd, kc-kd, random or random-crd."""

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("gradient_accumulation", 1), ("num_workers", 0)):
            check_int(name, getattr(self, name), least)
        check_int("seed", self.seed, 0, MAX_SEED)
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a string, got {describe(self.name)}")
        for name in ("mixup", "cutmix"):
            check_float(name, getattr(self, name), "a finite number >= 0", 0.0, 3e38)
            if getattr(self, name) and self.batch_size == 1:
                raise ValueError(
                    f"batch_size must be > 1 with {name}={getattr(self, name)}, got 1: nothing would be mixed"
                )
        if not isinstance(self.optimizer, str):
            raise TypeError(f"optimizer must be a string, got {describe(self.optimizer)}")
        if self.optimizer not in OPTIMIZERS and ":" not in self.optimizer:
            raise unknown_name_error("optimizer", self.optimizer, OPTIMIZERS, "write module:function")
        kind = kind_of(self.optimizer)
        for name in ("momentum", "weight_decay"):
            default = Recipe.__dataclass_fields__[name].default
            check_used(name, getattr(self, name), default, name not in kind.options, f"optimizer {self.optimizer!r}")
        for name in ("lr", "weight_decay"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self._usual(name))
        for name in ("lr", "momentum", "weight_decay", "gamma"):
            if getattr(self, name) is not None:
                check_float(name, getattr(self, name), "a finite number >= 0", 0.0, 3e38)  # the float32 range
        check_choice("schedule", self.schedule, SCHEDULES)
        check_float("warmup_epochs", self.warmup_epochs, "a finite number >= 0", 0.0)
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs must be < epochs={self.epochs}, got {self.warmup_epochs}")
        if self.clip_norm is not None:
            check_positive("clip_norm", self.clip_norm)
        if check_float("ema", self.ema, "a number in [0, 1)", 0.0, 1.0) == 1:
            raise ValueError(f"ema must be a number in [0, 1), got {brief(self.ema)}")
        check_bool("keep_best", self.keep_best)
        if self.patience is not None:
            check_int("patience", self.patience, 1)
            if self.patience >= self.epochs:
                raise ValueError(
                    f"patience must be < epochs={self.epochs}, got {self.patience}: it would never stop the run"
                )
        if isinstance(self.milestones, str) or not isinstance(self.milestones, Iterable):
            raise TypeError(f"milestones must be fractions of the epochs in [0, 1], got {describe(self.milestones)}")
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for milestone in self.milestones:
            check_float("milestones", milestone, "fractions of the epochs in [0, 1]", 0.0, 1.0)
        check_float("label_smoothing", self.label_smoothing, "a number in [0, 1]", 0.0, 1.0)
        for name in ("milestones", "gamma"):
            default = Recipe.__dataclass_fields__[name].default
            check_used(name, getattr(self, name), default, self.schedule != "milestones", f"schedule {self.schedule!r}")
        check_device(self.device)
        if not isinstance(self.precision, str) or self.precision not in PRECISIONS:
            nearest = did_you_mean(self.precision, PRECISIONS)
            raise ValueError(f"precision must be {', '.join(PRECISIONS)}, got {brief(self.precision)}{nearest}")
        check_bool("compile", self.compile)
        if self.condense is None:
            object.__setattr__(self, "condense", Condense(keep=1.0))
        if not isinstance(self.condense, Condense):
            raise TypeError(f"condense must be a Condense or None, got {type(self.condense).__name__}")
        if self.condense.drops_samples:
            if self.epochs == 1:
                raise ValueError("epochs must be > 1 if condense.keep < 1, got 1: nothing would be condensed")
            if (self.condense.every or 1) >= self.epochs:
                raise ValueError(
                    f"condense.every must be < epochs={self.epochs}, got {self.condense.every}: nothing would be condensed"
                )
            every = self.condense.example(self.epochs).every
            last = (self.epochs - 1) // every * every
            if self.condense.warmup > last:
                raise ValueError(
                    f"condense.warmup must be <= {last}, the last condensation before the end of epochs={self.epochs}, "
                    f"got {self.condense.warmup}: nothing would be condensed"
                )
        if not isinstance(self.options, Mapping):
            raise TypeError(f"options must be a mapping of the method's arguments, got {type(self.options).__name__}")

    def _usual(self, name: str) -> float | None:
        """Return the optimizer's usual value of `lr` or `weight_decay`."""
        return getattr(kind_of(self.optimizer), name)

    @property
    def label(self) -> str:
        """The name of the run in tables and files.

        It is `name` or, if that is empty, the method. If samples are dropped by value, the method gets the prefix `kc-`. With
        another selection the label is that selection's name, followed by the method unless it is `kd`. A value other than
        the entropy comes last.
        """
        if self.name or not self.condense.drops_samples:
            return self.name or self.method
        value = "" if self.condense.value == "entropy" else f"-{self.condense.value}"
        if self.condense.selection == "value":
            return f"kc-{self.method}{value}"
        method = "" if self.method == "kd" else f"-{self.method}"
        return f"{self.condense.selection}{method}{value}"

    def lr_at(self, epoch: int, fraction: float = 0.0, factor: float | None = None) -> float:
        """Return the learning rate of a step. It depends only on the arguments.

        Args:
            epoch: 0 <= epoch < epochs.
            fraction: The steps that the epoch has done, divided by all its steps: 0 <= fraction < 1.
            factor: The factor of a method that has its own schedule. None: that of `schedule`.
        """
        done = epoch + fraction
        if factor is None:
            factor = SCHEDULES[self.schedule](self, epoch, done)
        warm = done / self.warmup_epochs if done < self.warmup_epochs else 1.0
        return self.lr * factor * warm

    @classmethod
    def from_json(cls, plain: Mapping[str, object]) -> "Recipe":
        """Return the recipe that `as_json` returned as JSON."""
        return cls(**{**plain, "condense": Condense(**plain["condense"])})

    def as_json(self) -> dict[str, object]:
        """Return the recipe as numbers, strings, lists and dictionaries."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {
            "options": dict(self.options),
            "milestones": list(self.milestones),
            "condense": asdict(self.condense),
        }
        return plain | changed
