"""Load and validate run folders."""

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from ..checks import check_choice, check_float, check_int, check_percent
from ..condensation.random_keys import MAX_SEED
from ..describe import describe
from ..environment import MAX_THREADS
from ..evaluation import Evaluation
from ..files import read_json, read_lines, read_regular
from ..models.normalisation import INTERPOLATIONS
from ..students import WEIGHTS
from ..training import checkpoint
from ..training.summary import ComparedWith, Summary, best_accuracy, best_epoch

RUN_GLOBS = ("seed-*/config.json", "checkpoint/seed-*/*/config.json")  # several seeds; a demo
EVALUATION = "evaluation.json"
TEACHER = "teacher"  # its name in tables, and the folder of a teacher that a command has trained
STUDENT_FILES = ("metrics.jsonl", WEIGHTS)  # files that differ between any two students
METRICS_DEFAULTS = {"flops": None, "condensation_seconds": 0.0}  # entries of a metrics line that older versions lack


class Normalisation(NamedTuple):
    """The normalisation of images: networks get (pixels / 255 - mean) / std, with one number per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class RunMetadata:
    """The content of a run's config.json. Its networks and data are not loaded.

    An entry is None if config.json lacks it.
    """

    config: Mapping[str, object]  # the entire file
    label: str
    seed: int
    epochs: int  # planned by the recipe
    threads: int | None  # of the last start of the run
    planned_threads: Mapping[str, int]  # of all runs of its command, by label and in order
    student: str | None  # name of the network
    student_config: Mapping[str, object] | None  # `kcd_ext.models.config` of it; None: the name is enough
    data: Mapping[str, object]  # arguments of `kcd_ext.data.images.load`
    teacher: str | None  # digest of the teacher's weights; None: no teacher
    teacher_network: str | None
    teacher_path: str | None  # path of its weights; None: beside the run
    teacher_normalisation: Normalisation | None  # of the images that it was given
    teacher_resizing: tuple[tuple[int, int], str] | None  # size and interpolation of these images; None: not resized
    teacher_run: Mapping[str, str]  # `fingerprint` of its own run on these images; empty if unknown
    teacher_accuracy: float | None  # measured before training, in percent
    page: Mapping[str, object]  # shown in reports unchanged: title, command, options, normalisation, class_names

    @property
    def normalisation(self) -> Normalisation | None:
        """The normalisation of the training images; None: config.json lacks it."""
        return None if self.data.get("mean") is None else Normalisation(self.data["mean"], self.data["std"])

    @classmethod
    def from_config(cls, config: dict) -> "RunMetadata":
        """Parse the content of a config.json. Raises KeyError, TypeError or ValueError if it is damaged."""
        recipe, about = _get_object(config, "recipe") or config["recipe"], _get_object(config, "about")
        data, given = _get_object(about, "data"), _get_object(about, "teacher_normalisation")
        for name in ("condense", "options"):
            _get_object(recipe, name)
        if data.get("size") is not None and "resize" not in data:  # written by a version that always did this
            data = {**data, "resize": "squash"}
        if data.get("mean") is not None:
            data = {**data, **_parse_normalisation(data)._asdict()}
        network, path = _get_text(about, "teacher_network"), _get_text(about, "teacher_path")
        if network is None:  # written by a version without these two entries
            network, _, path = (_get_text(about, "teacher") or "").partition(" of ")
        accuracy, threads, page = config.get("teacher_accuracy"), config.get("threads"), _get_object(about, "page")
        if not all(isinstance(name, str) for name in [page.get("title", ""), *page.get("class_names", ())]):
            raise TypeError("title and class_names must be strings")
        return cls(
            config=config,
            label=_replace_surrogates(config.get("label") or recipe.get("name") or recipe["method"]),
            seed=check_int("seed", recipe["seed"], 0, MAX_SEED),
            epochs=check_int("epochs", recipe["epochs"], 1),
            threads=None if threads is None else _check_threads(threads),
            planned_threads={name: _check_threads(count) for name, count in _get_object(about, "threads").items()},
            student=_get_text(about, "student"),
            student_config=_get_object(about, "student_config") or None,
            data=data,
            teacher=_get_text(config, "teacher"),
            teacher_network=network or None,
            teacher_path=path or None,
            teacher_normalisation=_parse_normalisation(given) if given else None,
            teacher_resizing=_parse_resizing(_get_object(about, "teacher_resizing")),
            teacher_run=_get_object(about, "teacher_run"),
            teacher_accuracy=None if accuracy is None else check_percent("teacher_accuracy", accuracy),
            page=page,
        )


@dataclass(frozen=True)
class Run:
    """A run, which may be unfinished."""

    folder: Path
    metadata: RunMetadata
    summary: Summary | None
    """The summary up to the last finished epoch; None if there is none."""

    @property
    def label(self) -> str:
        """The name of the run in tables."""
        return self.metadata.label if self.summary is None else self.summary.method

    @property
    def unfinished(self) -> str:
        """The progress of an unfinished run, as text; empty for a finished one, which may have stopped early."""
        done, epochs = 0 if self.summary is None else len(self.summary.history), self.metadata.epochs
        return f"{self.folder}: {done} of {epochs} epochs" if done < epochs and not self._stopped else ""

    @property
    def _stopped(self) -> bool:
        """Whether the recipe's `patience` was over after the last epoch."""
        patience = self.metadata.config["recipe"].get("patience")
        best = None if self.summary is None else self.summary.best_epoch
        return None not in (patience, best) and len(self.summary.history) - best >= patience


