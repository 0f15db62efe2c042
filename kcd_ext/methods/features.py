"""The features that methods compare: the input or output of a layer of any network, captured by a hook during a forward pass.

(For the maps of every stage of this package's own networks, use `kcd_ext.models.features`.)
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checks import check_fraction
from ..describe import brief, describe
from ..networks import evaluation_mode, no_hook
from .protocol import Batch, Method

LAYERS_EXAMPLE = "layer1,layer2"  # for error messages
LENGTH_OFFSET = 1e-7  # added to a row's length before the row is divided by it, as in the published code of PKT


class LayerError(ValueError, RuntimeError):
    """The error for a tapped layer that did not run or whose features have the wrong shape. Raised when the network runs."""


class Tap:
    """A forward hook on one layer of a network that captures the layer's input or output.

    - The network itself is not edited.
    - A copy of it (`copy.deepcopy`, pickle) carries a hook that does nothing.
    - Modules that are later compiled from it (`torch.compile`) or wrap it still reach the hook.
    - If the layer runs more than once in a forward pass, the last run counts.
    - Between `pop` and the next `listen` nothing is captured, so a validation in between holds no memory.

    Args:
        network: The network to tap.
        path: The layer's name in `network.named_modules()`. None or "": the last `torch.nn.Linear` in their order, the
            classifier, whose input is the penultimate features.
        name: The network's name in errors. The option that sets `path` is f"{name}_layer".
        output: Capture the layer's output instead of its input.

    Raises:
        ValueError: The layer does not exist, or it is TorchScript, which takes no hooks.
    """

    def __init__(self, network: nn.Module, path: str | None, name: str, output: bool = False):
        self._name = name
        self.path, layer = _find_layer(network, path, name)
        self._capture = _Capture()
        self._hook = (layer.register_forward_hook if output else layer.register_forward_pre_hook)(self._capture)
        if (made := _made_captures.get()) is not None:
            made.append(self._capture)

    def run(self, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network and return its output and the layer's features (b, d), flattened from (b, ...).

        `network` is the tapped network or a module around it.

        Raises:
            RuntimeError: The layer did not run, or its features are not a tensor with at least two dimensions.
        """
        self.listen()
        return network(x), self.pop()

    def pop(self) -> Tensor:
        """Return the features (b, d) of the last forward pass and forget them. Raises as `run` does."""
        features = self._pop()
        self._capture.listening = False
        if not isinstance(features, Tensor) or features.dim() < 2:
            raise LayerError(
                f"{self._describe_pass(features)}: set {self._name}_layer to a layer whose input is a tensor of features "
                f"(b, ...)"
            )
        return features.flatten(1)

    def pop_map(self) -> Tensor:
        """Return the map (b, c, h, w) of the last forward pass and forget it. Raises RuntimeError for any other features."""
        features = self._pop()
        self._capture.listening = False
        if not isinstance(features, Tensor) or features.dim() != 4:
            raise LayerError(
                f"{self._describe_pass(features)}: it must be a layer whose features are maps (b, c, h, w)"
            )
        return features

    def listen(self) -> None:
        """Capture the next forward pass and forget the features of an earlier one."""
        self._capture.features, self._capture.listening = None, True

    def _pop(self) -> object:
        """Return the captured object, of any type, and keep listening. Raises RuntimeError if it has changed in place."""
        features, self._capture.features = self._capture.features, None
        if features is not None and self._capture.version is not None and features._version != self._capture.version:
            raise LayerError(
                f"the {self._name}'s layer {self.path!r} had its features changed in place by a later layer: name that layer "
                f"(or set inplace=False there)"
            )
        return features

    def _describe_pass(self, features: object) -> str:
        got = "did not run" if features is None else f"had {describe(features)}"
        return f"the {self._name}'s layer {self.path!r} {got} in its forward pass"

    def remove(self) -> None:
        """Remove the hook."""
        self._hook.remove()
        self._capture.features = None


class _Capture:
    """The hook: a separate object, so that a copy of the network does not copy the captured features."""

    def __init__(self):
        self.listening = True
        self.features = self.version = None

    def __call__(self, module: nn.Module, arguments: tuple, *output: object) -> None:
        if self.listening:
            self.features = output[0] if output else arguments[0] if arguments else None
            self.version = _version(self.features)

    def __reduce__(self):
        return no_hook, ()


