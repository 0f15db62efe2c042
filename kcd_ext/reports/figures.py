"""Draw the figures of a report: results of runs and their evaluations."""

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from statistics import mean, stdev

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import offset_copy

from ..evaluation import Evaluation
from ..terminal import printable
from ..training.summary import Summary
from .ranking import Ranking, Thumbnail
from .runs import TEACHER
from .tables import MAX_CLASSES, by_method, format_number, measured_teachers

# Okabe and Ito's colour-blind safe palette: grey, blue, orange, vermilion, green, purple.
COLOURS = ("#7f7f7f", "#0072b2", "#e69f00", "#d55e00", "#009e73", "#cc79a7")
MAX_MARKER_AREA = 300  # square points, for a bin with all samples
MAX_LEGEND_INSIDE = 10  # entries
MAX_LEGEND_ROWS = 26
NETWORK_COLOURS = {"student": "#0072b2", "teacher": "#7f7f7f"}


class Methods:
    """The runs of a report by method. Curves are averaged over seeds, epoch by epoch.

    A trained teacher is drawn as a horizontal line instead of a curve, unless it is the only method. Teachers that were only
    measured are always lines.
    """

    def __init__(self, summaries: Sequence[Summary]):
        self.groups = by_method(summaries)
        trained = self.groups.get(TEACHER, []) if len(self.groups) > 1 else []
        self.levels = {TEACHER: mean(run.accuracy for run in trained)} if trained else {}
        self.levels |= {name: mean(accuracies) for name, accuracies in measured_teachers(self.groups).items()}
        self.drawn = {method: runs for method, runs in self.groups.items() if runs is not trained}
        self.colours = dict(zip(self.drawn, COLOURS * len(self.drawn), strict=False))

    def curve(self, method: str, name: str) -> np.ndarray:
        """Return an entry of metrics.jsonl as an array (epochs,), up to the epoch of the shortest run."""
        lines = zip(*(run.history for run in self.drawn[method]), strict=False)
        return np.array([[line[name] for line in epoch] for epoch in lines], dtype=float).mean(1)

    def deviation(self, method: str) -> float:
        """Return the sample standard deviation over seeds of the last accuracy of a curve; 0 for one seed."""
        runs = self.drawn[method]
        last = min(len(run.history) for run in runs) - 1
        return stdev(run.history[last]["accuracy"] for run in runs) if len(runs) > 1 else 0.0

    def are_validated(self, method: str) -> bool:
        """Whether all runs of a method have a validation set."""
        return all(run.best_epoch is not None for run in self.drawn[method])

    @property
    def flops_known(self) -> bool:
        """Whether all curves can be drawn against FLOPs."""
        return all(line["flops"] is not None for runs in self.drawn.values() for run in runs for line in run.history)

    def steps(self, entry: str) -> dict[str, list[dict]]:
        """Return the condensation steps with `entry` of the first run of each method."""
        found = {
            method: [step for line in first.history if (step := line["condensation"]) and step.get(entry)]
            for method, (first, *_) in self.groups.items()
        }
        return {method: steps for method, steps in found.items() if steps}

    @property
    def stages(self) -> dict[str, list[dict]]:
        """The condensation steps of methods that rank by value. Their steps mix images and have a histogram."""
        return {method: steps for method, steps in self.steps("values").items() if any(s["mixed"] for s in steps)}


