"""MobileNetV2 (Sandler et al., 2018) at half width for images of 32x32.

Layers and parameter names are those of `mobile_half` in the RepDistiller comparison (Tian et al., 2020), so its
checkpoints load. Differences from the paper: the second stage of blocks keeps the size, the first block has its first
1x1 convolution although it does not expand, the activation is ReLU instead of ReLU6, and there is no dropout.
"""

from functools import partial

from torch import Tensor, nn

from .layers import initialise_convolutions, initialise_linear, stack_blocks

# expansion, output channels, blocks, stride of the first block
BLOCKS = (
    (1, 8, 1, 1),
    (6, 12, 2, 1),
    (6, 16, 3, 2),
    (6, 32, 4, 2),
    (6, 48, 3, 1),
    (6, 80, 3, 2),
    (6, 160, 1, 1),
)


class InvertedResidual(nn.Module):
    """An inverted residual: 1x1 to `expansion` times the channels, 3x3 depthwise, 1x1 back, no final activation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, expansion: int):
        super().__init__()
        hidden = expansion * in_channels
        self.residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2: `(b, c, h, w)` to logits `(b, classes)`.

    The stages have a half, a quarter, an eighth and a sixteenth of the size. The first three are linear bottlenecks,
    without activation. The last is after the activation, because that map is pooled.
    """

    stages = ("blocks.1", "blocks.2", "blocks.4", "conv2")

    def __init__(self, *, in_channels: int, num_classes: int):
        super().__init__()
        channels = 16
        self.conv1 = _convolution(in_channels, channels, 3, stride=2, padding=1)
        blocks = []
        for expansion, out_channels, count, stride in BLOCKS:
            blocks.append(
                stack_blocks(partial(InvertedResidual, expansion=expansion), channels, out_channels, stride, count)
            )
            channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = _convolution(channels, 1280, 1)
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))  # a Sequential because checkpoints name it so
        initialise_convolutions(self)
        initialise_linear(self.classifier[0])

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.blocks(self.conv1(x)))
        return self.classifier(x.mean((2, 3)))


def _convolution(in_channels: int, out_channels: int, size: int, **options: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, size, **options, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


mobilenet_v2 = MobileNetV2
