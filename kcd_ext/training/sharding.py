"""Parameters that lie in pieces on several processes (FSDP): whole for a checkpoint, in pieces again for training."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(network: nn.Module) -> bool:
    """Whether it came from `torch.distributed.fsdp.fully_shard`."""
    return any(isinstance(module, FSDPModule) for module in network.modules())


def reshard(network: nn.Module) -> None:
    """Cuts what a forward pass has put together, and left so at the root, into pieces again: those are trained."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This process's piece of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(state: object) -> object:
    """A state_dict without pieces. Every process must call it."""
    if isinstance(state, DTensor):
        return state.full_tensor()
    if isinstance(state, Mapping):
        return {name: whole(part) for name, part in state.items()}
    return state


def in_pieces_of(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state`, whole, cut as the tensors of the same names in `own` are."""
    return {name: pieces_as(own[name], tensor) if name in own else tensor for name, tensor in state.items()}


def pieces_as(own: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, whole, cut as `own` is."""
    if not isinstance(own, DTensor) or own.shape != tensor.shape:
        return tensor
    return distribute_tensor(tensor.to(own.device, own.dtype), own.device_mesh, own.placements)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Over all processes, for parameters that nothing else averages."""
    for parameter in parameters:
        if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= torch.distributed.get_world_size()
