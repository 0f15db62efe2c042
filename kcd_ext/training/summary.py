"""What a run came to."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

from ..condensation import KnowledgeCondenser
from ..evaluation import Evaluation


@dataclass(frozen=True)
class ComparedWith:
    """The teacher that a student was compared with when it was evaluated."""

    network: str
    path: str
    """Where its weights were read."""
    weights: str
    """Their digest."""
    own: bool
    """Whether it is the one that the student was distilled from."""

    def __str__(self) -> str:
        return f"{self.network} of {self.path} (weights {self.weights})"


@dataclass(frozen=True)
class Summary:
    """The result of one `distill`."""

    method: str
    """The label of the recipe."""
    seed: int
    accuracy_last: float
    """Test accuracy after the last epoch, percent."""
    accuracy_best: float
    """Highest test accuracy of any epoch, percent."""
    sample_visits: int
    """Samples the student was trained on, summed over epochs and processes; repeats that fill up a batch left out."""
    teacher_visits: int
    """Rows that the teacher was asked about, in all, pretraining included; with several processes repeats too."""
    seconds: float
    """Wall time of pretraining, training and condensation; validation and writing are not in it."""
    condensation_seconds: float = 0.0
    """The part of `seconds` that condensation took: order of the samples, value table, ranking, mixes."""
    flops: int | None = None
    """Estimated floating-point operations of training: a forward pass of the teacher for each of its rows, and three of
    the student for each of its own (the backward pass is counted as two), plus pretraining's. None: not countable."""
    history: Sequence[dict] = field(repr=False, default=())
    """A dictionary an epoch: the lines of metrics.jsonl."""
    condenser: KnowledgeCondenser | None = field(repr=False, compare=False, default=None)
    """Holds every sample's value at the end."""
    evaluation: Evaluation | None = field(repr=False, compare=False, default=None)
    """What `kcd evaluate` has found out about the student since, if anything."""
    compared_with: ComparedWith | None = field(repr=False, compare=False, default=None)
    """Whom it was compared with there."""
    teacher_accuracy: float | None = None
    """The teacher's test accuracy on the same images, percent, measured before training. None: there is no teacher, or an
    older version has made the run."""

    def as_json(self) -> dict[str, object]:
        """An entry of `results` in summary.json."""
        left_out = ("history", "condenser", "evaluation", "compared_with")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}


def results(dataset: str, seeds: Sequence[int], summaries: Iterable[Summary]) -> dict[str, object]:
    """The content of summary.json."""
    return {"dataset": dataset, "seeds": list(seeds), "results": [summary.as_json() for summary in summaries]}
