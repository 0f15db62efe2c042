"""Where a teacher comes from: a trained run, a file of weights, or a network that is still to be trained."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from .. import models
from ..data.images import ImageData
from .randomness import seeded
from .runs import network_of

WEIGHTS = "student.safetensors"
WRAPPERS = ("model", "state_dict")  # what checkpoints of other projects call the weights in them (RepDistiller: model)
PARALLEL = "module."  # before every name in the checkpoint of a torch.nn.DataParallel


@dataclass(frozen=True)
class Teacher:
    """A network and, once it is trained, its weights."""

    network: str
    weights: Mapping[str, Tensor] | None = field(default=None, repr=False)
    origin: Path | None = None
    """Where the weights were read; None: they have still to be trained."""

    def __str__(self) -> str:
        return self.network if self.origin is None else f"{self.network} of {self.origin}"

    def build(self, data: ImageData, seed: int) -> nn.Module:
        """For these images; without weights of its own those that the seed gives.

        Raises:
            TypeError, ValueError, ImportError: as `models.build`, or the weights are not of such a network.
        """
        network = build(self.network, data, seed)
        if self.weights is not None:
            self._check(network.state_dict(), data)
            network.load_state_dict(self.weights)
        return network

    def _check(self, own: Mapping[str, Tensor], data: ImageData) -> None:
        """One line for the first difference; torch's own message has one for each."""
        what = (
            f"weights in {self.origin} are not of network {self.network!r} for {data.name} ({data.num_classes} classes)"
        )
        for name, tensor in own.items():
            if name not in self.weights:
                raise ValueError(f"{what}: they have no {name}")
            if self.weights[name].shape != tensor.shape:
                shapes = tuple(self.weights[name].shape), tuple(tensor.shape)
                raise ValueError(f"{what}: {name} has shape {shapes[0]}, the network's has {shapes[1]}")
        for name in self.weights:
            if name not in own:
                raise ValueError(f"{what}: they have {name}, which the network has not")


def build(network: str, data: ImageData, seed: int) -> nn.Module:
    """A network for these images, with the weights that the seed gives."""
    with seeded(seed):
        return models.build(network, in_channels=data.in_channels, num_classes=data.num_classes)


def find(spec: str, network: str | None, usual: str | None) -> Teacher:
    """The teacher that a user means.

    Args:
        spec: a network by name or module:function, to be trained; the folder of a run, whose student it is; or a file
            of weights, .safetensors or what `torch.save` made of a state_dict, alone or inside RepDistiller's checkpoint.
        network: of the weights, where the user has said so.
        usual: of a file of weights, where nobody has.

    Raises:
        TypeError, ValueError: there is no such thing, the run is not finished, the file is none of weights, or nobody
            says whose they are.
        OSError: a file cannot be read.
    """
    path = Path(spec)
    if spec in models.REGISTRY or (":" in spec and not path.exists()):
        if network is not None:
            raise ValueError(f"teacher_network={network!r} has no effect with teacher {spec!r}, a network by name")
        return Teacher(spec)
    if path.is_dir():
        weights = path / WEIGHTS
        if not weights.exists():
            raise ValueError(f"teacher {spec} is no folder of a finished run: it has no {WEIGHTS}")
        return Teacher(network or network_of(path), read(weights), path)
    if not path.exists():
        raise ValueError(
            f"unknown teacher {spec!r}: no such file or folder, and no network out of {', '.join(sorted(models.REGISTRY))}"
        )
    if network is None and usual is None:
        raise ValueError(f"teacher_network must name the network of the weights in {spec}")
    return Teacher(network or usual, read(path), path)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU. Nothing in the file is executed.

    Raises:
        ValueError: it holds anything else.
        OSError: it cannot be read.
    """
    content = path.read_bytes()  # readers of formats have errors of their own, and no path that is no text in UTF-8
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(content)
        held = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # each format has exceptions of its own, and torch's advises to execute the file
        raise ValueError(f"{path} cannot be read as weights: damaged, or more than tensors in it") from error
    for wrapper in WRAPPERS:
        if isinstance(held, Mapping) and isinstance(held.get(wrapper), Mapping):
            held = held[wrapper]
    if not isinstance(held, Mapping) or not held or not all(isinstance(tensor, Tensor) for tensor in held.values()):
        raise ValueError(f"{path} must hold tensors by name (a state_dict), alone or under {' or '.join(WRAPPERS)}")
    if all(name.startswith(PARALLEL) for name in held):
        held = {name.removeprefix(PARALLEL): tensor for name, tensor in held.items()}
    return dict(held)
