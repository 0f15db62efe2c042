"""Networks by name."""

from torch import nn

from ..registry import call

REGISTRY = {
    "cnn_large": "kcd_ext.models.cnn:cnn_large",
    "cnn_small": "kcd_ext.models.cnn:cnn_small",
}


def build(name: str, *, in_channels: int, num_classes: int) -> nn.Module:
    """The network called `name` (a key of REGISTRY, or `module:function`), with fresh weights from torch's generator.

    A `module:function` is called with the same two keyword arguments.

    Raises:
        ValueError: the name is unknown, or the function fails.
        TypeError: the function does not take these arguments, or gives no `torch.nn.Module`.
    """
    model = call("model", name, REGISTRY, in_channels=in_channels, num_classes=num_classes)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model {name!r} must give a torch.nn.Module, got {type(model).__name__}")
    return model


__all__ = ["REGISTRY", "build"]
