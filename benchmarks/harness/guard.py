"""Whether ratios to eager are still what they were when they were committed."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from .names import EAGER

LEAST = 0.5  # of a committed ratio

Ratios = dict[str, float]
"""Shape -> how many times longer than ours eager takes."""


def committed(folder: Path, instruction_set: str) -> dict[int, Ratios]:
    """Threads -> ratios of this instruction set in a folder of results; the least, where several processors have them."""
    found: dict[int, Ratios] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if result.get("benchmark") != "cpu" or result["facts"]["instruction set"] != instruction_set:
            continue
        ratios = found.setdefault(result["facts"]["threads"], {})
        for shape, by_name in result["ratios"].items():
            if EAGER in by_name:
                ratios[shape] = min(by_name[EAGER], ratios.get(shape, by_name[EAGER]))
    return found


def fallen_twice(measure: Callable[[list[str]], Ratios], shapes: Iterable[str], committed: Ratios) -> list[str]:
    """What is wrong: shapes whose ratio is below half of the committed one in two measurements, and those without one.

    Args:
        measure: shapes -> their ratios; a shape that is missing from them counts as fallen. It is called a second time
            for those that have fallen alone.
        shapes: what to measure.
        committed: the ratios to compare with.
    """
    shapes = list(shapes)
    unknown = [f"{shape}: no committed ratio" for shape in shapes if shape not in committed]
    below, said = [shape for shape in shapes if shape in committed], []
    for _ in range(2):
        if not below:
            return unknown
        ratios = measure(below)
        below = [shape for shape in below if not ratios.get(shape, 0.0) >= LEAST * committed[shape]]
        said = [
            f"{shape}: {ratios.get(shape, 'not measured')} × eager, committed {committed[shape]}" for shape in below
        ]
    return unknown + said
