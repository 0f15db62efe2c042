"""Tables of runs and sentences about them. A table is a list of rows of text that starts with its header."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean, stdev

import numpy as np

from ..evaluation import Evaluation
from ..terminal import printable
from ..training.summary import Summary
from .runs import TEACHER

Table = list[list[str]]

MAX_CLASSES = 20  # in a table or figure
MAX_STAGES = 8  # in a table
SAME_ACCURACY = 0.5  # percentage points: the largest difference for one network on one data set between devices
RESULT_COLUMNS = (
    "method",
    "accuracy last, %",
    "accuracy best, %",
    "agreement, %",
    "ECE, %",
    "sample visits",
    "teacher visits",
    "FLOPs",
    "seconds",
    "condensation",
)
EVALUATION_COLUMNS = ("agreement, %", "ECE, %")


def by_method(summaries: Iterable[Summary]) -> dict[str, list[Summary]]:
    """Return the summaries of each method, in order of first appearance."""
    groups: dict[str, list[Summary]] = {}
    for summary in summaries:
        groups.setdefault(summary.method, []).append(summary)
    return groups


def results_table(summaries: Iterable[Summary], baseline: str = "kd") -> Table:
    """Return a row for each method, in order of first appearance: mean ± sample standard deviation over seeds.

    - Teachers that were measured but are not among the methods have rows above them (`measured_teachers`).
    - Visits are also given as a percentage of those of `baseline`, if it was run; condensation as one of the seconds.
    - The columns for agreement with the teacher and calibration are omitted if no run was evaluated.
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
    rows = [
        [name, mean_and_deviation(accuracies, ".2f"), *["-"] * (len(RESULT_COLUMNS) - 2)]
        for name, accuracies in measured
    ]
    for method, group in groups.items():
        seconds = [s.seconds for s in group]
        rows.append(
            [
                method,
                mean_and_deviation([s.accuracy_last for s in group], ".2f"),
                mean_and_deviation([s.accuracy_best for s in group], ".2f"),
                _mean_evaluation(group, lambda evaluation: evaluation.agreement),
                _mean_evaluation(group, lambda evaluation: evaluation.student.ece),
                visits("sample_visits", group),
                visits("teacher_visits", group),
                "unknown" if flops[method] is None else f"{flops[method] / unit:.4g} {letter}",
                mean_and_deviation(seconds, ".1f"),
                f"{100 * sum(s.condensation_seconds for s in group) / (sum(seconds) or 1):.1f} %",
            ]
        )
    table = [[*RESULT_COLUMNS], *rows]
    if all(summary.evaluation is None for group in groups.values() for summary in group):
        shown = [index for index, name in enumerate(RESULT_COLUMNS) if name not in EVALUATION_COLUMNS]
        table = [[row[index] for index in shown] for row in table]
    return table


def measured_teachers(groups: Mapping[str, Sequence[Summary]]) -> dict[str, list[float]]:
    """Return the distinct measured accuracies of the teachers of these runs: name -> accuracies in percent.

    Teachers that the runs labelled TEACHER trained are omitted, because they have their own row. If methods have different
    teachers, each is named after its methods.
    """
    trained = [s.accuracy for s in groups.get(TEACHER, ())]
    found: dict[tuple[float, ...], list[str]] = {}
    for method, group in groups.items():
        accuracies = {s.teacher_accuracy for s in group if s.teacher_accuracy is not None}
        if any(min((abs(x - y) for y in trained), default=math.inf) > SAME_ACCURACY for x in accuracies):
            found.setdefault(tuple(sorted(accuracies)), []).append(method)
    only_one = len(found) == 1 and not trained
    return {TEACHER if only_one else f"{TEACHER} of {', '.join(methods)}": [*key] for key, methods in found.items()}


def notes_on_best(summaries: Sequence[Summary]) -> list[str]:
    """Return sentences on runs with a validation set: how their best epoch was chosen, and which student they end with."""
    validated = dict.fromkeys(s.method for s in summaries if s.best_epoch is not None)
    if not validated:
        return []
    others = dict.fromkeys(s.method for s in summaries if s.best_epoch is None)
    notes = [
        "Accuracy best: test accuracy after the epoch with the highest validation accuracy"
        + (f" ({', '.join(validated)}), or else the highest test accuracy ({', '.join(others)})." if others else ".")
    ]
    if kept := dict.fromkeys(s.method for s in summaries if s.keeps_best):
        notes.append(f"Saved student of {', '.join(kept)}: that of the best epoch.")
    return notes


