"""Calls of the operator that together reach every path of the kernels, for the sanitizers and the graphs."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import kcd_ext

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
VALUES = ("entropy", "kl", "teacher_entropy", "cross_entropy", "scores")
KEEPS = (0.7, 1.0, 3)


@dataclass(frozen=True)
class Case:
    """A call, forward and backward."""

    rows: int
    classes: int
    dtype: torch.dtype = torch.float32
    keep: float | int = 1.0
    value: str = "entropy"
    labelled: bool = False
    """With labels; every fourth one is ignored."""
    named: bool = False
    """The teacher has only every second row, listed in `rows=`, and one that is skipped."""
    inplace: bool = False
    shift: int = 0
    """Elements before each row in the student's memory; one more follows it. Gives odd alignments and strides."""
    reduction: str = "mean"

    def __str__(self) -> str:
        flags = [name for name in ("labelled", "named", "inplace") if getattr(self, name)]
        flags += [f"shift {self.shift}"] * (self.shift > 0) + [self.reduction] * (self.reduction != "mean")
        kind = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.rows} × {self.classes} {kind}, keep {self.keep} by {self.value}{''.join(f', {x}' for x in flags)}"
        )


Inputs = dict[str, Tensor]
"""The tensors of a call: `memory` contains the student's logits, (rows, shift + classes + 1) if shifted, else (rows, classes);
`teacher`; and the options that are tensors."""


def on_device(given: Inputs, device: str) -> Inputs:
    """Copy the inputs to a device, including the memory around the logits."""
    return {name: x.to(device) for name, x in given.items()}


def inputs(case: Case, seed: int) -> Inputs:
    """Return random inputs of a case on the CPU. Every element is initialised."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * 2).to(case.dtype)

    given = {"memory": normal(case.rows, case.shift + case.classes + 1 if case.shift else case.classes)}
    teacher_rows = case.rows
    if case.named:
        given["rows"] = torch.cat([torch.arange(0, case.rows, 2), torch.tensor([-1])])
        teacher_rows = len(given["rows"])
    if case.labelled or case.value == "cross_entropy":
        labels = torch.randint(case.classes, (case.rows,), generator=generator)
        labels[3::4] = -100
        given["labels"] = labels
    if case.value == "scores":
        given["value"] = torch.randn(case.rows, generator=generator)
    given["teacher"] = normal(teacher_rows, case.classes)
    return given


def call(case: Case, given: Inputs) -> dict[str, Tensor]:
    """Run a call on the device of its inputs. Return loss, gradient and knowledge."""
    options = {"value": case.value, **given}
    memory, teacher = options.pop("memory").detach().requires_grad_(), options.pop("teacher")
    if case.inplace:  # the gradient must not overwrite a leaf or a part of one
        memory = memory.clone()
    logits = memory[:, case.shift : case.shift + case.classes]
    loss, knowledge = kcd_ext.condensed_kd_loss(
        logits,
        teacher,
        keep=case.keep,
        reduction=case.reduction,
        inplace=case.inplace,
        return_knowledge=True,
        **options,
    )
    (gradient,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    return {"loss": loss.detach(), "gradient": gradient, **knowledge._asdict()}


def every_path() -> list[Case]:
    """Return small cases. The first ones reach most of the code, in case a sanitizer runs out of time."""
    first = [
        Case(13, 1000, torch.float32, keep=0.7, labelled=True),
        Case(13, 4097, torch.bfloat16, keep=0.7, shift=3),
        Case(2, 200_003, torch.bfloat16, keep=1.0),  # a row is split over blocks
        Case(70_001, 3, torch.float32, keep=0.7),  # selection by several blocks
        Case(20_001, 10, torch.float32, keep=0.7, labelled=True),  # selection from many rows by the last block
        Case(13, 100, torch.float16, keep=5, inplace=True, labelled=True),
        Case(13, 1000, torch.float32, keep=0.7, named=True),
        Case(13, 7, torch.float64, keep=1.0, shift=1, reduction="none", labelled=True),
        Case(5, 32_003, torch.float16, keep=0.7, value="kl"),
    ]
    grid = [
        Case(
            rows=13 if classes < 10_000 else 5,
            classes=classes,
            dtype=dtype,
            keep=KEEPS[(i + j) % len(KEEPS)],
            value=VALUES[(i + j) % len(VALUES)],
            labelled=(i + j) % 2 == 0,
            shift=(0, 1, 3, 0)[(i + 2 * j) % 4],
        )
        for i, classes in enumerate((7, 100, 1000, 4097, 32_003))
        for j, dtype in enumerate(DTYPES)
    ]
    rest = [replace(case, inplace=True, value="entropy") for case in grid[4:8]]
    rest += [
        Case(1, 1_000_003, torch.float32, keep=1.0, labelled=True),
        Case(2, 200_003, torch.float32, keep=1, labelled=True, shift=1, inplace=True),
        Case(70_001, 3, torch.bfloat16, keep=12_345, labelled=True),
        Case(70_001, 3, torch.float64, keep=1.0, value="scores"),
        Case(20_001, 10, torch.bfloat16, keep=1234, inplace=True, shift=1),
        Case(13, 4097, torch.float32, keep=2, named=True, labelled=True),
        Case(1, 1, torch.float32),
    ]
    return first + grid + rest
