"""`kcd report`: what runs have left, side by side."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from .. import terminal
from ..environment import versions
from ..reports import page, runs
from ..reports.runs import Run
from ..reports.tables import as_text, cells
from ..training.fingerprint import RESUMABLE_CHANGES

REFERENCE, BASELINE = "teacher", "kd"
APART = (*RESUMABLE_CHANGES, "seed")  # of a recipe: what runs of one group may differ in


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
        """Writes the page and prints the tables. Raises as `write` does."""
        tables, notes = self.write()
        for table in tables:
            terminal.show(*as_text(table), "")
        terminal.show(*notes, f"report: {self.output}")

    def write(self) -> tuple[list[Sequence[Sequence[str]]], list[str]]:
        """Reads JSON alone and writes the page; its tables and the notes below them.

        Raises:
            TypeError, ValueError: there are no such runs, or a file in them is damaged.
            OSError: a file cannot be read or written.
        """
        if not self.runs:
            raise ValueError("kcd report needs the folder of a run at least")
        if self.output.suffix != ".html":
            raise ValueError(f"output must end in .html, got {self.output}")
        groups = _grouped(self.runs)
        summaries = [
            runs.evaluated(replace(run.summary, method=label), run.folder)
            for label, group in groups.items()
            for run in group.runs
            if run.summary is not None
        ]
        if not summaries:
            raise ValueError(f"nothing to report: no epoch has ended in {', '.join(map(str, self.runs))}")
        notes = [f"Unfinished: {run.unfinished}." for group in groups.values() for run in group.runs if run.unfinished]
        differences = _differences(groups)
        baseline = BASELINE if _on_one_set(groups) else ""
        page.write(
            self.output,
            title=_title(groups),
            summaries=summaries,
            reference=REFERENCE,
            config={
                "in common": _common(groups),
                "runs": {label: [str(run.folder) for run in group.runs] for label, group in groups.items()},
                "versions": versions(),
            },
            notes=notes,
            differences=differences,
            baseline=baseline,
        )
        tables = [table for table in (cells(summaries, baseline), differences) if table]
        return tables, [*notes, *page.notes_on_agreement(summaries)]


@dataclass
class _Group:
    """Runs that differ in the seed alone, of which each is there once."""

    path: Path
    """Where the first of them was found."""
    settings: Mapping[str, object]
    runs: list[Run]

    @property
    def label(self) -> str:
        return self.runs[0].label

    def takes(self, run: Run) -> bool:
        """Whether it is one of them."""
        return self.settings == _settings(run) and run.seed not in [other.seed for other in self.runs]


def _grouped(paths: Sequence[Path]) -> dict[str, _Group]:
    """By label, in the order of the paths. Groups of one label are told apart by their folders."""
    groups: list[_Group] = []
    seen = set()
    for path in paths:
        for folder in runs.find(path):
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            run = runs.read(folder)
            fitting = [group for group in groups if group.takes(run)]
            if fitting:
                min(fitting, key=lambda group: group.path != path).runs.append(run)
            else:
                groups.append(_Group(path, _settings(run), [run]))
    labels = Counter(group.label for group in groups)
    places = Counter((group.label, group.path) for group in groups)

    def name(group: _Group) -> str:
        if labels[group.label] == 1:
            return group.label
        return f"{group.label} ({group.path if places[group.label, group.path] == 1 else group.runs[0].folder})"

    return {name(group): group for group in groups}


def _settings(run: Run) -> dict[str, object]:
    """All that decides its result but the seed: option -> value."""
    config, recipe, about = run.config, run.config["recipe"], run.config.get("about") or {}
    found = {"label": run.label}
    found |= {name: value for name, value in recipe.items() if name not in (*APART, "condense", "options")}
    for part in ("condense", "options"):
        found |= {f"{part}.{name}": value for name, value in (recipe.get(part) or {}).items()}
    found |= {name: config.get(name) for name in ("train", "test", "precision", "processes")}
    if not about:  # nobody has said where they came from
        return found | {
            name: config.get(name) for name in ("train_samples", "test_samples", "teacher", "teacher_input")
        }
    found |= {name: about.get(name) for name in ("dataset", "student", "teacher")}
    return found | {f"data.{name}": value for name, value in (about.get("data") or {}).items()}


def _differences(groups: Mapping[str, _Group]) -> list[list[str]]:
    """A table, its header first: every group's value of the settings that are not the same for all."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group.settings if name != "label"))
    differ = [name for name in names if len({str(group.settings.get(name)) for group in groups.values()}) > 1]
    rows = [[label, *(_shown(group.settings.get(name)) for name in differ)] for label, group in groups.items()]
    return [["run", *differ], *rows] if differ else []


def _on_one_set(groups: Mapping[str, _Group]) -> bool:
    """Whether visits of all can be compared: of as many samples of one data set."""
    return len({(str(group.settings.get("dataset")), group.settings.get("train")) for group in groups.values()}) == 1


def _common(groups: Mapping[str, _Group]) -> dict[str, object]:
    first, *others = (group.settings for group in groups.values())
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def _shown(value: object) -> str:
    return "-" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _title(groups: Mapping[str, _Group]) -> str:
    names = {group.settings.get("dataset") for group in groups.values()}
    on = f" on {names.pop()}" if len(names) == 1 and None not in names else ""
    return f"{', '.join(groups)}{on}"
