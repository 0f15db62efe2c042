"""ShuffleNetV2 (Ma et al., 2018) at full width for images of 32x32: its stem is 1x1 without pooling.

Layers and parameter names are those of `ShuffleV2` in the RepDistiller comparison (Tian et al., 2020), so its
checkpoints load.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .layers import channel_shuffle


class SplitBlock(nn.Module):
    """Half of the channels pass unchanged, the others go through 1x1, depthwise 3x3 and 1x1; then a shuffle."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        right = functional.relu(self.bn1(self.conv1(right)))
        right = self.bn2(self.conv2(right))
        right = functional.relu(self.bn3(self.conv3(right)))
        return channel_shuffle(torch.cat([left, right], 1), 2)


class DownBlock(nn.Module):
    """A block that halves the size: both branches read all channels and output half of the new ones; then a shuffle."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        half = out_channels // 2
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, 2, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = self.bn1(self.conv1(x))
        left = functional.relu(self.bn2(self.conv2(left)))
        right = functional.relu(self.bn3(self.conv3(x)))
        right = self.bn4(self.conv4(right))
        right = functional.relu(self.bn5(self.conv5(right)))
        return channel_shuffle(torch.cat([left, right], 1), 2)


class ShuffleNetV2(nn.Module):
    """A convolution, three stages, a convolution and one linear layer: `(b, c, h, w)` to logits `(b, classes)`.

    The stages have a half, a quarter and an eighth of the size, all after the activation. The last one is the output of
    the last convolution, because that map is pooled; `layer3` precedes it. Initialisation is torch's.
    """

    stages = ("layer1", "layer2", "relu")

    def __init__(self, *, in_channels: int, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = _stage(24, 116, 3)
        self.layer2 = _stage(116, 232, 7)
        self.layer3 = _stage(232, 464, 3)
        self.conv2 = nn.Conv2d(464, 1024, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1024)
        self.relu = nn.ReLU()
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.linear(x.mean((2, 3)))


def _stage(in_channels: int, out_channels: int, split_blocks: int) -> nn.Sequential:
    down = DownBlock(in_channels, out_channels)
    return nn.Sequential(down, *(SplitBlock(out_channels) for _ in range(split_blocks)))


shufflenet_v2 = ShuffleNetV2
