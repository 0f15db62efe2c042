"""What a case must give: loss and gradient of kcd_ext.reference on the CPU, for the rows that the device selected."""

import torch
from torch import Tensor

import kcd_ext

from .cases import Case, Inputs

TOLERANCE = 1e-4  # of the loss, relatively; float32 sums of up to a million classes
ROWS = 1e-3  # of one row's entropy and divergence, relatively
# Of an element of the gradient, relatively: sums in float32, then one rounding to the gradient's own type.
GRADIENT = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LEAST = 1e-4  # of the gradient's largest element: what a smaller one may be off
SMALLEST = {torch.float16: 6e-8}  # the smallest number beside 0


def faults(case: Case, given: Inputs, got: dict[str, Tensor]) -> list[str]:
    """What differs in the results of a call on the device from the reference's.

    Which rows are selected decides between nearly equal values, so that the reference selects those of the device; that no row
    that was left out is worth more, beyond rounding, is looked at by itself.

    Args:
        given: on the CPU.
        got: loss, gradient and knowledge, on the CPU.
    """
    selected = got["selected"]
    n_selected = int(selected.sum())
    found = []
    if n_selected != int(got["n_selected"]) or n_selected != _how_many(case, given):
        return [f"{n_selected} rows selected instead of {_how_many(case, given)}"]
    value = got["value"].double()[~got["value"].isnan()]
    chosen = got["value"].double()[selected]
    if n_selected and chosen.min() < value.sort(descending=True).values[n_selected - 1]:
        found.append("a row of a higher value is left out")

    logits = given["memory"][:, case.shift : case.shift + case.classes].detach().clone().requires_grad_()
    options = {name: x for name, x in given.items() if name not in ("memory", "teacher", "value")}
    options |= {"value": selected.float(), "keep": max(1, n_selected), "reduction": case.reduction}
    loss, knowledge = kcd_ext.reference.condensed_kd_loss(logits, given["teacher"], return_knowledge=True, **options)
    (gradient,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    if not torch.allclose(got["loss"].double(), loss.double(), rtol=TOLERANCE, atol=1e-6):
        found.append(f"loss {got['loss'].sum().item():.6g} instead of {loss.sum().item():.6g}")
    for name in ("entropy", "kl"):
        x, y = got[name].double(), getattr(knowledge, name).double()
        if not torch.allclose(x, y, rtol=ROWS, atol=1e-6, equal_nan=True):
            found.append(f"{name} is off by up to {(x - y).abs().nan_to_num(0.0).max().item():.3g}")
    off = off_by(got["gradient"], gradient)
    if not off <= 1:
        found.append(f"the gradient is off by {off:.3g} times what its rounding allows")
    return found


def off_by(got: Tensor, want: Tensor) -> float:
    """The largest difference of two gradients, over what rounding allows; infinite where one is not a number."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return torch.inf
    got, want, dtype = got.double(), want.double(), want.dtype
    allowed = GRADIENT[dtype] * want.abs() + LEAST * want.abs().max() + SMALLEST.get(dtype, 1e-30)
    return ((got - want).abs() / allowed).nan_to_num(nan=torch.inf).max().item()


def _how_many(case: Case, given: Inputs) -> int:
    """Rows that are to be selected: of the valid ones that the teacher holds."""
    candidates = torch.ones(case.rows, dtype=torch.bool)
    if "labels" in given:
        candidates &= given["labels"] != -100
    if "rows" in given:
        named = torch.zeros_like(candidates)
        named[given["rows"][given["rows"] >= 0]] = True
        candidates &= named
    n = int(candidates.sum())
    return min(case.keep, n) if isinstance(case.keep, int) else max(1, int(case.keep * n)) if n else 0
