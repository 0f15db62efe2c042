"""Adapters for a network that was trained on other images: another normalisation, size or number of channels."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

SCALE, SHIFT = "input_scale", "input_shift"  # names of buffers of the network
# By name: mode of `torch.nn.functional.interpolate`, and whether it can average the pixels that it skips.
INTERPOLATIONS = {"bilinear": ("bilinear", True), "bicubic": ("bicubic", True), "nearest": ("nearest-exact", False)}


class NetworkInput(NamedTuple):
    """The images that a network's weights were trained on. An entry is None if it is unknown."""

    mean: tuple[float, ...] | None = None
    """Networks get (pixels / 255 - mean) / std, with one number per channel."""
    std: tuple[float, ...] | None = None
    """The standard deviation, as `mean`."""
    size: tuple[int, int] | None = None
    """Height and width in pixels."""
    interpolation: str = "bilinear"
    """A key of INTERPOLATIONS: how images are resized to `size`."""


def renormalise(
    network: nn.Module,
    *,
    given: tuple[Sequence[float], Sequence[float]],
    own: tuple[Sequence[float], Sequence[float]],
) -> nn.Module:
    """Make a network accept images normalised differently from those it was trained on.

    The network then first computes (x * std + mean - own_mean) / own_std, where `given` is (mean, std) and `own` is
    (own_mean, own_std). Except for rounding, its output is that for the same pixels normalised with `own`. Layer names
    and `state_dict` do not change. Copies of the network (`copy.deepcopy`) do the same.

    Args:
        network: Takes x `(b, c, ...)`. Modified in place, with a forward pre-hook.
        given: Mean and std of the images that it will receive, each one number per channel, in units of pixels / 255.
            If it has one channel and `own` several, the channel is repeated.
        own: Mean and std of the images that it was trained on, in the same form.

    Returns:
        The network.

    Raises:
        TypeError: The network is a TorchScript module, which takes no hooks.
        ValueError: The tuples differ in length, or the network has already been renormalised.
    """
    _check_takes_hooks(network)
    lengths = [{len(numbers) for numbers in pair} for pair in (given, own)]
    if len(lengths[1]) != 1 or lengths[0] not in (lengths[1], {1}):
        raise ValueError(f"given and own must each have one mean and one std per channel, got {given} and {own}")
    if hasattr(network, SCALE):
        raise ValueError("network has already been renormalised: call renormalise only once")
    (mean, std), (own_mean, own_std) = (
        [torch.tensor(part, dtype=torch.float64) for part in pair] for pair in (given, own)
    )
    # Buffers move with the network and its copies; non-persistent ones are not in the state_dict.
    network.register_buffer(SCALE, (std / own_std).float(), persistent=False)
    network.register_buffer(SHIFT, ((mean - own_mean) / own_std).float(), persistent=False)
    network.register_forward_pre_hook(_renormalise_input)
    return network


def resize_input(network: nn.Module, size: tuple[int, int], interpolation: str = "bilinear") -> nn.Module:
    """Make a network resize its images to the size that it was trained on, or that it requires.

    Images of that size are unchanged. Smaller images are enlarged, and larger ones are averaged (antialiased, as in Pillow)
    unless `interpolation` is "nearest". Proportions are not kept. Layer names and `state_dict` do not change, and copies of
    the network do the same.

    Args:
        network: Takes x `(b, c, height, width)`. Modified in place, with a forward pre-hook.
        size: Height and width in pixels.
        interpolation: "bilinear", "bicubic" or "nearest".

    Returns:
        The network.

    Raises:
        TypeError: The network is a TorchScript module, which takes no hooks.
        ValueError: `interpolation` is unknown, or the network already resizes its images to another size.
    """
    _check_takes_hooks(network)
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")
    found = resizing(network)
    if found is not None and found[0] != tuple(size):
        raise ValueError(f"network already resizes its images to {found[0]}, got {tuple(size)}")
    if found is None:
        network.register_forward_pre_hook(_ResizeInput(tuple(size), interpolation))
    return network


def repeat_channel(network: nn.Module, channels: int) -> nn.Module:
    """Make a network of images with several channels accept images of one channel, which is repeated.

    Args:
        network: Takes x `(b, channels, ...)`. Modified in place, with a forward pre-hook.
        channels: The number of channels that it takes.

    Returns:
        The network.
    """
    network.register_forward_pre_hook(_RepeatChannel(channels))
    return network


def resizing(network: nn.Module) -> tuple[tuple[int, int], str] | None:
    """Return the size and interpolation of `resize_input`; None if it was not called."""
    hooks = [hook for hook in network._forward_pre_hooks.values() if isinstance(hook, _ResizeInput)]
    return (hooks[0].size, hooks[0].interpolation) if hooks else None


def renormalisation(network: nn.Module) -> dict[str, object] | None:
    """Return what `renormalise` (x * scale + shift per channel) and `resize_input` made of a network; None: nothing."""
    changes: dict[str, object] = {}
    if hasattr(network, SCALE):
        changes |= {"scale": getattr(network, SCALE).tolist(), "shift": getattr(network, SHIFT).tolist()}
    if (found := resizing(network)) is not None:
        changes |= {"size": list(found[0]), "interpolation": found[1]}
    return changes or None


def _check_takes_hooks(network: nn.Module) -> None:
    if isinstance(network, torch.jit.ScriptModule):
        raise TypeError("network must be a torch.nn.Module that takes hooks, got a TorchScript module")


def _renormalise_input(network: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *others = arguments
    shape = (-1, *[1] * (x.dim() - 2))
    scale, shift = (getattr(network, name).view(shape).to(x.dtype) for name in (SCALE, SHIFT))
    return (x * scale + shift, *others)


class _ResizeInput:
    """The hook of `resize_input`."""

    def __init__(self, size: tuple[int, int], interpolation: str):
        self.size = size
        self.interpolation = interpolation

    def __call__(self, network: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        x, *others = arguments
        if x.shape[-2:] == self.size:
            return None
        mode, antialias = INTERPOLATIONS[self.interpolation]
        return (functional.interpolate(x, self.size, mode=mode, antialias=antialias), *others)


class _RepeatChannel:
    """The hook of `repeat_channel`."""

    def __init__(self, channels: int):
        self.channels = channels

    def __call__(self, network: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        x, *others = arguments
        return (x.expand(-1, self.channels, *x.shape[2:]), *others) if x.shape[1] == 1 else None
