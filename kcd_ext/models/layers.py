"""Parts that several network families share: block sequences, shortcuts, channel shuffle and initialisation."""

from collections.abc import Callable

from torch import Tensor, nn

from ..checks import check_int


def blocks_per_stage(depth: int, extra_layers: int) -> int:
    """Return the number of two-convolution blocks in each of three stages of a network of `depth` layers.

    Args:
        depth: Total number of layers.
        extra_layers: Layers outside the blocks.

    Raises:
        TypeError: `depth` is not an integer.
        ValueError: The number is not an integer >= 1.
    """
    blocks, rest = divmod(check_int("depth", depth, 6 + extra_layers) - extra_layers, 6)
    if rest:
        raise ValueError(f"depth must be 6 n + {extra_layers} for an integer n >= 1, got {depth}")
    return blocks


def stack_blocks(
    block: Callable[[int, int, int], nn.Module], in_channels: int, out_channels: int, stride: int, count: int
) -> nn.Sequential:
    """Return `count` blocks, each `block(in_channels, out_channels, stride)`; only the first changes channels and size."""
    first = block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(block(out_channels, out_channels, 1) for _ in range(count - 1)))


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Return the shortcut of a residual block: the identity, or a 1x1 convolution if the shapes differ."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Return `(b, c, h, w)` with interleaved channels, one of every group in turn (Zhang et al., 2018, Fig. 1)."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def initialise_convolutions(network: nn.Module) -> None:
    """Initialise in place: normal weights of variance 2 / (out_channels * kernel area) (He et al., 2015), biases 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def initialise_linear(linear: nn.Linear) -> None:
    """Initialise in place: normal weights of standard deviation 0.01, bias 0."""
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
