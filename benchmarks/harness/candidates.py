"""The candidates: ways to compute a distillation loss from (student, teacher, labels, keep)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kcd_ext

from .constants import COMPILE, EAGER, LEAST, LIGER, OURS, OURS_INPLACE
from .floors import num_selected

TEMPERATURE = 4.0
KD_WEIGHT, CE_WEIGHT, IGNORED = 0.9, 0.1, -100  # kcd_ext's defaults with labels

Loss = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]


@dataclass(frozen=True)
class Candidate:
    """One way to compute the loss."""

    name: str
    loss: Loss
    """(student, teacher, labels or None, keep) -> scalar."""
    only_keep: float | None = None
    """The only `keep` it supports; None: any."""
    takes_labels: bool = True
    inplace: bool = False
    """Overwrites the student's logits with their gradient."""
    compiles: bool = False
    """Compiles at the first call of each shape and direction, which takes seconds."""
    tolerance: float | None = None
    """The relative error that its loss may have; None: it computes another loss."""


def ours(student: Tensor, teacher: Tensor, labels: Tensor | None, keep: float, inplace: bool = False) -> Tensor:
    """Return the loss from one call of kcd_ext; with `inplace` the gradient overwrites the logits."""
    return kcd_ext.condensed_kd_loss(
        student, teacher, labels=labels, temperature=TEMPERATURE, keep=keep, inplace=inplace
    )


def eager(student: Tensor, teacher: Tensor, labels: Tensor | None, keep: float) -> Tensor:
    """Return the loss as a user writes it in PyTorch, in the logits' dtype."""
    log_q, p = F.log_softmax(student / TEMPERATURE, 1), F.softmax(teacher / TEMPERATURE, 1)
    kl = F.kl_div(log_q, p, reduction="none").sum(1)
    with torch.no_grad():
        log_pi = F.log_softmax(student, 1)
        entropy = -(log_pi.exp() * log_pi).sum(1)
        if labels is not None:
            valid = labels != IGNORED
            entropy.masked_fill_(~valid, -torch.inf)
        rows = entropy.topk(num_selected(keep, len(entropy))).indices
    if labels is None:
        return kl[rows].mean() * TEMPERATURE**2
    # The number of selected rows depends on the valid ones. Shapes must not, or torch.compile refuses the function.
    k = (keep * valid.sum().double()).long().clamp(min=1)
    is_selected = torch.arange(len(rows), device=k.device) < k
    kd = torch.where(is_selected, kl[rows], 0).sum() / k * TEMPERATURE**2
    return KD_WEIGHT * kd + CE_WEIGHT * F.cross_entropy(student, labels, ignore_index=IGNORED)


def exact(student: Tensor, teacher: Tensor, labels: Tensor | None, keeps: tuple[float, ...]) -> dict[float, float]:
    """Return the loss for each keep, in float64. Works on a few rows at a time to save memory."""
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
    top = {keep: entropy.topk(num_selected(keep, len(entropy))).indices for keep in keeps}
    kd = {keep: kl[rows].mean().item() * TEMPERATURE**2 for keep, rows in top.items()}
    if labels is None:
        return kd
    ce = -torch.cat(log_probabilities)[valid].mean().item()
    return {keep: KD_WEIGHT * x + CE_WEIGHT * ce for keep, x in kd.items()}


def common_candidates() -> list[Candidate]:
    """Return the candidates of every device: kcd_ext's first, then PyTorch's."""
    return [
        Candidate(OURS, ours, tolerance=1e-4),
        Candidate(OURS_INPLACE, partial(ours, inplace=True), inplace=True, tolerance=1e-4),
        Candidate(EAGER, eager, tolerance=0.1),  # half precision rounds every step
        Candidate(COMPILE, lambda *arguments: _compiled()(*arguments), compiles=True, tolerance=0.1),
    ]


@cache
def _compiled() -> Loss:
    """Return the compiled loss. Created at its first call: importing torch.compile's machinery takes a second."""
    # Each shape and direction counts as one compilation of the same function; beyond 8 it would run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(eager, dynamic=False, fullgraph=True)


def autograd_overhead() -> Candidate:
    """Return a candidate that does next to nothing: its time is the minimum of a call through autograd."""
    return Candidate(LEAST, lambda student, *_: student.sum())


def liger_candidates() -> list[Candidate]:
    """Return Liger-Kernel's losses of log-softmaxes. They select no rows and return no entropies, so they do less work.

    Raises:
        ImportError: Liger-Kernel is not installed.
    """
    from liger_kernel.transformers.jsd import LigerJSD
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    divergence, jensen_shannon = LigerKLDIVLoss(reduction="batchmean", log_target=True), LigerJSD()

    def on_log_softmaxes(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
        def scaled_loss(student: Tensor, teacher: Tensor, _labels: None, _keep: float) -> Tensor:
            log_q, log_p = F.log_softmax(student / TEMPERATURE, -1), F.log_softmax(teacher / TEMPERATURE, -1)
            return loss(log_q, log_p) * TEMPERATURE**2

        return scaled_loss

    return [
        Candidate(LIGER[0], on_log_softmaxes(divergence), only_keep=1.0, takes_labels=False, tolerance=0.1),
        Candidate(LIGER[1], on_log_softmaxes(jensen_shannon), only_keep=1.0, takes_labels=False),
    ]