_made_captures: ContextVar[list[_Capture] | None] = ContextVar("made captures", default=None)


@contextmanager
def captures_made() -> Iterator[list[_Capture]]:
    """Yield a list of what the taps made inside the context capture, for `SharedPasses`."""
    captures: list[_Capture] = []
    token = _made_captures.set(captures)
    try:
        yield captures
    finally:
        _made_captures.reset(token)


class SharedPasses(nn.Module):
    """A network whose forward passes several methods share: a call with the same tensor again returns the same output.

    Every tap captures in the one pass, and gets its features again when its method calls. A call in another mode (training,
    gradients, autocast) is a pass of its own. Make a new object for every batch.

    Args:
        network: The network.
        captures: What the methods' taps capture (`captures_made`).
    """

    def __init__(self, network: nn.Module, captures: Sequence[_Capture]):
        super().__init__()
        self.network = network
        self.training = network.training
        self._captures = captures
        self._passes: dict[tuple, tuple] = {}  # keeps x alive, so that no other tensor gets its id

    def forward(self, x: Tensor) -> object:
        """Return the network's output for x."""
        modes = self.network.training, torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type)
        key = id(x), *modes
        if key not in self._passes:
            self._passes[key] = (x, *self._run(x))
        _, output, captured = self._passes[key]
        for capture, features, version in captured:
            if capture.listening:
                capture.features, capture.version = features, version
        return output

    def _run(self, x: Tensor) -> tuple[object, list[tuple]]:
        """Return the output of a new pass, and (capture, features, version) of every tap that captured in it."""
        before = [(capture, capture.listening, capture.features) for capture in self._captures]
        for capture in self._captures:
            capture.listening = True
        try:
            output = self.network(x)
            captured = [(it, it.features, it.version) for it, _, earlier in before if it.features is not earlier]
        finally:
            for capture, listening, earlier in before:
                capture.listening = listening
                capture.features = capture.features if listening else earlier
        return output, captured


def _version(x: object) -> int | None:
    """Return how often a tensor has been changed in place.

    None if torch does not count, as in compiled code, which changes copies, or for tensors of inference mode.
    """
    counted = isinstance(x, Tensor) and not torch.compiler.is_compiling() and not x.is_inference()
    return x._version if counted else None


def _find_layer(network: nn.Module, path: str | None, name: str) -> tuple[str, nn.Module]:
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
            f"the {name} has no torch.nn.Linear, whose input would be its features: set {name}_layer to a name in "
            f"{name}.named_modules()"
        )
    return linear[-1]


def _check_takes_hooks(module: nn.Module, name: str) -> None:
    """Raise ValueError for TorchScript, which refuses hooks or never calls them."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"the {name} must be a torch.nn.Module to capture its features, got TorchScript ({type(module).__name__}), which "
            f"takes no hooks: pass the module that it was compiled from"
        )


def stages_of(network: nn.Module) -> tuple[str, ...]:
    """Return the names of a network's stages; () if it has none, or if its `stages` is something else."""
    stages = getattr(network, "stages", ())
    named = isinstance(stages, tuple | list) and all(isinstance(path, str) for path in stages)
    return tuple(stages) if named else ()


def check_layer(name: str, layer: str | None) -> str | None:
    """Return a layer's name, or None. Raises TypeError for any other type."""
    if layer is not None and not isinstance(layer, str):
        raise TypeError(f"{name} must be a name in named_modules(), or None, got {type(layer).__name__}")
    return layer


