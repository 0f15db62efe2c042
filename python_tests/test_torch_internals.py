"""The package works in a torch that lacks any of the private names that it uses."""

import threading

import pytest
import torch
from test_extension import python

from kcd_ext import condensed_kd_loss, reference, torch_internals

USES = """
import contextlib, warnings
import torch
name = {name!r}
original = getattr(torch._C, name)
delattr(torch._C, name)
import kcd_ext
from kcd_ext import condensed_kd_loss, reference
setattr(torch._C, name, original)  # torch itself needs it
warnings.simplefilter("ignore")

torch.manual_seed(0)
batches = [[torch.randn(rows, 10) for _ in range(2)] for rows in (8, 8, 5)]

def gradient(function, z, y, **options):
    leaf = z.clone().requires_grad_()
    return torch.autograd.grad(function(leaf, y, **options), leaf)[0]

def kcd(z, y):
    return condensed_kd_loss(z, y, keep=0.5)

wanted = [gradient(reference.condensed_kd_loss, *batch, keep=0.5) for batch in batches]
traced = torch.jit.trace(kcd, (batches[0][0].clone().requires_grad_(), batches[0][1]))
compiled = torch.compile(kcd, backend="aot_eager", fullgraph=True)
for function in (kcd, traced, compiled):
    for batch, want in zip(batches, wanted, strict=True):
        torch.testing.assert_close(gradient(function, *batch), want)

z, y = batches[0]
leaf = z.clone().requires_grad_()
(first,) = torch.autograd.grad(kcd(leaf, y), leaf, create_graph=True)
(other,) = torch.autograd.grad(compiled(leaf, y) * 2, leaf)
torch.testing.assert_close(other, 2 * wanted[0])
for derivative in (
    lambda: torch.autograd.grad(first.sum(), leaf),
    lambda: torch.func.grad(lambda z: kcd(z, y))(z),
    lambda: torch.func.jvp(lambda z: kcd(z, y), (z,), (z,)),
):
    try:
        derivative()
    except RuntimeError:
        continue
    raise AssertionError("an unsupported derivative was computed")
absent = [torch.empty(0, dtype=torch.bool)] * 4
raw = torch.ops.kcd_ext.condensed_kd(leaf, y, *absent, 0.5, 0, 0, 4.0, 1.0, 0.0, 0.0, -100, 0, 1.0, False)
torch.testing.assert_close(torch.autograd.grad(raw[0], leaf)[0], wanted[0])
with kcd_ext.torch_internals.untraced():
    print(kcd_ext.torch_internals.dispatch_is_plain(), kcd_ext.torch_internals.BelowAutograd is not None)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", torch_internals.NAMES)
def test_losses_and_derivatives_are_correct_without_private_name(name):
    done = python(USES.format(name=name))
    assert done.returncode == 0, done.stderr
    plain, below = name != "_dispatch_tls_local_include_set", name != "_AutoDispatchBelowAutograd"
    assert done.stdout == f"{plain} {below}\n"


def test_every_private_name_is_documented():
    documented = [name for name in torch_internals.NAMES if f"`{name}`" in torch_internals.__doc__]
    assert documented == list(torch_internals.NAMES)


def test_losses_are_correct_if_no_thread_can_start(monkeypatch):
    monkeypatch.setattr(torch_internals, "_plain_keys", set())

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    student, teacher = torch.randn(8, 10), torch.randn(8, 10)
    with monkeypatch.context() as hidden:
        hidden.setattr(threading.Thread, "start", refuse)
        loss = condensed_kd_loss(student, teacher)
        assert not torch_internals.dispatch_is_plain()
    torch.testing.assert_close(loss, reference.condensed_kd_loss(student, teacher))
    assert torch_internals.dispatch_is_plain()
