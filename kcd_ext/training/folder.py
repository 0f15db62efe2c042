"""Run folders: what a run writes and when, and whether it may resume there."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from .. import files
from ..environment import versions
from ..students import MODEL, SUMMARY, SUMS, WEIGHTS
from . import checkpoint
from .fingerprint import SAMPLES, check_same_run
from .summary import Summary, results

UNFINISHED_ENTRIES = ("config.json", "pretraining.jsonl", "metrics.jsonl", "checkpoint")
# The commands write the last three. A new run must not inherit them.
ENTRIES = (*UNFINISHED_ENTRIES, WEIGHTS, SUMMARY, MODEL, "evaluation.json", "ranking.json")


def recorded_samples(path: Path) -> dict[str, str]:
    """Return the digests of data that the config.json in a run folder has; {} if there is none that can be read."""
    with suppress(OSError, ValueError):
        config = files.read_json(path / "config.json")
        return {name: value for name, value in config.items() if name in SAMPLES and isinstance(value, str)}
    return {}


class RunFolder:
    """The folder of a run.

    Args:
        path: The folder. It need not exist.
        fingerprint: The run's fingerprint.
        resume: Whether the run may resume from a checkpoint in the folder.

    Raises:
        FileExistsError: The folder has one of ENTRIES, and `resume` is False or no run can resume from it.
        ValueError: The folder holds another run, or a damaged checkpoint.
    """

    def __init__(self, path: Path, fingerprint: dict, resume: bool):
        self.path = path
        self.fingerprint = json.loads(json.dumps(fingerprint))
        existing = [name for name in ENTRIES if (path / name).exists()]
        if existing and not resume:
            raise FileExistsError(
                f"output {path} already holds a run ({existing[0]}): resume it, or choose another folder"
            )
        self._found = checkpoint.load(path / "checkpoint") if resume else None
        if self._found is not None:
            check_same_run(self._found.run, self.fingerprint, path)
        elif existing:
            self._check_unfinished(existing)

    @classmethod
    @contextmanager
    def locked(cls, path: Path, fingerprint: dict, resume: bool, writes: bool) -> Iterator["RunFolder"]:
        """Yield the folder of a run. The process that `writes` locks it until the context ends.

        Raises:
            FileExistsError: As `RunFolder`, or another process has locked the folder.
            ValueError: As `RunFolder`.
        """
        with files.folder_lock(path) if writes else nullcontext():
            yield cls(path, fingerprint, resume)

    @property
    def epoch(self) -> int:
        """The number of finished epochs, pretraining included, of the run to resume; 0 for a new run."""
        return 0 if self._found is None else self._found.epoch

    def pop_checkpoint(self) -> checkpoint.Checkpoint | None:
        """Return the checkpoint to resume from, or None. Clears the reference, so it can be freed."""
        found, self._found = self._found, None
        return found

    def write_config(self, label: str, about: Mapping[str, object], teacher_accuracy: float | None) -> None:
        """Write config.json. Called before the first epoch, so that an unwritable folder fails at once."""
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
        files.write_json(self.path / SUMMARY, {**results(dataset, [summary.seed], [summary]), SUMS: sums})

    def _check_unfinished(self, existing: Sequence[str]) -> None:
        """Check that a folder without a checkpoint is of this run, killed in its first epoch."""
        unfinished = "config.json" in existing and {*existing} <= {*UNFINISHED_ENTRIES}
        config = files.read_json(self.path / "config.json") if unfinished else {}
        if not isinstance(config.get("recipe"), dict):
            raise FileExistsError(
                f"output {self.path} holds {existing[0]} but no checkpoint to resume from: choose another folder"
            )
        if "checkpoint" in existing and not (self.path / "checkpoint").is_dir():
            raise FileExistsError(f"output {self.path} holds a checkpoint that is not a folder: choose another folder")
        check_same_run(config, self.fingerprint, self.path)
