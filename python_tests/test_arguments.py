"""Wrong arguments: refused before anything is computed, in words that name the argument, what it got and what it takes."""

import numpy as np
import pytest
import torch

import kcd_ext
from kcd_ext import condensed_kd_loss, reference, select_rows

Z, Y = torch.randn(4, 6), torch.randn(4, 6)
LABELS = torch.arange(4)

CASES = [
    # options, error, what the message must name
    (dict(temperature=0.0), ValueError, "temperature must be > 0, got 0"),
    (dict(temperature=-1), ValueError, "temperature must be > 0, got -1"),
    (dict(temperature=float("inf")), ValueError, "temperature must be finite, got inf"),
    (dict(temperature=float("nan")), ValueError, "temperature must be finite, got nan"),
    (dict(temperature="4"), TypeError, "temperature must be a number, got str '4'"),
    (dict(temperature=True), TypeError, "temperature must be a number, got bool"),
    (dict(temperature=torch.tensor(4.0)), TypeError, "temperature must be a number, got a torch.float32 tensor"),
    (dict(keep=0.0), ValueError, r"keep as a fraction must lie in \(0, 1\], got 0.0"),
    (dict(keep=-0.5), ValueError, r"keep as a fraction must lie in \(0, 1\], got -0.5"),
    (dict(keep=1.5), ValueError, r"keep as a fraction must lie in \(0, 1\], got 1.5"),
    (dict(keep=float("nan")), ValueError, r"keep as a fraction must lie in \(0, 1\], got nan"),
    (dict(keep=0), ValueError, "keep as a number of rows must be >= 1, got 0"),
    (dict(keep=True), TypeError, "keep must be a float .* got bool True"),
    (dict(keep=np.bool_(True)), TypeError, "keep must be a float"),
    (dict(keep="0.7"), TypeError, "keep must be a float .* got str '0.7'"),
    (
        dict(value="surprise"),
        ValueError,
        "value must be one of entropy, teacher_entropy, kl, cross_entropy .* got 'surprise'",
    ),
    (dict(value=3), TypeError, "value must be a name or a floating-point tensor .* got int 3"),
    (dict(value=torch.zeros(4, dtype=torch.int64)), TypeError, "value must be .* got a torch.int64 tensor"),
    (dict(value=torch.zeros(5)), ValueError, r"value must have one entry a row, shape \(4,\), got \(5,\)"),
    (dict(value="cross_entropy"), ValueError, "value='cross_entropy' needs labels, got labels=None"),
    (dict(labels=LABELS.float()), TypeError, "labels must be an int64 tensor .* got a torch.float32 tensor"),
    (dict(labels=LABELS.int()), TypeError, "labels must be an int64 tensor .* got a torch.int32 tensor"),
    (dict(labels=[0, 1, 2, 3]), TypeError, "labels must be an int64 tensor .* got list"),
    (dict(labels=LABELS[:3]), ValueError, r"labels must have one entry a row, shape \(4,\), got \(3,\)"),
    (dict(labels=LABELS[:, None]), ValueError, r"labels must have one entry a row, shape \(4,\), got \(4, 1\)"),
    (dict(labels=LABELS.to("meta")), ValueError, "labels is on meta, student_logits on cpu"),
    (dict(ce_weight=0.1), ValueError, "ce_weight=0.1 needs labels, got labels=None"),
    (dict(kd_weight=float("nan")), ValueError, "kd_weight must be finite, got nan"),
    (dict(kd_weight="1"), TypeError, "kd_weight must be a number, got str '1'"),
    (dict(ce_weight=None, kd_weight=[1]), TypeError, "kd_weight must be a number, got list"),
    (dict(row_weight=torch.ones(3)), ValueError, r"row_weight must have one entry a row, shape \(4,\), got \(3,\)"),
    (
        dict(row_weight=torch.ones(4, dtype=torch.int64)),
        TypeError,
        "row_weight must be a floating-point or bool tensor",
    ),
    (
        dict(row_weight=torch.ones(5, dtype=torch.bool)),
        ValueError,
        r"row_weight must have one entry a row, shape \(4,\), got \(5,\)",
    ),
    (
        dict(rows=torch.arange(3)),
        ValueError,
        r"teacher_logits must be \(3, 6\), one row for each entry of rows, got \(4, 6\)",
    ),
    (dict(rows=torch.arange(4)[None]), ValueError, r"rows must have one dimension, got shape \(1, 4\)"),
    (dict(rows=torch.arange(4).int()), TypeError, "rows must be an int64 tensor"),
    (dict(rows=[0, 1, 2, 3]), TypeError, r"rows must be an int64 tensor \(m,\), got list"),
    (dict(reduction="avg"), ValueError, "reduction must be one of mean, sum, none, got 'avg'"),
    (dict(ignore_index=1.0), TypeError, "ignore_index must be an int, got float 1.0"),
    (dict(ignore_index=2**70), ValueError, "ignore_index must fit an int64 label, got 1180591620717411303424"),
    (dict(group="world"), (ValueError, TypeError), "group"),
    (
        dict(labels=torch.tensor([0, 6, 1, 2])),
        IndexError,
        r"labels\[1\] is 6: it must lie in \[0, 6\) or be ignore_index -100",
    ),
    (dict(labels=torch.tensor([0, 1, -1, 2])), IndexError, r"labels\[2\] is -1"),
    (dict(rows=torch.tensor([0, 1, 4, 2])), IndexError, r"rows\[2\] is 4: it must lie in \[0, 4\), or be -1"),
    (dict(rows=torch.tensor([0, 1, -2, 2])), IndexError, r"rows\[2\] is -2"),
    (dict(rows=torch.tensor([0, 1, 1, 2])), ValueError, "rows names row 1 more than once"),
]


