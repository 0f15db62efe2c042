"""The result of one condensation step."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Condensation:
    """The result of one condensation step (the paper's E-step).

    All tensors are on the CPU. Indices are original sample indices, int64. The paper's names are in brackets.
    The description is that of condensers that rank; for `InfoBatch`, `kept` and `dropped` are described there.

    Attributes:
        kept: `(n_keep,)` [K1] the samples to distil from now on, most valuable first.
        dropped: `(n_before - n_keep,)` [K0] the samples at ranks n_keep … n_before - 1, most valuable first: what this
            stage gives up. Ranks run over all N samples. So a sample kept until now can rank even lower than these,
            and one of these can have been dropped before. With `min_per_class`, the samples it protects rank before
            all others.
        mixed: `(m,)` [K1L] the last m samples of `kept`, m = min(|K0|, n_keep). Their images are blended with dropped ones.
        partner: `(m,)` the dropped sample that each of them is blended with: the first m of `dropped`.
        mix: `(m,)` float64 mixing strength e_i = epsilon·i/|K0| (Eq. 15).
        weight: `(m,)` float64: e_i in the single precision used for pixels (`mixing.pixel_weight`).
        convex: True if the kept image is weighted with 1 - e_i, False if with 1.
        stage: Number of this condensation step, from 1.
        epoch: Number of epochs completed, including this one.
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
