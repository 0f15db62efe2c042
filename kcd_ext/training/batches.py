"""How an epoch's samples are cut into batches."""

from collections.abc import Iterator

from torch.utils.data import BatchSampler, Sampler


class NoBatchOfOne(BatchSampler):
    """Batches of `batch_size`; a single sample that is left over in the end joins the batch before.

    Batch normalisation cannot train on one sample, and with stages of all sizes such a remainder comes sooner or later.
    """

    def __init__(self, sampler: Sampler, batch_size: int):
        super().__init__(sampler, batch_size, drop_last=False)

    def __len__(self) -> int:
        size = len(self.sampler)
        left_alone = self.batch_size > 1 and size > self.batch_size and size % self.batch_size == 1
        return -(-size // self.batch_size) - left_alone

    def __iter__(self) -> Iterator[list]:
        entries, starts = list(self.sampler), [number * self.batch_size for number in range(len(self))]
        return (entries[start:stop] for start, stop in zip(starts, [*starts[1:], len(entries)], strict=True))
