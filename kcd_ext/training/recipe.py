"""The training configuration: every number that decides a run's result, checked on construction."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields

from ..checks import check_bool, check_device, check_float, check_int
from ..condensation.options import Condense
from ..condensation.random_keys import MAX_SEED
from ..describe import brief, describe, did_you_mean

PRECISIONS = {"auto": None, "float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # -> accelerate's names


def milestones_passed(milestones: Iterable[float], epoch: int, epochs: int) -> int:
    """Return how many milestones, given as fractions of `epochs`, have passed when `epoch` begins (0 <= epoch < epochs).

    0.07 of 100 epochs is 7, although `0.07 * 100` is slightly larger in floating point.
    """
    return sum(epoch >= round(milestone * epochs, 9) for milestone in milestones)


@dataclass(frozen=True)
class Recipe:
    """The training configuration of a student. The defaults are those of KCD on CIFAR-100 (Li et al., ECCV 2022).

    Recipes compare by their fields. They are not hashable, because `options` is a mapping.

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
    lr: float = 0.05
    """Initial learning rate of stochastic gradient descent."""
    momentum: float = 0.9
    """Momentum of stochastic gradient descent."""
    weight_decay: float = 5e-4
    """L2 penalty: each weight times this number is added to the weight's gradient."""
    milestones: tuple[float, ...] = (0.625, 0.75, 0.875)
    """Fractions of `epochs` at which `gamma` multiplies the learning rate (150, 180, 210 of 240). Not if the method has its own."""
    gamma: float = 0.1
    """Factor of the learning rate at a milestone."""
    mixup: float = 0.0
    """Mixup: alpha of Beta(alpha, alpha), the shares of two images that are blended, such as 0.2. 0: off. For ce and kd."""
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
        for name in ("lr", "momentum", "weight_decay", "gamma", "mixup", "cutmix"):
            check_float(name, getattr(self, name), "a finite number >= 0", 0.0, 3e38)  # the float32 range
            if name in ("mixup", "cutmix") and getattr(self, name) and self.batch_size == 1:
                raise ValueError(
                    f"batch_size must be > 1 with {name}={getattr(self, name)}, got 1: nothing would be mixed"
                )
        if isinstance(self.milestones, str) or not isinstance(self.milestones, Iterable):
            raise TypeError(f"milestones must be fractions of the epochs in [0, 1], got {describe(self.milestones)}")
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for milestone in self.milestones:
            check_float("milestones", milestone, "fractions of the epochs in [0, 1]", 0.0, 1.0)
        check_float("label_smoothing", self.label_smoothing, "a number in [0, 1]", 0.0, 1.0)
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
            last = (self.epochs - 1) // self.condense.interval(self.epochs) * self.condense.interval(self.epochs)
            if self.condense.warmup > last:
                raise ValueError(
                    f"condense.warmup must be <= {last}, the last condensation before the end of epochs={self.epochs}, "
                    f"got {self.condense.warmup}: nothing would be condensed"
                )
        if not isinstance(self.options, Mapping):
            raise TypeError(f"options must be a mapping of the method's arguments, got {type(self.options).__name__}")

    @property
    def label(self) -> str:
        """The name of the run in tables and files.

        It is `name` or, if that is empty, the method. If samples are dropped by value, the method gets the prefix `kc-`. With
        another selection the label is that selection's name, followed by the method unless it is `kd`.
        """
        if self.name or not self.condense.drops_samples:
            return self.name or self.method
        if self.condense.selection == "value":
            return f"kc-{self.method}"
        return self.condense.selection if self.method == "kd" else f"{self.condense.selection}-{self.method}"

    def lr_at(self, epoch: int) -> float:
        """Return the learning rate of an epoch, 0 <= epoch < epochs. It depends only on the epoch."""
        return self.lr * self.gamma ** milestones_passed(self.milestones, epoch, self.epochs)

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
