"""The value table: the running mean of every sample's knowledge value, fed on the device without a wait."""

from __future__ import annotations

import torch
from torch import Tensor

from ..describe import describe

# Values of larger magnitude count as not finite: then no sum of up to 2^53 visits can overflow to infinity.
LARGEST_VALUE = 2.0**960

SKIP = -1  # the index of an entry that is not to be counted: a padding repeat of the sampler

STATE = ("values", "counts", "non_finite", "pending")


class ValueTable:
    """Online global value estimation (KCD, Eq. 12): V_F = ((F - 1)/F)·V_{F-1} + V/F, never cleared.

    The visits of an epoch first go into *pending* sums; `fold` merges them into the mean, over all ranks of a group
    with one all-reduce. Everything is float64 or int64, so counts and indices are exact.

    `num_samples` is N. `device` is where the table lives; None: where the first values are.
    """

    measured = "knowledge values"  # what the table is made of, as it reads in a warning

    def __init__(self, num_samples: int, device: torch.device | str | None = None):
        if not isinstance(device, torch.device | str | None):
            raise TypeError(f"device must be a torch.device, a string or None, got {describe(device)}")
        home = torch.device("cpu" if device is None else device)
        self.num_samples = num_samples
        self._placed = device is not None
        self._values = torch.zeros(num_samples, dtype=torch.float64, device=home)
        self._counts = torch.zeros(num_samples, dtype=torch.int64, device=home)
        self._non_finite = torch.zeros(num_samples, dtype=torch.int64, device=home)
        # A row a sample: sum of values, entries, values left out. Two more take entries that are of no sample: those that
        # lay outside, and, as the last one, those at SKIP.
        self._pending = torch.zeros(num_samples + 2, 3, dtype=torch.float64, device=home)

    @property
    def values(self) -> Tensor:
        """(N,) float64: mean value of every sample, this rank's pending visits included; 0 where never visited."""
        return self._merged(self._pending)[0]

    @property
    def folded(self) -> tuple[Tensor, Tensor]:
        """`values` and `counts` as the last `fold` left them, without pending visits: the same on every rank."""
        return self._values, self._counts

    @property
    def counts(self) -> Tensor:
        """(N,) int64: visits of every sample, this rank's pending ones included."""
        return self._merged(self._pending)[1]

    @property
    def non_finite(self) -> int:
        """How many values were left out because they were not finite, this rank's pending ones included."""
        return int(self._left_out(self._pending).sum())

    @property
    def never_visited(self) -> int:
        """How many samples have been given no value at all, not even one that was left out."""
        return int(((self.counts == 0) & (self._left_out(self._pending) == 0)).sum())

    def add(self, index: Tensor, value: Tensor) -> None:
        """Adds visits: `index` (b,) int64, `value` (b,) of any float dtype. See `KnowledgeCondenser.update`."""
        inside = _check_batch(index, value, self.num_samples)
        if not self._placed:
            self._move(value.device)
        device = self._pending.device
        # To the CPU a copy must be waited for; to an accelerator it need not be.
        in_stream = device.type != "cpu"
        index = index.to(device, non_blocking=in_stream)
        value = value.detach().to(device, torch.float64, non_blocking=in_stream)

        if not inside:
            index = torch.where(index < SKIP, self.num_samples, index).clamp(max=self.num_samples)
        usable = value.abs() <= LARGEST_VALUE  # false for NaN and infinities
        visit = torch.stack((torch.where(usable, value, 0.0), torch.ones_like(value), ~usable), dim=1)
        # Of the ways to add with repeated rows this one sums in a fixed order on the CPU and on CUDA alike.
        self._pending.index_put_((index,), visit, accumulate=True)

    def fold(self, group: object = None) -> list[str]:
        """Merges the pending visits, summed over `group` (None: this process alone) by exactly one all-reduce.

        Returns what the user should be warned of. If the collective fails, nothing has changed.
        """
        pending = self._pending
        if group is not None:
            pending = pending.clone()
            torch.distributed.all_reduce(pending, group=group)
        new, lost = int(pending[:-2, 2].sum()), int(pending[-2, 1])
        non_finite = self._left_out(pending) if new else self._non_finite
        warnings = self._warnings(non_finite, new, lost)
        self._values, self._counts = self._merged(pending)
        self._non_finite = non_finite
        self._pending.zero_()
        return warnings

    def state_dict(self) -> dict[str, Tensor]:
        """The four tensors of the table, on the CPU: values, counts, non_finite (N,) and pending (N + 2, 3)."""
        return {name: getattr(self, f"_{name}").detach().cpu().clone() for name in STATE}

    def check_state(self, state: dict) -> None:
        """Raises TypeError or ValueError, naming the entry, unless `load_state_dict` can take `state`."""
        for name in STATE:
            check_tensor(name, state[name], getattr(self, f"_{name}").dtype, tuple(getattr(self, f"_{name}").shape))
            if not torch.isfinite(state[name]).all():
                raise ValueError(f"state_dict['{name}'] must be finite")
        for name in ("counts", "non_finite"):
            if (state[name] < 0).any():
                raise ValueError(f"state_dict['{name}'] must not be negative, got {int(state[name].min())}")

    def load_state_dict(self, state: dict) -> None:
        """Takes over a state that `check_state` accepted; the table stays on its device."""
        device = self._pending.device
        for name in STATE:
            setattr(self, f"_{name}", state[name].detach().to(device, copy=True).contiguous())

    def _merged(self, pending: Tensor) -> tuple[Tensor, Tensor]:
        """Values and counts, with these visits in them."""
        sums, entries, left_out = pending[:-2].unbind(dim=1)
        visits = (entries - left_out).long()
        counts = self._counts + visits
        return self._updated(sums, visits, counts), counts

    def _updated(self, sums: Tensor, visits: Tensor, counts: Tensor) -> Tensor:
        """Eq. 12 for any number of visits: (F_old/F_new)·V_old + sum/F_new; for one visit this is it literally."""
        divisor = counts.clamp(min=1).double()  # a sample never visited keeps value 0 instead of 0/0
        return (self._counts / divisor) * self._values + sums / divisor

    def _left_out(self, pending: Tensor) -> Tensor:
        """How many values of every sample were not finite, these visits' included."""
        return self._non_finite + pending[:-2, 2].long()

    def _warnings(self, non_finite: Tensor, new: int, lost: int) -> list[str]:
        warnings = []
        if new and not self._non_finite.any():  # the first epoch that has any: warned about once
            warnings.append(
                f"{new} {self.measured} of {int((non_finite > 0).sum())} samples were not finite and were left out of "
                f"the value table (the student's logits hold NaN or infinity); further ones are only counted, in .non_finite"
            )
        if lost:
            warnings.append(
                f"{lost} indices given to update() lay outside [0, {self.num_samples}) and were left out; "
                f"are they indices of the original data set?"
            )
        return warnings

    def _move(self, device: torch.device) -> None:
        for name in STATE:
            setattr(self, f"_{name}", getattr(self, f"_{name}").to(device))
        self._placed = True


