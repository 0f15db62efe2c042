"""One interface to every implementation of the operator: CPU tensors in, CPU tensors out."""

from functools import partial
from unittest import mock

import pytest
import torch
from simt import operators
from torch import Tensor

import kcd_ext


def copy_to_device(x, device: str):
    """Copy a tensor to the device with its memory layout and the surrounding memory. Return other objects unchanged.

    `Tensor.to` would turn strided or misaligned rows into a contiguous tensor.
    """
    if not isinstance(x, Tensor) or x.device.type == device:
        return x
    memory = x.detach().as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).to(device)
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


def _run(
    function, device: str, student: Tensor, teacher: Tensor, grad_output: Tensor | None, options: dict
) -> dict[str, Tensor]:
    leaf = copy_to_device(student.detach(), device).requires_grad_()
    # With inplace the gradient overwrites the logits, which must not be a leaf.
    logits = leaf.clone() if options.get("inplace") else leaf
    options = {name: copy_to_device(option, device) for name, option in options.items()}
    loss, knowledge = function(logits, copy_to_device(teacher, device), return_knowledge=True, **options)
    grad_output = torch.ones_like(loss) if grad_output is None else copy_to_device(grad_output, device)
    (grad,) = torch.autograd.grad(loss, leaf, grad_output)
    return {name: x.detach().cpu() for name, x in {"loss": loss, "grad": grad, **knowledge._asdict()}.items()}


def _run_cpu(student: Tensor, teacher: Tensor, grad_output: Tensor | None, options: dict) -> dict[str, Tensor]:
    """Run through the fast path (for a small batch) and through the dispatcher, and assert that the bits are equal."""
    results = _run(kcd_ext.condensed_kd_loss, "cpu", student, teacher, grad_output, options)
    with mock.patch.object(kcd_ext.ops, "HAS_FAST_PATH", False):
        dispatched = _run(kcd_ext.condensed_kd_loss, "cpu", student, teacher, grad_output, options)
    for name, x in results.items():
        assert torch.equal(dispatched[name].nan_to_num(7e4), x.nan_to_num(7e4)), name
    return results


def _run_simt(student: Tensor, teacher: Tensor, grad_output: Tensor | None, options: dict) -> dict[str, Tensor]:
    """Run the CUDA kernels on the CPU. `options` may contain `machine` and `schedule` of `operators.in_place`."""
    simulation = {name: options.pop(name) for name in ("machine", "schedule") if name in options}
    with operators.in_place(**simulation):
        return _run(kcd_ext.condensed_kd_loss, "cpu", student, teacher, grad_output, options)


def _run_two_pass(student: Tensor, teacher: Tensor, grad_output: Tensor | None, options: dict) -> dict[str, Tensor]:
    """Compute the gradient in the backward pass, as happens for few selected rows and under torch.compile."""
    with mock.patch.multiple(kcd_ext.ops, HAS_FAST_PATH=False, supports_gradient_in_forward=lambda logits: False):
        return _run(kcd_ext.condensed_kd_loss, "cpu", student, teacher, grad_output, options)


# cpu, cpu_two_pass: the kernels of csrc/cpu, with the gradient from the forward or the backward pass. reference: plain PyTorch.
# simt: the kernels of csrc/cuda, executed on the CPU. cuda: the same on a GPU.
BACKENDS = {
    "cpu": _run_cpu,
    "cpu_two_pass": _run_two_pass,
    "reference": partial(_run, kcd_ext.reference.condensed_kd_loss, "cpu"),
    "simt": _run_simt,
}
HAS_CUDA = torch.cuda.is_available() and bool(kcd_ext.ops.build_info["cuda_architectures"])
if HAS_CUDA:
    BACKENDS["cuda"] = partial(_run, kcd_ext.condensed_kd_loss, "cuda")


def parameters(*names: str) -> list:
    """Return the names as test parameters with their marks. Names that start with "cuda" are dropped without a GPU."""
    marks = {"simt": pytest.mark.cuda_on_cpu, "cpu_two_pass": pytest.mark.slow}
    marks |= {name: pytest.mark.gpu for name in names if name.startswith("cuda")}
    available = [name for name in names if HAS_CUDA or not name.startswith("cuda")]
    return [pytest.param(name, marks=marks[name]) if name in marks else name for name in available]


DEVICES = parameters("cpu", "cuda")


def on_gpu(test):
    """Mark a test as needing a GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU and a build with CUDA kernels")(test))


def run(
    backend: str, student: Tensor, teacher: Tensor, *, grad_output: Tensor | None = None, **options
) -> dict[str, Tensor]:
    """Run `condensed_kd_loss(student, teacher, **options)` forward and backward on one backend.

    `grad_output` is the gradient of the loss, of shape () or, with reduction="none", (...). None means ones.
    Returns a dict with loss, grad, value, kl, entropy, selected and n_selected.
    """
    return BACKENDS[backend](student, teacher, grad_output, options)
