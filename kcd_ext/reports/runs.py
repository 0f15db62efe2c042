"""Reads what runs have left: JSON alone, and nothing in it is believed before it was looked at."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from ..describe import describe
from ..environment import MOST_THREADS
from ..evaluation import Evaluation
from ..files import read_regular
from ..training import checkpoint
from ..training.folder import SUMS, WEIGHTS
from ..training.summary import ComparedWith, Summary

# In the folder of several seeds, and in that of a demo.
PLACES = ("seed-*/config.json", "checkpoint/seed-*/*/config.json")
# In a folder that holds such folders.
FURTHER = ("*/config.json", *(f"*/{place}" for place in PLACES))
EVALUATION = "evaluation.json"
TEACHER = ("teacher_network", "teacher_path", "teacher")  # what it says of the teacher
OF_A_STUDENT = ("metrics.jsonl", WEIGHTS)  # files that no two students have the same of
COUNTS = ("sample_visits", "teacher_visits")
NUMBERS = ("accuracy", "seconds")
MAY_LACK = {"flops": None, "condensation_seconds": 0.0}  # of every number: what takes its place


class Normalisation(NamedTuple):
    """Networks take (pixels / 255 - mean) / std, a number each for every channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """A run, finished or not."""

    folder: Path
    config: Mapping[str, object]
    """Its config.json: the recipe, facts about data and networks, versions."""
    epochs: int
    """That the recipe asks for."""
    summary: Summary | None
    """Up to the last epoch that ended; None: the first has not."""

    @property
    def label(self) -> str:
        """What tables call it."""
        recipe = self.config["recipe"]
        name = self.config.get("label") or recipe.get("name") or recipe.get("method")
        return self.summary.method if self.summary is not None else _readable(name)

    @property
    def seed(self) -> int:
        """Of the recipe."""
        return self.config["recipe"]["seed"]

    @property
    def unfinished(self) -> str:
        """How far it is; empty once it is finished."""
        done = len(self.summary.history) if self.summary is not None else 0
        return f"{self.folder}: {done} of {self.epochs} epochs" if done < self.epochs else ""


def find(path: Path) -> list[Path]:
    """The folders of the runs in `path`: itself, those of its seeds, those of a demo, or all in a folder of such.

    Raises ValueError where there is none.
    """
    if _is_run(path / "config.json"):
        return [path]
    found = [config.parent for place in PLACES for config in path.glob(place) if _is_run(config)]
    if not found:
        found = [config.parent for place in FURTHER for config in path.glob(place) if _may_be_run(config)]
    if not found:
        raise ValueError(f"{path} is no folder of a run, of several seeds or of a demo, nor of such folders")
    return sorted(found, key=lambda folder: [(len(part), part) for part in folder.parts])  # seed-9 before seed-10


def pages(path: Path) -> dict[Path, list[Path]]:
    """The runs that `find` finds, by the folder that has their page: `path`, or the folders in it that have pages each.

    Raises as `find` does.
    """
    found: dict[Path, list[Path]] = {}
    own = _is_run(path / "config.json") or any(_is_run(config) for place in PLACES for config in path.glob(place))
    for folder in find(path):
        found.setdefault(path if own else path / folder.relative_to(path).parts[0], []).append(folder)
    return found


def homes(folder: Path) -> list[Path]:
    """The folders whose page shows a run: its own, that of its seeds, that of its demo."""
    found = [folder]
    for place in PLACES:
        steps = place.count("/")
        if (folder.resolve() / "config.json").match(place):
            plain = folder if len(folder.parts) >= steps and ".." not in folder.parts else folder.resolve()
            found.append(plain.parents[steps - 1])
    return [home for home in found if folder.resolve() in [held.resolve() for held in find(home)]]


def read(folder: Path) -> Run:
    """The run in a folder, without what `kcd evaluate` has left there (`evaluated`).

    Raises:
        ValueError: a file is damaged or holds something else; says which.
        OSError: a file cannot be read.
    """
    config = config_of(folder)
    recipe = config["recipe"]
    lines = _history(folder / "metrics.jsonl")
    run = Run(folder, config, _number(folder / "config.json", recipe, "epochs", int), None)
    seed = _number(folder / "config.json", recipe, "seed", int)
    method = _label(folder / "summary.json") or run.label
    if len(lines) > run.epochs:
        raise ValueError(f"{folder / 'metrics.jsonl'} is damaged: {len(lines)} epochs of {run.epochs}")
    accuracy = _teacher_accuracy(folder / "config.json", config)
    return Run(folder, config, run.epochs, _summary(method, seed, lines, accuracy) if lines else None)


def content_of(path: Path) -> dict:
    """Return the object in a JSON file. Raises ValueError where it holds anything else, OSError where it cannot be read."""
    return _object(path, _content(path))


