"""What a forward pass costs."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .distributed import is_sharded


def forward_flops(network: nn.Module, x: Tensor) -> int | None:
    """Floating-point operations of convolutions and matrix products for one sample `x` (1, ...), 2 a multiply-add.

    None for a network whose pieces lie on several processes: there they cannot be counted on one.
    """
    if is_sharded(network):
        return None
    modes = {module: module.training for module in network.modules()}
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network.to(x.device).eval()(x)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return counter.get_total_flops()
