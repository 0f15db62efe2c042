"""The state of a module: its memory layout, and its restoration after a trial step."""

import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_RESTORABLE_TYPES = (
    Tensor,
    dict,
    list,
    deque,
    set,
    tuple,
    np.ndarray,
    torch.Generator,
    np.random.Generator,
    random.Random,
)


class Layout:
    """The original strides of a module's parameters and buffers, so that they can be restored."""

    def __init__(self, module: nn.Module):
        self._module = module
        self._strides = {name: (x.shape, x.stride()) for name, x in _tensors(module)}

    def choose(self, channels_last: bool) -> bool:
        """Convert all 4-dimensional tensors to channels-last, or restore them. Return whether any tensor changed."""
        self.restore()
        changed = False
        for _, tensor in _tensors(self._module):
            if channels_last and tensor.dim() == 4:
                converted = tensor.data.to(memory_format=torch.channels_last)
                if converted.stride() != tensor.stride():
                    tensor.data, changed = converted, True
        return changed

    def restore(self) -> None:
        """Restore the original strides of every tensor. Values stay."""
        for name, tensor in _tensors(self._module):
            shape, stride = self._strides.get(name, (None, None))
            if shape == tensor.shape and stride != tensor.stride():
                restored = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)
                tensor.data = restored.copy_(tensor.data)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers whose layout can change."""
    for named in (module.named_parameters, module.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            if not is_lazy(tensor) and is_dense(tensor) and not tensor.is_inference() and not _is_expanded(tensor):
                yield name, tensor


def is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor is strided, and neither quantized nor nested."""
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested


def _is_expanded(tensor: Tensor) -> bool:
    """Return whether elements share memory, as after `expand`. A copy cannot have such strides."""
    if not is_dense(tensor):
        return False
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


@contextmanager
def restored(*roots: nn.Module) -> Iterator[None]:
    """Restore modules and their submodules at the end of the context: tensors, gradients, modes and attributes.

    Attributes are restored with their contents if they are tensors, arrays, lists, tuples, dictionaries, sets, deques or random
    generators. The contents of other objects are not restored.
    """
    modules = [*dict.fromkeys(module for root in roots for module in root.modules())]
    modes = [(module, module.training) for module in modules]
    parts: list[object] = []
    for module in modules:
        tensors = (*module._parameters.values(), *module._buffers.values())
        # TorchScript keeps its attributes outside Python, and those of lazy modules are incomplete.
        has_python_attributes = not isinstance(module, torch.jit.ScriptModule) and not any(map(is_lazy, tensors))
        parts += (vars(module),) if has_python_attributes else tensors
    restorers = [*_restorers(parts)]
    try:
        yield
    finally:
        for restore in restorers:
            restore()
        for module, mode in modes:
            module.training = mode


def _restorers(pending: list[object]) -> Iterator[Callable[[], object]]:
    """Yield functions that restore these objects and the objects inside them. Clears gradients."""
    seen: dict[int, object] = {}
    while pending:
        value, inside = pending.pop(), ()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            if not is_lazy(value) and not value.is_inference():
                yield _tensor_restorer(value)
        elif type(value) in (dict, OrderedDict, defaultdict):
            inside = value.values()
            yield partial(_refill, value, dict(value), value.update)
        elif type(value) in (list, deque, set):
            inside = value
            yield partial(_refill, value, [*value], value.update if type(value) is set else value.extend)
        elif isinstance(value, tuple):
            inside = value
        elif type(value) is np.ndarray and value.flags.writeable:
            yield partial(np.copyto, value, value.copy())
        elif isinstance(value, torch.Generator):
            yield partial(value.set_state, value.get_state())
        elif isinstance(value, np.random.Generator):
            yield partial(setattr, value.bit_generator, "state", value.bit_generator.state)
        elif isinstance(value, random.Random):
            yield partial(value.setstate, value.getstate())
        pending += [part for part in inside if isinstance(part, _RESTORABLE_TYPES)]


def _tensor_restorer(tensor: Tensor) -> Callable[[], None]:
    value, requires_grad, leaf = tensor.detach().clone(), tensor.requires_grad, tensor.is_leaf
    gradient = tensor.grad if leaf else None
    if gradient is not None:
        tensor.grad = None

    @torch.no_grad()
    def restore() -> None:
        if leaf:
            if not tensor.is_leaf:  # an in-place operation has attached it to a graph
                tensor.detach_()
            tensor.requires_grad_(requires_grad)
            tensor.grad = gradient
        if not _is_expanded(tensor):  # an expanded tensor cannot be written
            tensor.copy_(value)

    return restore


def _refill(container: object, content: Mapping | list, fill: Callable[[object], None]) -> None:
    container.clear()
    fill(content)
