"""ResNet-50 (He et al., 2016) for images of 32x32: its stem is a 3x3 convolution without stride and pooling.

Layers and parameter names are those of `ResNet50` in the RepDistiller comparison (Tian et al., 2020), so its
checkpoints load.
"""

from torch import Tensor, nn
from torch.nn import functional

from .layers import initialise_convolutions, shortcut, stack_blocks


class Bottleneck(nn.Module):
    """1x1 to a quarter of the channels, 3x3, 1x1, parallel to a shortcut; the output is after the activation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        hidden = out_channels // 4
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        return functional.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class ResNet50(nn.Module):
    """A convolution, four stages of 3, 4, 6 and 3 blocks and one linear layer: `(b, c, h, w)` to logits `(b, classes)`.

    The stages have full, half, quarter and eighth size, all after the activation.
    """

    stages = ("layer1", "layer2", "layer3", "layer4")

    def __init__(self, *, in_channels: int, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = stack_blocks(Bottleneck, 64, 256, 1, 3)
        self.layer2 = stack_blocks(Bottleneck, 256, 512, 2, 4)
        self.layer3 = stack_blocks(Bottleneck, 512, 1024, 2, 6)
        self.layer4 = stack_blocks(Bottleneck, 1024, 2048, 2, 3)
        self.linear = nn.Linear(2048, num_classes)
        initialise_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(x.mean((2, 3)))


resnet50 = ResNet50
