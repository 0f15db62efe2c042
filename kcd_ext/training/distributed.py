"""Devices, precision, processes and shards. The only module that imports accelerate."""

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


@contextmanager
def accelerator_on(device: str, mixed_precision: str | None = None) -> Iterator[Accelerator]:
    """Yield an Accelerator on this device (auto, cpu or cuda) that leaves gradient accumulation to the trainer.

    `mixed_precision`: "no", "bf16" or "fp16"; None: what the launcher says. A process that had no Accelerator before
    has none afterwards; one that the caller has accumulates gradients as before.
    """
    wanted = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' is not available: this torch has no CUDA or finds no driver")
    if wanted == "cpu" and mixed_precision == "fp16":
        raise ValueError("precision 'float16' needs CUDA, and the device is cpu: take bfloat16 or float32")
    ours = not AcceleratorState._shared_state
    if not ours and mixed_precision not in (None, AcceleratorState().mixed_precision):
        had = AcceleratorState().mixed_precision
        raise ValueError(f"precision {mixed_precision!r}: this process has an Accelerator of precision {had!r} already")
    gradients = {name: copy(value) for name, value in GradientState._shared_state.items()}  # all Accelerators share it
    accelerator = Accelerator(
        cpu=wanted == "cpu",
        mixed_precision=mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    try:
        if accelerator.device.type != wanted:
            raise ValueError(f"device {wanted!r}: this process has an Accelerator on {accelerator.device} already")
        yield accelerator
    finally:
        if ours and accelerator.num_processes == 1:
            AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._shared_state.clear()
        GradientState._shared_state.update(gradients)


@contextmanager
def autocast(accelerator: Accelerator) -> Iterator[None]:
    """Call networks in the accelerator's precision inside the context.

    Clears autocast's cache of cast weights at the end: inside a caller's own autocast the cache would survive the
    optimizer's step, and training would go on with the weights of the first step.
    """
    with accelerator.autocast():
        yield
    torch.clear_autocast_cache()


# --- steps over several processes ---


def prepare(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """Return the module, wrapped for several processes; a sharded one reduces its gradients itself."""
    if is_sharded(module):
        return module
    prepared = accelerator.prepare(module)
    if isinstance(prepared, DistributedDataParallel):
        # Once an epoch is enough for running statistics; a method's memory banks would travel with every step.
        prepared.broadcast_buffers = False
    return prepared


def accumulating(accelerator: Accelerator, module: nn.Module, last: bool) -> AbstractContextManager:
    """Reduce gradients over the processes only in the last backward pass of a step."""
    waits = not last and accelerator.num_processes > 1 and not is_sharded(module)
    return accelerator.no_sync(module) if waits else nullcontext()


def optimizer_step(accelerator: Accelerator, optimizer: torch.optim.Optimizer, student: nn.Module) -> None:
    """Take a step and clear the gradients. With float16, leave out a step whose gradients overflowed."""
    if accelerator.num_processes > 1 and is_sharded(student):
        for parameter in chain.from_iterable(group["params"] for group in optimizer.param_groups):
            if parameter.grad is not None and not _is_shard(parameter.grad):  # which nothing else averages
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= accelerator.num_processes
    if accelerator.scaler is None:
        optimizer.step()
    else:
        accelerator.scaler.step(optimizer)
        accelerator.scaler.update()
    optimizer.zero_grad()


def sum_over_ranks(accelerator: Accelerator, numbers: Iterable[Tensor | float]) -> list[float]:
    """Return the sum of each number over all processes, in float64. Waits for the device."""
    device = accelerator.device
    numbers = torch.stack([torch.as_tensor(number, dtype=torch.float64, device=device) for number in numbers])
    return accelerator.reduce(numbers, "sum").tolist()


def labels_in(seen: Iterable[tuple[Tensor, Tensor]], count: int, accelerator: Accelerator) -> Tensor:
    """Return the class of each of `count` samples, (count,) int64 on the CPU.

    `seen` holds the (index, label) of the samples that this process has; every sample is on one process, repeats have
    index -1.
    """
    index, label = map(torch.cat, zip(*seen, strict=True))
    labels = torch.zeros(count, dtype=torch.int64, device=index.device)
    labels[index[index >= 0]] = label[index >= 0]
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(labels)
    return labels.cpu()


def broadcast_buffers(accelerator: Accelerator, module: nn.Module) -> None:
    """Give every process the first one's running statistics, which are validated, saved and resumed from."""
    if accelerator.num_processes > 1:
        for buffer in module.buffers():
            if not _is_shard(buffer):
                torch.distributed.broadcast(buffer, src=0)


# --- sharded parameters (FSDP): whole in a checkpoint, in shards while they are trained ---


def _is_instance(value: object, module: str, name: str) -> bool:
    """Return whether `value` is of this class of torch's, without an import of its module, which takes half a second."""
    return isinstance(value, getattr(sys.modules.get(module), name, ()))


def _is_shard(value: object) -> bool:
    return _is_instance(value, "torch.distributed.tensor", "DTensor")


def _is_fsdp(module: nn.Module) -> bool:
    return _is_instance(module, "torch.distributed.fsdp", "FSDPModule")


def is_sharded(network: nn.Module) -> bool:
    """Return whether `torch.distributed.fsdp.fully_shard` has sharded the network or a part of it."""
    return any(map(_is_fsdp, network.modules()))


def reshard(*networks: nn.Module | None) -> None:
    """Shard again what a forward pass has gathered and the root has kept: shards are what is trained."""
    for network in networks:
        for module in () if network is None else network.modules():
            if _is_fsdp(module):
                module.reshard()


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, or the tensor."""
    return tensor.to_local() if _is_shard(tensor) else tensor


def full_state_dict(state: object) -> object:
    """Return a state_dict, or a tensor, gathered from its shards. Every process must call it."""
    if _is_shard(state):
        return state.full_tensor()
    if isinstance(state, Mapping):
        return {name: full_state_dict(part) for name, part in state.items()}
    return state


def sharded_like(own: Tensor, tensor: Tensor | None) -> Tensor | None:
    """Return a full tensor, sharded as `own` is; None for None."""
    if tensor is None or not _is_shard(own):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(own.device, own.dtype), own.device_mesh, own.placements)
