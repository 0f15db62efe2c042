"""Weights as people save them: read without executing anything, and fitted to the names of a network."""

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

from ..describe import some
from ..files import read_regular

# Where checkpoints keep the weights: the first of these names that holds any is taken. Moving averages come last, because
# what a checkpoint tells beside the weights (its accuracy, its optimizer) belongs to the network that was trained.
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
DEPTH = 4  # of wrappers inside wrappers
# What stands before all names where a module around the network was saved: torch's DataParallel, torch.compile, others.
OUTER = ("module.", "_orig_mod.", "model.", "student.", "net.", "network.", "backbone.")
INSERTED = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod)\.")  # where torch has wrapped a part of the network
# What profilers, averages and loops put beside the parameters, by the last part of its name.
COUNTERS = {
    *("total_ops", "total_params", "n_averaged", "epoch", "step", "iteration", "global_step", "lr"),
    *("acc", "accuracy", "best_acc", "best_accuracy", "acc1", "best_acc1", "prec1", "best_prec1", "loss", "best_loss"),
}
TRACKED = "num_batches_tracked"  # of a batch normalisation; torch before 0.4.1 had none


class _Value:
    """Stands for any value that is no tensor. It takes what a pickle gives it and keeps nothing."""

    def __new__(cls, *_arguments: object, **_options: object) -> "_Value":
        return super().__new__(cls)

    def __init__(self, *_arguments: object, **_options: object):
        pass

    def __setstate__(self, _state: object) -> None:
        pass


class _Mapping:
    """Stands for a dictionary of another type, which can hold the weights: torch fills only its own three."""

    def __new__(cls, *_arguments: object) -> OrderedDict:
        return OrderedDict()


class _Sequence:
    """Stands for a list of another type."""

    def __new__(cls, *_arguments: object) -> list:
        return []


# What checkpoints hold beside tensors, by the names that their pickles write. torch reads a pickle that names nothing but
# these and its own tensors, and for each of these names it takes the class above: nothing of the module that is named is
# imported or called, so nothing here can execute code or open a file, whatever the real class does.
_NUMPY = [f"numpy.{core}.multiarray.{name}" for core in ("_core", "core") for name in ("scalar", "_reconstruct")]
_NUMPY += [f"numpy.{name}" for name in ("dtype", "ndarray", "bool", "bool_", "float16", "float32", "float64")]
_NUMPY += [f"numpy.{name}" for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")]
_NUMPY += [f"numpy.dtypes.{name}DType" for name in ("Float16", "Float32", "Float64", "Int32", "Int64", "UInt8", "Bool")]
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_LIGHTNING = ("pytorch_lightning.utilities.parsing", "lightning.pytorch.utilities.parsing")
_LIGHTNING += ("lightning_fabric.utilities.data", "lightning.fabric.utilities.data")
VALUES = (
    *_NUMPY,  # accuracies and learning rates that NumPy has computed (RepDistiller's optimizer), states of generators
    "argparse.Namespace",  # options: RepDistiller, timm, torchvision, torchdistill
    "types.SimpleNamespace",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),  # among options
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),  # when it was saved
    *("uuid.UUID", "uuid.SafeUUID", "decimal.Decimal", "fractions.Fraction"),
    # Types and constants among options, and what a defaultdict makes its values with.
    *(f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "object", "str", "tuple")),
    *(f"builtins.{name}" for name in ("Ellipsis", "frozenset", "range", "slice")),
    "torch.torch_version.TorchVersion",  # torch.__version__
    "torchvision.transforms.functional.InterpolationMode",  # among options
    # Lightning before 1.5: its callbacks' states by their classes.
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "mmengine.logging.history_buffer.HistoryBuffer",  # MMPretrain's log, in message_hub
    # Hydra's options, among Lightning's hyper_parameters.
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
NAMED = re.compile(r"GLOBAL (\S+)")  # in what torch says of a name that is not admitted


@dataclass(frozen=True)
class Weights:
    """Tensors by name, and what a user is to be told about where they come from."""

    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


