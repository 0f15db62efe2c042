"""The features that methods compare networks by: what goes into a layer of any network, or comes out, caught as it trains.

(For maps of every stage of this package's own networks there is `kcd_ext.models.features`.)
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checks import check_fraction
from ..describe import describe
from ..networks import evaluation_mode, no_hook
from .protocol import Batch, Method

SMALLEST_LENGTH = 1e-7  # added to a row's length before the row is divided by it, as in the published code of PKT


class LayerError(ValueError, RuntimeError):
    """A tapped layer was not passed, or had other features than are wanted: which is found out when the network runs."""


class Tap:
    """Catches what goes into one layer of a network, or what comes out of it, by a hook on the layer alone.

    The network is not edited. A copy of it (`copy.deepcopy`, pickle) carries a hook that does nothing, and what is
    compiled of it afterwards (`torch.compile`) or wrapped around it passes the layer all the same. Where a layer is
    passed more than once, the last time counts. Between `take` and the next `listen` nothing is caught: what passes then, as
    in a validation, is not held.

    Args:
        network: what is tapped.
        path: the layer's name in `network.named_modules()`. None or "": the last `torch.nn.Linear` in their order,
            the classifier, whose input are the penultimate features.
        name: what to call the network in errors; the option that sets `path` is f"{name}_layer".
        output: whether what comes out of the layer is caught.

    Raises:
        ValueError: there is no such layer, or it is of TorchScript, which takes no hooks.
    """

    def __init__(self, network: nn.Module, path: str | None, name: str, output: bool = False):
        self._name = name
        self.path, layer = _layer(network, path, name)
        self._catch = _Catch()
        self._hook = (layer.register_forward_hook if output else layer.register_forward_pre_hook)(self._catch)

    def through(self, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """The network's output for x, and the features (b, d) on the way there: a layer's input (b, ...), flattened.

        `network` is the one that was tapped, or something around it. Raises RuntimeError where it does not pass the
        layer, or passes it without a tensor of at least two dimensions.
        """
        self.listen()
        return network(x), self.take()

    def take(self) -> Tensor:
        """The features (b, d) of the last forward pass, which are forgotten here. Raises as `through` does."""
        features = self._take()
        self._catch.listening = False
        if not isinstance(features, Tensor) or features.dim() < 2:
            raise LayerError(
                f"{self._told(features)}: set {self._name}_layer to a layer whose input is a tensor of features (b, ...)"
            )
        return features.flatten(1)

    def take_map(self) -> Tensor:
        """The features (b, c, h, w) of the last forward pass, which are forgotten here. Raises RuntimeError for any others."""
        features = self._take()
        self._catch.listening = False
        if not isinstance(features, Tensor) or features.dim() != 4:
            raise LayerError(f"{self._told(features)}: it must be one whose features are maps (b, c, h, w)")
        return features

    def listen(self) -> None:
        """Before a forward pass that is to be caught. Lets go of what an earlier one left."""
        self._catch.caught, self._catch.listening = None, True

    def _take(self) -> object:
        """What was caught, whatever it is; goes on listening. Raises RuntimeError where it is no longer what it was then."""
        features, self._catch.caught = self._catch.caught, None
        if features is not None and self._catch.version is not None and features._version != self._catch.version:
            raise LayerError(
                f"the {self._name}'s layer {self.path!r} had its features changed in place by what came after it: name that "
                f"layer (or inplace=False there)"
            )
        return features

    def _told(self, features: object) -> str:
        got = "was not passed" if features is None else f"had {describe(features)}"
        return f"the {self._name}'s layer {self.path!r} {got} in its forward pass"

    def remove(self) -> None:
        """Takes the hook off."""
        self._hook.remove()
        self._catch.caught = None


class _Catch:
    """The hook. It is an object of its own so that a copy of the network does not copy what it caught."""

    def __init__(self):
        self.listening = True
        self.caught = self.version = None

    def __call__(self, module: nn.Module, arguments: tuple, *output: object) -> None:
        if self.listening:
            self.caught = output[0] if output else arguments[0] if arguments else None
            self.version = _version(self.caught)

    def __reduce__(self):
        return no_hook, ()


def _version(x: object) -> int | None:
    """How often a tensor has been changed in place; None where nobody counts, as in compiled code, which changes copies."""
    counted = isinstance(x, Tensor) and not torch.compiler.is_compiling() and not x.is_inference()
    return x._version if counted else None


def _layer(network: nn.Module, path: str | None, name: str) -> tuple[str, nn.Module]:
    layers = dict(network.named_modules())
    _check_takes_hooks(network, name)
    if path:
        if path not in layers:
            raise ValueError(f"{name}_layer must be a name in {name}.named_modules(), which has no {path!r}")
        _check_takes_hooks(layers[path], name)
        return path, layers[path]
    linear = [(found, layer) for found, layer in layers.items() if isinstance(layer, nn.Linear)]
    if not linear:
        raise ValueError(
            f"the {name} has no torch.nn.Linear, whose input its features would be: set {name}_layer to a name in "
            f"{name}.named_modules()"
        )
    return linear[-1]


def _check_takes_hooks(module: nn.Module, name: str) -> None:
    """TorchScript refuses hooks, or never calls them."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"the {name}'s features cannot be had of TorchScript ({type(module).__name__}), which takes no hooks: give "
            f"the torch.nn.Module that it was made of"
        )