@pytest.mark.parametrize("function", [condensed_kd_loss, reference.condensed_kd_loss], ids=["fused", "reference"])
@pytest.mark.parametrize("options, error, message", CASES, ids=[str(case[2]) for case in CASES])
def test_refused_options(function, options, error, message):
    with pytest.raises(error, match=message):
        function(Z, Y, **options)


LOGITS = [
    (Z.long(), Y, TypeError, "student_logits must be float32, float64, float16 or bfloat16, got torch.int64"),
    (Z, Y.int(), TypeError, "teacher_logits must be float32, .* got torch.int32"),
    (Z.numpy(), Y, TypeError, "student_logits must be a tensor of logits .* got ndarray"),
    (Z, None, TypeError, "teacher_logits must be a tensor of logits .* got NoneType"),
    (Z.to_sparse(), Y, TypeError, "student_logits must be a strided tensor, got layout torch.sparse_coo"),
    (torch.tensor(1.0), Y, ValueError, r"student_logits must have shape \(..., classes\) .* got \(\)"),
    (Z[:, :0], Y[:, :0], ValueError, r"at least one class, got \(4, 0\)"),
    (Z, Y[:3], ValueError, r"teacher_logits must have the shape of student_logits, \(4, 6\), got \(3, 6\)"),
    (
        Z,
        torch.randn(4, 8),
        ValueError,
        r"teacher_logits have 8 classes, student_logits 6: .* slice them, as in logits\[..., :6\]",
    ),
    (Z, Y.to("meta"), ValueError, "teacher_logits are on meta, student_logits on cpu"),
]


@pytest.mark.parametrize("function", [condensed_kd_loss, reference.condensed_kd_loss], ids=["fused", "reference"])
@pytest.mark.parametrize("student, teacher, error, message", LOGITS, ids=[case[3] for case in LOGITS])
def test_refused_logits(function, student, teacher, error, message):
    with pytest.raises(error, match=message):
        function(student, teacher)


def test_other_devices_are_sent_to_the_reference():
    meta = torch.empty(3, 4, device="meta")
    for function in (lambda: condensed_kd_loss(meta, meta), lambda: select_rows(meta, keep=1)):
        with pytest.raises(ValueError, match=r"logits on meta: use kcd_ext\.reference"):
            function()


@pytest.mark.parametrize("keep", [np.float64(0.5), np.float32(0.5), np.int64(2), 2])
def test_numbers_of_numpy(keep):
    temperature = np.float32(2.0)
    assert condensed_kd_loss(Z, Y, keep=keep, temperature=temperature).equal(
        condensed_kd_loss(Z, Y, keep=2, temperature=2.0)
    )


def test_select_rows_refuses_what_needs_a_teacher():
    for value in ("kl", "teacher_entropy"):
        with pytest.raises(ValueError, match=f"value='{value}' needs the teacher's logits"):
            select_rows(Z, keep=0.5, value=value)
    with pytest.raises(ValueError, match="keep as a fraction"):
        select_rows(Z, keep=2.0)