def read(path: Path) -> Weights:
    """The weights in a file, on the CPU: .safetensors, or a state_dict that `torch.save` wrote, alone or in a checkpoint.

    Nothing in the file is executed. A checkpoint may hold plain values beside the weights (VALUES), and its weights under
    one of WRAPPERS, or under any other name if only one entry is a dictionary of tensors.

    Raises:
        ValueError: the file is no regular one, is damaged, holds no weights, or anything beside them that is no plain value.
        OSError: it cannot be read.
    """
    content = read_regular(path)  # readers of formats have errors of their own, and no path that is no text in UTF-8
    notes: list[str] = []
    tensors = _tensors(path, _unwrapped(path, _loaded(path, content), notes), notes)
    return Weights(tensors, tuple(notes))


def _loaded(path: Path, content: bytes) -> object:
    try:
        if path.suffix == ".safetensors" or content[8:9] == b"{":
            return safetensors.torch.load(content)
        with torch.serialization.safe_globals(STAND_INS):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # each format has exceptions of its own, and torch's advises to execute the file
        raise ValueError(_reason(path, content, str(error))) from error


def _reason(path: Path, content: bytes, message: str) -> str:
    """Why a file could not be read, and what to do about it, in one line."""
    named = NAMED.search(message)
    if named and b"_parameters" in content and b"_modules" in content:
        return (
            f"{path} holds a pickled module ({named[1]}), which only executing code could read: save its weights instead, "
            f'torch.save(model.state_dict(), "weights.pth")'
        )
    if named:
        return (
            f"{path} cannot be read as weights: it names {named[1]}, which is neither a tensor nor a plain value: save the "
            f'weights alone, torch.save(model.state_dict(), "weights.pth")'
        )
    if "Unsupported operand" in message and content[:2] == b"PK":
        return f"{path} cannot be read as weights: damaged, or pickled by another protocol than that of torch.save (2)"
    if _is_torchscript(content):
        return (
            f"{path} is TorchScript, of torch.jit.save: save its weights instead, "
            f'torch.save(torch.jit.load("{path.name}").state_dict(), "weights.pth")'
        )
    return f"{path} cannot be read as weights: damaged, or more than tensors in it"


def _is_torchscript(content: bytes) -> bool:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # no archive, or a damaged one
        return False


# --- where in the checkpoint they are ---------------------------------------------------------------------------------


def _unwrapped(path: Path, held: object, notes: list[str]) -> object:
    """What the wrappers hold, the first of several; `notes` says which that is."""
    for _ in range(DEPTH):
        if not isinstance(held, Mapping):
            return held
        wrappers = [name for name in WRAPPERS if _holds_weights(held.get(name))]
        if not wrappers and not any(isinstance(entry, Tensor) for entry in held.values()):
            wrappers = [name for name, entry in held.items() if isinstance(name, str) and _is_state_dict(entry)]
            if len(wrappers) > 1:
                raise ValueError(
                    f"{path} must hold the weights of one network, got {_quoted(wrappers)}: save those that are meant alone"
                )
        if not wrappers:
            return held
        taken = wrappers[0]
        others = [name for name, entry in held.items() if name != taken and (name in wrappers or _is_state_dict(entry))]
        if others:
            notes.append(f"{path}: the weights under {taken!r} are taken, not those under {_quoted(others)}")
        held = held[taken]
    return held


def _holds_weights(held: object, depth: int = DEPTH) -> bool:
    """Whether it is a dictionary with a tensor in it, by itself or in one of its wrappers."""
    if not isinstance(held, Mapping) or not depth:
        return False
    found = any(isinstance(entry, Tensor) for entry in held.values())
    return found or any(_holds_weights(held.get(name), depth - 1) for name in WRAPPERS)


def _is_state_dict(held: object) -> bool:
    if not isinstance(held, Mapping) or not held:
        return False
    return all(isinstance(name, str) and isinstance(entry, Tensor) for name, entry in held.items())


def _tensors(path: Path, held: object, notes: list[str]) -> dict[str, Tensor]:
    """The tensors among these entries, plain values left out. Raises ValueError where there is none, or more than these."""
    what = f"{path} must hold tensors by name (a state_dict), alone or under one of {', '.join(WRAPPERS)}"
    if not isinstance(held, Mapping):
        raise ValueError(f"{what}, got a {type(held).__name__.removeprefix('_').lower()}")
    tensors = {name: entry for name, entry in held.items() if isinstance(entry, Tensor) and isinstance(name, str)}
    if not tensors:
        raise ValueError(f"{what}, got {_quoted(held) or 'an empty one'}")
    others = {name: entry for name, entry in held.items() if name not in tensors}
    for name, entry in others.items():
        if _has_tensor(entry):
            raise ValueError(f"{what}, got {name!r}, a {type(entry).__name__}, among them")
    if others:
        notes.append(f"{path}: {_quoted(others)} beside the weights left out: no tensor")
    for name, tensor in tensors.items():
        _check_plain(path, name, tensor)
    return tensors


