"""An oracle of `condensed_kd_loss` in NumPy's extended precision, with a tolerance for every number.

Its formulas differ from those under test: KL is sum(p log p) - sum(p log q) over explicit distributions, entropies come from
probabilities, and Python sorts the ranking. Only the selection starts from the values that the code under test returned (which are
checked separately), so that a last-bit difference between two nearly equal rows does not select another row.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

REAL = np.longdouble
TOLERANCE = 24.0  # of every term, in half units in the last place of the accumulator
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float64: 5e-324, torch.float32: 1.5e-45, torch.float16: 6e-8, torch.bfloat16: 1e-40}
NORMAL = {torch.float64: 2.3e-308, torch.float32: 1.2e-38}


def exact(x: Tensor) -> np.ndarray:
    """Return the tensor in extended precision."""
    return x.detach().to(torch.float64).numpy().astype(REAL)


@dataclass
class Softmax:
    """The distributions of some rows, and the tolerance of each probability in units (rounding errors grow with the exponent)."""

    log: np.ndarray
    p: np.ndarray
    units: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray, temperature: float) -> "Softmax":
        """Return the distributions of logits (rows, classes)."""
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            x = (logits - logits.max(1, keepdims=True)) / REAL(temperature)
            # log1p over all classes but the most likely one, which adds e^0 = 1
            others = np.where(np.arange(x.shape[1]) == x.argmax(1)[:, None], 0, np.exp(x))
            log = x - np.log1p(others.sum(1, keepdims=True))
            log[~np.isfinite(x.max(1))] = np.nan
            p = np.exp(log)
            units = np.where(p > 0, p * (1 + np.abs(x)), 0)
        return cls(log, p, units)

    def entropy(self, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Return the entropies in nats and their tolerances, which shrink with the entropy in confident rows.

        They are relative to the contribution of the classes other than the most likely one.
        """
        with np.errstate(invalid="ignore"):
            terms = np.where(self.p == 0, 0, -self.p * self.log)
            beside = np.where(self.log == self.log.max(1, keepdims=True), 1 - self.p, self.units)
            error = terms.sum(1) + (beside * np.where(self.p == 0, 0, 1 - self.log)).sum(1)
            error = (
                TOLERANCE * UNIT[dtype] * error + 1000 * NORMAL[dtype] * self.p.shape[1]
            )  # for -p log p if p underflows
        return terms.sum(1), np.nan_to_num(error)


