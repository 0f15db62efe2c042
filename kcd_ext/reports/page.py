"""The report of a set of runs: one HTML file that needs nothing else, and its picture."""

import base64
import html
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave

from ..evaluation import ClassAccuracy, Evaluation
from ..files import write_bytes
from ..terminal import printable
from ..training.summary import Summary
from .tables import HEADER, Row, cells, measured_teachers, tabulate

# Okabe and Ito's colours, told apart by everybody: grey, blue, orange, vermilion, green, purple.
COLOURS = ("#7f7f7f", "#0072b2", "#e69f00", "#d55e00", "#009e73", "#cc79a7")
SHOWN = 16  # of the most and of the least valuable images
CLASSES = 20  # that are drawn one by one
STAGES = 8  # of a table, at most
LARGEST_MARKER = 300  # square points, of a bin that holds all samples
# What is between them is made anew when runs are evaluated; without spaces, which comments of drawings have.
PLACE = ("<!--evaluations-->", "<!--/evaluations-->")
RESULTS = ("<!--results-->", "<!--/results-->")
END = "</main>"  # of a page that has no such place yet
NETWORKS = {"student": "#0072b2", "teacher": "#7f7f7f"}

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1b1f24; background: #f6f7f9; margin: 0 }
main { max-width: 68rem; margin: 0 auto; padding: 1.25rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 } h2 { font-size: 1.1rem; margin: 0 0 .6rem }
section { background: #fff; border: 1px solid #e1e4e8; border-radius: 10px; padding: 1rem; margin: 1rem 0 }
.pair { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
.pair section { margin: 0 } svg { width: 100%; height: auto; display: block }
.wide { overflow-x: auto; background: linear-gradient(90deg, #fff 40%, #fff0) left / 3rem 100% no-repeat local,
linear-gradient(270deg, #fff 40%, #fff0) right / 3rem 100% no-repeat local,
linear-gradient(90deg, #1b1f2433, #1b1f2400) left / .9rem 100% no-repeat scroll,
linear-gradient(270deg, #1b1f2433, #1b1f2400) right / .9rem 100% no-repeat scroll, #fff }
.wide::-webkit-scrollbar { height: .6rem } .wide::-webkit-scrollbar-thumb { background: #afb8c1; border-radius: .3rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { padding: .4rem .7rem; border-bottom: 1px solid #e8eaed; text-align: right; font-weight: 400 }
th { color: #57606a; font-size: .85rem } th:first-child, td:first-child { text-align: left }
.images { display: grid; gap: .5rem }
.images { grid-template-columns: repeat(auto-fill, minmax(max(3.2rem, calc((100% - 7.5rem) / 16)), 1fr)) }
figure { margin: 0; text-align: center } figcaption { font-size: .72rem; line-height: 1.3; color: #57606a }
figure img { width: 100%; image-rendering: pixelated; border-radius: 4px; display: block }
p.note { color: #57606a; font-size: .88rem; margin: .5rem 0 0 } pre { overflow-x: auto; font-size: .8rem }
@media (max-width: 40rem) {
main { padding: .5rem } section { padding: .6rem } table { font-size: .7rem; white-space: normal }
th { font-size: .66rem } th, td { padding: .3rem .15rem }
}
""".strip()


@dataclass(frozen=True)
class RankedImage:
    """A training image and what it is worth."""

    image: np.ndarray  # uint8 (h, w, c)
    label: str
    value: float  # mean entropy of the student over its visits, nats


def rank_images(
    summary: Summary, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str] = ()
) -> list[RankedImage]:
    """All training images that the run has visited, the most valuable first; none where it kept no knowledge values.

    `images` (n, h, w, c) uint8, `labels` (n,) integers, `class_names` what they are called, if anything.
    """
    if summary.condenser.measure != "value":
        return []
    values, counts = summary.condenser.values.cpu().numpy(), summary.condenser.counts.cpu().numpy()
    visited = np.flatnonzero(counts)
    order = visited[np.argsort(-values[visited], kind="stable")]
    names = class_names or [f"class {label}" for label in range(int(labels.max()) + 1)]
    return [RankedImage(images[i], names[labels[i]], float(values[i])) for i in order]


def write(
    page: Path,
    *,
    title: str,
    summaries: Sequence[Summary],
    reference: str,
    config: Mapping[str, object],
    ranking: Sequence[RankedImage] = (),
    notes: Sequence[str] = (),
    differences: Sequence[Sequence[str]] = (),
    class_names: Sequence[str] = (),
    baseline: str = "kd",
) -> None:
    """Writes the page, and its picture beside it as .png, in a folder that is made where there is none.

    Args:
        page: the HTML file.
        title: the headline.
        summaries: runs of several methods and seeds; those of one method are averaged up to the shortest.
        reference: the method that is drawn as a level instead of a curve (the teacher), unless it is the only one.
            Teachers that were only measured are such levels too.
        config: shown at the end; JSON.
        ranking: training images, the most valuable first.
        notes: sentences about the results.
        differences: a table, its header first, of what differs between the methods.
        class_names: what the labels stand for; empty: unknown.
        baseline: the method whose visits are a hundred percent; empty where there is none to compare with.

    Raises:
        OSError: a file cannot be written.
    """
    runs = _Runs(summaries, reference, baseline)
    page.parent.mkdir(parents=True, exist_ok=True)
    content = _page(title, runs, ranking, config, notes, differences, class_names)
    write_bytes(page, content.encode(errors="replace"))  # no halves of characters
    write_bytes(page.with_suffix(".png"), _picture(runs, ranking))


def check_page(page: Path) -> None:
    """Raises ValueError where `place_evaluations` would find no place; OSError where the page cannot be read."""
    _around_place(page)


def place_evaluations(page: Path, summaries: Sequence[Summary]) -> bool:
    """Puts the evaluations of these runs into a page that `write` has made, in the place of those it has.

    Says whether the table of results has them too: one of a page that an older version has made is left as it is.

    Raises:
        ValueError: the file is no such page.
        OSError: it cannot be read or written.
    """
    before, after = _around_place(page)
    head, start, rest = before.partition(RESULTS[0])
    results, end, tail = rest.partition(RESULTS[1])
    table = _read_table(results) if start and end else []
    if table:
        before = f"{head}{_results(_with_agreement(table, summaries), summaries)}{tail}"
    write_bytes(page, f"{before}{_evaluations(summaries)}{after}".encode(errors="replace"))
    return bool(table)


def _around_place(page: Path) -> tuple[str, str]:
    if not page.is_file():
        raise ValueError(f"{page} is no file")
    text = page.read_bytes().decode(errors="replace")
    start, end = text.find(PLACE[0]), text.find(PLACE[1])
    if 0 <= start < end:
        return text[:start], text[end + len(PLACE[1]) :]
    if text.count(END) != 1:
        raise ValueError(f"{page} is no page of kcd report: move it away, and it is made anew")
    before, after = text.split(END)
    return before, END + after


def _read_table(text: str) -> list[list[str]]:
    """What `_table` has made the first table of."""
    rows = re.findall(r"<tr>(.*?)</tr>", text.partition("</table>")[0], re.DOTALL)
    return [list(map(html.unescape, re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.DOTALL))) for row in rows]


def _with_agreement(table: Sequence[Sequence[str]], summaries: Sequence[Summary]) -> list[list[str]]:
    """The table of results, with what these runs agree with their teachers; rows of other methods stay."""
    place = [f.name for f in fields(Row)].index("agreement")
    if HEADER.agreement not in table[0]:
        table = [[*row[:place], HEADER.agreement if row is table[0] else "-", *row[place:]] for row in table]
    found = {row.method: row.agreement or "-" for row in tabulate(summaries)}
    return [[*row[:place], found.get(row[0], row[place]), *row[place + 1 :]] for row in table]


class _Runs:
    """The runs by method, averaged over seeds epoch by epoch."""

    def __init__(self, summaries: Sequence[Summary], reference: str, baseline: str):
        self.summaries = summaries
        self.table = cells(summaries, baseline)
        self.groups: dict[str, list[Summary]] = {}
        for summary in summaries:
            self.groups.setdefault(summary.method, []).append(summary)
        self.reference = self.groups.get(reference, []) if len(self.groups) > 1 else []
        self.levels = {
            method: mean(run.accuracy_last for run in self.reference) for method in [reference] if self.reference
        }
        self.levels |= {name: mean(accuracies) for name, accuracies in measured_teachers(self.groups).items()}
        self.drawn = [method for method, group in self.groups.items() if group is not self.reference]
        self.colours = dict(zip(self.drawn, COLOURS * len(self.drawn), strict=False))

    def curve(self, method: str, name: str) -> np.ndarray:
        """(epochs,) of a number in the lines of metrics."""
        lines = zip(*(run.history for run in self.groups[method]), strict=False)  # an unfinished one is shorter
        return np.array([[line[name] for line in epoch] for epoch in lines], dtype=float).mean(1)

    @property
    def flops_known(self) -> bool:
        """Whether all that is drawn can be drawn against them."""
        return all(line["flops"] is not None for m in self.drawn for run in self.groups[m] for line in run.history)

    @property
    def stages(self) -> dict[str, list[dict]]:
        """The E-steps of the first run of every method that ranks by value: those mix, and have a histogram."""
        found = {}
        for method, (first, *_) in self.groups.items():
            steps = [step for line in first.history if (step := line["condensation"]) and step["values"] is not None]
            if any(step["mixed"] for step in steps):
                found[method] = steps
        return found

    @property
    def steps_by_class(self) -> dict[str, list[dict]]:
        """The E-steps of the first run of every method whose lines say what is kept of every class."""
        found = {}
        for method, (first, *_) in self.groups.items():
            steps = [step for line in first.history if (step := line["condensation"]) and step.get("classes")]
            if steps:
                found[method] = steps
        return found


def _draw_accuracy(axes: Axes, runs: _Runs, against: str, label: str) -> None:
    """Accuracy of every method after every epoch, against a running sum: whole curves, from the first epoch on."""
    for method in runs.drawn:
        x, y = runs.curve(method, against), runs.curve(method, "accuracy")
        axes.plot(x, y, color=runs.colours[method], label=printable(method), linewidth=1.6)
    for (name, level), style in zip(runs.levels.items(), ["--", ":", "-."] * len(runs.levels), strict=False):
        axes.axhline(level, color="#333333", linestyle=style, linewidth=1, label=printable(name))
    axes.set(xlabel=label, ylabel="test accuracy, %")
    axes.xaxis.set_major_formatter(lambda x, _position: _short(x))
    for text in axes.legend(loc="lower right", frameon=False).get_texts():
        text.set_parse_math(False)  # $ in a name is a dollar


def _short(number: float) -> str:
    """12000 -> 12k."""
    units = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    unit, letter = next(((unit, letter) for unit, letter in units if number >= unit), (1, ""))
    return f"{number / unit:g}{letter}"


def _draw_values(axes: Axes, stages: Sequence[dict]) -> None:
    """How the values of all samples are spread when a stage ends, one line a stage."""
    shades = matplotlib.colormaps["viridis_r"](np.linspace(0.15, 1, max(len(stages), 1)))
    for stage, shade in zip(stages, shades, strict=False):
        values = stage["values"]
        counts = np.array(values["counts"])
        edges = np.linspace(values["low"], values["high"], len(counts) + 1)
        label = f"stage {stage['stage']}: {stage['kept']:,} kept"
        axes.stairs(100 * counts / max(counts.sum(), 1), edges, color=shade, label=label, linewidth=1.4)
    axes.set(xlabel="knowledge value (student's entropy, nats)", ylabel="samples, %")
    if stages:
        axes.legend(frameon=False, fontsize=8)


def _figure(width: float, height: float, columns: int = 1, rows: Sequence[float] = (1,)) -> tuple[Figure, list[Axes]]:
    """A figure of its own, with rows of these relative heights: nothing of pyplot's global state."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = list(np.ravel(figure.subplots(len(rows), columns, height_ratios=rows)))
    for one in axes:
        one.grid(color="#e8eaed", linewidth=0.8)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure, name: str) -> str:
    """The figure as an element of a page, without the head that a file of its own has; `name` keeps its ids apart."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return re.sub(r'( id="|href="#|url\(#)', rf"\1{name}-", text[text.index("<svg") :])


def _picture(runs: _Runs, ranking: Sequence[RankedImage]) -> bytes:
    """The report in one PNG: the curves, beside them the values of the first method that has any, images below."""
    stages = next(iter(runs.stages.values()), None)
    figure, axes = _figure(11, 5.2 if ranking else 3.8, columns=2, rows=(3, 1.7) if ranking else (3,))
    _draw_accuracy(axes[0], runs, "sample_visits", "sample visits")
    if stages is None:
        _draw_accuracy(axes[1], runs, "seconds", "seconds of training")
    else:
        _draw_values(axes[1], stages)
    for tiles, chosen, title in zip(axes[2:], (ranking[:SHOWN], ranking[-SHOWN:]), ("most", "least"), strict=False):
        tiles.set_axis_off()
        tiles.imshow(_tiles([ranked.image for ranked in chosen], columns=8), cmap="gray", vmin=0, vmax=255)
        tiles.set_title(f"{title} valuable for the student", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _tiles(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Images of one size side by side, a line of white between them."""
    blank = np.full_like(images[0], 255)
    images = [*images, *[blank] * (-len(images) % columns)]
    framed = [np.pad(image, ((1, 1), (1, 1), (0, 0)), constant_values=255) for image in images]
    rows = [np.concatenate(framed[i : i + columns], axis=1) for i in range(0, len(framed), columns)]
    return _drawable(np.concatenate(rows))


def _drawable(image: np.ndarray) -> np.ndarray:
    """RGB and RGBA as they are; of any other number of channels the first one, as grey."""
    return image if image.shape[-1] in (3, 4) else image[..., 0]


def _thumbnail(item: RankedImage) -> str:
    buffer = io.BytesIO()
    imsave(buffer, _drawable(item.image), format="png", cmap="gray", vmin=0, vmax=255)
    data = base64.b64encode(buffer.getvalue()).decode()
    label = html.escape(item.label)
    picture = f'<img alt="an image of {label}" src="data:image/png;base64,{data}">'
    return f"<figure>{picture}<figcaption>{label}<br>{item.value:.2f}</figcaption></figure>"


def _table(table: Sequence[Sequence[str]]) -> str:
    head, *body = (
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        for tag, row in zip(["th", *["td"] * len(table)], table, strict=False)
    )
    rows = "".join(f"<tr>{row}</tr>" for row in body)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _page(
    title: str,
    runs: _Runs,
    ranking: Sequence[RankedImage],
    config: Mapping[str, object],
    notes: Sequence[str],
    differences: Sequence[Sequence[str]],
    class_names: Sequence[str],
) -> str:
    seeds = list(dict.fromkeys(run.seed for method in runs.drawn for run in runs.groups[method]))
    over = f"{'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"
    if any(len(runs.groups[method]) > 1 for method in runs.drawn):
        over = f"mean ± standard deviation over {over}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body><main>
<h1>{html.escape(title)}</h1>
<section class="wide"><h2>Results, {over}</h2>{_results(runs.table, runs.summaries)}
{_paragraphs(notes)}
<p class="note">Accuracy on the test set, after the last epoch and in the best one; of a teacher that was not trained
 here, as measured before it taught. A sample visit is one sample
 trained on once; a teacher visit one that the teacher was asked about; percentages are of KD's. FLOPs are estimated: a
 forward pass of the teacher for every teacher visit, three of the student for every sample visit. Seconds are of
 training alone, without validation; of them condensation took the part in the last column.</p></section>
{_section_of_differences(differences) if differences else ""}<div class="pair">
{_section_of_curves(runs, "sample_visits", "sample visits", "sample visits")}
{_section_of_curves(runs, "seconds", "seconds", "seconds of training")}
{_section_of_curves(runs, "flops", "FLOPs", "floating-point operations of training") if runs.flops_known else ""}
{"".join(_section_of_values(f"values-{i}", method, runs) for i, method in enumerate(runs.stages))}
</div>
{"".join(_section_of_classes(method, steps, class_names) for method, steps in runs.steps_by_class.items())}
{_images(ranking) if ranking else ""}
{_evaluations([run for group in runs.groups.values() for run in group])}
<section><h2>Configuration</h2><pre>{html.escape(json.dumps(config, indent=2))}</pre></section>
</main></body>
</html>
"""


def _results(table: Sequence[Sequence[str]], summaries: Sequence[Summary]) -> str:
    """The marked place of the table of results, and of what is to be said of the agreement in it."""
    said = ""
    if any(summary.evaluation is not None for summary in summaries):
        meaning = "Agreement: of how many test samples, in percent, student and teacher have the same top class (kcd evaluate)."
        said = _paragraphs([" ".join([meaning, *notes_on_agreement(summaries)])])
    return f"{RESULTS[0]}{_table(table)}{said}{RESULTS[1]}"


def _paragraphs(notes: Sequence[str]) -> str:
    return "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)


def _section_of_differences(table: Sequence[Sequence[str]]) -> str:
    return f"""<section class="wide"><h2>What differs</h2>{_table(table)}</section>
"""


def _section_of_curves(runs: _Runs, against: str, name: str, label: str) -> str:
    figure, (axes,) = _figure(5.6, 3.8)
    _draw_accuracy(axes, runs, against, label)
    return f"<section><h2>Accuracy against {name}</h2>{_svg(figure, against)}</section>"


def _section_of_values(name: str, method: str, runs: _Runs) -> str:
    figure, (axes,) = _figure(5.6, 3.8)
    _draw_values(axes, runs.stages[method])
    return f"""<section><h2>Knowledge values of {html.escape(method)}, stage by stage</h2>{_svg(figure, name)}
<p class="note">How the values of all samples visited so far are spread when a stage ends. A value is the student's
 mean entropy over its visits to the sample (seed {runs.groups[method][0].seed}).</p></section>"""


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


def _section_of_classes(method: str, steps: Sequence[Mapping], class_names: Sequence[str]) -> str:
    count, gone = len(steps[-1]["classes"]), steps[-1]["classes"].count(0)
    of = f"The {CLASSES} of {count} classes of which fewest are kept. " if count > CLASSES else ""
    vanished = f"{gone} of {count} classes are no longer kept. " if gone else ""
    table = _table(kept_by_class(steps, class_names))
    return f"""<section class="wide"><h2>Kept of every class by {html.escape(method)}</h2>{table}
<p class="note">{of}{vanished}Samples that are trained on after each stage (first seed).</p></section>"""


def _images(ranking: Sequence[RankedImage]) -> str:
    most, least = ("".join(map(_thumbnail, chosen)) for chosen in (ranking[:SHOWN], ranking[-SHOWN:]))
    return f"""
<section><h2>Most valuable training images</h2><div class="images">{most}</div></section>
<section><h2>Least valuable training images</h2><div class="images">{least}</div>
<p class="note">Below each image its class and its value at the end, in nats (first seed).</p></section>"""


# --- evaluations ------------------------------------------------------------------------------------------------------


def evaluation_table(summaries: Sequence[Summary]) -> list[list[str]]:
    """A table, its header first: a row for each run that was evaluated, with what differs between it and its teacher."""
    found = _evaluated(summaries)
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
                *(_number(x, ".2f") for x in (evaluation.student.accuracy, evaluation.teacher.accuracy)),
                _number(evaluation.agreement, ".2f"),
                *(_number(divergences.get(t, math.nan), ".4g") for t in temperatures),
                *(_number(x, ".2f") for x in (evaluation.student.ece, evaluation.teacher.ece)),
                _number(of_log_odds.slope, ".4g"),
                " / ".join(_number(x, "+.4g") for x in (of_log_odds.below, of_log_odds.above)),
                _number(evaluation.worst_class_change, "+.2f"),
            ]
        )
    return [head, *rows]


def notes_on_teachers(summaries: Sequence[Summary]) -> list[str]:
    """A sentence for each teacher: which runs were compared with it, and whether it is their own."""
    found = [(name, summary.compared_with) for name, summary in _evaluated(summaries) if summary.compared_with]
    names: dict[str, list[str]] = {}
    for name, one in found:
        of = (
            f"the teacher of their own, {one.network} (weights {one.weights})" if one.own else f"another teacher, {one}"
        )
        names.setdefault(of, []).append(name)
    return [f"Compared with {of}: {'; '.join(runs)}." for of, runs in names.items()]


def notes_on_agreement(summaries: Sequence[Summary]) -> list[str]:
    """What keeps agreements from being compared: whose is not with the run's own teacher, and where teachers differ."""
    found = [(name, summary) for name, summary in _evaluated(summaries) if summary.compared_with]
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


def _evaluated(summaries: Sequence[Summary]) -> list[tuple[str, Summary]]:
    """Those that were, each with the name of the run: its method and, where there are several of it, its seed."""
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


def _number(value: float, form: str) -> str:
    if not math.isfinite(value):
        return "-"
    text = f"{value:{form}}"
    return text if float(text) else text.lstrip("+-")  # what rounds to 0 has no sign


def _evaluations(summaries: Sequence[Summary]) -> str:
    """The marked place of the page: tables of all runs that were evaluated, drawings of every method's first one."""
    found = _evaluated(summaries)
    if not found:
        return "".join(PLACE)
    first: dict[str, tuple[str, Evaluation]] = {}
    for name, summary in found:
        first.setdefault(summary.method, (name, summary.evaluation))
    drawn = "\n".join(
        _section_of_evaluation(f"evaluation-{i}-{j}", name, one, drawing)
        for i, (name, one) in enumerate(first.values())
        for j, drawing in enumerate(DRAWINGS)
    )
    return f"""{PLACE[0]}
<section class="wide"><h2>Evaluation: the student beside its teacher</h2>{_table(evaluation_table(summaries))}
{_paragraphs(notes_on_teachers(summaries))}
<p class="note">On the test set. Agreement: both have the same top class. KL: of the student from the teacher, nats, at
 temperature T. ECE: expected calibration error, percentage points, 15 bins. Slope of log-odds: the student's of the
 teacher's top class on the teacher's own, by least squares; above 1 it is steeper than the teacher's. Halves of
 log-odds: their mean difference, student's minus teacher's, where the teacher's are below / above their median; the
 student exaggerates where the first is below 0 and the second above. Worst class: the lowest of all changes of a
 class's accuracy from teacher to student. A dash: not finite, or not known.</p></section>
<section class="wide"><h2>Probabilities against the labels</h2>{_table(_table_of_quality(found))}
<p class="note">NLL: negative log-likelihood of the label, nats. Brier: mean squared distance of the probabilities from
 the label, summed over the classes, 0 to 2.</p></section>
<div class="pair">
{drawn}
</div>
{PLACE[1]}"""


def _table_of_quality(found: Sequence[tuple[str, Summary]]) -> list[list[str]]:
    temperatures = _temperatures(found)
    labels = dict(zip(temperatures, _labels(temperatures), strict=True))
    rows = [
        [name, labels[own.temperature], *(_number(x, ".4g") for x in (own.nll, other.nll, own.brier, other.brier))]
        for name, summary in found
        for own, other in zip(summary.evaluation.student.quality, summary.evaluation.teacher.quality, strict=True)
    ]
    return [["run", "temperature", "NLL", "teacher's NLL", "Brier", "teacher's Brier"], *rows]


def _draw_reliability(axes: Axes, evaluation: Evaluation) -> None:
    """Accuracy against confidence, bin by bin; the area of a marker is the bin's share of the samples."""
    axes.plot([0, 100], [0, 100], color="#333333", linestyle="--", linewidth=1)
    for role, colour in NETWORKS.items():
        scores = getattr(evaluation, role)
        bins = [one for one in scores.bins if one.count]
        x, y = np.array([(one.confidence, one.accuracy) for one in bins]).reshape(-1, 2).T
        axes.plot(x, y, color=colour, label=f"{role}, ECE {_number(scores.ece, '.2f')}", linewidth=1.4)
        areas = [LARGEST_MARKER * one.count / evaluation.samples for one in bins]
        axes.scatter(x, y, s=areas, color=colour, alpha=0.75, linewidth=0, clip_on=False, label=f"_{role}")
    axes.set(xlabel="confidence, %", ylabel="accuracy, %", xlim=(0, 100), ylim=(0, 100))
    axes.legend(loc="upper left", frameon=False)


def _draw_classes(axes: Axes, evaluation: Evaluation) -> None:
    """Accuracy by class of both: of all classes, or of the 20 that lost most."""
    shown = _classes_drawn(evaluation)
    for offset, (role, colour) in zip((-0.2, 0.2), NETWORKS.items(), strict=True):
        heights = [getattr(one, role) if one.count else 0 for one in shown]
        axes.bar(np.arange(len(shown)) + offset, heights, width=0.4, color=colour, label=role)
    axes.set_xticks(range(len(shown)), [one.name for one in shown], rotation=90 if len(shown) > 10 else 45, fontsize=7)
    for text in axes.get_xticklabels():
        text.set_parse_math(False)
    axes.set(ylabel="accuracy, %", ylim=(0, 100))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=8)  # above all bars


def _classes_drawn(evaluation: Evaluation) -> list[ClassAccuracy]:
    if len(evaluation.classes) <= CLASSES:
        return list(evaluation.classes)
    held = [one for one in evaluation.classes if math.isfinite(one.lost)]
    return sorted(held, key=lambda one: -one.lost)[:CLASSES]


def _draw_log_odds(axes: Axes, evaluation: Evaluation) -> None:
    """The student's log-odds of the teacher's top class against the teacher's, and the line through them."""
    found = evaluation.exaggeration
    points = [point for point in found.points if all(map(math.isfinite, point))]
    x, y = np.array(points, dtype=float).reshape(-1, 2).T
    if len(x):
        axes.plot(x, y, ".", color=NETWORKS["student"], markersize=3)
        ends = np.array([x.min(), x.max()])
        axes.plot(ends, ends, color="#333333", linestyle="--", linewidth=1, label="as sure as the teacher")
        if math.isfinite(found.slope) and math.isfinite(found.intercept):
            line = found.intercept + found.slope * ends
            axes.plot(ends, line, color="#d55e00", linewidth=1.4, label=f"slope {found.slope:.4g}")
        axes.legend(loc="upper left", frameon=False, fontsize=8)
    axes.set(xlabel="teacher's log-odds of its top class", ylabel="student's, of the same class")


def _draw_layers(axes: Axes, evaluation: Evaluation) -> None:
    """Linear CKA, a bar a pair of layers, the first layer on top."""
    layers = evaluation.layers
    heights = [one.cka if math.isfinite(one.cka) else 0 for one in layers]
    axes.barh(np.arange(len(layers)), heights, color=NETWORKS["student"])
    names = [one.student if one.student == one.teacher else f"{one.student} / {one.teacher}" for one in layers]
    axes.set_yticks(range(len(layers)), names, fontsize=8)
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    axes.set(xlabel="linear CKA", xlim=(0, 1))
    axes.invert_yaxis()


@dataclass(frozen=True)
class _Drawing:
    """Of an evaluation."""

    heading: str
    draw: Callable[[Axes, Evaluation], None]
    note: Callable[[Evaluation], str]


def _note_of_classes(evaluation: Evaluation) -> str:
    lost = ", ".join(f"{one.name} ({one.lost:.2f})" for one in evaluation.lost_most)
    of = "" if len(evaluation.classes) <= CLASSES else f"The {CLASSES} of {len(evaluation.classes)} that lost most. "
    return f"{of}Lost most, percentage points: {lost or 'none lost any'}."


def _note_of_log_odds(evaluation: Evaluation) -> str:
    found = evaluation.exaggeration
    below, above = (_number(x, "+.4g") for x in (found.below, found.above))
    exaggerates = "The student exaggerates: it is less sure below, surer above. " if found.exaggerates else ""
    return (
        f"Log-odds: log(p / (1 - p)). On the mean the student's differ by {below} where the teacher's are below their "
        f"median, by {above} where they are above it. {exaggerates}Of {found.count:,} samples {len(found.points)} are drawn."
    )


DRAWINGS = (
    _Drawing("Reliability", _draw_reliability, lambda _: "A marker's area: its bin's share of the samples."),
    _Drawing("Accuracy by class", _draw_classes, _note_of_classes),
    _Drawing("Confidence of student and teacher", _draw_log_odds, _note_of_log_odds),
    _Drawing("Similarity of layers", _draw_layers, lambda _: "No bar: features that are the same for all samples."),
)


def _section_of_evaluation(name: str, run: str, evaluation: Evaluation, drawing: _Drawing) -> str:
    figure, (axes,) = _figure(5.6, 3.8)
    drawing.draw(axes, evaluation)
    return f"""<section><h2>{drawing.heading}: {html.escape(run)}</h2>{_svg(figure, name)}
<p class="note">{html.escape(drawing.note(evaluation))}</p></section>"""