class LastLossTable(ValueTable):
    """A table that forgets: of every sample the loss in the last epoch that had one, the mean if it had several."""

    measured = "losses"

    def _updated(self, sums: Tensor, visits: Tensor, counts: Tensor) -> Tensor:
        return torch.where(visits > 0, sums / visits.clamp(min=1), self._values)


def check_tensor(name: str, tensor: object, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    """Raises TypeError or ValueError unless state entry `name` is a tensor of `dtype` and `shape` (None: any size)."""
    takes = f"a {dtype} tensor of shape {tuple('any' if size is None else size for size in shape)}"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"state_dict['{name}'] must be {takes}, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise TypeError(
            f"state_dict['{name}'] must be {takes}, got one that is {'meta' if tensor.is_meta else 'sparse'}"
        )
    fits = tensor.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, tensor.shape, strict=True))
    if tensor.dtype != dtype or not fits:
        raise ValueError(f"state_dict['{name}'] must be {takes}, got {tensor.dtype} of shape {tuple(tensor.shape)}")


def _check_batch(index: object, value: object, num_samples: int) -> bool:
    """Whether all indices are known to lie inside: where they are on the CPU. Raises what `add` does."""
    for name, tensor in (("index", index), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor of shape (b,), got {type(tensor).__name__}")
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64 (original indices of the data set), got {index.dtype}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"value must be of a floating-point dtype, got {value.dtype}")
    if index.ndim != 1:
        raise ValueError(f"index must have shape (b,), got {tuple(index.shape)}")
    if value.shape != index.shape:
        raise ValueError(f"value must have the shape of index, {tuple(index.shape)}, got {tuple(value.shape)}")
    if index.device.type == "cpu" and index.numel():
        low, high = (int(bound) for bound in index.aminmax())
        if low < SKIP or high >= num_samples:
            raise IndexError(
                f"index must lie in [0, {num_samples}), or be {SKIP} for an entry to skip; "
                f"got values from {low} to {high}"
            )
    return index.device.type == "cpu"
