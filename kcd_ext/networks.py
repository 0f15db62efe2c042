"""Calls of networks: in torch's default modes, independent of the caller's, and for the logits only."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

MAX_LISTED = 5  # keys or elements that an error lists


@contextmanager
def usual_modes() -> Iterator[None]:
    """Reset torch's modes inside the context: gradients on, no autocast, no inference mode, default dtype and device.

    The caller's modes return at the end. Casts of weights in the caller's autocast cache are dropped, because the weights may have
    changed.
    """
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.callback(torch.clear_autocast_cache)
                stack.enter_context(torch.autocast(device, enabled=False))
        torch.set_autocast_cache_enabled(True)
        yield


def forward_flops(network: nn.Module, x: Tensor) -> int:
    """Return the FLOPs of the convolutions and matrix products for `x`. A multiply-add counts 2."""
    with evaluation_mode(network), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.to(x.device)(x)
    return counter.get_total_flops()


class OutputError(ValueError):
    """An error for a network that does not return logits (b, classes)."""


def check_network(name: str, network: object) -> None:
    """Raise TypeError unless `network` is a torch.nn.Module."""
    if not isinstance(network, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(network).__name__}")


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode inside the context, and restore the mode of each module afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _ScriptWrapper(nn.Module):
    """A wrapper of a TorchScript network that accepts hooks."""

    def __init__(self, network: torch.jit.ScriptModule):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def hookable(network: nn.Module) -> nn.Module:
    """Return the network, wrapped if it is TorchScript, so that hooks can be registered."""
    return _ScriptWrapper(network) if isinstance(network, torch.jit.ScriptModule) else network


class LogitsOnly:
    """A forward hook that reduces the output of a network to its logits.

    - A mapping or an object with `logits` (a `ModelOutput` of transformers, a named tuple of torchvision) is reduced to these.
    - Another tuple or list is reduced to its first element.
    - Calls with several arguments are not changed: a caller who passes options expects the output that they request.

    Copies of the network share the hook until it is removed; pickles do not include it.

    Args:
        name: Name of the network in errors and warnings: student or teacher.
        network: Any module.

    Raises:
        TypeError: `network` is not a `torch.nn.Module`.
        OutputError: The output of a later call contains no logits (b, classes).
    """

    def __init__(self, name: str, network: nn.Module):
        check_network(name, network)
        self.name = name
        self.network = hookable(network)  # call this module
        self.acts_in = {True, False}  # the values of `network.training` for which outputs are replaced
        self.found: dict[bool, str] = {}  # descriptions of outputs that are more than logits, by `training`
        self._hook = self.network.register_forward_hook(self, with_kwargs=True)

    def __call__(self, network: nn.Module, arguments: tuple, options: dict, output: object) -> Tensor | None:
        if self._hook is None or len(arguments) != 1 or options:
            return None
        if isinstance(output, Tensor) and output.dim() == 2:
            return None
        training = network.network.training if isinstance(network, _ScriptWrapper) else network.training
        logits, place = logits_in(output)
        self.found[training] = f"{_describe_output(output)}{_mode(training)}: {place}"
        if training not in self.acts_in:
            return None
        if logits is None or logits.dim() != 2:
            shape = "" if logits is None or logits is output else f", {place} of shape {tuple(logits.shape)}"
            raise OutputError(
                f"{self.name} must give logits (b, classes), got {_describe_output(output)}{shape}{_mode(training)}"
            )
        return logits

    def restrict_to_found_modes(self) -> bool:
        """Restrict the hook to the modes in which the network returned more than logits. Return whether one is new."""
        previous, self.acts_in = self.acts_in, set(self.found)
        return not self.acts_in <= previous

    def report(self) -> None:
        """Warn about ignored outputs, once. Evaluation mode takes precedence if both modes have some."""
        for mode in sorted(self.acts_in & self.found.keys())[:1]:
            warnings.warn(
                f"{self.name} gives {self.found[mode]} is used as the logits, the rest is ignored",
                UserWarning,
                stacklevel=4,
            )

    def remove(self) -> None:
        """Remove the hook. The network and its copies return their full outputs again."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def __deepcopy__(self, memo: dict) -> "LogitsOnly":
        return self

    def __reduce__(self):
        return no_hook, ()


@contextmanager
def logits_only(name: str, network: nn.Module) -> Iterator[LogitsOnly]:
    """Register a `LogitsOnly` hook inside the context."""
    hook = LogitsOnly(name, network)
    try:
        yield hook
    finally:
        hook.remove()


def logits_in(output: object) -> tuple[Tensor | None, str]:
    """Return the logits in an output, or None, and the description of the part they come from."""
    if isinstance(output, Tensor):
        return output, "it"
    if isinstance(output, Mapping):
        found, place = output.get("logits"), "its 'logits'"
    elif hasattr(output, "logits"):
        found, place = output.logits, "its 'logits'"
    else:
        found, place = output[0] if isinstance(output, tuple | list) and output else None, "its first element"
    return found if isinstance(found, Tensor) else None, place


def _describe_output(output: object) -> str:
    if isinstance(output, Tensor):
        return str(tuple(output.shape))
    kind = type(output).__name__
    if isinstance(output, Mapping):
        keys = [*map(repr, output)]
        return (
            f"a {kind} with {', '.join(keys[:MAX_LISTED]) or 'nothing'}{' and more' if len(keys) > MAX_LISTED else ''}"
        )
    if isinstance(output, tuple | list):
        kinds = [type(part).__name__ for part in output[:MAX_LISTED]]
        return f"a {kind} of {', '.join(kinds) or 'nothing'}{' and more' if len(output) > MAX_LISTED else ''}"
    return f"a {kind}"


def _mode(training: bool) -> str:
    return " in training mode" if training else " in evaluation mode"


def no_hook() -> Callable[..., None]:
    """Return the no-op hook that pickles and copies of a network carry instead of a hook of this package."""
    return _do_nothing


def _do_nothing(network: nn.Module, *_: object) -> None:
    pass
