"""Write the report of a set of runs: one self-contained HTML file and its picture."""

import base64
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..files import write_bytes
from . import figures, ranking, tables
from .comparison import Comparison, compare
from .conclusion import conclusion

TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Report:
    """The parts of a report that a terminal shows."""

    tables: Sequence[tables.Table]
    """The results and, if any, the options that differ between methods; each table starts with its header."""
    notes: Sequence[str]
    """Sentences about the tables."""


def write(page: Path, paths: Sequence[Path]) -> Report:
    """Write the report of these runs, and beside it a picture with the suffix .png.

    The report depends only on the run folders. Runs that differ only in their seed are averaged, up to the epoch of the
    shortest. Missing parent folders of the page are created.

    Args:
        page: the HTML file.
        paths: run folders, or folders of several runs (`runs.find`).

    Raises:
        ValueError: there are no such runs, no epoch has finished, or a file is damaged; nothing has been written.
        OSError: a file cannot be read or written.
    """
    found = compare(paths)
    html, picture = render(found, page.parent)
    page.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(page, html)
    write_bytes(page.with_suffix(".png"), picture)
    results = tables.results_table(found.summaries, found.baseline)
    shown = [table for table in (results, found.differences) if table]
    notes = [*found.notes, *tables.notes_on_best(found.summaries), *tables.notes_on_agreement(found.summaries)]
    return Report(shown, [*notes, *filter(None, [conclusion(tables.by_method(found.summaries))])])


def render(found: Comparison, folder: Path) -> tuple[bytes, bytes]:
    """Return the page, with paths relative to `folder`, and the picture."""
    runs = {label: [os.path.relpath(each, folder) for each in folders] for label, folders in found.folders.items()}
    methods, evaluated = figures.Methods(found.summaries), tables.evaluated_runs(found.summaries)
    evaluations = {}
    for name, summary in evaluated:
        evaluations.setdefault(summary.method, (name, summary.evaluation))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(TEMPLATE).render(
        found=found,
        methods=methods,
        config=json.dumps({**found.config, "runs": runs}, indent=2),
        evaluated=evaluated,
        first_evaluations=dict(evaluations.values()),
        conclusion=conclusion(methods.groups),
        tables=tables,
        figures=figures,
        number=tables.format_number,
        data_uri=_data_uri,
    )
    return text.encode(errors="replace"), figures.picture(methods, found.ranking)  # replaces lone surrogates


def _data_uri(image: np.ndarray) -> str:
    return f"data:image/png;base64,{base64.b64encode(ranking.png(image)).decode()}"
