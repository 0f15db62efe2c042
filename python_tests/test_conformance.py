"""Conformance of every backend with the operator's contract, case by case, against an oracle in extended precision."""

import math
import os
import re
import subprocess
import sys

import oracle
import pytest
import torch
from backends import BACKENDS, parameters, run
from hypothesis import given, settings
from hypothesis import strategies as st

import kcd_ext
from kcd_ext import ops

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INF, NAN = math.inf, math.nan


@pytest.fixture(params=parameters(*BACKENDS))
def backend(request):
    return request.param


def logits(rows, classes, *, dtype=torch.float32, seed=0, scale=2.0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, classes, generator=generator, dtype=torch.float64) * scale + offset).to(dtype)


def check(backend, student, teacher, **options):
    got = run(backend, student, teacher, **options)
    oracle.check(got, oracle.expected(student, teacher, got, **options))
    accumulator = torch.float64 if student.dtype == torch.float64 else torch.float32
    assert got["grad"].dtype == student.dtype and got["grad"].shape == student.shape
    for name in ("loss", "kl", "entropy"):
        assert got[name].dtype == accumulator
    for name in ("kl", "entropy", "selected", "value"):
        assert got[name].shape == student.shape[:-1]
    assert (
        got["selected"].dtype == torch.bool and got["n_selected"].dtype == torch.int64 and got["n_selected"].shape == ()
    )
    return got


def assert_same(backend, got, want, name=""):
    """Assert equality bit for bit, on CUDA up to rounding: how a row is split there depends on the batch and on alignment."""
    if backend in ("simt", "cuda"):
        rtol = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}.get(got.dtype, 1e-5)  # 2 ulp for 16-bit types
        torch.testing.assert_close(got, want, rtol=rtol, atol=1e-6, equal_nan=True, msg=name or None)
    else:
        assert torch.equal(got, want), name


# ---- shapes, dtypes, options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, classes", [(1, 1), (3, 3), (129, 17), (7, 129), (5, 1151), (3, 4097), (2, 32003)])
def test_all_sizes_match_oracle(backend, dtype, rows, classes):
    check(backend, logits(rows, classes, dtype=dtype, seed=1), logits(rows, classes, dtype=dtype, seed=2), keep=0.7)


@pytest.mark.parametrize("teacher", DTYPES, ids=str)
@pytest.mark.parametrize("student", DTYPES, ids=str)
def test_mixed_dtypes_match_oracle(backend, student, teacher):
    labels = torch.arange(9) % 37
    check(backend, logits(9, 37, dtype=student, seed=1), logits(9, 37, dtype=teacher, seed=2), keep=0.5, labels=labels)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 2.0, 3.0, 4.0, 20.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", ["entropy", "teacher_entropy", "kl", "cross_entropy"])
def test_temperatures_and_values_match_oracle(backend, dtype, temperature, value):
    labels = torch.arange(12) % 100
    labels[3] = -100
    check(
        backend,
        logits(12, 100, dtype=dtype, seed=3),
        logits(12, 100, dtype=dtype, seed=4),
        temperature=temperature,
        value=value,
        labels=labels,
        keep=0.6,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_reductions_weights_and_incoming_gradients_match_oracle(backend, dtype, labelled, reduction):
    student, teacher = logits(33, 19, dtype=dtype, seed=5), logits(33, 19, dtype=dtype, seed=6)
    options = {
        "reduction": reduction,
        "keep": 11,
        "row_weight": torch.rand(33, generator=torch.Generator().manual_seed(7)),
    }
    if labelled:
        options |= {"labels": torch.arange(33) % 19, "kd_weight": 0.7, "ce_weight": 1.3}
        options["labels"][::5] = -7
        options["ignore_index"] = -7
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    grad_output = (
        torch.linspace(-2, 3, 33, dtype=accumulator) if reduction == "none" else torch.tensor(-1.7, dtype=accumulator)
    )
    check(backend, student, teacher, grad_output=grad_output, **options)
    if reduction == "none":  # an expanded gradient has stride 0
        check(backend, student, teacher, grad_output=torch.tensor(0.3, dtype=accumulator).expand(33), **options)


def test_zero_and_negative_weights_match_oracle(backend):
    student, teacher, labels = logits(8, 11, seed=8), logits(8, 11, seed=9), torch.arange(8)
    for kd_weight, ce_weight in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (-0.5, 2.0)):
        check(backend, student, teacher, labels=labels, kd_weight=kd_weight, ce_weight=ce_weight, keep=0.5)


@pytest.mark.parametrize("keep", [1.0, 0.7, 0.2, 1e-9, 1, 4, 1000, 2**70])
@pytest.mark.parametrize("rows", [1, 10])
def test_keep_determines_number_of_selected_rows(backend, keep, rows):
    got = check(backend, logits(rows, 7, seed=10), logits(rows, 7, seed=11), keep=keep)
    assert got["n_selected"] == (min(keep, rows) if isinstance(keep, int) else max(1, int(keep * rows)))