def runs_by_report(path: Path) -> dict[Path, list[Path]]:
    """Return the run folders in `path`, by the folder of their report.

    If `path` is a run, a study of several seeds or a demo, its report is in `path`. Otherwise its subfolders are searched
    for these, and each has its own report.

    Raises:
        ValueError: there is no run.
    """
    found = {path: _find_reported_runs(path, strict=True)}
    if not found[path] and path.is_dir():
        found = {folder: _find_reported_runs(folder) for folder in sorted(path.iterdir(), key=_natural_order)}
    found = {folder: run_dirs for folder, run_dirs in found.items() if run_dirs}
    if not found:
        raise ValueError(f"{path} is not a run folder and contains none")
    return found


def find(path: Path) -> list[Path]:
    """Return the run folders in `path`. Raises as `runs_by_report` does."""
    return [folder for folders in runs_by_report(path).values() for folder in folders]


def report_dirs(folder: Path) -> list[Path]:
    """Return the folders whose reports show a run: its own, that of all seeds, and that of the demo."""
    candidates = [Path(os.path.normpath(folder / up)) for up in ("", "..", "../../..")]
    return [
        candidate
        for candidate in candidates
        if folder.resolve() in [run.resolve() for run in _find_reported_runs(candidate)]
    ]


def read(folder: Path) -> Run:
    """Read the run in a folder, without its evaluation (`with_evaluation` adds it).

    Raises:
        ValueError: a file is damaged; the message names it.
        OSError: a file cannot be read.
    """
    metadata, results, metrics = metadata_of(folder), folder / "summary.json", folder / "metrics.jsonl"
    method = read_json(results, _parse_method) if results.exists() else metadata.label
    lines = read_lines(metrics, _parse_metrics) if metrics.exists() else []
    if [line["epoch"] for line in lines] != list(range(1, len(lines) + 1)) or len(lines) > metadata.epochs:
        raise ValueError(f"{metrics} is damaged: its lines must be for epochs 1, 2, ... up to {metadata.epochs}")
    if len({"val_accuracy" in line for line in lines}) > 1:
        raise ValueError(f"{metrics} is damaged: only some of its lines have a val_accuracy")
    if len({len(step["classes"]) for line in lines if (step := line["condensation"]) and step["classes"]}) > 1:
        raise ValueError(f"{metrics} is damaged: every line must have the same number of classes")
    if not lines:
        return Run(folder, metadata, None)
    summary = Summary(
        method=method,
        seed=metadata.seed,
        accuracy_last=lines[-1]["accuracy"],
        accuracy_best=best_accuracy(lines),
        **{name: lines[-1][name] for name in ("sample_visits", "teacher_visits", "seconds", *METRICS_DEFAULTS)},
        teacher_accuracy=metadata.teacher_accuracy,
        history=lines,
        best_epoch=best_epoch(lines),
    )
    run = Run(folder, metadata, summary)
    keeps_best = metadata.config["recipe"].get("keep_best") is True and not run.unfinished
    return replace(run, summary=replace(summary, keeps_best=keeps_best))


