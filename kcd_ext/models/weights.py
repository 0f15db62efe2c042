"""Weights from checkpoints: reads them without executing anything and matches them to a network's names."""

import io
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from ..describe import join_names
from ..files import read_regular

# Keys under which checkpoints store the weights; the first one with weights is used. Moving averages come last, because
# the rest of a checkpoint (accuracy, optimizer) belongs to the network that was trained.
WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "params",
    "student",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema_model",
    "ema",
)
DEPTH = 4  # levels of nested wrappers
# Prefixes of all names if a module around the network was saved: torch's DataParallel, torch.compile, others.
OUTER = ("module.", "_orig_mod.", "model.", "student.", "net.", "network.", "backbone.")
# Also inside a name, if torch wraps a part of the network.
INSERTED = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod)\.")
# Entries that profilers, averages and training loops add to the parameters, by the last part of their name.
COUNTERS = {
    *("total_ops", "total_params", "n_averaged", "epoch", "step", "iteration", "global_step", "lr"),
    *("acc", "accuracy", "best_acc", "best_accuracy", "acc1", "best_acc1", "prec1", "best_prec1", "loss", "best_loss"),
}
TRACKED = "num_batches_tracked"  # buffer of batch normalisation; torch before 0.4.1 had none


class _Value:
    """A stand-in for any value that is not a tensor. It accepts what a pickle passes it and stores nothing."""

    def __new__(cls, *_arguments: object, **_options: object) -> "_Value":
        return super().__new__(cls)

    def __init__(self, *_arguments: object, **_options: object):
        pass

    def __setstate__(self, _state: object) -> None:
        pass


class _Mapping:
    """A stand-in for other dictionary types, which can contain the weights: torch fills only its own three."""

    def __new__(cls, *_arguments: object) -> OrderedDict:
        return OrderedDict()


class _Sequence:
    """A stand-in for other list types."""

    def __new__(cls, *_arguments: object) -> list:
        return []


# Values other than tensors in checkpoints, by the names in their pickles. torch reads a pickle that names only these and
# its own types. For each of these names it uses the stand-in above. The named module is neither imported nor called, so
# nothing here can execute code or open a file, whatever the real class does.
_NUMPY = [f"numpy.{core}.multiarray.{name}" for core in ("_core", "core") for name in ("scalar", "_reconstruct")]
_NUMPY += [f"numpy.{name}" for name in ("dtype", "ndarray", "bool", "bool_", "float16", "float32", "float64")]
_NUMPY += [f"numpy.{name}" for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")]
_NUMPY += [f"numpy.dtypes.{name}DType" for name in ("Float16", "Float32", "Float64", "Int32", "Int64", "UInt8", "Bool")]
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_LIGHTNING = ("pytorch_lightning.utilities.parsing", "lightning.pytorch.utilities.parsing")
_LIGHTNING += ("lightning_fabric.utilities.data", "lightning.fabric.utilities.data")
VALUES = (
    *_NUMPY,  # accuracies and learning rates from NumPy (RepDistiller's optimizer), generator states
    "argparse.Namespace",  # options: RepDistiller, timm, torchvision, torchdistill
    "types.SimpleNamespace",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),  # in options
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),  # when it was saved
    *("uuid.UUID", "uuid.SafeUUID", "decimal.Decimal", "fractions.Fraction"),
    # Types and constants in options, and default factories of a defaultdict.
    *(f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "object", "str", "tuple")),
    *(f"builtins.{name}" for name in ("Ellipsis", "frozenset", "range", "slice")),
    "torch.torch_version.TorchVersion",  # torch.__version__
    "torchvision.transforms.functional.InterpolationMode",  # in options
    # Lightning before 1.5: callback states, keyed by their classes.
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "mmengine.logging.history_buffer.HistoryBuffer",  # MMPretrain's log, in message_hub
    # Hydra's options, in Lightning's hyper_parameters.
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "typing.Any"),
    *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata"),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Float", "Integer", "Path", "String")),
)
MAPPINGS = (
    "collections.defaultdict",
    *(f"{module}.AttributeDict" for module in _LIGHTNING),  # hyper_parameters
    *("yacs.config.CfgNode", "easydict.EasyDict", "addict.addict.Dict", "munch.Munch"),  # options
)
SEQUENCES = ("collections.deque",)  # a log of the last losses
STAND_INS = [
    (stand_in, name)
    for stand_in, names in ((_Value, VALUES), (_Mapping, MAPPINGS), (_Sequence, SEQUENCES))
    for name in names
]
NAMED = re.compile(r"GLOBAL (\S+)")  # in torch's message about a name that is not allowed


