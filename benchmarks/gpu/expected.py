"""Expected results: loss and gradient of kcd_ext.reference on the CPU, for the rows that the device selected."""

import torch
from torch import Tensor

import kcd_ext

from .cases import Case, Inputs

TOLERANCE = 1e-4  # relative, of the loss: float32 sums over up to a million classes
ROW_TOLERANCE = 1e-3  # relative, of a row's entropy and KL
# Relative, of a gradient's element: sums in float32, then one rounding to its dtype.
GRADIENT_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
ABSOLUTE = 1e-4  # absolute, relative to the gradient's largest element
SMALLEST = {torch.float16: 6e-8}  # the smallest positive number


def faults(case: Case, given: Inputs, got: dict[str, Tensor]) -> list[str]:
    """Return how the results of a call on the device differ from the reference.

    Rounding decides between nearly equal values, so the reference uses the device's selection. A separate check makes sure that no
    row with a higher value, by the values that the device returned, was left out.

    Args:
        case: the call.
        given: the inputs, on the CPU.
        got: loss, gradient and knowledge, on the CPU.
    """
    selected = got["selected"]
    n_selected = int(selected.sum())
    found = []
    if n_selected != int(got["n_selected"]) or n_selected != _expected_count(case, given):
        return [f"{n_selected} rows selected instead of {_expected_count(case, given)}"]
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
        if not torch.allclose(x, y, rtol=ROW_TOLERANCE, atol=1e-6, equal_nan=True):
            found.append(f"{name} is off by up to {(x - y).abs().nan_to_num(0.0).max().item():.3g}")
    error = max_error(got["gradient"], gradient)
    if not error <= 1:
        found.append(f"the gradient's error is {error:.3g} times the tolerance")
    return found


def max_error(got: Tensor, want: Tensor) -> float:
    """Return the largest error of a gradient, relative to the tolerance; infinite if an error is NaN."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return torch.inf
    got, want, dtype = got.double(), want.double(), want.dtype
    allowed = GRADIENT_TOLERANCE[dtype] * want.abs() + ABSOLUTE * want.abs().max() + SMALLEST.get(dtype, 1e-30)
    return ((got - want).abs() / allowed).nan_to_num(nan=torch.inf).max().item()


def _expected_count(case: Case, given: Inputs) -> int:
    """Return how many rows must be selected, of the valid rows that the teacher has."""
    candidates = torch.ones(case.rows, dtype=torch.bool)
    if "labels" in given:
        candidates &= given["labels"] != -100
    if "rows" in given:
        named = torch.zeros_like(candidates)
        named[given["rows"][given["rows"] >= 0]] = True
        candidates &= named
    n = int(candidates.sum())
    return min(case.keep, n) if isinstance(case.keep, int) else max(1, int(case.keep * n)) if n else 0
