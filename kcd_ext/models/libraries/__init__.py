"""Networks of other packages, by a prefix of their name: `timm:NAME`, `torchvision:NAME`, `hf:FOLDER_OR_NAME`.

A package is imported only when one of its networks is named. Nothing is downloaded, except for an `hf:` name of the hub.
"""

import importlib
import importlib.util
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ...describe import describe_error
from ...networks import evaluation_mode
from ...registry import resolve
from ..normalisation import NetworkInput, repeat_channel, resize_input

LIBRARIES = {
    "hf": "kcd_ext.models.libraries.huggingface:HuggingFace",
    "timm": "kcd_ext.models.libraries.timm:Timm",
    "torchvision": "kcd_ext.models.libraries.torchvision:TorchVision",
}
EXTRA = 'pip install "kcd-ext[networks]"'
RGB = 3  # channels of the images that these networks are trained on


class Library(ABC):
    """The networks of a package. An instance stands for one of them, by its name without the prefix."""

    prefix: str
    """The key of LIBRARIES."""

    def __init__(self, name: str):
        self.name = name

    @abstractmethod
    def make(self, in_channels: int, num_classes: int) -> nn.Module:
        """Return a new network. If it can take only images of another number of channels, it may ignore `in_channels`."""

    @abstractmethod
    def network_input(self) -> NetworkInput:
        """Return the images that the network's published weights, or those in its folder, were trained on."""

    @property
    def source(self) -> str:
        """Where `network_input` is from, for a remark: images are resized and normalised ..."""
        return f"as for the published weights of {self}"

    def channels(self, in_channels: int) -> int:
        """Return the number of channels that the network from `make` takes."""
        return in_channels

    def weights(self) -> Mapping[str, Tensor] | None:
        """Return the weights that come with the name, by name; None: it names only an architecture."""
        return None

    def folder(self) -> Path | None:
        """Return the folder of `weights`; None: there is none."""
        return None

    def config(self) -> dict[str, object] | None:
        """Return all that `make` needs besides the name, as JSON; None: the name is enough."""
        return None

    def __str__(self) -> str:
        return f"{self.prefix}:{self.name}"

    def build(self, in_channels: int, num_classes: int, image_size: tuple[int, int] | None) -> nn.Module:
        """Return a new network for these images; see `kcd_ext.models.build`."""
        channels = self.channels(in_channels)
        if channels != in_channels and in_channels != 1:
            raise ValueError(f"network {str(self)!r} takes images of {channels} channels, or of one, got {in_channels}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice about defaults that this package chooses
            network = self.make(in_channels, num_classes).float()
        if channels != in_channels:
            repeat_channel(network, channels)
        if image_size is not None:
            self._fit(network, in_channels, image_size)
        return network

    def _fit(self, network: nn.Module, in_channels: int, image_size: tuple[int, int]) -> None:
        """Let the network resize images that it cannot take to its own size. Raises ValueError if that does not help."""
        error = _find_failure(network, (1, in_channels, *image_size))
        if error is None:
            return
        own = self.network_input()
        if own.size is None or own.size == tuple(image_size):
            raise ValueError(
                f"network {str(self)!r} does not take images of {image_size[0]} x {image_size[1]} pixels: {describe_error(error)}"
            ) from error
        resize_input(network, own.size, own.interpolation)
        if (error := _find_failure(network, (1, in_channels, *image_size))) is not None:
            raise ValueError(
                f"network {str(self)!r} does not take images of {image_size[0]} x {image_size[1]} pixels, nor resized to "
                f"{own.size[0]} x {own.size[1]}: {describe_error(error)}"
            ) from error


def library_network(name: object, config: Mapping[str, object] | None = None) -> Library | None:
    """Return the network of a package that `name` stands for; None if it has none of the prefixes in LIBRARIES.

    Args:
        name: A name with a prefix, or any other.
        config: The result of `Library.config` when the network was built before; None: the name tells.

    Raises:
        ValueError: There is nothing after the prefix.
    """
    prefix, colon, own_name = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not colon or prefix not in LIBRARIES:
        return None
    if not own_name:
        raise ValueError(f"network {name!r} must have a name after {prefix}:")
    kind = resolve("network", prefix, LIBRARIES)
    return kind(own_name) if config is None else kind(own_name, config)


def _find_failure(network: nn.Module, shape: tuple[int, ...]) -> Exception | None:
    """Return the error of a forward pass on zeros of this shape; None if there is none."""
    try:
        with torch.no_grad(), evaluation_mode(network):
            network(torch.zeros(shape))
    except Exception as error:  # each network has its own kind of refusal
        return error
    return None


def import_package(package: str, network: str) -> ModuleType:
    """Import a package for a network's name.

    Raises:
        ImportError: The package is not installed, or it or torchvision does not load; in one line, with the command that helps.
    """
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"network {network!r} needs the package {package}: {EXTRA}")
    if importlib.util.find_spec("torchvision") is not None:  # timm needs it, transformers uses it if it is installed
        _import("torchvision", network)
    return _import(package, network)


def _import(package: str, network: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except Exception as error:  # a torchvision for another torch raises RuntimeError
        version = _version(package)
        advice = _torchvision_advice() if package == "torchvision" else f"{EXTRA}"
        raise ImportError(
            f"network {network!r}: {package} {version} does not load beside torch {torch.__version__} "
            f"({describe_error(error)}): {advice} (KCD_TRACEBACK=1 shows the cause)"
        ) from error


def _torchvision_advice() -> str:
    """Return what to install: the torchvision built for this torch. Its version 0.N+15 goes with torch 2.N."""
    version, _, build = torch.__version__.partition("+")
    major, minor = version.split(".")[:2]
    wanted = f"torchvision==0.{int(minor) + 15}.*" if major == "2" and minor.isdigit() else "torchvision"
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    return f'install the torchvision that is built for it, pip install --force-reinstall --no-deps "{wanted}"{index}'


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(unknown version)"
