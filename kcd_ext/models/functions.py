"""Functions of the user that return a network: which arguments they get, by their signature."""

import inspect
import re
from collections.abc import Iterator, Mapping

from torch import nn

from ..describe import join_names
from ..registry import call, resolve

CLASSES, CHANNELS = "num_classes", ("in_channels", "in_chans")
TAKES = "num_classes and in_channels (or in_chans), num_classes alone, or nothing"
UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def call_function(name: str, registry: Mapping[str, str], in_channels: int, num_classes: int) -> object:
    """Return what the function of a network returns, with as many of the two numbers as it takes.

    Numbers are passed by the names `num_classes`, `in_channels` and `in_chans`. One or two required parameters with other
    names get `num_classes`, then `in_channels`. A function with `**options` gets what it accepts.

    Args:
        name: A key of `registry`, or `module:function`; a class counts as a function.
        registry: Maps short names to `module:function`.
        in_channels: Channels of the images.
        num_classes: Number of logits.

    Raises:
        TypeError: The function takes other arguments; names those that were tried.
        ValueError: As `kcd_ext.registry.call`.
    """
    function = resolve("model", name, registry)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # not callable, or without a signature
        signature = None
    if signature is None:
        return call("model", name, registry, in_channels=in_channels, num_classes=num_classes)
    numbers = {CLASSES: num_classes, **dict.fromkeys(CHANNELS, in_channels)}
    attempts = [*_attempts(signature, numbers)]
    for position, (arguments, options) in enumerate(attempts):
        try:
            signature.bind(*arguments, **options)
        except TypeError as error:
            took = join_names(signature.parameters) or "nothing"
            raise TypeError(f"model {name!r} must take {TAKES}, but it takes {took}: {error}") from error
        try:
            return call("model", name, registry, *arguments, **options)
        except TypeError as error:  # **options, of which the function passes on what another one refuses
            refused = UNEXPECTED.search(str(error))
            if refused is None or refused[1] not in options or refused[1] in signature.parameters:
                raise
            if position == len(attempts) - 1:
                tried = "; ".join(
                    ", ".join(f"{key}={value}" for key, value in options.items()) for _, options in attempts
                )
                raise TypeError(f"model {name!r} must take {TAKES}: it refused {tried}: {error}") from error
    raise AssertionError("there is at least one attempt")


def _attempts(
    signature: inspect.Signature, numbers: Mapping[str, int]
) -> Iterator[tuple[tuple[int, ...], dict[str, int]]]:
    """Yield positional and keyword arguments to call a function with, the most specific first."""
    parameters = signature.parameters.values()
    named = [parameter.name for parameter in parameters if parameter.kind in _NAMED]
    channels = next((name for name in CHANNELS if name in named), None)
    options = {name: numbers[name] for name in (channels, CLASSES) if name in named}
    required = [p for p in parameters if p.default is p.empty and p.kind in _POSITIONAL and p.name not in options]
    if required and not options and len(required) <= 2:
        yield (numbers[CLASSES], numbers[CHANNELS[0]])[: len(required)], {}
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        for name in CHANNELS if channels is None else ():
            yield (), {name: numbers[name], CLASSES: numbers[CLASSES], **options}
        yield (), {CLASSES: numbers[CLASSES], **options}
    yield (), options


def check_module(name: str, network: object) -> nn.Module:
    """Return the network. Raises TypeError unless it is a `torch.nn.Module`."""
    if not isinstance(network, nn.Module):
        raise TypeError(f"model {name!r} must return a torch.nn.Module, got {type(network).__name__}")
    return network
