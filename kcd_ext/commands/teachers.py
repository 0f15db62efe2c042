"""Where a teacher comes from: a trained run, a file of weights, or a network that is still to be trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from .. import models
from ..data.images import ImageData
from ..describe import did_you_mean
from ..models.weights import fitted, read
from ..randomness import seeded
from ..reports.runs import Normalisation, check_weights, metadata_if_begun
from ..training.folder import WEIGHTS


@dataclass(frozen=True)
class Teacher:
    """A network and, once it is trained, its weights."""

    network: str
    weights: Mapping[str, Tensor] | None = field(default=None, repr=False)
    origin: Path | None = None
    """Where the weights were read; None: they have still to be trained."""
    normalisation: Normalisation | None = None
    """Of the images that it was trained on; None: that of the student's images."""
    notes: tuple[str, ...] = ()
    """What a user should know about the file of weights, a line each."""

    def __str__(self) -> str:
        return self.network if self.origin is None else f"{self.network} of {self.origin}"

    def build(self, data: ImageData, seed: int) -> nn.Module:
        """For these images; without weights of its own those that the seed gives.

        One that was trained on images of another normalisation gets them in its own (`kcd_ext.models.renormalise`).

        Raises:
            TypeError, ValueError, ImportError: as `models.build`, or the weights are not of such a network.
        """
        return self._built(data, seed)[0]

    def notes_on(self, data: ImageData) -> list[str]:
        """Return what a user should know before it teaches, a line each. Raises as `build` does."""
        _, notes = self._built(data, 0)
        return [*self.notes, *notes]

    def differing(self, data: ImageData) -> Normalisation | None:
        """Its normalisation, where that is another than that of these images."""
        views = data.test.views
        return None if self.normalisation == Normalisation(views.mean, views.std) else self.normalisation

    def _built(self, data: ImageData, seed: int) -> tuple[nn.Module, list[str]]:
        network, notes = build(self.network, data, seed), []
        if self.weights is not None:
            what = f"weights in {self.origin} are not of network {self.network!r} for {data.name} ({data.num_classes} classes)"
            state = fitted(what, network.state_dict(), self.weights)
            network.load_state_dict(state.tensors)
            notes += [f"{self.origin}: {note}" for note in state.notes]
        own, views = self.differing(data), data.test.views
        if own is not None:
            if len(own.mean) != len(views.mean):
                raise ValueError(
                    f"teacher {self.origin} was trained on images of {len(own.mean)} channels, {data.name} has {len(views.mean)}"
                )
            models.renormalise(network, given=(views.mean, views.std), own=own)
            notes.append(
                f"teacher {self.origin} is given images as it was trained on them, of mean {_shown(own.mean)} and std "
                f"{_shown(own.std)}; the student of mean {_shown(views.mean)} and std {_shown(views.std)}"
            )
        return network, notes


def _shown(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:.4g}" for number in numbers)


def build(network: str, data: ImageData, seed: int) -> nn.Module:
    """A network for these images, with the weights that the seed gives."""
    with seeded(seed):
        return models.build(network, in_channels=data.in_channels, num_classes=data.num_classes)


def find(spec: str, network: str | None, usual: str | None) -> Teacher:
    """The teacher that a user means.

    Args:
        spec: a network by name or module:function, to be trained; the folder of a run, whose student it is; or a file
            of weights (`weights.read`).
        network: of the weights, where the user has said so.
        usual: of a file of weights, where nobody has.

    Raises:
        TypeError, ValueError: there is no such thing, the run is not finished, the file is none of weights, or nobody
            says whose they are.
        OSError: a file cannot be read.
    """
    path, network = Path(spec), None if network is None else models.canonical(network)
    if models.canonical(spec) in models.REGISTRY or (":" in spec and not path.exists()):
        if network is not None:
            raise ValueError(f"teacher_network={network!r} has no effect with teacher {spec!r}, a network by name")
        return Teacher(models.canonical(spec))
    if path.is_dir():
        weights = path / WEIGHTS
        if not weights.exists():
            raise ValueError(f"teacher {spec} is no folder of a finished run: it has no {WEIGHTS}")
        check_weights(path)
        found, metadata = read(weights), metadata_if_begun(path)
        network = network or (metadata and metadata.student)
        if network is None:
            raise ValueError(f"{path / 'config.json'} does not say which network was trained: give teacher_network")
        return Teacher(network, found.tensors, path, metadata and metadata.normalisation, found.notes)
    if not path.exists():
        raise ValueError(
            f"unknown teacher {spec!r}: no such file or folder, and no network out of {', '.join(sorted(models.REGISTRY))} "
            f"(or {', '.join(models.ALIASES)}, as RepDistiller has it){did_you_mean(spec, [*models.REGISTRY, *models.ALIASES])}"
        )
    if network is None and usual is None:
        raise ValueError(f"teacher_network must name the network of the weights in {spec}")
    found = read(path)
    return Teacher(network or usual, found.tensors, path, notes=found.notes)