def config_of(folder: Path) -> dict:
    """Its config.json. Raises ValueError where that is damaged, or not of a run; OSError where it cannot be read."""
    path = folder / "config.json"
    config = content_of(path)
    recipe, about = config.get("recipe"), config.get("about") or {}
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} is not that of a run: it has no recipe")
    for name, part in {
        "about": about,
        "data": about.get("data") if isinstance(about, dict) else None,
        "condense": recipe.get("condense"),
        "options": recipe.get("options"),
    }.items():
        if not isinstance(part or {}, dict):
            raise ValueError(f"{path} is damaged: {name} must be an object, got {describe(part)}")
    return config


def evaluated(summary: Summary, folder: Path) -> Summary:
    """The summary of the run in a folder with what `kcd evaluate` has left there, if anything.

    Raises ValueError where that file is damaged, or of another student; OSError where a file cannot be read.
    """
    path = folder / EVALUATION
    if not path.exists():
        return summary
    found = content_of(path)
    try:
        evaluation = Evaluation.from_json(found.get("evaluation"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    for name, of in {**dict.fromkeys(TEACHER, found), **dict.fromkeys(OF_A_STUDENT, found.get("run"))}.items():
        if not isinstance(of, dict) or not isinstance(of.get(name), str):
            raise ValueError(
                f"{path} is damaged: {name} must be text, got {of.get(name) if isinstance(of, dict) else of!r:.40}"
            )
    for name, has in student_of(folder).items():
        if found["run"][name] != has:
            raise ValueError(
                f"{path} is of another student: {name} is not the one that was evaluated; remove it, or kcd evaluate makes it anew"
            )
    network, origin, weights = (_readable(found[name]) for name in TEACHER)
    own = config_of(folder).get("teacher") == weights
    return replace(summary, evaluation=evaluation, compared_with=ComparedWith(network, origin, weights, own))


def student_of(folder: Path) -> dict[str, str]:
    """What tells the student in a folder from all others: file -> 16 hexadecimal digits, of the files that there are."""
    files = {name: folder / name for name in OF_A_STUDENT}
    return {name: sha256(_content(path)).hexdigest()[:16] for name, path in files.items() if path.exists()}


def check_weights(folder: Path) -> None:
    """Check that the student of a finished run is the one that the run wrote, by the SHA-256 in its summary.json.

    Of a folder whose summary.json holds none, as another program's, nothing is said.

    Raises:
        ValueError: it is another one, or summary.json is damaged.
        OSError: a file cannot be read.
    """
    path = folder / "summary.json"
    sums = content_of(path).get(SUMS, {}) if path.exists() else {}
    if not isinstance(sums, dict):
        raise ValueError(f"{path} is damaged: {SUMS} must be an object, got {type(sums).__name__}")
    if WEIGHTS in sums and sha256(_content(folder / WEIGHTS)).hexdigest() != sums[WEIGHTS]:
        raise ValueError(f"{folder / WEIGHTS} is not as the run wrote it: its SHA-256 is not that in {path.name}")


def network_of(folder: Path) -> str:
    """The network that was trained in a run's folder. Raises ValueError where its config.json does not say."""
    about = config_of(folder).get("about")
    network = about.get("student") if isinstance(about, Mapping) else None
    if not isinstance(network, str):
        raise ValueError(f"{folder / 'config.json'} does not say which network was trained: give teacher_network")
    return network


def threads_of(folder: Path) -> int | None:
    """Return the threads of torch's by which the last epoch of the run in a folder was computed; None where no file says it.

    Of a run without a checkpoint they are those it was last started with. Raises ValueError where config.json is damaged.
    """
    path = folder / "config.json"
    config = config_of(folder) if path.exists() else {}
    started = None if config.get("threads") is None else _threads(path, config, "threads")
    found = checkpoint.facts_of(folder / "checkpoint")
    return _threads(folder / "checkpoint", found, "threads") if "threads" in found else started


def planned_threads(folder: Path) -> dict[str, int]:
    """Return the threads that the command which has begun the run in a folder has chosen for all its runs, by label.

    It is empty where config.json does not say. Raises ValueError where that file is damaged.
    """
    path = folder / "config.json"
    planned = (config_of(folder).get("about") or {}).get("threads") if path.exists() else None
    if not isinstance(planned or {}, dict):
        raise ValueError(f"{path} is damaged: threads must be an object, got {describe(planned)}")
    return {label: _threads(path, planned, label) for label in planned or {}}


def _threads(path: Path, holder: Mapping, name: str) -> int:
    threads = _number(path, holder, name, int)
    if not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"{path} is damaged: {name} must be in [1, {MOST_THREADS}], got {threads}")
    return threads


def normalisation_of(folder: Path) -> Normalisation | None:
    """That of the images which a run's folder says it was trained on; None where it does not say.

    Raises ValueError where its config.json is damaged.
    """
    path = folder / "config.json"
    if not path.exists():
        return None
    data = (config_of(folder).get("about") or {}).get("data") or {}
    return None if data.get("mean") is None else checked_normalisation(path, data)


def checked_normalisation(path: Path, found: object) -> Normalisation:
    """What a config.json says of one. Raises ValueError, naming the file, where that is none."""
    holder = found if isinstance(found, dict) else {}
    for name in Normalisation._fields:
        numbers = holder.get(name)
        if not isinstance(numbers, list) or not numbers or len(numbers) != len(holder["mean"]):
            raise ValueError(f"{path} is damaged: {name} must be a list of numbers, got {numbers!r:.40}")
    each = ([_number(path, {name: x}, name, float) for x in holder[name]] for name in Normalisation._fields)
    found = Normalisation(*map(tuple, each))
    if min(found.std) <= 0:
        raise ValueError(f"{path} is damaged: std must be numbers > 0, got {min(found.std)}")
    return found


def _teacher_accuracy(path: Path, config: Mapping[str, object]) -> float | None:
    """In percent; None where there was no teacher, or it was not measured."""
    found = config.get("teacher_accuracy")
    if found is not None and not 0 <= _number(path, config, "teacher_accuracy", float) <= 100:
        raise ValueError(f"{path} is damaged: teacher_accuracy must lie in [0, 100], got {found}")
    return found


def _summary(method: str, seed: int, lines: list[dict], teacher_accuracy: float | None) -> Summary:
    accuracies, last = [line["accuracy"] for line in lines], lines[-1]
    return Summary(
        method=method,
        seed=seed,
        accuracy_last=accuracies[-1],
        accuracy_best=max(accuracies),
        **{name: last[name] for name in (*COUNTS, "seconds", *MAY_LACK)},
        teacher_accuracy=teacher_accuracy,
        history=lines,
    )


def _is_run(config: Path) -> bool:
    return config.is_file() and isinstance(_object(config, config.read_bytes()).get("recipe"), dict)


def _may_be_run(config: Path) -> bool:
    """Where files of others are to be expected."""
    try:
        return _is_run(config)
    except ValueError:
        return False


def _label(path: Path) -> str:
    """What a finished run is called."""
    if not path.exists():
        return ""
    results = content_of(path).get("results")
    try:
        return _readable(results[0]["method"])
    except (TypeError, LookupError) as error:
        raise ValueError(f"{path} is damaged: it has no result") from error


def _history(path: Path) -> list[dict]:
    """The lines of metrics.jsonl, with every number that a report draws. No file: no epoch has ended."""
    if not path.exists():
        return []
    lines = []
    for epoch, text in enumerate(_content(path).splitlines(), 1):
        line = _object(path, text)
        if line.get("epoch") != epoch:
            raise ValueError(f"{path} is damaged: line {epoch} is not of epoch {epoch}")
        numbers = {name: _number(path, line, name, int) for name in COUNTS}
        numbers |= {name: _number(path, line, name, float) for name in NUMBERS}
        for name, replacement in MAY_LACK.items():
            numbers[name] = replacement if line.get(name) is None else _number(path, line, name, float)
        lines.append({**line, **numbers, "condensation": _condensation(path, line.get("condensation"))})
    steps = [line["condensation"]["classes"] for line in lines if line["condensation"] is not None]
    if len({len(classes) for classes in steps if classes is not None}) > 1:
        raise ValueError(f"{path} is damaged: classes must be as many in every line")
    return lines


def _condensation(path: Path, found: object) -> dict | None:
    """What an epoch's end says of its E-step: sizes, and the histogram of the values.

    Its "values" are None where samples are selected by something else than the knowledge value.
    """
    if found is None:
        return None
    if not isinstance(found, dict) or "values" not in found:
        raise ValueError(f"{path} is damaged: condensation without a histogram of values")
    sizes = {name: _number(path, found, name, int) for name in ("stage", "kept", "mixed")}
    classes = found.get("classes")  # None: of an older version, or not known
    if classes is not None and not (isinstance(classes, list) and all(map(_is_count, classes))):
        raise ValueError(f"{path} is damaged: classes must be counts, got {classes!r:.60}")
    return {**found, **sizes, "classes": classes, "values": _histogram(path, found["values"])}


def _histogram(path: Path, found: object) -> dict | None:
    if found is None:
        return None
    counts = found.get("counts") if isinstance(found, dict) else None
    if not isinstance(counts, list) or not counts or not all(_is_count(count) for count in counts):
        raise ValueError(f"{path} is damaged: condensation without a histogram of values")
    return {**{name: _number(path, found, name, float) for name in ("low", "high")}, "counts": counts}


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _number(path: Path, holder: Mapping, name: str, kind: type) -> int | float:
    value = holder.get(name)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise ValueError(f"{path} is damaged: {name} must be a number, got {describe(value)}")
    if not abs(value) <= sys.float_info.max:  # NaN, infinity, or an integer that no float holds
        raise ValueError(f"{path} is damaged: {name} must be a finite number")
    return value


def _content(path: Path) -> bytes:
    if path.is_dir():
        raise ValueError(f"{path} is no file")
    return read_regular(path)


def _readable(name: object) -> str:
    """Without halves of characters, which JSON may hold and nobody can write."""
    return str(name).encode(errors="replace").decode()


def _object(path: Path, text: bytes) -> dict:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(found).__name__}, not an object")
    return found
