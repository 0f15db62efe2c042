"""What is measured against each other: ways to compute a distillation loss from (student, teacher, labels, keep)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kcd_ext

from .floors import selected
from .names import COMPILE, EAGER, LEAST, LIGER, OWN, OWN_INPLACE

TEMPERATURE = 4.0
KD_WEIGHT, CE_WEIGHT, IGNORED = 0.9, 0.1, -100  # kcd_ext's own with labels

Loss = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]


@dataclass(frozen=True)
class Candidate:
    """One way to compute the loss."""

    name: str
    loss: Loss
    """(student, teacher, labels or None, keep) -> scalar."""
    only_keep: float | None = None
    """What alone it can do; None: anything."""
    takes_labels: bool = True
    inplace: bool = False
    """Overwrites the student's logits with their gradient."""
    compiles: bool = False
    """Its first call of a shape and direction takes long."""
    tolerance: float | None = None
    """How far from the exact loss it may be, relatively; None: it is another loss."""


def ours(student: Tensor, teacher: Tensor, labels: Tensor | None, keep: float, inplace: bool = False) -> Tensor:
    """The job as one call; in place the gradient overwrites the logits."""
    return kcd_ext.condensed_kd_loss(
        student, teacher, labels=labels, temperature=TEMPERATURE, keep=keep, inplace=inplace
    )


def eager(student: Tensor, teacher: Tensor, labels: Tensor | None, keep: float) -> Tensor:
    """The job as one writes it in PyTorch, in the logits' dtype."""
    log_q, p = F.log_softmax(student / TEMPERATURE, 1), F.softmax(teacher / TEMPERATURE, 1)
    kl = F.kl_div(log_q, p, reduction="none").sum(1)
    with torch.no_grad():
        log_pi = F.log_softmax(student, 1)
        entropy = -(log_pi.exp() * log_pi).sum(1)
        if labels is not None:
            valid = labels != IGNORED
            entropy.masked_fill_(~valid, -torch.inf)
        rows = entropy.topk(selected(keep, len(entropy))).indices
    if labels is None:
        return kl[rows].mean() * TEMPERATURE**2
    # How many are selected depends on how many are valid; shapes may not, or torch.compile would not take it.
    k = (keep * valid.sum().double()).long().clamp(min=1)
    among = torch.arange(len(rows), device=k.device) < k
    kd = torch.where(among, kl[rows], 0).sum() / k * TEMPERATURE**2
    return KD_WEIGHT * kd + CE_WEIGHT * F.cross_entropy(student, labels, ignore_index=IGNORED)


def exact(student: Tensor, teacher: Tensor, labels: Tensor | None, keeps: tuple[float, ...]) -> dict[float, float]:
    """The job's loss for each keep, in float64 and a few rows at a time."""
    valid = slice(None) if labels is None else labels != IGNORED
    step = max(1, 2**24 // student.shape[1])
    divergences, entropies, log_probabilities = [], [], []
    for i in range(0, len(student), step):
        z, y = student[i : i + step].double(), teacher[i : i + step].double()
        log_q, log_p, log_pi = F.log_softmax(z / TEMPERATURE, 1), F.log_softmax(y / TEMPERATURE, 1), F.log_softmax(z, 1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(1))
        entropies.append(-(log_pi.exp() * log_pi).sum(1))
        if labels is not None:
            log_probabilities.append(log_pi.gather(1, labels[i : i + step, None].clamp(min=0)).squeeze(1))
    kl, entropy = torch.cat(divergences)[valid], torch.cat(entropies)[valid]
    top = {keep: entropy.topk(selected(keep, len(entropy))).indices for keep in keeps}
    kd = {keep: kl[rows].mean().item() * TEMPERATURE**2 for keep, rows in top.items()}
    if labels is None:
        return kd
    ce = -torch.cat(log_probabilities)[valid].mean().item()
    return {keep: KD_WEIGHT * x + CE_WEIGHT * ce for keep, x in kd.items()}


def ours_and_torchs() -> list[Candidate]:
    """On every device; ours first."""
    return [
        Candidate(OWN, ours, tolerance=1e-4),
        Candidate(OWN_INPLACE, partial(ours, inplace=True), inplace=True, tolerance=1e-4),
        Candidate(EAGER, eager, tolerance=0.1),  # half precision rounds every step
        Candidate(COMPILE, lambda *arguments: _compiled()(*arguments), compiles=True, tolerance=0.1),
    ]


@cache
def _compiled() -> Loss:
    """Made when it is first called: torch.compile alone takes a second to import."""
    # A shape and a direction each count as one compilation of the same function, of which more than 8 would run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(eager, dynamic=False, fullgraph=True)


def least() -> Candidate:
    """What a call through autograd costs at least."""
    return Candidate(LEAST, lambda student, *_: student.sum())


def ligers() -> list[Candidate]:
    """Liger-Kernel's losses of log-softmaxes: they choose no rows and give no entropies, so have less to do.

    Raises:
        ImportError: it is not installed.
    """
    from liger_kernel.transformers.jsd import LigerJSD
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    divergence, jensen_shannon = LigerKLDIVLoss(reduction="batchmean", log_target=True), LigerJSD()

    def on_log_softmaxes(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
        def whole(student: Tensor, teacher: Tensor, _labels: None, _keep: float) -> Tensor:
            log_q, log_p = F.log_softmax(student / TEMPERATURE, -1), F.log_softmax(teacher / TEMPERATURE, -1)
            return loss(log_q, log_p) * TEMPERATURE**2

        return whole

    return [
        Candidate(LIGER[0], on_log_softmaxes(divergence), only_keep=1.0, takes_labels=False, tolerance=0.1),
        Candidate(LIGER[1], on_log_softmaxes(jensen_shannon), only_keep=1.0, takes_labels=False),
    ]
