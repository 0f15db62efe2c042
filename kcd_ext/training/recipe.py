"""What a run is: every number that decides its result, checked when it is written down."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields

from ..condensation import KnowledgeCondenser
from ..condensation.checks import real, whole
from ..condensation.random_keys import MAX_SEED
from ..registry import resolve

SELECTIONS = {
    "value": "kcd_ext.condensation:KnowledgeCondenser",
    "random": "kcd_ext.condensation:RandomCondenser",
}


@dataclass(frozen=True)
class Condense:
    """Knowledge condensation: the options of `KnowledgeCondenser`, which checks them, and who ranks the samples."""

    keep: float = 0.7
    """The fraction of the training set that is left in the end, in (0, 1]."""
    every: int = 40
    """Epochs between two condensations."""
    stages: int = 6
    """Condensations until `keep` is reached."""
    schedule: str = "reference"
    """How fast the set shrinks: reference (authors' code), cosine or immediate."""
    alpha: float = 0.03
    """Weight of the number of visits in the ranking (Eq. 13)."""
    epsilon: float = 0.3
    """Largest share of a dropped image in a mixed one (Eq. 14)."""
    accumulate: bool = True
    """Mixed images are mixed again at the next condensation, as in the authors' code."""
    convex: bool = True
    """(1 - e) kept + e dropped, as in the authors' code; off: kept + e dropped, as in the paper."""
    selection: str = "value"
    """Who ranks: value (the student's entropy), random (the same sizes, for comparison) or module:Class."""

    def __post_init__(self) -> None:
        self.build(1, seed=0, device="cpu")  # the condenser knows what it takes

    def build(self, num_samples: int, *, seed: int, device: object) -> KnowledgeCondenser:
        """The condenser of a training set of this many samples."""
        condenser = resolve("selection", self.selection, SELECTIONS)
        parameters = inspect.signature(condenser).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        options = {}
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name == "selection":
                continue
            if takes_all or option.name in parameters:
                options[option.name] = value
            elif value != option.default:
                raise ValueError(f"{option.name}={value!r} has no effect with selection {self.selection!r}")
        return condenser(num_samples, seed=seed, device=device, **options)


@dataclass(frozen=True)
class Recipe:
    """How a student is trained. The defaults are those of KCD on CIFAR-100 (Li et al., ECCV 2022).

    Equal by its fields, and not hashable: `options` is a mapping.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range; names the field, what it got and takes.
    """

    method: str = "kd"
    """A name of `kcd_ext.methods.REGISTRY`, or module:Class."""
    options: Mapping[str, float] = field(default_factory=dict)
    """Keyword arguments of the method, as {"temperature": 4.0}."""
    condense: Condense | None = None
    """None: every epoch visits the whole training set."""
    epochs: int = 240
    batch_size: int = 64
    """Samples of a step on each process."""
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    milestones: tuple[float, ...] = (0.625, 0.75, 0.875)
    """Fractions of `epochs` at which the learning rate is multiplied by `gamma` (150, 180 and 210 of 240)."""
    gamma: float = 0.1
    seed: int = 0
    """Decides the order of the samples and all randomness of training. The initial weights are the caller's."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu or cuda."""
    num_workers: int = 0
    """Processes that load data."""
    name: str = ""
    """What tables and files call the run; empty: the method, with kc- before it where samples are condensed."""

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("num_workers", 0)):
            whole(name, getattr(self, name), least)
        whole("seed", self.seed, 0, MAX_SEED)
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a string, got {type(self.name).__name__} {self.name!r}")
        for name in ("lr", "momentum", "weight_decay", "gamma"):
            real(name, getattr(self, name), "a finite number >= 0", 0.0, 3e38)  # in single precision
        if isinstance(self.milestones, str) or not isinstance(self.milestones, Iterable):
            raise TypeError(f"milestones must be fractions of the epochs in [0, 1], got {self.milestones!r}")
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for milestone in self.milestones:
            real("milestones", milestone, "fractions of the epochs in [0, 1]", 0.0, 1.0)
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device must be auto, cpu or cuda, got {self.device!r}")
        if self.condense is not None and not isinstance(self.condense, Condense):
            raise TypeError(f"condense must be a Condense or None, got {type(self.condense).__name__}")
        if self.condense is not None and self.condense.every >= self.epochs:
            raise ValueError(
                f"condense.every must be < epochs={self.epochs}, got {self.condense.every}: nothing would be condensed"
            )
        if not isinstance(self.options, Mapping):
            raise TypeError(f"options must be a mapping of the method's arguments, got {type(self.options).__name__}")

    @property
    def label(self) -> str:
        """The name of the run."""
        if self.name or self.condense is None:
            return self.name or self.method
        return f"kc-{self.method}" if self.condense.selection == "value" else self.condense.selection

    def lr_at(self, epoch: int) -> float:
        """The learning rate of an epoch, 0 <= epoch < epochs: a function of the epoch alone, so nothing to save."""
        return self.lr * self.gamma ** sum(epoch >= milestone * self.epochs for milestone in self.milestones)

    def as_json(self) -> dict[str, object]:
        """Plain numbers, strings, lists and dictionaries."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        condense = None if self.condense is None else asdict(self.condense)
        return plain | {"options": dict(self.options), "milestones": list(self.milestones), "condense": condense}
