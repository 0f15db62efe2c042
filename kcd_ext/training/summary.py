"""What a run came to, and a table of many."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from statistics import mean, stdev

from ..condensation import KnowledgeCondenser


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
    """Rows that the teacher was asked about, in all; with several processes repeats are among them."""
    seconds: float
    """Wall time of training and condensation; validation and writing are not in it."""
    history: Sequence[dict] = field(repr=False, default=())
    """A dictionary an epoch: the lines of metrics.jsonl."""
    condenser: KnowledgeCondenser | None = field(repr=False, compare=False, default=None)
    """Holds every sample's value at the end."""

    def as_json(self) -> dict[str, object]:
        """An entry of `results` in summary.json."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("history", "condenser")}


def results(dataset: str, seeds: Sequence[int], summaries: Iterable[Summary]) -> dict[str, object]:
    """The content of summary.json."""
    return {"dataset": dataset, "seeds": list(seeds), "results": [summary.as_json() for summary in summaries]}


@dataclass(frozen=True)
class Row:
    """A method's means over seeds, as text ready to print."""

    method: str
    accuracy_last: str
    accuracy_best: str
    sample_visits: str
    teacher_visits: str
    seconds: str


HEADER = Row("method", "accuracy last, %", "accuracy best, %", "sample visits", "teacher visits", "seconds")


def tabulate(summaries: Iterable[Summary], baseline: str = "kd") -> list[Row]:
    """A row for each method, in the order of their first appearance; mean ± sample standard deviation over seeds.

    Visits are also given in percent of those of `baseline`, where it was run.
    """
    groups: dict[str, list[Summary]] = {}
    for summary in summaries:
        groups.setdefault(summary.method, []).append(summary)

    def visits(name: str, group: list[Summary]) -> str:
        count = mean(getattr(s, name) for s in group)
        full = mean(getattr(s, name) for s in groups[baseline]) if baseline in groups else 0
        return f"{count:,.0f}" + (f" ({100 * count / full:.1f} %)" if full and count else "")

    return [
        Row(
            method=method,
            accuracy_last=_spread([s.accuracy_last for s in group], ".2f"),
            accuracy_best=_spread([s.accuracy_best for s in group], ".2f"),
            sample_visits=visits("sample_visits", group),
            teacher_visits=visits("teacher_visits", group),
            seconds=_spread([s.seconds for s in group], ".1f"),
        )
        for method, group in groups.items()
    ]


def as_text(rows: Sequence[Row]) -> str:
    """The table for a terminal: columns padded to their widest entry, numbers to the right."""
    cells = [[getattr(row, f.name) for f in fields(Row)] for row in (HEADER, *rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _spread(numbers: Sequence[float], form: str) -> str:
    if len(numbers) == 1:
        return f"{numbers[0]:{form}}"
    return f"{mean(numbers):{form}} ± {stdev(numbers):{form}}"
