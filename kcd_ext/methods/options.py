"""Checks of the options that many methods take, under the names of those options. Methods of this package use `..checks`."""

from ..checks import check_finite, check_fraction, check_positive

check_temperature = check_positive
check_weight = check_finite


def check_batch_keep(batch_keep: float) -> float:
    """Return a number in (0, 1], which `selection.select_batch_rows` takes. Raises TypeError or ValueError."""
    return check_fraction("batch_keep", batch_keep)
