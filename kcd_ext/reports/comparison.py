"""Compare runs: group those that differ only in their seed, and list common and different options."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..training.fingerprint import RESUMABLE_CHANGES
from ..training.recipe import Recipe
from ..training.summary import Summary
from . import ranking, runs
from .ranking import Ranking
from .runs import TEACHER, Run
from .tables import Table

BASELINE = "kd"
# Entries of a recipe that are not compared directly: runs of one group may differ in the first ones and in the seed;
# "condense" and "options" are compared entry by entry.
NOT_COMPARED = (*RESUMABLE_CHANGES, "seed", "condense", "options")


@dataclass(frozen=True)
class Comparison:
    """The content of a report."""

    title: str
    summaries: Sequence[Summary]  # by method, named as in the tables; a teacher that all runs share comes first
    baseline: str  # the method whose visits are 100 %; empty: the runs have different data sets
    notes: Sequence[str]  # sentences about the runs
    differences: Table  # the options that differ between methods; empty if none do
    ranking: Ranking | None
    ranked: str  # the run that `ranking` belongs to
    class_names: Sequence[str]
    config: Mapping[str, object]  # what the runs have in common, as JSON values
    folders: Mapping[str, Sequence[Path]]  # run folders by method


@dataclass
class _Group:
    """Runs that differ only in their seed, each seed once."""

    path: Path  # the path under which the first run was found
    settings: Mapping[str, object]
    runs: list[Run]

    def accepts(self, run: Run) -> bool:
        """Return whether a run belongs to this group."""
        seeds = [other.metadata.seed for other in self.runs]
        return self.settings == _settings(run) and run.metadata.seed not in seeds


def compare(paths: Sequence[Path], outdated: Collection[Path] = ()) -> Comparison:
    """Read runs and return the content of their report.

    Args:
        paths: run folders, or folders of several runs (`runs.find`).
        outdated: resolved folders of runs whose evaluation will be replaced and is therefore not read.

    Raises:
        ValueError: there are no such runs, no epoch has finished, or a file is damaged.
        OSError: a file cannot be read.
    """
    groups = _grouped(paths)
    started = [
        replace(run, summary=replace(run.summary, method=label))
        for label, group in groups.items()
        for run in group.runs
        if run.summary is not None
    ]
    if not started:
        raise ValueError(f"nothing to report: no epoch has finished in {', '.join(map(str, paths))}")
    summaries = [run.summary if run.folder.resolve() in outdated else runs.with_evaluation(run) for run in started]
    all_runs = [run for group in groups.values() for run in group.runs]
    page = _common([run.metadata.page for run in all_runs])
    class_names, of_one_command = page.pop("class_names", ()), "title" in page
    settings = [group.settings for group in groups.values()]
    sets = {(str(each.get("dataset")), each.get("train")) for each in settings}
    ranked = _run_with_images(started)
    return Comparison(
        title=page.pop("title") if of_one_command else _title(groups),
        summaries=[*_shared_teacher(all_runs), *summaries],
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


def _runs_in(path: Path) -> Iterator[Run]:
    """Yield the runs in a folder. Runs of one command come in the order of the command, by seed."""
    for folders in runs.runs_by_report(path).values():
        found = [runs.read(folder) for folder in folders]
        order = list(found[0].metadata.planned_threads)
        yield from sorted(found, key=lambda run: order.index(run.label) if run.label in order else -1)


def _grouped(paths: Sequence[Path]) -> dict[str, _Group]:
    """Return groups by label, in the order of the paths. If a label is not unique, its folder is appended."""
    groups: list[_Group] = []
    seen = set()
    for path in paths:
        for run in _runs_in(path):
            if run.folder.resolve() in seen:
                continue
            seen.add(run.folder.resolve())
            matching = [group for group in groups if group.accepts(run)]
            if matching:
                min(matching, key=lambda group: group.path != path).runs.append(run)
            else:
                groups.append(_Group(path, _settings(run), [run]))
    labels = Counter(group.runs[0].label for group in groups)
    labels_in_path = Counter((group.runs[0].label, group.path) for group in groups)

    def name(group: _Group) -> str:
        label = group.runs[0].label
        if labels[label] == 1:
            return label
        return f"{label} ({group.path if labels_in_path[label, group.path] == 1 else group.runs[0].folder})"

    return {name(group): group for group in groups}


def _settings(run: Run) -> dict[str, object]:
    """Return everything except the seed that determines a run's result: option -> value."""
    config = run.metadata.config
    recipe, about = {**Recipe().as_json(), **config["recipe"]}, config.get("about") or {}  # older versions lack fields
    found = {"label": run.label, **{name: value for name, value in recipe.items() if name not in NOT_COMPARED}}
    for part in ("condense", "options"):
        found |= {f"{part}.{name}": value for name, value in (recipe.get(part) or {}).items()}
    found |= {name: config.get(name) for name in ("train", "test", "precision", "processes")}
    if not about:  # a run of the library does not record the source of its data and networks
        return found | {
            name: config.get(name) for name in ("train_samples", "test_samples", "teacher", "teacher_input")
        }
    found |= {name: about.get(name) for name in ("dataset", "student", "teacher")}
    return found | {f"data.{name}": value for name, value in (about.get("data") or {}).items()}


def _differences(groups: Mapping[str, _Group]) -> Table:
    """Return a table of the options that differ between groups."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group.settings if name != "label"))
    differ = [name for name in names if len({str(group.settings.get(name)) for group in groups.values()}) > 1]
    rows = [[label, *(_format_value(group.settings.get(name)) for name in differ)] for label, group in groups.items()]
    return [["run", *differ], *rows] if differ else []


def _format_value(value: object) -> str:
    return "-" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _common(objects: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Return the entries that all objects share, recursively."""
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
    """Return the title of a report on several commands."""
    names = {group.settings.get("dataset") for group in groups.values()}
    on = f" on {names.pop()}" if len(names) == 1 and None not in names else ""
    return f"{', '.join(groups)}{on}"


def _shared_teacher(found: Sequence[Run]) -> list[Summary]:
    """Return the summary of the teacher's run if all distilled runs share it and it is not among them."""
    distilled = [run for run in found if run.metadata.teacher is not None]
    if any(run.label == TEACHER for run in found) or len({str(run.metadata.teacher_run) for run in distilled}) != 1:
        return []
    return next(([teacher.summary] for run in distilled if (teacher := runs.find_teacher_run(run)) is not None), [])


def _run_with_images(started: Sequence[Run]) -> Run | None:
    """Return the first run with a ranking: preferably one that drops samples by value, a teacher's last; None: no ranking."""
    candidates = [run for run in started if (run.folder / ranking.RANKING).exists()]

    def preference(run: Run) -> tuple[bool, bool]:
        steps = [line["condensation"] for line in run.summary.history if line["condensation"]]
        return any(step["mixed"] for step in steps), run.metadata.label != TEACHER

    return max(candidates, key=preference, default=None)
