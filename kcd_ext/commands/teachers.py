"""Find teachers: finished runs, weights files, and networks that a command trains first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from .. import models
from ..data.images import ImageData
from ..describe import did_you_mean
from ..models.weights import load_weights, match_weights
from ..randomness import seeded
from ..reports.runs import Normalisation, metadata_if_started
from ..students import WEIGHTS, check_weights


@dataclass(frozen=True)
class Teacher:
    """A network and, if it is trained, its weights."""

    network: str
    weights: Mapping[str, Tensor] | None = field(default=None, repr=False)
    origin: Path | None = None
    """Path that the weights were read from; None: the network is not trained yet."""
    normalisation: Normalisation | None = None
    """Normalisation of the images that it was trained on; None: that of the student's images."""
    notes: tuple[str, ...] = ()
    """Remarks for the user about the weights file, one line each."""

    def __str__(self) -> str:
        return self.network if self.origin is None else f"{self.network} of {self.origin}"

    def build(self, data: ImageData, seed: int) -> nn.Module:
        """Build the network for these images, with its weights or, if it is not trained, with the seed's.

        If its training images were normalised differently, the network renormalises its input
        (`kcd_ext.models.renormalise`).

        Raises:
            TypeError, ValueError, ImportError: as `models.build`, or the weights do not fit the network.
        """
        return self._build_with_notes(data, seed)[0]

    def notes_on(self, data: ImageData) -> list[str]:
        """Return remarks for the user about this teacher on these images, one line each. Raises as `build` does."""
        _, notes = self._build_with_notes(data, 0)
        return [*self.notes, *notes]

    def different_normalisation(self, data: ImageData) -> Normalisation | None:
        """Return the teacher's normalisation if it differs from that of these images, else None."""
        views = data.test.views
        return None if self.normalisation == Normalisation(views.mean, views.std) else self.normalisation

    def _build_with_notes(self, data: ImageData, seed: int) -> tuple[nn.Module, list[str]]:
        network, notes = build(self.network, data, seed), []
        if self.weights is not None:
            error = f"weights in {self.origin} do not fit network {self.network!r} for {data.name} ({data.num_classes} classes)"
            state = match_weights(error, network.state_dict(), self.weights)
            network.load_state_dict(state.tensors)
            notes += [f"{self.origin}: {note}" for note in state.notes]
        own, views = self.different_normalisation(data), data.test.views
        if own is not None:
            if len(own.mean) != len(views.mean):
                raise ValueError(
                    f"teacher {self.origin} was trained on images with {len(own.mean)} channels, {data.name} has {len(views.mean)}"
                )
            models.renormalise(network, given=(views.mean, views.std), own=own)
            notes.append(
                f"teacher {self.origin} gets images normalised as in its training, with mean {_format(own.mean)} and std "
                f"{_format(own.std)}; the student's have mean {_format(views.mean)} and std {_format(views.std)}"
            )
        return network, notes


def _format(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:.4g}" for number in numbers)


def build(network: str, data: ImageData, seed: int) -> nn.Module:
    """Return a network for these images, with initial weights from the seed."""
    with seeded(seed):
        return models.build(network, in_channels=data.in_channels, num_classes=data.num_classes)


def find(spec: str, network: str | None, default_network: str | None) -> Teacher:
    """Return the teacher that the user named.

    Args:
        spec: a network's name or `module:function`, for a network to train; the folder of a finished run, whose student
            becomes the teacher; or a weights file (`models.weights.load_weights`).
        network: the network of the weights, if the user named it.
        default_network: the network of a weights file otherwise.

    Raises:
        TypeError, ValueError: `spec` does not exist, the run is not finished, the file does not hold weights, or their
            network is unknown.
        OSError: a file cannot be read.
    """
    path, network = Path(spec), None if network is None else models.canonical(network)
    if models.canonical(spec) in models.REGISTRY or (":" in spec and not path.exists()):
        if network is not None:
            raise ValueError(f"teacher_network={network!r} has no effect: teacher {spec!r} names a network already")
        return Teacher(models.canonical(spec))
    if path.is_dir():
        weights = path / WEIGHTS
        if not weights.exists():
            raise ValueError(f"teacher {spec} is not the folder of a finished run: it has no {WEIGHTS}")
        check_weights(path)
        found, metadata = load_weights(weights), metadata_if_started(path)
        network = network or (metadata and metadata.student)
        if network is None:
            raise ValueError(f"{path / 'config.json'} does not say which network was trained: give --teacher-network")
        return Teacher(network, found.tensors, path, metadata and metadata.normalisation, found.notes)
    if not path.exists():
        raise ValueError(
            f"unknown teacher {spec!r}: neither a file, a folder nor one of the networks {', '.join(sorted(models.REGISTRY))} "
            f"(or, as in RepDistiller, {', '.join(models.ALIASES)}){did_you_mean(spec, [*models.REGISTRY, *models.ALIASES])}"
        )
    if network is None and default_network is None:
        raise ValueError(f"--teacher-network is required: it names the network of the weights in {spec}")
    found = load_weights(path)
    return Teacher(network or default_network, found.tensors, path, notes=found.notes)
