"""The CUDA operators where they differ from the CPU's: launch shapes, unchecked indices, and the operators of a process group.

The CUDA kernels run on the CPU.
"""

import math
from contextlib import nullcontext

import oracle
import pytest
import torch
from backends import copy_to_device, parameters, run
from simt import operators
from test_conformance import logits

import kcd_ext
from kcd_ext import ops

ABSENT = torch.empty(0, dtype=torch.bool)
NAN = math.nan


@pytest.fixture(params=parameters("simt", "cuda"))
def backend(request):
    return request.param


def in_place(backend):
    """Return a context in which kcd_ext uses the CUDA operators, and the device of their tensors."""
    return (operators.in_place(), "cpu") if backend == "simt" else (nullcontext(), "cuda")


@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize("threads", [64, 256])
@pytest.mark.parametrize("num_sms", [1, 3, 132])
def test_simt_results_are_correct_on_devices_of_any_size(num_sms, threads):
    """The device decides how rows map to threads and blocks, but not the results."""
    for rows, classes, dtype, teacher_dtype in (
        (2, 20_011, torch.float32, torch.float32),
        (1, 70_001, torch.bfloat16, torch.bfloat16),
        (3, 9_001, torch.float16, torch.float32),
        (2, 5_003, torch.float64, torch.bfloat16),
        (61, 130, torch.float32, torch.bfloat16),
        (17, 1_000, torch.bfloat16, torch.float64),
        (300, 3, torch.float32, torch.float32),
    ):
        student = logits(rows, classes, dtype=dtype, seed=1, scale=3)
        teacher = logits(rows, classes, dtype=teacher_dtype, seed=2, scale=3)
        options = {"keep": 0.6, "labels": torch.arange(rows) % classes, "value": "teacher_entropy"}
        options["labels"][rows // 2] = -100
        got = run("simt", student, teacher, machine=(num_sms, threads), **options)
        oracle.check(got, oracle.expected(student, teacher, got, **options))


def test_simt_rows_of_any_alignment_are_correct(backend):
    """Student and teacher have different offsets from a 16-byte boundary, so vectors are assembled from two."""
    for dtype, teacher_dtype in ((torch.bfloat16,) * 2, (torch.float32,) * 2, (torch.float16, torch.float32)):
        student, teacher = logits(4, 997, dtype=dtype, seed=3), logits(4, 997, dtype=teacher_dtype, seed=4)
        for shift in range(8):
            parts = student[:, shift : shift + 900], teacher[:, 7 - shift : 907 - shift]
            for options in ({}, {"inplace": True}):
                got = run(backend, *parts, keep=0.5, labels=torch.arange(4), **options)
                oracle.check(got, oracle.expected(*parts, got, keep=0.5, labels=torch.arange(4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [10, 3000])
def test_simt_labels_and_rows_out_of_range_give_nan(backend, dtype, classes):
    """Rejecting them would need a device synchronisation. Results that depend on them are NaN; the others are correct."""
    student, teacher = logits(6, classes, dtype=dtype, seed=5), logits(6, classes, dtype=dtype, seed=6)
    labels = torch.arange(6)
    labels[1], labels[4] = classes, -7
    good = torch.tensor([0, 2, 3, 5])
    for value in ("entropy", "cross_entropy"):
        got = run(backend, student, teacher, labels=labels, value=value, keep=1, reduction="none")
        want = run(backend, student, teacher, labels=torch.arange(6), value=value, keep=1.0, reduction="none")
        assert got["loss"][[1, 4]].isnan().all() and got["loss"][good].isfinite().all()
        assert got["grad"][[1, 4]].isnan().all() and got["grad"][good].isfinite().all()
        assert torch.equal(got["entropy"], want["entropy"]) and torch.equal(got["kl"], want["kl"])
        if value == "cross_entropy":
            assert got["value"][[1, 4]].isnan().all() and got["selected"][1]

    rows = torch.tensor([2, 99, 5, 2, -1, -50])  # 2 occurs twice; 99 and -50 are out of range
    got = run(backend, student, teacher, rows=rows, keep=1)
    assert got["selected"].tolist() == [False, False, True, False, False, False]
    assert got["loss"].isnan() and got["kl"][2].isnan() and got["grad"][2].isnan().all()
    assert (got["grad"][[0, 1, 3, 4, 5]] == 0).all()
    assert got["value"][5].isfinite() and got["value"][[0, 1, 3, 4]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reduction, label_smoothing, soft", [(0, 0.0, False), (1, 0.2, False), (2, 0.1, True)])
def test_simt_operators_of_a_process_group_match_the_cpu(backend, dtype, reduction, label_smoothing, soft):
    """Compare row_stats, select_topk and reduce_rows with the CPU's, and the gradient from the counts of all ranks."""
    student, teacher = logits(5000, 11, dtype=dtype, seed=7), logits(5000, 11, dtype=dtype, seed=8)
    labels = torch.arange(5000) % 11
    labels[::7] = -100
    if soft:
        labels = logits(5000, 11, seed=10).softmax(-1)
    weight = torch.rand(5000, dtype=dtype, generator=torch.Generator().manual_seed(9))
    given = (student, teacher, labels, weight, torch.tensor([4000, 9000]), ABSENT)
    options = (3.0, 0.7, 0.4, label_smoothing, -100, reduction, 2.0)

    def results(device):
        student, teacher, labels, weight, counts, absent = (copy_to_device(x, device) for x in given)
        state, cross_entropy, candidate = ops.row_stats(
            student, teacher, labels, absent, absent, options[0], 2, -100, options[3]
        )
        rows = ops.unpack_state(state, student, dtype)
        selected = ops.select_topk(rows.value, candidate, 0.3, 0)
        state = ops.with_selection(state, counts, selected)
        loss = ops.reduce_rows(student, labels, weight, state, cross_entropy, *options)
        one = torch.ones_like(loss)
        grad = ops.condensed_kd_backward(one, student, teacher, labels, weight, absent, state, *options)
        more = {"cross_entropy": cross_entropy, "candidate": candidate, "loss": loss, "grad": grad}
        return {**rows._asdict(), "selected": selected, **more}

    want = results("cpu")
    context, device = in_place(backend)
    with context:
        got = {name: x.cpu() for name, x in results(device).items()}
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=2e-5, atol=1e-6, equal_nan=True, msg=name)
    for name in ("candidate", "selected"):
        assert torch.equal(got[name], want[name])


def test_simt_select_rows_matches_the_cpu(backend):
    student, labels = logits(40, 100, seed=10), torch.arange(40)
    labels[:30:3] = -100
    want_index, want = kcd_ext.select_rows(student, keep=0.5, labels=labels)
    context, device = in_place(backend)
    with context:
        index, knowledge = kcd_ext.select_rows(student.to(device), keep=0.5, labels=labels.to(device))
    assert torch.equal(index.cpu(), want_index) and torch.equal(knowledge.selected.cpu(), want.selected)
    torch.testing.assert_close(knowledge.entropy.cpu(), want.entropy, equal_nan=True)


def test_simt_rejects_mismatched_rows_before_launching(backend):
    context, device = in_place(backend)
    student = logits(4, 6, seed=11).to(device)
    with context, pytest.raises(ValueError, match="same number of rows"):
        ops.condensed_kd(student, student[:2], *(ABSENT,) * 4, 0.5, 0, 0, 4.0, 1.0, 0.0, 0.0, -100, 0, 1.0, False)


@pytest.mark.cuda_on_cpu
def test_driver_older_than_the_compiler_gives_an_error_naming_both():
    problem = operators.module().version_problem
    for driver, runtime in ((13000, 13000), (13010, 13000), (13000, 13020), (14000, 13000), (12000, 12080)):
        assert problem(driver, runtime) == ""
    assert problem(12080, 13000) == (
        "kcd_ext was built with CUDA 13.0, but the driver is for CUDA 12.8: install a driver for CUDA 13, or build kcd_ext"
        " with the nvcc of an older CUDA"
    )
    assert "built with CUDA 12.9, but no NVIDIA driver was found: install" in problem(0, 12090)
