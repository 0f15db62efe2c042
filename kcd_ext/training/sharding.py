"""Parameters that lie in pieces on several processes (FSDP): whole for a checkpoint, in pieces again for training."""

import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def _imported(module: str, name: str) -> type | tuple[()]:
    """Return a class of torch's; where its module, which takes half a second, was not imported: what nothing is an instance of."""
    return getattr(sys.modules.get(module), name, ())


def _is_in_pieces(value: object) -> bool:
    return isinstance(value, _imported("torch.distributed.tensor", "DTensor"))


def _is_fsdp(module: nn.Module) -> bool:
    return isinstance(module, _imported("torch.distributed.fsdp", "FSDPModule"))


def is_sharded(network: nn.Module) -> bool:
    """Whether it came from `torch.distributed.fsdp.fully_shard`."""
    return any(_is_fsdp(module) for module in network.modules())


def reshard(network: nn.Module) -> None:
    """Cuts what a forward pass has put together, and left so at the root, into pieces again: those are trained."""
    for module in network.modules():
        if _is_fsdp(module):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This process's piece of it."""
    return tensor.to_local() if _is_in_pieces(tensor) else tensor


def whole(state: object) -> object:
    """A state_dict without pieces. Every process must call it."""
    if _is_in_pieces(state):
        return state.full_tensor()
    if isinstance(state, Mapping):
        return {name: whole(part) for name, part in state.items()}
    return state


def in_pieces_of(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state`, whole, cut as the tensors of the same names in `own` are."""
    return {name: pieces_as(own[name], tensor) if name in own else tensor for name, tensor in state.items()}


def pieces_as(own: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, whole, cut as `own` is."""
    if not _is_in_pieces(own) or own.shape != tensor.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(own.device, own.dtype), own.device_mesh, own.placements)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Over all processes, for parameters that nothing else averages."""
    for parameter in parameters:
        if parameter.grad is not None and not _is_in_pieces(parameter.grad):
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= torch.distributed.get_world_size()
