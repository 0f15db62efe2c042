"""Devices, precision, ranks and shards. The only module that imports accelerate."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from itertools import chain

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..checks import check_device


@contextmanager
def accelerator_on(device: str, mixed_precision: str | None = None) -> Iterator[Accelerator]:
    """Yield an Accelerator on this device that leaves gradient accumulation to the trainer.

    A single process that had no Accelerator before has none afterwards. An Accelerator of the caller accumulates gradients
    afterwards as it did before.

    Args:
        device: `auto` (CUDA if available), `cpu` or `cuda`.
        mixed_precision: `no`, `bf16` or `fp16`. None: the launcher's setting.

    Raises:
        ValueError: The device or precision is not available, or the process has an Accelerator with another one.
    """
    check_device(device)
    requested = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if requested == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' is not available: this torch has no CUDA or finds no driver")
    if requested == "cpu" and mixed_precision == "fp16":
        raise ValueError("precision 'float16' needs CUDA, but the device is cpu: choose bfloat16 or float32")
    is_first = not AcceleratorState._shared_state
    if not is_first and mixed_precision not in (None, AcceleratorState().mixed_precision):
        existing = AcceleratorState().mixed_precision
        raise ValueError(
            f"precision {mixed_precision!r}: this process already has an Accelerator with precision {existing!r}"
        )
    gradients = {name: copy(value) for name, value in GradientState._shared_state.items()}  # all Accelerators share it
    accelerator = Accelerator(
        cpu=requested == "cpu",
        mixed_precision=mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    try:
        if accelerator.device.type != requested:
            raise ValueError(f"device {requested!r}: this process already has an Accelerator on {accelerator.device}")
        yield accelerator
    finally:
        if is_first and accelerator.num_processes == 1:
            AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._shared_state.clear()
        GradientState._shared_state.update(gradients)


@contextmanager
def autocast(accelerator: Accelerator) -> Iterator[None]:
    """Autocast networks to the accelerator's precision inside the context.

    Clears autocast's cache of cast weights at the end. Inside an autocast of the caller the cache would survive the
    optimizer step, and training would continue with the weights of the first step.
    """
    with accelerator.autocast():
        yield
    torch.clear_autocast_cache()


# --- steps on several ranks ---


def prepare(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """Return the module, wrapped for several ranks. A sharded module is returned unchanged: it reduces its own gradients."""
    if is_sharded(module):
        return module
    prepared = accelerator.prepare(module)
    if isinstance(prepared, DistributedDataParallel):
        # Once an epoch is enough for running statistics. Every step would also send a method's memory banks.
        prepared.broadcast_buffers = False
    return prepared


def gradient_sync(accelerator: Accelerator, module: nn.Module, last: bool) -> AbstractContextManager:
    """Return a context that reduces gradients over the ranks only in the last backward pass of a step."""
    skip = not last and accelerator.num_processes > 1 and not is_sharded(module)
    return accelerator.no_sync(module) if skip else nullcontext()


def optimizer_step(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, student: nn.Module, clip_norm: float | None = None
) -> None:
    """Take an optimizer step and clear the gradients. With float16, skip a step whose gradients overflowed.

    With `clip_norm`, all gradients are scaled down by one factor if the norm of all of them together is larger.
    """
    if accelerator.num_processes > 1 and is_sharded(student):
        for parameter in chain.from_iterable(group["params"] for group in optimizer.param_groups):
            if parameter.grad is not None and not _is_shard(parameter.grad):  # FSDP averages only shards
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= accelerator.num_processes
    if clip_norm is not None:
        if accelerator.scaler is not None:
            accelerator.scaler.unscale_(optimizer)
        _clip_gradients(optimizer, clip_norm)
    if accelerator.scaler is None:
        optimizer.step()
    else:
        accelerator.scaler.step(optimizer)
        accelerator.scaler.update()
    optimizer.zero_grad()


def _clip_gradients(optimizer: torch.optim.Optimizer, clip_norm: float) -> None:
    """Scale gradients as `torch.nn.utils.clip_grad_norm_` does. Some may be sharded and others not."""
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    kinds = [[g for g in gradients if _is_shard(g) == sharded] for sharded in (False, True)]
    norms = [full_state_dict(torch.nn.utils.get_total_norm(kind)) for kind in kinds if kind]
    scale = (clip_norm / (torch.nn.utils.get_total_norm(norms) + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local_shard(gradient) for gradient in gradients], scale)


def sum_over_ranks(accelerator: Accelerator, numbers: Iterable[Tensor | float]) -> list[float]:
    """Return the sum of each number over all ranks, in float64. Waits for the device."""
    device = accelerator.device
    numbers = torch.stack([torch.as_tensor(number, dtype=torch.float64, device=device) for number in numbers])
    return accelerator.reduce(numbers, "sum").tolist()


def gather_labels(seen: Iterable[tuple[Tensor, Tensor]], count: int, accelerator: Accelerator) -> Tensor:
    """Return the class of every sample, (count,) int64 on the CPU.

    Args:
        seen: The (index, label) of this rank's batches. Every sample is on one rank; padding repeats have index -1.
        count: The number of samples.
        accelerator: The run's accelerator. Every rank must call this function.
    """
    index, label = map(torch.cat, zip(*seen, strict=True))
    labels = torch.zeros(count, dtype=torch.int64, device=index.device)
    labels[index[index >= 0]] = label[index >= 0]
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(labels)
    return labels.cpu()


def broadcast_buffers(accelerator: Accelerator, module: nn.Module) -> None:
    """Copy rank 0's buffers (running statistics) to every rank. They are then validated, saved and resumed from."""
    if accelerator.num_processes > 1:
        for buffer in module.buffers():
            if not _is_shard(buffer):
                torch.distributed.broadcast(buffer, src=0)


# --- sharded parameters (FSDP): trained in shards, saved in full ---


def _is_instance(value: object, module: str, name: str) -> bool:
    """Return whether `value` is an instance of a torch class, without the half second that importing its module takes."""
    return isinstance(value, getattr(sys.modules.get(module), name, ()))


def _is_shard(value: object) -> bool:
    return _is_instance(value, "torch.distributed.tensor", "DTensor")


def _is_fsdp(module: nn.Module) -> bool:
    return _is_instance(module, "torch.distributed.fsdp", "FSDPModule")


def is_sharded(network: nn.Module) -> bool:
    """Return whether `torch.distributed.fsdp.fully_shard` was applied to the network or to a part of it."""
    return any(map(_is_fsdp, network.modules()))


def reshard(*networks: nn.Module | None) -> None:
    """Free the parameters that a forward pass gathered and the root module kept: only shards are trained."""
    for network in networks:
        for module in () if network is None else network.modules():
            if _is_fsdp(module):
                module.reshard()


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, or the tensor if it is not sharded."""
    return tensor.to_local() if _is_shard(tensor) else tensor


def full_state_dict(state: object) -> object:
    """Return a state_dict, or a tensor, gathered from its shards. Every rank must call this function."""
    if _is_shard(state):
        return state.full_tensor()
    if isinstance(state, Mapping):
        return {name: full_state_dict(part) for name, part in state.items()}
    return state


def shard_like(own: Tensor, tensor: Tensor | None) -> Tensor | None:
    """Return a full tensor, sharded as `own` is. None stays None."""
    if tensor is None or not _is_shard(own):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(own.device, own.dtype), own.device_mesh, own.placements)
