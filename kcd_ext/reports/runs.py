"""Load and validate run folders."""

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from ..checks import check_float, check_int, check_percent
from ..condensation.random_keys import MAX_SEED
from ..describe import describe
from ..environment import MOST_THREADS
from ..evaluation import Evaluation
from ..files import read_json, read_lines, read_regular
from ..training import checkpoint
from ..training.folder import SUMS, WEIGHTS
from ..training.summary import ComparedWith, Summary

RUN_GLOBS = ("seed-*/config.json", "checkpoint/seed-*/*/config.json")  # in the folder of several seeds, of a demo
EVALUATION = "evaluation.json"
TEACHER = "teacher"  # what tables call it, and the folder of one that a command has trained
OF_A_STUDENT = ("metrics.jsonl", WEIGHTS)  # files that no two students have the same of
OPTIONAL = {"flops": None, "condensation_seconds": 0.0}  # entries of a metrics line that older versions lack


class Normalisation(NamedTuple):
    """Networks take (pixels / 255 - mean) / std, a number each for every channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class RunMetadata:
    """What config.json says of a run. Its networks and data have not been tried."""

    config: Mapping[str, object]  # all of it
    label: str
    seed: int
    epochs: int  # that the recipe asks for
    threads: int | None  # that the run was last started with; None, as below: the file does not say
    planned_threads: Mapping[str, int]  # of all runs of its command, by label, in their order
    student: str | None  # the network
    data: Mapping[str, object]  # what `kcd_ext.data.images.load` takes
    teacher: str | None  # the digest of the teacher's weights; None: there was no teacher
    teacher_network: str | None
    teacher_path: str | None  # where its weights were read; None: beside the run
    teacher_normalisation: Normalisation | None  # of the images that it was given
    teacher_run: Mapping[str, str]  # the `fingerprint` of its own run on these images; empty: there is none
    teacher_accuracy: float | None  # as measured before training, percent
    page: Mapping[str, object]  # what reports show as it is: title, command, options, normalisation, class_names

    @property
    def normalisation(self) -> Normalisation | None:
        """That of the images which the network was trained on; None: the file does not say."""
        return None if self.data.get("mean") is None else Normalisation(self.data["mean"], self.data["std"])

    @classmethod
    def from_config(cls, config: dict) -> "RunMetadata":
        """Return what the content of a config.json says. Raises KeyError, TypeError or ValueError where it is damaged."""
        recipe, about = _object(config, "recipe") or config["recipe"], _object(config, "about")
        data, given = _object(about, "data"), _object(about, "teacher_normalisation")
        for name in ("condense", "options"):
            _object(recipe, name)
        if data.get("mean") is not None:
            data = {**data, **_normalisation(data)._asdict()}
        network, path = _text(about, "teacher_network"), _text(about, "teacher_path")
        if network is None:  # a run of before there were these two
            network, _, path = (_text(about, "teacher") or "").partition(" of ")
        accuracy, threads, page = config.get("teacher_accuracy"), config.get("threads"), _object(about, "page")
        if not all(isinstance(name, str) for name in [page.get("title", ""), *page.get("class_names", ())]):
            raise TypeError("title and class_names must be text")
        return cls(
            config=config,
            label=_readable(config.get("label") or recipe.get("name") or recipe["method"]),
            seed=check_int("seed", recipe["seed"], 0, MAX_SEED),
            epochs=check_int("epochs", recipe["epochs"], 1),
            threads=None if threads is None else _threads(threads),
            planned_threads={name: _threads(count) for name, count in _object(about, "threads").items()},
            student=_text(about, "student"),
            data=data,
            teacher=_text(config, "teacher"),
            teacher_network=network or None,
            teacher_path=path or None,
            teacher_normalisation=_normalisation(given) if given else None,
            teacher_run=_object(about, "teacher_run"),
            teacher_accuracy=None if accuracy is None else check_percent("teacher_accuracy", accuracy),
            page=page,
        )


@dataclass(frozen=True)
class Run:
    """A run, finished or not."""

    folder: Path
    metadata: RunMetadata
    summary: Summary | None
    """Up to the last epoch that ended; None: the first has not."""

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.metadata.label if self.summary is None else self.summary.method

    @property
    def unfinished(self) -> str:
        """How far it is; empty once it is finished."""
        done, epochs = 0 if self.summary is None else len(self.summary.history), self.metadata.epochs
        return f"{self.folder}: {done} of {epochs} epochs" if done < epochs else ""


def runs_by_report(path: Path) -> dict[Path, list[Path]]:
    """Return the folders of the runs in `path` by the folder that has their report.

    These are the run in `path` itself, those of its seeds or those of a demo, whose report is in `path`; else all such in the
    folders in it, which have a report each.

    Raises ValueError where there is none.
    """
    found = {path: _runs_of(path, strict=True)}
    if not found[path] and path.is_dir():
        found = {folder: _runs_of(folder) for folder in sorted(path.iterdir(), key=_natural)}
    found = {home: folders for home, folders in found.items() if folders}
    if not found:
        raise ValueError(f"{path} is no folder of a run, of several seeds or of a demo, nor of such folders")
    return found


def find(path: Path) -> list[Path]:
    """Return the folders of the runs in `path`. Raises as `runs_by_report` does."""
    return [folder for folders in runs_by_report(path).values() for folder in folders]


def report_dirs(folder: Path) -> list[Path]:
    """Return the folders whose report shows a run: its own, that of its seeds, that of its demo."""
    homes = [Path(os.path.normpath(folder / up)) for up in ("", "..", "../../..")]
    return [home for home in homes if folder.resolve() in [run.resolve() for run in _runs_of(home)]]


def read(folder: Path) -> Run:
    """Return the run in a folder, without what `kcd evaluate` has left there (`with_evaluation`).

    Raises:
        ValueError: a file is damaged; says which.
        OSError: a file cannot be read.
    """
    metadata, results, metrics = metadata_of(folder), folder / "summary.json", folder / "metrics.jsonl"
    method = read_json(results, _method) if results.exists() else metadata.label
    lines = read_lines(metrics, _epoch) if metrics.exists() else []
    if [line["epoch"] for line in lines] != list(range(1, len(lines) + 1)) or len(lines) > metadata.epochs:
        raise ValueError(f"{metrics} is damaged: its lines are not those of epochs 1, 2, ... up to {metadata.epochs}")
    if len({len(step["classes"]) for line in lines if (step := line["condensation"]) and step["classes"]}) > 1:
        raise ValueError(f"{metrics} is damaged: classes must be as many in every line")
    if not lines:
        return Run(folder, metadata, None)
    summary = Summary(
        method=method,
        seed=metadata.seed,
        accuracy_last=lines[-1]["accuracy"],
        accuracy_best=max(line["accuracy"] for line in lines),
        **{name: lines[-1][name] for name in ("sample_visits", "teacher_visits", "seconds", *OPTIONAL)},
        teacher_accuracy=metadata.teacher_accuracy,
        history=lines,
    )
    return Run(folder, metadata, summary)


def metadata_of(folder: Path) -> RunMetadata:
    """Return what config.json says. Raises ValueError where it is damaged, OSError where it cannot be read."""
    return read_json(folder / "config.json", RunMetadata.from_config)


def metadata_if_begun(folder: Path) -> RunMetadata | None:
    """Return what config.json says; None where there is none. Raises as `metadata_of` does."""
    return metadata_of(folder) if (folder / "config.json").exists() else None


def with_evaluation(run: Run) -> Summary:
    """Return the summary of a run with what `kcd evaluate` has left there, if anything.

    Raises ValueError where that file is damaged, or of another student; OSError where a file cannot be read.
    """
    path = run.folder / EVALUATION
    if not path.exists():
        return run.summary

    def parse(content: dict) -> tuple[Evaluation, ComparedWith, dict]:
        teacher = [_text(content, name) for name in ("teacher_network", "teacher_path", "teacher")]
        if None in teacher:
            raise ValueError("it does not say which teacher the student was compared with")
        own = run.metadata.teacher == teacher[-1]
        compared_with = ComparedWith(*map(_readable, teacher), own)
        return Evaluation.from_json(content["evaluation"]), compared_with, _object(content, "run")

    evaluation, compared_with, of = read_json(path, parse)
    check_fingerprint(path, of, fingerprint(run.folder))
    return replace(run.summary, evaluation=evaluation, compared_with=compared_with)


def fingerprint(folder: Path, names: Sequence[str] = OF_A_STUDENT) -> dict[str, str]:
    """Return what tells the student in a folder from all others: file -> 16 hexadecimal digits, of the files that exist."""
    files = {name: folder / name for name in names}
    return {name: sha256(read_regular(path)).hexdigest()[:16] for name, path in files.items() if path.exists()}


def check_fingerprint(path: Path, recorded: Mapping[str, object], actual: Mapping[str, str]) -> None:
    """Raise ValueError where the file at `path` was made of another student than the one beside it."""
    for name, digest in actual.items():
        if recorded.get(name) != digest:
            raise ValueError(
                f"{path} is of another student: {name} is not the one that it was made of, or is damaged; remove "
                f"{path.name}, and run the command that makes it again"
            )


def teacher_dirs(folder: Path, path: str | None) -> list[Path]:
    """Return where the teacher of the run in `folder` may be: beside it, or at the `path` that its config.json names."""
    beside = [folder / TEACHER, folder.resolve().parent / TEACHER]
    return beside if path is None else [*beside, Path(path)]


def teacher_of(run: Run) -> Run | None:
    """Return the run that trained the teacher of `run` on the same images; None where it is not to be found.

    Its accuracy is the one that was measured when it taught.
    """
    recorded = run.metadata.teacher_run
    for place in teacher_dirs(run.folder, run.metadata.teacher_path) if recorded else []:
        same = False
        with suppress(OSError, ValueError):  # of a place that cannot be read
            same = fingerprint(place) == recorded
        if same and (found := read(place)).summary is not None:
            measured = run.metadata.teacher_accuracy
            accuracy = found.summary.accuracy_last if measured is None else measured
            return replace(found, summary=replace(found.summary, method=TEACHER, accuracy_last=accuracy))
    return None


def check_weights(folder: Path) -> None:
    """Check that the student of a finished run is the one that the run wrote, by the SHA-256 in its summary.json.

    Of a folder whose summary.json holds none, as another program's, nothing is said.

    Raises:
        ValueError: it is another one, or summary.json is damaged.
        OSError: a file cannot be read.
    """
    path = folder / "summary.json"
    sums = read_json(path, lambda content: _object({SUMS: {}, **content}, SUMS, null=False)) if path.exists() else {}
    if WEIGHTS in sums and sha256(read_regular(folder / WEIGHTS)).hexdigest() != sums[WEIGHTS]:
        raise ValueError(f"{folder / WEIGHTS} is not as the run wrote it: its SHA-256 is not that in {path.name}")


def threads_of(folder: Path) -> int | None:
    """Return the threads of torch by which the last epoch of the run in a folder was computed; None where no file says it.

    Of a run without a checkpoint they are those it was last started with. Raises ValueError where config.json is damaged.
    """
    begun = metadata_if_begun(folder)
    found = checkpoint.facts_of(folder / "checkpoint")
    try:
        return _threads(found["threads"]) if "threads" in found else begun and begun.threads
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'checkpoint'} is damaged: {error}") from error


# --- the content of files ---------------------------------------------------------------------------------------------


def _runs_of(folder: Path, strict: bool = False) -> list[Path]:
    """Return the runs whose report is in `folder`. Unless `strict`, damaged files are of others."""

    def is_run(config: Path) -> bool:
        with nullcontext() if strict else suppress(ValueError):
            return config.is_file() and isinstance(read_json(config).get("recipe"), dict)
        return False

    if is_run(folder / "config.json"):
        return [folder]
    return sorted((c.parent for glob in RUN_GLOBS for c in folder.glob(glob) if is_run(c)), key=_natural)


def _natural(folder: Path) -> list[tuple[int, str]]:
    """Order seed-9 before seed-10."""
    return [(len(part), part) for part in folder.parts]


def _method(content: dict) -> str:
    return _readable(content["results"][0]["method"])


def _epoch(line: dict) -> dict:
    """Return a line of metrics.jsonl, with every number that a report draws."""
    line = {**OPTIONAL, **line}
    check_int("epoch", line["epoch"], 1)
    check_percent("accuracy", line["accuracy"])
    for name in ("sample_visits", "teacher_visits"):
        check_int(name, line[name], 0)
    for name in ("seconds", "condensation_seconds"):
        check_float(name, line[name], "a number >= 0", 0)
    if line["flops"] is not None:
        check_float("flops", line["flops"], "a number >= 0", 0)
    return {**line, "condensation": None if line.get("condensation") is None else _step(line["condensation"])}


def _step(found: dict) -> dict:
    """Return what an epoch's line says of its E-step; "values" are None where samples are not ranked by value."""
    for name in ("stage", "kept", "mixed"):
        check_int(name, found[name], 0)
    classes = found.get("classes")  # None: of an older version, or not known
    if classes is not None:
        classes = [check_int("classes", count, 0) for count in classes]
    if (values := found["values"]) is not None:
        low, high = (check_float(name, values[name], "a finite number", -math.inf) for name in ("low", "high"))
        if not low <= high or not [check_int("counts", count, 0) for count in values["counts"]]:
            raise ValueError("the values of its condensation are no histogram")
    return {**found, "classes": classes}


def _threads(count: object) -> int:
    return check_int("threads", count, 1, MOST_THREADS)


def _normalisation(found: Mapping) -> Normalisation:
    mean, std = (
        tuple(check_float(name, number, "finite numbers", -math.inf) for number in found[name])
        for name in Normalisation._fields
    )
    if not mean or len(mean) != len(std) or min(std) <= 0:
        raise ValueError("mean and std must be a number each for every channel, std > 0")
    return Normalisation(mean, std)


def _object(holder: Mapping, name: str, null: bool = True) -> dict:
    value = {} if holder.get(name) is None and null else holder[name]
    if not isinstance(value, dict):
        raise TypeError(f"{name} must be an object, got {describe(value)}")
    return value


def _text(holder: Mapping, name: str) -> str | None:
    value = holder.get(name)
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be text, got {describe(value)}")
    return value


def _readable(name: object) -> str:
    """Return `name` without lone surrogates, which JSON may hold and no file can."""
    return str(name).encode(errors="replace").decode()
