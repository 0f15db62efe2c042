"""Knowledge representing (arXiv 1911.05329), KR-style: where in the image every stage of the networks is active."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checks import check_finite, check_fraction, check_positive, check_used
from ..describe import brief, describe
from ..networks import evaluation_mode
from .features import Tap, at_least_float32, full_precision, stages_of, unit_rows
from .kd import distill_optionally
from .protocol import Batch, Method, Outcome
from .selection import select_batch_rows, take_rows

EXAMPLE = "layer1.0+layer1.1,layer2"  # of two groups, as errors show it


class KnowledgeRepresenting(Method):
    """loss = ce_weight * CE + kr_weight * sum_g L_g + kd_weight * T^2 * KL(teacher || student); value: student's entropy.

    Of every group g of layers, whose outputs are maps F_l (b, c, h, w) of any sizes:

        a_l = mean_c F_l^2, pooled to the group's one size, flattened and divided by its length,
        A_g = mean_l a_l,    P_g = softmax(A_g / tau),
        L_g = mean over the batch of -sum_i P~_i log Q~_i,    P: the teacher's, Q: the student's,

    where i runs over the support, the `ratio` of all places where the teacher's P_g is largest, and P~ and Q~ are P_g and
    Q_g over the support alone, each with the sum 1. So a student that is the teacher does not have the loss 0 but the
    least there is, the entropy of P~.

    From the paper's abstract: knowledge of several layers is aggregated to a more abstract level, the student learns it
    with penalised gradients ("sparse recoding"), and both combine with distilled logits. Rebuilt, because no text gave
    them: all of the formulas above, tau and ratio. So this makes no claim to the paper's numbers. Ours too:

    - One size for a group: the least height and the least width of all its maps, of both networks. Larger ones are
      averaged (adaptive average pooling), none is stretched.
    - With respect to the student's A_g the gradient is zero off the support, exactly. (The length of an a_l is that of
      all its places, so a feature off the support still moves the others by it.)
    - A support of one place, as of maps of fewer than four at ratio 0.5, has the loss 0 and teaches nothing.
    - A map of zeros has no direction: its a_l is zeros, and passes no gradient.

    Args:
        temperature: T > 0 of the KL; chosen beside kd_weight = 0 it is refused.
        ce_weight, kd_weight, kr_weight: finite. Where kd_weight is 0 no KL is computed.
        tau: > 0, of the softmax over places.
        ratio: the support's share of the places, in (0, 1]; max(1, int(ratio * places)) of them, by the teacher's A_g, the
            lower index (row by row) first among equals.
        batch_keep: the fraction of every batch that the teacher is asked about and whose maps are compared, in (0, 1], by
            the student's entropy, the highest first (`selection.select_batch_rows`). 1: all.
        student_layers, teacher_layers: names in `named_modules()` whose outputs are the maps; groups with commas between
            them, the layers of a group with + between them, as layer1.0+layer1.1,layer2. Both networks need equally
            many groups. None: the network's `stages`, as all of this package's have: a group each, of the stage's blocks
            where it is a `torch.nn.Sequential` whose children all have children of their own, else of the stage alone. (A
            row of convolution, normalisation and activation is no row of blocks.)

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        ce_weight: float = 1.0,
        kd_weight: float = 0.0,
        kr_weight: float = 1.0,
        tau: float = 0.1,
        ratio: float = 0.5,
        batch_keep: float = 1.0,
        student_layers: str | None = None,
        teacher_layers: str | None = None,
    ):
        super().__init__()
        self.set_options(check_positive, temperature=temperature, tau=tau)
        self.set_options(check_finite, ce_weight=ce_weight, kd_weight=kd_weight, kr_weight=kr_weight)
        self.set_options(check_fraction, ratio=ratio, batch_keep=batch_keep)
        check_used("temperature", temperature, 4, kd_weight == 0, "kd_weight=0")
        self.student_layers = student_layers
        self.teacher_layers = teacher_layers
        self._named = {
            "student": _groups_in("student_layers", student_layers),
            "teacher": _groups_in("teacher_layers", teacher_layers),
        }
        self._taps: dict[str, list[list[Tap]]] = {}

    def prepare(self, student: nn.Module, teacher: nn.Module | None, samples: Iterable[Batch]) -> None:
        """Taps both networks and sends one sample through them, in evaluation mode and without gradients.

        Raises:
            ValueError: a layer does not exist or takes no hooks, a network has no `stages` and no layers were named, or the
                networks have different numbers of groups.
            RuntimeError: a layer is not passed, or its output is no map (b, c, h, w).
        """
        self.release()
        networks = {"student": student, "teacher": teacher}
        groups = {name: self._groups_of(name, network) for name, network in networks.items()}
        if len(groups["student"]) != len(groups["teacher"]):
            told = [f"{len(paths)} ({_written(paths)})" for paths in groups.values()]
            raise ValueError(
                f"student_layers and teacher_layers must be equally many groups, got {told[0]} and {told[1]}"
            )
        for name, paths in groups.items():
            self._taps[name] = []  # one by one, so that `release` finds those before one that fails
            for group in paths:
                self._taps[name].append([])
                for path in group:
                    self._taps[name][-1].append(Tap(networks[name], path, name, output=True))
        x = next(iter(samples)).x[:1]
        with evaluation_mode(student), evaluation_mode(teacher), torch.no_grad():
            for name, network in networks.items():
                self._ask(name, network, x)

    def _groups_of(self, name: str, network: nn.Module) -> list[list[str]]:
        """The paths of the network's layers, by group."""
        named, there = self._named[name], dict(network.named_modules())
        if named is None and not stages_of(network):
            raise ValueError(
                f"{name}_layers must name layers, as {EXAMPLE}: the {name}, of {type(network).__name__}, has no stages, a tuple "
                f"of their names"
            )
        groups = [[path] for path in stages_of(network)] if named is None else named
        for path in (path for group in groups for path in group):
            if path not in there:
                raise ValueError(f"{name}_layers must be names in {name}.named_modules(), which has no {path!r}")
        return [_layers_of(path, there[path]) for (path,) in groups] if named is None else groups

    def _ask(self, name: str, network: nn.Module | None, x: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
        """Logits (b, classes), and the maps (b, c, h, w) of every layer, by group."""
        if name not in self._taps:
            raise RuntimeError(f"{type(self).__name__} needs prepare(student, teacher, samples) before it is called")
        for tap in (tap for group in self._taps[name] for tap in group):
            tap.listen()
        logits = network(x)
        return logits, [[tap.take_map() for tap in group] for group in self._taps[name]]

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """`terms`: "kr", the sum of all L_g without its weight; "kl", where kd_weight is not 0, the mean KL divergence at
        temperature T, in nats, without its weight and T^2."""
        logits, maps = self._ask("student", student, batch.x)
        rows = select_batch_rows(logits, self.batch_keep)
        with torch.no_grad():
            target, target_maps = self._ask("teacher", teacher, take_rows(batch.x, rows))
        kr = torch.stack(
            [
                representing_loss([take_rows(x, rows) for x in group], of_teacher, self.tau, self.ratio)
                for group, of_teacher in zip(maps, target_maps, strict=True)
            ]
        ).sum()
        weights = {"temperature": self.temperature, "kd_weight": self.kd_weight, "ce_weight": self.ce_weight}
        loss, value, terms = distill_optionally(logits, target, batch.label, rows, **weights)
        return Outcome(loss + self.kr_weight * kr, logits.detach(), value, {"kr": kr.detach(), **terms})

    def release(self) -> None:
        """Takes the hooks off the networks."""
        while self._taps:
            for tap in (tap for group in self._taps.popitem()[1] for tap in group):
                tap.remove()


def representing_loss(
    student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], tau: float = 0.1, ratio: float = 0.5
) -> Tensor:
    """L_g of one group: (), at least float32, differentiable in all maps; the support is a constant.

    Args:
        student_maps, teacher_maps: maps (b, c, h, w), at least one each, of any channels and sizes but of equal b.
        tau: > 0.
        ratio: in (0, 1].
    """
    height, width = (min(x.shape[side] for x in (*student_maps, *teacher_maps)) for side in (2, 3))
    with full_precision(student_maps[0]):
        student, teacher = (aggregated(maps, (height, width)) for maps in (student_maps, teacher_maps))
        return recoding_loss(student, teacher, tau, ratio)


