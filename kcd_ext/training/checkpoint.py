"""A run on disk after an epoch: all that the next epoch needs, in formats that execute nothing when they are read."""

import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..files import json_bytes, read_regular, remove, write_bytes
from ..registry import one_line
from .metrics import check_history, check_pretraining

FORMAT = 2  # of what is in a checkpoint; one more whenever that changes
FILES = ("model.safetensors", "training.pt", "run.json")
SUMS = "sha256sums"  # of FILES, as `sha256sum --check` reads them
TRAINING = ("optimizer", "scaler", "condenser", "trained")  # entries of training.pt
_FOLDER = re.compile(r"epoch-(\d+)")


@dataclass
class Checkpoint:
    """The state of a run after `epoch` epochs."""

    epoch: int
    model: Mapping[str, Tensor]  # state_dict of the student and of the method's own parts
    training: Mapping[str, object]  # state_dicts of optimizer and condenser: tensors, numbers, strings, containers
    run: Mapping[str, object]  # JSON: the recipe and what the run is made on, compared before it goes on
    source: Path | None = None  # the folder it was read from

    def damage(self, file: str, what: object) -> ValueError:
        """Return the error that says, in one line, what is wrong with an entry of one of its files."""
        return _damage(self.source, f"{file}: {what}")

    def check(self, facts: Iterable[str] = ()) -> None:
        """Check all that can be checked without the networks; `facts` are further entries that run.json must have.

        Raises ValueError, naming file and entry, where an entry is missing or is not what a run writes.
        """
        for name in TRAINING:
            if name not in self.training:
                raise self.damage("training.pt", f"it has no {name!r}")
        for name in ("optimizer", "scaler", "condenser"):
            if not isinstance(self.training[name], Mapping):
                raise self.damage(
                    "training.pt", f"{name} must be a dictionary, got {type(self.training[name]).__name__}"
                )
        trained = self.training["trained"]
        if not isinstance(trained, list) or not all(isinstance(name, str) for name in trained):
            raise self.damage("training.pt", "trained must be a list of names")
        run = self.run
        try:
            for name in ("recipe", "history", "pretraining", "threads", "teacher_accuracy", *facts):
                if name not in run:
                    raise ValueError(f"it has no {name!r}")
            if not isinstance(run["recipe"], dict):
                raise ValueError(f"recipe must be an object, got {type(run['recipe']).__name__}")
            if type(run["threads"]) is not int or run["threads"] < 1:
                raise ValueError(f"threads must be a whole number > 0, got {run['threads']!r:.60}")
            accuracy = run["teacher_accuracy"]
            if accuracy is not None and not (type(accuracy) in (int, float) and 0 <= accuracy <= 100):
                raise ValueError(f"teacher_accuracy must be a percentage or null, got {accuracy!r:.60}")
            check_history(run["history"])
            check_pretraining(run["pretraining"])
            if (done := len(run["history"]) + len(run["pretraining"])) != self.epoch:
                raise ValueError(f"it has the lines of {done} epochs, the folder is of epoch {self.epoch}")
        except ValueError as error:
            raise self.damage("run.json", error) from error

    def momenta(self, parameters: Sequence[Tensor]) -> dict[int, Tensor]:
        """Return the optimizer's momentum buffers by position; a parameter that had no gradient yet has none.

        Raises ValueError, naming the entry, where they are not those of such parameters.
        """
        state = self.training["optimizer"].get("state")
        if not isinstance(state, Mapping):
            raise self.damage("training.pt", "optimizer has no state")
        buffers = {}
        for position in dict.fromkeys([*range(len(parameters)), *state]):
            name = f"optimizer.state[{position!r:.40}]"
            if type(position) is not int or not 0 <= position < len(parameters):
                raise self.damage("training.pt", f"{name} is of none of the {len(parameters)} parameters")
            entries, own = state.get(position), parameters[position]
            if not isinstance(entries, Mapping) or entries.keys() != {"momentum_buffer"}:
                raise self.damage("training.pt", f"{name} must hold momentum_buffer alone")
            buffer = entries["momentum_buffer"]
            if buffer is None:
                continue
            if not is_like(buffer, own):
                takes = f"{own.dtype} of shape {tuple(own.shape)}"
                raise self.damage("training.pt", f"{name}.momentum_buffer must be {takes}, got {described(buffer)}")
            buffers[position] = buffer
        return buffers


