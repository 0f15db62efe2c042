"""Optimizers by name, with their usual learning rate and weight decay."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..describe import describe, describe_error, one_line
from ..import_path import resolving
from ..registry import resolve

if TYPE_CHECKING:
    from .recipe import Recipe

SGD_LR, ADAPTIVE_LR = 0.05, 1e-3
SGD_WEIGHT_DECAY, ADAMW_WEIGHT_DECAY = 5e-4, 0.05


@dataclass(frozen=True)
class OptimizerKind:
    """A kind of optimizer."""

    build: Callable[[Sequence[nn.Parameter], float, "Recipe"], torch.optim.Optimizer]
    """(parameters, learning rate, recipe) -> the optimizer."""
    lr: float
    """The learning rate of a recipe that gives none."""
    weight_decay: float | None
    """The weight decay of a recipe that gives none. None: the optimizer's own."""
    options: tuple[str, ...]
    """The recipe's fields, besides `lr`, that the optimizer uses."""


def sgd(
    parameters: Sequence[nn.Parameter], lr: float, momentum: float = 0.9, weight_decay: float = SGD_WEIGHT_DECAY
) -> torch.optim.Optimizer:
    """Return stochastic gradient descent. The L2 penalty covers all parameters."""
    return torch.optim.SGD(parameters, lr, momentum=momentum, weight_decay=weight_decay)


def adamw(parameters: Sequence[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return AdamW. Parameters of one dimension (biases, scales of normalisation layers) do not decay."""
    decays = {
        weight_decay: [parameter for parameter in parameters if parameter.dim() > 1],
        0.0: [parameter for parameter in parameters if parameter.dim() <= 1],
    }
    if not weight_decay:
        decays = {0.0: [*parameters]}
    groups = [{"params": members, "weight_decay": decay} for decay, members in decays.items() if members]
    return torch.optim.AdamW(groups, lr)


def _call_function(parameters: Sequence[nn.Parameter], lr: float, recipe: "Recipe") -> torch.optim.Optimizer:
    """Return the optimizer of the function that the recipe names.

    Raises:
        TypeError, ValueError: The function does not exist or fails, or the result does not train exactly these parameters.
    """
    name = recipe.optimizer
    function = resolve("optimizer", name, {})
    if not callable(function):
        raise TypeError(f"optimizer {name!r} must be callable, got {describe(function)}")
    try:
        with resolving():
            optimizer = function([*parameters], lr=lr)
    except Exception as error:  # the function is the user's and may raise anything
        raise ValueError(f"optimizer {name!r} called with parameters and lr={lr}: {describe_error(error)}") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer {name!r} must return a torch.optim.Optimizer, got {describe(optimizer)}")
    given, trained = {*map(id, parameters)}, [*map(id, parameters_of(optimizer))]
    if given != {*trained}:
        raise ValueError(
            f"optimizer {name!r} must train the {len(given)} parameters that it gets, but it trains "
            f"{len(given.intersection(trained))} of them and {len({*trained} - given)} others"
        )
    return optimizer


OPTIMIZERS = {
    "sgd": OptimizerKind(
        lambda parameters, lr, recipe: sgd(parameters, lr, recipe.momentum, recipe.weight_decay),
        SGD_LR,
        SGD_WEIGHT_DECAY,
        ("momentum", "weight_decay"),
    ),
    "adamw": OptimizerKind(
        lambda parameters, lr, recipe: adamw(parameters, lr, recipe.weight_decay),
        ADAPTIVE_LR,
        ADAMW_WEIGHT_DECAY,
        ("weight_decay",),
    ),
}
FUNCTION = OptimizerKind(_call_function, ADAPTIVE_LR, None, ())  # of `module:function`


def kind_of(name: str) -> OptimizerKind:
    """Return the kind of a recipe's `optimizer`: a name in OPTIMIZERS, or `module:function`."""
    return OPTIMIZERS.get(name, FUNCTION)


def check_optimizer(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Take a step with an optimizer of `module:function`, and check that a checkpoint can hold its state.

    The optimizers in OPTIMIZERS pass unchecked. The step changes the parameters.

    Raises:
        ValueError: The step fails, or the state has other types than tensors, numbers, strings and containers of them.
    """
    if name in OPTIMIZERS:
        return
    try:
        optimizer.step()
    except Exception as error:  # the optimizer is the user's and may raise anything
        raise ValueError(f"optimizer {name!r} fails in a step: {describe_error(error)}") from error
    content = io.BytesIO()
    try:
        torch.save(optimizer.state_dict(), content)
        torch.load(io.BytesIO(content.getvalue()), weights_only=True)
    except Exception as error:  # pickle raises many kinds
        raise ValueError(f"optimizer {name!r} has a state that a checkpoint cannot hold: {one_line(error)}") from error


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters of an optimizer in the order of its state_dict."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
