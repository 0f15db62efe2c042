"""Networks by name: this package's, those of timm, torchvision and transformers by a prefix, and functions of the user.

This package has two small networks, and those of RepDistiller's CIFAR-100 comparison, on which KCD is measured.

`features(network, x)` returns what such a network computes: the feature map of every stage, the pooled vector, the logits.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from .functions import call_function, check_module
from .libraries import library_network
from .normalisation import NetworkInput, renormalise, repeat_channel, resize_input, resizing
from .stages import features

REGISTRY = {
    "cnn_large": "kcd_ext.models.cnn:cnn_large",
    "cnn_small": "kcd_ext.models.cnn:cnn_small",
    "mobilenet_v2": "kcd_ext.models.mobilenet_v2:mobilenet_v2",
    "resnet110": "kcd_ext.models.resnet:resnet110",
    "resnet14": "kcd_ext.models.resnet:resnet14",
    "resnet20": "kcd_ext.models.resnet:resnet20",
    "resnet32": "kcd_ext.models.resnet:resnet32",
    "resnet32x4": "kcd_ext.models.resnet:resnet32x4",
    "resnet44": "kcd_ext.models.resnet:resnet44",
    "resnet50": "kcd_ext.models.resnet50:resnet50",
    "resnet56": "kcd_ext.models.resnet:resnet56",
    "resnet8": "kcd_ext.models.resnet:resnet8",
    "resnet8x4": "kcd_ext.models.resnet:resnet8x4",
    "shufflenet_v1": "kcd_ext.models.shufflenet_v1:shufflenet_v1",
    "shufflenet_v2": "kcd_ext.models.shufflenet_v2:shufflenet_v2",
    "vgg11": "kcd_ext.models.vgg:vgg11",
    "vgg13": "kcd_ext.models.vgg:vgg13",
    "vgg16": "kcd_ext.models.vgg:vgg16",
    "vgg19": "kcd_ext.models.vgg:vgg19",
    "vgg8": "kcd_ext.models.vgg:vgg8",
    "wrn_16_1": "kcd_ext.models.wide_resnet:wrn_16_1",
    "wrn_16_2": "kcd_ext.models.wide_resnet:wrn_16_2",
    "wrn_40_1": "kcd_ext.models.wide_resnet:wrn_40_1",
    "wrn_40_2": "kcd_ext.models.wide_resnet:wrn_40_2",
}
# RepDistiller's names of those of its 22 networks that have another name here.
ALIASES = {
    "MobileNetV2": "mobilenet_v2",
    "ResNet50": "resnet50",
    "ShuffleV1": "shufflenet_v1",
    "ShuffleV2": "shufflenet_v2",
}


def canonical(name: str) -> str:
    """Return the key of REGISTRY that an alias stands for, or any other name unchanged."""
    return ALIASES.get(name, name) if isinstance(name, str) else name


def build(
    name: str,
    *,
    in_channels: int,
    num_classes: int,
    image_size: tuple[int, int] | None = None,
    config: Mapping[str, object] | None = None,
) -> nn.Module:
    """Return a new network, initialised from torch's generator.

    Args:
        name: One of

            - a key of REGISTRY or ALIASES.
            - `timm:NAME`, `torchvision:NAME` or `hf:FOLDER_OR_NAME`, a classifier of timm, torchvision or transformers. It has
              no pretrained weights (`pretrained_weights` reads those of an `hf:` folder). A network of three channels repeats
              the one of grey images. An `hf:` network returns its logits.
            - `module:function`, a function or class that returns a network. It is called with `num_classes` and
              `in_channels` (or `in_chans`), with `num_classes`, or with nothing, as its signature says.
        in_channels: Channels of the images.
        num_classes: Number of logits.
        image_size: Height and width of the images. A network of timm, torchvision or transformers that cannot take them
            resizes them to its own size (`resize_input`). None: it takes them as they are.
        config: The result of `config(name)` when the network was first built; None: it is read again.

    Raises:
        ValueError: The name is unknown, the network takes no such images, or the function fails.
        TypeError: The function does not take these arguments, or does not return a `torch.nn.Module`.
        ImportError: The network's package is not installed or does not load.
        OSError: A file of an `hf:` folder cannot be read.
    """
    library = library_network(name, config)
    if library is not None:
        return library.build(in_channels, num_classes, image_size)
    return check_module(name, call_function(canonical(name), REGISTRY, in_channels, num_classes))


def config(name: str) -> dict[str, object] | None:
    """Return all that `build` needs besides the name, as JSON: the configuration of an `hf:` network. None for all others.

    Store it beside the name. Then `build` needs no folder, also on another machine.
    """
    library = library_network(name)
    return None if library is None else library.config()


def network_input(name: str) -> NetworkInput | None:
    """Return the images that the published weights of a `timm:`, `torchvision:` or `hf:` network were trained on.

    An entry is None if it is unknown. None: the name has none of these prefixes. Raises as `build` does.
    """
    library = library_network(name)
    return None if library is None else library.network_input()


def pretrained_weights(name: str) -> Mapping[str, Tensor] | None:
    """Return the weights in the folder of an `hf:` network, by name; None if the name has none. Raises as `build` does."""
    library = library_network(name)
    return None if library is None else library.weights()


__all__ = [
    "ALIASES",
    "REGISTRY",
    "NetworkInput",
    "build",
    "canonical",
    "config",
    "features",
    "network_input",
    "pretrained_weights",
    "renormalise",
    "repeat_channel",
    "resize_input",
    "resizing",
]
