"""Slimmable networks (Yu et al., ICLR 2019): one set of weights that runs at several widths."""

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
    """Ascending fractions in (0, 1] that end with 1; also as one number or as text. Raises TypeError or ValueError."""
    takes = "ascending fractions in (0, 1] that end with 1, as 0.25,0.5,0.75,1"
    found = check_fractions(name, widths, takes)
    if not found or found[0] <= 0 or found[-1] != 1 or any(a >= b for a, b in pairwise(found)):
        raise ValueError(f"{name} must be {takes}, got {brief(widths)}")
    return found


class Slimmable(nn.Module):
    """A network that runs at several widths; `slimmable` makes it. It starts at the whole width.

    `network` has the type and the layers' names of the module that it was made of, its parameters and buffers too; those
    of the narrow widths' normalisations lie beside them, f"{layer}.narrow.{i}". The width in use is no part of the state.
    """

    def __init__(self, network: nn.Module, widths: tuple[float, ...]):
        """`network`: its layers are those of this file."""
        super().__init__()
        self.network = network
        self.widths = widths
        self.use(widths[-1])

    @property
    def width(self) -> float:
        """The width in use, one of `widths`."""
        return self.widths[self._at]

    def use(self, width: float) -> None:
        """Every forward pass from now on is at this width. Raises ValueError where it is none of `widths`."""
        if width not in self.widths:
            raise ValueError(f"width must be one of {', '.join(map(str, self.widths))}, got {brief(width)}")
        self._at = self.widths.index(width)
        for layer in self.network.modules():
            if isinstance(layer, tuple(SLIMMABLE.values())):
                layer.at = self._at

    def forward(self, *args: object, **kwargs: object) -> object:
        """What the network gives at the width in use."""
        return self.network(*args, **kwargs)

    @property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """Of every layer that slices its weight how many channels it has at each width, by its path."""
        return {path: layer.outputs for path, layer in self.network.named_modules() if hasattr(layer, "outputs")}

    def zero_of_others(self, widths: Sequence[float]) -> Tensor | float:
        """0 with gradient 0 for the normalisations of all other narrow widths, ().

        Several processes that draw different widths so need not wait for a gradient that one of them does not have.
        """
        others = [i for i, width in enumerate(self.widths[:-1]) if width not in widths]
        norms = [layer.narrow for layer in self.network.modules() if isinstance(layer, _Normalisation)]
        parameters = [p.flatten() for narrow in norms for i in others for p in narrow[i].parameters()]
        return torch.cat(parameters).sum() * 0 if parameters else 0.0


