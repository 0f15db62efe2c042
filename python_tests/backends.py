"""One signature over every implementation of the operator: CPU tensors in, CPU tensors out."""

from functools import partial
from unittest import mock

import pytest
import torch
from simt import operators
from torch import Tensor

import kcd_ext


def there(x, device: str):
    """Return a tensor on the device as it lies in memory, with what is around it; anything else as it is.

    `Tensor.to` alone would make rows that lie apart, or begin at an odd address, a contiguous tensor.
    """
    if not isinstance(x, Tensor) or x.device.type == device:
        return x
    memory = x.detach().as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).to(device)
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


def _run(
    function, device: str, student: Tensor, teacher: Tensor, grad_output: Tensor | None, options: dict
) -> dict[str, Tensor]:
    leaf = there(student.detach(), device).requires_grad_()
    # The gradient overwrites the logits it is given, which must not be a leaf.
    logits = leaf.clone() if options.get("inplace") else leaf
    options = {name: there(option, device) for name, option in options.items()}
    loss, knowledge = function(logits, there(teacher, device), return_knowledge=True, **options)
    grad_output = torch.ones_like(loss) if grad_output is None else there(grad_output, device)
    (grad,) = torch.autograd.grad(loss, leaf, grad_output)
    return {name: x.detach().cpu() for name, x in {"loss": loss, "grad": grad, **knowledge._asdict()}.items()}


def _run_cpu(student: Tensor, teacher: Tensor, grad_output: Tensor | None, options: dict) -> dict[str, Tensor]:
    """By the fast path where the batch is small, and by the dispatcher: the bits must be the same."""
    results = _run(kcd_ext.condensed_kd_loss, "cpu", student, teacher, grad_output, options)
    with mock.patch.object(kcd_ext.ops, "HAS_FAST_PATH", False):
        dispatched = _run(kcd_ext.condensed_kd_loss, "cpu", student, teacher, grad_output, options)
    for name, x in results.items():
        assert torch.equal(dispatched[name].nan_to_num(7e4), x.nan_to_num(7e4)), name
    return results


def _run_simt(student: Tensor, teacher: Tensor, grad_output: Tensor | None, options: dict) -> dict[str, Tensor]:
    """options: also `machine` and `schedule`, see `operators.in_place`."""
    where = {name: options.pop(name) for name in ("machine", "schedule") if name in options}
    with operators.in_place(**where):
        return _run(kcd_ext.condensed_kd_loss, "cpu", student, teacher, grad_output, options)


def _run_apart(student: Tensor, teacher: Tensor, grad_output: Tensor | None, options: dict) -> dict[str, Tensor]:
    """The gradient in a pass of its own, as where few rows are selected or under torch.compile."""
    with mock.patch.multiple(kcd_ext.ops, HAS_FAST_PATH=False, writes_gradient_ahead=lambda logits: False):
        return _run(kcd_ext.condensed_kd_loss, "cpu", student, teacher, grad_output, options)


# cpu, cpu_apart: the kernels of csrc/cpu, the gradient written ahead or in a pass of its own. reference: plain PyTorch.
# simt: the kernels of csrc/cuda, executed on the CPU. cuda: on a GPU.
BACKENDS = {
    "cpu": _run_cpu,
    "cpu_apart": _run_apart,
    "reference": partial(_run, kcd_ext.reference.condensed_kd_loss, "cpu"),
    "simt": _run_simt,
}
HAS_CUDA = torch.cuda.is_available() and bool(kcd_ext.ops.build_info["cuda_architectures"])
if HAS_CUDA:
    BACKENDS["cuda"] = partial(_run, kcd_ext.condensed_kd_loss, "cuda")


def parameters(*names: str) -> list:
    """Return the names as parameters of a test, with their marks; those that begin with "cuda" only where there is a GPU."""
    marks = {"simt": pytest.mark.cuda_on_cpu, "cpu_apart": pytest.mark.slow}
    marks |= {name: pytest.mark.gpu for name in names if name.startswith("cuda")}
    present = [name for name in names if HAS_CUDA or not name.startswith("cuda")]
    return [pytest.param(name, marks=marks[name]) if name in marks else name for name in present]


DEVICES = parameters("cpu", "cuda")


def on_gpu(test):
    """Mark a test that needs a GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU, and the kernels for it")(test))


def run(
    backend: str, student: Tensor, teacher: Tensor, *, grad_output: Tensor | None = None, **options
) -> dict[str, Tensor]:
    """Loss, gradient and knowledge of `condensed_kd_loss(student, teacher, **options)` on one backend.

    grad_output: the gradient of the loss, (), or (...) for reduction="none"; ones where it is None.
    Returns loss, grad, value, kl, entropy, selected, n_selected.
    """
    return BACKENDS[backend](student, teacher, grad_output, options)
