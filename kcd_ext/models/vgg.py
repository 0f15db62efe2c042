"""VGG with batch normalisation (Simonyan and Zisserman, 2015) for images of 32x32: one linear layer instead of three.

Layers and parameter names are those of the RepDistiller comparison (Tian et al., 2020), so its checkpoints load.
"""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from .layers import initialise_convolutions, initialise_linear


class VGG(nn.Module):
    """Five blocks of 3x3 convolutions and one linear layer: `(b, c, h, w)` to logits `(b, classes)`.

    Images need at least 8 pixels a side: pooling halves them after each of the first three blocks. The first block is the
    stem and not in `stages`. The outputs of the others, after the activation, have a half, a quarter, an eighth and an
    eighth of the image's size.
    """

    stages = ("block1", "block2", "block3", "block4")

    def __init__(self, *, in_channels: int, num_classes: int, convolutions: tuple[int, ...]):
        super().__init__()
        self.block0 = _stage(in_channels, 64, convolutions[0])
        self.block1 = _stage(64, 128, convolutions[1])
        self.block2 = _stage(128, 256, convolutions[2])
        self.block3 = _stage(256, 512, convolutions[3])
        self.block4 = _stage(512, 512, convolutions[4])
        self.classifier = nn.Linear(512, num_classes)
        initialise_convolutions(self)
        initialise_linear(self.classifier)

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.block0, self.block1, self.block2):
            x = functional.max_pool2d(block(x), 2)
        x = self.block4(self.block3(x))
        return self.classifier(x.mean((2, 3)))


def _stage(in_channels: int, out_channels: int, convolutions: int) -> nn.Sequential:
    layers = []
    for channels in (in_channels, *[out_channels] * (convolutions - 1)):
        layers += [nn.Conv2d(channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*layers)


vgg8 = partial(VGG, convolutions=(1, 1, 1, 1, 1))
vgg11 = partial(VGG, convolutions=(1, 1, 2, 2, 2))
vgg13 = partial(VGG, convolutions=(2, 2, 2, 2, 2))
vgg16 = partial(VGG, convolutions=(2, 2, 3, 3, 3))
vgg19 = partial(VGG, convolutions=(2, 2, 4, 4, 4))
