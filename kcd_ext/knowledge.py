"""What one read of the logits tells about every row."""

from typing import NamedTuple

from torch import Tensor


class Knowledge(NamedTuple):
    """The knowledge of a batch, one entry a row; (...) is the shape of the logits without their classes.

    Rows that are no candidates have value and kl NaN and are not selected; ignored rows have entropy NaN too.
    """

    value: Tensor
    """(...) what rows are ranked by, highest first (KCD: the student's entropy, Eq. 7)."""
    entropy: Tensor
    """(...) the student's entropy at temperature 1, in nats."""
    kl: Tensor
    """(...) KL(teacher || student) at the temperature of the loss, in nats, not multiplied by T²."""
    selected: Tensor
    """bool (...): the rows that are distilled."""
    n_selected: Tensor
    """int64 scalar: how many rows of this process are selected."""
