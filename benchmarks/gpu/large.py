"""Section large: logits with offsets beyond 2³¹ elements, some rows of which must give the same results as in a small call."""

import sys
from collections.abc import Callable

import torch
from harness.inputs import Produced
from harness.machine import write_json
from torch import Tensor

import kcd_ext

from .process import UNAVAILABLE, section_options

LIMIT = 2**31
ROOM = 1.1  # factor on the counted memory, for statistics and torch's allocator


def logits(rows: int, classes: int, dtype: torch.dtype, *, stride: int | None = None) -> Tensor:
    """Return random logits (rows, classes). With a stride between rows, in elements, the gaps stay uninitialised."""
    if stride is None:
        return torch.empty(rows, classes, dtype=dtype, device="cuda").normal_()
    memory = torch.empty((rows - 1) * stride + classes, dtype=dtype, device="cuda")
    return memory.as_strided((rows, classes), (stride, 1)).normal_()


def faults(student: Tensor, teacher: Tensor, rows: list[int], *, inplace: bool) -> list[str]:
    """Return which results differ between rows of a large call and the same rows in a small call.

    Scores select the upper half of the rows, so gradients of unselected rows are checked too.

    Args:
        student, teacher: (rows, classes); `inplace` overwrites the student's.
        rows: the rows to compare.
        inplace: write the gradient to the student's memory.
    """
    n = student.shape[0]
    score = torch.arange(float(n), device=student.device)
    compared_rows = torch.tensor(rows, device=student.device)
    few_student, few_teacher = student[compared_rows].requires_grad_(), teacher[compared_rows]  # copies
    leaf = student.detach().requires_grad_()
    given = Produced.apply(torch.ones((), requires_grad=True), student) if inplace else leaf
    loss, knowledge = kcd_ext.condensed_kd_loss(
        given, teacher, keep=(n + 1) // 2, value=score, reduction="sum", inplace=inplace, return_knowledge=True
    )
    (gradient,) = torch.autograd.grad(loss, given)
    small_loss, few = kcd_ext.condensed_kd_loss(few_student, few_teacher, reduction="sum", return_knowledge=True)
    (few_gradient,) = torch.autograd.grad(small_loss, few_student)
    selected = compared_rows >= n - (n + 1) // 2
    few_gradient[~selected] = 0
    # The two calls may sum a row in different orders; the gradient is rounded once to its dtype.
    relative = max(2 * torch.finfo(student.dtype).eps, 1e-4)
    absolute = 1e-6 * few_gradient.abs().max().item()
    compared = {
        "selected": torch.equal(knowledge.selected[compared_rows], selected),
        "kl": torch.allclose(knowledge.kl[compared_rows], few.kl, rtol=1e-4, atol=1e-6),
        "entropy": torch.allclose(knowledge.entropy[compared_rows], few.entropy, rtol=1e-4),
        "gradient": torch.allclose(gradient[compared_rows], few_gradient, rtol=relative, atol=absolute),
        "loss": torch.allclose(loss, 16 * knowledge.kl[knowledge.selected].sum(), rtol=1e-3),
    }
    return [name for name, equal in compared.items() if not equal]


def contiguous(rows: int = 32_769, classes: int = 65_537) -> list[str]:
    """Check more than 2³¹ contiguous elements, including the row with the 2³¹th."""
    student, teacher = (logits(rows, classes, torch.bfloat16) for _ in range(2))
    crossing = min(LIMIT // classes, rows - 1)
    return faults(
        student, teacher, sorted({0, rows // 2 - 1, rows // 2, crossing - 1, crossing, rows - 1}), inplace=False
    )


def strided(stride: int = LIMIT + 64) -> list[str]:
    """Check three rows more than 2³¹ elements apart, with an in-place gradient."""
    student, teacher = (logits(3, 1000, torch.float32, stride=stride) for _ in range(2))
    return faults(student, teacher, [0, 1, 2], inplace=True)


# Name -> the check, and the bytes that it needs.
CHECKS: dict[str, tuple[Callable[[], list[str]], int]] = {
    "bfloat16 32769 × 65537": (contiguous, 3 * 32_769 * 65_537 * 2),
    "float32, rows 2³¹ + 64 apart, in place": (strided, 2 * 2 * (LIMIT + 64) * 4),
}


def main() -> int:
    """Print one line: what was compared, and what did not fit."""
    options = section_options(__doc__)
    findings, wrong, checked = {}, False, False
    for name, (check, size) in CHECKS.items():
        free = torch.cuda.mem_get_info()[0]
        if ROOM * size > free:
            findings[name] = f"needs {ROOM * size / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"
            continue
        found = check()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        checked, wrong = True, wrong or bool(found)
        findings[name] = f"different {', '.join(found)} than in a small call" if found else "same as in a small call"
        write_json(options.data, findings)
    write_json(options.data, findings)
    print("; ".join(f"{name}: {finding}" for name, finding in findings.items()))
    return 1 if wrong else 0 if checked else UNAVAILABLE


if __name__ == "__main__":
    sys.exit(main())
