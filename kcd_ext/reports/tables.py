"""Tables of runs: a row for each method, its means over seeds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import mean, stdev

from ..terminal import printable
from ..training.summary import Summary

TEACHER = "teacher"  # what tables call it
SAME = 0.5  # percentage points: two accuracies of one network on one set are no further apart, on whatever device


@dataclass(frozen=True)
class Row:
    """A method's means over seeds, as text ready to print."""

    method: str
    accuracy_last: str
    accuracy_best: str
    agreement: str
    """With the teacher; empty where no run of any method was evaluated."""
    sample_visits: str
    teacher_visits: str
    flops: str
    seconds: str
    condensation: str


HEADER = Row(
    method="method",
    accuracy_last="accuracy last, %",
    accuracy_best="accuracy best, %",
    agreement="agreement, %",
    sample_visits="sample visits",
    teacher_visits="teacher visits",
    flops="FLOPs",
    seconds="seconds",
    condensation="condensation",
)


def tabulate(summaries: Iterable[Summary], baseline: str = "kd") -> list[Row]:
    """A row for each method, in the order of their first appearance; mean ± sample standard deviation over seeds.

    Before them is one for each teacher that was measured and is none of the methods (`measured_teachers`). Visits are also
    given in percent of those of `baseline`, where it was run; condensation in percent of the seconds.
    """
    groups: dict[str, list[Summary]] = {}
    for summary in summaries:
        groups.setdefault(summary.method, []).append(summary)
    flops = {method: _mean_flops(group) for method, group in groups.items()}
    evaluated = any(s.evaluation is not None for group in groups.values() for s in group)
    unit, letter = _unit(max((count for count in flops.values() if count is not None), default=0))

    def visits(name: str, group: list[Summary]) -> str:
        count = mean(getattr(s, name) for s in group)
        full = mean(getattr(s, name) for s in groups[baseline]) if baseline in groups else 0
        return f"{count:,.0f}" + (f" ({100 * count / full:.1f} %)" if full and count else "")

    rest = fields(Row)[2:]
    teachers = [
        Row(name, _spread(accuracies, ".2f"), *("" if f.name == "agreement" and not evaluated else "-" for f in rest))
        for name, accuracies in measured_teachers(groups).items()
    ]
    return teachers + [
        Row(
            method=method,
            accuracy_last=_spread([s.accuracy_last for s in group], ".2f"),
            accuracy_best=_spread([s.accuracy_best for s in group], ".2f"),
            agreement=_agreement(group) if evaluated else "",
            sample_visits=visits("sample_visits", group),
            teacher_visits=visits("teacher_visits", group),
            flops="unknown" if flops[method] is None else f"{flops[method] / unit:.4g} {letter}",
            seconds=_spread([s.seconds for s in group], ".1f"),
            condensation=_share([s.condensation_seconds for s in group], [s.seconds for s in group]),
        )
        for method, group in groups.items()
    ]


def measured_teachers(groups: Mapping[str, Sequence[Summary]]) -> dict[str, list[float]]:
    """The accuracies of the teachers of these runs by method, as they were measured: name -> percent, those that differ.

    Left out are those that the runs called TEACHER have: they are in the table by themselves. Where methods have different
    teachers each is named after those it taught.
    """
    trained = [s.accuracy_last for s in groups.get(TEACHER, ())]
    found: dict[tuple[float, ...], list[str]] = {}
    for method, group in groups.items():
        accuracies = {s.teacher_accuracy for s in group if s.teacher_accuracy is not None}
        if any(min((abs(x - y) for y in trained), default=math.inf) > SAME for x in accuracies):
            found.setdefault(tuple(sorted(accuracies)), []).append(method)
    alone = len(found) == 1 and not trained
    return {TEACHER if alone else f"{TEACHER} of {', '.join(methods)}": [*key] for key, methods in found.items()}


def as_text(table: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, its header first, for a terminal: columns padded to their widest entry, numbers to the right."""
    table = [[printable(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in table
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def cells(summaries: Iterable[Summary], baseline: str = "kd") -> list[tuple[str, ...]]:
    """`tabulate` as plain text, its header first; without the column that nothing is known for."""
    rows = tabulate(summaries, baseline)
    shown = [f.name for f in fields(Row) if f.name != "agreement" or any(row.agreement for row in rows)]
    return [tuple(getattr(row, name) for name in shown) for row in (HEADER, *rows)]


def _spread(numbers: Sequence[float], form: str) -> str:
    if len(numbers) == 1:
        return f"{numbers[0]:{form}}"
    return f"{mean(numbers):{form}} ± {stdev(numbers):{form}}"


def _agreement(group: Sequence[Summary]) -> str:
    """Of the runs that were evaluated; says how many where that is not all of them."""
    found = [s.evaluation.agreement for s in group if s.evaluation is not None]
    if not found:
        return "-"
    return _spread(found, ".2f") + (f" ({len(found)} of {len(group)})" if len(found) < len(group) else "")


def _mean_flops(group: Sequence[Summary]) -> float | None:
    """None where one of them is not known."""
    counts = [s.flops for s in group]
    return None if None in counts else mean(counts)


def _unit(largest: float) -> tuple[float, str]:
    """Giga, tera or peta: in the largest unit that leaves one before the point, all of a table can be compared."""
    return next(((unit, letter) for unit, letter in ((1e15, "P"), (1e12, "T")) if largest >= unit), (1e9, "G"))


def _share(parts: Sequence[float], wholes: Sequence[float]) -> str:
    return f"{100 * sum(parts) / sum(wholes):.1f} %" if sum(wholes) else "0.0 %"