@dataclass(frozen=True)
class Weights:
    """Tensors by name, and notes for the user about their origin."""

    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


def load_weights(path: Path) -> Weights:
    """Return the weights in a file, on the CPU, without executing anything in the file.

    Args:
        path: A .safetensors file, or a state_dict written by `torch.save`, alone or in a checkpoint. A checkpoint may
            contain plain values too (VALUES). Its weights may be under one of WRAPPERS, or under any other key if only
            one entry is a dictionary of tensors.

    Raises:
        ValueError: The file is not a regular file, is damaged, has no weights, or contains more than weights and plain values.
        OSError: The file cannot be read.
    """
    content = read_regular(path)  # as bytes: the readers raise other errors, and refuse a path that is not UTF-8
    notes: list[str] = []
    tensors = _select_tensors(path, _unwrap(path, _load(path, content), notes), notes)
    return Weights(tensors, tuple(notes))


def _load(path: Path, content: bytes) -> object:
    try:
        if path.suffix == ".safetensors" or content[8:9] == b"{":
            return safetensors.torch.load(content)
        with torch.serialization.safe_globals(STAND_INS):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own exceptions, and torch's message advises to execute the file
        raise ValueError(_describe_failure(path, content, str(error))) from error


def _describe_failure(path: Path, content: bytes, message: str) -> str:
    """Return one line that says why a file could not be read, and what to do."""
    named = NAMED.search(message)
    if named and b"_parameters" in content and b"_modules" in content:
        return (
            f"{path} contains a pickled module ({named[1]}), which cannot be read without executing code: save its weights "
            f'instead, torch.save(model.state_dict(), "weights.pth")'
        )
    if named:
        return (
            f"{path} cannot be read as weights: it names {named[1]}, which is neither a tensor nor a plain value: save only "
            f'the weights, torch.save(model.state_dict(), "weights.pth")'
        )
    if "Unsupported operand" in message and content[:2] == b"PK":
        return f"{path} cannot be read as weights: damaged, or not pickled with torch.save's protocol, 2"
    if _is_torchscript(content):
        return (
            f"{path} is TorchScript, from torch.jit.save: save its weights instead, "
            f'torch.save(torch.jit.load("{path.name}").state_dict(), "weights.pth")'
        )
    return f"{path} cannot be read as weights: it is damaged or contains more than tensors"


def _is_torchscript(content: bytes) -> bool:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # not an archive, or damaged
        return False


# --- finding the weights in a checkpoint ------------------------------------------------------------------------------


def _unwrap(path: Path, content: object, notes: list[str]) -> object:
    """Return the content of the wrappers, the first of several; add a note if there was a choice."""
    for _ in range(DEPTH):
        if not isinstance(content, Mapping):
            return content
        wrappers = [name for name in WRAPPERS if _has_weights(content.get(name))]
        if not wrappers and not any(isinstance(entry, Tensor) for entry in content.values()):
            wrappers = [name for name, entry in content.items() if isinstance(name, str) and _is_state_dict(entry)]
            if len(wrappers) > 1:
                raise ValueError(
                    f"{path} must contain the weights of one network, got {_quoted(wrappers)}: save only those you need"
                )
        if not wrappers:
            return content
        used = wrappers[0]
        others = [
            name for name, entry in content.items() if name != used and (name in wrappers or _is_state_dict(entry))
        ]
        if others:
            notes.append(f"{path}: uses the weights under {used!r}, not those under {_quoted(others)}")
        content = content[used]
    return content


def _has_weights(entry: object, depth: int = DEPTH) -> bool:
    """Return whether an entry is a dictionary with a tensor, directly or in one of its wrappers."""
    if not isinstance(entry, Mapping) or not depth:
        return False
    found = any(isinstance(part, Tensor) for part in entry.values())
    return found or any(_has_weights(entry.get(name), depth - 1) for name in WRAPPERS)


