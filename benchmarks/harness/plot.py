"""The plot of time against bytes, with the floor, as SVG."""

from pathlib import Path
from typing import TYPE_CHECKING

from .cases import DTYPES
from .constants import BOTH, COMPILE, EAGER, LEAST, MEASURED, OURS, OURS_INPLACE
from .report import shape_key

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINE_DTYPE = "float32"

COLOURS = {OURS: "#0072b2", OURS_INPLACE: "#56b4e9", EAGER: "#d55e00", COMPILE: "#e69f00", LEAST: "#999999"}


def draw(rows: list[dict], title: str, path: Path) -> None:
    """Draw the medians of forward and backward of every candidate at every shape, both axes logarithmic.

    Args:
        rows: rows of figures; only the measured ones are drawn.
        title: the title above the plot.
        path: the file to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    measured = [row for row in rows if row["direction"] == BOTH and row["status"] == MEASURED]
    for name in dict.fromkeys(row["candidate"] for row in measured):
        _draw(axes, [row for row in measured if row["candidate"] == name], "median_us", COLOURS.get(name), name)
    shapes = list({shape_key(row): row for row in measured}.values())
    _draw(axes, shapes, "floor_us", "black", "floor", "--")
    for row in shapes:
        on_line, position = row["dtype"] == LINE_DTYPE, (_mebibytes(row), row["floor_us"])
        text = shape_key(row).replace(f":{LINE_DTYPE}", "").replace(":", " ")
        offset, side = ((5, -3), "left") if on_line else ((-5, 3), "right")
        vertical = "top" if on_line else "bottom"
        axes.annotate(text, position, offset, textcoords="offset points", fontsize=7, ha=side, va=vertical)
    axes.margins(x=0.15)
    axes.set_xlabel(f"MiB: student and teacher read, the gradient written (squares: other than {LINE_DTYPE})")
    axes.set_ylabel("µs, forward and backward")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})  # the same figures make the same file


def _draw(axes: "Axes", rows: list[dict], column: str, colour: str | None, label: str, line: str = "-") -> None:
    """Draw float32 rows as a line and other rows as single points, which may have the same number of bytes."""
    joined = sorted((_mebibytes(row), row[column]) for row in rows if row["dtype"] == LINE_DTYPE)
    single = [(_mebibytes(row), row[column]) for row in rows if row["dtype"] != LINE_DTYPE]
    axes.loglog(*_columns(joined), f"o{line}", color=colour, label=label, markersize=4)
    axes.loglog(*_columns(single), "s", color=colour, markersize=5, fillstyle="none")


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _mebibytes(row: dict) -> float:
    return 3 * row["rows"] * row["classes"] * DTYPES[row["dtype"]].itemsize / 2**20
