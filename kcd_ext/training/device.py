"""Where a run computes; torch and accelerate are left as they were found."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState


@contextmanager
def accelerator_on(device: str) -> Iterator[Accelerator]:
    """An Accelerator on this device (auto, cpu or cuda). A process that had none before has none afterwards."""
    wanted = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' is not available: this torch has no CUDA or finds no driver")
    ours = not AcceleratorState._shared_state
    accelerator = Accelerator(cpu=wanted == "cpu")
    if accelerator.device.type != wanted:
        raise ValueError(f"device {wanted!r}: this process has an Accelerator on {accelerator.device} already")
    try:
        yield accelerator
    finally:
        if ours and accelerator.num_processes == 1:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch's inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
