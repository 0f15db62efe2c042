"""Compare ratios to eager with the committed ones: `ratios.json` holds those of every machine that was measured."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from .constants import EAGER
from .machine import write_json

FILE = "ratios.json"
LEAST = 0.5  # the smallest acceptable fraction of a committed ratio

Ratios = dict[str, float]
"""Shape -> how many times longer eager takes than kcd_ext."""


def record(folder: Path, result: Mapping[str, object]) -> None:
    """Add the ratios of one CPU run to `ratios.json` in `folder`, or replace those of an earlier run.

    Args:
        folder: holds `ratios.json`, which is created if necessary.
        result: the figures of `benchmarks/run.py`. Runs on a GPU and runs without a main table are not recorded.
    """
    ratios = {shape: by_name[EAGER] for shape, by_name in result["ratios"].items() if EAGER in by_name}
    if result["benchmark"] != "cpu" or not ratios:
        return
    path, facts = folder / FILE, result["facts"]
    machines = json.loads(path.read_text()) if path.exists() else {}
    machines[result["name"]] = {
        "instruction_set": facts["instruction set"],
        "threads": facts["threads"],
        "speedup_over_eager": ratios,
    }
    write_json(path, dict(sorted(machines.items())))


def committed(folder: Path, instruction_set: str) -> dict[int, Ratios]:
    """Return number of threads -> ratios of an instruction set; the lowest ones if several machines have it."""
    path = folder / FILE
    found: dict[int, Ratios] = {}
    for machine in json.loads(path.read_text()).values() if path.exists() else ():
        if machine["instruction_set"] == instruction_set:
            ratios = found.setdefault(machine["threads"], {})
            for shape, ratio in machine["speedup_over_eager"].items():
                ratios[shape] = min(ratio, ratios.get(shape, ratio))
    return found


def fallen_twice(measure: Callable[[list[str]], Ratios], shapes: Iterable[str], committed: Ratios) -> list[str]:
    """Return one message for each shape whose ratio is below half of the committed one in two measurements.

    A shape without a committed ratio also gets a message.

    Args:
        measure: maps shapes to their ratios; a missing shape counts as fallen. The second call gets only the shapes that have
            fallen in the first.
        shapes: the shapes to measure.
        committed: the ratios to compare with.
    """
    shapes = list(shapes)
    unknown = [f"{shape}: no committed ratio" for shape in shapes if shape not in committed]
    below, messages = [shape for shape in shapes if shape in committed], []
    for _ in range(2):
        if not below:
            return unknown
        ratios = measure(below)
        below = [shape for shape in below if not ratios.get(shape, 0.0) >= LEAST * committed[shape]]
        messages = [
            f"{shape}: {ratios.get(shape, 'not measured')} × eager, committed {committed[shape]}" for shape in below
        ]
    return unknown + messages
