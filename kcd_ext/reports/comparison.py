"""Compare runs: which of them differ in the seed alone, what else they differ in, and what they have in common."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..training.fingerprint import RESUMABLE_CHANGES
from ..training.summary import Summary
from . import ranking, runs
from .ranking import Ranking
from .runs import TEACHER, Run
from .tables import Table

BASELINE = "kd"
APART = (
    *RESUMABLE_CHANGES,
    "seed",
    "condense",
    "options",
)  # of a recipe: what runs of one group may differ in, and what has parts


@dataclass(frozen=True)
class Comparison:
    """All that a report shows."""

    title: str
    summaries: Sequence[Summary]  # by method, which is named as in the tables; first the teacher's, where all have one
    baseline: str  # the method whose visits are a hundred percent; empty: the runs are not of one data set
    notes: Sequence[str]  # sentences about the runs
    differences: Table  # what differs between the methods; empty: nothing
    ranking: Ranking | None
    ranked: str  # the run that the ranking is of
    class_names: Sequence[str]
    config: Mapping[str, object]  # what the runs have in common, JSON
    folders: Mapping[str, Sequence[Path]]  # those of the runs, by method


@dataclass
class _Group:
    """Runs that differ in the seed alone, of which each is there once."""

    path: Path  # where the first of them was found
    settings: Mapping[str, object]
    runs: list[Run]

    def takes(self, run: Run) -> bool:
        """Return whether it is one of them."""
        seeds = [other.metadata.seed for other in self.runs]
        return self.settings == _settings(run) and run.metadata.seed not in seeds


def compare(paths: Sequence[Path], outdated: Collection[Path] = ()) -> Comparison:
    """Read runs and all that their report shows.

    Args:
        paths: folders of runs, or of several runs (`runs.find`).
        outdated: resolved folders of runs whose evaluation is about to be replaced, and is not read.

    Raises:
        ValueError: there are no such runs, no epoch has ended, or a file is damaged.
        OSError: a file cannot be read.
    """
    groups = _grouped(paths)
    begun = [
        replace(run, summary=replace(run.summary, method=label))
        for label, group in groups.items()
        for run in group.runs
        if run.summary is not None
    ]
    if not begun:
        raise ValueError(f"nothing to report: no epoch has ended in {', '.join(map(str, paths))}")
    summaries = [run.summary if run.folder.resolve() in outdated else runs.with_evaluation(run) for run in begun]
    all_runs = [run for group in groups.values() for run in group.runs]
    page = _common([run.metadata.page for run in all_runs])
    class_names, of_one_command = page.pop("class_names", ()), "title" in page
    settings = [group.settings for group in groups.values()]
    sets = {(str(each.get("dataset")), each.get("train")) for each in settings}
    ranked = _ranked(begun)
    return Comparison(
        title=page.pop("title") if of_one_command else _title(groups),
        summaries=[*_teacher(all_runs), *summaries],
        baseline=BASELINE if len(sets) == 1 else "",
        notes=[f"Unfinished: {run.unfinished}." for run in all_runs if run.unfinished],
        differences=_differences(groups),
        ranking=ranked and ranking.read(ranked.folder),
        ranked=f"{ranked.label}, seed {ranked.metadata.seed}" if ranked else "",
        class_names=class_names,
        config={
            **(page if of_one_command else {}),
            "in common": _common(settings),
            "versions": _common([run.metadata.config.get("versions") or {} for run in all_runs]),
        },
        folders={label: [run.folder for run in group.runs] for label, group in groups.items()},
    )


def _found(path: Path) -> Iterator[Run]:
    """Yield the runs in a folder; those of one command in its order, by seed."""
    for folders in runs.runs_by_report(path).values():
        found = [runs.read(folder) for folder in folders]
        order = list(found[0].metadata.planned_threads)
        yield from sorted(found, key=lambda run: order.index(run.label) if run.label in order else -1)


def _grouped(paths: Sequence[Path]) -> dict[str, _Group]:
    """Return groups by label, in the order of the paths. Groups of one label are told apart by their folders."""
    groups: list[_Group] = []
    seen = set()
    for path in paths:
        for run in _found(path):
            if run.folder.resolve() in seen:
                continue
            seen.add(run.folder.resolve())
            fitting = [group for group in groups if group.takes(run)]
            if fitting:
                min(fitting, key=lambda group: group.path != path).runs.append(run)
            else:
                groups.append(_Group(path, _settings(run), [run]))
    labels = Counter(group.runs[0].label for group in groups)
    places = Counter((group.runs[0].label, group.path) for group in groups)

    def name(group: _Group) -> str:
        label = group.runs[0].label
        if labels[label] == 1:
            return label
        return f"{label} ({group.path if places[label, group.path] == 1 else group.runs[0].folder})"

    return {name(group): group for group in groups}


def _settings(run: Run) -> dict[str, object]:
    """Return all that decides a run's result but the seed: option -> value."""
    config = run.metadata.config
    recipe, about = config["recipe"], config.get("about") or {}
    found = {"label": run.label, **{name: value for name, value in recipe.items() if name not in APART}}
    for part in ("condense", "options"):
        found |= {f"{part}.{name}": value for name, value in (recipe.get(part) or {}).items()}
    found |= {name: config.get(name) for name in ("train", "test", "precision", "processes")}
    if not about:  # a run without a command does not say where its data and networks come from
        return found | {
            name: config.get(name) for name in ("train_samples", "test_samples", "teacher", "teacher_input")
        }
    found |= {name: about.get(name) for name in ("dataset", "student", "teacher")}
    return found | {f"data.{name}": value for name, value in (about.get("data") or {}).items()}


def _differences(groups: Mapping[str, _Group]) -> Table:
    names = list(dict.fromkeys(name for group in groups.values() for name in group.settings if name != "label"))
    differ = [name for name in names if len({str(group.settings.get(name)) for group in groups.values()}) > 1]
    rows = [[label, *(_shown(group.settings.get(name)) for name in differ)] for label, group in groups.items()]
    return [["run", *differ], *rows] if differ else []


def _shown(value: object) -> str:
    return "-" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _common(objects: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Return the entries that all have, of objects in them those that all have."""
    first, *others = objects
    found = {}
    for name, value in first.items():
        values = [value, *(other.get(name) for other in others)]
        if all(isinstance(each, Mapping) for each in values):
            found[name] = _common(values)
        elif all(each == value for each in values):
            found[name] = value
    return found


def _title(groups: Mapping[str, _Group]) -> str:
    names = {group.settings.get("dataset") for group in groups.values()}
    on = f" on {names.pop()}" if len(names) == 1 and None not in names else ""
    return f"{', '.join(groups)}{on}"


def _teacher(found: Sequence[Run]) -> list[Summary]:
    """Return the summary of the run that trained the teacher, where all have the same one and it is not among them."""
    taught = [run for run in found if run.metadata.teacher is not None]
    if any(run.label == TEACHER for run in found) or len({str(run.metadata.teacher_run) for run in taught}) != 1:
        return []
    return next(([teacher.summary] for run in taught if (teacher := runs.teacher_of(run)) is not None), [])


def _ranked(begun: Sequence[Run]) -> Run | None:
    """Return the first run that has ranked its images: rather one that drops them by value, last of all a teacher."""
    having = [run for run in begun if (run.folder / ranking.RANKING).exists()]

    def preference(run: Run) -> tuple[bool, bool]:
        steps = [line["condensation"] for line in run.summary.history if line["condensation"]]
        return any(step["mixed"] for step in steps), run.metadata.label != TEACHER

    return max(having, key=preference, default=None)
