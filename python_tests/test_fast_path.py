"""The eager fast path (csrc/fast_path.h): bitwise equal to the operators, or falls back to them."""

import contextlib
import gc
import math
import sys
import threading
import weakref
from unittest import mock

import pytest
import torch
import torch.fx.experimental.proxy_tensor
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from kcd_ext import condensed_kd_loss, losses, ops

pytestmark = pytest.mark.skipif(not ops.HAS_FAST_PATH, reason="this torch does not publish DLPack's C functions")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@contextlib.contextmanager
def record_fast_path():
    """Yield a list that receives a bool for each call: whether it took the fast path."""
    taken, fast_path = [], losses._fast_path

    def spy(*arguments):
        result = fast_path(*arguments)
        taken.append(result is not None)
        return result

    with mock.patch.object(losses, "_fast_path", spy):
        yield taken


def fast_path_disabled():
    return mock.patch.object(ops, "HAS_FAST_PATH", False)


def logits(*shape, dtype=torch.float32, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loss_and_gradient(student, teacher, factor=None, **options):
    """Return the loss, its gradient and, with return_knowledge=True, the knowledge."""
    leaf = student.detach().requires_grad_()
    result = condensed_kd_loss(leaf, teacher, **options)
    loss, knowledge = result if options.get("return_knowledge") else (result, ())
    factor = torch.ones_like(loss) if factor is None else factor
    return loss.detach(), torch.autograd.grad(loss, leaf, factor)[0], *knowledge


def equal(one, other):
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7e4), b.nan_to_num(7e4))
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep", [0.2, 0.7, 5, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_fast_path_equals_operators_bit_for_bit(dtype, keep, reduction):
    labels = torch.tensor([3, -100, 0, 16, 5, -100, 9, 2])
    for shape, teacher_dtype in (((8, 17), dtype), ((2, 4, 17), torch.float32), ((1, 8, 1, 17), dtype)):
        student, teacher = logits(*shape, dtype=dtype), logits(*shape, dtype=teacher_dtype, seed=1)
        student.flatten()[3], teacher.flatten()[40] = -math.inf, -math.inf
        for options in (
            {"temperature": 1},
            {"temperature": 3.3, "labels": labels.view(shape[:-1]), "value": "cross_entropy"},
            {"labels": labels.view(shape[:-1]) % 17, "kd_weight": 0.0, "ce_weight": 2, "ignore_index": 5},
            {"labels": logits(*shape, seed=3).softmax(-1), "label_smoothing": 0.1, "value": "cross_entropy"},
            {"labels": logits(*shape, dtype=torch.float64, seed=3).softmax(-1)},
            {"labels": labels.view(shape[:-1]), "label_smoothing": 0.2},
            {"value": "kl"},
            {"value": "teacher_entropy"},
        ):
            options |= {"keep": keep, "reduction": reduction, "class_dim": -1}
            per_row = logits(*shape[:-1], seed=2).to(torch.float64 if dtype == torch.float64 else torch.float32)
            for factor in (None, per_row if reduction == "none" else per_row.flatten()[0]):
                with record_fast_path() as taken:
                    fast = loss_and_gradient(student, teacher, factor, return_knowledge=True, **options)
                    without = condensed_kd_loss(student, teacher, **options)
                assert taken == [True, True]
                with fast_path_disabled():
                    assert equal(fast, loss_and_gradient(student, teacher, factor, return_knowledge=True, **options))
                assert equal([without], fast[:1]) and not without.requires_grad


