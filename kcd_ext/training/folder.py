"""The folder of a run: what is in it, when it is written, and whether a run may go on in it."""

import json
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ..environment import versions
from . import checkpoint, storage
from .summary import Summary, results


class RunFolder:
    """Where a run is written. `found` is the checkpoint that it goes on from, if any."""

    def __init__(self, path: Path, identity: dict, resume: bool):
        self.path = path
        self.identity = json.loads(json.dumps(identity))
        if not resume and any((path / name).exists() for name in ("config.json", "checkpoint", "summary.json")):
            raise FileExistsError(f"output {path} holds a run already: resume it, or choose another folder")
        self.found = checkpoint.load(path / "checkpoint") if resume else None
        if self.found is not None:
            _check_same(self.found.run, self.identity, path)

    def begin(self) -> None:
        """Before the first epoch, so that a folder that cannot be written costs nothing."""
        self.path.mkdir(parents=True, exist_ok=True)
        storage.write_json(self.path / "config.json", {**self.identity, "versions": versions()})

    def keep(self, history: Sequence[dict], state: checkpoint.Checkpoint) -> None:
        """After an epoch."""
        storage.write_lines(self.path / "metrics.jsonl", history)
        checkpoint.save(self.path / "checkpoint", state)

    def finish(self, student: nn.Module, dataset: str, summary: Summary) -> None:
        """After the last."""
        storage.write_lines(self.path / "metrics.jsonl", summary.history)
        weights = checkpoint.tensors_as_bytes(student.state_dict())
        storage.write_bytes(self.path / "student.safetensors", weights)
        storage.write_json(self.path / "summary.json", results(dataset, [summary.seed], [summary]))


def _check_same(saved: dict, mine: dict, path: Path) -> None:
    """A run goes on only as it began; where it runs and what it is called may change."""
    free = ("device", "num_workers", "name")
    pairs = [("train", saved["train"], mine["train"]), ("test", saved["test"], mine["test"])]
    pairs += [(key, saved["recipe"].get(key), value) for key, value in mine["recipe"].items() if key not in free]
    for key, old, new in pairs:
        if old != new:
            raise ValueError(f"{path} was run with {key}={old!r}, got {key}={new!r}: a run resumes only as it began")
