"""The memory layout of a network's tensors: channels-last while it is trained, as it came afterwards."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .distributed import is_sharded


class Layout:
    """The strides of a network's parameters and buffers, tensor by tensor, so that they can be restored.

    Nothing of a sharded network is changed.
    """

    def __init__(self, network: nn.Module):
        self._network = network
        self._strides = {name: (x.shape, x.stride()) for name, x in _tensors(network) if not is_expanded(x)}

    def to_channels_last(self) -> bool:
        """Put a pixel's channels side by side in all tensors of four dimensions; return whether that changed any."""
        changed = False
        for _, tensor in _tensors(self._network):
            if tensor.dim() == 4 and not is_expanded(tensor):
                converted = tensor.data.to(memory_format=torch.channels_last)
                if converted.stride() != tensor.stride():
                    tensor.data, changed = converted, True
        return changed

    def restore(self) -> None:
        """Give every tensor the strides that it had; keep its values."""
        for name, tensor in _tensors(self._network):
            shape, stride = self._strides.get(name, (None, None))
            if shape == tensor.shape and stride != tensor.stride():
                former = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)
                tensor.data = former.copy_(tensor.data)


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    if is_sharded(network):
        return
    for named in (network.named_parameters, network.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            if not is_lazy(tensor) and is_dense(tensor) and not tensor.is_inference():
                yield name, tensor


def is_dense(tensor: Tensor) -> bool:
    """Return whether it has strides and is neither quantized nor nested."""
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested


def is_expanded(tensor: Tensor) -> bool:
    """Return whether several elements share a place in memory: no copy could have such strides again."""
    if not is_dense(tensor):
        return False
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