@pytest.mark.parametrize("factor", [1.0, 0.3, 0.0, -2.0, math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_equals_operators_for_any_incoming_gradient(dtype, factor):
    student, teacher = logits(9, 33, dtype=dtype), logits(9, 33, dtype=dtype, seed=1)
    student[4, 4], student[6] = math.inf, -math.inf  # these rows become NaN
    factor = torch.tensor(factor, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for keep in (0.2, 0.7):
        fast = loss_and_gradient(student, teacher, factor, keep=keep)
        with fast_path_disabled():
            assert equal(fast, loss_and_gradient(student, teacher, factor, keep=keep))


def test_strided_and_expanded_logits_take_the_fast_path():
    wide = logits(6, 2, 40)
    student, teacher = wide[:, 1, 3:20], logits(6, 50, seed=1)[:, 7:24]
    with record_fast_path() as taken:
        fast = loss_and_gradient(student, teacher, keep=0.5)
        expanded = loss_and_gradient(student, teacher[:1].expand(6, 17), keep=0.5)
    assert taken == [True, True]
    with fast_path_disabled():
        assert equal(fast, loss_and_gradient(student.clone(), teacher.clone(), keep=0.5))
        assert equal(expanded, loss_and_gradient(student.clone(), teacher[:1].repeat(6, 1), keep=0.5))


class Subclass(torch.Tensor):
    """A tensor subclass; only the dispatcher supports it."""


class RecordOperators(TorchDispatchMode):
    """A mode that records the names of operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_unsupported_calls_fall_back_to_operators():
    student, teacher = logits(6, 17), logits(6, 17, seed=1)
    negative = torch.complex(student, -teacher).conj().imag  # lazily negated
    assert negative.is_neg()
    with record_fast_path() as taken:
        for z, y in (
            (student.as_subclass(Subclass), teacher),
            (student, teacher.clone().requires_grad_()),
            (negative, teacher),
            (student, negative),
            (student.t().contiguous().t(), teacher),
            (torch._to_functional_tensor(student.clone()), teacher),
            (logits(0, 17), logits(0, 17)),
            (logits(*[1] * 8, 17), logits(*[1] * 8, 17)),
            (torch._neg_view(student), teacher),  # contiguous, unlike the two above
            (student, torch._neg_view(teacher)),
        ):
            condensed_kd_loss(z, y, keep=0.5, class_dim=-1)
        with pytest.warns(UserWarning, match="classes in the last dimension"):
            condensed_kd_loss(student.view(1, 2, 3, 17), teacher.view(1, 2, 3, 17))
        with pytest.warns(UserWarning, match="one class"):
            condensed_kd_loss(student[:, :1], teacher[:, :1])
        condensed_kd_loss(student, teacher, labels=torch._neg_view(-torch.arange(6)))
    assert taken == [False] * 13
    with fast_path_disabled():
        expected = loss_and_gradient(teacher, negative.resolve_neg().clone(), keep=0.5)
    assert equal(loss_and_gradient(teacher, negative, keep=0.5), expected)
    with RecordOperators() as mode, record_fast_path() as taken:
        condensed_kd_loss(student, teacher)
    assert taken == [False] and "kcd_ext.condensed_kd.default" in mode.names
    with record_fast_path() as taken:  # gradients just above and just below 1 MB
        loss_and_gradient(logits(257, 1024), logits(257, 1024))
        loss_and_gradient(logits(255, 1024), logits(255, 1024))
    assert taken == [False, True]


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated
def test_tracing_and_modes_record_the_operators():
    student, teacher, other = logits(6, 17), logits(6, 17, seed=1), logits(6, 17, seed=2)

    def function(z, y):
        return condensed_kd_loss(z, y, keep=0.5) * 1

    expected = function(other, teacher)
    assert torch.equal(torch.jit.trace(function, (student, teacher))(other, teacher), expected)
    make_fx = torch.fx.experimental.proxy_tensor.make_fx
    for options in ({}, {"pre_dispatch": True}):
        assert torch.equal(make_fx(function, **options)(student, teacher)(other, teacher), expected)
    with record_fast_path() as taken:
        condensed_kd_loss(student, teacher, labels=torch.arange(6).as_subclass(Subclass))
    assert taken == [False]


def test_invalid_calls_raise_the_errors_of_the_operators():
    student, teacher = logits(6, 17), logits(6, 17, seed=1)
    for options, error in (
        ({"labels": torch.full((6,), 17)}, IndexError),
        ({"labels": torch.ones(6)}, ValueError),
        ({"labels": torch.ones(6, 17, dtype=torch.int64)}, ValueError),
        ({"labels": torch.ones(6, 17).requires_grad_()}, ValueError),
        ({"labels": torch.ones(6, 17, dtype=torch.float8_e4m3fn)}, TypeError),
        ({"labels": torch.zeros(6, dtype=torch.int64), "label_smoothing": 2}, ValueError),
        ({"labels": torch.ones(5, dtype=torch.int64)}, ValueError),
        ({"value": "cross_entropy"}, ValueError),
        ({"value": "loss"}, ValueError),
        ({"keep": 0}, ValueError),
        ({"temperature": 0}, ValueError),
    ):
        messages = []
        for context in (contextlib.nullcontext, fast_path_disabled):
            with context(), pytest.raises(error) as raised:
                condensed_kd_loss(student, teacher, **options)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]
    for z, y, labels in (
        (student.int(), teacher, None),
        (student, teacher[:, :5], None),
        (student, teacher.view(2, 3, 17), None),
        (student, teacher, torch.ones(2, 3, dtype=torch.int64)),
        (student, teacher, torch.ones(6, 1, dtype=torch.int64)),
        (student.to("meta"), teacher, None),
        (3, teacher, None),
    ):
        with pytest.raises((TypeError, ValueError)):
            condensed_kd_loss(z, y, labels=labels)


@pytest.mark.parametrize("keep", [0.2, 0.7])
def test_autograd_graph_supports_reuse_and_reports_misuse(keep):
    student, teacher = logits(9, 17).requires_grad_(), logits(9, 17, seed=1)
    loss = condensed_kd_loss(student, teacher, keep=keep)
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
    torch.autograd.grad(loss, student)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, student)

    logits_of_model = student * 1
    loss = condensed_kd_loss(logits_of_model, teacher, keep=keep)
    torch.autograd.grad(loss, student, retain_graph=True)
    logits_of_model.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, student)

    loss = condensed_kd_loss(student, teacher, keep=keep)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    assert torch.equal(gradient, first)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), student)

    loss = condensed_kd_loss(student, teacher, keep=keep)
    factors = torch.tensor([1.0, -2.0])
    (batch,) = torch.autograd.grad(loss, student, factors, is_grads_batched=True)
    assert torch.allclose(batch, factors[:, None, None] * first)


@pytest.mark.parametrize("keep", [0.2, 0.7])
def test_saved_tensor_hooks_receive_the_saved_tensors(keep):
    student, teacher, packed = logits(9, 17).requires_grad_(), logits(9, 17, seed=1), []

    def pack(x):
        packed.append(x.shape)
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.clone()):
        loss = condensed_kd_loss(student, teacher, keep=keep, labels=torch.arange(9))
    assert packed == [(9, 17), (9, 17), (9,)]
    gradients = [torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2)]
    assert equal(gradients[:1], gradients[1:])


def strided(x):
    wide = x.new_zeros([2 * n for n in x.shape])
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    return view.copy_(x)


def made_in_inference_mode(x):
    with torch.inference_mode():
        return x.clone()


UNPACK = {  # what a hook may return for x: equal in value, size, dtype and device
    "unchanged": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t() if x.dim() == 2 else x,
    "strided": strided,
    "offset by one element": lambda x: torch.cat((x.new_zeros(1), x.reshape(-1)))[1:].view(x.shape),
    "lazily negated": lambda x: torch._neg_view(-x),
    "imaginary part of a conjugate": lambda x: torch.complex(x, -x).conj().imag if x.dtype in DTYPES[:2] else x,
    "parameter": lambda x: torch.nn.Parameter(x) if x.is_floating_point() else x,
    "subclass": lambda x: x.as_subclass(Subclass),
    "inference tensor": made_in_inference_mode,
}


@pytest.mark.parametrize("unpack", UNPACK.values(), ids=UNPACK)
@pytest.mark.parametrize(
    "rows, classes",
    [pytest.param(9, 17, id="small"), pytest.param(300, 1000, id="large", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_hooks_unpack_saved_tensors_once_in_any_layout(unpack, rows, classes, dtype):
    """On the fast path and in the operators, for several incoming gradients."""
    labels = torch.arange(rows) % classes
    for options in (
        {"keep": 0.2},
        {"keep": 0.7, "labels": labels},
        {"reduction": "none"},
        {"keep": 0.1, "inplace": True},
    ):
        for factor in (1.0, 0.5, math.nan):
            leaf, teacher = logits(rows, classes, dtype=dtype).requires_grad_(), logits(rows, classes, seed=1)
            packed, unpacked = [], []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda x, packed=packed: packed.append(1) or x,
                lambda x, unpacked=unpacked: unpacked.append(1) or unpack(x),
            ):
                loss = condensed_kd_loss(leaf * 1.0, teacher, **options)
            (loss.sum() * factor).backward()  # with reduction "none" the incoming gradient is an expanded scalar
            assert len(unpacked) in (0, len(packed))  # 0: the forward pass has computed the gradient
            (expected,) = torch.autograd.grad(
                condensed_kd_loss(leaf, teacher, **{**options, "inplace": False}).sum() * factor, leaf
            )
            assert equal([leaf.grad], [expected])


@pytest.mark.parametrize("rows, classes", [(8, 10), (300, 1000)])
@pytest.mark.parametrize(
    "options", [{}, {"keep": 0.1}, {"reduction": "none"}, {"reduction": "none", "keep": 0.5}], ids=str
)
def test_activation_checkpointing_gives_the_same_gradient(rows, classes, options):
    """A dispatch mode may be active in the forward pass, in the recomputation, in both or in neither."""
    x, teacher, weight = logits(rows, 16), logits(rows, classes, seed=1), logits(16, classes, seed=2).requires_grad_()

    def loss(weight, x):
        return condensed_kd_loss(x @ weight, teacher, **options).sum()

    (expected,) = torch.autograd.grad(loss(weight, x), weight)
    for forward_mode in (contextlib.nullcontext, RecordOperators):
        for backward_mode in (contextlib.nullcontext, RecordOperators):
            with forward_mode():
                again = torch.utils.checkpoint.checkpoint(loss, weight, x, use_reentrant=False)
            with backward_mode():
                assert torch.allclose(torch.autograd.grad(again, weight)[0], expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows, classes", [(8, 10), (300, 1000)])
@pytest.mark.parametrize("keep", [0.1, 0.7])
def test_traced_backward_keeps_the_incoming_gradient_as_an_input(rows, classes, keep):
    """make_fx traces both passes, or the backward pass of an earlier forward pass."""
    make_fx = torch.fx.experimental.proxy_tensor.make_fx
    student, teacher = logits(rows, classes).requires_grad_(), logits(rows, classes, seed=1)
    two, three = torch.tensor(2.0), torch.tensor(3.0)

    def both(z, factor):
        z = z.detach().requires_grad_()
        return torch.autograd.grad(condensed_kd_loss(z, teacher, keep=keep) * factor, z)[0] * factor

    def backward(factor):
        return torch.autograd.grad(loss, student, factor, retain_graph=True)[0] * factor

    expected = both(student, three)
    assert torch.allclose(make_fx(both)(student, two)(student, three), expected, atol=1e-6)
    loss = condensed_kd_loss(student, teacher, keep=keep)
    assert torch.allclose(make_fx(backward)(two)(three), expected, atol=1e-6)
    # Torch rejects logits that are not inputs of the trace.
    with pytest.raises(RuntimeError, match="requires grad as a constant"):
        torch.jit.trace(backward, (two,))


@pytest.mark.parametrize("keep", [0.2, 0.7])
def test_lazily_negated_incoming_gradient_is_supported(keep):
    student, teacher = logits(8, 10).requires_grad_(), logits(8, 10, seed=1)
    (expected,) = torch.autograd.grad(condensed_kd_loss(student, teacher, keep=keep), student)
    for factor in (torch.tensor(0.5j).conj().imag, torch._neg_view(torch.tensor(0.5))):
        assert factor.is_neg()
        (gradient,) = torch.autograd.grad(condensed_kd_loss(student, teacher, keep=keep), student, factor)
        assert torch.allclose(gradient, -0.5 * expected)


@pytest.mark.parametrize("keep", [0.2, 0.7])
def test_inference_tensors_take_the_fast_path(keep):
    student = logits(9, 17)
    with torch.inference_mode():
        teacher, labels = logits(9, 17, seed=1), torch.arange(9)
    with record_fast_path() as taken:
        fast = loss_and_gradient(student, teacher, labels=labels, keep=keep)
    assert taken == [True]
    assert equal(fast, loss_and_gradient(student, teacher.clone(), labels=labels.clone(), keep=keep))
    leaf = student.requires_grad_()
    loss = condensed_kd_loss(leaf, teacher, labels=labels, keep=keep)
    assert all(torch.equal(torch.autograd.grad(loss, leaf, retain_graph=True)[0], fast[1]) for _ in range(2))


def test_graph_releases_its_tensors_when_freed():
    student, teacher = logits(9, 17).requires_grad_(), logits(9, 17, seed=1)
    with torch.inference_mode():
        frozen = logits(9, 17, seed=1)
    for constant in (teacher, frozen):
        loss = condensed_kd_loss(student, constant)
        ended = weakref.ref(loss)
        references = sys.getrefcount(constant)
        del loss
        gc.collect()
        assert ended() is None and sys.getrefcount(constant) <= references
    gradient = torch.autograd.grad(condensed_kd_loss(student, teacher), student)[0]
    copy = gradient.clone()
    for _ in range(50):  # its memory is not reused
        torch.autograd.grad(condensed_kd_loss(student * 2, teacher), student)
    assert torch.equal(gradient, copy)


def test_concurrent_threads_get_correct_gradients():
    pairs = [(logits(64, 33, seed=i), logits(64, 33, seed=i + 50)) for i in range(8)]
    expected = [loss_and_gradient(*pair, keep=0.7) for pair in pairs]
    wrong = []

    def work(i):
        for _ in range(300):
            if not equal(loss_and_gradient(*pairs[i], keep=0.7), expected[i]):
                wrong.append(i)

    leaf = logits(200, 1000).requires_grad_()  # a graph shared by threads: only one takes the stored gradient
    loss = condensed_kd_loss(leaf, logits(200, 1000, seed=1), keep=0.7)
    factor = torch.tensor(3.0)
    unscaled = torch.autograd.grad(condensed_kd_loss(leaf, logits(200, 1000, seed=1), keep=0.7), leaf)[0]

    def work_on_one_graph(_):
        nonlocal loss
        for _ in range(60):
            (gradient,) = torch.autograd.grad(loss, leaf, factor, retain_graph=True)
            if not torch.allclose(gradient, 3 * unscaled, rtol=1e-5, atol=1e-10):
                wrong.append("one graph")
            loss = condensed_kd_loss(leaf, logits(200, 1000, seed=1), keep=0.7)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(pairs))]
    threads += [threading.Thread(target=work_on_one_graph, args=(i,)) for i in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # switch threads as often as possible
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