def metadata_of(folder: Path) -> RunMetadata:
    """Read the config.json of a run. Raises ValueError if it is damaged, OSError if it cannot be read."""
    return read_json(folder / "config.json", RunMetadata.from_config)


def metadata_if_started(folder: Path) -> RunMetadata | None:
    """Read the config.json of a run, or return None if there is none yet. Raises as `metadata_of` does."""
    return metadata_of(folder) if (folder / "config.json").exists() else None


def with_evaluation(run: Run) -> Summary:
    """Return the summary of a run with the results of `kcd evaluate`, if there are any.

    Raises:
        ValueError: evaluation.json is damaged or belongs to another student.
        OSError: a file cannot be read.
    """
    path = run.folder / EVALUATION
    if not path.exists():
        return run.summary

    def parse(content: dict) -> tuple[Evaluation, ComparedWith, dict]:
        teacher = [_get_text(content, name) for name in ("teacher_network", "teacher_path", "teacher")]
        if None in teacher:
            raise ValueError("it does not name the teacher that the student was compared with")
        own = run.metadata.teacher == teacher[-1]
        compared_with = ComparedWith(*map(_replace_surrogates, teacher), own)
        return Evaluation.from_json(content["evaluation"]), compared_with, _get_object(content, "run")

    evaluation, compared_with, recorded = read_json(path, parse)
    check_fingerprint(path, recorded, fingerprint(run.folder))
    return replace(run.summary, evaluation=evaluation, compared_with=compared_with)


def fingerprint(folder: Path, names: Sequence[str] = STUDENT_FILES) -> dict[str, str]:
    """Return digests that identify the student in a folder: file -> 16 hexadecimal digits, for the files that exist."""
    files = {name: folder / name for name in names}
    return {name: sha256(read_regular(path)).hexdigest()[:16] for name, path in files.items() if path.exists()}


def check_fingerprint(path: Path, recorded: Mapping[str, object], actual: Mapping[str, str]) -> None:
    """Raise ValueError if the file at `path` was made from another student than the one beside it."""
    for name, digest in actual.items():
        if recorded.get(name) != digest:
            raise ValueError(
                f"{path} belongs to another student: {name} has changed since, or is damaged; remove {path.name} and run "
                "the command that writes it again"
            )


def teacher_dirs(folder: Path, path: str | None) -> list[Path]:
    """Return possible paths of the teacher of a run: beside `folder`, and the `path` that its config.json names."""
    beside = [folder / TEACHER, folder.resolve().parent / TEACHER]
    return beside if path is None else [*beside, Path(path)]


def find_teacher_run(run: Run) -> Run | None:
    """Return the run that trained the teacher of `run` on the same images, or None if it is not found.

    Its accuracy is the one measured before the student was trained.
    """
    recorded = run.metadata.teacher_run
    for path in teacher_dirs(run.folder, run.metadata.teacher_path) if recorded else []:
        same = False
        with suppress(OSError, ValueError):  # ignore a path that cannot be read
            same = fingerprint(path) == recorded
        if same and (found := read(path)).summary is not None:
            measured = run.metadata.teacher_accuracy
            accuracy = found.summary.accuracy if measured is None else measured
            shown = {"accuracy_best" if found.summary.keeps_best else "accuracy_last": accuracy}
            return replace(found, summary=replace(found.summary, method=TEACHER, **shown))
    return None


