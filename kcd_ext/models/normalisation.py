"""Adapters for a network that was trained on differently normalised images."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

SCALE, SHIFT = "input_scale", "input_shift"  # names of buffers of the network


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
        own: Mean and std of the images that it was trained on, in the same form.

    Returns:
        The network.

    Raises:
        TypeError: The network is a TorchScript module, which takes no hooks.
        ValueError: The tuples differ in length, or the network has already been renormalised.
    """
    if isinstance(network, torch.jit.ScriptModule):
        raise TypeError("network must be a torch.nn.Module that takes hooks, got a TorchScript module")
    lengths = {len(numbers) for pair in (given, own) for numbers in pair}
    if len(lengths) != 1:
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


def renormalisation(network: nn.Module) -> dict[str, list[float]] | None:
    """Return scale and shift per channel of `renormalise`, x * scale + shift; None if it was not called."""
    if not hasattr(network, SCALE):
        return None
    return {"scale": getattr(network, SCALE).tolist(), "shift": getattr(network, SHIFT).tolist()}


def _renormalise_input(network: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *others = arguments
    shape = (-1, *[1] * (x.dim() - 2))
    scale, shift = (getattr(network, name).view(shape).to(x.dtype) for name in (SCALE, SHIFT))
    return (x * scale + shift, *others)
