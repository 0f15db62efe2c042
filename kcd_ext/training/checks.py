"""What is found out about data and networks before anything is trained."""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from ..data import IndexedDataset


def indexed(name: str, dataset: Dataset) -> IndexedDataset:
    """The data set with original indices; an `IndexedDataset` as it is."""
    try:
        wrapped = dataset if isinstance(dataset, IndexedDataset) else IndexedDataset(dataset)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    if len(wrapped) == 0:
        raise ValueError(f"{name} must hold at least one sample, got none")
    return wrapped


def check_network(name: str, network: nn.Module | None, train: IndexedDataset, device: torch.device) -> None:
    """One sample, in evaluation mode, before anything is trained: shapes that do not fit cost nothing."""
    if network is None and name == "teacher":
        return
    if not isinstance(network, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(network).__name__}")
    x, *_ = default_collate([train[0]])
    if not isinstance(x, Tensor):
        raise TypeError(f"train must give items that collate to one tensor, got {type(x).__name__}")
    try:
        with torch.no_grad():
            logits = network.to(device).eval()(x.to(device))
    except RuntimeError as error:
        raise ValueError(f"{name} does not take x of {x.dtype} {tuple(x.shape)}: {one_line(error)}") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 1:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{name} must give logits (b, classes), got {got} for b = 1")


def one_line(error: Exception) -> str:
    """The first line of its message; torch adds a call stack to some."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