def test_keep_is_multiplied_in_float64(backend):
    # 0.29 * 100 is 28.999999999999996 in float64 and 29.0 in float32
    assert check(backend, logits(100, 3, seed=12), logits(100, 3, seed=13), keep=0.29)["n_selected"] == 28


@pytest.mark.parametrize(
    "dtype, classes", [(torch.float32, 1003), (torch.float64, 517), (torch.float16, 1003)], ids=str
)
def test_gradient_larger_than_caches_equals_that_of_small_batch(backend, dtype, classes):
    """Large gradients are written with non-temporal stores, in pieces of any alignment."""
    rows = 9_000_000 // (classes * dtype.itemsize) + 1
    student, teacher = logits(rows, classes, dtype=dtype, seed=66), logits(rows, classes, dtype=dtype, seed=67)
    options = {"keep": 0.5, "labels": torch.arange(rows) % classes, "reduction": "sum"}
    options["labels"][::3] = -100
    full = run(backend, student, teacher, value=torch.arange(float(rows)), **options)
    # the same rows in a batch that fits in the caches
    last = slice(rows - 40, rows)
    part = run(backend, student[last], teacher[last], labels=options["labels"][last], reduction="sum")
    assert_same(backend, full["grad"][last], part["grad"])
    assert full["selected"][last][options["labels"][last] >= 0].all()
    unselected = ~full["selected"] & (options["labels"] < 0)
    assert unselected.any() and (full["grad"][unselected] == 0).all() and full["grad"].isfinite().all()
    if backend == "cpu":
        oracle.check(
            part, oracle.expected(student[last], teacher[last], part, labels=options["labels"][last], reduction="sum")
        )


def test_many_rows_match_oracle(backend):
    check(backend, logits(70_001, 3, seed=14), logits(70_001, 3, seed=15), keep=0.3)


# ---- scores


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_custom_scores_rank_rows_and_come_back_unchanged(backend, dtype):
    score = logits(50, 1, dtype=dtype, seed=16)[:, 0]
    score[[4, 9]] = torch.tensor([-INF, INF], dtype=dtype)
    got = check(backend, logits(50, 5, seed=17), logits(50, 5, seed=18), value=score, keep=0.4)
    assert got["value"].dtype == dtype and torch.equal(got["value"], score)


def test_float64_scores_are_compared_in_float64(backend):
    score = torch.tensor([1.0, 1.0 + 1e-12, 1.0 + 2e-12], dtype=torch.float64)
    got = check(backend, logits(3, 5, seed=19), logits(3, 5, seed=20), value=score, keep=1)
    assert got["selected"].tolist() == [False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ties_select_lower_row(backend, dtype):
    score = torch.tensor([0.0, -0.0, 1.0, 0.0, -0.0, 1.0, -1.0], dtype=dtype)
    student, teacher = logits(7, 4, seed=21), logits(7, 4, seed=22)
    for keep, rows in ((1, {2}), (2, {2, 5}), (3, {0, 2, 5}), (4, {0, 1, 2, 5}), (6, {0, 1, 2, 3, 4, 5})):
        assert (
            set(check(backend, student, teacher, value=score, keep=keep)["selected"].nonzero()[:, 0].tolist()) == rows
        )
    assert (
        check(backend, torch.zeros(9, 4), torch.zeros(9, 4), keep=0.5)["selected"].tolist() == [True] * 4 + [False] * 5
    )


def test_nan_score_of_either_sign_ranks_first(backend):
    negative_nan = torch.tensor([-4194304], dtype=torch.int32).view(torch.float32)
    assert negative_nan.isnan() and torch.signbit(negative_nan)
    score = torch.tensor([5.0, NAN, INF, 0.0])
    score[3] = negative_nan[0]
    got = check(backend, logits(4, 3, seed=23), logits(4, 3, seed=24), value=score, keep=2)
    assert got["selected"].tolist() == [False, True, False, True]


# ---- memory


def surround(x, left=3, right=5):
    """Return the same numbers inside memory full of NaN, at an odd alignment and row stride."""
    poisoned = torch.full((*x.shape[:-1], left + x.shape[-1] + right), NAN, dtype=x.dtype)
    view = poisoned[..., left : left + x.shape[-1]]
    view.copy_(x)
    return view


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [5, 16, 129, 4097])
def test_strided_rows_ignore_surrounding_memory(backend, dtype, classes):
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        student, teacher = (
            surround(logits(6, classes, dtype=dtype, seed=25)),
            surround(logits(6, classes, dtype=dtype, seed=26), 1, 2),
        )
        check(backend, student, teacher, keep=0.5, labels=torch.arange(6) % classes)
    finally:
        torch.use_deterministic_algorithms(False)


