"""A network that was trained on images of one normalisation, for images of another."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

SCALE, SHIFT = "input_scale", "input_shift"  # buffers of the network


def renormalise(
    network: nn.Module,
    *,
    given: tuple[Sequence[float], Sequence[float]],
    own: tuple[Sequence[float], Sequence[float]],
) -> nn.Module:
    """Lets a network take images that are normalised otherwise than those it was trained on.

    From then on it computes its function of (x * std + mean - own_mean) / own_std, where `given` is (mean, std) of x and
    `own` (own_mean, own_std): equal, but for rounding, to what it gives for the same pixels normalised by `own`. Names of
    its layers and its `state_dict` stay as they are, and copies of the network (`copy.deepcopy`) do the same.

    Args:
        network: takes x (b, c, ...). It is changed in place, by a hook before its forward pass.
        given, own: a number for each of c channels, in units of pixels / 255.

    Returns:
        The network.

    Raises:
        TypeError: the network is of TorchScript, which takes no hooks.
        ValueError: the numbers are not equally many, or the network has been renormalised already.
    """
    if isinstance(network, torch.jit.ScriptModule):
        raise TypeError("network must be a torch.nn.Module that takes hooks, got one of TorchScript")
    lengths = {len(numbers) for pair in (given, own) for numbers in pair}
    if len(lengths) != 1:
        raise ValueError(f"given and own must hold a number for every channel each, got {given} and {own}")
    if hasattr(network, SCALE):
        raise ValueError("network has been renormalised already: renormalise it once, from what it is given")
    (mean, std), (own_mean, own_std) = (
        [torch.tensor(part, dtype=torch.float64) for part in pair] for pair in (given, own)
    )
    # Buffers move with the network and with copies of it; those that are not persistent are in no state_dict.
    network.register_buffer(SCALE, (std / own_std).float(), persistent=False)
    network.register_buffer(SHIFT, ((mean - own_mean) / own_std).float(), persistent=False)
    network.register_forward_pre_hook(_renormalised)
    return network


def renormalisation(network: nn.Module) -> dict[str, list[float]] | None:
    """Return what `renormalise` makes of the input, x * scale + shift, a number for each channel; None: it was not called."""
    if not hasattr(network, SCALE):
        return None
    return {"scale": getattr(network, SCALE).tolist(), "shift": getattr(network, SHIFT).tolist()}


def _renormalised(network: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *others = arguments
    shape = (-1, *[1] * (x.dim() - 2))
    scale, shift = (getattr(network, name).view(shape).to(x.dtype) for name in (SCALE, SHIFT))
    return (x * scale + shift, *others)
