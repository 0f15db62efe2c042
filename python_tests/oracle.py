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
    """The distributions of some rows, and how many units each probability may be off (the exponent's rounding grows with its
    size)."""

    log: np.ndarray
    p: np.ndarray
    units: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray, temperature: float) -> "Softmax":
        """Of (rows, classes)."""
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            x = (logits - logits.max(1, keepdims=True)) / REAL(temperature)
            # the most likely class adds e^0 = 1
            others = np.where(np.arange(x.shape[1]) == x.argmax(1)[:, None], 0, np.exp(x))
            log = x - np.log1p(others.sum(1, keepdims=True))
            log[~np.isfinite(x.max(1))] = np.nan
            p = np.exp(log)
            units = np.where(p > 0, p * (1 + np.abs(x)), 0)
        return cls(log, p, units)

    def entropy(self, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
        """In nats, and its error: relative to what the classes beside the most likely one add, so that it is small where the
        entropy is."""
        with np.errstate(invalid="ignore"):
            terms = np.where(self.p == 0, 0, -self.p * self.log)
            beside = np.where(self.log == self.log.max(1, keepdims=True), 1 - self.p, self.units)
            error = terms.sum(1) + (beside * np.where(self.p == 0, 0, 1 - self.log)).sum(1)
            error = ROOM * UNIT[dtype] * error + 1000 * NORMAL[dtype] * self.p.shape[1]  # -p log p where p underflows
        return terms.sum(1), np.nan_to_num(error)


def _kl(
    z: np.ndarray, y: np.ndarray, temperature: float, unit: float
) -> tuple[Softmax, Softmax, np.ndarray, np.ndarray]:
    q, p = Softmax.of(z, temperature), Softmax.of(y, temperature)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        y, z_below = y - y.max(1, keepdims=True), z - z.max(1, keepdims=True)
        present = y / REAL(temperature) > -1075 * np.log(REAL(2))  # what float64 tells from 0

        def total(x):
            return np.where(present, x, 0).sum(1)

        kl = total(p.p * p.log) - total(p.p * q.log)
        gap = np.abs(y - z_below) / REAL(temperature)
        error = total(p.units * (gap + 1)) + np.abs(np.log(z.shape[1])) + np.abs(kl) + 1
    infinite = (present & np.isneginf(z)).any(1)
    unknown = np.isnan(p.p).any(1) | np.isnan(q.p).any(1)
    kl = np.where(unknown, REAL("nan"), np.where(infinite, REAL("inf"), kl))
    return q, p, kl, np.where(unknown | infinite, 0, ROOM * unit * error)


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
    label = None if labels is None else labels.reshape(-1).numpy()
    valid = np.ones(n, bool) if label is None else label != ignore_index
    teacher_row = np.arange(n) if rows is None else np.full(n, -1)
    if rows is not None:
        for j, i in enumerate(rows.tolist()):
            if i >= 0:
                teacher_row[i] = j
    candidate = valid & (teacher_row >= 0)
    (some,), (asked,) = valid.nonzero(), candidate.nonzero()

    out = {name: np.full(n, REAL("nan"), REAL) for name in ("entropy", "kl", "value")}
    error = {name: np.zeros(n, REAL) for name in ("entropy", "kl", "value")}
    ce, ce_error = np.zeros(n, REAL), np.zeros(n, REAL)
    softmax = Softmax.of(z[some], 1.0)
    out["entropy"][some], error["entropy"][some] = softmax.entropy(accumulator)
    onehot = None if label is None else np.arange(classes) == label[some, None]
    if label is not None:
        ce[some] = -softmax.log[onehot]
        with np.errstate(invalid="ignore"):
            ce_error[some] = np.where(
                np.isfinite(ce[some]), ROOM * unit * (np.abs(ce[some]) + np.log(classes) + 1), REAL(0)
            )
    q, p, out["kl"][asked], error["kl"][asked] = _kl(z[asked], y[teacher_row[asked]], temperature, unit)

    if isinstance(value, Tensor):
        values = exact(value).reshape(-1), np.zeros(n, REAL)
    elif value == "teacher_entropy":
        values = np.full(n, REAL("nan"), REAL), np.zeros(n, REAL)
        values[0][asked], values[1][asked] = Softmax.of(y[teacher_row[asked]], 1.0).entropy(accumulator)
    elif value == "cross_entropy":
        values = ce, ce_error
    else:
        values = out[value], error[value]
    ranked = candidate & ~np.isnan(out["entropy"]) & ~np.isnan(out["kl"])
    out["value"][ranked], error["value"][ranked] = values[0][ranked], values[1][ranked]

    # ---- selection, from the values that were returned
    n_candidates = len(asked)
    k = (
        0
        if n_candidates == 0
        else min(keep, n_candidates)
        if isinstance(keep, int)
        else max(1, int(keep * n_candidates))
    )
    returned = got["value"].reshape(-1).to(torch.float64).tolist()
    ranking = sorted(
        asked.tolist(),
        key=lambda i: (returned[i] == returned[i], -returned[i] if returned[i] == returned[i] else 0, i),
    )
    selected = np.isin(np.arange(n), ranking[:k])

    # ---- loss and gradient
    weight = np.ones(n, REAL) if row_weight is None else exact(row_weight).reshape(-1)
    over_valid = REAL(1) / len(some) if reduction == "mean" and len(some) else REAL(1)
    over_selected = REAL(1) / k if reduction == "mean" and k else REAL(1)
    t2 = REAL(temperature) ** 2
    g = np.ones(n, REAL) if grad_output is None else np.broadcast_to(exact(grad_output).reshape(-1), (n,))
    with np.errstate(invalid="ignore", over="ignore"):
        ce_terms = np.where(valid, ce_weight * ce * over_valid, 0) if ce_weight else np.zeros(n, REAL)
        # a weight of 0 takes a row out, unless its divergence is not a number
        factor = kd_weight * t2 * weight * over_selected
        counted = selected & ((factor != 0) | np.isnan(out["kl"]))
        kd_terms = np.where(counted, factor * out["kl"], 0)
        loss = ce_terms + kd_terms
        loss_error = np.abs(ce_weight * over_valid) * ce_error + 4 * unit * np.abs(loss)
        loss_error = loss_error + np.where(counted, np.abs(factor) * error["kl"], 0)
        grad, grad_error = np.zeros_like(z), np.zeros_like(z)
        if label is not None:
            a = (g * ce_weight * over_valid)[some, None]
            grad[some] += np.where(a == 0, 0, a * (softmax.p - onehot))
            grad_error[some] += np.where(a == 0, 0, np.abs(a) * (softmax.units + onehot))
        chosen = selected[asked]
        b = (g * kd_weight * REAL(temperature) * weight * over_selected)[selected, None]
        grad[selected] += b * (q.p - p.p)[chosen]
        grad_error[selected] += np.abs(b) * ((q.units + p.units)[chosen] + NORMAL[accumulator])
        # the accumulator's roundings, then one rounding to the gradient's own type
        grad_error = ROOM * unit * grad_error + 1.001 * UNIT[dtype] * np.abs(grad) + SMALLEST[dtype]
        grad_error += NORMAL[accumulator]
        if reduction != "none":
            loss, loss_error = loss.sum(), loss_error.sum() + 4 * unit * np.abs(loss).sum()
    return {
        **out,
        **{f"{name}_error": e for name, e in error.items()},
        "selected": selected,
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
