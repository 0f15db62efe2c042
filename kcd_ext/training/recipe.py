"""What a run is: every number that decides its result, checked when it is written down."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields

from ..checks import check_bool, check_float, check_int
from ..condensation import KnowledgeCondenser
from ..condensation.random_keys import MAX_SEED
from ..describe import brief, describe
from ..methods.options import check_batch_keep
from ..registry import did_you_mean, resolve

SELECTIONS = {
    "value": "kcd_ext.condensation:KnowledgeCondenser",
    "random": "kcd_ext.condensation:RandomCondenser",
    "infobatch": "kcd_ext.condensation:InfoBatch",
}
PRECISIONS = {"auto": None, "float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # as accelerate calls them


def milestones_passed(milestones: Iterable[float], epoch: int, epochs: int) -> int:
    """Return how many of these fractions of all epochs are over when `epoch` begins, 0 <= epoch < epochs.

    0.07 of 100 epochs are 7, though 0.07 * 100 is a little more in floating point.
    """
    return sum(epoch >= round(milestone * epochs, 9) for milestone in milestones)


@dataclass(frozen=True)
class Condense:
    """Knowledge condensation: the options of `KnowledgeCondenser`, which checks them, who ranks, and how batches shrink.

    Two ways, combined at will: over the data set (`keep` < 1), as in the paper, and within every batch (`batch_keep` < 1).
    """

    keep: float = 0.7
    """The fraction of the training set that is left in the end, in (0, 1]; 1: the set stays whole."""
    every: int | None = None
    """Epochs between two condensations; None: the run in `stages` equal parts (40 of 240 epochs)."""
    stages: int = 6
    """Condensations until `keep` is reached."""
    schedule: str = "reference"
    """How fast the set shrinks: reference (authors' code), cosine or immediate."""
    alpha: float = 0.03
    """Weight of the number of visits in the ranking (Eq. 13)."""
    epsilon: float = 0.3
    """Largest share of a dropped image in a mixed one (Eq. 14); 0: nothing is mixed, and images may differ in size."""
    accumulate: bool = True
    """Mixed images are mixed again at the next condensation, as in the authors' code."""
    convex: bool = True
    """(1 - e) kept + e dropped, as in the authors' code; off: kept + e dropped, as in the paper."""
    selection: str = "value"
    """Who ranks: value (the student's entropy), random (the same sizes, for comparison), infobatch (Qin et al., 2024:
    anew in every epoch, `keep` the probability of a sample of low loss to stay) or module:Class."""
    warmup: int = 0
    """No condensation before the end of this epoch, as the authors' --warmup: those at earlier multiples of `every` are
    left out, and so `keep` may not be reached."""
    min_per_class: int = 0
    """At least so many training samples of every class are kept, or all where a class has fewer."""
    batch_keep: float = 1.0
    """The fraction of every batch, of highest student's entropy, that the teacher is asked about, in (0, 1]."""

    def __post_init__(self) -> None:
        check_batch_keep(self.batch_keep)
        check_float("keep", self.keep, "a number in (0, 1]", 5e-324, 1)
        if self.every is not None:
            check_int("every", self.every, 1)
        check_int("stages", self.stages, 1)
        check_int("warmup", self.warmup, 0)
        check_int("min_per_class", self.min_per_class, 0)
        self.example()  # the condenser knows what it takes

    @property
    def shrinks_the_set(self) -> bool:
        """Whether an epoch visits fewer samples than there are."""
        return self.keep < 1

    def interval(self, epochs: int) -> int:
        """Return the epochs from one condensation to the next in a run of this many."""
        # A set that stays whole waits for an epoch that never comes; else `stages` parts of the run.
        return self.every or (-(-epochs // self.stages) if self.shrinks_the_set else epochs + 1)

    def build(
        self, num_samples: int, *, seed: int, device: object, epochs: int, labels: object = None
    ) -> KnowledgeCondenser:
        """The condenser of a training set of this many samples, for a run of this many epochs.

        `labels`, the class of every sample as `KnowledgeCondenser` takes them, are needed where `min_per_class` > 0.

        Raises:
            TypeError, ValueError: an option is out of range, has no effect with this selection, or does not fit `labels`.
        """
        condenser, options = self._arguments(epochs)
        if self.min_per_class:
            options["labels"] = labels
        return condenser(num_samples, seed=seed, device=device, **options)

    def example(self, epochs: int = 1) -> KnowledgeCondenser:
        """Return a condenser of one sample, which shows what kind this selection is. Raises as `build` does."""
        condenser, options = self._arguments(epochs)
        options.pop("min_per_class", None)  # how large it may be depends on the labels
        return condenser(1, seed=0, device="cpu", **options)

    def _arguments(self, epochs: int) -> tuple[Callable[..., KnowledgeCondenser], dict[str, object]]:
        """The class that selects, and the arguments that it gets of these options."""
        condenser = resolve("selection", self.selection, SELECTIONS)
        parameters = inspect.signature(condenser).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        every = self.interval(epochs)
        # Equal parts: rounded up to whole epochs there can be fewer of them.
        given = {"every": every, "stages": self.stages if self.every else -(-epochs // every), "epochs": epochs}
        options = {}
        for option in fields(self):
            if option.name in ("selection", "batch_keep"):
                continue
            chosen = getattr(self, option.name)
            value = given.pop(option.name, chosen)
            if takes_all or option.name in parameters:
                options[option.name] = value
            elif chosen != option.default:
                raise ValueError(f"{option.name}={brief(chosen)} has no effect with selection {self.selection!r}")
        return condenser, options | {name: value for name, value in given.items() if name in parameters}


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
