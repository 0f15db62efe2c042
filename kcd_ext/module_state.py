"""The state of a module: restored after a step that is undone, and laid out in memory."""

import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

CHANGEABLE = (Tensor, dict, list, deque, set, tuple, np.ndarray, torch.Generator, np.random.Generator, random.Random)


class Layout:
    """The strides of a module's parameters and buffers, tensor by tensor, so that they can be restored."""

    def __init__(self, module: nn.Module):
        self._module = module
        self._strides = {name: (x.shape, x.stride()) for name, x in _tensors(module)}

    def choose(self, channels_last: bool) -> bool:
        """Put a pixel's channels side by side in all tensors of four dimensions, or restore; return whether any changed."""
        self.restore()
        changed = False
        for _, tensor in _tensors(self._module):
            if channels_last and tensor.dim() == 4:
                converted = tensor.data.to(memory_format=torch.channels_last)
                if converted.stride() != tensor.stride():
                    tensor.data, changed = converted, True
        return changed

    def restore(self) -> None:
        """Give every tensor the strides that it had; keep its values."""
        for name, tensor in _tensors(self._module):
            shape, stride = self._strides.get(name, (None, None))
            if shape == tensor.shape and stride != tensor.stride():
                former = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)
                tensor.data = former.copy_(tensor.data)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that can be laid out otherwise."""
    for named in (module.named_parameters, module.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            if not is_lazy(tensor) and is_dense(tensor) and not tensor.is_inference() and not _is_expanded(tensor):
                yield name, tensor


def is_dense(tensor: Tensor) -> bool:
    """Return whether it has strides and is neither quantized nor nested."""
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested


def _is_expanded(tensor: Tensor) -> bool:
    """Return whether several elements share a place in memory: no copy could have such strides again."""
    if not is_dense(tensor):
        return False
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


@contextmanager
def undone(*roots: nn.Module) -> Iterator[None]:
    """Restore these modules, and those inside them, when the context ends: tensors, gradients, modes and attributes.

    Attributes that are tensors, arrays, lists, tuples, dictionaries, sets, deques or random generators are restored with
    what is in them. Other objects are not looked into.
    """
    modules = [*dict.fromkeys(module for root in roots for module in root.modules())]
    modes = [(module, module.training) for module in modules]
    parts: list[object] = []
    for module in modules:
        tensors = (*module._parameters.values(), *module._buffers.values())
        # The attributes of TorchScript are not in Python, those of lazy modules not complete.
        in_python = not isinstance(module, torch.jit.ScriptModule) and not any(map(is_lazy, tensors))
        parts += (vars(module),) if in_python else tensors
    restorers = [*_restorers(parts)]
    try:
        yield
    finally:
        for restore in restorers:
            restore()
        for module, mode in modes:
            module.training = mode


def _restorers(waiting: list[object]) -> Iterator[Callable[[], object]]:
    """Yield functions that restore the content of these objects, and of the objects in them; clear gradients."""
    seen: dict[int, object] = {}
    while waiting:
        value, inside = waiting.pop(), ()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            if not is_lazy(value) and not value.is_inference():
                yield _restorer_of_tensor(value)
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
        waiting += [part for part in inside if isinstance(part, CHANGEABLE)]


def _restorer_of_tensor(tensor: Tensor) -> Callable[[], None]:
    value, trained, leaf = tensor.detach().clone(), tensor.requires_grad, tensor.is_leaf
    gradient = tensor.grad if leaf else None
    if gradient is not None:
        tensor.grad = None

    @torch.no_grad()
    def restore() -> None:
        if leaf:
            if not tensor.is_leaf:  # changed in place by something that requires a gradient
                tensor.detach_()
            tensor.requires_grad_(trained)
            tensor.grad = gradient
        if not _is_expanded(tensor):  # cannot have changed
            tensor.copy_(value)

    return restore


def _refill(container: object, content: Mapping | list, fill: Callable[[object], None]) -> None:
    container.clear()
    fill(content)
