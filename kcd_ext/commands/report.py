"""`kcd report`: what runs have left, side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from .. import terminal
from ..reports import page
from ..reports.tables import as_text


@dataclass(frozen=True)
class Report:
    """Compares runs in one page: tables, curves, values, and what their options differ in.

    Runs that differ in the seed alone are averaged. Those that have not finished are shown as far as they are.
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]")]
    """Folders of kcd distill, kcd teacher, kcd demo or kcd_ext.training.distill, or a folder of such folders."""
    output: Path = Path("report.html")
    """The page. A picture of the same name is written beside it."""

    def run(self) -> None:
        """Write the page and print its tables.

        Raises:
            ValueError: there are no such runs, or a file in them is damaged; nothing is written then.
            OSError: a file cannot be read or written.
        """
        if not self.runs:
            raise ValueError("kcd report needs the folder of a run at least")
        if self.output.suffix != ".html":
            raise ValueError(f"output must end in .html, got {self.output}")
        report = page.write(self.output, self.runs)
        for table in report.tables:
            terminal.show(*as_text(table), "")
        terminal.show(*report.notes, f"report: {self.output}")
