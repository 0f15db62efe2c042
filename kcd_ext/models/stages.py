"""What a network sees on its way to the logits, by stages, for losses on features (`kcd_ext.models.features`)."""

from collections.abc import Callable
from contextlib import ExitStack

from torch import Tensor, nn


def features(network: nn.Module, x: Tensor) -> list[Tensor]:
    """One forward pass: the feature map of every stage, the pooled vector and the logits, all differentiable.

    Args:
        network: has `stages`, a tuple of the paths (`network.get_submodule(path)`) of the modules whose outputs are the
            feature maps, in the order in which they run, and ends in a `torch.nn.Linear`. Every network of this package
            has, by itself: not what torch.compile or a wrapper for several processes makes of it. Whether a map is
            before or after an activation is said where its network is.
        x: (b, c, h, w) images.

    Returns:
        A map (b, channels, height, width) for each stage, the (b, width) input of the last linear layer, the
        (b, classes) output of the network. They are the tensors that flow on, not copies.

    Raises:
        TypeError: the network has no `stages`, or no linear layer.
        ValueError: the stages and then the linear layer did not run once each, in that order.
    """
    name = type(network).__name__
    if not hasattr(network, "stages"):
        raise TypeError(f"network must have stages, the paths of the modules that end one, got {name} without them")
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise TypeError(f"network must end in a torch.nn.Linear, got {name} without any")
    seen: list[tuple[str, Tensor]] = []
    with ExitStack() as hooks:  # takes the hooks off, also when the forward pass fails
        for path in network.stages:
            hooks.enter_context(network.get_submodule(path).register_forward_hook(_output(seen, path)))
        hooks.enter_context(network.get_submodule(linear[-1]).register_forward_pre_hook(_input(seen, linear[-1])))
        logits = network(x)
    ran, expected = [path for path, _ in seen], [*network.stages, linear[-1]]
    if ran != expected:
        raise ValueError(f"the stages and the last linear layer of {name} must run as {expected}, got {ran}")
    return [*(tensor for _, tensor in seen), logits]


def _output(seen: list[tuple[str, Tensor]], path: str) -> Callable[..., None]:
    return lambda module, inputs, output: seen.append((path, output))


def _input(seen: list[tuple[str, Tensor]], path: str) -> Callable[..., None]:
    return lambda module, inputs: seen.append((path, inputs[0]))
