"""The per-row results of the distillation loss."""

from typing import NamedTuple

from torch import Tensor


class Knowledge(NamedTuple):
    """The per-row results of `condensed_kd_loss` and `select_rows`.

    The shape `(...)` is that of the logits without the class dimension. No field carries a gradient. All are copies, which you may
    modify.

    Rows that are not candidates (ignored, or not among the teacher's rows) have `value` and `kl` NaN and are never selected.
    Ignored rows have `entropy` NaN, too.
    """

    value: Tensor
    """What ranks the rows, highest first: shape `(...)`. By default the student's entropy (Li et al., ECCV 2022, Eq. 7).

    Scores come back in their own dtype. The other values have the dtype of the loss."""
    entropy: Tensor
    """The student's entropy at temperature 1, in nats: shape `(...)`."""
    kl: Tensor
    """KL(teacher || student) at the loss's temperature, in nats, without the factor T²: shape `(...)`."""
    selected: Tensor
    """Whether the row is distilled: bool of shape `(...)`."""
    n_selected: Tensor
    """The number of selected rows of this process: an int64 scalar."""
