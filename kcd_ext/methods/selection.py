"""Condensation within a batch: the student's entropy says which rows the teacher is asked about."""

from torch import Tensor

from .. import reference
from ..arguments import check_keep
from ..losses import select_rows
from ..ops import has_kernels_for


def select_batch_rows(student_logits: Tensor, batch_keep: float) -> Tensor | None:
    """Return the rows the teacher is asked about: those of highest entropy, the lower row first among equals.

    Entropy first, as `kcd_ext.select_rows`: a row that is not a number ranks first, so that it reaches the loss. The
    number of rows is known without a look at the logits, so nothing waits for a device that has the kernels.

    Args:
        student_logits: (b, classes); nothing is differentiated.
        batch_keep: the fraction that is chosen, in (0, 1]. 1: all rows.

    Returns:
        int64 (max(1, int(batch_keep * b)),), ascending; None for all rows.
    """
    if batch_keep == 1:
        return None
    if has_kernels_for(student_logits):
        return select_rows(student_logits, keep=batch_keep)[0]
    # The reference selects by the entropy of its first argument; what stands beside it does not matter.
    logits = student_logits.detach()
    _, knowledge = reference.condensed_kd_loss(logits, logits, keep=batch_keep, return_knowledge=True)
    order = knowledge.selected.sort(descending=True, stable=True).indices
    return order[: check_keep(batch_keep).of(len(order))]


def take_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """Return the entries of x (b, ...) at `rows`, what `select_batch_rows` returned: (k, ...), or x itself for all rows."""
    return x if rows is None else x.index_select(0, rows)


choose, of_rows = select_batch_rows, take_rows  # the names that methods written before use
