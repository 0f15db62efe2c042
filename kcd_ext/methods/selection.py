"""Condensation within a batch: the student's entropy selects the rows that the teacher runs on."""

from torch import Tensor

from .. import reference
from ..arguments import check_keep
from ..losses import select_rows
from ..ops import has_kernels_for


def select_batch_rows(student_logits: Tensor, batch_keep: float) -> Tensor | None:
    """Return the indices of the rows of highest entropy, for the teacher to run on.

    Ties go to the lower row. A row with NaN ranks first, so that it reaches the loss (as in `kcd_ext.select_rows`). The
    number of rows depends on the shape only, so on a device with kernels nothing waits for the logits.

    Args:
        student_logits: (b, classes); not differentiated.
        batch_keep: The fraction to select, in (0, 1]. 1: all rows.

    Returns:
        int64 (max(1, int(batch_keep * b)),), ascending; None for all rows.
    """
    if batch_keep == 1:
        return None
    if has_kernels_for(student_logits):
        return select_rows(student_logits, keep=batch_keep)[0]
    # The reference selects by the entropy of its first argument, so the second one may be anything.
    logits = student_logits.detach()
    _, knowledge = reference.condensed_kd_loss(logits, logits, keep=batch_keep, return_knowledge=True)
    order = knowledge.selected.sort(descending=True, stable=True).indices
    return order[: check_keep(batch_keep).of(len(order))]


def take_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """Return x[rows] (k, ...) for the rows of `select_batch_rows`. None: x itself."""
    return x if rows is None else x.index_select(0, rows)