def test_every_layout_equals_contiguous(backend):
    base = logits(4 * 6, 30, seed=27).view(4, 6, 30)
    other = logits(4 * 5, 30, seed=28).view(4, 5, 30)
    for student, teacher in (
        (base[:, :-1], other),  # rows at two strides
        (base[:, 1:], base[:, :-1]),
        (base.transpose(0, 1), base.transpose(0, 1)),
        (base[..., ::2], base[..., 1::2]),  # classes not adjacent
        (base.permute(2, 0, 1), base.permute(2, 0, 1)),  # classes not adjacent
        (base[:1, :, :].expand(4, 6, 30), base),  # rows that overlap
        (base[0, 0], base[1, 1]),  # one row without leading dimensions
        (base.view(2, 2, 3, 2, 30)[:, :, :2], base.view(2, 2, 3, 2, 30)[:, :, 1:]),
        (base.view(2, 2, 3, 2, 30)[:, :1, :2, :1], base.view(2, 2, 3, 2, 30)[:, 1:, 1:, 1:]),  # three strides: copied
    ):
        got = check(backend, student, teacher, keep=0.5)
        contiguous = run(backend, student.contiguous(), teacher.contiguous(), keep=0.5)
        for name in got:
            assert_same(backend, got[name], contiguous[name], name)


def test_inplace_gives_same_bits(backend):
    if backend == "reference":
        with pytest.raises(ValueError, match="inplace"):
            run(backend, logits(2, 3), logits(2, 3), inplace=True)
        return
    for dtype in DTYPES:
        student, teacher, labels = (
            logits(21, 300, dtype=dtype, seed=29),
            logits(21, 300, dtype=dtype, seed=30),
            torch.arange(21),
        )
        soft = probabilities(21, 300)
        for options in (
            {},
            {"labels": labels},
            {"keep": 0.3},
            {"reduction": "none", "keep": 0.5},
            {"labels": labels, "label_smoothing": 0.1},
            {"labels": soft, "keep": 0.3},
        ):
            out_of_place = run(backend, student, teacher, **options)
            inplace = run(backend, student, teacher, inplace=True, **options)
            for name in inplace:
                assert torch.equal(out_of_place[name], inplace[name]), (dtype, options, name)


# ---- numbers


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_offsets_match_oracle(backend, dtype, offset):
    student = logits(9, 257, dtype=dtype, seed=31, offset=offset)
    check(backend, student, logits(9, 257, dtype=dtype, seed=32, offset=-offset), keep=0.5, labels=torch.arange(9))
    got = check(backend, student, student + logits(9, 257, dtype=dtype, seed=33, scale=1e-3))
    assert (got["kl"] >= -1e-6).all() and (got["kl"] < 1e-3).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_is_zero_if_student_equals_teacher(backend, dtype):
    student = logits(5, 1000, dtype=dtype, seed=34, scale=5)
    got = check(backend, student, student.clone(), labels=torch.arange(5), ce_weight=0.0)
    assert (got["kl"] == 0).all() and got["loss"] == 0 and got["grad"].abs().max() < 1e-7


@pytest.mark.parametrize("scale", [30.0, 300.0, 1e4])
@pytest.mark.parametrize("classes", [40, 5000])
def test_extreme_logits_match_oracle(backend, scale, classes):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        student, teacher = (
            logits(4, classes, dtype=dtype, seed=35, scale=scale),
            logits(4, classes, dtype=dtype, seed=36, scale=scale),
        )
        for temperature in (1.0, 4.0, 0.5):
            check(backend, student, teacher, temperature=temperature, labels=torch.arange(4))


def test_class_without_teacher_probability_adds_nothing(backend):
    student, teacher = logits(6, 5000, seed=37), logits(6, 5000, seed=38)
    teacher[0, 3] = teacher[1, 1:] = teacher[2, :4990] = teacher[3, 2100:] = -INF
    student[0, 3] = student[2, :1000] = -INF  # impossible for both
    got = check(backend, student, teacher, labels=torch.arange(6) + 4000)
    assert got["kl"].isfinite().all() and got["grad"].isfinite().all()


def test_padded_vocabulary_equals_slice(backend):
    student, teacher = logits(8, 300, seed=39), logits(8, 300, seed=40)
    student[:, 256:] = teacher[:, 256:] = -INF
    padded = check(backend, student, teacher, keep=0.5)
    assert torch.allclose(padded["loss"], run(backend, student[:, :256], teacher[:, :256], keep=0.5)["loss"])
    assert (padded["grad"][:, 256:] == 0).all()


