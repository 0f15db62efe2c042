"""Networks by name: two small ones, and those of RepDistiller's CIFAR-100 comparison, on which KCD is measured.

`features(network, x)` returns what such a network computes: the feature map of every stage, the pooled vector, the logits.
"""

import inspect

from torch import nn

from ..registry import call, resolve
from .normalisation import renormalise
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


def build(name: str, *, in_channels: int, num_classes: int) -> nn.Module:
    """Return a new network, initialised from torch's generator.

    Args:
        name: A key of REGISTRY or ALIASES, or `module:function`, which is called with the same two keyword arguments.
        in_channels: Channels of the images.
        num_classes: Number of logits.

    Raises:
        ValueError: The name is unknown, or the function fails.
        TypeError: The function does not take these arguments, or does not return a `torch.nn.Module`.
    """
    arguments = {"in_channels": in_channels, "num_classes": num_classes}
    try:
        signature = inspect.signature(resolve("model", canonical(name), REGISTRY))
    except (TypeError, ValueError):  # not callable, or without a signature
        signature = None
    if signature is not None:
        try:
            signature.bind(**arguments)
        except TypeError as error:
            raise TypeError(f"model {name!r} must take in_channels= and num_classes=: {error}") from error
    model = call("model", canonical(name), REGISTRY, **arguments)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model {name!r} must return a torch.nn.Module, got {type(model).__name__}")
    return model


__all__ = ["ALIASES", "REGISTRY", "build", "canonical", "features", "renormalise"]
