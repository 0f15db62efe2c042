"""Partial to whole knowledge distillation (PWKD, arXiv 2109.12507): a teacher that grows wider stage by stage."""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checks import check_bool, check_int, check_non_negative, check_unit_interval, check_used
from ..describe import one_line
from ..registry import resolve
from . import REGISTRY, as_typed, build, unknown_of
from .features import at_least_float32, full_precision
from .protocol import Batch, Method, Outcome, Pretraining
from .slimmable import SLIMMABLE, check_widths, slimmable


@dataclass(frozen=True)
class PartialToWhole:
    """When the teacher has which width, and how the learning rate falls meanwhile: functions of the epoch alone.

    Stage s of N has the epochs from s * epochs // N up to (s + 1) * epochs // N, both rounded down: no two differ by more
    than one epoch.

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of range, or there are fewer epochs than stages.
    """

    widths: Sequence[float]
    """The width of every stage: ascending fractions in (0, 1], the last of them 1."""
    epochs: int
    """Of the run."""
    lr_min: float = 0.0
    """Where the learning rate would be at the end of a stage, as a fraction of where it starts, in [0, 1]."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", check_widths("widths", self.widths))
        check_int("epochs", self.epochs, 1)
        check_unit_interval("lr_min", self.lr_min)
        if self.epochs < len(self.widths):
            raise ValueError(
                f"epochs must be at least {len(self.widths)}, one for each of widths {_listed(self.widths)}, got {self.epochs}"
            )

    def stage(self, epoch: int) -> int:
        """The stage of an epoch, 0 <= epoch < epochs; raises TypeError or ValueError for others."""
        return ((check_int("epoch", epoch, 0, self.epochs - 1) + 1) * len(self.widths) - 1) // self.epochs

    def width(self, epoch: int) -> float:
        """The teacher's width in an epoch."""
        return self.widths[self.stage(epoch)]

    def lr_factor(self, epoch: int) -> float:
        """What the learning rate is multiplied by in an epoch: lr_min + (1 - lr_min) / 2 * (1 + cos(pi t / E)).

        It is epoch t of its stage, which has E: every stage starts at 1.
        """
        stage = self.stage(epoch)
        start, end = (s * self.epochs // len(self.widths) for s in (stage, stage + 1))
        return self.lr_min + (1 - self.lr_min) / 2 * (1 + math.cos(math.pi * (epoch - start) / (end - start)))


class PartialToWholeDistillation(Method):
    """Any other method, `base`, taught by ever wider parts of the teacher; loss, value and terms are those of `base`.

    Before the student, a copy of the teacher that runs at several widths and shares its weights among them (`slimmable`) is
    trained by the sum over the widths w of

        CE(f_w(x), y) for the whole width, CE(f_w(x), softmax(f_1(x))) for the others (`in_place`; else CE(f_w(x), y)),

    from the teacher's weights on; f_1(x) is a constant there. Then it is a constant. The student learns from it stage by
    stage, each of one width, from the narrowest to the whole, and keeps its weights from one to the next. In every stage the
    learning rate falls from the recipe's by a cosine (`PartialToWhole`); the recipe's milestones have no effect.

    Sourced (the paper): sub-networks of equal depth and growing width that share weights and are trained jointly, several
    stages from partial to whole knowledge, a cyclic learning rate, a plug-in for other methods. Rebuilt, for no text gave the
    details: the widths, how they are sliced and normalised (Yu et al., ICLR 2019), `in_place` and `widths_a_step` (Yu and
    Huang, ICCV 2019), stages of equal length, the cosine, that the whole width starts as the trained teacher, and every
    number. So it does not claim to reproduce the paper's results.

    Methods that compare features find zeros where a partial teacher has none (`FeatureMethod.teacher_forward`).

    Args:
        base: a method that asks a teacher, by name or `module:Class`; its own pretraining follows that of the teacher.
        widths: ascending fractions in (0, 1], the last of them 1; see `slimmable`. A command gives them with commas
            between them, "0.25,0.5,0.75,1".
        teacher_epochs, teacher_lr: of the teacher's pretraining; see `Pretraining`.
        lr_min: where the cosine ends, as a fraction of the recipe's `lr`, in [0, 1].
        in_place: whether narrow widths learn from the whole one instead of the labels.
        widths_a_step: how many widths each step of the teacher's pretraining takes: the whole one, the narrowest, and
            others drawn anew every time. None: all.
        partial: False for the control: the same learning rates with the teacher as it was given in every stage. Of the
            widths then only their number counts, and options of the teacher's pretraining are refused.
        base_options: the options of `base`, or text that stands for them.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, also those of `base`; `base` asks no
            teacher, chooses the teacher itself, or has learning rates of its own.
    """

    def __init__(
        self,
        base: str = "kd",
        widths: Sequence[float] | float | str = (0.25, 0.5, 0.75, 1.0),
        teacher_epochs: int = 60,
        teacher_lr: float = 0.05,
        lr_min: float = 0.0,
        in_place: bool = True,
        widths_a_step: int | None = None,
        partial: bool = True,
        **base_options: str,
    ):
        super().__init__()
        self.widths = check_widths("widths", widths)
        self.teacher_epochs = check_int("teacher_epochs", teacher_epochs, 1)
        self.set_options(check_non_negative, teacher_lr=teacher_lr)
        self.set_options(check_unit_interval, lr_min=lr_min)
        self.set_options(check_bool, in_place=in_place, partial=partial)
        if widths_a_step is not None:
            widths_a_step = check_int("widths_a_step", widths_a_step, 2)
            if widths_a_step > len(self.widths):
                raise ValueError(
                    f"widths_a_step must be at most the {len(self.widths)} of widths {_listed(self.widths)}, got {widths_a_step}"
                )
        self.widths_a_step = widths_a_step
        for option in ("teacher_epochs", "teacher_lr", "in_place", "widths_a_step"):
            usual = inspect.signature(type(self)).parameters[option].default
            check_used(option, getattr(self, option), usual, not partial, "partial=False, which pretrains nothing")
        self._check_names(base, base_options)
        self.base = build(base, as_typed(base, base_options))
        if not self.base.needs_teacher:
            raise ValueError(f"base must be a method that asks a teacher, got {base!r}, which asks none")
        for overridden, meaning in (
            ("teacher_of", "chooses the teacher"),
            ("lr_factor", "has learning rates of its own"),
        ):
            if getattr(type(self.base), overridden) is not getattr(Method, overridden):
                raise ValueError(f"base must be a method that leaves that to pwkd, got {base!r}, which {meaning}")
        self.weighs_samples = self.base.weighs_samples
        self.compiles_teacher = not self.partial  # every width, in either mode, would be one more compilation
        self.flops_known = self.base.flops_known and not self.partial  # a width's cost is not the teacher's
        self.slimmable = None

    def _check_names(self, base: str, options: Iterable[str]) -> None:
        """Raises TypeError for an option of neither, ValueError for a base that there is not."""
        resolve("base", base, REGISTRY)
        unknown, takes = unknown_of(base, options)
        if unknown:
            own = [p.name for p in inspect.signature(type(self)).parameters.values() if p.kind is not p.VAR_KEYWORD]
            theirs = [option for option in takes if option != "batch_keep"]  # condense.batch_keep says it
            raise TypeError(
                f"method 'pwkd' has no option {unknown[0]!r}, nor has its base {base!r}: it takes {', '.join(own)}, and "
                f"for the base {', '.join(theirs) or 'none'}"
            )

    def prepare(self, student: nn.Module, teacher: nn.Module | None, samples: Iterable[Batch]) -> None:
        """Makes the teacher slimmable, sends one sample through every width, and prepares `base` with the whole.

        Raises ValueError where the teacher cannot be made narrower (`slimmable`), or does not run so.
        """
        if self.partial:
            x = next(iter(samples)).x[:1]
            self.slimmable = slimmable(teacher, self.widths).to(x.device).eval()
            outputs = self.slimmable.outputs
            if len(self.widths) > 1 and all(len({*channels}) == 1 for channels in outputs.values()):
                raise ValueError(
                    f"widths {_listed(self.widths)} leave the teacher as it is: no layer gets narrower, of {outputs}"
                )
            logits = {width: self._logits_at(width, x).shape for width in reversed(self.widths)}
            for width, shape in logits.items():
                if shape != logits[1.0]:
                    raise ValueError(
                        f"teacher must give logits {tuple(logits[1.0])} at every width, got {tuple(shape)} at width {width}"
                    )
            self.slimmable.use(1.0)
        self.base.prepare(student, self.teacher_of(teacher), samples)

    def _logits_at(self, width: float, x: Tensor) -> Tensor:
        self.slimmable.use(width)
        passed: list[str] = []
        try:
            with torch.no_grad(), ExitStack() as hooks:
                for path, layer in self.slimmable.network.named_modules():
                    if not [*layer.children()]:
                        hooks.callback(layer.register_forward_hook(_noted(passed, path)).remove)
                return self.slimmable(x)
        except Exception as error:  # the teacher is the user's, and says what it likes
            raise ValueError(
                f"widths must suit the teacher, which does not run at {width:g} ({one_line(error)}): "
                f"the last layer that ran was {passed[-1] if passed else 'none'}"
            ) from error

    def teacher_of(self, teacher: nn.Module | None) -> nn.Module | None:
        """What runs at several widths, with the names and attributes of the teacher's type; the control's is the teacher."""
        return teacher if self.slimmable is None else self.slimmable.network

    def pretraining(self) -> tuple[Pretraining, ...]:
        """That of the teacher, then what `base` trains first, with the whole teacher."""
        own = ()
        if self.partial:
            own = (Pretraining(self.slimmable, self._joint_loss, self.teacher_epochs, self.teacher_lr),)
        return (*own, *self.base.pretraining())

    def _joint_loss(self, teacher: nn.Module | None, batch: Batch) -> Tensor:
        """(), the sum of the losses of this step's widths, the whole one first, at which it leaves the teacher."""
        widths = self._drawn()
        total, target = self.slimmable.zero_of_others(widths), batch.label
        for width in widths:
            self.slimmable.use(width)
            logits = teacher(batch.x)
            with full_precision(logits):
                logits = at_least_float32(logits)
                total = total + functional.cross_entropy(logits, target)
                if self.in_place and width == 1:
                    target = logits.detach().softmax(-1)
        self.slimmable.use(1.0)
        return total

    def _drawn(self) -> list[float]:
        """The widths of a step, from wide to narrow."""
        if self.widths_a_step is None:
            return [*reversed(self.widths)]
        narrowest, *between, widest = self.widths
        drawn = torch.randperm(len(between))[: self.widths_a_step - 2].tolist()
        return [widest, *(between[i] for i in sorted(drawn, reverse=True)), narrowest]

    def lr_factor(self, epoch: int, epochs: int) -> float:
        """See `PartialToWhole`; raises ValueError where there are fewer epochs than widths."""
        return self._schedule(epochs).lr_factor(epoch)

    def begin(self, epoch: int, epochs: int) -> None:
        """Gives the teacher the width of this epoch's stage."""
        if self.slimmable is not None:
            self.slimmable.use(self._schedule(epochs).width(epoch))
        self.base.begin(epoch, epochs)

    def _schedule(self, epochs: int) -> PartialToWhole:
        return PartialToWhole(self.widths, epochs, self.lr_min)

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """The outcome of `base`; `teacher` is that of `teacher_of`."""
        return self.base(student, teacher, batch)

    def release(self) -> None:
        """Releases `base`."""
        self.base.release()


def _noted(passed: list[str], path: str) -> Callable[..., None]:
    """A hook that writes down a layer and the shapes of what goes into it and comes out."""

    def note(layer: nn.Module, given: tuple, output: object) -> None:
        shapes = [str(tuple(part.shape)) for part in (*given[:1], output) if isinstance(part, Tensor)]
        kind = next((kind for kind, sliced in SLIMMABLE.items() if isinstance(layer, sliced)), type(layer))
        passed.append(f"{path!r}, a {kind.__name__}: {' -> '.join(shapes)}")

    return note


def _listed(widths: tuple[float, ...]) -> str:
    return ", ".join(f"{width:g}" for width in widths)
