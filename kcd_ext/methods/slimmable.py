"""Slimmable networks (Yu et al., ICLR 2019): one set of weights, run at several widths."""

import copy
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase

from ..checks import check_fractions
from ..describe import brief
from ..networks import check_network


def check_widths(name: str, widths: Sequence[float] | float | str) -> tuple[float, ...]:
    """Return ascending fractions in (0, 1] that end with 1, given as a sequence, one number or text.

    Raises TypeError or ValueError for anything else.
    """
    takes = "ascending fractions in (0, 1] that end with 1, such as 0.25,0.5,0.75,1"
    fractions = check_fractions(name, widths, takes)
    if not fractions or fractions[0] <= 0 or fractions[-1] != 1 or any(a >= b for a, b in pairwise(fractions)):
        raise ValueError(f"{name} must be {takes}, got {brief(widths)}")
    return fractions


class Slimmable(nn.Module):
    """A network that runs at several widths, built by `slimmable`. It starts at full width.

    `network` keeps the type, layer names, parameters and buffers of the original module. The normalisations of the narrow
    widths are added as f"{layer}.narrow.{i}". The current width is not part of the state.
    """

    def __init__(self, network: nn.Module, widths: tuple[float, ...]):
        """Wrap `network`, whose layers are already the slimmable ones, the values of `SLIMMABLE`."""
        super().__init__()
        self.network = network
        self.widths = widths
        self.set_width(widths[-1])

    @property
    def width(self) -> float:
        """The current width, one of `widths`."""
        return self.widths[self._index]

    def set_width(self, width: float) -> None:
        """Run all further forward passes at this width. Raises ValueError if it is not in `widths`."""
        if width not in self.widths:
            raise ValueError(f"width must be one of {', '.join(map(str, self.widths))}, got {brief(width)}")
        self._index = self.widths.index(width)
        for layer in self.network.modules():
            if isinstance(layer, tuple(SLIMMABLE.values())):
                layer.width_index = self._index

    def forward(self, *args: object, **kwargs: object) -> object:
        """Return the network's output at the current width."""
        return self.network(*args, **kwargs)

    @property
    def channels(self) -> dict[str, tuple[int, ...]]:
        """The number of output channels at each width, for the path of every layer that slices its weight."""
        return {
            path: layer.width_channels
            for path, layer in self.network.named_modules()
            if hasattr(layer, "width_channels")
        }

    def zero_for_other_widths(self, widths: Sequence[float]) -> Tensor | float:
        """Return 0 (), with gradient 0 for the normalisations of all narrow widths that are not in `widths`.

        Adding it to the loss gives every parameter a gradient on every rank, even if the ranks draw different widths. So no
        rank waits for a gradient that another one does not have.
        """
        others = [i for i, width in enumerate(self.widths[:-1]) if width not in widths]
        norms = [layer.narrow for layer in self.network.modules() if isinstance(layer, _Normalisation)]
        parameters = [p.flatten() for narrow in norms for i in others for p in narrow[i].parameters()]
        return torch.cat(parameters).sum() * 0 if parameters else 0.0


def slimmable(module: nn.Module, widths: Sequence[float] | float | str) -> Slimmable:
    """Copy a network so that it runs at several widths and shares its weights among them.

    At width 1 the copy computes the same bits as the module. At width w:

    - A layer with `out` channels keeps ceil(w * out) of them, rounded up to a multiple of the least common multiple of the
      group counts of all grouped convolutions (depthwise ones do not count), at most `out`.
    - It slices its weight to the channels that it receives: [:out, :in], within each group if it has groups. So residual
      sums, concatenations and flattenings fit if the rounded numbers do, and the first layer sees the full input.
    - A depthwise convolution keeps as many channels as it receives, times its multiplier.
    - The last `torch.nn.Linear` in `named_modules()` keeps all its outputs.
    - Each batch normalisation has its own weight, bias and running statistics for each width. They have full size, the first
      channels are used, and all start equal to the module's.

    Args:
        module: May contain Conv2d, Linear, BatchNorm1d and BatchNorm2d, of exactly these types, and layers without
            parameters. It is not modified. `momentum=None`, `affine=False` and `track_running_stats=False` mean what they
            do in torch.
        widths: Ascending fractions in (0, 1], the last one 1.

    Raises:
        TypeError: `module` is not a `torch.nn.Module`, or `widths` are not numbers.
        ValueError: A width is out of range; a layer has another type or is TorchScript; there is no linear layer. In a
            forward pass: a grouped convolution receives a number of channels that its groups do not divide.
    """
    widths = check_widths("widths", widths)
    check_network("module", module)
    for path, layer in module.named_modules():
        _check_layer(path, layer)
    network = copy.deepcopy(module)
    layers = {path: layer for path, layer in network.named_modules() if type(layer) in SLIMMABLE}
    linear = [layer for layer in layers.values() if isinstance(layer, nn.Linear)]
    if not linear:
        raise ValueError(
            f"module must have a torch.nn.Linear, which computes the logits at every width: {type(module).__name__} has none"
        )
    convolutions = [layer for layer in layers.values() if isinstance(layer, nn.Conv2d)]
    multiple = math.lcm(*(layer.groups for layer in convolutions if not _is_depthwise(layer)))
    for path, layer in layers.items():
        if isinstance(layer, _NormBase):
            narrow = nn.ModuleList(copy.deepcopy(layer) for _ in widths[:-1])
            layer.__class__ = SLIMMABLE[type(layer)]  # keeps name, mode and hooks; isinstance still holds
            layer.narrow = narrow
            continue
        out = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        layer.__class__ = SLIMMABLE[type(layer)]
        layer.path = path
        layer.width_channels = tuple(
            out if layer is linear[-1] else _channels(width, out, multiple) for width in widths
        )
    return Slimmable(network, widths)


