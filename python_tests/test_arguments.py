"""Wrong arguments are refused before anything is computed, by a message that names the argument, its range and its value."""

import re
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backends import DEVICES

import kcd_ext
from kcd_ext import condensed_kd_loss, reference, select_rows

Z, Y = torch.randn(4, 6), torch.randn(4, 6)
LABELS = torch.arange(4)

CASES = [
    # options, error, pattern of the message
    (dict(temperature=0.0), ValueError, "temperature must be > 0, got 0"),
    (dict(temperature=-1), ValueError, "temperature must be > 0, got -1"),
    (dict(temperature=float("inf")), ValueError, "temperature must be finite, got inf"),
    (dict(temperature=float("nan")), ValueError, "temperature must be finite, got nan"),
    (dict(temperature="4"), TypeError, "temperature must be a number, got str '4'"),
    (dict(temperature=True), TypeError, "temperature must be a number, got bool"),
    (dict(temperature=torch.tensor(4.0)), TypeError, "temperature must be a number, got a torch.float32 tensor"),
    (dict(temperature=10**5000), ValueError, "temperature must be within the range of float32, got int"),
    (dict(temperature=1e-300), ValueError, "temperature must be in .1e-18, 1e.18., got 1e-300"),
    (dict(temperature=1e30), ValueError, "temperature must be in"),
    (dict(temperature=Fraction(1, 10**400)), ValueError, "temperature must be > 0, got 0.0"),
    (dict(temperature=np.longdouble("1e400")), ValueError, "temperature must be within the range of float32"),
    (dict(kd_weight=-(10**400)), ValueError, "kd_weight must be within the range of float32, got -1000"),
    (dict(kd_weight=1e39), ValueError, r"kd_weight must be within the range of float32, got 1e\+39"),
    (dict(ce_weight=10**400, labels=LABELS), ValueError, "ce_weight must be within the range of float32"),
    (dict(keep=-(10**5000)), ValueError, "keep must be a float in .* or an int >= 1, got int"),
    (
        dict(keep=Fraction(10**400 + 1, 10**400)),
        ValueError,
        "keep must be a float .* got Fraction.*a number of rows must be an int",
    ),
    (dict(ignore_index=10**5000), ValueError, "ignore_index must fit in int64, got int"),
    (dict(keep=0.0), ValueError, r"keep must be a float in \(0, 1\] or an int >= 1, got float 0.0$"),
    (dict(keep=-0.5), ValueError, "keep must be a float .* got float -0.5$"),
    (dict(keep=1.5), ValueError, r"keep must be a float .* got float 1.5 \(a number of rows must be an int\)"),
    (dict(keep=float("nan")), ValueError, "keep must be a float .* got float nan$"),
    (dict(keep=0), ValueError, "keep must be a float .* got int 0$"),
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
    (dict(value=torch.zeros(5)), ValueError, r"value must have one entry per row, shape \(4,\), got \(5,\)"),
    (dict(value="cross_entropy"), ValueError, "value='cross_entropy' needs labels, got labels=None"),
    (
        dict(labels=LABELS.float()),
        ValueError,
        r"labels of a floating-point dtype are probabilities .* \(4, 6\), got \(4,\)",
    ),
    (dict(labels=Y[:3]), ValueError, r"labels .* must have the shape of student_logits, \(4, 6\), got \(3, 6\)"),
    (
        dict(labels=Y.to(torch.float8_e4m3fn)),
        TypeError,
        "labels must be .* probabilities, got a torch.float8_e4m3fn tensor",
    ),
    (dict(labels=Y.to("meta")), ValueError, "labels are on meta, student_logits on cpu"),
    (dict(labels=Y.to_sparse()), TypeError, "labels must be a strided tensor, got layout torch.sparse_coo"),
    (
        dict(labels=Y.long()),
        ValueError,
        r"labels must have one class index per row, .* for one-hot labels pass labels.float\(\)",
    ),
    (dict(labels=Y.clone().requires_grad_()), ValueError, r"labels must not require grad: .* pass labels.detach\(\)"),
    (
        dict(labels=Y, ignore_index=5),
        ValueError,
        "ignore_index must be left at -100 if labels are probabilities, .* got 5",
    ),
    (dict(labels=LABELS, label_smoothing="x"), TypeError, "label_smoothing must be a number, got str 'x'"),
    (dict(labels=LABELS, label_smoothing=True), TypeError, "label_smoothing must be a number, got bool True"),
    (dict(labels=LABELS, label_smoothing=1.5), ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    (dict(labels=LABELS, label_smoothing=-0.1), ValueError, r"label_smoothing must be in \[0, 1\], got -0.1"),
    (dict(labels=LABELS, label_smoothing=float("nan")), ValueError, r"label_smoothing must be in \[0, 1\], got nan"),
    (dict(label_smoothing=0.1), ValueError, "label_smoothing=0.1 needs labels, got labels=None"),
    (
        dict(labels=LABELS, label_smoothing=0.1, ce_weight=0),
        ValueError,
        "label_smoothing must be 0 if nothing uses the cross entropy, got 0.1 with ce_weight=0",
    ),
    (dict(labels=LABELS.int()), TypeError, "labels must be an int64 tensor .* got a torch.int32 tensor"),
    (dict(labels=[0, 1, 2, 3]), TypeError, "labels must be an int64 tensor .* got list"),
    (dict(labels=LABELS[:3]), ValueError, r"labels must have one entry per row, shape \(4,\), got \(3,\)"),
    (dict(labels=LABELS[:, None]), ValueError, r"labels must have one entry per row, shape \(4,\), got \(4, 1\)"),
    (dict(labels=LABELS.to("meta")), ValueError, "labels is on meta, student_logits on cpu"),
    (dict(ce_weight=0.1), ValueError, "ce_weight=0.1 needs labels, got labels=None"),
    (dict(kd_weight=float("nan")), ValueError, "kd_weight must be finite, got nan"),
    (dict(kd_weight="1"), TypeError, "kd_weight must be a number, got str '1'"),
    (dict(ce_weight=None, kd_weight=[1]), TypeError, "kd_weight must be a number, got list"),
    (dict(row_weight=torch.ones(3)), ValueError, r"row_weight must have one entry per row, shape \(4,\), got \(3,\)"),
    (
        dict(row_weight=torch.ones(4, dtype=torch.int64)),
        TypeError,
        "row_weight must be a floating-point or bool tensor",
    ),
    (
        dict(row_weight=torch.ones(5, dtype=torch.bool)),
        ValueError,
        r"row_weight must have one entry per row, shape \(4,\), got \(5,\)",
    ),
    (
        dict(rows=torch.arange(3)),
        ValueError,
        r"teacher_logits must have shape \(3, 6\), one row per entry of rows, got \(4, 6\)",
    ),
    (dict(rows=torch.arange(4)[None]), ValueError, r"rows must have one dimension, got shape \(1, 4\)"),
    (dict(rows=torch.arange(4).int()), TypeError, "rows must be an int64 tensor"),
    (dict(rows=[0, 1, 2, 3]), TypeError, r"rows must be an int64 tensor \(m,\), got list"),
    (dict(class_dim=True), TypeError, "class_dim must be an int or None, got bool True"),
    (dict(class_dim=1.0), TypeError, "class_dim must be an int or None, got float 1.0"),
    (dict(class_dim=2), ValueError, r"class_dim must be in \[-2, 2\) for student_logits of shape \(4, 6\), got 2"),
    (dict(class_dim=-3), ValueError, "class_dim must be in"),
    (
        dict(labels=torch.arange(6) % 4),
        ValueError,
        r"labels must have one entry per row, shape \(4,\), got \(6,\): the classes of student_logits \(4, 6\) are read from the "
        "last dimension; if they are in dimension 0, pass class_dim=0",
    ),
    (dict(row_weight=torch.ones(6)), ValueError, "pass class_dim=0"),
    (
        dict(value=torch.ones(4), class_dim=0),
        ValueError,
        "are read from dimension 0; if they are in dimension 1, pass class_dim=1",
    ),
    (dict(reduction=torch.zeros(3)), TypeError, "reduction must be one of mean, sum, none, got a torch.float32 tensor"),
    (dict(reduction="avg"), ValueError, "reduction must be one of mean, sum, none, got 'avg'"),
    (dict(ignore_index=1.0), TypeError, "ignore_index must be an int, got float 1.0"),
    (dict(ignore_index=2**70), ValueError, "ignore_index must fit in int64, got 1180591620717411303424"),
    (dict(group="world"), (ValueError, TypeError), "group"),
    (
        dict(labels=torch.tensor([0, 6, 1, 2])),
        IndexError,
        r"labels\[1\] is 6: it must be in \[0, 6\) or be ignore_index -100",
    ),
    (dict(labels=torch.tensor([0, 1, -1, 2])), IndexError, r"labels\[2\] is -1"),
    (dict(rows=torch.tensor([0, 1, 4, 2])), IndexError, r"rows\[2\] is 4: it must be in \[0, 4\), or be -1"),
    (dict(rows=torch.tensor([0, 1, -2, 2])), IndexError, r"rows\[2\] is -2"),
    (dict(rows=torch.tensor([0, 1, 1, 2])), ValueError, "rows names row 1 more than once"),
]


@pytest.mark.parametrize("function", [condensed_kd_loss, reference.condensed_kd_loss], ids=["fused", "reference"])
@pytest.mark.parametrize("options, error, message", CASES, ids=[str(case[2]) for case in CASES])
def test_wrong_option_is_refused_with_its_name(function, options, error, message):
    with pytest.raises(error, match=message):
        function(Z, Y, **options)


LOGITS = [
    (Z.long(), Y, TypeError, "student_logits must be float32, float64, float16 or bfloat16, got torch.int64"),
    (Z, Y.int(), TypeError, "teacher_logits must be float32, .* got torch.int32"),
    (Z.numpy(), Y, TypeError, "student_logits must be a tensor of logits .* got a float32 array of shape"),
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
def test_wrong_logits_are_refused_with_their_name(function, student, teacher, error, message):
    with pytest.raises(error, match=message):
        function(student, teacher)


def test_unsupported_device_names_the_reference():
    meta = torch.empty(3, 4, device="meta")
    for function in (lambda: condensed_kd_loss(meta, meta), lambda: select_rows(meta, keep=1)):
        with pytest.raises(ValueError, match=r"logits on meta: use kcd_ext\.reference"):
            function()


@pytest.mark.parametrize("keep", [np.float64(0.5), np.float32(0.5), np.int64(2), 2])
def test_numpy_keep_and_temperature_equal_python_numbers(keep):
    temperature = np.float32(2.0)
    assert condensed_kd_loss(Z, Y, keep=keep, temperature=temperature).equal(
        condensed_kd_loss(Z, Y, keep=2, temperature=2.0)
    )


def test_select_rows_refuses_values_that_need_a_teacher():
    for value in ("kl", "teacher_entropy"):
        with pytest.raises(ValueError, match=f"value must not need the teacher in select_rows, .* got '{value}'"):
            select_rows(Z, keep=0.5, value=value)
    with pytest.raises(ValueError, match="keep must be a float"):
        select_rows(Z, keep=2.0)


def test_module_checks_options_in_constructor():
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


def test_raw_operators_refuse_arguments_that_read_out_of_bounds():
    ops = torch.ops.kcd_ext
    options = dict(temperature=4.0, kd=1.0, ce=0.0, smoothing=0.0, ignore=-100, reduction=0, ranks=1.0)
    inputs = dict(student=Z, teacher=Y, labels=ABSENT, score=ABSENT, row_weight=ABSENT, rows=ABSENT)
    one = torch.tensor(3.0)
    refused(
        ops.condensed_kd,
        {**inputs, **dict(fraction=1.0, count=0, value=0), **options, **dict(with_gradient=True)},
        [
            (dict(teacher=Y[:3]), "same number of rows"),
            (dict(teacher=Y[:, :5]), "same number of classes"),
            (dict(teacher=ABSENT), "teacher logits are missing"),
            (dict(student=Z.t()), "classes of a row must be contiguous"),
            (dict(student=Z.int()), "float32, float64"),
            (dict(labels=LABELS[:2]), "labels must be int64"),
            (dict(labels=LABELS.int()), "labels must be int64"),
            (dict(labels=torch.tensor(3).expand(4)), "labels must be int64"),
            (dict(value=9), "value must be"),
            (dict(reduction=7), "reduction must be"),
            (dict(reduction=2), "with_gradient needs reduction mean or sum"),
            (dict(score=torch.ones(4)), "a score must be passed with value 4"),
            (dict(value=4, score=torch.ones(3)), "score must be contiguous in the accumulator"),
            (dict(value=4, score=one.expand(4)), "score must be contiguous in the accumulator"),
            (dict(row_weight=torch.ones(3)), "row_weight must be"),
            (dict(row_weight=one.expand(4)), "row_weight must be"),
            (dict(rows=torch.arange(3)), "rows must be int64"),
            (dict(rows=torch.arange(8)[::2]), "rows must be int64"),
            (dict(temperature=0.0), "temperature must be > 0"),
            (dict(temperature=float("inf")), "temperature must be > 0 and finite"),
            (dict(ce=1.0), "ce_weight needs labels"),
            (dict(labels=Y[:3]), "labels that are probabilities must have the student's rows and classes"),
            (dict(labels=Y[:, :5]), "labels that are probabilities must have the student's rows and classes"),
            (dict(labels=Y.t().contiguous().t()), "classes of a row must be contiguous"),
            (dict(smoothing=0.1), "label_smoothing needs labels"),
            (dict(labels=LABELS, smoothing=1.5), "label_smoothing must be in .0, 1., got 1.5"),
            (dict(labels=LABELS, smoothing=float("nan")), "label_smoothing must be in .0, 1., got nan"),
            (dict(fraction=2.0), "keep_fraction must be in .0, 1., got 2"),
            (dict(fraction=float("nan")), "keep_fraction must be in .0, 1., got nan"),
            (dict(count=-1), "keep_count must be >= 0, got -1"),
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
    _, state, _ = ops.condensed_kd(*inputs.values(), 0.5, 0, 0, *options.values(), False)
    row = condensed_kd_loss(Z, Y, keep=0.5, return_knowledge=True)[1].selected.nonzero()[:1, 0]
    backward = dict(
        grad=torch.tensor(1.0), student=Z, teacher=Y, labels=ABSENT, row_weight=ABSENT, rows=ABSENT, state=state
    )
    refused(
        ops.condensed_kd_backward,
        {**backward, **options},
        [
            (dict(teacher=ABSENT), "teacher logits are missing"),
            (dict(teacher=Y[:1], rows=(row + 1) % 4), "every selected row must have a teacher row"),
            (dict(grad=torch.ones(3)), "grad_output must be"),
            (dict(grad=one.expand(4)), "grad_output must be"),
            (dict(state=state[:-1]), "must come from the forward pass"),
            (dict(state=state.repeat(2)[::2]), "must come from the forward pass"),
            (dict(state=state.view(torch.bool)), "must come from the forward pass"),
            (dict(state=torch.cat((state[:1], state))[1:]), "must be aligned"),
        ],
    )


def test_raw_operators_refuse_state_size_that_overflows():
    """A state has 16 bytes plus 33 per row; this number of rows overflows to 33 bytes in total."""
    rows = 2**64 // 33 + 1
    student, state, options = (
        Z[:1].expand(rows, -1),
        torch.zeros(33, dtype=torch.uint8),
        (4.0, 1.0, 0.0, 0.0, -100, 0, 1.0),
    )
    with pytest.raises(ValueError, match="fewer than 2\\^56 rows"):
        torch.ops.kcd_ext.reduce_rows(student, ABSENT, ABSENT, state, torch.empty(0), *options)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8])
def test_numpy_weights_equal_python_numbers(dtype):
    options = {"temperature": 2, "kd_weight": 3, "ce_weight": -1}
    got = condensed_kd_loss(Z, Y, labels=LABELS, **{name: dtype(x) for name, x in options.items()})
    assert got.equal(condensed_kd_loss(Z, Y, labels=LABELS, **options))


def test_numpy_keep_and_ignore_index_equal_python_numbers():
    labels = torch.tensor([0, 1, 2, 3])
    got = condensed_kd_loss(Z, Y, labels=labels, keep=np.int64(2), ignore_index=np.int64(3))
    assert got.equal(condensed_kd_loss(Z, Y, labels=labels, keep=2, ignore_index=3))


LONG = "x" * 100_000


@pytest.mark.parametrize(
    "argument",
    [
        "temperature",
        "keep",
        "value",
        "labels",
        "kd_weight",
        "ce_weight",
        "row_weight",
        "rows",
        "ignore_index",
        "reduction",
        "group",
        "class_dim",
        "student_logits",
        "teacher_logits",
    ],
)
@pytest.mark.parametrize(
    "bad",
    [
        list(range(10_000)),
        dict.fromkeys(range(10_000)),
        LONG,
        np.arange(10_000),
        torch.arange(10_000.0),
        10**100_000,
        (1.5,) * 10_000,
        object(),
    ],
    ids=lambda bad: type(bad).__name__,
)
def test_message_never_prints_a_long_value(argument, bad):
    for function in (condensed_kd_loss, reference.condensed_kd_loss):
        arguments = {"student_logits": Z, "teacher_logits": Y, argument: bad}
        if argument == "keep" and isinstance(bad, int):
            continue  # a valid number of rows
        with pytest.raises((TypeError, ValueError)) as raised:
            function(**arguments)
        assert argument in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize("device", DEVICES)
def test_class_dim_equals_pytorch_formulas(device):
    """Compares segmentation maps, sequences and volumes with PyTorch's formulas in float64."""
    generator = torch.Generator().manual_seed(0)
    for shape, dim in (
        ((2, 5, 3, 4), 1),
        ((3, 7, 6), 1),
        ((2, 5, 2, 3, 2), -4),
        ((6, 9), 0),
        ((2, 3, 4, 5), -1),
        ((4, 1, 3), 0),
    ):
        z, y = ((3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device) for _ in range(2))
        d = dim % len(shape)
        rows = shape[:d] + shape[d + 1 :]
        labels = torch.randint(-1, shape[d], rows, generator=generator).to(device)
        weight = torch.rand(rows, generator=generator, dtype=torch.float64).to(device)
        p = F.softmax(y / 2, d)
        kl = (p * (F.log_softmax(y / 2, d) - F.log_softmax(z / 2, d))).sum(d)
        ce = F.cross_entropy(z.movedim(d, 1) if d else z.movedim(0, 1), labels, ignore_index=-1)
        valid = labels != -1
        expected = 0.1 * ce + 0.9 * 4 * (weight * kl)[valid].mean()
        for layout in (torch.contiguous_format, torch.channels_last) if len(shape) == 4 else (torch.contiguous_format,):
            options = dict(class_dim=dim, labels=labels, ignore_index=-1, temperature=2, row_weight=weight)
            gradients = []
            for function in (condensed_kd_loss, reference.condensed_kd_loss):
                leaf = z.clone(memory_format=layout).requires_grad_()
                loss, knowledge = function(leaf, y.to(memory_format=layout), return_knowledge=True, **options)
                gradients += torch.autograd.grad(loss, leaf)
                assert torch.allclose(loss, expected) and knowledge.kl.shape == rows
                assert torch.allclose(knowledge.kl[valid], kl[valid]) and knowledge.kl[~valid].isnan().all()
            assert gradients[0].shape == shape and torch.allclose(*gradients)
            module = kcd_ext.CondensedKDLoss(class_dim=dim, ignore_index=-1, temperature=2)
            assert torch.allclose(module(z, y, labels=labels, row_weight=weight), expected)
            index, chosen = select_rows(z, keep=2, class_dim=dim, labels=labels, ignore_index=-1)
            teacher = y.movedim(d, -1).flatten(0, -2)[index]
            some = condensed_kd_loss(z, teacher, rows=index, class_dim=dim, temperature=2)
            assert torch.allclose(some, 4 * kl.flatten()[index].mean()) and chosen.selected.shape == rows
    logits = torch.randn(2, 5, 3, 3, device=device).to(memory_format=torch.channels_last)
    student = (logits * 1).requires_grad_()
    output = student * 1
    # In this layout the classes are adjacent, so that the gradient can be written in place.
    condensed_kd_loss(output, logits, class_dim=1, inplace=True).backward()
    expected = student.grad.clone()
    assert torch.allclose(output, expected)


@pytest.mark.parametrize("function", [condensed_kd_loss, reference.condensed_kd_loss], ids=["fused", "reference"])
def test_ambiguous_class_dimension_warns_at_the_callers_line(function):
    z = torch.randn(2, 8, 8, 8)
    for options in ({}, {"labels": torch.zeros(2, 8, 8, dtype=torch.int64)}, {"keep": 0.5, "return_knowledge": True}):
        with pytest.warns(UserWarning, match="pass class_dim=1 for .* class_dim=-1") as caught:
            function(z, z, **options)
        assert [w.filename for w in caught] == [__file__]  # the caller's line
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        criterion = kcd_ext.CondensedKDLoss()
        for _ in range(2):
            criterion(z, z)  # once per line
        criterion.forward(z, z)
    assert [w.filename for w in caught] == [__file__] * 2
    with pytest.warns(UserWarning, match=r"have one class, .* torch.cat\(\(torch.zeros_like\(z\), z\), 3\)"):
        assert function(z[..., :1], z[..., :1], class_dim=-1) == 0
    with pytest.warns(UserWarning, match="one class"):
        function(z[0, 0, :1], z[0, 0, :1], class_dim=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dim in (-1, 1, 3):
            function(z, z, class_dim=dim)
        function(z[0], z[0])
    with pytest.raises(ValueError, match="if they are in dimension 1, pass class_dim=1"):
        function(z[:, :5, 0], z[0, 0, :3, :5], rows=torch.arange(3))
    with pytest.raises(ValueError, match=re.escape("slice them, as in logits[:, :6]")):
        function(z, z[:, :6], class_dim=1)
    with pytest.warns(UserWarning, match="class_dim=1"):
        select_rows(z, keep=1)
