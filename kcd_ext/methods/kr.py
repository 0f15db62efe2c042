"""Knowledge representing (KR; after arXiv 1911.05329): where in the image each stage of the networks is active."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checks import check_bool, check_finite, check_fraction, check_positive, check_used
from ..describe import brief, describe
from ..networks import evaluation_mode
from .features import Tap, at_least_float32, full_precision, stages_of, unit_rows
from .kd import distill_if_weighted
from .protocol import Batch, Method, Outcome
from .selection import select_batch_rows, take_rows

EXAMPLE = "layer1.0+layer1.1,layer2"  # two groups, for error messages


class KnowledgeRepresenting(Method):
    """Knowledge representing (KR), after arXiv 1911.05329: where in the image each stage of the networks is active.

        loss = ce_weight * CE + kr_weight * sum_g L_g
             + kd_weight * T^2 * KL(teacher || student)

    The knowledge value is the student's entropy. For each group g of layers, whose outputs are maps F_l (b, c, h, w) of any
    size:

        a_l = mean_c F_l^2, pooled to the group's size, flattened
              and divided by its length,
        A_g = mean_l a_l,    P_g = softmax(A_g / tau),
        L_g = mean over the batch of -sum_i P~_i log Q~_i.

    P is the teacher's, Q the student's. The index i runs over the support: the fraction `ratio` of all positions where the
    teacher's P_g is largest. P~ and Q~ are P_g and Q_g restricted to the support and scaled to the sum 1. L_g is smallest,
    but not 0, when the student equals the teacher: then it is the entropy of P~.

    - From the paper's abstract: knowledge of several layers is aggregated to a more abstract level, the student learns it
      with penalised gradients ("sparse recoding"), and both are combined with distilled logits.
    - Rebuilt, because no text gave them: all formulas above, tau and ratio. So we do not claim the paper's numbers.

    Also our choice:

    - A group has one size, the smallest height and the smallest width of all its maps in both networks. Larger maps are
      averaged (adaptive average pooling); none is enlarged.
    - The gradient with respect to the student's A_g is exactly zero off the support. (The length of an a_l covers all
      positions, so a feature off the support still moves the others through it.)
    - A support of one position, as for maps of fewer than four positions at ratio 0.5, has the loss 0 and teaches nothing.
    - A map of zeros has no direction: its a_l is zeros and passes no gradient.

    Args:
        temperature: T of the KL term, > 0; any value but the default is refused if kd_weight is 0.
        ce_weight: Weight of the cross entropy, finite.
        kd_weight: Weight of the KL term, finite. 0: no KL is computed.
        kr_weight: Weight of the sum of all L_g, the activation term, finite.
        tau: Temperature of the softmax over positions, > 0.
        ratio: Fraction of the positions to compare (the support), in (0, 1]: the max(1, int(ratio * positions)) where the
            teacher's A_g is largest. Ties go to the lower index, counted row by row.
        batch_keep: Fraction of each batch that the teacher runs on and whose maps are compared, in (0, 1]: the rows of
            highest student entropy (`selection.select_batch_rows`). 1: all rows.
        student_layers: The student's layers whose outputs are the maps, names in `named_modules()`. Write commas between
            groups and + between the layers of a group, e.g. layer1.0+layer1.1,layer2. Both networks need the same number of
            groups. None: one group for each of the network's `stages`, which all networks in `kcd_ext.models` have. A stage
            that is a `torch.nn.Sequential` of blocks contributes its blocks, any other stage itself. (A child without children,
            such as a convolution, is not a block.)
        teacher_layers: The same for the teacher.
        label_smoothing: Label smoothing of the cross entropy, in [0, 1].
        standardize: Compare the z-scores of each row's logits in the KL term (`kd.standardized`, Sun et al., CVPR 2024). Refused
            if kd_weight is 0.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or has no effect.
    """

    takes_soft_labels = True

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
        label_smoothing: float = 0.0,
        standardize: bool = False,
    ):
        super().__init__()
        self.set_options(check_positive, temperature=temperature, tau=tau)
        self.set_options(check_finite, ce_weight=ce_weight, kd_weight=kd_weight, kr_weight=kr_weight)
        self.set_options(check_fraction, ratio=ratio, batch_keep=batch_keep)
        self.set_label_smoothing(label_smoothing, ce_weight)
        self.set_options(check_bool, standardize=standardize)
        check_used("temperature", temperature, 4, kd_weight == 0, "kd_weight=0")
        check_used("standardize", standardize, False, kd_weight == 0, "kd_weight=0")
        self.student_layers = student_layers
        self.teacher_layers = teacher_layers
        self._named_groups = {
            "student": _parse_groups("student_layers", student_layers),
            "teacher": _parse_groups("teacher_layers", teacher_layers),
        }
        self._taps: dict[str, list[list[Tap]]] = {}

    def prepare(self, student: nn.Module, teacher: nn.Module | None, samples: Iterable[Batch]) -> None:
        """Tap both networks and run one sample through them, in evaluation mode and without gradients.

        Raises:
            ValueError: A layer does not exist or takes no hooks, a network has no `stages` and no layers were named, or the
                networks have different numbers of groups.
            RuntimeError: A layer did not run, or its output is not a map (b, c, h, w).
        """
        self.release()
        networks = {"student": student, "teacher": teacher}
        groups = {name: self._groups_of(name, network) for name, network in networks.items()}
        if len(groups["student"]) != len(groups["teacher"]):
            found = [f"{len(paths)} ({_format_groups(paths)})" for paths in groups.values()]
            raise ValueError(
                f"student_layers and teacher_layers must have the same number of groups, got {found[0]} and {found[1]}"
            )
        for name, paths in groups.items():
            self._taps[name] = []  # one by one, so that `release` removes those made before a failure
            for group in paths:
                self._taps[name].append([])
                for path in group:
                    self._taps[name][-1].append(Tap(networks[name], path, name, output=True))
        x = next(iter(samples)).x[:1]
        with evaluation_mode(student), evaluation_mode(teacher), torch.no_grad():
            for name, network in networks.items():
                self._forward(name, network, x)

    def _groups_of(self, name: str, network: nn.Module) -> list[list[str]]:
        """Return the paths of the network's layers, by group."""
        named, modules = self._named_groups[name], dict(network.named_modules())
        if named is None and not stages_of(network):
            raise ValueError(
                f"{name}_layers must name layers, e.g. {EXAMPLE}: the {name}, a {type(network).__name__}, has no `stages`, a "
                f"tuple of layer names"
            )
        groups = [[path] for path in stages_of(network)] if named is None else named
        for path in (path for group in groups for path in group):
            if path not in modules:
                raise ValueError(f"{name}_layers must be names in {name}.named_modules(), which has no {path!r}")
        return [_block_paths(path, modules[path]) for (path,) in groups] if named is None else groups

    def _forward(self, name: str, network: nn.Module | None, x: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
        """Return the logits (b, classes), and the maps (b, c, h, w) of each layer, by group."""
        if name not in self._taps:
            raise RuntimeError(f"{type(self).__name__} needs prepare(student, teacher, samples) before it is called")
        for tap in (tap for group in self._taps[name] for tap in group):
            tap.listen()
        logits = network(x)
        return logits, [[tap.pop_map() for tap in group] for group in self._taps[name]]

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """Return the loss of a batch.

        `terms` are "kr", the sum of all L_g without its weight, and, if kd_weight is not 0, "kl", the mean KL divergence at
        temperature T, in nats, without its weight and T^2.
        """
        logits, maps = self._forward("student", student, batch.x)
        rows = select_batch_rows(logits, self.batch_keep)
        with torch.no_grad():
            target, target_maps = self._forward("teacher", teacher, take_rows(batch.x, rows))
        kr = torch.stack(
            [
                representing_loss([take_rows(x, rows) for x in group], teacher_group, self.tau, self.ratio)
                for group, teacher_group in zip(maps, target_maps, strict=True)
            ]
        ).sum()
        weights = {"temperature": self.temperature, "kd_weight": self.kd_weight, "ce_weight": self.ce_weight}
        weights |= {"label_smoothing": self.label_smoothing, "standardize": self.standardize}
        loss, value, terms, kl = distill_if_weighted(logits, target, batch.label, rows, **weights)
        return Outcome(loss + self.kr_weight * kr, logits.detach(), value, {"kr": kr.detach(), **terms}, kl=kl)

    def release(self) -> None:
        """Remove the hooks from the networks."""
        while self._taps:
            for tap in (tap for group in self._taps.popitem()[1] for tap in group):
                tap.remove()


def representing_loss(
    student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], tau: float = 0.1, ratio: float = 0.5
) -> Tensor:
    """Return L_g of one group, a scalar of at least float32. Gradients reach all maps; the support is a constant.

    Args:
        student_maps: At least one map (b, c, h, w), of any channels and sizes.
        teacher_maps: The same, with the same b.
        tau: Temperature of the softmax over positions, > 0.
        ratio: Fraction of the positions to compare, in (0, 1].
    """
    height, width = (min(x.shape[side] for x in (*student_maps, *teacher_maps)) for side in (2, 3))
    with full_precision(student_maps[0]):
        student, teacher = (aggregate(maps, (height, width)) for maps in (student_maps, teacher_maps))
        return recoding_loss(student, teacher, tau, ratio)