def aggregated(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """A_g (b, h * w) of maps (b, c, any, any), at least float32: the mean of directions (`unit_rows`). size: (h, w)."""
    directions = [unit_rows(functional.adaptive_avg_pool2d(_energy(x), size).flatten(1)) for x in maps]
    return torch.stack(directions).mean(0)


def _energy(x: Tensor) -> Tensor:
    """Mean over the channels of the squares: (b, c, h, w) -> (b, 1, h, w), at least float32."""
    x = at_least_float32(x)
    # Not `square().mean(1)`: the gradient of that mean is written out in full, in a layout that need not be x's.
    return (x * x).sum(1, keepdim=True) / x.shape[1]


def recoding_loss(student: Tensor, teacher: Tensor, tau: float, ratio: float) -> Tensor:
    """Mean of -sum P~ log Q~ over the support, of both networks' A_g (b, n): (). See `KnowledgeRepresenting`.

    The support is found by A_g itself, which orders as P_g does and tells apart what the exponential would not. A row that
    is not a number makes the loss NaN.
    """
    kept = max(1, int(round(ratio * teacher.shape[1], 9)))  # 0.29 * 100 is a little less than 29 in floating point
    support = teacher.detach().argsort(dim=1, descending=True, stable=True)[:, :kept]
    p = (teacher.gather(1, support) / tau).softmax(1)
    log_q = (student.gather(1, support) / tau).log_softmax(1)
    return -(p * log_q).sum(1).mean()


def _groups_in(option: str, given: str | None) -> list[list[str]] | None:
    """The layers' names, by group, out of text with commas between groups and + between layers."""
    takes = f"names of layers, as {EXAMPLE}, or None"
    if given is None:
        return None
    if not isinstance(given, str):
        raise TypeError(f"{option} must be {takes}, got {describe(given)}")
    groups = [[path.strip() for path in group.split("+")] for group in given.split(",")]
    if not all(path for group in groups for path in group):
        raise ValueError(f"{option} must be {takes}, got {brief(given)}, where a name is empty")
    return groups


def _layers_of(path: str, stage: nn.Module) -> list[str]:
    """The paths of a stage's blocks, if it is a row of them, else its own; a row inside a row of one is that row."""
    children = dict(stage.named_children()) if isinstance(stage, nn.Sequential) else {}
    if not children or any(next(child.children(), None) is None for child in children.values()):
        return [path]
    if len(children) == 1:
        ((name, child),) = children.items()
        return _layers_of(f"{path}.{name}", child)
    return [f"{path}.{name}" for name in children]


def _written(groups: Sequence[Sequence[str]]) -> str:
    """As the options have them."""
    return ",".join("+".join(group) for group in groups)