def stages_of(network: nn.Module) -> tuple[str, ...]:
    """Return the names of a network's stages; of one without any (other libraries call other things so), none."""
    stages = getattr(network, "stages", ())
    named = isinstance(stages, tuple | list) and all(isinstance(path, str) for path in stages)
    return tuple(stages) if named else ()


def check_layer(name: str, layer: str | None) -> str | None:
    """A layer's name, or None; raises TypeError."""
    if layer is not None and not isinstance(layer, str):
        raise TypeError(f"{name} must be a name in named_modules(), or None, got {type(layer).__name__}")
    return layer


class FeatureMethod(Method):
    """A method that compares features: it taps both networks from `prepare` to `release`.

    Args:
        student_layer, teacher_layer: see `Tap`, `path`.
        batch_keep: the fraction of every batch that the teacher is asked about, in (0, 1].

    After `prepare`, `student_width` and `teacher_width` are the features' numbers of dimensions.
    """

    def __init__(self, student_layer: str | None = None, teacher_layer: str | None = None, batch_keep: float = 1.0):
        super().__init__()
        self.student_layer = check_layer("student_layer", student_layer)
        self.teacher_layer = check_layer("teacher_layer", teacher_layer)
        self.batch_keep = check_fraction("batch_keep", batch_keep)
        self._taps: dict[str, Tap] = {}

    def prepare(self, student: nn.Module, teacher: nn.Module | None, samples: Iterable[Batch]) -> None:
        """Taps both networks and sends one sample through them, in evaluation mode and without gradients.

        Raises ValueError where a layer does not exist, RuntimeError where it is not passed.
        """
        self.release()
        x = self.input_of(next(iter(samples)).x[:1])
        self.student_width = self.probe("student", student, x)[1].shape[1]
        self.teacher_width = self.probe("teacher", teacher, x)[1].shape[1]

    def tap(self, network: nn.Module, path: str | None, name: str) -> Tap:
        """What catches the network's features from then on; see `Tap`."""
        return Tap(network, path, name)

    def probe(self, name: str, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Taps the network and sends x through it, in evaluation mode and without gradients: logits and features."""
        self._taps[name] = self.tap(network, getattr(self, f"{name}_layer"), name)
        with evaluation_mode(network), torch.no_grad():
            return self._through(name, network, x)

    def input_of(self, x: Tensor) -> Tensor:
        """What the networks are given for a batch's x."""
        return x

    def student_forward(self, student: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (b, classes) and features (b, d), both differentiable."""
        return self._through("student", student, x)

    def teacher_forward(self, teacher: nn.Module | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (b, classes) and features (b, d), both constants; after `prepare`, d is at least `teacher_width`.

        A teacher may have fewer features by then, as the partial ones of `pwkd`: zeros take the place of the last ones.
        """
        with torch.no_grad():
            logits, features = self._through("teacher", teacher, x)
        missing = self.teacher_width - features.shape[1]
        fill = (*(0, 0) * (features.dim() - 2), 0, missing)
        return logits, functional.pad(features, fill) if missing > 0 else features

    ask_student, ask_teacher = student_forward, teacher_forward  # the names that methods written before use

    def _through(self, name: str, network: nn.Module | None, x: Tensor) -> tuple[Tensor, Tensor]:
        if name not in self._taps:
            raise RuntimeError(f"{type(self).__name__} needs prepare(student, teacher, samples) before it is called")
        return self._taps[name].through(network, x)

    def release(self) -> None:
        """Takes the hooks off the networks."""
        while self._taps:
            self._taps.popitem()[1].remove()


def full_precision(like: Tensor) -> torch.autocast:
    """Inside, autocast is off on the device of `like`: products of small differences need float32."""
    return torch.autocast(like.device.type, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    """Return x, in float32 where its dtype has fewer digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit_rows(x: Tensor, offset: float = SMALLEST_LENGTH) -> Tensor:
    """x (r, d) with every row divided by its length + offset, so that products of rows are cosines; at least float32.

    offset: >= 0. A row of zeros has no direction: it stays zeros, and passes no gradient. Lengths beyond the range of squares in
    float32 are no trouble; a row that holds an infinity or a NaN becomes NaN.
    """
    x = at_least_float32(x)
    largest = x.detach().abs().amax(1, keepdim=True)
    zero = largest == 0
    scale = largest.masked_fill(zero, 1)  # cancels: it only keeps the squares in range
    x = x / scale
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True).masked_fill(zero, 1)
    return (x / (length + offset / scale)).masked_fill(zero, 0)
