"""What an E-step decides."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Condensation:
    """The outcome of one E-step. All tensors are on the CPU; indices are original ones, int64.

    This is what it means for condensers that rank; `InfoBatch` says what `kept` and `dropped` are for it.

    Attributes:
        kept: (n_keep,) K1, what is distilled from now on, most valuable first.
        dropped: (|K0|,) K0, the ranks n_keep … n_before - 1, what this stage gives up, most valuable first. Ranks
            count all samples, so one that was kept before can also lie deeper, and one of these can have been dropped
            before. With `min_per_class` the samples that it keeps count as ranked before all that it does not.
        mixed: (m,) K1L, the last m of `kept`, m = min(|K0|, n_keep): the samples whose image takes something over.
        partner: (m,) the dropped sample each of them is blended with: the first m of `dropped`.
        mix: (m,) float64, e_i = epsilon·i/|K0| (Eq. 15).
        weight: (m,) float64, e_i in the single precision that pixels are blended with (`mixing.pixel_weight`).
        convex: whether the image itself is weighted with 1 - e_i (True) or with 1.
        stage: the number of this E-step; the first is 1.
        epoch: how many epochs have ended, this one included.
    """

    kept: Tensor
    dropped: Tensor
    mixed: Tensor
    partner: Tensor
    mix: Tensor
    weight: Tensor
    convex: bool
    stage: int
    epoch: int
