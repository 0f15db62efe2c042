"""The folder of a run: what is in it, when it is written, and whether a run may resume there."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from .. import files
from ..environment import versions
from . import checkpoint
from .fingerprint import check_same
from .summary import Summary, results

WEIGHTS = "student.safetensors"
SUMS = "sha256"  # in summary.json: file -> SHA-256 of its content
BEGUN = ("config.json", "pretraining.jsonl", "metrics.jsonl", "checkpoint")  # of a run that has not ended
# The last two, of `kcd evaluate` and of the report, are of another student.
ENTRIES = (*BEGUN, WEIGHTS, "summary.json", "evaluation.json", "ranking.json")


class RunFolder:
    """Where a run is written.

    Raises:
        FileExistsError: one of ENTRIES is there already, and is not of this run or not to be resumed.
        ValueError: it is of another run, or damaged.
    """

    def __init__(self, path: Path, fingerprint: dict, resume: bool):
        self.path = path
        self.fingerprint = json.loads(json.dumps(fingerprint))
        taken = [name for name in ENTRIES if (path / name).exists()]
        if taken and not resume:
            raise FileExistsError(
                f"output {path} holds a run already ({taken[0]}): resume it, or choose another folder"
            )
        self._found = checkpoint.load(path / "checkpoint") if resume else None
        if self._found is not None:
            check_same(self._found.run, self.fingerprint, path)
        elif taken:
            self._check_only_begun(taken)

    @classmethod
    @contextmanager
    def opened(cls, path: Path, fingerprint: dict, resume: bool, writes: bool) -> Iterator["RunFolder"]:
        """Yield the folder of a run; the process that `writes` locks it until the context ends.

        Raises what RunFolder does, and FileExistsError where another process has locked it.
        """
        with files.folder_lock(path) if writes else nullcontext():
            yield cls(path, fingerprint, resume)

    @property
    def epoch(self) -> int:
        """The epochs, of pretraining and of training, after which the run that was found here resumes."""
        return 0 if self._found is None else self._found.epoch

    def pop_checkpoint(self) -> checkpoint.Checkpoint | None:
        """Return the checkpoint to resume from, or None. Clears the reference, so it can be freed."""
        found, self._found = self._found, None
        return found

    def write_config(self, label: str, about: Mapping[str, object], teacher_accuracy: float | None) -> None:
        """Write config.json before the first epoch, so that a folder that cannot be written costs nothing."""
        self.path.mkdir(parents=True, exist_ok=True)
        measured = {"teacher_accuracy": teacher_accuracy, "threads": torch.get_num_threads()}
        config = {**self.fingerprint, **measured, "label": label, "about": dict(about), "versions": versions()}
        files.write_json(self.path / "config.json", config)

    def save_epoch(self, pretraining: Sequence[dict], history: Sequence[dict], state: checkpoint.Checkpoint) -> None:
        """Write the metrics and the checkpoint after an epoch."""
        if pretraining:
            files.write_lines(self.path / "pretraining.jsonl", pretraining)
        files.write_lines(self.path / "metrics.jsonl", history)
        checkpoint.save(self.path / "checkpoint", state)

    def save_final(self, student: Mapping[str, Tensor], dataset: str, summary: Summary) -> None:
        """Write the student's state_dict and the summary after the last epoch."""
        files.write_lines(self.path / "metrics.jsonl", summary.history)
        weights = checkpoint.tensors_as_bytes(student)
        files.write_bytes(self.path / WEIGHTS, weights)
        sums = {WEIGHTS: sha256(weights).hexdigest()}
        files.write_json(self.path / "summary.json", {**results(dataset, [summary.seed], [summary]), SUMS: sums})

    def _check_only_begun(self, taken: Sequence[str]) -> None:
        """Check that a folder without a checkpoint is of this run, killed in its first epoch."""
        begun = "config.json" in taken and {*taken} <= {*BEGUN}
        config = files.read_json(self.path / "config.json") if begun else {}
        if not isinstance(config.get("recipe"), dict):
            raise FileExistsError(
                f"output {self.path} holds a {taken[0]} and no checkpoint to resume from: choose another folder"
            )
        if "checkpoint" in taken and not (self.path / "checkpoint").is_dir():
            raise FileExistsError(f"output {self.path} holds a checkpoint that is no folder: choose another folder")
        check_same(config, self.fingerprint, self.path)
