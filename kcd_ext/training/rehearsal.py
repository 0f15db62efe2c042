"""One training step that leaves no trace: what does not fit is found out before anything is written."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..methods import Batch, Method, Outcome, Pretraining
from ..networks import LogitsAlone, OutputError
from ..processes import is_left_alone
from ..registry import one_line
from . import sharding
from .checks import NotFiniteError, check_gradients, check_outcome, check_start
from .layout import Layout


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
                if isinstance(error, RuntimeError) and is_left_alone(error):
                    raise
                told = f"{type(error).__name__}: {_told(error)}"
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
        with self.autocast():
            outcome = self.step(self.teacher, batch)
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
    """Restore tensors, gradients, modes and attributes of these modules, and of those inside them, when the context ends."""
    modules = [*dict.fromkeys(module for root in roots for module in root.modules())]
    tensors = {
        id(tensor): tensor
        for module in modules
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None and not is_lazy(tensor)
    }.values()
    modes = [(module, module.training) for module in modules]
    plain = [module for module in modules if not _is_special(module)]
    attributes = [(module, *(dict(part) for part in _parts(module))) for module in plain]
    values = [(tensor, tensor.detach().clone(), tensor.grad, tensor.requires_grad) for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    try:
        yield
    finally:
        for root in roots:
            sharding.reshard(root)
        for module, *parts in attributes:
            for now, before in zip(_parts(module), parts, strict=True):
                now.clear()
                now.update(before)
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for tensor, value, gradient, trained in values:
                tensor.requires_grad_(trained)
                tensor.grad = gradient
                if not tensor.is_inference():
                    tensor.copy_(value)


def _parts(module: nn.Module) -> tuple[dict, dict, dict]:
    return vars(module), module._parameters, module._buffers


def _is_special(module: nn.Module) -> bool:
    """Return whether it is of TorchScript, whose attributes are not in Python, or not complete yet."""
    return isinstance(module, torch.jit.ScriptModule) or any(map(is_lazy, module._parameters.values()))


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


def _told(error: Exception) -> str:
    """Return the first line of its message that says something."""
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [one_line(error)]
    return f"{first} {rest[0]}" if first.endswith(":") and rest else first
