"""condensed_kd_loss from the definitions, in NumPy's extended precision, with the error a kernel may make beside every number.

Other formulas than the code under test: KL as sum p log p - sum p log q over explicit distributions, entropies from
probabilities, ranking by Python's sort.  Only the selection starts from the values that the code under test returned (they are
checked on their own), so that a last-bit difference between two almost equal rows does not select another row.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

REAL = np.longdouble
ROOM = 24.0  # how many units (half a last place) of the accumulator each term may be off
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float64: 5e-324, torch.float32: 1.5e-45, torch.float16: 6e-8, torch.bfloat16: 1e-40}
NORMAL = {torch.float64: 2.3e-308, torch.float32: 1.2e-38}


def exact(x: Tensor) -> np.ndarray:
    return x.detach().to(torch.float64).numpy().astype(REAL)


@dataclass
class Softmax:
    """A distribution, and how many units each probability may be off (the exponent's rounding grows with its size)."""

    log: np.ndarray
    p: np.ndarray
    units: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray, temperature: float) -> "Softmax":
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            x = (logits - logits.max()) / REAL(temperature)
            others = np.where(np.arange(len(x)) == np.argmax(x), 0, np.exp(x))  # the most likely class adds e^0 = 1
            log = x - np.log1p(others.sum()) if np.isfinite(x.max()) else np.full_like(x, np.nan)
            p = np.exp(log)
            units = np.where(p > 0, p * (1 + np.abs(x)), 0)
        return cls(log, p, units)

    def entropy(self, dtype: torch.dtype) -> tuple[REAL, REAL]:
        """In nats, and its error: relative to what the classes beside the most likely one add, so that it is small where the
        entropy is."""
        with np.errstate(invalid="ignore"):
            terms = np.where(self.p == 0, 0, -self.p * self.log)
            beside = np.where(self.log == self.log.max(), 1 - self.p, self.units)
            error = ROOM * UNIT[dtype] * (terms.sum() + (beside * np.where(self.p == 0, 0, 1 - self.log)).sum())
            error += 1000 * NORMAL[dtype] * len(self.p)  # -p log p where p underflows
        return terms.sum(), np.nan_to_num(error)


def _kl(z: np.ndarray, y: np.ndarray, temperature: float, unit: float) -> tuple[tuple[Softmax, Softmax], REAL, REAL]:
    q, p = Softmax.of(z, temperature), Softmax.of(y, temperature)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        present = (y - y.max()) / REAL(temperature) > -1075 * np.log(REAL(2))  # what float64 tells from 0
        if np.isnan(p.p).any() or np.isnan(q.p).any():
            return (q, p), REAL("nan"), REAL(0)
        if (present & np.isneginf(z)).any():
            return (q, p), REAL("inf"), REAL(0)
        kl = (p.p[present] * p.log[present]).sum() - (p.p[present] * q.log[present]).sum()
        gap = np.abs((y - y.max()) - (z - z.max()))[present] / REAL(temperature)
        error = (p.units[present] * (gap + 1)).sum() + np.abs(np.log(len(z))) + np.abs(kl) + 1
    return (q, p), kl, ROOM * unit * error