def last_threads(folder: Path) -> int | None:
    """Return the number of torch's threads that computed the last epoch of a run, or None if no file records it.

    For a run without a checkpoint it is the number of its last start. Raises ValueError if config.json is damaged.
    """
    metadata = metadata_if_started(folder)
    found = checkpoint.read_run_json(folder / "checkpoint")
    try:
        return _check_threads(found["threads"]) if "threads" in found else metadata and metadata.threads
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'checkpoint'} is damaged: {error}") from error


# --- the content of files ---------------------------------------------------------------------------------------------


def _find_reported_runs(folder: Path, strict: bool = False) -> list[Path]:
    """Return the runs whose report is in `folder`. Unless `strict`, ignore damaged files."""

    def is_run(config: Path) -> bool:
        with nullcontext() if strict else suppress(ValueError):
            return config.is_file() and isinstance(read_json(config).get("recipe"), dict)
        return False

    if is_run(folder / "config.json"):
        return [folder]
    return sorted((c.parent for glob in RUN_GLOBS for c in folder.glob(glob) if is_run(c)), key=_natural_order)


def _natural_order(folder: Path) -> list[tuple[int, str]]:
    """Return a sort key that puts seed-9 before seed-10."""
    return [(len(part), part) for part in folder.parts]


def _parse_method(content: dict) -> str:
    """Return the method that a summary.json names."""
    return _replace_surrogates(content["results"][0]["method"])


def _parse_metrics(line: dict) -> dict:
    """Return a line of metrics.jsonl with every number that a report draws.

    Raises KeyError, TypeError or ValueError if it is damaged.
    """
    line = {**METRICS_DEFAULTS, **line}
    check_int("epoch", line["epoch"], 1)
    for name in ("accuracy", "val_accuracy"):
        if name == "accuracy" or name in line:
            check_percent(name, line[name])
    for name in ("sample_visits", "teacher_visits"):
        check_int(name, line[name], 0)
    for name in ("seconds", "condensation_seconds"):
        check_float(name, line[name], "a number >= 0", 0)
    if line["flops"] is not None:
        check_float("flops", line["flops"], "a number >= 0", 0)
    return {
        **line,
        "condensation": None if line.get("condensation") is None else _parse_condensation(line["condensation"]),
    }


def _parse_condensation(found: dict) -> dict:
    """Return the condensation step of an epoch's line. "values" is None if samples are not ranked by value."""
    for name in ("stage", "kept", "mixed"):
        check_int(name, found[name], 0)
    classes = found.get("classes")  # None: unknown, or written by an older version
    if classes is not None:
        classes = [check_int("classes", count, 0) for count in classes]
    if (values := found["values"]) is not None:
        low, high = (check_float(name, values[name], "a finite number", -math.inf) for name in ("low", "high"))
        if not low <= high or not [check_int("counts", count, 0) for count in values["counts"]]:
            raise ValueError("the values of its condensation are not a histogram")
    return {**found, "classes": classes}


def _check_threads(count: object) -> int:
    return check_int("threads", count, 1, MAX_THREADS)


def _parse_normalisation(found: Mapping) -> Normalisation:
    mean, std = (
        tuple(check_float(name, number, "finite numbers", -math.inf) for number in found[name])
        for name in Normalisation._fields
    )
    if not mean or len(mean) != len(std) or min(std) <= 0:
        raise ValueError("mean and std must have one number per channel, with std > 0")
    return Normalisation(mean, std)


def _parse_resizing(found: Mapping) -> tuple[tuple[int, int], str] | None:
    if not found:
        return None
    height, width = (check_int("size", side, 1) for side in found["size"])
    return (height, width), check_choice("interpolation", found["interpolation"], INTERPOLATIONS)


def _get_object(holder: Mapping, name: str, null: bool = True) -> dict:
    value = {} if holder.get(name) is None and null else holder[name]
    if not isinstance(value, dict):
        raise TypeError(f"{name} must be an object, got {describe(value)}")
    return value


def _get_text(holder: Mapping, name: str) -> str | None:
    value = holder.get(name)
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {describe(value)}")
    return value


def _replace_surrogates(name: object) -> str:
    """Return `name` without lone surrogates, which JSON can hold but UTF-8 cannot."""
    return str(name).encode(errors="replace").decode()
