"""Where a run computes; torch and accelerate are left as they were found."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin


@contextmanager
def accelerator_on(device: str, mixed_precision: str | None = None) -> Iterator[Accelerator]:
    """An Accelerator on this device (auto, cpu or cuda); gradients are accumulated by nobody but the trainer.

    `mixed_precision`: "no", "bf16" or "fp16"; None: what the launcher says. A process that had no Accelerator before
    has none afterwards; one that the caller has accumulates gradients as before.
    """
    wanted = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' is not available: this torch has no CUDA or finds no driver")
    if wanted == "cpu" and mixed_precision == "fp16":
        raise ValueError("precision 'float16' needs CUDA, and the device is cpu: take bfloat16 or float32")
    ours = not AcceleratorState._shared_state
    if not ours and mixed_precision not in (None, AcceleratorState().mixed_precision):
        had = AcceleratorState().mixed_precision
        raise ValueError(f"precision {mixed_precision!r}: this process has an Accelerator of precision {had!r} already")
    gradients = {name: copy(value) for name, value in GradientState._shared_state.items()}  # all Accelerators share it
    accelerator = Accelerator(
        cpu=wanted == "cpu",
        mixed_precision=mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    try:
        if accelerator.device.type != wanted:
            raise ValueError(f"device {wanted!r}: this process has an Accelerator on {accelerator.device} already")
        yield accelerator
    finally:
        if ours and accelerator.num_processes == 1:
            AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._shared_state.clear()
        GradientState._shared_state.update(gradients)


@contextmanager
def autocast(accelerator: Accelerator) -> Iterator[None]:
    """Call networks in the accelerator's precision inside the context.

    Casts of weights that autocast keeps for the next operator end with it, also where the caller is inside an autocast
    of their own: that one would keep them, and training would go on with the weights of the first step.
    """
    with accelerator.autocast():
        yield
    torch.clear_autocast_cache()


MOST_THREADS = 4096  # of torch's


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many threads of torch's inside; None: as many as it has."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
