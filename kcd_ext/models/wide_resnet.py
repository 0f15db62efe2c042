"""Wide residual networks (Zagoruyko and Komodakis, 2016), without dropout, for images of 32x32.

Layers and parameter names are those of the RepDistiller comparison (Tian et al., 2020), so its checkpoints load.
"""

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from .layers import blocks_per_stage, initialise_convolutions, stack_blocks


class PreactivationBlock(nn.Module):
    """Two 3x3 convolutions, each preceded by its normalisation; the output is the sum before any activation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.convShortcut = None  # the name in published checkpoints; the size changes only if the channels do
        if in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = functional.relu(self.bn1(x))
        y = functional.relu(self.bn2(self.conv1(active)))
        return self.conv2(y) + (x if self.convShortcut is None else self.convShortcut(active))


class WideResNet(nn.Module):
    """A convolution, three stages of (depth - 4) / 6 blocks and one linear layer: `(b, c, h, w)` to logits `(b, classes)`.

    The stages have full, half and quarter size. The first two are sums before the next normalisation and activation. The
    last is after both, because that map is pooled; its sum is the output of `block3`.

    Raises:
        TypeError: `depth` is not an integer.
        ValueError: `depth` is not 6 n + 4 for an integer n >= 1.
    """

    stages = ("block1", "block2", "relu")

    def __init__(self, *, in_channels: int, num_classes: int, depth: int, width: int):
        super().__init__()
        blocks = blocks_per_stage(depth, 4)
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = _stage(16, 16 * width, 1, blocks)
        self.block2 = _stage(16 * width, 32 * width, 2, blocks)
        self.block3 = _stage(32 * width, 64 * width, 2, blocks)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(64 * width, num_classes)
        initialise_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.relu(self.bn1(x)).mean((2, 3)))


def _stage(in_channels: int, out_channels: int, stride: int, blocks: int) -> nn.Sequential:
    """Return the blocks of a stage under the name `layer`, as published checkpoints have it."""
    return nn.Sequential(OrderedDict(layer=stack_blocks(PreactivationBlock, in_channels, out_channels, stride, blocks)))


wrn_16_1 = partial(WideResNet, depth=16, width=1)
wrn_16_2 = partial(WideResNet, depth=16, width=2)
wrn_40_1 = partial(WideResNet, depth=40, width=1)
wrn_40_2 = partial(WideResNet, depth=40, width=2)
