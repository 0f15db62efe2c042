"""Two plain convolutional networks for images of 8 to 32 pixels a side: the demo's teacher and student."""

from torch import nn


def _convolution(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def cnn(in_channels: int, num_classes: int, widths: tuple[int, ...], strides: tuple[int, ...]) -> nn.Sequential:
    """Return a network of 3x3 convolutions, global average pooling and one linear layer.

    It maps `(b, c, h, w)` to logits `(b, classes)`. A stage ends before the next stride, after the activation.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of logits.
        widths: Output channels of every convolution.
        strides: Stride of every convolution.
    """
    before = (in_channels, *widths[:-1])
    convolutions = [_convolution(a, b, s) for a, b, s in zip(before, widths, strides, strict=True)]
    network = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))
    network.stages = tuple(str(i) for i, following in enumerate((*strides[1:], 2)) if following > 1)
    return network


def cnn_large(*, in_channels: int, num_classes: int) -> nn.Sequential:
    """Return the demo's teacher: five convolutions, 35674 parameters for one channel and ten classes."""
    return cnn(in_channels, num_classes, widths=(16, 16, 32, 32, 64), strides=(2, 1, 2, 1, 1))


def cnn_small(*, in_channels: int, num_classes: int) -> nn.Sequential:
    """Return the demo's student: three convolutions, 1702 parameters for one channel and ten classes."""
    return cnn(in_channels, num_classes, widths=(4, 8, 16), strides=(2, 2, 1))
