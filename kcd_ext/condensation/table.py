"""The value table: a running mean of every sample's knowledge value, updated on the device without synchronising."""

from __future__ import annotations

import torch
from torch import Tensor

from ..describe import describe

# Values of larger magnitude count as not finite. So no sum of up to 2^53 visits can overflow to infinity.
LARGEST_VALUE = 2.0**960

PADDING_INDEX = -1  # the index of an entry that must not be counted: a padding repeat of the sampler

STATE = ("values", "counts", "non_finite", "pending")


class ValueTable:
    """Online global value estimation (KCD, Eq. 12): V_F = ((F - 1)/F)·V_{F-1} + V/F, never cleared.

    The visits of an epoch first go into *pending* sums. `merge_pending` adds them to the mean, over all ranks of a group
    with one all-reduce. Everything is float64 or int64, so counts and indices are exact.

    Args:
        num_samples: N, the size of the data set.
        device: Device of the table. None: that of the first values.
    """

    quantity = "knowledge values"  # what the table records, as a warning calls it

    def __init__(self, num_samples: int, device: torch.device | str | None = None):
        if not isinstance(device, torch.device | str | None):
            raise TypeError(f"device must be a torch.device, a string or None, got {describe(device)}")
        initial_device = torch.device("cpu" if device is None else device)
        self.num_samples = num_samples
        self._device_is_fixed = device is not None
        self._values = torch.zeros(num_samples, dtype=torch.float64, device=initial_device)
        self._counts = torch.zeros(num_samples, dtype=torch.int64, device=initial_device)
        self._non_finite = torch.zeros(num_samples, dtype=torch.int64, device=initial_device)
        # One row per sample: sum of values, number of entries, number of values left out. The last two rows collect
        # entries that belong to no sample: those out of range, and those at PADDING_INDEX.
        self._pending = torch.zeros(num_samples + 2, 3, dtype=torch.float64, device=initial_device)

    @property
    def values(self) -> Tensor:
        """The mean value of every sample, `(N,)` float64, including this rank's pending visits; 0 if never visited."""
        return self._with_visits(self._pending)[0]

    @property
    def merged(self) -> tuple[Tensor, Tensor]:
        """The `values` and `counts` of the last `merge_pending`, without pending visits: the same on every rank."""
        return self._values, self._counts

    @property
    def counts(self) -> Tensor:
        """The number of visits of every sample, `(N,)` int64, including this rank's pending ones."""
        return self._with_visits(self._pending)[1]

    @property
    def non_finite(self) -> int:
        """The number of values left out because they were not finite, including this rank's pending ones."""
        return int(self._left_out(self._pending).sum())

    @property
    def never_visited(self) -> int:
        """The number of samples without any value, not even one that was left out."""
        return int(((self.counts == 0) & (self._left_out(self._pending) == 0)).sum())

    def add(self, index: Tensor, value: Tensor) -> None:
        """Add visits: `index` `(b,)` int64, `value` `(b,)` of any float dtype. See `KnowledgeCondenser.update`."""
        in_range = _check_batch(index, value, self.num_samples)
        if not self._device_is_fixed:
            self._move(value.device)
        device = self._pending.device
        # A copy to the CPU must be complete before it is read; on an accelerator the stream orders both.
        non_blocking = device.type != "cpu"
        index = index.to(device, non_blocking=non_blocking)
        value = value.detach().to(device, torch.float64, non_blocking=non_blocking)

        if not in_range:
            index = torch.where(index < PADDING_INDEX, self.num_samples, index).clamp(max=self.num_samples)
        usable = value.abs() <= LARGEST_VALUE  # False for NaN and infinities
        visit = torch.stack((torch.where(usable, value, 0.0), torch.ones_like(value), ~usable), dim=1)
        # With repeated rows, this way of adding sums in a fixed order on the CPU and on CUDA.
        self._pending.index_put_((index,), visit, accumulate=True)

    def merge_pending(self, group: object = None) -> list[str]:
        """Merge the pending visits into the mean, summed over `group` with exactly one all-reduce.

        If the collective fails, nothing has changed.

        Args:
            group: A process group. None: this process only.

        Returns:
            The warnings for the user.
        """
        pending = self._pending
        if group is not None:
            pending = pending.clone()
            torch.distributed.all_reduce(pending, group=group)
        new, out_of_range = int(pending[:-2, 2].sum()), int(pending[-2, 1])
        non_finite = self._left_out(pending) if new else self._non_finite
        warnings = self._warnings(non_finite, new, out_of_range)
        self._values, self._counts = self._with_visits(pending)
        self._non_finite = non_finite
        self._pending.zero_()
        return warnings

    def state_dict(self) -> dict[str, Tensor]:
        """Return the four tensors of the table on the CPU: values, counts, non_finite `(N,)`, pending `(N + 2, 3)`."""
        return {name: getattr(self, f"_{name}").detach().cpu().clone() for name in STATE}

    def check_state(self, state: dict) -> None:
        """Check that `load_state_dict` can load `state`.

        Raises:
            TypeError: An entry is not a dense tensor with data; names it.
            ValueError: An entry has another dtype or shape, or a bad number; names it.
        """
        for name in STATE:
            check_tensor(name, state[name], getattr(self, f"_{name}").dtype, tuple(getattr(self, f"_{name}").shape))
            if not torch.isfinite(state[name]).all():
                raise ValueError(f"state_dict['{name}'] must be finite")
        for name in ("counts", "non_finite"):
            if (state[name] < 0).any():
                raise ValueError(f"state_dict['{name}'] must not be negative, got {int(state[name].min())}")

    def load_state_dict(self, state: dict) -> None:
        """Load a state that `check_state` accepted; the table stays on its device."""
        device = self._pending.device
        for name in STATE:
            setattr(self, f"_{name}", state[name].detach().to(device, copy=True).contiguous())

    def _with_visits(self, pending: Tensor) -> tuple[Tensor, Tensor]:
        """Return values and counts with these visits added."""
        sums, entries, left_out = pending[:-2].unbind(dim=1)
        visits = (entries - left_out).long()
        counts = self._counts + visits
        return self._updated_values(sums, visits, counts), counts

    def _updated_values(self, sums: Tensor, visits: Tensor, counts: Tensor) -> Tensor:
        """Return Eq. 12 for any number of visits: (F_old/F_new)·V_old + sum/F_new. One visit gives Eq. 12 literally."""
        divisor = counts.clamp(min=1).double()  # a sample never visited keeps value 0 instead of 0/0
        return (self._counts / divisor) * self._values + sums / divisor

    def _left_out(self, pending: Tensor) -> Tensor:
        """Return how many values of every sample were not finite, including these visits."""
        return self._non_finite + pending[:-2, 2].long()

    def _warnings(self, non_finite: Tensor, new: int, out_of_range: int) -> list[str]:
        warnings = []
        if new and not self._non_finite.any():  # only the first epoch that has any
            warnings.append(
                f"{new} {self.quantity} of {int((non_finite > 0).sum())} samples were not finite and were left out of "
                f"the value table (the student's logits contain NaN or infinity); further ones are only counted, "
                f"in .non_finite"
            )
        if out_of_range:
            warnings.append(
                f"{out_of_range} indices passed to update() were outside [0, {self.num_samples}) and were left out; "
                f"are they indices of the original data set?"
            )
        return warnings

    def _move(self, device: torch.device) -> None:
        for name in STATE:
            setattr(self, f"_{name}", getattr(self, f"_{name}").to(device))
        self._device_is_fixed = True


