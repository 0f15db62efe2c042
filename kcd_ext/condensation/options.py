"""The options of condensation: how much is kept, who ranks, and when."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields

from ..checks import check_fraction, check_int
from ..describe import brief
from ..registry import resolve
from .condenser import KnowledgeCondenser

SELECTIONS = {
    "value": "kcd_ext.condensation:KnowledgeCondenser",
    "random": "kcd_ext.condensation:RandomCondenser",
    "infobatch": "kcd_ext.condensation:InfoBatch",
}


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
        check_fraction("batch_keep", self.batch_keep)
        check_fraction("keep", self.keep)
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
        """Return the condenser of a training set of this many samples, for a run of this many epochs.

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
        """Return the class that selects, and the arguments that it gets of these options."""
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
