"""`Condense`: the options of condensation in a training configuration."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields

from ..checks import check_choice, check_fraction, check_int
from ..describe import brief
from ..registry import resolve
from .condenser import KnowledgeCondenser

SELECTIONS = {
    "value": "kcd_ext.condensation:KnowledgeCondenser",
    "random": "kcd_ext.condensation:RandomCondenser",
    "infobatch": "kcd_ext.condensation:InfoBatch",
    "importance": "kcd_ext.condensation:ImportanceCondenser",
    "uniform": "kcd_ext.condensation:UniformCondenser",
}
MEASURES = {"entropy": "value", "kl": "kl", "loss": "losses"}  # knowledge value -> `KnowledgeCondenser.measure`
NOT_OF_CONDENSER = ("selection", "value", "batch_keep")  # options that are not arguments of a condenser


@dataclass(frozen=True)
class Condense:
    """The options of condensation: those of `KnowledgeCondenser`, the selection, and the rows distilled per batch.

    There are two ways to condense, and they combine: over the data set (`keep` < 1), as in the paper, and within every
    batch (`batch_keep` < 1).

    `selection` names how samples are selected:

    - `value`: the samples of highest value.
    - `random`: sets of the same sizes, as a control.
    - `infobatch` (Qin et al., 2024): redrawn every epoch; `keep` is the probability that a sample of low loss stays.
    - `importance`: redrawn every epoch after the first, without bias, valuable samples more often; `keep` is their fraction.
    - `uniform`: as importance, with equal probabilities, as a control.
    - `module:Class`: a custom selection.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range or has no effect with this selection.
    """

    keep: float = 0.7
    """Fraction of the training set kept in the end, in (0, 1]. 1: keep all. infobatch: probability that a low-loss sample stays."""
    every: int | None = None
    """Epochs between two condensation steps. None: `stages` equal parts of the run (40 of 240 epochs)."""
    stages: int = 6
    """Condensation steps until `keep` is reached."""
    schedule: str = "reference"
    """How fast the set shrinks: reference (the authors' code), cosine or immediate."""
    alpha: float = 0.03
    """Exponent of the number of visits in the ranking (Eq. 13)."""
    epsilon: float = 0.3
    """Largest share of a dropped image in a mixed one (Eq. 15). 0: no mixing, and images may differ in size."""
    accumulate: bool = True
    """Mix already mixed images again at the next condensation step, as the authors' code does."""
    convex: bool = True
    """Mix (1 - e) kept + e dropped, as in the authors' code. False: kept + e dropped, as in the paper."""
    selection: str = "value"
    """How samples are selected: value (the highest), random (a control), infobatch, importance, uniform or module:Class."""
    value: str = "entropy"
    """The value of a sample: the student's entropy, kl (to the teacher, at the loss's temperature) or loss."""
    warmup: int = 0
    """Skip condensation steps before the end of this epoch (the authors' --warmup), so `keep` may not be reached."""
    min_per_class: int = 0
    """Training samples to keep of every class at least; all of a class that has fewer."""
    batch_keep: float = 1.0
    """Fraction of every batch to run the teacher on, in (0, 1]: the rows with the highest student entropy."""

    def __post_init__(self) -> None:
        check_fraction("batch_keep", self.batch_keep)
        check_fraction("keep", self.keep)
        if self.every is not None:
            check_int("every", self.every, 1)
        check_int("stages", self.stages, 1)
        check_int("warmup", self.warmup, 0)
        check_int("min_per_class", self.min_per_class, 0)
        check_choice("value", self.value, MEASURES)
        self.example()  # the condenser checks its own options

    @property
    def drops_samples(self) -> bool:
        """Whether epochs visit fewer than all samples."""
        return self.keep < 1

    def interval(self, epochs: int) -> int:
        """Return the number of epochs between two condensation steps in a run of `epochs`."""
        # A set that does not shrink gets an interval longer than the run.
        return self.every or (-(-epochs // self.stages) if self.drops_samples else epochs + 1)

    def build(
        self, num_samples: int, *, seed: int, device: object, epochs: int, labels: object = None
    ) -> KnowledgeCondenser:
        """Return the condenser of a training set.

        Args:
            num_samples: Size of the training set.
            seed: Seed of a selection that draws random numbers.
            device: Device of the value table.
            epochs: Length of the run.
            labels: Class of every sample, as `KnowledgeCondenser` takes them. Required if `min_per_class` > 0.

        Raises:
            TypeError: An option or `labels` has the wrong type.
            ValueError: An option is out of range, has no effect with this selection, or does not fit `labels`.
        """
        condenser, options = self._resolve(epochs)
        if self.min_per_class:
            options["labels"] = labels
        return self._measuring(condenser(num_samples, seed=seed, device=device, **options))

    def example(self, epochs: int = 1) -> KnowledgeCondenser:
        """Return a condenser of one sample, for the attributes of this selection. Raises as `build` does."""
        condenser, options = self._resolve(epochs)
        options.pop("min_per_class", None)  # its largest value depends on the labels
        return self._measuring(condenser(1, seed=0, device="cpu", **options))

    def _measuring(self, condenser: KnowledgeCondenser) -> KnowledgeCondenser:
        """Return the condenser, which will be fed with the value that `value` names."""
        if self.value != "entropy":
            if not condenser.ranks_by_value or condenser.measure != MEASURES["entropy"]:
                raise ValueError(f"value={self.value!r} has no effect with selection {self.selection!r}")
            condenser.measure = MEASURES[self.value]
        return condenser

    def _resolve(self, epochs: int) -> tuple[Callable[..., KnowledgeCondenser], dict[str, object]]:
        """Return the selection's class and the options that it takes."""
        condenser = resolve("selection", self.selection, SELECTIONS)
        parameters = inspect.signature(condenser).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        every = self.interval(epochs)
        # The interval is rounded up to full epochs, so fewer than `stages` intervals may fit.
        computed = {"every": every, "stages": self.stages if self.every else -(-epochs // every), "epochs": epochs}
        options = {}
        for option in fields(self):
            if option.name in NOT_OF_CONDENSER:
                continue
            chosen = getattr(self, option.name)
            value = computed.pop(option.name, chosen)
            if takes_all or option.name in parameters:
                options[option.name] = value
            elif chosen != option.default:
                raise ValueError(f"{option.name}={brief(chosen)} has no effect with selection {self.selection!r}")
        return condenser, options | {name: value for name, value in computed.items() if name in parameters}