class LastLossTable(ValueTable):
    """A table without memory: every sample's loss in the last epoch that had one; if that had several, the mean."""

    quantity = "losses"

    def _updated_values(self, sums: Tensor, visits: Tensor, counts: Tensor) -> Tensor:
        return torch.where(visits > 0, sums / visits.clamp(min=1), self._values)


def check_tensor(name: str, tensor: object, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    """Check that state entry `name` is a tensor of `dtype` and `shape`, in which None stands for any size.

    Raises:
        TypeError: It is not a dense tensor with data.
        ValueError: Its dtype or shape differs.
    """
    takes = f"a {dtype} tensor of shape {tuple('any' if size is None else size for size in shape)}"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"state_dict['{name}'] must be {takes}, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise TypeError(f"state_dict['{name}'] must be {takes}, got a {'meta' if tensor.is_meta else 'sparse'} tensor")
    fits = tensor.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, tensor.shape, strict=True))
    if tensor.dtype != dtype or not fits:
        raise ValueError(f"state_dict['{name}'] must be {takes}, got {tensor.dtype} of shape {tuple(tensor.shape)}")


def _check_batch(index: object, value: object, num_samples: int) -> bool:
    """Return whether all indices are known to be in range, which needs them on the CPU. Raise as `add` does."""
    for name, tensor in (("index", index), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor of shape (b,), got {type(tensor).__name__}")
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64 (original indices of the data set), got {index.dtype}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"value must have a floating-point dtype, got {value.dtype}")
    if index.ndim != 1:
        raise ValueError(f"index must have shape (b,), got {tuple(index.shape)}")
    if value.shape != index.shape:
        raise ValueError(f"value must have the shape of index, {tuple(index.shape)}, got {tuple(value.shape)}")
    if index.device.type == "cpu" and index.numel():
        low, high = (int(bound) for bound in index.aminmax())
        if low < PADDING_INDEX or high >= num_samples:
            raise IndexError(
                f"index must be in [0, {num_samples}), or {PADDING_INDEX} for an entry to skip; got values from {low} to {high}"
            )
    return index.device.type == "cpu"
