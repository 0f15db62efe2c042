"""The `kcd report` command: compare runs on one page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from .. import terminal
from ..reports import page
from ..reports.tables import as_text


@dataclass(frozen=True)
class Report:
    """Compare runs on one page: tables, curves, knowledge values and the options that differ.

    Runs that differ only in their seed are averaged. Unfinished runs are shown up to their last finished epoch.
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]")]
    """Run folders of kcd distill, kcd teacher, kcd demo or kcd_ext.training.distill, or a folder of run folders."""
    output: Path = Path("report.html")
    """The HTML file. A PNG picture of the same name is written beside it."""

    def run(self) -> None:
        """Write the page and print its tables.

        Raises:
            ValueError: there are no such runs, or one of their files is damaged; nothing has been written.
            OSError: a file cannot be read or written.
        """
        if not self.runs:
            raise ValueError("kcd report needs at least one run folder")
        if self.output.suffix != ".html":
            raise ValueError(f"output must end in .html, got {self.output}")
        report = page.write(self.output, self.runs)
        for table in report.tables:
            terminal.print_lines(*as_text(table), "")
        terminal.print_lines(*report.notes, f"report: {self.output}")
