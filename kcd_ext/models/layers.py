"""What several families share: rows of blocks, shortcuts, the shuffle of channels and the weights of convolutions."""

from collections.abc import Callable

from torch import Tensor, nn

from ..checks import check_int


def blocks_of(depth: int, outside: int) -> int:
    """How many blocks of two convolutions each of three stages has, in a network of `depth` layers.

    `outside` layers are in no block. Raises TypeError or ValueError where it is no whole number >= 1.
    """
    blocks, rest = divmod(check_int("depth", depth, 6 + outside) - outside, 6)
    if rest:
        raise ValueError(f"depth must be 6 n + {outside} for a whole n >= 1, got {depth}")
    return blocks


def row(
    block: Callable[[int, int, int], nn.Module], in_channels: int, out_channels: int, stride: int, count: int
) -> nn.Sequential:
    """`count` blocks(in_channels, out_channels, stride), of which only the first changes channels and size."""
    first = block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(block(out_channels, out_channels, 1) for _ in range(count - 1)))


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """What a residual block adds its input through: nothing, or a 1x1 convolution where the shapes differ."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


def shuffle(x: Tensor, groups: int) -> Tensor:
    """(b, c, h, w) -> the same: one channel of every group in turn (Zhang et al., 2018, Fig. 1)."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def initialise_convolutions(network: nn.Module) -> None:
    """In place: normal weights of variance 2 / (out_channels * kernel area) (He et al., 2015), biases 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def initialise_linear(linear: nn.Linear) -> None:
    """In place: normal weights of standard deviation 0.01, bias 0."""
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
