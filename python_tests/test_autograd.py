"""Autograd and torch.compile: numeric checks, retained graphs, in-place gradients, memory, tracing and CUDA graphs."""

import doctest
import gc
import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from backends import DEVICES, copy_to_device, on_gpu
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kcd_ext
from kcd_ext import condensed_kd_loss, losses, reference, select_rows


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def logits(rows, classes, seed, device="cpu"):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


LABELS = torch.tensor([0, 4, -100, 1, 2])
OPTIONS = [
    {},
    {"temperature": 1.0, "keep": 0.5},
    {"temperature": 3.0, "keep": 3, "labels": LABELS},
    {"labels": LABELS, "ce_weight": 0.7, "kd_weight": 0.3, "reduction": "sum", "value": "kl"},
    {"labels": LABELS, "reduction": "none", "row_weight": torch.linspace(0, 2, 5, dtype=torch.float64)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradient_passes_gradcheck(device, options):
    # Fixed scores: a step of gradcheck must not change the selection.
    options = {"value": torch.arange(5.0).roll(2), **options}
    options = {name: copy_to_device(x, device) for name, x in options.items()}
    student, teacher = logits(5, 6, 0, device).requires_grad_(), logits(5, 6, 1, device)
    assert torch.autograd.gradcheck(lambda z: condensed_kd_loss(z, teacher, **options), (student,))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_reference_is_twice_differentiable(device, options):
    options = {"value": torch.arange(5.0).roll(2), **options}
    options = {name: copy_to_device(x, device) for name, x in options.items()}
    student, teacher = logits(5, 6, 0, device).requires_grad_(), logits(5, 6, 1, device)
    assert torch.autograd.gradgradcheck(lambda z: reference.condensed_kd_loss(z, teacher, **options), (student,))
    got, want = (f(student, teacher, **options) for f in (condensed_kd_loss, reference.condensed_kd_loss))
    assert torch.allclose(got, want, rtol=1e-13)


def test_second_derivative_raises_and_names_the_reference(device):
    student, teacher = logits(5, 6, 0, device).requires_grad_(), logits(5, 6, 1, device)
    (gradient,) = torch.autograd.grad(condensed_kd_loss(student, teacher), student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"kcd_ext\.reference"):
        gradient.square().sum().backward()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_create_graph_raises_only_if_second_derivative_is_taken(device):
    student, other = logits(5, 6, 0, device).requires_grad_(), logits(5, 6, 2, device).requires_grad_()
    (condensed_kd_loss(student, logits(5, 6, 1, device)) + other.square().sum()).backward(create_graph=True)
    other.grad.sum().backward()
    assert student.grad is not None


def test_retained_graph_accumulates_gradients(device):
    student, teacher = logits(5, 6, 0, device).requires_grad_(), logits(5, 6, 1, device)
    loss = condensed_kd_loss(student, teacher, keep=0.5)
    loss.backward(retain_graph=True)
    first = student.grad.clone()
    (3 * loss).backward()
    assert torch.allclose(student.grad, 4 * first, rtol=1e-14, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 0.3, 0.0, -2.0, math.inf, math.nan])
def test_gradient_of_forward_pass_scales_like_recomputed_one(device, dtype, factor):
    """The gradient computed in the forward pass equals the recomputed one for every factor; unselected rows stay 0."""
    student = (3 * torch.randn(9, 37, device=device)).to(dtype).requires_grad_()
    loss = condensed_kd_loss(student, (3 * torch.randn(9, 37, device=device)).to(dtype), keep=0.5)
    grad_output = torch.tensor(factor, dtype=loss.dtype, device=device)
    first, again = (torch.autograd.grad(loss, student, grad_output, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, again, equal_nan=True)
    assert (first.abs().sum(1) == 0).sum() == (9 if factor == 0 else 5)


@pytest.mark.parametrize("keep", [0.2, 0.7])
def test_incoming_gradient_may_require_grad(device, keep):
    student, teacher = torch.randn(9, 37, requires_grad=True, device=device), torch.randn(9, 37, device=device)
    loss = condensed_kd_loss(student, teacher, keep=keep)
    given = torch.tensor(0.5, requires_grad=True, device=device)
    first = torch.autograd.grad(loss, student, given, retain_graph=True)[0]
    second = torch.autograd.grad(loss, student, given.detach(), retain_graph=True)[0]
    assert not first.requires_grad and torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("keep", [0.2, 0.7])
def test_batched_incoming_gradients_equal_single_ones(device, keep):
    student, teacher = torch.randn(9, 37, requires_grad=True, device=device), torch.randn(9, 37, device=device)
    loss = condensed_kd_loss(student, teacher, keep=keep)
    factors = torch.tensor([1.0, -0.5], device=device)
    (both,) = torch.autograd.grad(loss, student, factors, is_grads_batched=True, retain_graph=True)
    for factor, gradient in zip(factors, both, strict=True):
        torch.testing.assert_close(gradient, torch.autograd.grad(loss, student, factor, retain_graph=True)[0])


def test_teacher_and_row_weight_get_no_gradient(device):
    student, teacher = logits(5, 6, 0, device).requires_grad_(), logits(5, 6, 1, device).requires_grad_()
    condensed_kd_loss(student, teacher).backward()
    assert teacher.grad is None and student.grad is not None
    weight = torch.ones(5, requires_grad=True, device=device)
    condensed_kd_loss(student, teacher, row_weight=weight).backward()
    assert weight.grad is None
    assert not condensed_kd_loss(student.detach(), teacher).requires_grad


def test_knowledge_carries_no_gradient(device):
    _, knowledge = condensed_kd_loss(
        logits(5, 6, 0, device).requires_grad_(), logits(5, 6, 1, device), return_knowledge=True
    )
    assert not any(x.requires_grad for x in knowledge)


def test_inplace_overwrites_logits_in_backward_and_only_once(device):
    weight, x, teacher = logits(6, 3, 2, device).requires_grad_(), logits(5, 3, 0, device), logits(5, 6, 1, device)
    expected = torch.autograd.grad(condensed_kd_loss(x @ weight.T, teacher, keep=0.5), weight)[0]
    z = x @ weight.T
    loss = condensed_kd_loss(z, teacher, keep=0.5, inplace=True)
    version, before = z._version, z.detach().clone()
    assert torch.equal(z, before)  # unchanged until the backward pass
    loss.backward(retain_graph=True)
    assert torch.allclose(weight.grad, expected)
    assert z._version > version and not torch.equal(z, before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_is_refused_for_leaves_overlaps_shared_memory_and_compile(device):
    teacher = logits(5, 6, 1, device)
    leaf = logits(5, 6, 0, device).requires_grad_()
    for parameter in (leaf, leaf.view(5, 6), leaf[:, :], logits(9, 6, 2, device)[:5].requires_grad_()):
        with pytest.raises(ValueError, match="a leaf that requires grad"):
            condensed_kd_loss(parameter, teacher, inplace=True)
    flat = logits(1, 40, 0, device).requires_grad_()[0] * 1
    for z in (
        (leaf * 1)[:1].expand(5, 6),
        (logits(6, 5, 0, device).requires_grad_() * 1).t(),
        flat.unfold(0, 6, 1)[:5],
        flat.as_strided((5, 6), (5, 1)),
    ):
        with pytest.raises(ValueError, match="disjoint rows and adjacent classes"):
            condensed_kd_loss(z, teacher, inplace=True)
    z = logits(6, 6, 0, device).requires_grad_() * 1
    with pytest.raises(ValueError, match="share the memory"):
        condensed_kd_loss(z[1:], z.detach()[:-1], inplace=True)
    with pytest.raises(Exception, match=r"inplace=True is not supported under torch\.compile"):
        torch.compile(lambda z: condensed_kd_loss(z * 2, teacher, inplace=True), fullgraph=True)(leaf)
    with torch.no_grad():  # without a gradient nothing is overwritten
        assert torch.equal(condensed_kd_loss(leaf, teacher, inplace=True), condensed_kd_loss(leaf, teacher))


def test_inplace_refuses_second_derivative(device):
    w = logits(4, 6, 0, device).requires_grad_()
    with pytest.raises(RuntimeError, match=r"kcd_ext\.reference"):
        torch.autograd.grad(condensed_kd_loss(w * w, logits(4, 6, 1, device), inplace=True), w, create_graph=True)


def test_inplace_on_a_slice_of_the_output_gives_same_gradient(device):
    x, teacher = logits(6, 4, 0, device), logits(6, 5, 1, device).view(2, 3, 5)
    model = nn.Linear(4, 5, dtype=torch.float64, device=device)
    sliced = [condensed_kd_loss(model(x).view(2, 3, 5)[:, :-1], teacher[:, 1:], inplace=flag) for flag in (False, True)]
    want, got = (torch.autograd.grad(loss, model.weight)[0] for loss in sliced)
    assert torch.allclose(got, want, rtol=1e-12)


def test_forward_mode_and_func_transforms_are_refused(device):
    z, y = logits(3, 4, 0, device), logits(3, 4, 1, device)
    with pytest.raises(RuntimeError, match=r"kcd_ext\.reference"):
        torch.func.jvp(lambda q: condensed_kd_loss(q, y), (z,), (z,))
    with pytest.raises(RuntimeError, match=r"kcd_ext\.reference"):
        torch.func.grad(lambda q: condensed_kd_loss(q, y))(z)
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(RuntimeError, match=r"kcd_ext\.reference"):
            condensed_kd_loss(torch.autograd.forward_ad.make_dual(z, y), y)
        assert condensed_kd_loss(z, y).isfinite()  # allowed without a tangent
    _, tangent = torch.func.jvp(lambda q: reference.condensed_kd_loss(q, y), (z,), (z,))
    assert tangent != 0


def test_inference_mode_tensors_are_accepted(device):
    student, labels = logits(6, 5, 0, device).requires_grad_(), torch.arange(6, device=device) % 5
    with torch.inference_mode():
        teacher, same_labels, rows = logits(6, 5, 1, device), labels + 0, torch.arange(6, device=device)
        loss = condensed_kd_loss(student, teacher)
    assert not loss.requires_grad
    want = torch.autograd.grad(condensed_kd_loss(student, logits(6, 5, 1, device), labels=labels, keep=0.5), student)[0]
    for inplace in (False, True):
        loss = condensed_kd_loss(student * 1, teacher, labels=same_labels, rows=rows, keep=0.5, inplace=inplace)
        assert torch.allclose(torch.autograd.grad(loss, student)[0], want, rtol=1e-12)


def test_modifying_knowledge_leaves_gradient_unchanged(device):
    student = logits(6, 5, 0, device).requires_grad_()
    loss, knowledge = condensed_kd_loss(student, logits(6, 5, 1, device), keep=0.5, return_knowledge=True)
    want = torch.autograd.grad(loss, student, retain_graph=True)[0]
    for x in knowledge:
        x.zero_()
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size()
    assert torch.equal(torch.autograd.grad(loss, student)[0], want)


def test_fake_tensors_propagate_shapes(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        student, teacher = (
            torch.empty(3, 4, 20, requires_grad=True, device=device),
            torch.empty(3, 4, 20, device=device),
        )
        loss, knowledge = condensed_kd_loss(student, teacher, return_knowledge=True)
        assert loss.shape == () and knowledge.selected.shape == (3, 4)
        index, _ = select_rows(student, keep=0.5)
        assert index.shape == (6,)
        loss.backward()
        assert student.grad.shape == student.shape


def test_autocast_keeps_dtype_of_logits(device):
    model, x, teacher = (
        nn.Linear(8, 30, device=device),
        torch.randn(5, 8, device=device),
        torch.randn(5, 30, device=device),
    )
    with torch.autocast(device, dtype=torch.bfloat16):
        z = model(x)
        loss = condensed_kd_loss(z, teacher, keep=0.5)
    assert z.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert model.weight.grad.dtype == torch.float32
    assert torch.equal(loss, condensed_kd_loss(z, teacher, keep=0.5))


def peak_rise(code: str, dtype: str = "float32") -> int:
    """Return by how many bytes `code` raises the peak resident size of a new process."""
    script = rf"""
import re, torch, kcd_ext
torch.set_num_threads(1)
def peak():  # not from getrusage, whose peak is inherited from the parent
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024
rows, classes = 512, 32000
base = torch.randn(rows, classes, dtype=torch.{dtype})
teacher = torch.randn(rows, classes, dtype=torch.{dtype})
weight = torch.ones((), requires_grad=True)
small = torch.randn(8, 10, requires_grad=True)
kcd_ext.condensed_kd_loss(small, torch.randn(8, 10)).backward()
before = peak()
{textwrap.dedent(code)}
print(peak() - before)
"""
    return int(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/").stdout
    )


@pytest.mark.slow
def test_cpu_memory_stays_within_one_gradient():
    """No grad mode allocates O(rows), grad mode one gradient, inplace none. 16-bit logits are never widened."""
    size = 512 * 32000 * 4
    assert peak_rise("kcd_ext.condensed_kd_loss(base, teacher, keep=0.5)") < size / 16
    both = "kcd_ext.condensed_kd_loss(base.requires_grad_(), teacher, keep=0.5).backward()"
    exponentials = 4 * 32000 * 4  # buffers for two rows, on one thread
    assert peak_rise(both) < size * 17 / 16 + exponentials
    assert peak_rise(both, "bfloat16") < size / 2 * 17 / 16 + exponentials
    # base * weight allocates one tensor, its backward pass another
    chain = "z = base * weight; kcd_ext.condensed_kd_loss(z, teacher, keep=0.5, inplace=INPLACE).backward()"
    out_of_place, inplace = (peak_rise(chain.replace("INPLACE", str(flag))) for flag in (False, True))
    assert out_of_place - inplace > size * 15 / 16


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["kept", "fresh", "torch"])
def test_large_gradients_are_independent_in_every_kind_of_memory(memory):
    """Gradients in use never change, released memory is reused, with other sizes, several threads and at process exit."""
    script = """
import threading, torch
from kcd_ext import condensed_kd_loss, ops
def gradient(rows, scale):
    z = scale * torch.arange(rows * 1000.).reshape(rows, 1000).sin()
    return torch.autograd.grad(condensed_kd_loss(z.requires_grad_(), z.detach().flip(1), keep=KEEP), z)[0]
for keep in (0.7, 0.2):
    KEEP = keep
    gradients = [gradient(700, scale) for scale in (1, 2, 3)]
    copies = [each.clone() for each in gradients]
    threads = [threading.Thread(target=lambda: [gradient(rows, 2) for rows in (300, 700, 1000, 9000)]) for _ in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert all(torch.equal(one, other) for one, other in zip(gradients, copies)) and not torch.equal(gradients[0], gradients[1])
    addresses = set()
    for _ in range(20):
        addresses.add(gradient(700, 1).data_ptr())
    assert torch.equal(gradient(700, 1), copies[0])
    if ops.build_info["gradient_memory"] == "kept":
        assert len(addresses) == 1
print(ops.build_info["gradient_memory"])
last = gradient(700, 1)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd="/",
        env=os.environ | {"KCD_GRADIENT_MEMORY": memory},
    )
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11)
    assert (done.stdout, done.returncode) == ("torch\n" if old else f"{memory}\n", 0), done.stderr


@pytest.mark.slow
def test_unknown_gradient_memory_is_named():
    done = subprocess.run(
        [sys.executable, "-c", "import kcd_ext"],
        capture_output=True,
        text=True,
        cwd="/",
        env=os.environ | {"KCD_GRADIENT_MEMORY": "huge"},
    )
    assert "KCD_GRADIENT_MEMORY must be kept, fresh or torch (or unset), got 'huge'" in done.stderr


@pytest.mark.slow
def test_ten_thousand_calls_leak_no_memory():
    student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    labels, score = torch.arange(8), torch.rand(8)

    def call():
        loss, _ = condensed_kd_loss(
            student, teacher, labels=labels, keep=0.5, value=score, row_weight=score, return_knowledge=True
        )
        loss.backward()
        student.grad = None
        condensed_kd_loss(student, teacher, labels=labels, keep=0.5).backward()  # through the fast path
        condensed_kd_loss(student, teacher, keep=0.2)
        student.grad = None
        with pytest.raises(IndexError):
            condensed_kd_loss(student, teacher, labels=labels + 5)

    def resident():
        gc.collect()
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096

    for _ in range(1000):
        call()
    before = resident()
    for _ in range(10_000):
        call()
    assert resident() - before < 4_000_000  # 10 000 leaked tensors would be over 10 MB


@pytest.mark.slow
def test_out_of_memory_raises_what_torch_raises():
    """Uses an expanded tensor of 2^45 rows, in eager mode and in a compiled graph."""
    code = textwrap.dedent("""
        import torch
        from kcd_ext import condensed_kd_loss, ops, select_rows

        huge = torch.zeros(1, 2).expand(2**45, 2)
        score = torch.zeros(1).expand(2**45)
        try:
            torch.empty(2**45, 4)
        except RuntimeError as error:
            kind, message = type(error), str(error).split(":")[0]
        compiled = torch.compile(lambda z, y: condensed_kd_loss(z, y), backend="aot_eager")
        student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        (gradient,) = torch.autograd.grad(compiled(student, teacher), student)
        assert torch.allclose(gradient, torch.autograd.grad(condensed_kd_loss(student, teacher), student)[0])
        calls = {
            "loss": lambda: condensed_kd_loss(huge, huge),
            "knowledge": lambda: condensed_kd_loss(huge, huge, keep=0.1, return_knowledge=True),
            "gradient": lambda: condensed_kd_loss(huge.detach().requires_grad_(), huge),
            "rows": lambda: select_rows(huge, keep=1),
            "topk": lambda: ops.select_topk(score, score.bool(), 0.5, 0),
            "compiled": lambda: compiled(huge, huge),
        }
        for name, call in calls.items():
            try:
                call()
            except kind as error:
                assert str(error).split(":")[0] == message, (name, error)
            else:
                raise AssertionError(name)
    """)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


# ---- torch.compile, torch.library


@pytest.mark.parametrize("grad", [pytest.param(False, marks=pytest.mark.slow), True])
def test_opcheck_passes(device, grad):
    student, teacher = torch.randn(3, 4, 17, requires_grad=grad, device=device), torch.randn(3, 4, 17, device=device)
    labels, score, rows = (
        torch.randint(17, (3, 4), device=device),
        torch.rand(3, 4, device=device),
        torch.randperm(12, device=device),
    )
    ops, absent = torch.ops.kcd_ext, torch.empty(0, dtype=torch.bool, device=device)
    options = (4.0, 0.9, 0.0, 0.0, -100, 0, 1.0)
    plain = (student, teacher, absent, absent, absent, absent, 0.5, 0, 0, *options, False)
    per_row = (2.0, 0.9, 0.1, 0.2, -100, 2, 1.0)
    full = (student, teacher.view(12, 17), labels, score, score.clone(), rows, 1.0, 5, 4, *per_row, False)
    torch.library.opcheck(ops.condensed_kd.default, plain)
    torch.library.opcheck(ops.condensed_kd.default, full)

    # The other operators are not differentiable.
    plain, full = (student.detach(), *plain[1:]), (student.detach(), *full[1:])
    if device == "cpu":  # the CUDA operator refuses with_gradient
        torch.library.opcheck(ops.condensed_kd.default, (*full[:9], *options, True))
    _, state, _ = ops.condensed_kd(*plain)
    soft = torch.rand(3, 4, 17, device=device)
    options = (4.0, 0.9, 0.1, 0.0, -100, 0, 2.0)
    one = torch.ones((), device=device)
    backward = (one, plain[0], teacher, labels, absent, absent, state, *options)
    torch.library.opcheck(ops.condensed_kd_backward.default, backward)
    torch.library.opcheck(ops.condensed_kd_backward_.default, (one, plain[0].clone(), *backward[2:]))
    torch.library.opcheck(ops.condensed_kd_backward.default, (*backward[:3], soft, *backward[4:]))
    torch.library.opcheck(ops.condensed_kd.default, (student, teacher, soft, *plain[3:9], *options, False))
    torch.library.opcheck(ops.row_stats.default, (plain[0], teacher, soft, absent, absent, 4.0, 3, -100, 0.1))
    torch.library.opcheck(ops.row_stats.default, (plain[0], teacher, labels, absent, absent, 4.0, 3, -100, 0.0))
    torch.library.opcheck(ops.select_topk.default, (score, score > 0.3, 0.5, 0))
    cross_entropy = torch.rand(3, 4, device=device)
    torch.library.opcheck(ops.reduce_rows.default, (plain[0], labels, absent, state, cross_entropy, *options))


class OperatorCalls(TorchDispatchMode):
    """A dispatch mode that records the calls of this package's operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "kcd_ext":
            self.calls.append((function, tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in args)))
        return function(*args, **(kwargs or {}))


@pytest.mark.slow
def test_opcheck_passes_for_every_call_of_the_package(device):
    """Covers ignored labels, rows without a teacher and calls without any teacher."""
    student, teacher = torch.randn(12, 17, device=device), torch.randn(12, 17, device=device)
    labels, rows = torch.randint(17, (12,), device=device), torch.tensor([3, -1, 0, 7, 11], device=device)
    labels[::3] = -100
    with OperatorCalls() as mode:
        for options in (
            {"keep": 0.2},
            {"keep": 0.7},
            {"reduction": "none"},
            {"value": "teacher_entropy"},
            {"inplace": True},
        ):
            for more in (
                {},
                {"labels": labels},
                {"rows": rows},
                {"labels": labels, "rows": rows, "row_weight": torch.rand(12, device=device)},
            ):
                leaf = student.clone().requires_grad_()
                y = teacher[: len(rows)] if "rows" in more else teacher
                condensed_kd_loss(leaf * 1, y, return_knowledge=True, **options, **more)[0].sum().backward()
        for options in (
            {},
            {"labels": labels},
            {"value": torch.rand(12, device=device)},
            {"value": "cross_entropy", "labels": labels},
        ):
            select_rows(student, keep=0.5, **options)
    torch.compile(lambda z: condensed_kd_loss(z, teacher, labels=labels), backend="eager")(student)
    names = {function.name().split("::")[1] for function, _ in mode.calls}
    assert names == {"condensed_kd", "condensed_kd_backward", "condensed_kd_backward_", "row_stats", "select_topk"}
    # One call per operator and combination of tensors that are present.
    kinds = {(f, *(x.numel() > 0 for x in args if isinstance(x, torch.Tensor))): (f, args) for f, args in mode.calls}
    for function, arguments in kinds.values():
        torch.library.opcheck(function, arguments)


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated
@pytest.mark.parametrize("rows, classes", [(8, 10), (300, 1000)])
@pytest.mark.parametrize("inputs", ["", "labels", "row_weight", "rows", "value"])
def test_traced_loss_accepts_other_batch_sizes_and_layouts(device, rows, classes, inputs):
    """Values and gradients equal the reference for another batch size and another layout."""

    def batch(rows, seed):
        generator = torch.Generator().manual_seed(seed)
        z, y = (torch.randn(rows, classes, generator=generator) for _ in range(2))
        more = {
            "labels": torch.randint(-1, classes, (rows,), generator=generator),
            "row_weight": torch.rand(rows, generator=generator),
            "rows": torch.randperm(rows, generator=generator)[: rows // 2],
            "value": torch.rand(rows, generator=generator),
        }
        y = y[: rows // 2] if inputs == "rows" else y
        return [x.to(device) for x in (z, y, *([more[inputs]] if inputs else []))]

    for options in ({"keep": 0.3}, {"keep": 2, "temperature": 2.0}, {"reduction": "none"}, {"class_dim": -1}):
        options = {**options, "ignore_index": -1}

        def function(z, y, *more, loss=condensed_kd_loss, options=options):
            return loss(z, y, **options, **({inputs: more[0]} if inputs else {}))

        z, *rest = batch(rows, 0)
        traced = torch.jit.trace(function, (z.requires_grad_(), *rest))
        for other_rows, layout in ((rows, lambda z: z), (rows + 3, lambda z: z.t().contiguous().t())):
            z, *rest = batch(other_rows, 1)
            leaf, expected_leaf = layout(z.clone()).requires_grad_(), z.requires_grad_()
            loss, expected = traced(leaf, *rest), function(expected_leaf, *rest, loss=reference.condensed_kd_loss)
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
            loss.sum().backward()
            expected.sum().backward()
            torch.testing.assert_close(leaf.grad, expected_leaf.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_traced_knowledge_accepts_other_rows(device):
    traced = torch.jit.trace(
        lambda z, y, rows: condensed_kd_loss(z, y, rows=rows, keep=0.5, return_knowledge=True),
        (
            torch.randn(8, 10, requires_grad=True, device=device),
            torch.randn(3, 10, device=device),
            torch.tensor([3, 1, -1], device=device),
        ),
    )
    z, y, rows = (
        torch.randn(13, 10, device=device),
        torch.randn(5, 10, device=device),
        torch.tensor([0, 12, 5, 7, -1], device=device),
    )
    expected = reference.condensed_kd_loss(z, y, rows=rows, keep=0.5, return_knowledge=True)
    for found, wanted in zip(traced(z, y, rows)[1], expected[1], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_refuses_inplace_and_select_rows(device):
    z, y = torch.randn(6, 5, requires_grad=True, device=device), torch.randn(6, 5, device=device)
    for function, error, message in (
        (
            lambda z: condensed_kd_loss(z * 1, y, inplace=True),
            ValueError,
            "inplace=True is not supported .* torch.jit.trace",
        ),
        (lambda z: select_rows(z, keep=0.5)[0], RuntimeError, "select_rows is not supported by torch.jit.trace"),
    ):
        with pytest.raises(error, match=message):
            torch.jit.trace(function, (z,))


def test_compiled_loss_is_one_node_per_direction(device):
    graphs = []

    def count(gm, _):
        graphs.append(
            [
                str(node.target)
                for node in gm.graph.nodes
                if node.op == "call_function" and "kcd_ext" in str(node.target)
            ]
        )
        return make_boxed_func(gm.forward)

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=count, bw_compiler=count)

    def step(z, y, labels):
        return condensed_kd_loss(z, y, labels=labels, keep=0.5, return_knowledge=True)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for rows, classes in ((8, 10), (13, 17), (9, 33)):
        student, teacher = (
            torch.randn(rows, classes, requires_grad=True, device=device),
            torch.randn(rows, classes, device=device),
        )
        labels = torch.arange(rows, device=device) % classes
        (loss, knowledge), (want, want_knowledge) = compiled(student, teacher, labels), step(student, teacher, labels)
        assert torch.equal(loss, want) and all(map(torch.equal, knowledge, want_knowledge))
        got, want = torch.autograd.grad(loss, student)[0], torch.autograd.grad(want, student)[0]
        assert torch.equal(got, want)
    assert graphs == [
        ["kcd_ext.condensed_kd.default"],
        ["kcd_ext.condensed_kd_backward.default"],
    ]  # dynamic: compiled once


@pytest.mark.slow
def test_inductor_compiles_loss_inside_a_model(device):
    model, teacher = nn.Linear(12, 40, device=device), nn.Linear(12, 40, device=device)
    criterion = kcd_ext.CondensedKDLoss(keep=0.5, temperature=2.0, return_knowledge=True)

    def step(x, labels):
        return criterion(model(x), teacher(x), labels=labels)

    compiled = torch.compile(step, fullgraph=True)
    x, labels = torch.randn(16, 12, device=device), torch.arange(16, device=device)
    (loss, knowledge), (wanted_loss, wanted) = compiled(x, labels), step(x, labels)
    for got, want in zip(knowledge, wanted, strict=True):
        torch.testing.assert_close(got, want)
    got, want = (torch.autograd.grad(of, model.weight)[0] for of in (loss, wanted_loss))
    assert torch.allclose(got, want, atol=1e-6)


# ---- select_rows and the module


def test_select_rows_then_rows_equals_keep(device):
    student, teacher = logits(40, 9, 0, device).requires_grad_(), logits(40, 9, 1, device)
    index, knowledge = select_rows(student, keep=0.3)
    assert index.shape == (12,) and (index >= 0).all() and torch.equal(index, index.sort().values)
    assert torch.equal(knowledge.selected.nonzero()[:, 0], index) and knowledge.kl.isnan().all()
    first = condensed_kd_loss(student, teacher[index], rows=index)
    direct, expected = condensed_kd_loss(student, teacher, keep=0.3, return_knowledge=True)
    assert torch.equal(first, direct) and torch.allclose(expected.entropy, knowledge.entropy, rtol=1e-14)
    for a, b in zip(torch.autograd.grad(first, student), torch.autograd.grad(direct, student), strict=True):
        assert torch.equal(a, b)


def test_select_rows_pads_index_if_rows_are_ignored(device):
    student = logits(6, 9, 0, device).view(2, 3, 9)
    labels = torch.tensor([[-100, 1, -100], [-100, -100, 3]], device=device)
    index, knowledge = select_rows(student, keep=0.7, labels=labels)
    assert index.tolist() == [1, -1, -1, -1] or index.tolist() == [5, -1, -1, -1]
    assert knowledge.n_selected == 1 and knowledge.entropy[labels == -100].isnan().all()
    loss = condensed_kd_loss(student, torch.zeros(4, 9, dtype=torch.float64, device=device), rows=index, labels=labels)
    assert loss.isfinite()
    index, knowledge = select_rows(student, keep=50, value="cross_entropy", labels=labels)
    assert index.tolist() == [1, 5, -1, -1, -1, -1] and knowledge.n_selected == 2
    score = torch.tensor([[0, 5, 1], [9, 2, 3.0]], device=device)
    index, _ = select_rows(student, keep=2, value=score)
    assert index.tolist() == [1, 3]


def test_module_equals_function(device):
    student, teacher, labels = logits(9, 5, 0, device), logits(9, 5, 1, device), torch.arange(9, device=device) % 5
    criterion = kcd_ext.CondensedKDLoss(
        temperature=2.0, keep=0.5, ce_weight=0.3, reduction="sum", return_knowledge=True
    )
    score = torch.rand(9, device=device)
    got, knowledge = criterion(student, teacher, labels=labels, value=score, row_weight=score)
    want = condensed_kd_loss(
        student,
        teacher,
        labels=labels,
        value=score,
        row_weight=score,
        temperature=2.0,
        keep=0.5,
        ce_weight=0.3,
        reduction="sum",
    )
    assert torch.equal(got, want) and knowledge.n_selected == 4
    assert "temperature=2.0" in repr(criterion) and "keep=0.5" in repr(criterion)


def test_docstring_examples_give_the_output_they_show():
    results = doctest.testmod(losses)
    assert results.attempted > 20 and not results.failed


# ---- on a GPU


@on_gpu
@pytest.mark.parametrize("inplace", [False, True])
def test_replayed_training_step_equals_eager(inplace):
    """Capture model, loss, backward pass and optimiser once, replay them on other batches, and compare with eager steps."""
    torch.manual_seed(0)
    batches = [
        (torch.randn(64, 20, device="cuda"), 3 * torch.randn(64, 300, device="cuda"), torch.randint(300, (64,)).cuda())
        for _ in range(4)
    ]
    start = nn.Linear(20, 300).state_dict()

    def training():
        model = nn.Linear(20, 300, device="cuda")
        model.load_state_dict(start)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.5)

        def step(x, teacher, labels):
            loss = condensed_kd_loss(model(x), teacher, labels=labels, keep=0.5, inplace=inplace)
            loss.backward()
            optimiser.step()
            return loss.detach()

        return model, optimiser, step

    model, optimiser, step = training()
    static_batch = [x.clone() for x in batches[0]]
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(3):
            optimiser.zero_grad(set_to_none=True)
            step(*static_batch)
    torch.cuda.current_stream().wait_stream(side_stream)
    optimiser.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*static_batch)
    model.load_state_dict(start)

    eager_model, eager_optimiser, eager_step = training()
    for batch in batches:
        for x, new in zip(static_batch, batch, strict=True):
            x.copy_(new)
        graph.replay()
        eager_optimiser.zero_grad()
        torch.testing.assert_close(captured, eager_step(*batch), rtol=1e-5, atol=0)
    torch.testing.assert_close(model.weight, eager_model.weight, rtol=1e-5, atol=1e-6)
    assert not torch.equal(model.weight.cpu(), start["weight"])


@on_gpu
def test_graphed_callable_equals_eager():
    def loss_of(z, y):
        return condensed_kd_loss(z, y, keep=0.5)

    y = torch.randn(32, 100, device="cuda")
    graphed = torch.cuda.make_graphed_callables(loss_of, (torch.randn(32, 100, device="cuda", requires_grad=True), y))
    for scale in (1.0, 3.0):
        z = (scale * torch.randn(32, 100, device="cuda")).requires_grad_()
        (got, gradient), (want, expected) = (
            (loss, *torch.autograd.grad(2 * loss, z)) for loss in (graphed(z, y), loss_of(z, y))
        )
        assert torch.equal(got, want) and torch.equal(gradient, expected)


@on_gpu
def test_compiled_loss_becomes_a_cuda_graph():
    from torch._dynamo.utils import counters

    counters.clear()
    y = torch.randn(32, 100, device="cuda")

    def step(z):
        return condensed_kd_loss(2 * z, y, keep=0.5)

    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # runs, records, replays
        torch.compiler.cudagraph_mark_step_begin()
        z = torch.randn(32, 100, device="cuda", requires_grad=True)
        loss = compiled(z)
        (gradient,) = torch.autograd.grad(loss, z)
        torch.testing.assert_close(loss, step(z), rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, torch.autograd.grad(step(z), z)[0], rtol=1e-5, atol=1e-8)
    assert counters["inductor"]["cudagraph_skips"] == 0


@on_gpu
def test_gpu_memory_stays_within_one_gradient():
    """As `test_cpu_memory_stays_within_one_gradient`, measured by torch's allocator. Nothing leaks."""
    z, y = (torch.randn(512, 32_000, device="cuda") for _ in range(2))
    weight, size = torch.ones((), device="cuda", requires_grad=True), z.nbytes

    def rise(logits, **options):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = condensed_kd_loss(logits, y, keep=0.5, **options)
        if logits.requires_grad:
            torch.autograd.grad(loss, logits)
        return torch.cuda.max_memory_allocated() - before

    rise(z * weight)
    before = torch.cuda.memory_allocated()
    assert rise(z) < size / 16
    assert size <= rise(z * weight) < size * 17 / 16
    assert rise(z * weight, inplace=True) < size / 16
    for _ in range(100):
        rise(z * weight)
    assert torch.cuda.memory_allocated() == before


@on_gpu
def test_out_of_memory_on_a_gpu_raises_and_recovers():
    z, y = (torch.randn(2048, 32_000, device="cuda") for _ in range(2))
    loss = condensed_kd_loss(z.requires_grad_(), y)
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + z.nbytes // 2
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    condensed_kd_loss(z, y).backward()
    assert z.grad.isfinite().all()