def slimmable(module: nn.Module, widths: Sequence[float] | float | str) -> Slimmable:
    """A copy of a network that runs at several widths and shares its weights among them.

    At width w a layer of `out` channels has ceil(w * out) of them, rounded up to a multiple of the least common multiple of
    the group counts of all grouped convolutions (depthwise ones do not count), and at most `out`. It slices its weight to the
    channels it is given: [:out, :in], within every group where it has groups. So a residual sum, a concatenation or a
    flattening fits where those of the rounded numbers do, and the first layer sees all of the input. A depthwise
    convolution has as many channels as it is given, times its multiplier. The last `torch.nn.Linear` of `named_modules()`
    keeps all its outputs. Every batch normalisation has weight, bias and running statistics of its own for every width, of
    full size of which the first channels are used, at first all equal to the module's.

    At width 1 it computes what the module does, bit for bit.

    Args:
        module: Conv2d, Linear, BatchNorm1d and BatchNorm2d, of exactly these types, and whatever has no parameters. It is
            not touched. `momentum=None`, `affine=False` and `track_running_stats=False` mean what they do in torch.
        widths: ascending fractions in (0, 1], the last of them 1.

    Raises:
        TypeError: `module` is no `torch.nn.Module`, or `widths` no numbers.
        ValueError: a width is out of range; a layer is of another type, or of TorchScript; there is no linear layer.
            At a forward pass: a grouped convolution is given a number of channels that its groups do not divide.
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
            f"module must have a torch.nn.Linear, which gives the logits at every width: {type(module).__name__} has none"
        )
    convolutions = [layer for layer in layers.values() if isinstance(layer, nn.Conv2d)]
    multiple = math.lcm(*(layer.groups for layer in convolutions if not _is_depthwise(layer)))
    for path, layer in layers.items():
        if isinstance(layer, _NormBase):
            narrow = nn.ModuleList(copy.deepcopy(layer) for _ in widths[:-1])
            layer.__class__ = SLIMMABLE[type(layer)]  # keeps name, mode and hooks, and stays what it was for isinstance
            layer.narrow = narrow
            continue
        out = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        layer.__class__ = SLIMMABLE[type(layer)]
        layer.path = path
        layer.outputs = tuple(out if layer is linear[-1] else _outputs(width, out, multiple) for width in widths)
    return Slimmable(network, widths)


def _outputs(width: float, out: int, multiple: int) -> int:
    """0.7 of 10 channels are 7, though 0.7 * 10 may be a little more in floating point."""
    rounded_up = max(1, math.ceil(round(width * out, 9)))
    return min(out, -(-rounded_up // multiple) * multiple)


def _is_depthwise(layer: nn.Conv2d) -> bool:
    return layer.groups == layer.in_channels > 1


def _check_layer(path: str, layer: nn.Module) -> None:
    """Raises ValueError where the layer itself, without those inside it, cannot be made narrower."""
    own = dict(layer.named_parameters(recurse=False))
    if type(layer) in SLIMMABLE:
        # Other names and types are what pruning, parametrisations or sharding have put in their place.
        named = own.keys() <= {"weight", "bias"} and ("weight" in own or isinstance(layer, _NormBase))
        fits = named and all(type(parameter) is nn.Parameter for parameter in own.values())
    else:
        statistics = isinstance(layer, _NormBase) and layer.track_running_stats
        fits = not own and not statistics and not isinstance(layer, torch.jit.ScriptModule)
    if fits:
        return
    shapes = {name: tuple(x.shape) if type(x) is nn.Parameter else type(x).__name__ for name, x in own.items()}
    had = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "nothing that can be sliced"
    raise ValueError(
        f"module cannot be made slimmable: its layer {path!r}, a {type(layer).__name__} with {had}, is none of "
        f"{', '.join(kind.__name__ for kind in SLIMMABLE)} with their own parameters, nor without any"
    )


class _Convolution(nn.Conv2d):
    """`outputs`: channels at every width; `at`: which of them; `path`: the layer's name, for errors."""

    def forward(self, x: Tensor) -> Tensor:
        if self.at == len(self.outputs) - 1:
            return super().forward(x)
        given = x.shape[-3]
        if given > self.in_channels or (not _is_depthwise(self) and given % self.groups):
            raise ValueError(
                f"layer {self.path!r}, a Conv2d of {self.groups} groups with weight {tuple(self.weight.shape)}, is given "
                f"{given} channels at a narrow width: it takes a multiple of its groups, at most {self.in_channels}"
            )
        groups, bias = self.groups, self.bias
        if _is_depthwise(self):
            groups = given
            weight = self.weight[: self.out_channels // self.in_channels * given]
            bias = None if bias is None else bias[: len(weight)]
        else:
            out = self.outputs[self.at] // groups
            weight = self.weight.unflatten(0, (groups, -1))[:, :out, : given // groups].flatten(0, 1)
            bias = None if bias is None else bias.unflatten(0, (groups, -1))[:, :out].flatten()
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = functional.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return functional.conv2d(x, weight, bias, self.stride, padding, self.dilation, groups)


class _Linear(nn.Linear):
    """As `_Convolution`."""

    def forward(self, x: Tensor) -> Tensor:
        if self.at == len(self.outputs) - 1:
            return super().forward(x)
        out = self.outputs[self.at]
        return functional.linear(x, self.weight[:out, : x.shape[-1]], None if self.bias is None else self.bias[:out])


class _Normalisation:
    """What every width normalises by: at the whole one the layer itself, else one of `narrow`, chosen by `at`."""

    def forward(self, x: Tensor) -> Tensor:
        if self.at == len(self.narrow):
            return super().forward(x)
        self._check_input_dim(x)
        norm, momentum = self.narrow[self.at], self.momentum
        mean, variance = norm.running_mean, norm.running_var
        by_batch = self.training or mean is None
        if self.training and not self.track_running_stats:
            mean = variance = None
        elif self.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if momentum is None:  # the mean of all batches, as in torch
                momentum = 1 / float(norm.num_batches_tracked)
        first = (None if part is None else part[: x.shape[1]] for part in (mean, variance, norm.weight, norm.bias))
        return functional.batch_norm(x, *first, by_batch, momentum or 0.0, self.eps)


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
