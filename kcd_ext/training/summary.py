"""The result of a run."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

from ..condensation import KnowledgeCondenser
from ..evaluation import Evaluation


@dataclass(frozen=True)
class ComparedWith:
    """The teacher that a student was compared with when it was evaluated."""

    network: str
    path: str
    """The file or folder that its weights were read from."""
    weights: str
    """The digest of its weights."""
    own: bool
    """Whether the student was distilled from it."""

    def __str__(self) -> str:
        return f"{self.network} of {self.path} (weights {self.weights})"


@dataclass(frozen=True)
class Summary:
    """The result of one `distill`."""

    method: str
    """The recipe's `label`."""
    seed: int
    accuracy_last: float
    """Test accuracy after the last epoch, in percent."""
    accuracy_best: float
    """Highest test accuracy of any epoch, in percent."""
    sample_visits: int
    """Samples that the student was trained on, summed over epochs and ranks, without padding repeats."""
    teacher_visits: int
    """Rows that the teacher processed in total, pretraining included. With several ranks it includes padding repeats."""
    seconds: float
    """Wall time of pretraining, training and condensation, without validation and writing."""
    condensation_seconds: float = 0.0
    """The part of `seconds` spent on condensation: order of the samples, value table, ranking and mixes."""
    flops: int | None = None
    """Estimated floating-point operations of training and pretraining. A teacher's row counts one forward pass, a student's
    row three (the backward pass counts as two). None: they cannot be counted."""
    history: Sequence[dict] = field(repr=False, default=())
    """One dictionary per epoch: the lines of metrics.jsonl."""
    condenser: KnowledgeCondenser | None = field(repr=False, compare=False, default=None)
    """The condenser after the last epoch, with the knowledge value of every sample."""
    evaluation: Evaluation | None = field(repr=False, compare=False, default=None)
    """The result of `kcd evaluate`, if it was run."""
    compared_with: ComparedWith | None = field(repr=False, compare=False, default=None)
    """The teacher of that evaluation."""
    teacher_accuracy: float | None = None
    """The teacher's test accuracy in percent, measured before training on the same images. None: there is no teacher, or an
    older version made the run."""

    def as_json(self) -> dict[str, object]:
        """Return the entry of `results` in summary.json."""
        omitted = ("history", "condenser", "evaluation", "compared_with")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in omitted}


def results(dataset: str, seeds: Sequence[int], summaries: Iterable[Summary]) -> dict[str, object]:
    """Return the content of summary.json."""
    return {"dataset": dataset, "seeds": list(seeds), "results": [summary.as_json() for summary in summaries]}