def draw_accuracy(axes: Axes, methods: Methods, against: str, against_label: str) -> None:
    """Draw the accuracy of every method after every epoch, against a cumulative entry of metrics.jsonl.

    With several seeds, a bar beside the end of a curve is one standard deviation up and down. Accuracy on a validation set is a
    dotted line. The axis shows every level and bar, the last third of each curve and its highest point: what comes before the
    learning rate falls would flatten the differences.
    """
    shown = [*methods.levels.values()]
    for index, method in enumerate(methods.drawn):
        x, y = methods.curve(method, against), methods.curve(method, "accuracy")
        axes.plot(x, y, color=methods.colours[method], label=printable(method), linewidth=1.6)
        if deviation := methods.deviation(method):
            # Beside the curve's end and each other, so that the bars of curves that end together do not overlap.
            beside = offset_copy(axes.transData, axes.figure, x=3 * (1 + index), units="points")
            ends = (y[-1] - deviation, y[-1] + deviation)
            axes.vlines(x[-1], *ends, color=methods.colours[method], transform=beside, linewidth=1.2)
            shown += ends
        shown += [*y[2 * len(y) // 3 :], y.max()]
        if methods.are_validated(method):
            y, label = methods.curve(method, "val_accuracy"), f"{printable(method)}, validation"
            axes.plot(x, y, color=methods.colours[method], label=label, linewidth=0.8, linestyle=":")
            shown += [*y[2 * len(y) // 3 :], y.max()]
    for (name, level), style in zip(methods.levels.items(), ["--", ":", "-."] * len(methods.levels), strict=False):
        axes.axhline(level, color="#333333", linestyle=style, linewidth=1, label=printable(name))
    axes.set(xlabel=against_label, ylabel="test accuracy, %")
    margin = 0.05 * (max(shown) - min(shown)) or 1.0
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.xaxis.set_major_formatter(lambda x, _position: _abbreviate(x))
    _draw_legend(axes)


def _draw_legend(axes: Axes) -> None:
    """Draw the legend of the curves: inside the axes, or beside them if it would cover these or need more than their height."""
    count = len(axes.get_legend_handles_labels()[1])
    place = {"loc": "best"}
    if count > MAX_LEGEND_INSIDE:
        columns = math.ceil(count / MAX_LEGEND_ROWS)
        place = {
            "loc": "upper left",
            "bbox_to_anchor": (1.01, 1.02),
            "borderaxespad": 0,
            "fontsize": 6,
            "ncols": columns,
        }
    _disable_math(axes.legend(frameon=False, **place).get_texts())


def _disable_math(texts: Iterable[Text]) -> None:
    """Show a $ in names literally, instead of as a formula."""
    for text in texts:
        text.set_parse_math(False)


def _abbreviate(count: float) -> str:
    """Return a number with a unit, such as "12k" for 12000."""
    units = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    unit, letter = next(((unit, letter) for unit, letter in units if count >= unit), (1, ""))
    return f"{count / unit:g}{letter}"


def draw_values(axes: Axes, stages: Sequence[dict]) -> None:
    """Draw the histogram of the values of all samples at the end of each stage."""
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


def _figure(
    width: float = 5.6, height: float = 3.8, columns: int = 1, rows: Sequence[float] = (1,)
) -> tuple[Figure, list[Axes]]:
    """Return a figure with rows of these relative heights, without pyplot's global state."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = list(np.ravel(figure.subplots(len(rows), columns, height_ratios=rows)))
    for one in axes:
        one.grid(color="#e8eaed", linewidth=0.8)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def svg(name: str, draw: Callable[..., None], *content: object) -> Markup:
    """Return the drawing of `draw(axes, *content)` as an SVG element of a page, without the XML header.

    `name` prefixes its ids, so that they differ from those of other figures. Ids are reproducible.
    """
    figure, (axes,) = _figure(5.6, 3.8)
    draw(axes, *content)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "kcd_ext"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return Markup(re.sub(r'( id="|href="#|url\(#)', rf"\1{name}-", text[text.index("<svg") :]))


def picture(methods: Methods, ranking: Ranking | None) -> bytes:
    """Return the report as one PNG: curves, the values of the first method that has some, and images below."""
    stages = next(iter(methods.stages.values()), None)
    figure, axes = _figure(11, 5.2 if ranking else 3.8, columns=2, rows=(3, 1.7) if ranking else (3,))
    draw_accuracy(axes[0], methods, "sample_visits", "sample visits")
    if stages is None:
        draw_accuracy(axes[1], methods, "seconds", "seconds of training")
    else:
        draw_values(axes[1], stages)
    for tiles, title in zip(axes[2:], ("most", "least"), strict=False):
        tiles.set_axis_off()
        tiles.imshow(_tiles(getattr(ranking, title), columns=8), cmap="gray", vmin=0, vmax=255)
        tiles.set_title(f"{title} valuable for the student", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _tiles(thumbnails: Sequence[Thumbnail], columns: int) -> np.ndarray:
    """Return the images in a grid, separated by white lines."""
    images = [thumbnail.image for thumbnail in thumbnails]
    images += [np.full_like(images[0], 255)] * (-len(images) % columns)
    border = ((1, 1), (1, 1), (0, 0))[: images[0].ndim]
    framed = [np.pad(image, border, constant_values=255) for image in images]
    return np.concatenate([np.concatenate(framed[i : i + columns], axis=1) for i in range(0, len(framed), columns)])


# --- evaluations ------------------------------------------------------------------------------------------------------


def draw_reliability(axes: Axes, evaluation: Evaluation) -> None:
    """Draw accuracy against confidence for each bin. The area of a marker shows the bin's share of the samples."""
    axes.plot([0, 100], [0, 100], color="#333333", linestyle="--", linewidth=1)
    for role, colour in NETWORK_COLOURS.items():
        scores = getattr(evaluation, role)
        bins = [one for one in scores.bins if one.count]
        x, y = np.array([(one.confidence, one.accuracy) for one in bins]).reshape(-1, 2).T
        axes.plot(x, y, color=colour, label=f"{role}, ECE {format_number(scores.ece, '.2f')}", linewidth=1.4)
        areas = [MAX_MARKER_AREA * one.count / evaluation.samples for one in bins]
        axes.scatter(x, y, s=areas, color=colour, alpha=0.75, linewidth=0, clip_on=False, label=f"_{role}")
    axes.set(xlabel="confidence, %", ylabel="accuracy, %", xlim=(0, 100), ylim=(0, 100))
    axes.legend(loc="upper left", frameon=False)


def draw_classes(axes: Axes, evaluation: Evaluation) -> None:
    """Draw the accuracy of student and teacher by class, for at most MAX_CLASSES classes, those that lost most."""
    shown = evaluation.classes
    if len(shown) > MAX_CLASSES:
        shown = sorted((one for one in shown if math.isfinite(one.lost)), key=lambda one: -one.lost)[:MAX_CLASSES]
    for offset, (role, colour) in zip((-0.2, 0.2), NETWORK_COLOURS.items(), strict=True):
        heights = [getattr(one, role) if one.count else 0 for one in shown]
        axes.bar(np.arange(len(shown)) + offset, heights, width=0.4, color=colour, label=role)
    axes.set_xticks(range(len(shown)), [one.name for one in shown], rotation=90 if len(shown) > 10 else 45, fontsize=7)
    _disable_math(axes.get_xticklabels())
    axes.set(ylabel="accuracy, %", ylim=(0, 100))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=8)  # above the bars


def draw_log_odds(axes: Axes, evaluation: Evaluation) -> None:
    """Draw the student's log-odds of the teacher's top class against the teacher's, and the line through them."""
    found = evaluation.exaggeration
    points = [point for point in found.points if all(map(math.isfinite, point))]
    x, y = np.array(points, dtype=float).reshape(-1, 2).T
    if len(x):
        axes.plot(x, y, ".", color=NETWORK_COLOURS["student"], markersize=3)
        ends = np.array([x.min(), x.max()])
        axes.plot(ends, ends, color="#333333", linestyle="--", linewidth=1, label="as confident as the teacher")
        if math.isfinite(found.slope) and math.isfinite(found.intercept):
            line = found.intercept + found.slope * ends
            axes.plot(ends, line, color="#d55e00", linewidth=1.4, label=f"slope {found.slope:.4g}")
        axes.legend(loc="upper left", frameon=False, fontsize=8)
    axes.set(xlabel="teacher's log-odds of its top class", ylabel="student's, of the same class")


def draw_layers(axes: Axes, evaluation: Evaluation) -> None:
    """Draw linear CKA, one bar for each pair of layers, with the first layer on top."""
    layers = evaluation.layers
    heights = [one.cka if math.isfinite(one.cka) else 0 for one in layers]
    axes.barh(np.arange(len(layers)), heights, color=NETWORK_COLOURS["student"])
    names = [one.student if one.student == one.teacher else f"{one.student} / {one.teacher}" for one in layers]
    axes.set_yticks(range(len(layers)), names, fontsize=8)
    _disable_math(axes.get_yticklabels())
    axes.set(xlabel="linear CKA", xlim=(0, 1))
    axes.invert_yaxis()
