"""A run on disk after an epoch: all that the next epoch needs, in formats that execute nothing when they are read."""

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

FORMAT = 2  # of what is in a checkpoint; one more whenever that changes
FILES = ("model.safetensors", "training.pt", "run.json")
SUMS = "sha256sums"  # of FILES, as `sha256sum --check` reads them
_FOLDER = re.compile(r"epoch-(\d+)")


@dataclass
class Checkpoint:
    """The state of a run after `epoch` epochs."""

    epoch: int
    model: Mapping[str, Tensor]  # state_dict of the student and of the method's own parts
    training: Mapping[str, object]  # state_dicts of optimizer, scaler and condenser; names of what is trained
    run: Mapping[str, object]  # JSON: the fingerprint of the run, and its histories
    source: Path | None = None  # the folder it was read from


class OtherVersionError(ValueError):
    """Another version of the package has written the checkpoint."""


def save(directory: Path, checkpoint: Checkpoint) -> None:
    """Write `directory/epoch-NNNN`, then remove the older ones.

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
        content = dict(zip(FILES, (tensors_as_bytes(checkpoint.model), training.getvalue(), run), strict=True))
        for name in FILES:
            write_bytes(beside / name, content[name])
        write_bytes(beside / SUMS, _sums(content))
        remove(final)
        os.rename(beside, final)
    except BaseException:
        remove(beside)
        raise
    for epoch, folder in _folders(directory).items():
        if epoch != checkpoint.epoch:
            remove(folder)


def load(directory: Path) -> Checkpoint | None:
    """Return the newest checkpoint, its tensors on the CPU; None where there is none.

    Raises:
        ValueError: a file is missing, is not as it was written or cannot be read, or another version of the package
            has written it (OtherVersionError).
    """
    folders = _folders(directory)
    if not folders:
        return None
    epoch = max(folders)
    folder = folders[epoch]
    with reading(folder):
        if not os.path.lexists(folder / SUMS):  # older versions store no sums
            _check_format(read_json(folder / "run.json").get("format"), folder)
        content = {name: read_regular(folder / name) for name in FILES}
        if (written := read_regular(folder / SUMS)) != _sums(content):
            name = next((name for name in FILES if _sums({name: content[name]}) not in written), SUMS)
            raise ValueError(f"{name} is not as it was written: its SHA-256 is not that in {SUMS}")
        run = json.loads(content["run.json"])
        _check_format(run.pop("format", None), folder)
        training = torch.load(io.BytesIO(content["training.pt"]), map_location="cpu", weights_only=True)
        return Checkpoint(epoch, safetensors.torch.load(content["model.safetensors"]), training, run, folder)


@contextmanager
def reading(folder: Path | None) -> Iterator[None]:
    """Raise one ValueError, which names the checkpoint, for whatever is raised inside by content that was not expected."""
    try:
        yield
    except OtherVersionError:
        raise
    except Exception as error:  # each format has exceptions of its own
        what = f"it has no {error}" if isinstance(error, KeyError) else one_line(error)
        raise ValueError(f"checkpoint {folder} is damaged ({what}): remove it to start over") from error


def facts_of(directory: Path) -> Mapping[str, object]:
    """Return what run.json of the last checkpoint says, unchecked; nothing where there is none that can be read."""
    folders = _folders(directory)
    try:
        return read_json(folders[max(folders)] / "run.json") if folders else {}
    except (OSError, ValueError):  # whoever loads the checkpoint says so
        return {}


def tensors_as_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the content of a safetensors file. Tensors that share memory (tied weights) are stored once each."""
    own = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    return safetensors.torch.save(own)


def _check_format(written: object, folder: Path) -> None:
    if written != FORMAT:
        raise OtherVersionError(
            f"checkpoint {folder} is of another version of kcd_ext (format {written}, this one reads {FORMAT}): "
            f"go on with that version"
        )


def _sums(content: Mapping[str, bytes]) -> bytes:
    return "".join(f"{sha256(part).hexdigest()}  {name}\n" for name, part in content.items()).encode()


def _folders(directory: Path) -> dict[int, Path]:
    if not directory.is_dir():
        return {}
    return {int(match[1]): path for path in directory.iterdir() if (match := _FOLDER.fullmatch(path.name))}