def expected(
    student: Tensor,
    teacher: Tensor,
    got: dict[str, Tensor],
    *,
    grad_output: Tensor | None = None,
    temperature=4.0,
    keep=1.0,
    value="entropy",
    labels=None,
    kd_weight=None,
    ce_weight=None,
    row_weight=None,
    rows=None,
    ignore_index=-100,
    reduction="mean",
    inplace=False,
) -> dict[str, np.ndarray]:
    """What `got` should be: for every quantity of Knowledge, the loss and the gradient, the number and `<name>_error`."""
    classes, dtype = student.shape[-1], student.dtype
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    unit = UNIT[accumulator]
    z, y = exact(student).reshape(-1, classes), exact(teacher).reshape(-1, classes)
    n = len(z)
    kd_weight = (1.0 if labels is None else 0.9) if kd_weight is None else kd_weight
    ce_weight = (0.0 if labels is None else 0.1) if ce_weight is None else ce_weight
    label = None if labels is None else labels.reshape(-1).tolist()
    valid = [label is None or label[i] != ignore_index for i in range(n)]
    teacher_row = {i: i for i in range(n)} if rows is None else {i: j for j, i in enumerate(rows.tolist()) if i >= 0}
    candidate = [valid[i] and i in teacher_row for i in range(n)]

    nan = REAL("nan")
    out = {name: np.full(n, nan, REAL) for name in ("entropy", "kl", "value")}
    error = {name: np.zeros(n, REAL) for name in ("entropy", "kl", "value")}
    ce, ce_error = np.zeros(n, REAL), np.zeros(n, REAL)
    softmax, kd = {}, {}
    for i in range(n):
        if not valid[i]:
            continue
        softmax[i] = pi = Softmax.of(z[i], 1.0)
        out["entropy"][i], error["entropy"][i] = pi.entropy(accumulator)
        if label is not None:
            ce[i] = -pi.log[label[i]]
            ce_error[i] = ROOM * unit * (abs(ce[i]) + np.log(classes) + 1) if np.isfinite(ce[i]) else 0
        if candidate[i]:
            kd[i], out["kl"][i], error["kl"][i] = _kl(z[i], y[teacher_row[i]], temperature, unit)

    for i in range(n):
        if not candidate[i] or np.isnan(out["entropy"][i]) or np.isnan(out["kl"][i]):
            continue
        if isinstance(value, Tensor):
            out["value"][i] = exact(value).reshape(-1)[i]
        elif value == "teacher_entropy":
            out["value"][i], error["value"][i] = Softmax.of(y[teacher_row[i]], 1.0).entropy(accumulator)
        elif value == "cross_entropy":
            out["value"][i], error["value"][i] = ce[i], ce_error[i]
        else:
            out["value"][i], error["value"][i] = out[value][i], error[value][i]

    # ---- selection, from the values that were returned
    n_candidates = sum(candidate)
    k = (
        0
        if n_candidates == 0
        else min(keep, n_candidates)
        if isinstance(keep, int)
        else max(1, int(keep * n_candidates))
    )
    returned = got["value"].reshape(-1).to(torch.float64).tolist()
    ranking = sorted(
        (i for i in range(n) if candidate[i]),
        key=lambda i: (returned[i] == returned[i], -returned[i] if returned[i] == returned[i] else 0, i),
    )
    selected = set(ranking[:k])

    # ---- loss and gradient
    weight = np.ones(n, REAL) if row_weight is None else exact(row_weight).reshape(-1)
    n_valid = sum(valid)
    over_valid = REAL(1) / n_valid if reduction == "mean" and n_valid else REAL(1)
    over_selected = REAL(1) / k if reduction == "mean" and k else REAL(1)
    t2 = REAL(temperature) ** 2
    g = np.ones(n, REAL) if grad_output is None else np.broadcast_to(exact(grad_output).reshape(-1), (n,))
    with np.errstate(invalid="ignore", over="ignore"):
        ce_terms = np.array([ce_weight * ce[i] * over_valid if valid[i] and ce_weight else REAL(0) for i in range(n)])
        # a weight of 0 takes a row out, unless its divergence is not a number
        factor = kd_weight * t2 * weight * over_selected
        counted = [i in selected and (factor[i] != 0 or bool(np.isnan(out["kl"][i]))) for i in range(n)]
        kd_terms = np.array([factor[i] * out["kl"][i] if counted[i] else REAL(0) for i in range(n)])
        loss = ce_terms + kd_terms
        loss_error = np.abs(ce_weight * over_valid) * ce_error + 4 * unit * np.abs(loss)
        loss_error = loss_error + np.array([abs(factor[i]) * error["kl"][i] if counted[i] else 0 for i in range(n)])
        grad, grad_error = np.zeros_like(z), np.zeros_like(z)
        for i in range(n):
            a = g[i] * ce_weight * over_valid if valid[i] and label is not None else REAL(0)
            if a != 0 or np.isnan(a):
                onehot = np.arange(classes) == label[i]
                grad[i] += a * (softmax[i].p - onehot)
                grad_error[i] += abs(a) * (softmax[i].units + onehot)
            if i in selected:
                q, p = kd[i]
                b = g[i] * kd_weight * REAL(temperature) * weight[i] * over_selected
                grad[i] += b * (q.p - p.p)
                grad_error[i] += abs(b) * (q.units + p.units + NORMAL[accumulator])
        # the accumulator's roundings, then one rounding to the gradient's own type
        grad_error = ROOM * unit * grad_error + 1.001 * UNIT[dtype] * np.abs(grad) + SMALLEST[dtype]
        grad_error += NORMAL[accumulator]
        if reduction != "none":
            loss, loss_error = loss.sum(), loss_error.sum() + 4 * unit * np.abs(loss).sum()
    return {
        **out,
        **{f"{name}_error": e for name, e in error.items()},
        "selected": np.array([i in selected for i in range(n)]),
        "n_selected": np.array(k),
        "loss": loss,
        "loss_error": loss_error,
        "grad": grad,
        "grad_error": grad_error,
    }


def check(got: dict[str, Tensor], want: dict[str, np.ndarray]) -> None:
    """Every number within its error, NaN and infinities in the same places, selection equal."""
    for name in ("selected", "n_selected"):
        assert np.array_equal(got[name].reshape(want[name].shape).numpy(), want[name]), (
            f"{name}: {got[name]} != {want[name]}"
        )
    for name in ("entropy", "kl", "value", "loss", "grad"):
        x, y, error = exact(got[name]).reshape(np.shape(want[name])), want[name], want[f"{name}_error"]
        with np.errstate(invalid="ignore"):
            fine = np.where(np.isfinite(y), np.abs(x - y) <= error, (x == y) | (np.isnan(x) & np.isnan(y)))
            if not np.all(fine):
                worst = np.nanargmax(np.where(fine, 0, np.abs(x - y) / error + np.isnan(x - y)))
                raise AssertionError(
                    f"{name} at {np.unravel_index(worst, np.shape(y))}: got {np.ravel(x)[worst]}, want {np.ravel(y)[worst]} within"
                    f" {np.ravel(error)[worst]}; {int(np.size(fine) - np.sum(fine))} of {np.size(fine)} are off"
                )
