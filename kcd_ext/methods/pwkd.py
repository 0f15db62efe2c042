"""Partial to whole knowledge distillation (PWKD, arXiv 2109.12507): a teacher that grows wider from stage to stage."""

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
from . import REGISTRY, build, convert_options, split_name, unknown_options
from .features import at_least_float32, full_precision
from .protocol import Batch, Method, Outcome, Pretraining
from .slimmable import SLIMMABLE, check_widths, slimmable


@dataclass(frozen=True)
class PartialToWhole:
    """The schedule of the teacher's width and the learning rate: functions of the epoch only.

    Stage s of N has the epochs from s * epochs // N to (s + 1) * epochs // N (exclusive), so the lengths of two stages
    differ by at most one epoch.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is out of range, or there are fewer epochs than stages.
    """

    widths: Sequence[float]
    """The width of each stage: ascending fractions in (0, 1], the last one 1."""
    epochs: int
    """The number of epochs of the run."""
    lr_min: float = 0.0
    """The end of each stage's cosine, as a fraction of its start, in [0, 1]. The epoch after the stage would reach it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", check_widths("widths", self.widths))
        check_int("epochs", self.epochs, 1)
        check_unit_interval("lr_min", self.lr_min)
        if self.epochs < len(self.widths):
            raise ValueError(
                f"epochs must be at least {len(self.widths)}, one for each of widths {_format_widths(self.widths)}, got "
                f"{self.epochs}"
            )

    def stage(self, epoch: int) -> int:
        """Return the stage of an epoch, 0 <= epoch < epochs. Raises TypeError or ValueError for others."""
        return ((check_int("epoch", epoch, 0, self.epochs - 1) + 1) * len(self.widths) - 1) // self.epochs

    def width(self, epoch: int) -> float:
        """Return the teacher's width in an epoch."""
        return self.widths[self.stage(epoch)]

    def lr_factor(self, epoch: int) -> float:
        """Return the factor of the learning rate in an epoch: lr_min + (1 - lr_min) / 2 * (1 + cos(pi t / E)).

        The epoch is the t-th of its stage, counted from 0, and the stage has E epochs. So each stage starts at 1.
        """
        stage = self.stage(epoch)
        start, end = (s * self.epochs // len(self.widths) for s in (stage, stage + 1))
        return self.lr_min + (1 - self.lr_min) / 2 * (1 + math.cos(math.pi * (epoch - start) / (end - start)))


class PartialToWholeDistillation(Method):
    """Partial to whole knowledge distillation (PWKD, arXiv 2109.12507): any other method with a teacher that grows.

    Loss, value and terms are those of the method `base`.

    1. Before the student, train a copy of the teacher that runs at several widths with shared weights (`slimmable`). It
       starts from the teacher's weights. Its loss is the sum over the widths w of CE(f_w(x), y) at full width, and
       CE(f_w(x), softmax(f_1(x))) at the others, with f_1(x) constant (`in_place`; without it, CE(f_w(x), y) everywhere).
       Afterwards the copy is constant.
    2. Train the student in stages, one per width, from the narrowest teacher to the full one. The student keeps its weights
       from stage to stage. In each stage the learning rate starts at the recipe's and falls by a cosine (`PartialToWhole`);
       the recipe's schedule has no effect.

    - From the paper: sub-networks of equal depth and growing width, with shared weights and joint training; stages from
      partial to whole knowledge; a cyclic learning rate; use with other methods.
    - Rebuilt, because no text gave the details: the widths, how they are sliced and normalised (Yu et al., ICLR 2019),
      `in_place` and `widths_a_step` (Yu and Huang, ICCV 2019), stages of equal length, the cosine, the start from the trained
      teacher, and every number. So we do not claim the paper's results.

    Methods that compare features get zeros for the features that a partial teacher lacks (`FeatureMethod.teacher_forward`).

    Args:
        base: A method that needs a teacher, by name or `module:Class`, or several with + between them. Its own pretraining
            follows that of the teacher.
        widths: Ascending fractions in (0, 1], the last one 1; see `slimmable`. On the command line: "0.25,0.5,0.75,1".
        teacher_epochs: Epochs of the teacher's pretraining, >= 1.
        teacher_lr: Learning rate of the teacher's pretraining, >= 0. It drops to a tenth at 50 % and 75 % of its epochs.
        lr_min: End of the cosine, as a fraction of the recipe's `lr`, in [0, 1].
        in_place: Narrow widths learn from the full one instead of the labels.
        widths_a_step: Number of widths in each step of the teacher's pretraining, >= 2: the full one, the narrowest, and others
            drawn at random in each step. None: all widths.
        partial: False for the control, which uses the unchanged teacher in all stages, with the same learning rates. Then only
            the number of widths counts, and options of the teacher's pretraining are refused.
        base_options: The options of `base`, as values or as text.

    Raises:
        TypeError: An argument, or one for `base`, has the wrong type.
        ValueError: An argument, or one for `base`, is out of range; or `base` needs no teacher, chooses the teacher itself, or
            has its own learning rates.
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
                    f"widths_a_step must be at most {len(self.widths)}, the number of widths {_format_widths(self.widths)}, got "
                    f"{widths_a_step}"
                )
        self.widths_a_step = widths_a_step
        for option in ("teacher_epochs", "teacher_lr", "in_place", "widths_a_step"):
            default = inspect.signature(type(self)).parameters[option].default
            check_used(option, getattr(self, option), default, not partial, "partial=False, which pretrains nothing")
        self._check_options(base, base_options)
        self.base = build(base, convert_options(base, base_options))
        if not self.base.needs_teacher:
            raise ValueError(f"base must be a method that needs a teacher, got {base!r}, which needs none")
        for overridden, meaning in (
            ("teacher_of", "chooses the teacher"),
            ("lr_factor", "has its own learning rates"),
        ):
            if getattr(type(self.base), overridden) is not getattr(Method, overridden):
                raise ValueError(f"base must be a method that leaves this to pwkd, got {base!r}, which {meaning}")
        self.weighs_samples = self.base.weighs_samples
        self.takes_soft_labels = self.base.takes_soft_labels
        self.compiles_teacher = not self.partial  # each width would compile once more in each mode
        self.flops_known = self.base.flops_known and not self.partial  # a narrow width costs less than the teacher
        self.slimmable = None

    def _check_options(self, base: str, options: Iterable[str]) -> None:
        """Raise ValueError for an unknown base, TypeError for an option that neither pwkd nor the base takes."""
        for part in split_name(base) if isinstance(base, str) else (base,):
            resolve("base", part, REGISTRY)
        unknown, takes = unknown_options(base, options)
        if unknown:
            own = [p.name for p in inspect.signature(type(self)).parameters.values() if p.kind is not p.VAR_KEYWORD]
            theirs = [option for option in takes if option != "batch_keep"]  # set with condense.batch_keep
            raise TypeError(
                f"method 'pwkd' has no option {unknown[0]!r}, nor has its base {base!r}: pwkd takes {', '.join(own)}, the "
                f"base {', '.join(theirs) or 'none'}"
            )

    def prepare(self, student: nn.Module, teacher: nn.Module | None, samples: Iterable[Batch]) -> None:
        """Make the teacher slimmable, run one sample at each width, and prepare `base` with the full teacher.

        Raises ValueError if the teacher cannot be made narrower (`slimmable`) or does not run at some width.
        """
        if self.partial:
            x = next(iter(samples)).x[:1]
            self.slimmable = slimmable(teacher, self.widths).to(x.device).eval()
            channels = self.slimmable.channels
            if len(self.widths) > 1 and all(len({*counts}) == 1 for counts in channels.values()):
                raise ValueError(
                    f"widths {_format_widths(self.widths)} do not change the teacher: no layer gets narrower, of {channels}"
                )
            logits = {width: self._logits_at(width, x).shape for width in reversed(self.widths)}
            for width, shape in logits.items():
                if shape != logits[1.0]:
                    raise ValueError(
                        f"teacher must give logits {tuple(logits[1.0])} at every width, got {tuple(shape)} at width {width}"
                    )
            self.slimmable.set_width(1.0)
        self.base.prepare(student, self.teacher_of(teacher), samples)

    def _logits_at(self, width: float, x: Tensor) -> Tensor:
        self.slimmable.set_width(width)
        shapes_by_layer: list[str] = []
        try:
            with torch.no_grad(), ExitStack() as hooks:
                for path, layer in self.slimmable.network.named_modules():
                    if not [*layer.children()]:
                        hooks.callback(layer.register_forward_hook(_shape_recorder(shapes_by_layer, path)).remove)
                return self.slimmable(x)
        except Exception as error:  # the user's teacher may raise anything
            raise ValueError(
                f"widths must suit the teacher, which does not run at {width:g} ({one_line(error)}): "
                f"the last layer that ran was {shapes_by_layer[-1] if shapes_by_layer else 'none'}"
            ) from error

    def teacher_of(self, teacher: nn.Module | None) -> nn.Module | None:
        """Return the slimmable teacher, with the type, names and attributes of the teacher; for the control, the teacher."""
        return teacher if self.slimmable is None else self.slimmable.network

    def pretraining(self) -> tuple[Pretraining, ...]:
        """Return the plan for the teacher, then those of `base`, which use the full teacher."""
        own = ()
        if self.partial:
            own = (Pretraining(self.slimmable, self._joint_loss, self.teacher_epochs, self.teacher_lr),)
        return (*own, *self.base.pretraining())

    def _joint_loss(self, teacher: nn.Module | None, batch: Batch) -> Tensor:
        """Return the sum () of the losses at this step's widths, full width first. Leaves the teacher at full width."""
        widths = self._draw_widths()
        total, target = self.slimmable.zero_for_other_widths(widths), batch.label
        for width in widths:
            self.slimmable.set_width(width)
            logits = teacher(batch.x)
            with full_precision(logits):
                logits = at_least_float32(logits)
                total = total + functional.cross_entropy(logits, target)
                if self.in_place and width == 1:
                    target = logits.detach().softmax(-1)
        self.slimmable.set_width(1.0)
        return total

    def _draw_widths(self) -> list[float]:
        """Return the widths of a step, from wide to narrow."""
        if self.widths_a_step is None:
            return [*reversed(self.widths)]
        narrowest, *between, widest = self.widths
        drawn = torch.randperm(len(between))[: self.widths_a_step - 2].tolist()
        return [widest, *(between[i] for i in sorted(drawn, reverse=True)), narrowest]

    def lr_factor(self, epoch: int, epochs: int) -> float:
        """Return `PartialToWhole.lr_factor`. Raises ValueError if there are fewer epochs than widths."""
        return self._schedule(epochs).lr_factor(epoch)

    def begin(self, epoch: int, epochs: int) -> None:
        """Set the teacher's width for this epoch's stage."""
        if self.slimmable is not None:
            self.slimmable.set_width(self._schedule(epochs).width(epoch))
        self.base.begin(epoch, epochs)

    def _schedule(self, epochs: int) -> PartialToWhole:
        return PartialToWhole(self.widths, epochs, self.lr_min)

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """Return the outcome of `base`. `teacher` is the network from `teacher_of`."""
        return self.base(student, teacher, batch)

    def release(self) -> None:
        """Release `base`."""
        self.base.release()


def _shape_recorder(shapes_by_layer: list[str], path: str) -> Callable[..., None]:
    """Return a hook that appends a layer's path, type, and the shapes of its input and output."""

    def record(layer: nn.Module, arguments: tuple, output: object) -> None:
        shapes = [str(tuple(part.shape)) for part in (*arguments[:1], output) if isinstance(part, Tensor)]
        kind = next((kind for kind, sliced in SLIMMABLE.items() if isinstance(layer, sliced)), type(layer))
        shapes_by_layer.append(f"{path!r}, a {kind.__name__}: {' -> '.join(shapes)}")

    return record


def _format_widths(widths: tuple[float, ...]) -> str:
    return ", ".join(f"{width:g}" for width in widths)