def save(directory: Path, checkpoint: Checkpoint) -> None:
    """Writes `directory/epoch-NNNN`, then removes the older ones.

    The folder is filled under another name and renamed: a kill at any moment leaves the newest whole one in place.

    Raises:
        OSError: it cannot be written; the older checkpoint is intact.
    """
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"epoch-{checkpoint.epoch:04d}"
    beside = directory / f".{final.name}.partial"
    remove(beside)
    try:
        beside.mkdir()
        training = io.BytesIO()
        torch.save(dict(checkpoint.training), training)
        run = json_bytes({"format": FORMAT, **checkpoint.run})
        sums = ""
        for name, content in zip(FILES, (tensors_as_bytes(checkpoint.model), training.getvalue(), run), strict=True):
            write_bytes(beside / name, content)
            sums += _sum(name, content)
        write_bytes(beside / SUMS, sums.encode())
        remove(final)
        os.rename(beside, final)
    except BaseException:
        remove(beside)
        raise
    for epoch, folder in _folders(directory).items():
        if epoch != checkpoint.epoch:
            remove(folder)


def load(directory: Path) -> Checkpoint | None:
    """The newest checkpoint, its tensors on the CPU; None where there is none.

    Raises:
        ValueError: a file is missing, is not as it was written or cannot be read, or another version of the package
            has written it.
    """
    folders = _folders(directory)
    if not folders:
        return None
    epoch = max(folders)
    folder = folders[epoch]
    try:
        content = _verified(folder)
        run = _run_in(content["run.json"])
        if (written := run.pop("format", None)) == FORMAT:
            training = torch.load(io.BytesIO(content["training.pt"]), map_location="cpu", weights_only=True)
            if not isinstance(training, dict):
                raise ValueError(f"training.pt must hold a dictionary, got {type(training).__name__}")
            return Checkpoint(epoch, safetensors.torch.load(content["model.safetensors"]), training, run, folder)
    except _OtherVersionError as other:
        written = other.args[0]
    except Exception as error:  # each of the three formats has exceptions of its own
        raise _damage(folder, one_line(error)) from error
    raise ValueError(
        f"checkpoint {folder} is of another version of kcd_ext (format {written}, this one reads {FORMAT}): go on with that version"
    )


def facts_of(directory: Path) -> Mapping[str, object]:
    """Return what run.json of the last checkpoint says, unchecked; nothing where there is none that can be read."""
    folders = _folders(directory)
    try:
        return _run_in(read_regular(folders[max(folders)] / "run.json")) if folders else {}
    except (OSError, ValueError):  # whoever loads the checkpoint says so
        return {}


class _OtherVersionError(Exception):
    """Of a format that stores no sums, or stores them elsewhere."""


def _verified(folder: Path) -> dict[str, bytes]:
    """The content of FILES, which are as they were written."""
    if not os.path.lexists(folder / SUMS):
        written = _run_in(read_regular(folder / "run.json")).get("format")
        if written != FORMAT:
            raise _OtherVersionError(written)
    found = read_regular(folder / SUMS)
    content = {}
    for name in FILES:
        content[name] = read_regular(folder / name)
        if _sum(name, content[name]).encode() not in found.splitlines(keepends=True):
            raise ValueError(f"{name} is not as it was written: its SHA-256 is not that in {SUMS}")
    if found != "".join(_sum(name, content[name]) for name in FILES).encode():
        raise ValueError(f"{SUMS} is not as it was written")
    return content


def _run_in(text: bytes) -> dict[str, object]:
    try:
        run = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"run.json: {one_line(error)}") from error
    if not isinstance(run, dict):
        raise ValueError(f"run.json must hold an object, got {type(run).__name__}")
    return run


def _sum(name: str, content: bytes) -> str:
    return f"{sha256(content).hexdigest()}  {name}\n"


def _damage(folder: Path | None, what: str) -> ValueError:
    return ValueError(f"checkpoint {folder} is damaged ({what}): remove it to start over")


def is_like(tensor: object, own: Tensor) -> bool:
    """Whether it is a dense tensor of the dtype and shape of `own`."""
    dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta
    return dense and (tensor.dtype, tensor.shape) == (own.dtype, own.shape)


def described(value: object) -> str:
    """What a value is, for a message."""
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _folders(directory: Path) -> dict[int, Path]:
    if not directory.is_dir():
        return {}
    return {int(match[1]): path for path in directory.iterdir() if (match := _FOLDER.fullmatch(path.name))}


def tensors_as_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a safetensors file. Tensors that share memory (tied weights) are stored once each."""
    own = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    return safetensors.torch.save(own)
