"""What is measured against each other: ways to compute a distillation loss from (student, teacher, keep)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kcd_ext

from .floors import selected

TEMPERATURE = 4.0
KEEPS = (0.7, 1.0, 0.2)  # in order of importance
LIGER = ("Liger KL", "Liger JSD")


@dataclass(frozen=True)
class Candidate:
    """One way to compute the loss."""

    name: str
    loss: Callable[[Tensor, Tensor, float], Tensor]
    """(student, teacher, keep) -> scalar."""
    keeps: tuple[float, ...] = KEEPS
    """What it is measured at."""
    inplace: bool = False
    """Overwrites the student's logits with their gradient; measured forward and backward only."""
    compiles: bool = False
    """Its first call of a shape and direction takes long."""
    tolerance: float | None = None
    """How far from the exact loss it may be, relatively; None: it is another loss."""


def ours(student: Tensor, teacher: Tensor, keep: float) -> Tensor:
    """The job as one call."""
    return kcd_ext.condensed_kd_loss(student, teacher, temperature=TEMPERATURE, keep=keep)


def ours_inplace(student: Tensor, teacher: Tensor, keep: float) -> Tensor:
    """The same, and the gradient takes the logits' place."""
    return kcd_ext.condensed_kd_loss(student, teacher, temperature=TEMPERATURE, keep=keep, inplace=True)


def eager(student: Tensor, teacher: Tensor, keep: float) -> Tensor:
    """The job as one writes it in PyTorch, in the logits' dtype."""
    log_q, p = F.log_softmax(student / TEMPERATURE, 1), F.softmax(teacher / TEMPERATURE, 1)
    kl = F.kl_div(log_q, p, reduction="none").sum(1)
    with torch.no_grad():
        log_pi = F.log_softmax(student, 1)
        entropy = -(log_pi.exp() * log_pi).sum(1)
        rows = entropy.topk(selected(keep, len(entropy))).indices
    return kl[rows].mean() * TEMPERATURE**2


def exact(student: Tensor, teacher: Tensor, keeps: tuple[float, ...]) -> dict[float, float]:
    """The job's loss for each keep, in float64 and a few rows at a time."""
    step = max(1, 2**24 // student.shape[1])
    divergences, entropies = [], []
    for some_student, some_teacher in zip(student.split(step), teacher.split(step), strict=True):
        z, y = some_student.double(), some_teacher.double()
        log_q, log_p, log_pi = F.log_softmax(z / TEMPERATURE, 1), F.log_softmax(y / TEMPERATURE, 1), F.log_softmax(z, 1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(1))
        entropies.append(-(log_pi.exp() * log_pi).sum(1))
    kl, entropy = torch.cat(divergences), torch.cat(entropies)
    top = {keep: entropy.topk(selected(keep, len(entropy))).indices for keep in keeps}
    return {keep: kl[rows].mean().item() * TEMPERATURE**2 for keep, rows in top.items()}


def candidates() -> tuple[list[Candidate], dict[str, str]]:
    """All that are here, ours first, and those that are not: name -> why."""
    # A shape and a direction each count as one compilation of the same function, of which more than 8 would run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    compiled = torch.compile(eager, dynamic=False, fullgraph=True)
    here = [
        Candidate("kcd_ext", ours, tolerance=1e-4),
        Candidate("kcd_ext in place", ours_inplace, inplace=True, tolerance=1e-4),
        Candidate("eager", eager, tolerance=0.1),  # half precision rounds every step
        Candidate("compile", compiled, keeps=KEEPS[:1], compiles=True, tolerance=0.1),
    ]
    try:
        return here + _liger(), {}
    except ImportError as error:
        return here, dict.fromkeys(LIGER, f"not installed: {error}")


def _liger() -> list[Candidate]:
    """Liger-Kernel's losses of log-softmaxes: they choose no rows and give no entropies, so have less to do."""
    from liger_kernel.transformers.jsd import LigerJSD
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    divergence, jensen_shannon = LigerKLDIVLoss(reduction="batchmean", log_target=True), LigerJSD()

    def on_log_softmaxes(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, float], Tensor]:
        def whole(student: Tensor, teacher: Tensor, _: float) -> Tensor:
            log_q, log_p = F.log_softmax(student / TEMPERATURE, -1), F.log_softmax(teacher / TEMPERATURE, -1)
            return loss(log_q, log_p) * TEMPERATURE**2

        return whole

    return [
        Candidate(LIGER[0], on_log_softmaxes(divergence), keeps=(1.0,), tolerance=0.1),
        Candidate(LIGER[1], on_log_softmaxes(jensen_shannon), keeps=(1.0,)),
    ]