def _channels(width: float, out: int, multiple: int) -> int:
    # Rounded first: 0.7 of 10 channels are 7, though 0.7 * 10 may be a little more in floating point.
    rounded_up = max(1, math.ceil(round(width * out, 9)))
    return min(out, -(-rounded_up // multiple) * multiple)


def _is_depthwise(layer: nn.Conv2d) -> bool:
    return layer.groups == layer.in_channels > 1


def _check_layer(path: str, layer: nn.Module) -> None:
    """Raise ValueError if the layer itself, without its children, cannot be made narrower."""
    own = dict(layer.named_parameters(recurse=False))
    if type(layer) in SLIMMABLE:
        # Pruning, parametrisations and sharding replace the parameters by others.
        named = own.keys() <= {"weight", "bias"} and ("weight" in own or isinstance(layer, _NormBase))
        fits = named and all(type(parameter) is nn.Parameter for parameter in own.values())
    else:
        statistics = isinstance(layer, _NormBase) and layer.track_running_stats
        fits = not own and not statistics and not isinstance(layer, torch.jit.ScriptModule)
    if fits:
        return
    shapes = {name: tuple(x.shape) if type(x) is nn.Parameter else type(x).__name__ for name, x in own.items()}
    found = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "nothing that can be sliced"
    raise ValueError(
        f"module cannot be made slimmable: its layer {path!r}, a {type(layer).__name__} with {found}, must be one of "
        f"{', '.join(kind.__name__ for kind in SLIMMABLE)} with plain parameters, or have no parameters"
    )


class _Convolution(nn.Conv2d):
    """A convolution with `width_channels` at each width, the current `width_index`, and `path`, its name in errors."""

    def forward(self, x: Tensor) -> Tensor:
        if self.width_index == len(self.width_channels) - 1:
            return super().forward(x)
        in_channels = x.shape[-3]
        if in_channels > self.in_channels or (not _is_depthwise(self) and in_channels % self.groups):
            raise ValueError(
                f"layer {self.path!r}, a Conv2d of {self.groups} groups with weight {tuple(self.weight.shape)}, receives "
                f"{in_channels} channels at a narrow width: it takes a multiple of its groups, at most {self.in_channels}"
            )
        groups, bias = self.groups, self.bias
        if _is_depthwise(self):
            groups = in_channels
            weight = self.weight[: self.out_channels // self.in_channels * in_channels]
            bias = None if bias is None else bias[: len(weight)]
        else:
            out = self.width_channels[self.width_index] // groups
            weight = self.weight.unflatten(0, (groups, -1))[:, :out, : in_channels // groups].flatten(0, 1)
            bias = None if bias is None else bias.unflatten(0, (groups, -1))[:, :out].flatten()
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = functional.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return functional.conv2d(x, weight, bias, self.stride, padding, self.dilation, groups)


class _Linear(nn.Linear):
    """A linear layer with the attributes of `_Convolution`."""

    def forward(self, x: Tensor) -> Tensor:
        if self.width_index == len(self.width_channels) - 1:
            return super().forward(x)
        out = self.width_channels[self.width_index]
        return functional.linear(x, self.weight[:out, : x.shape[-1]], None if self.bias is None else self.bias[:out])


class _Normalisation:
    """A normalisation by the layer itself at full width, else by the entry of `narrow` for the current `width_index`."""

    def forward(self, x: Tensor) -> Tensor:
        if self.width_index == len(self.narrow):
            return super().forward(x)
        self._check_input_dim(x)
        norm, momentum = self.narrow[self.width_index], self.momentum
        mean, variance = norm.running_mean, norm.running_var
        use_batch_statistics = self.training or mean is None
        if self.training and not self.track_running_stats:
            mean = variance = None
        elif self.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if momentum is None:  # average over all batches, as in torch
                momentum = 1 / float(norm.num_batches_tracked)
        first_channels = (
            None if part is None else part[: x.shape[1]] for part in (mean, variance, norm.weight, norm.bias)
        )
        return functional.batch_norm(x, *first_channels, use_batch_statistics, momentum or 0.0, self.eps)


class _Normalisation1d(_Normalisation, nn.BatchNorm1d):
    pass


class _Normalisation2d(_Normalisation, nn.BatchNorm2d):
    pass


SLIMMABLE = {
    nn.Conv2d: _Convolution,
    nn.Linear: _Linear,
    nn.BatchNorm1d: _Normalisation1d,
    nn.BatchNorm2d: _Normalisation2d,
}