def _has_tensor(entry: object) -> bool:
    """Whether a tensor is in it, in containers of any depth, which a file can also put into each other."""
    seen: set[int] = set()
    left = [entry]
    while left:
        one = left.pop()
        if isinstance(one, Tensor):
            return True
        if isinstance(one, Mapping | list | tuple | set) and id(one) not in seen:
            seen.add(id(one))
            left += one.values() if isinstance(one, Mapping) else one
    return False


def _check_plain(path: Path, name: str, tensor: Tensor) -> None:
    """Raises ValueError for a tensor that cannot be copied into a parameter as it is."""
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
        raise ValueError(f"{path} must hold plain dense tensors, got {name}, which is {kind}")


def _quoted(names: Iterable[object]) -> str:
    return some(map(repr, names), 3)


# --- whose they are ---------------------------------------------------------------------------------------------------


def fitted(what: str, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Weights:
    """The weights by the names of a network's state_dict, whole: ready for `load_state_dict`.

    Where the names do not fit as they are, what torch and outer modules put before them is taken off (INSERTED, OUTER).
    Counters that no parameter has (COUNTERS, whole numbers) are left out, and a missing `num_batches_tracked` is the
    network's own.

    Args:
        what: the beginning of an error message.
        own: the network's state_dict.
        weights: tensors by name.

    Raises ValueError for the first difference that is left, in one line; torch's own message has one for each.
    """
    candidates = [dict(zip(names, weights.values(), strict=True)) for names in _renamings(weights)]
    candidates = [renamed for renamed in candidates if len(renamed) == len(weights)]
    fitting = [renamed for renamed in candidates if not _difference(own, renamed)]
    nearest = max(fitting or candidates, key=lambda renamed: len(own.keys() & renamed.keys()))
    if not fitting:
        raise ValueError(f"{what}: {_difference(own, nearest)}")
    left_out = [before for before, name in zip(weights, nearest, strict=True) if name not in own]
    state = {name: nearest[name] if name in nearest else tensor for name, tensor in own.items()}
    note = f"{_quoted(left_out)} left out of the weights: counted or measured, no parameter of the network"
    return Weights(state, (note,) if left_out else ())


def _renamings(weights: Mapping[str, Tensor]) -> Iterable[list[str]]:
    """The names as they are, and then with less and less before them; as many, in the same order."""
    for names in ([*weights], [INSERTED.sub("", name) for name in weights]):
        for _ in range(DEPTH):
            yield names
            held = [name for name, tensor in zip(names, weights.values(), strict=True) if not _is_counter(name, tensor)]
            prefix = next((prefix for prefix in OUTER if held and all(name.startswith(prefix) for name in held)), None)
            if prefix is None:
                break
            names = [name.removeprefix(prefix) for name in names]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _difference(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """The first that keeps these weights from being the network's; empty where there is none."""
    for name, tensor in own.items():
        if name not in weights:
            if _last(name) == TRACKED:
                continue
            unknown = [other for other, given in weights.items() if other not in own and not _is_counter(other, given)]
            return f"they have no {name}" + (f", but {_quoted(unknown)}" if unknown else "")
        given = weights[name]
        if given.shape != tensor.shape:
            return f"{name} has shape {tuple(given.shape)}, the network's has {tuple(tensor.shape)}"
        if _last(name) != TRACKED and _kind(given) != _kind(tensor):
            return f"{name} is of {given.dtype}, the network's of {tensor.dtype}"
    for name, tensor in weights.items():
        if name not in own and not _is_counter(name, tensor):
            return f"they have {name}, which the network has not"
    return ""


def _is_counter(name: str, tensor: Tensor) -> bool:
    """Whether it counts or measures something, and is no parameter."""
    whole_number = tensor.dim() == 0 and _kind(tensor) == "integer"
    return whole_number or (tensor.numel() == 1 and _last(name) in COUNTERS)


def _kind(tensor: Tensor) -> str:
    return "floating" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "integer"