def as_text(table: Table) -> list[str]:
    """Return the lines of a table for a terminal, the first column left-aligned and the others right-aligned."""
    table = [[printable(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in table
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def format_number(value: float, form: str) -> str:
    """Return a number as text, or a dash if it is not finite."""
    if not math.isfinite(value):
        return "-"
    text = f"{value:{form}}"
    return text if float(text) else text.lstrip("+-")  # a value that rounds to 0 gets no sign


def mean_and_deviation(numbers: Sequence[float], form: str) -> str:
    """Return "mean ± sample standard deviation", or just the number if there is one."""
    if len(numbers) == 1:
        return f"{numbers[0]:{form}}"
    return f"{mean(numbers):{form}} ± {stdev(numbers):{form}}"


def _mean_evaluation(group: Sequence[Summary], measure: Callable[[Evaluation], float]) -> str:
    """Return a measure of the evaluated runs, with their number unless all were evaluated."""
    found = [measure(s.evaluation) for s in group if s.evaluation is not None]
    if not found:
        return "-"
    return mean_and_deviation(found, ".2f") + (f" ({len(found)} of {len(group)})" if len(found) < len(group) else "")


def _mean_flops(group: Sequence[Summary]) -> float | None:
    """Return the mean FLOPs, or None if those of a run are unknown."""
    counts = [s.flops for s in group]
    return None if None in counts else mean(counts)


def kept_by_class(steps: Sequence[Mapping], class_names: Sequence[str] = ()) -> Table:
    """Return a row for each class: the number of its samples that each condensation step keeps.

    The table has at most MAX_CLASSES classes, those with the fewest samples in the last step, and MAX_STAGES steps, evenly
    spaced.
    """
    shown = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MAX_STAGES)).astype(int))]
    last = shown[-1]["classes"]
    fewest = sorted(range(len(last)), key=lambda label: last[label])[:MAX_CLASSES]
    names = class_names if len(class_names) == len(last) else [f"class {label}" for label in range(len(last))]
    rows = [[names[label], *(f"{step['classes'][label]:,}" for step in shown)] for label in sorted(fewest)]
    totals = ["all", *(f"{sum(step['classes']):,}" for step in shown)]
    return [["class", *(f"stage {step['stage']}" for step in shown)], *rows, totals]


# --- evaluations ------------------------------------------------------------------------------------------------------


def evaluation_table(summaries: Sequence[Summary]) -> Table:
    """Return a row for each evaluated run: how it differs from its teacher."""
    labels = temperatures(summaries)
    head = ["run", "accuracy, %", "teacher's accuracy, %", "agreement, %"]
    head += [f"KL, T = {label}" for label in labels.values()]
    head += ["ECE, %", "teacher's ECE, %", "slope of log-odds", "halves of log-odds", "worst class, points"]
    rows = []
    for name, evaluation in ((name, summary.evaluation) for name, summary in evaluated_runs(summaries)):
        student, teacher, log_odds = evaluation.student, evaluation.teacher, evaluation.exaggeration
        divergences = {one.temperature: one.kl for one in evaluation.divergence}
        rows.append(
            [
                name,
                *(format_number(x, ".2f") for x in (student.accuracy, teacher.accuracy, evaluation.agreement)),
                *(format_number(divergences.get(t, math.nan), ".4g") for t in labels),
                *(format_number(x, ".2f") for x in (student.ece, teacher.ece)),
                format_number(log_odds.slope, ".4g"),
                " / ".join(format_number(x, "+.4g") for x in (log_odds.below, log_odds.above)),
                format_number(evaluation.worst_class_change, "+.2f"),
            ]
        )
    return [head, *rows]


def notes_on_teachers(summaries: Sequence[Summary]) -> list[str]:
    """Return a sentence for each teacher: the runs that were compared with it, and whether it is their own teacher."""
    found = [(name, summary.compared_with) for name, summary in evaluated_runs(summaries) if summary.compared_with]
    runs_by_teacher: dict[str, list[str]] = {}
    for name, one in found:
        teacher = f"their own teacher, {one.network} (weights {one.weights})" if one.own else f"another teacher, {one}"
        runs_by_teacher.setdefault(teacher, []).append(name)
    return [f"Compared with {teacher}: {'; '.join(runs)}." for teacher, runs in runs_by_teacher.items()]


def notes_on_agreement(summaries: Sequence[Summary]) -> list[str]:
    """Return sentences on agreements that are not comparable: with another teacher than the run's own, or with several."""
    found = [(name, summary) for name, summary in evaluated_runs(summaries) if summary.compared_with]
    teachers: dict[str, set[str]] = {}
    for _, summary in found:
        teachers.setdefault(summary.method, set()).add(summary.compared_with.weights)
    others: dict[str, list[str]] = {}
    for name, summary in found:
        if not summary.compared_with.own:  # name the method if this holds for all of its seeds
            label = summary.method if len(teachers[summary.method]) == 1 else name
            others.setdefault(str(summary.compared_with), []).append(label)
    notes = [
        f"The agreement of {'; '.join(dict.fromkeys(names))} is with {other}, not with a teacher that the run was distilled from."
        for other, names in others.items()
    ]
    if len(set().union(*teachers.values())) > 1:
        notes.append("The agreements are with different teachers: see the evaluation.")
    if averaged := [method for method, weights in teachers.items() if len(weights) > 1]:
        notes.append(f"The agreement of {', '.join(averaged)} is averaged over different teachers.")
    return notes


def evaluated_runs(summaries: Sequence[Summary]) -> list[tuple[str, Summary]]:
    """Return the evaluated runs with their names: the method and, if it has several runs, the seed."""
    runs = Counter(summary.method for summary in summaries)
    return [
        (summary.method if runs[summary.method] == 1 else f"{summary.method}, seed {summary.seed}", summary)
        for summary in summaries
        if summary.evaluation is not None
    ]


def temperatures(summaries: Sequence[Summary]) -> dict[float, str]:
    """Return the temperatures of all evaluations, each with a label that has enough digits to be unique."""
    found = sorted(
        {one.temperature for _, summary in evaluated_runs(summaries) for one in summary.evaluation.divergence}
    )
    labels = ([f"{temperature:.{digits}g}" for temperature in found] for digits in range(6, 18))
    return dict(zip(found, next(each for each in labels if len(set(each)) == len(each)), strict=True))
