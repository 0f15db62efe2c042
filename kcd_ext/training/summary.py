"""The result of a run."""

from collections.abc import Iterable, Mapping, Sequence
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


def best_epoch(history: Sequence[Mapping[str, object]]) -> int | None:
    """Return the epoch with the highest validation accuracy, the first of equal ones, counted from 1.

    Args:
        history: The lines of metrics.jsonl, at least one.

    Returns:
        The epoch, or None without a validation set.
    """
    if "val_accuracy" not in history[0]:
        return None
    return max(history, key=lambda line: line["val_accuracy"])["epoch"]


def best_accuracy(history: Sequence[Mapping[str, object]]) -> float:
    """Return the test accuracy of the `best_epoch`. Without a validation set it is the highest of any epoch."""
    best = best_epoch(history)
    return max(line["accuracy"] for line in history) if best is None else history[best - 1]["accuracy"]


@dataclass(frozen=True)
class Summary:
    """The result of one `distill`."""

    method: str
    """The recipe's `label`."""
    seed: int
    accuracy_last: float
    """Test accuracy after the last epoch, in percent."""
    accuracy_best: float
    """Test accuracy after `best_epoch`, in percent. Without a validation set: the highest test accuracy of any epoch."""
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
    best_epoch: int | None = None
    """The epoch with the highest validation accuracy, counted from 1. None: there is no validation set."""
    keeps_best: bool = False
    """Whether the run ended with the weights of `best_epoch`."""

    @property
    def accuracy(self) -> float:
        """Test accuracy of the student that the run ended with, in percent."""
        return self.accuracy_best if self.keeps_best else self.accuracy_last

    def as_json(self) -> dict[str, object]:
        """Return the entry of `results` in summary.json."""
        omitted = ("history", "condenser", "evaluation", "compared_with")
        if self.best_epoch is None:
            omitted += ("best_epoch", "keeps_best")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in omitted}


def results(dataset: str, seeds: Sequence[int], summaries: Iterable[Summary]) -> dict[str, object]:
    """Return the content of summary.json."""
    return {"dataset": dataset, "seeds": list(seeds), "results": [summary.as_json() for summary in summaries]}