def _is_state_dict(entry: object) -> bool:
    if not isinstance(entry, Mapping) or not entry:
        return False
    return all(isinstance(name, str) and isinstance(part, Tensor) for name, part in entry.items())


def _select_tensors(path: Path, content: object, notes: list[str]) -> dict[str, Tensor]:
    """Return the tensors among these entries and drop plain values.

    Raises:
        ValueError: There are no tensors, or entries that are neither tensors nor plain values.
    """
    takes = f"{path} must contain tensors by name (a state_dict), directly or under one of {', '.join(WRAPPERS)}"
    if not isinstance(content, Mapping):
        raise ValueError(f"{takes}, got a {type(content).__name__.removeprefix('_').lower()}")
    tensors = {name: entry for name, entry in content.items() if isinstance(entry, Tensor) and isinstance(name, str)}
    if not tensors:
        raise ValueError(f"{takes}, got {_quoted(content) or 'an empty dictionary'}")
    others = {name: entry for name, entry in content.items() if name not in tensors}
    for name, entry in others.items():
        if _has_tensor(entry):
            raise ValueError(f"{takes}, got the {type(entry).__name__} {name!r} among them")
    if others:
        notes.append(f"{path}: ignored {_quoted(others)} among the weights: not tensors")
    for name, tensor in tensors.items():
        _check_plain(path, name, tensor)
    return tensors


def _has_tensor(entry: object) -> bool:
    """Return whether an entry contains a tensor, in containers nested to any depth; a file can also make them cyclic."""
    seen: set[int] = set()
    remaining = [entry]
    while remaining:
        part = remaining.pop()
        if isinstance(part, Tensor):
            return True
        if isinstance(part, Mapping | list | tuple | set) and id(part) not in seen:
            seen.add(id(part))
            remaining += part.values() if isinstance(part, Mapping) else part
    return False


def _check_plain(path: Path, name: str, tensor: Tensor) -> None:
    """Raise ValueError for a tensor that cannot be copied directly into a parameter."""
    kind = None
    if tensor.is_quantized:
        kind = f"quantised ({tensor.dtype})"
    elif tensor.layout is not torch.strided or tensor.is_nested:
        kind = f"not dense ({tensor.layout})"
    elif tensor.device.type == "meta":
        kind = "without data, on the meta device"
    elif type(tensor) not in (Tensor, nn.Parameter):
        kind = f"a {type(tensor).__name__}"
    if kind is not None:
        raise ValueError(f"{path} must contain plain dense tensors, got {name}, which is {kind}")


def _quoted(names: Iterable[object]) -> str:
    return join_names(map(repr, names), 3)


# --- matching them to a network ---------------------------------------------------------------------------------------


