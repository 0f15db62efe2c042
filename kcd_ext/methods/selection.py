"""Condensation within a batch: the student's entropy selects the rows that the teacher runs on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from .. import reference
from ..arguments import check_keep
from ..losses import select_rows
from ..ops import has_kernels_for

_shared_results: ContextVar[dict[tuple, tuple] | None] = ContextVar("shared results", default=None)


@contextmanager
def shared_selection() -> Iterator[None]:
    """Return the same tensor inside the context whenever a function here is called with the same arguments again.

    So several methods that select rows of one batch call the teacher with the same tensor (`features.SharedPasses`).
    """
    token = _shared_results.set({})
    try:
        yield
    finally:
        _shared_results.reset(token)


def _shared(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """Return function(*arguments), computed once inside `shared_selection`. Tensors are compared by identity."""
    results = _shared_results.get()
    if results is None:
        return function(*arguments)
    key = (function, *(id(x) if isinstance(x, Tensor) else x for x in arguments))
    if key not in results:
        results[key] = (arguments, function(*arguments))  # keeps them alive, so that no other tensor gets their ids
    return results[key][1]


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
    return None if batch_keep == 1 else _shared(_select, student_logits, batch_keep)


def _select(student_logits: Tensor, batch_keep: float) -> Tensor:
    if has_kernels_for(student_logits):
        return select_rows(student_logits, keep=batch_keep)[0]
    # The reference selects by the entropy of its first argument, so the second one may be anything.
    logits = student_logits.detach()
    _, knowledge = reference.condensed_kd_loss(logits, logits, keep=batch_keep, return_knowledge=True)
    order = knowledge.selected.sort(descending=True, stable=True).indices
    return order[: check_keep(batch_keep).of(len(order))]


def take_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """Return x[rows] (k, ...) for the rows of `select_batch_rows`. None: x itself."""
    return x if rows is None else _shared(Tensor.index_select, x, 0, rows)
