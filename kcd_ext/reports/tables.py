"""Tables of runs: a row for each method, its means over seeds."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import mean, stdev

import numpy as np

from ..terminal import printable
from ..training.summary import Summary
from .runs import TEACHER

CLASSES = 20  # of a table or a drawing, at most
STAGES = 8  # of a table, at most
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


def by_method(summaries: Iterable[Summary]) -> dict[str, list[Summary]]:
    """Return the summaries of each method, in the order of their first appearance."""
    groups: dict[str, list[Summary]] = {}
    for summary in summaries:
        groups.setdefault(summary.method, []).append(summary)
    return groups


def tabulate(summaries: Iterable[Summary], baseline: str = "kd") -> list[Row]:
    """A row for each method, in the order of their first appearance; mean ± sample standard deviation over seeds.

    Before them is one for each teacher that was measured and is none of the methods (`measured_teachers`). Visits are also
    given in percent of those of `baseline`, where it was run; condensation in percent of the seconds.
    """
    groups = by_method(summaries)
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


def kept_by_class(steps: Sequence[Mapping], class_names: Sequence[str] = ()) -> list[list[str]]:
    """Return a table, its header first: a row for each class, the samples of it that each E-step keeps.

    Of more than CLASSES classes those of which the last step keeps fewest, of more than STAGES steps that many of them.
    """
    shown = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, min(len(steps), STAGES)).astype(int))]
    last = shown[-1]["classes"]
    fewest = sorted(range(len(last)), key=lambda label: last[label])[:CLASSES]
    names = class_names if len(class_names) == len(last) else [f"class {label}" for label in range(len(last))]
    rows = [[names[label], *(f"{step['classes'][label]:,}" for step in shown)] for label in sorted(fewest)]
    totals = ["all", *(f"{sum(step['classes']):,}" for step in shown)]
    return [["class", *(f"stage {step['stage']}" for step in shown)], *rows, totals]


# --- evaluations ------------------------------------------------------------------------------------------------------


def evaluation_table(summaries: Sequence[Summary]) -> list[list[str]]:
    """A table, its header first: a row for each run that was evaluated, with what differs between it and its teacher."""
    found = named(summaries)
    temperatures = _temperatures(found)
    labels = _labels(temperatures)
    head = ["run", "accuracy, %", "teacher's accuracy, %", "agreement, %", *(f"KL, T = {label}" for label in labels)]
    head += ["ECE, %", "teacher's ECE, %", "slope of log-odds", "halves of log-odds", "worst class, points"]
    rows = []
    for name, evaluation in ((name, summary.evaluation) for name, summary in found):
        divergences = {one.temperature: one.kl for one in evaluation.divergence}
        of_log_odds = evaluation.exaggeration
        rows.append(
            [
                name,
                *(number(x, ".2f") for x in (evaluation.student.accuracy, evaluation.teacher.accuracy)),
                number(evaluation.agreement, ".2f"),
                *(number(divergences.get(t, math.nan), ".4g") for t in temperatures),
                *(number(x, ".2f") for x in (evaluation.student.ece, evaluation.teacher.ece)),
                number(of_log_odds.slope, ".4g"),
                " / ".join(number(x, "+.4g") for x in (of_log_odds.below, of_log_odds.above)),
                number(evaluation.worst_class_change, "+.2f"),
            ]
        )
    return [head, *rows]


def notes_on_teachers(summaries: Sequence[Summary]) -> list[str]:
    """A sentence for each teacher: which runs were compared with it, and whether it is their own."""
    found = [(name, summary.compared_with) for name, summary in named(summaries) if summary.compared_with]
    names: dict[str, list[str]] = {}
    for name, one in found:
        of = (
            f"the teacher of their own, {one.network} (weights {one.weights})" if one.own else f"another teacher, {one}"
        )
        names.setdefault(of, []).append(name)
    return [f"Compared with {of}: {'; '.join(runs)}." for of, runs in names.items()]


def notes_on_agreement(summaries: Sequence[Summary]) -> list[str]:
    """What keeps agreements from being compared: whose is not with the run's own teacher, and where teachers differ."""
    found = [(name, summary) for name, summary in named(summaries) if summary.compared_with]
    teachers: dict[str, set[str]] = {}
    for _, summary in found:
        teachers.setdefault(summary.method, set()).add(summary.compared_with.weights)
    others: dict[str, list[str]] = {}
    for name, summary in found:
        if not summary.compared_with.own:  # a method by its name where that says it of all its seeds
            who = summary.method if len(teachers[summary.method]) == 1 else name
            others.setdefault(str(summary.compared_with), []).append(who)
    notes = [
        f"The agreement of {'; '.join(dict.fromkeys(names))} is with {of}, not with a teacher that it was distilled from."
        for of, names in others.items()
    ]
    if len(set().union(*teachers.values())) > 1:
        notes.append("Not all agreements are with the same teacher: the evaluation says with which.")
    notes += [
        f"The agreement of {method} is the mean over different teachers."
        for method, of in teachers.items()
        if len(of) > 1
    ]
    return notes


def named(summaries: Sequence[Summary]) -> list[tuple[str, Summary]]:
    """Return the runs that were evaluated, each with its name: the method and, where there are several of it, the seed."""
    runs = Counter(summary.method for summary in summaries)
    return [
        (summary.method if runs[summary.method] == 1 else f"{summary.method}, seed {summary.seed}", summary)
        for summary in summaries
        if summary.evaluation is not None
    ]


def _temperatures(found: Sequence[tuple[str, Summary]]) -> list[float]:
    return sorted({one.temperature for _, summary in found for one in summary.evaluation.divergence})


def _labels(temperatures: Sequence[float]) -> list[str]:
    """With as many digits as tell them apart."""
    for digits in range(6, 17):
        labels = [f"{t:.{digits}g}" for t in temperatures]
        if len(set(labels)) == len(set(temperatures)):
            return labels
    return [repr(t) for t in temperatures]


def number(value: float, form: str) -> str:
    """Return a number as text, a dash where it is not finite."""
    if not math.isfinite(value):
        return "-"
    text = f"{value:{form}}"
    return text if float(text) else text.lstrip("+-")  # what rounds to 0 has no sign


def quality_table(summaries: Sequence[Summary]) -> list[list[str]]:
    """Return a table, its header first: what the probabilities of each run and its teacher are worth at each temperature."""
    found = named(summaries)
    temperatures = _temperatures(found)
    labels = dict(zip(temperatures, _labels(temperatures), strict=True))
    rows = [
        [name, labels[own.temperature], *(number(x, ".4g") for x in (own.nll, other.nll, own.brier, other.brier))]
        for name, summary in found
        for own, other in zip(summary.evaluation.student.quality, summary.evaluation.teacher.quality, strict=True)
    ]
    return [["run", "temperature", "NLL", "teacher's NLL", "Brier", "teacher's Brier"], *rows]
