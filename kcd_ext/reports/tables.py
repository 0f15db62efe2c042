"""Tables of runs, and sentences about them. A table is a list of rows of text, its header first."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev

import numpy as np

from ..terminal import printable
from ..training.summary import Summary
from .runs import TEACHER

Table = list[list[str]]

CLASSES = 20  # of a table or a drawing, at most
STAGES = 8  # of a table, at most
SAME = 0.5  # percentage points: two accuracies of one network on one set are no further apart, on whatever device
RESULTS = (
    "method",
    "accuracy last, %",
    "accuracy best, %",
    "agreement, %",
    "sample visits",
    "teacher visits",
    "FLOPs",
    "seconds",
    "condensation",
)
AGREEMENT = RESULTS.index("agreement, %")


def by_method(summaries: Iterable[Summary]) -> dict[str, list[Summary]]:
    """Return the summaries of each method, in the order of their first appearance."""
    groups: dict[str, list[Summary]] = {}
    for summary in summaries:
        groups.setdefault(summary.method, []).append(summary)
    return groups


def results_table(summaries: Iterable[Summary], baseline: str = "kd") -> Table:
    """Return a row for each method, in the order of their first appearance: means ± sample standard deviations over seeds.

    Before them is a row for each teacher that was measured and is none of the methods (`measured_teachers`). Visits are also
    given in percent of those of `baseline`, where it was run; condensation in percent of the seconds. The agreement with the
    teacher is left out where no run was evaluated.
    """
    groups = by_method(summaries)
    flops = {method: _mean_flops(group) for method, group in groups.items()}
    largest = max((count for count in flops.values() if count is not None), default=0)
    unit, letter = next(((unit, letter) for unit, letter in ((1e15, "P"), (1e12, "T")) if largest >= unit), (1e9, "G"))

    def visits(name: str, group: Sequence[Summary]) -> str:
        count = mean(getattr(s, name) for s in group)
        full = mean(getattr(s, name) for s in groups[baseline]) if baseline in groups else 0
        return f"{count:,.0f}" + (f" ({100 * count / full:.1f} %)" if full and count else "")

    measured = measured_teachers(groups).items()
    rows = [[name, spread(accuracies, ".2f"), *["-"] * (len(RESULTS) - 2)] for name, accuracies in measured]
    for method, group in groups.items():
        seconds = [s.seconds for s in group]
        rows.append(
            [
                method,
                spread([s.accuracy_last for s in group], ".2f"),
                spread([s.accuracy_best for s in group], ".2f"),
                _agreement(group),
                visits("sample_visits", group),
                visits("teacher_visits", group),
                "unknown" if flops[method] is None else f"{flops[method] / unit:.4g} {letter}",
                spread(seconds, ".1f"),
                f"{100 * sum(s.condensation_seconds for s in group) / (sum(seconds) or 1):.1f} %",
            ]
        )
    table = [[*RESULTS], *rows]
    if all(row[AGREEMENT] == "-" for row in rows):
        table = [row[:AGREEMENT] + row[AGREEMENT + 1 :] for row in table]
    return table


def measured_teachers(groups: Mapping[str, Sequence[Summary]]) -> dict[str, list[float]]:
    """Return the accuracies of the teachers of these runs, as they were measured: name -> percent, those that differ.

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


def as_text(table: Table) -> list[str]:
    """Return the lines of a table for a terminal: columns padded to their widest entry, numbers to the right."""
    table = [[printable(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in table
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def number(value: float, form: str) -> str:
    """Return a number as text, a dash where it is not finite."""
    if not math.isfinite(value):
        return "-"
    text = f"{value:{form}}"
    return text if float(text) else text.lstrip("+-")  # what rounds to 0 has no sign


def spread(numbers: Sequence[float], form: str) -> str:
    """Return the mean ± the sample standard deviation, which a single number has none of."""
    if len(numbers) == 1:
        return f"{numbers[0]:{form}}"
    return f"{mean(numbers):{form}} ± {stdev(numbers):{form}}"


def _agreement(group: Sequence[Summary]) -> str:
    """Return that of the runs that were evaluated, and how many those are where it is not all of them."""
    found = [s.evaluation.agreement for s in group if s.evaluation is not None]
    if not found:
        return "-"
    return spread(found, ".2f") + (f" ({len(found)} of {len(group)})" if len(found) < len(group) else "")


def _mean_flops(group: Sequence[Summary]) -> float | None:
    """Return None where those of a run are not known."""
    counts = [s.flops for s in group]
    return None if None in counts else mean(counts)


def kept_by_class(steps: Sequence[Mapping], class_names: Sequence[str] = ()) -> Table:
    """Return a row for each class: the samples of it that each E-step keeps.

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


def evaluation_table(summaries: Sequence[Summary]) -> Table:
    """Return a row for each run that was evaluated: what differs between it and its teacher."""
    labels = temperatures(summaries)
    head = ["run", "accuracy, %", "teacher's accuracy, %", "agreement, %"]
    head += [f"KL, T = {label}" for label in labels.values()]
    head += ["ECE, %", "teacher's ECE, %", "slope of log-odds", "halves of log-odds", "worst class, points"]
    rows = []
    for name, evaluation in ((name, summary.evaluation) for name, summary in named(summaries)):
        student, teacher, log_odds = evaluation.student, evaluation.teacher, evaluation.exaggeration
        divergences = {one.temperature: one.kl for one in evaluation.divergence}
        rows.append(
            [
                name,
                *(number(x, ".2f") for x in (student.accuracy, teacher.accuracy, evaluation.agreement)),
                *(number(divergences.get(t, math.nan), ".4g") for t in labels),
                *(number(x, ".2f") for x in (student.ece, teacher.ece)),
                number(log_odds.slope, ".4g"),
                " / ".join(number(x, "+.4g") for x in (log_odds.below, log_odds.above)),
                number(evaluation.worst_class_change, "+.2f"),
            ]
        )
    return [head, *rows]


def notes_on_teachers(summaries: Sequence[Summary]) -> list[str]:
    """Return a sentence for each teacher: which runs were compared with it, and whether it is their own."""
    found = [(name, summary.compared_with) for name, summary in named(summaries) if summary.compared_with]
    names: dict[str, list[str]] = {}
    for name, one in found:
        of = (
            f"the teacher of their own, {one.network} (weights {one.weights})" if one.own else f"another teacher, {one}"
        )
        names.setdefault(of, []).append(name)
    return [f"Compared with {of}: {'; '.join(runs)}." for of, runs in names.items()]


def notes_on_agreement(summaries: Sequence[Summary]) -> list[str]:
    """Return what keeps agreements from being compared: those with another teacher than the run's own, or several."""
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


def temperatures(summaries: Sequence[Summary]) -> dict[float, str]:
    """Return the temperatures of all evaluations, each with a label of as many digits as tell them apart."""
    found = sorted({one.temperature for _, summary in named(summaries) for one in summary.evaluation.divergence})
    labels = ([f"{temperature:.{digits}g}" for temperature in found] for digits in range(6, 18))
    return dict(zip(found, next(each for each in labels if len(set(each)) == len(each)), strict=True))
