"""ShuffleNet with three groups (Zhang et al., 2018) for images of 32x32: its stem is 1x1 without pooling.

Layers and parameter names are those of `ShuffleV1` in the RepDistiller comparison (Tian et al., 2020), so its
checkpoints load.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .layers import channel_shuffle, stack_blocks

GROUPS = 3
STEM = 24  # channels of the first convolution


class ShuffleBlock(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1, and a shortcut; the output is after the activation.

    With stride 2 the input's 3x3 average is not added: it is appended as the last `in_channels` of the output.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        own = out_channels if stride == 1 else out_channels - in_channels
        hidden = own // 4
        self.stride = stride
        self.groups = 1 if in_channels == STEM else GROUPS  # too few channels for groups
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, own, 1, groups=GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(own)

    def forward(self, x: Tensor) -> Tensor:
        y = channel_shuffle(functional.relu(self.bn1(self.conv1(x))), self.groups)
        y = functional.relu(self.bn2(self.conv2(y)))  # as in that comparison; the paper has no activation here
        y = self.bn3(self.conv3(y))
        if self.stride == 1:
            return functional.relu(y + x)
        return functional.relu(torch.cat([y, functional.avg_pool2d(x, 3, 2, padding=1)], 1))


class ShuffleNetV1(nn.Module):
    """A convolution, three stages of 4, 8 and 4 blocks and one linear layer: `(b, c, h, w)` to logits `(b, classes)`.

    The stages have a half, a quarter and an eighth of the size, all after the activation. Initialisation is torch's.
    """

    stages = ("layer1", "layer2", "layer3")

    def __init__(self, *, in_channels: int, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.layer1 = stack_blocks(ShuffleBlock, STEM, 240, 2, 4)
        self.layer2 = stack_blocks(ShuffleBlock, 240, 480, 2, 8)
        self.layer3 = stack_blocks(ShuffleBlock, 480, 960, 2, 4)
        self.linear = nn.Linear(960, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


shufflenet_v1 = ShuffleNetV1
