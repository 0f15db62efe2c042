"""One training step that leaves no trace: what does not fit is found out before anything is written."""

import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..methods import Batch, Method, Outcome, Pretraining
from ..networks import LogitsAlone, OutputError
from . import sharding
from .checks import NotFiniteError, check_gradients, check_outcome, check_start
from .layout import Layout, is_expanded

CHANGEABLE = (Tensor, dict, list, deque, set, tuple, np.ndarray, torch.Generator, np.random.Generator, random.Random)


@dataclass(frozen=True)
class Rehearsal:
    """What a step is made of.

    Args:
        step: (teacher, batch) -> outcome, in training mode; not wrapped for several processes.
        student, teacher: what is called, the networks or what was compiled of them.
        method: its name is `label`; `plans` are its own pretraining, `epochs` those of the run.
        autocast: makes the context that networks are called in.
        scaled: whether the run scales its loss, so that gradients may overflow.
        measure: the field of the outcome that the condenser is fed with.
        every_gradient: whether all parameters must have a part in the loss.
        fresh: whether the weights are those that training starts from; False: a checkpoint's take their place.
    """

    step: nn.Module
    student: nn.Module
    teacher: nn.Module | None
    method: Method
    label: str
    plans: Sequence[Pretraining]
    epochs: int
    autocast: Callable
    scaled: bool
    measure: str
    every_gradient: bool
    fresh: bool

    def take(self, batch: Batch, tested: Batch | None) -> None:
        """Take the step, pretraining first, validate `tested`, and undo everything.

        Raises:
            TypeError, ValueError: the networks, the method and the batch do not fit each other.
        """
        networks = {"student": self.student} | ({} if self.teacher is None else {"teacher": self.teacher})
        with ExitStack() as stack:
            stack.enter_context(undone(self.step, *([] if self.teacher is None else [self.teacher])))
            running = stack.enter_context(_running(networks))
            try:
                self._take(batch, tested, running)
            except OutputError:
                raise
            except Exception as error:
                if isinstance(error, torch.OutOfMemoryError | torch.distributed.DistError):
                    raise  # there are handlers for it, and it is of no network's doing
                told = _told(error)
                if running:
                    x = f"x of {batch.x.dtype} {tuple(batch.x.shape)}"
                    raise ValueError(f"{running[-1]} fails in a training step on {x}: {told}") from error
                if isinstance(error, TypeError | ValueError) and "\n" not in str(error):
                    raise
                whom = "student" if self.teacher is None else "student and teacher"
                raise ValueError(f"method {self.label!r} fails in a training step with this {whom}: {told}") from error

    def _take(self, batch: Batch, tested: Batch | None, running: list[str]) -> None:
        if self.teacher is not None:
            self.teacher.eval()
        for plan in self.plans:
            plan.part.requires_grad_(False)
        for plan in self.plans:
            plan.part.requires_grad_(True).train()
            with self.autocast():
                loss = plan.loss(self.teacher, batch)
            loss.backward()
            plan.part.requires_grad_(False).eval()
        self.method.begin(0, self.epochs)
        self.step.train()
        for plan in self.plans:
            plan.part.eval()
        if self.teacher is not None:
            self.teacher.eval()
        trained = {name: p for name, p in self.step.named_parameters() if p.requires_grad}
        for parameter in trained.values():
            parameter.grad = None
        with self.autocast(), _without_gradient(self.student) as detached:
            outcome = self.step(self.teacher, batch)
        if detached and not getattr(getattr(outcome, "loss", None), "requires_grad", True):
            raise ValueError(
                "student gives logits without a gradient in training mode: does it detach them, or run in torch.no_grad()?"
            )
        check_outcome(outcome, batch, self.measure, self.label)
        running.append("student")
        outcome.loss.backward()
        running.pop()
        self._check_gradients(outcome, batch, trained)
        if tested is not None:
            self.student.eval()
            with torch.no_grad():
                self.student(tested.x).argmax(-1)

    def _check_gradients(self, outcome: Outcome, batch: Batch, trained: Mapping[str, nn.Parameter]) -> None:
        gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
        if not any(name.startswith("student.") for name in gradients):
            raise ValueError(
                f"student has no part in the loss of method {self.label!r}: none of its parameters has a gradient"
            )
        if self.every_gradient:
            check_gradients(trained)
        if self.fresh:
            checked = {} if self.scaled else gradients
            check_start(outcome, batch, checked, self.step, self.teacher, self.label)


