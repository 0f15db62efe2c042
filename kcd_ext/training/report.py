"""The report of a set of runs: one HTML file that needs nothing else, and its picture."""

import base64
import html
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import mean

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave

from .storage import write_bytes
from .summary import HEADER, Summary, tabulate

# Okabe and Ito's colours, told apart by everybody: grey, blue, orange, vermilion, green, purple.
COLOURS = ("#7f7f7f", "#0072b2", "#e69f00", "#d55e00", "#009e73", "#cc79a7")
SHOWN = 16  # of the most and of the least valuable images

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1b1f24; background: #f6f7f9; margin: 0 }
main { max-width: 62rem; margin: 0 auto; padding: 1.25rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 } h2 { font-size: 1.1rem; margin: 0 0 .6rem }
section { background: #fff; border: 1px solid #e1e4e8; border-radius: 10px; padding: 1rem; margin: 1rem 0 }
.pair { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
.pair section { margin: 0 } .wide { overflow-x: auto } svg { width: 100%; height: auto; display: block }
.values svg { max-width: 40rem; margin: 0 auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { padding: .4rem .7rem; border-bottom: 1px solid #e8eaed; text-align: right; font-weight: 400 }
th { color: #57606a; font-size: .85rem } th:first-child, td:first-child { text-align: left }
.images { display: grid; gap: .5rem; grid-template-columns: repeat(auto-fill, minmax(3.6rem, 1fr)) }
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
    label: int
    value: float  # mean entropy of the student over its visits, nats


def rank_images(summary: Summary, images: np.ndarray, labels: np.ndarray) -> list[RankedImage]:
    """All training images that the run has visited, the most valuable first."""
    values, counts = summary.condenser.values.cpu().numpy(), summary.condenser.counts.cpu().numpy()
    visited = np.flatnonzero(counts)
    order = visited[np.argsort(-values[visited], kind="stable")]
    return [RankedImage(images[i], int(labels[i]), float(values[i])) for i in order]


def write(
    folder: Path,
    *,
    title: str,
    summaries: Sequence[Summary],
    reference: str,
    ranking: Sequence[RankedImage],
    config: Mapping[str, object],
) -> None:
    """Writes `report.html` and `report.png` into the folder.

    Args:
        title: the headline.
        summaries: runs of several methods and seeds.
        reference: the method that is drawn as a level instead of a curve (the teacher).
        ranking: training images, the most valuable first.
        config: shown at the end; JSON.

    Raises:
        OSError: a file cannot be written.
    """
    runs = _Runs(summaries, reference)
    write_bytes(folder / "report.html", _page(title, runs, ranking, config).encode())
    write_bytes(folder / "report.png", _picture(runs, ranking))


class _Runs:
    """The runs by method, averaged over seeds epoch by epoch."""

    def __init__(self, summaries: Sequence[Summary], reference: str):
        self.summaries = summaries
        self.groups: dict[str, list[Summary]] = {}
        for summary in summaries:
            self.groups.setdefault(summary.method, []).append(summary)
        self.reference = self.groups.get(reference, [])
        self.drawn = [method for method in self.groups if method != reference]
        self.colours = dict(zip(self.drawn, COLOURS * len(self.drawn), strict=False))

    def curve(self, method: str, name: str) -> np.ndarray:
        """(epochs,) of a number in the lines of metrics."""
        return np.mean([[line[name] for line in run.history] for run in self.groups[method]], axis=0)

    def stages(self) -> Iterator[tuple[str, dict]]:
        """The E-steps of the first run that ranked by value (it is the one that mixes), with the run's name."""
        for run in self.summaries:
            found = [line["condensation"] for line in run.history if line["condensation"]]
            if any(stage["mixed"] for stage in found):
                yield from ((run.method, stage) for stage in found)
                return


def _draw_accuracy(axes: Axes, runs: _Runs, against: str, label: str) -> None:
    """Accuracy of every method after every epoch, against a running sum: whole curves, from the first epoch on."""
    for method in runs.drawn:
        x, y = runs.curve(method, against), runs.curve(method, "accuracy")
        axes.plot(x, y, color=runs.colours[method], label=method, linewidth=1.6)
    if runs.reference:
        level = mean(run.accuracy_last for run in runs.reference)
        axes.axhline(level, color="#333333", linestyle="--", linewidth=1, label=runs.reference[0].method)
    axes.set(xlabel=label, ylabel="test accuracy, %")
    axes.xaxis.set_major_formatter(lambda x, _position: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}")
    axes.legend(loc="lower right", frameon=False)


def _draw_values(axes: Axes, runs: _Runs) -> None:
    """How the values of all samples are spread when a stage ends, one line a stage."""
    stages = list(runs.stages())
    shades = matplotlib.colormaps["viridis_r"](np.linspace(0.15, 1, max(len(stages), 1)))
    for (_, stage), shade in zip(stages, shades, strict=False):
        values = stage["values"]
        counts = np.array(values["counts"])
        edges = np.linspace(values["low"], values["high"], len(counts) + 1)
        label = f"stage {stage['stage']}: {stage['kept']:,} kept"
        axes.stairs(100 * counts / counts.sum(), edges, color=shade, label=label, linewidth=1.4)
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


def _svg(figure: Figure) -> str:
    """The figure as an element of a page, without the head that a file of its own has."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _picture(runs: _Runs, ranking: Sequence[RankedImage]) -> bytes:
    """The report in one PNG."""
    figure, (visits, values, best, worst) = _figure(11, 5.2, columns=2, rows=(3, 1.7))
    _draw_accuracy(visits, runs, "sample_visits", "sample visits")
    _draw_values(values, runs)
    for axes, chosen, title in ((best, ranking[:SHOWN], "most"), (worst, ranking[-SHOWN:], "least")):
        axes.set_axis_off()
        if chosen:
            axes.imshow(_tiles([ranked.image for ranked in chosen], columns=8), cmap="gray", vmin=0, vmax=255)
            axes.set_title(f"{title} valuable for the student", fontsize=10)
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
    alt = f"an image of class {item.label}"
    caption = f"class {item.label}<br>{item.value:.2f}"
    return f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'


def _table(runs: _Runs) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in astuple(HEADER))
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in astuple(row)) + "</tr>"
        for row in tabulate(runs.summaries)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _page(title: str, runs: _Runs, ranking: Sequence[RankedImage], config: Mapping[str, object]) -> str:
    figures = {}
    for against, label in (("sample_visits", "sample visits"), ("seconds", "seconds of training")):
        figure, (axes,) = _figure(5.6, 3.8)
        _draw_accuracy(axes, runs, against, label)
        figures[against] = _svg(figure)
    figure, (axes,) = _figure(5.6, 3.8)
    _draw_values(axes, runs)
    seeds = list(dict.fromkeys(run.seed for run in runs.summaries))
    values = f"""
<section class="values"><h2>Knowledge values, stage by stage</h2>{_svg(figure)}
<p class="note">How the values of all samples visited so far are spread when a stage ends. A value is the student's
 mean entropy over its visits to the sample (seed {seeds[0]}).</p></section>"""
    most, least = ("".join(map(_thumbnail, chosen)) for chosen in (ranking[:SHOWN], ranking[-SHOWN:]))
    images = f"""
<section><h2>Most valuable training images</h2><div class="images">{most}</div></section>
<section><h2>Least valuable training images</h2><div class="images">{least}</div>
<p class="note">Below each image its class and its value at the end, in nats (seed {seeds[0]}).</p></section>"""
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
<section class="wide"><h2>Results, {"mean ± standard deviation over" if len(seeds) > 1 else ""}
 seed{"s" if len(seeds) > 1 else ""} {", ".join(map(str, seeds))}</h2>{_table(runs)}
<p class="note">Accuracy on the test set, after the last epoch and in the best one. A sample visit is one sample
 trained on once; a teacher visit one that the teacher was asked about. Percentages are of KD's. Seconds are of training
 alone, without validation.</p></section>
<div class="pair">
<section><h2>Accuracy against sample visits</h2>{figures["sample_visits"]}</section>
<section><h2>Accuracy against seconds</h2>{figures["seconds"]}</section>
</div>{values if any(runs.stages()) else ""}{images if ranking else ""}
<section><h2>Configuration</h2><pre>{html.escape(json.dumps(config, indent=2))}</pre></section>
</main></body>
</html>
"""