@pytest.mark.parametrize("mask", [-1e30, torch.finfo(torch.float32).min, -INF])
@pytest.mark.parametrize("temperature", [1.0, 4.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_large_negative_masks_give_finite_kl(backend, dtype, temperature, mask):
    student, teacher = logits(6, 4200, dtype=dtype, seed=60), logits(6, 4200, dtype=dtype, seed=61)
    teacher[0, 100:] = teacher[1, :2100] = teacher[2, 3] = teacher[3, ::2] = student[4, ::3] = mask
    student[2, 3] = -INF  # impossible for both: adds nothing
    student[3] = torch.where(teacher[3] == mask, mask, student[3].double()).to(dtype)
    teacher[4] = torch.where(student[4] == mask, mask, teacher[4].double()).to(dtype)
    got = check(backend, student, teacher, temperature=temperature, value="teacher_entropy", keep=3)
    assert got["kl"].isfinite().all() and (got["kl"] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "classes, low, masked, temperature",
    [
        (4096, -200.0, 1, 1.0),
        (4096, -200.0, 2, 1.0),
        (4096, -1000.0, 1, 4.0),
        (4096, -1000.0, 64, 4.0),
        (2000, -1000.0, 64, 4.0),
        (1024, -1000.0, 64, 4.0),
        (4096, -100.0, 64, 1.0),
        (4096, -3000.0, 900, 4.0),
    ],
)
def test_masked_student_with_tiny_teacher_probability_gives_finite_kl(
    backend, dtype, classes, low, masked, temperature
):
    """Partial sums overflow float32, the sums over a full row do not."""
    student, teacher = logits(3, classes, dtype=dtype, seed=68), logits(3, classes, dtype=dtype, seed=69)
    teacher[:, 0] += 20
    teacher[:, classes // 2 :] = low
    student[:, classes - masked :] = torch.finfo(dtype).min
    assert check(backend, student, teacher, temperature=temperature, value="kl", keep=2)["kl"].isfinite().all()


@pytest.mark.parametrize("classes", [6, 5000])
def test_kl_is_infinite_if_only_student_rules_out_class(backend, classes):
    student, teacher = logits(3, classes, seed=41), logits(3, classes, seed=42)
    student[1, 2] = -INF
    got = check(backend, student, teacher)
    assert got["kl"][1] == INF and got["loss"] == INF and got["grad"].isfinite().all()
    teacher[1, 2] = -1200.0  # p = e^-300: positive, but below the range of float32
    assert check(backend, student, teacher)["kl"][1] == INF
    teacher[1, 2] = -1e6  # p = 0 in float64 too
    assert check(backend, student, teacher)["kl"][1].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [14, 1000, 5000])
def test_infinity_vanishes_once_a_larger_maximum_follows(backend, dtype, classes):
    """A class that the student rules out has probability next to the first maximum, and none next to a later, larger one."""
    student, teacher = torch.zeros(3, classes, dtype=dtype), torch.full((3, classes), -6000.0, dtype=dtype)
    teacher[:, 0], student[:, 0], teacher[:, 1] = -5000, -INF, -2500
    teacher[0, classes - 3] = teacher[1, classes // 2] = 0.0
    teacher[2, 2] = -2600.0
    got = check(backend, student, teacher, value="kl", keep=2)
    assert got["kl"][:2].isfinite().all() and got["kl"][2] == INF


def test_zero_weight_removes_infinite_rows_but_not_nan(backend):
    student, teacher, labels = logits(4, 6, seed=41), logits(4, 6, seed=42), torch.arange(4)
    student[1, 2], student[2, 3] = -INF, NAN
    weight = torch.tensor([1.0, 0.0, 0.0, 1.0])
    got = check(backend, student, teacher, row_weight=weight, reduction="none")
    assert got["loss"][1] == 0 and got["loss"][2].isnan()
    check(backend, student[:2], teacher[:2], labels=labels[:2], kd_weight=0.0, ce_weight=1.0)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 3.0])
@pytest.mark.parametrize("classes", [2, 10, pytest.param(3000, marks=pytest.mark.slow)])
def test_entropy_of_confident_rows_is_relatively_accurate(backend, temperature, classes):
    """Late in training most rows are nearly certain, and these are ranked: the tolerance is relative to their entropy."""
    if backend == "reference" and classes > 1000:
        pytest.skip("PyTorch's softmax adds thousands of small numbers to 1, and loses their digits")
    student, teacher = logits(200, classes, seed=62), logits(200, classes, seed=63)
    student[:, 0] += torch.linspace(5, 60, 200)
    teacher[:, 1] += torch.linspace(60, 5, 200)
    labels = torch.zeros(200, dtype=torch.int64)
    check(backend, student, teacher, temperature=temperature, value="entropy", keep=0.5, labels=labels)
    check(backend, student, teacher, temperature=temperature, value="teacher_entropy", keep=0.5)


def test_nan_row_spoils_only_its_gradient_and_only_if_selected(backend):
    student, teacher = logits(4, 6, seed=64), logits(4, 6, seed=65)
    student[0, 0] = student[1, 0] = teacher[2, 0] = NAN
    got = check(backend, student, teacher, keep=1)
    assert got["selected"].tolist() == [True, False, False, False] and (got["grad"][1:] == 0).all()
    student[0, 0] = student[1, 0] = 0.0
    check(backend, student, teacher, keep=1, labels=torch.arange(4))
    check(backend, student, teacher, value=torch.arange(4.0), keep=1, labels=torch.arange(4))


@pytest.mark.parametrize("value", ["entropy", "teacher_entropy", "kl", "cross_entropy", "score"])
@pytest.mark.parametrize("where, bad", [("student", NAN), ("student", INF), ("teacher", NAN), ("teacher", INF)])
@pytest.mark.parametrize("classes", [6, 5000])
def test_row_with_nan_or_infinity_ranks_first_under_every_value(backend, where, bad, value, classes):
    student, teacher, labels = logits(5, classes, seed=43), logits(5, classes, seed=44), torch.arange(5)
    (student if where == "student" else teacher)[3, classes // 2] = bad
    value = torch.arange(5.0).flip(0) if value == "score" else value
    got = check(backend, student, teacher, value=value, labels=labels, keep=1)
    assert (
        got["value"][3].isnan()
        and got["selected"].tolist() == [False, False, False, True, False]
        and got["loss"].isnan()
    )
    assert got["grad"][[0, 1, 2, 4]].isfinite().all()


def test_row_of_only_minus_infinity_ranks_first(backend):
    student, teacher = logits(4, 9, seed=45), logits(4, 9, seed=46)
    student[1], teacher[2] = -INF, -INF
    got = check(backend, student, teacher, keep=2)
    assert got["selected"].tolist() == [False, True, True, False] and got["loss"].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_ignored_rows_has_no_effect(backend, dtype):
    student, teacher = logits(8, 20, dtype=dtype, seed=47), logits(8, 20, dtype=dtype, seed=48)
    labels = torch.arange(8)
    labels[2] = labels[5] = -100
    clean = run(backend, student, teacher, labels=labels, keep=0.5)
    student[2], teacher[2], student[5, 1] = NAN, INF, INF
    got = check(backend, student, teacher, labels=labels, keep=0.5)
    for name in got:
        assert torch.equal(got[name].nan_to_num(9.0), clean[name].nan_to_num(9.0)), name
    assert (got["grad"][[2, 5]] == 0).all()


def test_loss_and_gradient_are_zero_without_candidates(backend):
    labels = torch.full((4,), -100)
    for reduction in ("mean", "sum", "none"):
        got = check(backend, logits(4, 5, seed=49), logits(4, 5, seed=50), labels=labels, reduction=reduction)
        assert (
            (got["loss"] == 0).all()
            and (got["grad"] == 0).all()
            and got["n_selected"] == 0
            and not got["selected"].any()
        )
    got = check(backend, logits(4, 5, seed=49), torch.zeros(2, 5), rows=torch.tensor([-1, -1]))
    assert got["loss"] == 0 and (got["grad"] == 0).all() and got["n_selected"] == 0


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5)])
def test_empty_batch_has_zero_loss(backend, shape):
    strided = torch.zeros(5, 4, 0, 10).permute(1, 0, 2, 3)
    assert run(backend, strided, torch.zeros(4, 5, 0, 10))["loss"] == 0
    assert run(backend, torch.zeros(10, 4)[:, :0].t(), torch.zeros(0, 10))["loss"] == 0
    for options in ({}, {"labels": torch.zeros(shape[:-1], dtype=torch.int64)}, {"keep": 3}):
        got = run(backend, torch.zeros(shape), torch.zeros(shape), **options)
        assert got["loss"] == 0 and got["grad"].shape == shape and got["n_selected"] == 0


