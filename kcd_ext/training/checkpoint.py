"""Checkpoints: a run after an epoch, in file formats that execute nothing when they are read."""

import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..describe import one_line
from ..files import json_bytes, read_json, read_regular, remove, write_bytes

FORMAT = 2  # version of the checkpoint's content; increment it with every change
FILES = ("model.safetensors", "training.pt", "run.json")
SUMS = "sha256sums"  # checksums of FILES, in the format of `sha256sum --check`
_FOLDER = re.compile(r"epoch-(\d+)")


@dataclass
class Checkpoint:
    """The state of a run after `epoch` epochs, pretraining included."""

    epoch: int
    model: Mapping[str, Tensor]  # state_dict of the student and of the method's own parts
    training: Mapping[str, object]  # state_dicts of optimizer, scaler and condenser; names of the trained parameters
    run: Mapping[str, object]  # JSON: the run's fingerprint and its metrics so far
    source: Path | None = None  # the folder it was read from


class OtherVersionError(ValueError):
    """The error of a checkpoint that another version of the package wrote."""


def save(directory: Path, checkpoint: Checkpoint) -> None:
    """Write `directory/epoch-NNNN`, then remove the older checkpoints.

    The folder is filled under a temporary name and then renamed. So a process that is killed at any moment leaves the
    newest complete checkpoint in place.

    Raises:
        OSError: The checkpoint cannot be written. The older one is intact.
    """
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"epoch-{checkpoint.epoch:04d}"
    partial = directory / f".{final.name}.partial"
    remove(partial)
    try:
        partial.mkdir()
        training = io.BytesIO()
        torch.save(dict(checkpoint.training), training)
        run = json_bytes({"format": FORMAT, **checkpoint.run})
        content = dict(zip(FILES, (tensors_as_bytes(checkpoint.model), training.getvalue(), run), strict=True))
        for name in FILES:
            write_bytes(partial / name, content[name])
        write_bytes(partial / SUMS, _checksums(content))
        remove(final)
        os.rename(partial, final)
    except BaseException:
        remove(partial)
        raise
    for epoch, folder in _folders(directory).items():
        if epoch != checkpoint.epoch:
            remove(folder)


def load(directory: Path) -> Checkpoint | None:
    """Return the newest checkpoint, with its tensors on the CPU, or None if there is none.

    Raises:
        ValueError: A file is missing, has changed since it was written, or cannot be read.
        OtherVersionError: Another version of the package wrote the checkpoint.
    """
    folders = _folders(directory)
    if not folders:
        return None
    epoch = max(folders)
    folder = folders[epoch]
    with report_damage(folder):
        if not os.path.lexists(folder / SUMS):  # a version that writes no checksums must not be reported as damage
            _check_format(read_json(folder / "run.json").get("format"), folder)
        content = {name: read_regular(folder / name) for name in FILES}
        if (written := read_regular(folder / SUMS)) != _checksums(content):
            name = next((name for name in FILES if _checksums({name: content[name]}) not in written), SUMS)
            raise ValueError(f"{name} has changed: its SHA-256 is not the one in {SUMS}")
        run = json.loads(content["run.json"])
        _check_format(run.pop("format", None), folder)
        training = torch.load(io.BytesIO(content["training.pt"]), map_location="cpu", weights_only=True)
        return Checkpoint(epoch, safetensors.torch.load(content["model.safetensors"]), training, run, folder)


@contextmanager
def report_damage(folder: Path | None) -> Iterator[None]:
    """Turn every exception inside the context, except OtherVersionError, into a ValueError that calls the checkpoint damaged."""
    try:
        yield
    except OtherVersionError:
        raise
    except Exception as error:  # every file format raises its own kinds
        reason = f"it has no {error}" if isinstance(error, KeyError) else one_line(error)
        raise ValueError(f"checkpoint {folder} is damaged ({reason}): remove it to start over") from error


def read_run_json(directory: Path) -> Mapping[str, object]:
    """Return the unchecked content of the last checkpoint's run.json, or an empty mapping if there is none that can be read."""
    folders = _folders(directory)
    try:
        return read_json(folders[max(folders)] / "run.json") if folders else {}
    except (OSError, ValueError):  # `load` reports the damage
        return {}


def tensors_as_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the content of a safetensors file. Tied weights are stored once for each name."""
    own = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    return safetensors.torch.save(own)


def _check_format(written: object, folder: Path) -> None:
    if written != FORMAT:
        raise OtherVersionError(
            f"checkpoint {folder} is of another version of kcd_ext (format {written}, this one reads {FORMAT}): "
            f"resume with that version"
        )


def _checksums(content: Mapping[str, bytes]) -> bytes:
    return "".join(f"{sha256(part).hexdigest()}  {name}\n" for name, part in content.items()).encode()


def _folders(directory: Path) -> dict[int, Path]:
    if not directory.is_dir():
        return {}
    return {int(match[1]): path for path in directory.iterdir() if (match := _FOLDER.fullmatch(path.name))}
