"""The exponential moving average of a student's weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .distributed import full_state_dict, local_shard, shard_like


class Averages:
    """Exponential moving averages of parameters, updated after every optimizer step.

    The decay of the n-th update is min(decay, n / (9 + n)), as in TensorFlow's `ExponentialMovingAverage`. So the
    initial weights are forgotten in a short run too. Averages have at least the precision of float32. Sharded parameters have
    sharded averages.

    Args:
        decay: The decay of a long run, in (0, 1).
        parameters: The parameters by name. Their values are the first averages.
    """

    def __init__(self, decay: float, parameters: Mapping[str, nn.Parameter]):
        self.decay = decay
        self.updates = 0
        self._parameters = dict(parameters)
        self._averages = {
            name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for name, parameter in parameters.items()
        }

    @property
    def last_decay(self) -> float:
        """The decay of the last update."""
        return min(self.decay, self.updates / (9 + self.updates))

    def update(self) -> None:
        """Move the averages towards the current parameters."""
        averages = [local_shard(average) for average in self._averages.values()]
        current = [local_shard(parameter.detach()) for parameter in self._parameters.values()]
        current = [value.to(average.dtype) for value, average in zip(current, averages, strict=True)]
        self.updates += 1
        get_ema_multi_avg_fn(self.last_decay)(averages, current, self.updates)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Replace the parameters' values by their averages."""
        for name, parameter in self._parameters.items():
            local_shard(parameter).copy_(local_shard(self._averages[name]))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the parameters their averages as values inside the context, and their own values after it."""
        own = [local_shard(parameter.detach()).clone() for parameter in self._parameters.values()]
        self.copy_to_parameters()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters.values(), own, strict=True):
                    local_shard(parameter).copy_(value)

    def state_dict(self) -> dict[str, object]:
        """Return the number of updates and the full averages. Every rank must call this method."""
        return {"updates": self.updates, "averages": full_state_dict(self._averages)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore the state that `state_dict` returned. Raises KeyError, TypeError or RuntimeError if it does not fit."""
        self.updates = state["updates"]
        for name, average in self._averages.items():
            saved: Tensor = state["averages"][name]
            local_shard(average).copy_(local_shard(shard_like(average, saved)))
