"""How networks are called: in torch's usual modes, whatever the caller's are, and for their logits alone."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

SHOWN = 5  # keys of a mapping that an error lists


@contextmanager
def usual_modes() -> Iterator[None]:
    """Record gradients inside the context, with autocast, inference mode, default dtype and default device as torch has them.

    The caller's modes return at its end. The casts of weights that the caller's autocast has cached are dropped: the
    weights may have changed.
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
    """Return the floating-point operations of convolutions and matrix products for `x`, 2 a multiply-add."""
    with evaluation_mode(network), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.to(x.device)(x)
    return counter.get_total_flops()


class OutputError(ValueError):
    """A network gave no logits (b, classes)."""


def check_network(name: str, network: object) -> None:
    """Raise TypeError for what is no module."""
    if not isinstance(network, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(network).__name__}")


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put the network into evaluation mode; at the end every module of it is in the mode it was in."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Scripted(nn.Module):
    """A TorchScript network, as a module that takes hooks."""

    def __init__(self, network: torch.jit.ScriptModule):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def hookable(network: nn.Module) -> nn.Module:
    """Return the network itself, or a module around it where it is of TorchScript."""
    return _Scripted(network) if isinstance(network, torch.jit.ScriptModule) else network


class LogitsAlone:
    """A forward hook through which a network that gives more than logits gives the logits alone.

    Of a mapping or an object with `logits` (a `ModelOutput` of transformers, the named tuples of torchvision) these are
    taken, of another tuple or list the first element. Calls with more than one argument are left alone: a caller who passes
    options expects what they ask for. Copies of the network share the hook while it is there; pickles do not have it.

    Args:
        name: what to call the network in errors and warnings: student or teacher.
        network: any module.

    Raises:
        TypeError: `network` is no `torch.nn.Module`.
        OutputError: (when the network is called) there are no logits (b, classes) in what it gives.
    """

    def __init__(self, name: str, network: nn.Module):
        check_network(name, network)
        self.name = name
        self.network = hookable(network)  # what is to be called
        self.acts_in = {True, False}  # the values of `training` in which outputs are replaced
        self.found: dict[bool, str] = {}  # what the network gave that is no logits, by `training`
        self._hook = self.network.register_forward_hook(self, with_kwargs=True)

    def __call__(self, network: nn.Module, arguments: tuple, options: dict, output: object) -> Tensor | None:
        if self._hook is None or len(arguments) != 1 or options:
            return None
        if isinstance(output, Tensor) and output.dim() == 2:
            return None
        training = network.network.training if isinstance(network, _Scripted) else network.training
        logits, place = _logits_in(output)
        self.found[training] = f"{_described(output)}{_mode(training)}: {place}"
        if training not in self.acts_in:
            return None
        if logits is None or logits.dim() != 2:
            shape = "" if logits is None or logits is output else f", {place} of shape {tuple(logits.shape)}"
            raise OutputError(
                f"{self.name} must give logits (b, classes), got {_described(output)}{shape}{_mode(training)}"
            )
        return logits

    def act_where_found(self) -> bool:
        """Act from now on where the network gave more than logits, in no other mode; return whether one is new."""
        before, self.acts_in = self.acts_in, set(self.found)
        return not self.acts_in <= before

    def report(self) -> None:
        """Warn of what is left out; of the evaluation mode, if the network gives more there too."""
        for mode in sorted(self.acts_in & self.found.keys())[:1]:
            warnings.warn(
                f"{self.name} gives {self.found[mode]} is used as the logits, all else is left out",
                UserWarning,
                stacklevel=4,
            )

    def remove(self) -> None:
        """Take the hook off. Copies of the network, too, give everything again."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def __deepcopy__(self, memo: dict) -> "LogitsAlone":
        return self

    def __reduce__(self):
        return no_hook, ()


@contextmanager
def logits_alone(name: str, network: nn.Module) -> Iterator[LogitsAlone]:
    """Put a `LogitsAlone` on the network until the context ends."""
    hook = LogitsAlone(name, network)
    try:
        yield hook
    finally:
        hook.remove()


def _logits_in(output: object) -> tuple[Tensor | None, str]:
    """Return the logits in what a network gives, if there are any, and which part of it they are."""
    if isinstance(output, Tensor):
        return output, "it"
    if isinstance(output, Mapping):
        found, place = output.get("logits"), "its 'logits'"
    elif hasattr(output, "logits"):
        found, place = output.logits, "its 'logits'"
    else:
        found, place = output[0] if isinstance(output, tuple | list) and output else None, "its first element"
    return found if isinstance(found, Tensor) else None, place


def _described(output: object) -> str:
    if isinstance(output, Tensor):
        return str(tuple(output.shape))
    kind = type(output).__name__
    if isinstance(output, Mapping):
        keys = [*map(repr, output)]
        return f"a {kind} with {', '.join(keys[:SHOWN]) or 'nothing'}{' and more' if len(keys) > SHOWN else ''}"
    if isinstance(output, tuple | list):
        kinds = [type(part).__name__ for part in output[:SHOWN]]
        return f"a {kind} of {', '.join(kinds) or 'nothing'}{' and more' if len(output) > SHOWN else ''}"
    return f"a {kind}"


def _mode(training: bool) -> str:
    return " in training mode" if training else " in evaluation mode"


def no_hook() -> Callable[..., None]:
    """Return what pickles and copies of a network carry in place of a hook of this package: one that does nothing."""
    return _leave_alone


def _leave_alone(network: nn.Module, *_: object) -> None:
    pass
