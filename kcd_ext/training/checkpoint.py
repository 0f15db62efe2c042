"""A run on disk after an epoch: all that the next epoch needs, in formats that execute nothing when they are read."""

import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from .storage import remove, write_bytes, write_json

FORMAT = 1  # of what is in a checkpoint; one more whenever that changes
_FOLDER = re.compile(r"epoch-(\d+)")


@dataclass
class Checkpoint:
    """The state of a run after `epoch` epochs."""

    epoch: int
    model: Mapping[str, Tensor]  # state_dict of the student and of the method's own parts
    training: Mapping[str, object]  # state_dicts of optimizer and condenser: tensors, numbers, strings, containers
    run: Mapping[str, object]  # JSON: the recipe and what the run is made on, compared before it goes on


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
        write_bytes(beside / "model.safetensors", tensors_as_bytes(checkpoint.model))
        training = io.BytesIO()
        torch.save(dict(checkpoint.training), training)
        write_bytes(beside / "training.pt", training.getvalue())
        write_json(beside / "run.json", {"format": FORMAT, **checkpoint.run})
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
        ValueError: its files cannot be read, or another version of the package has written them.
    """
    folders = _folders(directory)
    if not folders:
        return None
    epoch = max(folders)
    folder = folders[epoch]
    try:
        run = json.loads((folder / "run.json").read_text())
        written = run.pop("format", None)
        if written == FORMAT:
            return Checkpoint(
                epoch=epoch,
                model=safetensors.torch.load((folder / "model.safetensors").read_bytes()),
                training=torch.load(
                    io.BytesIO((folder / "training.pt").read_bytes()), map_location="cpu", weights_only=True
                ),
                run=run,
            )
    except Exception as error:  # each of the three formats has exceptions of its own
        raise ValueError(f"checkpoint {folder} is damaged ({error}): remove it to start over") from error
    raise ValueError(
        f"checkpoint {folder} is of another version of kcd_ext (format {written}, this one reads {FORMAT}): go on with that version"
    )


def _folders(directory: Path) -> dict[int, Path]:
    if not directory.is_dir():
        return {}
    return {int(match[1]): path for path in directory.iterdir() if (match := _FOLDER.fullmatch(path.name))}


def tensors_as_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a safetensors file. Tensors that share memory (tied weights) are stored once each."""
    own = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    return safetensors.torch.save(own)