def _kl(
    z: np.ndarray, y: np.ndarray, temperature: float, unit: float
) -> tuple[Softmax, Softmax, np.ndarray, np.ndarray]:
    q, p = Softmax.of(z, temperature), Softmax.of(y, temperature)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        y, z_below = y - y.max(1, keepdims=True), z - z.max(1, keepdims=True)
        present = y / REAL(temperature) > -1075 * np.log(REAL(2))  # what float64 distinguishes from 0

        def total(x):
            return np.where(present, x, 0).sum(1)

        kl = total(p.p * p.log) - total(p.p * q.log)
        gap = np.abs(y - z_below) / REAL(temperature)
        error = total(p.units * (gap + 1)) + np.abs(np.log(z.shape[1])) + np.abs(kl) + 1
    infinite = (present & np.isneginf(z)).any(1)
    unknown = np.isnan(p.p).any(1) | np.isnan(q.p).any(1)
    kl = np.where(unknown, REAL("nan"), np.where(infinite, REAL("inf"), kl))
    return q, p, kl, np.where(unknown | infinite, 0, TOLERANCE * unit * error)


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
    label_smoothing=0.0,
    ignore_index=-100,
    reduction="mean",
    inplace=False,
) -> dict[str, np.ndarray]:
    """Return the expected results with tolerances: `<name>` and `<name>_error` for the loss, the gradient and all of Knowledge."""
    classes, dtype = student.shape[-1], student.dtype
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    unit = UNIT[accumulator]
    z, y = exact(student).reshape(-1, classes), exact(teacher).reshape(-1, classes)
    n = len(z)
    kd_weight = (1.0 if labels is None else 0.9) if kd_weight is None else kd_weight
    ce_weight = (0.0 if labels is None else 0.1) if ce_weight is None else ce_weight
    soft = labels is not None and labels.is_floating_point()
    label = None if labels is None or soft else labels.reshape(-1).numpy()
    valid = np.ones(n, bool) if label is None else label != ignore_index
    teacher_row = np.arange(n) if rows is None else np.full(n, -1)
    if rows is not None:
        for j, i in enumerate(rows.tolist()):
            if i >= 0:
                teacher_row[i] = j
    candidate = valid & (teacher_row >= 0)
    (valid_rows,), (candidates,) = valid.nonzero(), candidate.nonzero()

    out = {name: np.full(n, REAL("nan"), REAL) for name in ("entropy", "kl", "value")}
    error = {name: np.zeros(n, REAL) for name in ("entropy", "kl", "value")}
    ce, ce_error = np.zeros(n, REAL), np.zeros(n, REAL)
    softmax = Softmax.of(z[valid_rows], 1.0)
    out["entropy"][valid_rows], error["entropy"][valid_rows] = softmax.entropy(accumulator)
    if labels is not None:
        with np.errstate(invalid="ignore"):
            given = exact(labels).reshape(-1, classes) if soft else np.arange(classes) == label[valid_rows, None]
            target = (1 - REAL(label_smoothing)) * given + REAL(label_smoothing) / classes
            terms = np.where(target == 0, 0, -target * softmax.log)
            # A class without target adds 0, but NaN is never hidden.
            ce[valid_rows] = np.where(np.isnan(softmax.log).any(1), REAL("nan"), terms.sum(1))
            mass, size = target.sum(1, keepdims=True), np.abs(target).sum(1)
            ce_error[valid_rows] = np.where(
                np.isfinite(ce[valid_rows]),
                TOLERANCE * unit * (np.abs(terms).sum(1) + size * (np.log(classes) + 1)),
                REAL(0),
            )
    q, p, out["kl"][candidates], error["kl"][candidates] = _kl(
        z[candidates], y[teacher_row[candidates]], temperature, unit
    )

    if isinstance(value, Tensor):
        values = exact(value).reshape(-1), np.zeros(n, REAL)
    elif value == "teacher_entropy":
        values = np.full(n, REAL("nan"), REAL), np.zeros(n, REAL)
        values[0][candidates], values[1][candidates] = Softmax.of(y[teacher_row[candidates]], 1.0).entropy(accumulator)
    elif value == "cross_entropy":
        values = ce, ce_error
    else:
        values = out[value], error[value]
    ranked = candidate & ~np.isnan(out["entropy"]) & ~np.isnan(out["kl"])
    out["value"][ranked], error["value"][ranked] = values[0][ranked], values[1][ranked]

    # ---- selection, from the returned values
    n_candidates = len(candidates)
    k = (
        0
        if n_candidates == 0
        else min(keep, n_candidates)
        if isinstance(keep, int)
        else max(1, int(keep * n_candidates))
    )
    returned = got["value"].reshape(-1).to(torch.float64).tolist()
    ranking = sorted(
        candidates.tolist(),
        key=lambda i: (returned[i] == returned[i], -returned[i] if returned[i] == returned[i] else 0, i),
    )
    selected = np.isin(np.arange(n), ranking[:k])

    # ---- loss and gradient
    weight = np.ones(n, REAL) if row_weight is None else exact(row_weight).reshape(-1)
    over_valid = REAL(1) / len(valid_rows) if reduction == "mean" and len(valid_rows) else REAL(1)
    over_selected = REAL(1) / k if reduction == "mean" and k else REAL(1)
    t2 = REAL(temperature) ** 2
    g = np.ones(n, REAL) if grad_output is None else np.broadcast_to(exact(grad_output).reshape(-1), (n,))
    with np.errstate(invalid="ignore", over="ignore"):
        ce_terms = np.where(valid, ce_weight * ce * over_valid, 0) if ce_weight else np.zeros(n, REAL)
        # a weight of 0 removes a row, unless its divergence is NaN
        factor = kd_weight * t2 * weight * over_selected
        counted = selected & ((factor != 0) | np.isnan(out["kl"]))
        kd_terms = np.where(counted, factor * out["kl"], 0)
        loss = ce_terms + kd_terms
        loss_error = np.abs(ce_weight * over_valid) * ce_error + 4 * unit * np.abs(loss)
        loss_error = loss_error + np.where(counted, np.abs(factor) * error["kl"], 0)
        grad, grad_error = np.zeros_like(z), np.zeros_like(z)
        if labels is not None:
            a = (g * ce_weight * over_valid)[valid_rows, None]
            grad[valid_rows] += np.where(a == 0, 0, a * (mass * softmax.p - target))
            rounding = size[:, None] * softmax.units + np.abs(target)
            grad_error[valid_rows] += np.where(a == 0, 0, np.abs(a) * rounding)
        chosen = selected[candidates]
        b = (g * kd_weight * REAL(temperature) * weight * over_selected)[selected, None]
        grad[selected] += b * (q.p - p.p)[chosen]
        grad_error[selected] += np.abs(b) * ((q.units + p.units)[chosen] + NORMAL[accumulator])
        # rounding of the accumulator, then one rounding to the gradient's dtype
        grad_error = TOLERANCE * unit * grad_error + 1.001 * UNIT[dtype] * np.abs(grad) + SMALLEST[dtype]
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
    """Assert that every number is within its tolerance, NaN and infinities are at the same places, and the selection is equal."""
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