def match_weights(what: str, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Weights:
    """Return weights under the names of a network's state_dict, complete and ready for `load_state_dict`.

    If the names do not match, prefixes that torch and outer modules add are removed (INSERTED, OUTER). Counters that are
    not parameters (names in COUNTERS, integer scalars) are left out. A missing `num_batches_tracked` keeps the network's value.

    Args:
        what: Start of an error message.
        own: The network's state_dict.
        weights: Tensors by name.

    Raises:
        ValueError: Names the first difference that remains, in one line; torch's message has a line for each.
    """
    candidates = _renamed(weights)
    fitting = [renamed for renamed in candidates if not _first_mismatch(own, renamed)]
    nearest = max(fitting or candidates, key=lambda renamed: len(own.keys() & renamed.keys()))
    if not fitting:
        raise ValueError(f"{what}: {_first_mismatch(own, nearest)}")
    ignored = [before for before, name in zip(weights, nearest, strict=True) if name not in own]
    state = {name: nearest[name] if name in nearest else tensor for name, tensor in own.items()}
    note = f"ignored {_quoted(ignored)} among the weights: counters or measurements, not parameters of the network"
    return Weights(state, (note,) if ignored else ())


def _renamed(weights: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the weights under the names of `_renamings`, without those that give two tensors one name."""
    candidates = [dict(zip(names, weights.values(), strict=True)) for names in _renamings(weights)]
    return [renamed for renamed in candidates if len(renamed) == len(weights)]


def _renamings(weights: Mapping[str, Tensor]) -> Iterable[list[str]]:
    """Yield the names unchanged, then with more and more prefixes removed; equally many, in the same order."""
    for names in ([*weights], [INSERTED.sub("", name) for name in weights]):
        for _ in range(DEPTH):
            yield names
            kept = [name for name, tensor in zip(names, weights.values(), strict=True) if not _is_counter(name, tensor)]
            prefix = next((prefix for prefix in OUTER if kept and all(name.startswith(prefix) for name in kept)), None)
            if prefix is None:
                break
            names = [name.removeprefix(prefix) for name in names]


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def _first_mismatch(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """Return the first reason why these weights are not the network's; empty if there is none."""
    for name, tensor in own.items():
        if name not in weights:
            if _last_part(name) == TRACKED:
                continue
            unknown = [other for other, found in weights.items() if other not in own and not _is_counter(other, found)]
            return f"they have no {name}" + (f", but {_quoted(unknown)}" if unknown else "")
        found = weights[name]
        if found.shape != tensor.shape:
            return f"{name} has shape {tuple(found.shape)}, the network's has {tuple(tensor.shape)}"
        if _last_part(name) != TRACKED and _kind(found) != _kind(tensor):
            return f"{name} is {found.dtype}, the network's is {tensor.dtype}"
    for name, tensor in weights.items():
        if name not in own and not _is_counter(name, tensor):
            return f"they have {name}, which the network does not have"
    return ""


def _is_counter(name: str, tensor: Tensor) -> bool:
    """Return whether an entry counts or measures something and is not a parameter."""
    is_integer = tensor.dim() == 0 and _kind(tensor) == "integer"
    return is_integer or (tensor.numel() == 1 and _last_part(name) in COUNTERS)


def _kind(tensor: Tensor) -> str:
    return "floating" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "integer"


# --- starting another network from them -------------------------------------------------------------------------------


def match_start(what: str, own: Mapping[str, Tensor], weights: Mapping[str, Tensor], num_classes: int) -> Weights:
    """Return weights to start a network from, which may have another head than the network that was saved.

    As `match_weights`, but

    - tensors with a row per class keep the network's values if the file has them for another number of classes, or not at all;
    - a first layer for one channel gets the sum of the weights for three. That is the same for grey images whose channel is
      repeated and normalised alike.

    Args:
        what: Start of an error message.
        own: The network's state_dict.
        weights: Tensors by name.
        num_classes: Number of the network's logits.

    Returns:
        The complete weights, and a note on each exception.

    Raises:
        ValueError: As `match_weights`, for all other tensors.
    """
    nearest = max(_renamed(weights), key=lambda renamed: len(own.keys() & renamed.keys()))
    notes, adapted = [], {}
    for name, tensor in nearest.items():
        mine = own.get(name)
        if mine is not None and _is_sum_of_channels(mine, tensor):
            adapted[name] = tensor.sum(1, keepdim=True)
            notes.append(f"{name} is summed over its {tensor.shape[1]} channels, for grey images")
        else:
            adapted[name] = tensor
    head = [name for name, tensor in own.items() if _is_other_head(tensor, adapted.get(name), num_classes)]
    body = match_weights(
        what,
        {name: tensor for name, tensor in own.items() if name not in head},
        {name: tensor for name, tensor in adapted.items() if name not in head},
    )
    if head:
        there = {len(adapted[name]) for name in head if name in adapted}
        found = f"the file has {' and '.join(map(str, sorted(there)))} classes" if there else "the file has none"
        notes.append(f"{_quoted(head)} keep their initial values: {found}, the data {num_classes}")
    return Weights({name: body.tensors.get(name, tensor) for name, tensor in own.items()}, (*body.notes, *notes))


def _is_other_head(own: Tensor, found: Tensor | None, num_classes: int) -> bool:
    """Return whether a tensor has a row per class, and the file has another number of these rows or none."""
    if own.dim() == 0 or len(own) != num_classes:
        return False
    return found is None or (found.dim() == own.dim() and found.shape[1:] == own.shape[1:] and len(found) != len(own))


def _is_sum_of_channels(own: Tensor, found: Tensor) -> bool:
    same = own.dim() == found.dim() == 4 and own.shape[0] == found.shape[0] and own.shape[2:] == found.shape[2:]
    return same and own.shape[1] == 1 and found.shape[1] == 3
