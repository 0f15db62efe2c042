"""What a run is: every number that decides its result, checked when it is written down."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields

from ..checks import check_bool, check_float, check_int
from ..condensation.options import Condense
from ..condensation.random_keys import MAX_SEED
from ..describe import brief, describe, did_you_mean

PRECISIONS = {"auto": None, "float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # as accelerate calls them


def milestones_passed(milestones: Iterable[float], epoch: int, epochs: int) -> int:
    """Return how many of these fractions of all epochs are over when `epoch` begins, 0 <= epoch < epochs.

    0.07 of 100 epochs are 7, though 0.07 * 100 is a little more in floating point.
    """
    return sum(epoch >= round(milestone * epochs, 9) for milestone in milestones)


@dataclass(frozen=True)
class Recipe:
    """How a student is trained. The defaults are those of KCD on CIFAR-100 (Li et al., ECCV 2022).

    Equal by its fields, and not hashable: `options` is a mapping.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range; names the field, what it got and takes.
    """

    method: str = "kd"
    """What is distilled: kd, pkt, crd, sskd, pwkd, iekd, ie-dml, kr, ce (nothing, only the labels), or module:Class."""
    options: Mapping[str, float | str] = field(default_factory=dict)
    """Keyword arguments of the method, as {"temperature": 4.0}."""
    condense: Condense = field(default_factory=lambda: Condense(keep=1.0))
    """Knowledge condensation. Left out, or None: every epoch visits the whole training set."""
    epochs: int = 240
    """Passes over what is kept of the training set."""
    batch_size: int = 64
    """Samples of a batch on each process, at most: an epoch is cut into equal batches, none smaller by more than one."""
    gradient_accumulation: int = 1
    """Batches whose gradients make one step."""
    lr: float = 0.05
    """The learning rate at the start, of stochastic gradient descent."""
    momentum: float = 0.9
    """Of the gradients."""
    weight_decay: float = 5e-4
    """Times a weight, added to its gradient."""
    milestones: tuple[float, ...] = (0.625, 0.75, 0.875)
    """Fractions of `epochs` at which the learning rate is multiplied by `gamma` (150, 180 and 210 of 240); a
    method with a schedule of its own (pwkd) takes none."""
    gamma: float = 0.1
    """What the learning rate is multiplied by at a milestone."""
    seed: int = 0
    """Decides the order of the samples and all randomness of training. The initial weights are the caller's."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu or cuda."""
    precision: str = "auto"
    """float32, bfloat16 or float16 autocast of the networks; auto: what accelerate was launched with, else float32."""
    compile: bool = False
    """Compiles student and teacher with torch.compile, for batches of any size; not the growing teacher of pwkd."""
    num_workers: int = 0
    """Processes that load data that does not lie in memory, started once a run: so many for training, so many for
    testing. What its transforms draw depends on how many they are."""
    name: str = ""
    """What tables and files call the run; empty: the method, with kc- before it where samples are condensed, or their
    selection (random, random-crd)."""

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("gradient_accumulation", 1), ("num_workers", 0)):
            check_int(name, getattr(self, name), least)
        check_int("seed", self.seed, 0, MAX_SEED)
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a string, got {describe(self.name)}")
        for name in ("lr", "momentum", "weight_decay", "gamma"):
            check_float(name, getattr(self, name), "a finite number >= 0", 0.0, 3e38)  # in single precision
        if isinstance(self.milestones, str) or not isinstance(self.milestones, Iterable):
            raise TypeError(f"milestones must be fractions of the epochs in [0, 1], got {describe(self.milestones)}")
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for milestone in self.milestones:
            check_float("milestones", milestone, "fractions of the epochs in [0, 1]", 0.0, 1.0)
        if not isinstance(self.device, str) or self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device must be auto, cpu or cuda, got {brief(self.device)}")
        if not isinstance(self.precision, str) or self.precision not in PRECISIONS:
            nearest = did_you_mean(self.precision, PRECISIONS)
            raise ValueError(f"precision must be {', '.join(PRECISIONS)}, got {brief(self.precision)}{nearest}")
        check_bool("compile", self.compile)
        if self.condense is None:
            object.__setattr__(self, "condense", Condense(keep=1.0))
        if not isinstance(self.condense, Condense):
            raise TypeError(f"condense must be a Condense or None, got {type(self.condense).__name__}")
        if self.condense.shrinks_the_set:
            if self.epochs == 1:
                raise ValueError("epochs must be > 1 where condense.keep < 1, got 1: nothing would be condensed")
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
        """The name of the run."""
        if self.name or not self.condense.shrinks_the_set:
            return self.name or self.method
        if self.condense.selection == "value":
            return f"kc-{self.method}"
        return self.condense.selection if self.method == "kd" else f"{self.condense.selection}-{self.method}"

    def lr_at(self, epoch: int) -> float:
        """The learning rate of an epoch, 0 <= epoch < epochs: a function of the epoch alone, so nothing to save."""
        return self.lr * self.gamma ** milestones_passed(self.milestones, epoch, self.epochs)

    @classmethod
    def from_json(cls, plain: Mapping[str, object]) -> "Recipe":
        """The recipe that `as_json` wrote down."""
        return cls(**{**plain, "condense": Condense(**plain["condense"])})

    def as_json(self) -> dict[str, object]:
        """Plain numbers, strings, lists and dictionaries."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {
            "options": dict(self.options),
            "milestones": list(self.milestones),
            "condense": asdict(self.condense),
        }
        return plain | changed
