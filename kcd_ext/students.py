"""`load_student`: a finished run's student, ready to classify images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import files
from .checks import check_int
from .data.preprocessing import Preprocessing
from .describe import describe, join_names
from .networks import evaluation_mode, logits_only, usual_modes

MODEL = "model.json"
WEIGHTS = "student.safetensors"
SUMMARY, SUMS = "summary.json", "sha256"  # SUMS: a key of the summary, file -> SHA-256 of its content
VERSION = 1  # of model.json
BATCH_SIZE = 64


class Prediction(NamedTuple):
    """The most probable class of an image."""

    name: str
    """The name of the class; its number, as text, if the names are unknown."""
    probability: float
    """The probability that the network gives it, in [0, 1]."""


@dataclass(frozen=True)
class Model:
    """The description of a student, stored as model.json in its run folder. It is enough to build and use the network."""

    network: str
    """The network's name, as `kcd_ext.models.build` takes it."""
    num_classes: int
    """The number of classes."""
    preprocessing: Preprocessing
    """What happens to an image before the network sees it."""
    class_names: tuple[str, ...] = ()
    """The names of the classes, by label. Empty: unknown."""
    config: Mapping[str, Any] | None = None
    """All that the network needs besides its name: `kcd_ext.models.config(network)`, for networks of transformers."""

    def __post_init__(self) -> None:
        if not isinstance(self.network, str):
            raise TypeError(f"network must be a string, got {describe(self.network)}")
        check_int("num_classes", self.num_classes, 1)
        if not isinstance(self.preprocessing, Preprocessing):
            raise TypeError(f"preprocessing must be a Preprocessing, got {describe(self.preprocessing)}")
        check_class_names(self.class_names, self.num_classes)
        if self.config is not None and not isinstance(self.config, Mapping):
            raise TypeError(f"config must be a mapping or None, got {describe(self.config)}")

    def as_json(self) -> dict[str, object]:
        """Return the content of model.json."""
        return {
            "version": VERSION,
            "network": self.network,
            "config": self.config,
            "num_classes": self.num_classes,
            "class_names": list(self.class_names),
            "preprocessing": self.preprocessing.as_json(),
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Model:
        """Return the description that `as_json` returned. Raises KeyError, TypeError or ValueError for anything else."""
        if plain["version"] != VERSION:
            raise ValueError(f"version must be {VERSION}, got {describe(plain['version'])}")
        preprocessing = Preprocessing.from_json(plain["preprocessing"])
        return cls(plain["network"], plain["num_classes"], preprocessing, tuple(plain["class_names"]), plain["config"])

    def build(self) -> nn.Module:
        """Return the network with initial weights. Raises as `kcd_ext.models.build` does."""
        from . import models

        images = self.preprocessing
        return models.build(
            self.network,
            in_channels=images.channels,
            num_classes=self.num_classes,
            image_size=(images.height, images.width),
            config=self.config,
        )


def check_class_names(names: Sequence[str], num_classes: int | None = None) -> None:
    """Raise TypeError or ValueError unless `names` are strings, and none or `num_classes` of them."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"class_names must be strings, got {describe(names)}")
    if names and num_classes is not None and len(names) != num_classes:
        raise ValueError(f"class_names must be {num_classes} names, got {len(names)}")


class Student:
    """A network with its preprocessing and its class names.

    Call it with one image to get its class. `logits` and `probabilities` take several.

    Args:
        module: Maps a batch of x to logits (b, classes). It is put into evaluation mode.
        preprocess: The transform of an image to x.
        class_names: The names of the classes, by label. Empty: unknown.
    """

    def __init__(self, module: nn.Module, preprocess: Preprocessing, class_names: Sequence[str] = ()):
        check_class_names(class_names)
        self.module = module.eval()
        self.preprocess = preprocess
        self.class_names = tuple(class_names)

    def __call__(self, image: Any) -> Prediction:
        """Return the most probable class of an image, and its probability.

        Args:
            image: A path, a PIL image, or a uint8 array (h, w) or (h, w, channels).

        Raises:
            TypeError: `image` is of another kind.
            ValueError: The image cannot be read, or has another number of channels.
            OSError: The file cannot be opened.
        """
        probabilities = self.probabilities([image])[0]
        label = int(probabilities.argmax())
        return Prediction(self.name_of(label), float(probabilities[label]))

    def name_of(self, label: int) -> str:
        """Return the name of a class; its number, as text, if the names are unknown."""
        return self.class_names[label] if self.class_names else str(label)

    def logits(self, images: Iterable[Any], *, batch_size: int = BATCH_SIZE) -> Tensor:
        """Return the logits (n, classes) of images, float32 on the CPU.

        Args:
            images: Each as in a call.
            batch_size: Largest number of images per forward pass.

        Raises:
            TypeError, ValueError, OSError: As in a call.
        """
        check_int("batch_size", batch_size, 1)
        inputs = map(self.preprocess, images)
        found = []
        while batch := list(islice(inputs, batch_size)):
            found.append(self.logits_of(torch.stack(batch)))
        return torch.cat(found) if found else torch.empty(0, len(self.class_names))

    def probabilities(self, images: Iterable[Any], *, batch_size: int = BATCH_SIZE) -> Tensor:
        """Return the probabilities (n, classes) of images, float32 on the CPU. Arguments and errors are those of `logits`."""
        return self.logits(images, batch_size=batch_size).softmax(-1)

    def logits_of(self, x: Tensor) -> Tensor:
        """Return the logits (b, classes), float32 on the CPU, of images (b, channels, height, width) from `preprocess`."""
        with usual_modes(), logits_only("student", self.module) as output, evaluation_mode(output.network):
            with torch.no_grad():
                return output.network(x.to(_device_of(self.module))).float().cpu()


def _device_of(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in module.state_dict().values()), torch.device("cpu"))


def load_student(
    run: str | os.PathLike,
    *,
    network: nn.Module | str | None = None,
    preprocessing: Preprocessing | None = None,
    class_names: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
) -> Student:
    """Return the student of a finished run.

    A run of the command `kcd` describes its student in `model.json`. Pass the description of any other run, such as one of
    `kcd_ext.training.distill` with a module of your own, as arguments. They take precedence over the file.

    Args:
        run: The run folder. A network that is named `module:function` must be importable.
        network: The network, or its name as `kcd_ext.models.build` takes it. A module gets the run's weights in place.
        preprocessing: What happens to an image.
        class_names: The names of the classes, by label.
        device: Where the network runs.

    Returns:
        The student, in evaluation mode.

    Raises:
        FileNotFoundError: The run is not finished, or describes no student and an argument is missing.
        TypeError, ValueError: A file is damaged, the weights do not fit the network, or an argument is invalid.
        ImportError: A package is missing; names the extra that installs it.
    """
    folder = Path(run)
    if not (folder / WEIGHTS).is_file():
        others = sorted(path.parent.name for path in folder.glob(f"*/{WEIGHTS}"))
        started = "; it has started, so continue it with --resume" if (folder / "checkpoint").is_dir() else ""
        advice = f", but holds {join_names(others)}: name one of these" if others else started
        raise FileNotFoundError(f"run {folder} is not the folder of a finished run: it has no {WEIGHTS}{advice}")
    check_weights(folder)
    model = _read_model(folder)
    missing = [name for name, given in (("network", network), ("preprocessing", preprocessing)) if given is None]
    if model is None and missing:
        raise FileNotFoundError(
            f"run {folder} has no {MODEL}, which describes the student: pass {' and '.join(missing)}"
        )
    preprocessing = preprocessing or model.preprocessing
    if isinstance(network, str):
        if model is None:
            raise ValueError(f"network must be a torch.nn.Module, because run {folder} has no {MODEL}, got {network!r}")
        model = Model(
            network, model.num_classes, preprocessing, model.class_names
        )  # another network has another config
        network = None
    name = type(network).__name__ if network is not None else repr(model.network)
    module = model.build() if network is None else network
    _load_weights(module, folder, name)
    names = model.class_names if class_names is None and model is not None else class_names or ()
    return Student(module.to(device), preprocessing, names)


def check_weights(folder: Path) -> None:
    """Check the weights of a finished run against the SHA-256 in its summary.json.

    A summary.json without a checksum, such as another program's, passes.

    Raises:
        ValueError: The weights have changed, or summary.json is damaged.
        OSError: A file cannot be read.
    """
    path = folder / SUMMARY
    expected = files.read_json(path, _checksum) if path.exists() else None
    if expected is not None and sha256(files.read_regular(folder / WEIGHTS)).hexdigest() != expected:
        raise ValueError(
            f"{folder / WEIGHTS} has changed since the run wrote it: its SHA-256 is not that in {path.name}"
        )


def _checksum(summary: Mapping[str, Any]) -> str | None:
    sums = summary.get(SUMS, {})
    if not isinstance(sums, Mapping):
        raise TypeError(f"{SUMS} must be an object, got {describe(sums)}")
    return sums.get(WEIGHTS)


def _read_model(folder: Path) -> Model | None:
    path = folder / MODEL
    return files.read_json(path, Model.from_json) if path.exists() else None


def _load_weights(module: nn.Module, folder: Path, network: str) -> None:
    try:
        from .models.weights import load_weights, match_weights
    except ImportError as error:
        raise ImportError(
            f'load_student needs the package {error.name}: pip install "kcd-ext[train]"', name=error.name
        ) from error
    path = folder / WEIGHTS
    found = match_weights(
        f"weights in {path} do not fit network {network}", module.state_dict(), load_weights(path).tensors
    )
    module.load_state_dict(found.tensors)
