"""ResNets for images of 32x32 (He et al., 2016, section 4.2), two of them also four times as wide.

Layers and parameter names are those of the RepDistiller comparison (Tian et al., 2020), so its checkpoints load.
"""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from .layers import blocks_per_stage, initialise_convolutions, shortcut, stack_blocks


class BasicBlock(nn.Module):
    """Two 3x3 convolutions parallel to a shortcut; the output is after the activation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet(nn.Module):
    """A convolution, three stages of (depth - 2) / 6 blocks and one linear layer: `(b, c, h, w)` to logits `(b, classes)`.

    The stages have full, half and quarter size, all after the activation.

    Raises:
        TypeError: `depth` is not an integer.
        ValueError: `depth` is not 6 n + 2 for an integer n >= 1.
    """

    stages = ("layer1", "layer2", "layer3")

    def __init__(self, *, in_channels: int, num_classes: int, depth: int, widths: tuple[int, ...] = (16, 16, 32, 64)):
        super().__init__()
        blocks = blocks_per_stage(depth, 2)
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = stack_blocks(BasicBlock, widths[0], widths[1], 1, blocks)
        self.layer2 = stack_blocks(BasicBlock, widths[1], widths[2], 2, blocks)
        self.layer3 = stack_blocks(BasicBlock, widths[2], widths[3], 2, blocks)
        self.fc = nn.Linear(widths[3], num_classes)
        initialise_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


resnet8 = partial(ResNet, depth=8)
resnet14 = partial(ResNet, depth=14)
resnet20 = partial(ResNet, depth=20)
resnet32 = partial(ResNet, depth=32)
resnet44 = partial(ResNet, depth=44)
resnet56 = partial(ResNet, depth=56)
resnet110 = partial(ResNet, depth=110)
resnet8x4 = partial(ResNet, depth=8, widths=(32, 64, 128, 256))
resnet32x4 = partial(ResNet, depth=32, widths=(32, 64, 128, 256))
