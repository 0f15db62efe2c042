"""Feature maps of a network by stage, for losses on features (`kcd_ext.models.features`)."""

from collections.abc import Callable
from contextlib import ExitStack

from torch import Tensor, nn


def features(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Run one forward pass and return the map of every stage, the pooled vector and the logits, all differentiable.

    Args:
        network: A network with `stages` that ends in a `torch.nn.Linear`. `stages` is a tuple of the paths
            (`network.get_submodule(path)`) of the modules whose outputs are the feature maps, in execution order. Every
            network of this package qualifies, but not after torch.compile or in a wrapper for several processes. The
            docstring of each network says whether its maps are before or after the activation.
        x: `(b, c, h, w)` images.

    Returns:
        A map `(b, channels, height, width)` per stage, the `(b, width)` input of the last linear layer, and the
            `(b, classes)` output of the network. These are the tensors that the network computes with, not copies.

    Raises:
        TypeError: The network has no `stages`, or no linear layer.
        ValueError: The stages and then the linear layer did not run once each, in that order.
    """
    name = type(network).__name__
    if not hasattr(network, "stages"):
        raise TypeError(
            f"network must have stages, the paths of the modules that output feature maps, got {name} without them"
        )
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise TypeError(f"network must end in a torch.nn.Linear, got {name} without any")
    seen: list[tuple[str, Tensor]] = []
    with ExitStack() as hooks:  # removes the hooks even if the forward pass fails
        for path in network.stages:
            hooks.enter_context(network.get_submodule(path).register_forward_hook(_record_output(seen, path)))
        hooks.enter_context(
            network.get_submodule(linear[-1]).register_forward_pre_hook(_record_input(seen, linear[-1]))
        )
        logits = network(x)
    ran, expected = [path for path, _ in seen], [*network.stages, linear[-1]]
    if ran != expected:
        raise ValueError(f"the stages and the last linear layer of {name} must run as {expected}, got {ran}")
    return [*(tensor for _, tensor in seen), logits]


def _record_output(seen: list[tuple[str, Tensor]], path: str) -> Callable[..., None]:
    return lambda module, inputs, output: seen.append((path, output))


def _record_input(seen: list[tuple[str, Tensor]], path: str) -> Callable[..., None]:
    return lambda module, inputs: seen.append((path, inputs[0]))
