"""Time against bytes, with the floor: an SVG."""

from pathlib import Path
from typing import TYPE_CHECKING

from .names import BOTH, COMPILE, EAGER, LEAST, MEASURED, OWN, OWN_INPLACE
from .places import DTYPES
from .report import key_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE = "float32"

COLOURS = {OWN: "#0072b2", OWN_INPLACE: "#56b4e9", EAGER: "#d55e00", COMPILE: "#e69f00", LEAST: "#999999"}


def draw(rows: list[dict], title: str, path: Path) -> None:
    """Medians of forward and backward of every candidate at every shape, both axes logarithmic.

    Args:
        rows: of figures; those that were measured are drawn.
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
    places = list({key_of(row): row for row in measured}.values())
    _draw(axes, places, "floor_us", "black", "floor", "--")
    for row in places:
        wide, at = row["dtype"] == WIDE, (_mebibytes(row), row["floor_us"])
        text = key_of(row).replace(f":{WIDE}", "").replace(":", " ")
        offset, side = ((5, -3), "left") if wide else ((-5, 3), "right")
        axes.annotate(text, at, offset, textcoords="offset points", fontsize=7, ha=side, va="top" if wide else "bottom")
    axes.margins(x=0.15)
    axes.set_xlabel(f"MiB: student and teacher read, the gradient written (squares: other than {WIDE})")
    axes.set_ylabel("µs, forward and backward")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})  # the same figures make the same file


def _draw(axes: "Axes", rows: list[dict], what: str, colour: str | None, label: str, line: str = "-") -> None:
    """The float32 rows as a line, others as points of their own: they may lie at the same bytes."""
    wide = sorted((_mebibytes(row), row[what]) for row in rows if row["dtype"] == WIDE)
    other = [(_mebibytes(row), row[what]) for row in rows if row["dtype"] != WIDE]
    axes.loglog(*_columns(wide), f"o{line}", color=colour, label=label, markersize=4)
    axes.loglog(*_columns(other), "s", color=colour, markersize=5, fillstyle="none")


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _mebibytes(row: dict) -> float:
    return 3 * row["rows"] * row["classes"] * DTYPES[row["dtype"]].itemsize / 2**20