def test_the_module_checks_its_options_when_it_is_made():
    for options, message in (
        (dict(temperature=0), "temperature"),
        (dict(keep=2.0), "keep"),
        (dict(value="x"), "value"),
        (dict(reduction="x"), "reduction"),
        (dict(kd_weight=float("nan")), "kd_weight"),
    ):
        with pytest.raises(ValueError, match=message):
            kcd_ext.CondensedKDLoss(**options)


def refused(operator, good: dict, cases: list[tuple[dict, str]]) -> None:
    operator(*good.values())
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            operator(*{**good, **changes}.values())


ABSENT = torch.empty(0, dtype=torch.bool)


def test_the_raw_operators_refuse_what_would_read_out_of_bounds():
    ops = torch.ops.kcd_ext
    options = dict(temperature=4.0, kd=1.0, ce=0.0, ignore=-100, reduction=0, ranks=1.0)
    inputs = dict(student=Z, teacher=Y, labels=ABSENT, score=ABSENT, row_weight=ABSENT, rows=ABSENT)
    one = torch.tensor(3.0)
    refused(
        ops.condensed_kd,
        {**inputs, **dict(fraction=1.0, count=0, value=0), **options},
        [
            (dict(teacher=Y[:3]), "same number of rows"),
            (dict(teacher=Y[:, :5]), "same number of classes"),
            (dict(teacher=ABSENT), "teacher logits are missing"),
            (dict(student=Z.t()), "side by side"),
            (dict(student=Z.int()), "float32, float64"),
            (dict(labels=LABELS[:2]), "labels must be int64"),
            (dict(labels=LABELS.int()), "labels must be int64"),
            (dict(labels=torch.tensor(3).expand(4)), "labels must be int64"),
            (dict(value=9), "value must be"),
            (dict(reduction=7), "reduction must be"),
            (dict(score=torch.ones(4)), "a score goes with value 4"),
            (dict(value=4, score=torch.ones(3)), "score must be float32"),
            (dict(value=4, score=one.expand(4)), "score must be float32"),
            (dict(row_weight=torch.ones(3)), "row_weight must be"),
            (dict(row_weight=one.expand(4)), "row_weight must be"),
            (dict(rows=torch.arange(3)), "rows must be int64"),
            (dict(rows=torch.arange(8)[::2]), "rows must be int64"),
            (dict(temperature=0.0), "temperature must be > 0"),
            (dict(temperature=float("inf")), "temperature must be > 0 and finite"),
            (dict(ce=1.0), "ce_weight needs labels"),
            (dict(fraction=2.0), "keep_fraction must lie in"),
            (dict(fraction=float("nan")), "keep_fraction must lie in"),
            (dict(count=-1), "keep_fraction must lie in"),
        ],
    )
    score = torch.arange(10.0)
    refused(
        ops.select_topk,
        dict(value=score, candidate=score > 2, fraction=0.5, count=0),
        [
            (dict(value=torch.arange(20.0)[::2]), "value must be contiguous"),
            (dict(value=score.half()), "value must be contiguous"),
            (dict(candidate=(score > 2)[:4]), "candidate must be"),
            (dict(fraction=2.0), "keep_fraction"),
        ],
    )
    _, _, stats, selected, counts = ops.condensed_kd_forward(*inputs.values(), 0.5, 0, 0, *options.values())
    row = selected.nonzero()[:1, 0]
    backward = dict(
        grad=torch.tensor(1.0), student=Z, teacher=Y, labels=ABSENT, row_weight=ABSENT, rows=ABSENT, selected=selected,
        stats=stats, counts=counts,
    )  # fmt: skip
    refused(
        ops.condensed_kd_gradient,
        {**backward, **options},
        [
            (dict(teacher=ABSENT), "teacher logits are missing"),
            (dict(teacher=Y[:1], rows=(row + 1) % 4), "selected names a row that the teacher does not hold"),
            (dict(grad=torch.ones(3)), "grad_output must be"),
            (dict(grad=one.expand(4)), "grad_output must be"),
            (dict(stats=stats[:5]), "must come from the forward pass"),
            (dict(stats=stats.t()), "must come from the forward pass"),
            (dict(counts=counts[:1]), "must come from the forward pass"),
            (dict(selected=selected[:2]), "must come from the forward pass"),
        ],
    )


def test_the_keep_and_the_ignored_label_of_numpy():
    labels = torch.tensor([0, 1, 2, 3])
    got = condensed_kd_loss(Z, Y, labels=labels, keep=np.int64(2), ignore_index=np.int64(3))
    assert got.equal(condensed_kd_loss(Z, Y, labels=labels, keep=2, ignore_index=3))