def test_single_class_has_zero_loss(backend):
    got = check(backend, logits(5, 1, seed=51), logits(5, 1, seed=52), labels=torch.zeros(5, dtype=torch.int64), keep=2)
    assert got["loss"] == 0 and (got["kl"] == 0).all() and (got["entropy"] == 0).all() and (got["grad"] == 0).all()


# ---- targets: soft labels and label smoothing


def probabilities(rows, classes, *, dtype=torch.float32, seed=70):
    """Return labels of every kind: most sum to 1; also one-hot, all zeros, sums of 2, and entries that are 0 or negative."""
    y = logits(rows, classes, dtype=torch.float64, seed=seed).softmax(-1)
    y[1::5] = torch.nn.functional.one_hot(torch.arange(len(y[1::5])) % classes, classes).double()
    y[2::5] = 0
    y[3::5, ::2] = 0
    y[4::5] *= 2
    y[4::10, 0] = -0.25
    return y.to(dtype)


@pytest.mark.parametrize("labels", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, classes", [(3, 1), (7, 5), (11, 129), (5, 4099)])
def test_soft_labels_match_oracle(backend, dtype, labels, rows, classes):
    student, teacher = logits(rows, classes, dtype=dtype, seed=71), logits(rows, classes, dtype=dtype, seed=72)
    soft = probabilities(rows, classes, dtype=labels)
    for temperature, label_smoothing in ((1.0, 0.0), (4.0, 0.1), (3.0, 1.0)):
        options = {"labels": soft, "label_smoothing": label_smoothing, "ce_weight": 0.8}
        check(backend, student, teacher, temperature=temperature, keep=0.6, **options)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_smoothing_with_reductions_weights_values_and_rows_matches_oracle(backend, dtype, reduction, soft):
    student, teacher = logits(33, 19, dtype=dtype, seed=73), logits(33, 19, dtype=dtype, seed=74)
    options = {"reduction": reduction, "keep": 11, "kd_weight": 0.7, "ce_weight": -1.3, "label_smoothing": 0.2}
    options |= {"labels": probabilities(33, 19) if soft else torch.arange(33) % 19, "value": "cross_entropy"}
    if not soft:
        options["labels"][::5] = options["ignore_index"] = 3
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    factor = torch.linspace(-2, 3, 33, dtype=accumulator) if reduction == "none" else torch.tensor(-1.7).to(accumulator)
    check(backend, student, teacher, grad_output=factor, **options)
    rows = torch.tensor([30, -1, 4, 7])
    check(backend, student, teacher[:4], grad_output=factor, rows=rows, **options)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_equals_that_of_torch(backend, reduction, soft, label_smoothing):
    student = logits(17, 23, dtype=torch.float64, seed=75)
    labels = probabilities(17, 23, dtype=torch.float64) if soft else torch.arange(17)
    if not soft:
        labels[::4] = -100
    got = run(
        backend,
        student,
        student,
        labels=labels,
        kd_weight=0.0,
        ce_weight=1.0,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    leaf = student.clone().requires_grad_()
    want = torch.nn.functional.cross_entropy(leaf, labels, reduction=reduction, label_smoothing=label_smoothing)
    want.sum().backward()
    torch.testing.assert_close(got["loss"], want.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got["grad"], leaf.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [64, 5000])
def test_masked_class_counts_only_with_a_target(backend, dtype, classes):
    """A class that the student rules out adds 0 without a target, and makes the cross entropy infinite with one."""
    student, teacher = logits(5, classes, dtype=dtype, seed=76), logits(5, classes, dtype=dtype, seed=77)
    soft, last = probabilities(5, classes, seed=78), classes - 9
    student[:, last:] = teacher[:, last:] = -INF
    soft[:, last:] = 0
    got = check(backend, student, teacher, labels=soft, reduction="none")
    assert got["loss"].isfinite().all() and got["grad"].isfinite().all() and (got["grad"][:, last:] == 0).all()
    part = check(backend, student[:, :last], teacher[:, :last], labels=soft[:, :last], reduction="none")
    torch.testing.assert_close(got["loss"], part["loss"], rtol=1e-5, atol=1e-6)
    soft[0, -1] = 0.5
    soft[1, -1] = -0.5
    got = check(backend, student, teacher, labels=soft, reduction="none")
    assert got["loss"][:2].tolist() == [INF, -INF] and got["loss"][2:].isfinite().all()
    assert got["grad"].isfinite().all()
    for labels in (soft.clamp(min=0), torch.arange(5)):
        got = check(backend, student, teacher, labels=labels, label_smoothing=0.1, reduction="none")
        assert (got["loss"] == INF).all() and got["grad"].isfinite().all()


@pytest.mark.parametrize("mask", [-1e30, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_smoothing_over_large_negative_masks_matches_oracle(backend, dtype, mask):
    student, teacher = logits(4, 4200, dtype=dtype, seed=79, offset=-50), logits(4, 4200, dtype=dtype, seed=80)
    student[0, :4000] = student[1, 4100:] = student[2, 7] = student[3, ::2] = mask
    teacher[student == mask] = mask
    for labels in (torch.arange(4) + 4050, probabilities(4, 4200)):
        check(backend, student, teacher, labels=labels, label_smoothing=0.1)


@pytest.mark.parametrize("classes", [6, 5000])
def test_nan_in_a_soft_label_reaches_the_loss_and_its_row_alone(backend, classes):
    student, teacher = logits(5, classes, seed=81), logits(5, classes, seed=82)
    labels = probabilities(5, classes)
    labels[3, classes // 2] = NAN
    for value in ("entropy", "cross_entropy"):
        got = check(backend, student, teacher, labels=labels, value=value, keep=1, reduction="none")
        assert got["loss"].isnan().tolist() == got["grad"].isnan().all(1).tolist() == [False] * 3 + [True, False]
        assert value == "entropy" or got["selected"][3]
    student[2, 0] = NAN  # a row whose labels are all zeros
    assert check(backend, student, teacher, labels=labels, reduction="none")["loss"][2].isnan()


def test_every_layout_of_soft_labels_equals_contiguous(backend):
    student, teacher = logits(24, 30, seed=83).view(4, 6, 30), logits(24, 30, seed=84).view(4, 6, 30)
    base = probabilities(96, 60).view(8, 12, 60)
    for labels in (
        base[:4, :6, :30],  # rows at two strides
        base[:4, 1:7, 3:33],  # not aligned
        base[::2, ::2, ::2],  # classes not adjacent
        base[0, 0, :30].expand(4, 6, 30),  # one row for all
        base.permute(1, 0, 2)[:4, :6, :30],
        surround(base[:4, :6, :30].contiguous()),
        surround(base[:4, :6, :30].half(), 1, 2),
    ):
        options = {"keep": 0.5, "label_smoothing": 0.1}
        got = check(backend, student, teacher, labels=labels, **options)
        contiguous = run(backend, student, teacher, labels=labels.contiguous(), **options)
        for name in got:
            assert_same(backend, got[name], contiguous[name], name)


def test_soft_labels_follow_the_class_dimension(backend):
    student, teacher = logits(6, 40, seed=85).view(2, 3, 5, 8), logits(6, 40, seed=86).view(2, 3, 5, 8)
    labels = probabilities(80, 3).view(2, 5, 8, 3).permute(0, 3, 1, 2)
    options = {"keep": 0.5, "ce_weight": 0.6, "label_smoothing": 0.1}
    got = run(backend, student, teacher, labels=labels, class_dim=1, **options)
    moved = [x.movedim(1, -1) for x in (student, teacher, labels)]
    want = check(backend, *moved[:2], labels=moved[2], **options)
    want["grad"] = want["grad"].movedim(-1, 1)
    for name in got:
        assert_same(backend, got[name], want[name], name)


def test_empty_batch_of_soft_labels_has_zero_loss(backend):
    got = run(backend, torch.zeros(3, 0, 5), torch.zeros(3, 0, 5), labels=torch.zeros(3, 0, 5), label_smoothing=0.1)
    assert got["loss"] == 0 and got["grad"].shape == (3, 0, 5)


@pytest.mark.parametrize("dtype, classes", [(torch.float32, 1003), (torch.float64, 517), (torch.bfloat16, 1003)])
def test_large_gradient_of_soft_labels_equals_that_of_small_batch(backend, dtype, classes):
    rows = 9_000_000 // (classes * dtype.itemsize) + 1
    student, teacher = logits(rows, classes, dtype=dtype, seed=87), logits(rows, classes, dtype=dtype, seed=88)
    options = {"reduction": "sum", "label_smoothing": 0.1}
    labels, last = probabilities(rows, classes), slice(rows - 40, rows)
    full = run(backend, student, teacher, labels=labels, **options)
    part = run(backend, student[last], teacher[last], labels=labels[last], **options)
    assert_same(backend, full["grad"][last], part["grad"])


# ---- rows: a teacher that ran on some rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("labelled", [False, True])
def test_rows_of_a_partial_teacher_match_oracle(backend, dtype, labelled):
    student = logits(11, 23, dtype=dtype, seed=53)
    rows = torch.tensor([7, -1, 0, 10, 3, -1])
    teacher = logits(6, 23, dtype=dtype, seed=54)
    teacher[[1, 5]] = NAN  # skipped entries are not read
    options = {"rows": rows, "keep": 0.5}
    if labelled:
        options["labels"] = torch.arange(11)
        options["labels"][[0, 4]] = -100
    got = check(backend, student, teacher, **options)
    assert not got["selected"][[1, 2, 5, 6, 8, 9]].any()
    check(backend, student, teacher[:0], rows=rows[:0], labels=options.get("labels"))
    if labelled:  # rows without a teacher still contribute their cross entropy
        assert (got["grad"][[1, 2]] != 0).any(dim=1).all()


def test_rows_index_the_flattened_student(backend):
    student = logits(12, 6, seed=55).view(3, 4, 6)
    check(backend, student, logits(3, 6, seed=56), rows=torch.tensor([11, 0, 5]), keep=2)


# ---- reproducibility


def test_results_are_bit_identical_for_any_thread_count(backend):
    threads = torch.get_num_threads()
    try:
        for rows, classes, dtype in ((513, 100, torch.float32), (67, 4099, torch.bfloat16), (2, 40_001, torch.float64)):
            student, teacher = logits(rows, classes, dtype=dtype, seed=57), logits(rows, classes, dtype=dtype, seed=58)
            runs = []
            for n in (1, 2, 5, 2):
                torch.set_num_threads(n)
                runs.append(run(backend, student, teacher, keep=0.4, labels=torch.arange(rows) % classes))
            for other in runs[1:]:
                for name in other:
                    assert torch.equal(other[name], runs[0][name]), (rows, classes, name)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("offset", [-1e4, -500.0, 1e3])
@pytest.mark.parametrize("keep", [0.2, 0.9])
def test_teacher_offset_does_not_leak_into_rows_without_teacher(backend, offset, keep):
    """The row that the kernel prefetches may lack a teacher although the current one has one, and vice versa."""
    student, teacher = logits(41, 10, seed=61), logits(14, 10, seed=62)
    rows = torch.arange(0, 41, 3)
    shifted = run(backend, student, teacher + offset, rows=rows, keep=keep, value="kl")
    plain = run(backend, student, (teacher + offset) - offset, rows=rows, keep=keep, value="kl")
    with torch.no_grad():
        expected = kcd_ext.reference.condensed_kd_loss(
            student, (teacher + offset) - offset, rows=rows, keep=keep, value="kl"
        )
    assert torch.equal(shifted["selected"], plain["selected"])
    for name in ("loss", "kl", "grad"):
        torch.testing.assert_close(shifted[name], plain[name], rtol=2e-5, atol=1e-7, equal_nan=True)
    torch.testing.assert_close(shifted["loss"], expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("two_pass", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_shared_by_threads_is_bit_identical(dtype, two_pass):
    """With fewer rows than threads, threads share a row; the thread that finishes it handles the rare cases."""
    threads, classes = torch.get_num_threads(), 60_003
    student, teacher = logits(4, classes, dtype=dtype, seed=59), logits(4, classes, dtype=dtype, seed=60)
    student[0, ::3], teacher[0, ::3] = torch.finfo(dtype).min, torch.finfo(dtype).min  # the sums overflow float32
    student[1, 50_000] = -INF  # an infinite divergence
    teacher[2, 30_000:] = -INF
    labels = torch.tensor([7, 59_999, 30_000, 5])
    try:
        for options in (
            {"keep": 3},
            {"keep": 1, "value": "teacher_entropy", "temperature": 1.3},
            {"labels": labels, "ignore_index": 5},
            {"labels": labels, "rows": torch.tensor([2, 0]), "reduction": "sum"},
            {"labels": labels, "label_smoothing": 0.1},
            {"labels": probabilities(4, classes), "keep": 2, "value": "cross_entropy", "label_smoothing": 0.2},
        ):
            given_teacher = teacher[[2, 0]] if "rows" in options else teacher
            runs = []
            for n in (1, 2, 7):
                torch.set_num_threads(n)
                runs.append(run("cpu_two_pass" if two_pass else "cpu", student, given_teacher, **options))
            for other in runs[1:]:
                for name in other:
                    assert torch.equal(other[name].nan_to_num(7e4), runs[0][name].nan_to_num(7e4)), (options, name)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", parameters(*BACKENDS))
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_inputs_match_oracle(backend, data):
    rows, classes = data.draw(st.integers(1, 6), label="rows"), data.draw(st.integers(1, 70), label="classes")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    finite = st.floats(-60, 60, width=16)
    special = st.sampled_from([0.0, -0.0, -INF, 1e4, -1e4, 6e-8, -6e4, -1e30, -1e36])
    cells = st.lists(st.one_of(finite, special), min_size=rows * classes, max_size=rows * classes)
    student = torch.tensor(data.draw(cells, label="student"), dtype=torch.float64).view(rows, classes).to(dtype)
    teacher = torch.tensor(data.draw(cells, label="teacher"), dtype=torch.float64).view(rows, classes).to(dtype)
    options = {
        "temperature": data.draw(st.sampled_from([1.0, 2.0, 4.0, 0.7, 11.0]), label="temperature"),
        "keep": data.draw(st.one_of(st.floats(0.01, 1.0), st.integers(1, 9)), label="keep"),
        "reduction": data.draw(st.sampled_from(["mean", "sum", "none"]), label="reduction"),
    }
    kind = data.draw(st.sampled_from(["none", "indices", "probabilities"]), label="kind of labels")
    if kind == "indices":
        label = st.one_of(st.just(-100), st.integers(0, classes - 1))
        options["labels"] = torch.tensor(data.draw(st.lists(label, min_size=rows, max_size=rows), label="labels"))
    elif kind == "probabilities":
        probability = st.one_of(st.just(0.0), st.floats(0, 1, width=16))
        drawn = data.draw(st.lists(probability, min_size=rows * classes, max_size=rows * classes), label="labels")
        options["labels"] = torch.tensor(drawn).view(rows, classes)
    if kind != "none":
        options["label_smoothing"] = data.draw(st.sampled_from([0.0, 0.1, 1.0]), label="label_smoothing")
    check(backend, student, teacher, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n in ops.build_info["instruction_sets"] if n != ops.build_info["instruction_set_in_use"]]
)
def test_other_instruction_sets_pass_this_file(name):
    """Run this file in a new process: the instruction set is chosen when the library is loaded."""
    environment = {**os.environ, "KCD_ISA": name}
    if subprocess.run([sys.executable, "-c", "import kcd_ext"], env=environment, capture_output=True).returncode:
        pytest.skip(f"this processor has no {name}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    command += ["-m", "not cuda_on_cpu and not gpu", "-k", "not reference and not other_instruction_sets"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 600