def aggregate(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Return A_g (b, h * w) of maps (b, c, any, any), at least float32: the mean of directions (`unit_rows`). size: (h, w)."""
    directions = [unit_rows(functional.adaptive_avg_pool2d(_energy(x), size).flatten(1)) for x in maps]
    return torch.stack(directions).mean(0)


def _energy(x: Tensor) -> Tensor:
    """Return the mean of the squares over the channels: (b, c, h, w) -> (b, 1, h, w), at least float32."""
    x = at_least_float32(x)
    # Not `square().mean(1)`: autograd writes the gradient of that mean out in full, perhaps in another layout than x's.
    return (x * x).sum(1, keepdim=True) / x.shape[1]


def recoding_loss(student: Tensor, teacher: Tensor, tau: float, ratio: float) -> Tensor:
    """Return the mean of -sum P~ log Q~ over the support, () from both networks' A_g (b, n). See `KnowledgeRepresenting`.

    The support comes from A_g, which has the order of P_g and distinguishes positions whose exponentials round to the same
    number. A NaN in a row makes the loss NaN.
    """
    kept = max(1, int(round(ratio * teacher.shape[1], 9)))  # 0.29 * 100 is a little less than 29 in floating point
    support = teacher.detach().argsort(dim=1, descending=True, stable=True)[:, :kept]
    p = (teacher.gather(1, support) / tau).softmax(1)
    log_q = (student.gather(1, support) / tau).log_softmax(1)
    return -(p * log_q).sum(1).mean()


def _parse_groups(option: str, text: str | None) -> list[list[str]] | None:
    """Parse text with commas between groups and + between layers into layer names by group."""
    takes = f"names of layers, e.g. {EXAMPLE}, or None"
    if text is None:
        return None
    if not isinstance(text, str):
        raise TypeError(f"{option} must be {takes}, got {describe(text)}")
    groups = [[path.strip() for path in group.split("+")] for group in text.split(",")]
    if not all(path for group in groups for path in group):
        raise ValueError(f"{option} must be {takes}, got {brief(text)}, with an empty name")
    return groups


def _block_paths(path: str, stage: nn.Module) -> list[str]:
    """Return the paths of a stage's blocks if it is a sequence of blocks, else its own.

    If its only child is itself a sequence of blocks, return the paths of that child's blocks.
    """
    children = dict(stage.named_children()) if isinstance(stage, nn.Sequential) else {}
    if not children or any(next(child.children(), None) is None for child in children.values()):
        return [path]
    if len(children) == 1:
        ((name, child),) = children.items()
        return _block_paths(f"{path}.{name}", child)
    return [f"{path}.{name}" for name in children]


def _format_groups(groups: Sequence[Sequence[str]]) -> str:
    """Return the groups as the options write them."""
    return ",".join("+".join(group) for group in groups)
