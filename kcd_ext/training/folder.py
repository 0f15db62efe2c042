"""The folder of a run: what is in it, when it is written, and whether a run may go on in it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from .. import files
from ..environment import versions
from ..files import read_regular
from . import checkpoint
from .identity import check_same
from .summary import Summary, results

WEIGHTS = "student.safetensors"
SUMS = "sha256"  # in summary.json: file -> SHA-256 of its content
ENTRIES = (
    "config.json",
    "pretraining.jsonl",
    "metrics.jsonl",
    "checkpoint",
    WEIGHTS,
    "summary.json",
    "evaluation.json",  # of `kcd evaluate`: no run may begin beside that of another student
    "ranking.json",  # of its report, the same
)


class RunFolder:
    """Where a run is written.

    Raises:
        FileExistsError: one of ENTRIES is there already, and is not of this run or not to be resumed.
        ValueError: it is of another run, or damaged.
    """

    def __init__(self, path: Path, identity: dict, resume: bool):
        self.path = path
        self.identity = json.loads(json.dumps(identity))
        taken = [name for name in ENTRIES if (path / name).exists()]
        if taken and not resume:
            raise FileExistsError(
                f"output {path} holds a run already ({taken[0]}): resume it, or choose another folder"
            )
        self._found = checkpoint.load(path / "checkpoint") if resume else None
        if self._found is not None:
            self._found.check(self.identity)
            check_same(self._found.run, self.identity, path)
        elif taken:
            self._check_only_begun(taken)

    @classmethod
    @contextmanager
    def opened(cls, path: Path, identity: dict, resume: bool, writes: bool) -> Iterator["RunFolder"]:
        """The folder of a run that lasts as long as this; the process that `writes` is the only one there.

        Raises what RunFolder does, and FileExistsError while another one is.
        """
        with files.folder_lock(path) if writes else nullcontext():
            yield cls(path, identity, resume)

    @property
    def epoch(self) -> int:
        """How many epochs, of pretraining and of training, the run that is found here has behind it."""
        return 0 if self._found is None else self._found.epoch

    def take(self) -> checkpoint.Checkpoint | None:
        """The checkpoint that the run goes on from, if there is one; once, so that its memory is given back."""
        found, self._found = self._found, None
        return found

    def begin(self, label: str, about: Mapping[str, object], teacher_accuracy: float | None) -> None:
        """Before the first epoch, so that a folder that cannot be written costs nothing."""
        self.path.mkdir(parents=True, exist_ok=True)
        measured = {"teacher_accuracy": teacher_accuracy, "threads": torch.get_num_threads()}
        config = {**self.identity, **measured, "label": label, "about": dict(about), "versions": versions()}
        files.write_json(self.path / "config.json", config)

    def keep(self, pretraining: Sequence[dict], history: Sequence[dict], state: checkpoint.Checkpoint) -> None:
        """After an epoch."""
        if pretraining:
            files.write_lines(self.path / "pretraining.jsonl", pretraining)
        files.write_lines(self.path / "metrics.jsonl", history)
        checkpoint.save(self.path / "checkpoint", state)

    def finish(self, student: Mapping[str, Tensor], dataset: str, summary: Summary) -> None:
        """After the last, with the student's state_dict."""
        files.write_lines(self.path / "metrics.jsonl", summary.history)
        weights = checkpoint.tensors_as_bytes(student)
        files.write_bytes(self.path / WEIGHTS, weights)
        content = {
            **results(dataset, [summary.seed], [summary]),
            SUMS: {WEIGHTS: sha256(weights).hexdigest()},
        }
        files.write_json(self.path / "summary.json", content)

    def _check_only_begun(self, taken: Sequence[str]) -> None:
        """Without a checkpoint, what is there must be of this run, killed in its first epoch."""
        begun = {"config.json"} <= set(taken) <= {"config.json", "pretraining.jsonl", "metrics.jsonl", "checkpoint"}
        try:
            config = json.loads(read_regular(self.path / "config.json")) if begun else None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path / 'config.json'} is damaged ({error}): choose another folder") from error
        if not isinstance(config, dict) or not isinstance(config.get("recipe"), dict):
            raise FileExistsError(
                f"output {self.path} holds a {taken[0]} and no checkpoint to resume from: choose another folder"
            )
        if "checkpoint" in taken and not (self.path / "checkpoint").is_dir():
            raise FileExistsError(f"output {self.path} holds a checkpoint that is no folder: choose another folder")
        check_same(config, self.identity, self.path)