def rehearse(
    take: Callable[[int], None],
    sizes: Sequence[int],
    layouts: Sequence[Layout],
    outputs: Sequence[LogitsAlone],
) -> None:
    """Take a step and leave the networks in the memory layout in which it succeeded.

    Every network is tried in channels-last first, then as it came. In each layout the sizes are tried in turn: a method
    that cannot take a step on few samples may still take one on a whole batch. Where a network gives more than its
    logits and the method does not take that, the logits alone are tried.

    Args:
        take: takes a step on so many samples, and raises TypeError or ValueError where it fails.
        sizes: of the batches, in the order in which they are tried; the error of the last one is raised.
        layouts: those of the networks that may be channels-last; empty: all stay as they are.
        outputs: the hooks on the networks.

    Raises:
        TypeError, ValueError: the step fails in every way, as `take` raises it with the networks as they came.
    """
    modes = [set(output.acts_in) for output in outputs]
    tried: set[tuple[bool, ...]] = set()
    for channels_last in product((True, False), repeat=len(layouts)):
        changed = tuple(_laid_out(layout, last) for layout, last in zip(layouts, channels_last, strict=True))
        if changed in tried:
            continue
        tried.add(changed)
        for size in sizes:
            for output, mode in zip(outputs, modes, strict=True):
                output.acts_in = set(mode)
            failed = _taken(take, size, outputs)
            if failed is None:
                return
        if isinstance(failed, OutputError | NotFiniteError):
            break  # of no layout's doing
    raise failed


def _taken(take: Callable[[int], None], size: int, outputs: Sequence[LogitsAlone]) -> Exception | None:
    """Return what failed, also where networks that give more than logits give these alone; None: nothing."""
    while True:
        try:
            take(size)
        except (TypeError, ValueError) as error:
            if not any([output.act_where_found() for output in outputs]):
                return error
        else:
            return None


def _laid_out(layout: Layout, last: bool) -> bool:
    """Choose the layout; return whether that changed the network's tensors."""
    layout.restore()
    return layout.to_channels_last() if last else False


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
        special = _is_special(module)
        parts += (*module._parameters.values(), *module._buffers.values()) if special else (vars(module),)
    restorers = [*_restorers(parts)]
    try:
        yield
    finally:
        for root in roots:
            sharding.reshard(root)
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
        if not is_expanded(tensor):  # cannot have changed
            tensor.copy_(value)

    return restore


def _refill(container: object, content: Mapping | list, fill: Callable[[object], None]) -> None:
    container.clear()
    fill(content)


def _is_special(module: nn.Module) -> bool:
    """Return whether it is of TorchScript, whose attributes are not in Python, or not complete yet."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return isinstance(module, torch.jit.ScriptModule) or any(map(is_lazy, tensors))


@contextmanager
def _running(networks: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Yield the names of the networks whose forward pass has begun and not ended."""
    running: list[str] = []
    with ExitStack() as hooks:
        for name, network in networks.items():
            begun = network.register_forward_pre_hook(lambda *_, name=name: running.append(name))
            ended = network.register_forward_hook(lambda *_: running.pop() and None)
            hooks.callback(begun.remove)
            hooks.callback(ended.remove)
        yield running


@contextmanager
def _without_gradient(network: nn.Module) -> Iterator[list[Tensor]]:
    """Yield those of the network's outputs that have no gradient, as they come."""
    found: list[Tensor] = []

    def look(_module: nn.Module, _arguments: tuple, output: object) -> None:
        if isinstance(output, Tensor) and not output.requires_grad:
            found.append(output)

    hook = network.register_forward_hook(look)
    try:
        yield found
    finally:
        hook.remove()


def _told(error: Exception) -> str:
    """Return its type and the first line of its message that says something."""
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    line = f"{first} {rest[0]}" if first.endswith(":") and rest else first
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