class FeatureMethod(Method):
    """The base of methods that compare features. It taps both networks from `prepare` to `release`.

    After `prepare`, `student_width` and `teacher_width` are the features' numbers of dimensions.

    Args:
        student_layer: The student's layer to tap; `path` of `Tap`.
        teacher_layer: The teacher's.
        batch_keep: Fraction of each batch that the teacher runs on, in (0, 1].
    """

    def __init__(self, student_layer: str | None = None, teacher_layer: str | None = None, batch_keep: float = 1.0):
        super().__init__()
        self.student_layer = check_layer("student_layer", student_layer)
        self.teacher_layer = check_layer("teacher_layer", teacher_layer)
        self.batch_keep = check_fraction("batch_keep", batch_keep)
        self._taps: dict[str, Tap] = {}

    def prepare(self, student: nn.Module, teacher: nn.Module | None, samples: Iterable[Batch]) -> None:
        """Tap both networks and run one sample through them, in evaluation mode and without gradients.

        Raises:
            ValueError: A layer does not exist.
            RuntimeError: A layer did not run.
        """
        self.release()
        x = self.network_input(next(iter(samples)).x[:1])
        self.student_width = self.probe("student", student, x)[1].shape[1]
        self.teacher_width = self.probe("teacher", teacher, x)[1].shape[1]

    def make_tap(self, network: nn.Module, path: str | None, name: str) -> Tap:
        """Return the tap for a network. Override it to capture other features."""
        return Tap(network, path, name)

    def probe(self, name: str, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tap the network and return logits and features for x, in evaluation mode and without gradients."""
        self._taps[name] = self.make_tap(network, getattr(self, f"{name}_layer"), name)
        with evaluation_mode(network), torch.no_grad():
            return self._run(name, network, x)

    def network_input(self, x: Tensor) -> Tensor:
        """Return the networks' input for a batch's x."""
        return x

    def student_forward(self, student: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the student's logits (b, classes) and features (b, d), both differentiable."""
        return self._run("student", student, x)

    def teacher_forward(self, teacher: nn.Module | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's logits (b, classes) and features (b, d), both constant. d is at least `teacher_width`.

        If the teacher now has fewer features than in `prepare`, as the partial teachers of `pwkd`, zeros fill the last ones.
        """
        with torch.no_grad():
            logits, features = self._run("teacher", teacher, x)
        missing = self.teacher_width - features.shape[1]
        fill = (*(0, 0) * (features.dim() - 2), 0, missing)
        return logits, functional.pad(features, fill) if missing > 0 else features

    def _run(self, name: str, network: nn.Module | None, x: Tensor) -> tuple[Tensor, Tensor]:
        if name not in self._taps:
            raise RuntimeError(f"{type(self).__name__} needs prepare(student, teacher, samples) before it is called")
        return self._taps[name].run(network, x)

    def release(self) -> None:
        """Remove the hooks from the networks."""
        while self._taps:
            self._taps.popitem()[1].remove()


class StageMethod(Method):
    """The base of methods that compare the output maps of several layers. It taps both networks from `prepare` to `release`.

    After `prepare`, `student_shapes` and `teacher_shapes` are the maps' shapes (c, h, w), in the order of the layers.

    Args:
        student_layers: The student's layers, names in `named_modules()` with commas between them. None: those of
            `default_layers`.
        teacher_layers: The teacher's.
        batch_keep: Fraction of each batch that the teacher runs on, in (0, 1].
    """

    def __init__(self, student_layers: str | None = None, teacher_layers: str | None = None, batch_keep: float = 1.0):
        super().__init__()
        self.student_layers = student_layers
        self.teacher_layers = teacher_layers
        self._paths = {
            "student": _parse_layers("student_layers", student_layers),
            "teacher": _parse_layers("teacher_layers", teacher_layers),
        }
        self.batch_keep = check_fraction("batch_keep", batch_keep)
        self._taps: dict[str, list[Tap]] = {}

    def prepare(self, student: nn.Module, teacher: nn.Module | None, samples: Iterable[Batch]) -> None:
        """Tap both networks and run one sample through them, in evaluation mode and without gradients.

        Raises:
            ValueError: A layer does not exist or takes no hooks, a network has no `stages` and no layers were named, or the
                networks have different numbers of layers.
            RuntimeError: A layer did not run, or its output is not a map (b, c, h, w).
        """
        self.release()
        networks = {"student": student, "teacher": teacher}
        paths = {name: self._paths_of(name, network) for name, network in networks.items()}
        if len(paths["student"]) != len(paths["teacher"]):
            found = [f"{len(names)} ({','.join(names)})" for names in paths.values()]
            raise ValueError(
                f"student_layers and teacher_layers must have the same number of layers, got {found[0]} and {found[1]}"
            )
        for name, names in paths.items():
            self._taps[name] = []  # one by one, so that `release` removes those made before a failure
            for path in names:
                self._taps[name].append(Tap(networks[name], path, name, output=True))
        x = next(iter(samples)).x[:1]
        with evaluation_mode(student), evaluation_mode(teacher), torch.no_grad():
            self.student_shapes, self.teacher_shapes = (
                [tuple(maps.shape[1:]) for maps in self._run(name, network, x)[1]] for name, network in networks.items()
            )

    def default_layers(self, stages: Sequence[str]) -> Sequence[str]:
        """Return the layers to compare in a network with these `stages`: all of them."""
        return stages

    def _paths_of(self, name: str, network: nn.Module) -> Sequence[str]:
        """Return the names of the network's layers."""
        paths, modules = self._paths[name], dict(network.named_modules())
        if paths is None:
            if not (stages := stages_of(network)):
                raise ValueError(
                    f"{name}_layers must name layers, e.g. {LAYERS_EXAMPLE}: the {name}, a {type(network).__name__}, has no "
                    f"`stages`, a tuple of layer names"
                )
            paths = self.default_layers(stages)
        for path in paths:
            if path not in modules:
                raise ValueError(f"{name}_layers must be names in {name}.named_modules(), which has no {path!r}")
        return paths

    def student_forward(self, student: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the student's logits (b, classes) and maps (b, c, h, w), all differentiable."""
        return self._run("student", student, x)

    def teacher_forward(self, teacher: nn.Module | None, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the teacher's logits (b, classes) and maps (b, c, h, w), all constant. c is at least that of `teacher_shapes`.

        If the teacher now has fewer channels than in `prepare`, as the partial teachers of `pwkd`, zeros fill the last ones.
        """
        with torch.no_grad():
            logits, maps = self._run("teacher", teacher, x)
        missing = [channels - x.shape[1] for (channels, _, _), x in zip(self.teacher_shapes, maps, strict=True)]
        return logits, [
            functional.pad(x, (0, 0, 0, 0, 0, n)) if n > 0 else x for x, n in zip(maps, missing, strict=True)
        ]

    def _run(self, name: str, network: nn.Module | None, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        if name not in self._taps:
            raise RuntimeError(f"{type(self).__name__} needs prepare(student, teacher, samples) before it is called")
        for tap in self._taps[name]:
            tap.listen()
        logits = network(x)
        return logits, [tap.pop_map() for tap in self._taps[name]]

    def release(self) -> None:
        """Remove the hooks from the networks."""
        while self._taps:
            for tap in self._taps.popitem()[1]:
                tap.remove()


def _parse_layers(option: str, text: str | None) -> list[str] | None:
    """Parse layer names with commas between them."""
    takes = f"names of layers, e.g. {LAYERS_EXAMPLE}, or None"
    if text is None:
        return None
    if not isinstance(text, str):
        raise TypeError(f"{option} must be {takes}, got {describe(text)}")
    paths = [path.strip() for path in text.split(",")]
    if not all(paths):
        raise ValueError(f"{option} must be {takes}, got {brief(text)}, with an empty name")
    return paths


def pool_to_common_size(*maps: Tensor) -> list[Tensor]:
    """Pool maps (b, c, h, w) to the smallest height and width among them, by adaptive average pooling."""
    size = tuple(min(sides) for sides in zip(*(x.shape[-2:] for x in maps), strict=True))
    return [x if x.shape[-2:] == size else functional.adaptive_avg_pool2d(x, size) for x in maps]


def full_precision(like: Tensor) -> torch.autocast:
    """Return a context that turns autocast off on the device of `like`: products of small differences need float32."""
    return torch.autocast(like.device.type, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    """Return x, as float32 if its dtype is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit_rows(x: Tensor, offset: float = LENGTH_OFFSET) -> Tensor:
    """Return x (r, d) with each row divided by its length + offset, so that products of rows are cosines.

    - The result is at least float32. Lengths whose squares exceed float32 are handled.
    - A row of zeros has no direction: it stays zeros and passes no gradient.
    - A row with an infinity or NaN becomes NaN.

    Args:
        x: (r, d).
        offset: A number >= 0.
    """
    x = at_least_float32(x)
    largest = x.detach().abs().amax(1, keepdim=True)
    zero = largest == 0
    scale = largest.masked_fill(zero, 1)  # cancels out: it only keeps the squares in range
    x = x / scale
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True).masked_fill(zero, 1)
    return (x / (length + offset / scale)).masked_fill(zero, 0)
