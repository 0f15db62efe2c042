"""Find teachers and initial weights: finished runs, weights files, and networks that a command trains first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from .. import models
from ..data.images import ImageData
from ..describe import did_you_mean
from ..models.libraries import LIBRARIES, Library, library_network
from ..models.libraries.huggingface import is_folder
from ..models.weights import load_weights, match_start, match_weights
from ..randomness import seeded
from ..reports.runs import Normalisation, metadata_if_started
from ..students import WEIGHTS, check_weights

AS_TRAINED = "as in its training"
AS_GIVEN = "as your options say"
GREY, RGB = 1, 3  # channels


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
    resizing: tuple[tuple[int, int], str] | None = None
    """Size of the images that it was trained on, and interpolation; None: the size of the student's images."""
    is_run: bool = False
    """Whether `origin` is the folder of a run, which records its images."""
    is_published: bool = False
    """Whether its images are those of the weights that its library publishes."""
    is_given: bool = False
    """Whether an option of the command gave `normalisation`."""
    reason: str = AS_TRAINED
    """How its images are known, for the remark about them."""
    config: Mapping[str, object] | None = field(default=None, repr=False)
    """`models.config(network)` when it was trained; None: it is read."""

    def __str__(self) -> str:
        return self.network if self.origin is None else f"{self.network} of {self.origin}"

    def build(self, data: ImageData, seed: int) -> nn.Module:
        """Build the network for these images, with its weights or, if it is not trained, with the seed's.

        If its training images had another size or normalisation, the network resizes and renormalises its input
        (`kcd_ext.models.resize_input`, `kcd_ext.models.renormalise`).

        Raises:
            TypeError, ValueError, ImportError: as `models.build`, or the weights do not fit the network.
        """
        return self._build_with_notes(data, seed)[0]

    def notes_on(self, data: ImageData) -> list[str]:
        """Return remarks for the user about this teacher on these images, one line each. Raises as `build` does."""
        _, notes = self._build_with_notes(data, 0)
        return [*self.notes, *notes]

    def different_normalisation(self, data: ImageData) -> Normalisation | None:
        """Return the teacher's normalisation if it differs from that of these images, else None.

        Raises:
            ValueError: It is for another number of channels than the teacher takes.
        """
        given, own = Normalisation(data.test.views.mean, data.test.views.std), self.normalisation
        if own in (None, given):
            return None
        own = self._for_channels(own, data, self._build_with_weights(data, 0)[1])
        return None if own == given else own

    def different_size(self, data: ImageData) -> tuple[tuple[int, int], str] | None:
        """Return size and interpolation of the teacher's images if their size differs from that of these, else None."""
        return None if self.resizing is None or self.resizing[0] == image_size(data) else self.resizing

    def about_input(self, data: ImageData) -> dict[str, object]:
        """Return what config.json and a teacher cache record of the images that the teacher gets. Raises as `build` does.

        - "teacher_normalisation": their normalisation.
        - "teacher_resizing": the size to which they are resized, and how; missing if they are not.
        """
        views, resizing = data.train.views, self.different_size(data)
        normalisation = self.different_normalisation(data) or Normalisation(views.mean, views.std)
        resized = {} if resizing is None else dict(zip(("size", "interpolation"), resizing, strict=True))
        return {"teacher_normalisation": normalisation._asdict()} | ({"teacher_resizing": resized} if resized else {})

    def with_input(self, normalisation: tuple[Sequence[float], Sequence[float]] | None, size: int | None) -> "Teacher":
        """Return this teacher, with its weights, for images of another normalisation or size than `find` found.

        Args:
            normalisation: mean and std, one number for all channels or one per channel; None: as found.
            size: height and width; None: as found.
        """
        if normalisation is None and size is None:
            return self
        reason = AS_GIVEN if self.reason == AS_TRAINED else f"{self.reason} and {AS_GIVEN}"
        teacher = replace(self, reason=reason)
        if normalisation is not None:
            mean, std = (tuple(numbers) for numbers in normalisation)
            channels = max(len(mean), len(std))
            mean, std = (numbers * channels if len(numbers) == 1 else numbers for numbers in (mean, std))
            teacher = replace(teacher, normalisation=Normalisation(mean, std), is_given=True)
        if size is not None:
            interpolation = self.resizing[1] if self.resizing else "bilinear"
            teacher = replace(teacher, resizing=((size, size), interpolation))
        return teacher

    def _for_channels(self, own: Normalisation, data: ImageData, channels: int) -> Normalisation | None:
        """Return a normalisation for this many channels; None if a library's is for three and the teacher takes one."""
        if len(own.mean) == channels:
            return own
        if all(len(set(numbers)) == 1 for numbers in own):  # one number for all channels
            return Normalisation(*(numbers[:1] * channels for numbers in own))
        if self.is_published and not self.is_given:
            return None
        if self.is_given:
            raise ValueError(
                f"teacher_mean and teacher_std must be one number or one per channel ({channels} here), got {len(own.mean)} numbers"
            )
        raise ValueError(
            f"teacher {self.origin} was trained on images with {len(own.mean)} channels, {data.name} has {data.in_channels}"
        )

    def _build_with_notes(self, data: ImageData, seed: int) -> tuple[nn.Module, list[str]]:
        network, channels, notes = self._build_with_weights(data, seed)
        views, own, changes = data.test.views, self.normalisation, []
        given, resizing = Normalisation(views.mean, views.std), self.different_size(data)
        if own not in (None, given):
            own = self._for_channels(own, data, channels)
            if own is None:
                notes.append(
                    f"teacher {self.origin} takes images of {channels} channel, and its library's have {RGB}: its images are "
                    f"normalised as the student's, unless you give --teacher-mean"
                )
        own = None if own == given else own
        if resizing is not None:
            models.resize_input(network, *resizing)
            changes.append("resized")
        if own is not None:
            models.renormalise(network, given=(views.mean, views.std), own=own)
            changes.append("normalised")
        if changes:
            theirs, ours = [], []
            if resizing is not None:
                size, interpolation = resizing
                theirs.append(f"{_format_size(size)} pixels ({interpolation})")
                ours.append(f"{_format_size(image_size(data))} pixels")
            if own is not None:
                theirs.append(f"mean {_format(own.mean)} and std {_format(own.std)}")
                ours.append(f"mean {_format(views.mean)} and std {_format(views.std)}")
            notes.append(
                f"teacher {self.origin} gets images {' and '.join(changes)} {self.reason}, with {', '.join(theirs)}; "
                f"the student's have {', '.join(ours)}"
            )
        return network, notes

    def _build_with_weights(self, data: ImageData, seed: int) -> tuple[nn.Module, int, list[str]]:
        """Return the network with its weights, before its input is adapted, its number of channels, and remarks."""
        network = build(self.network, data, seed, self.config, self.resizing)
        library = library_network(self.network, self.config)
        channels = data.in_channels if library is None else library.channels(data.in_channels)
        if self.weights is None:
            return network, channels, []
        error = (
            f"weights in {self.origin} do not fit network {self.network!r} for {data.name} ({data.num_classes} classes)"
        )
        notes = []
        try:
            state = match_weights(error, network.state_dict(), self.weights)
        except ValueError as mismatch:
            if data.in_channels != GREY:
                raise
            try:  # the teacher may have been trained on colour images
                network = build(self.network, data, seed, self.config, self.resizing, in_channels=RGB)
                state = match_weights(error, network.state_dict(), self.weights)
            except (TypeError, ValueError):
                raise mismatch from None
            channels = RGB
            models.repeat_channel(network, RGB)
            notes.append(f"teacher {self.origin} takes images of {RGB} channels: the one of {data.name} is repeated")
        network.load_state_dict(state.tensors)
        return network, channels, [*notes, *(f"{self.origin}: {note}" for note in state.notes)]


@dataclass(frozen=True)
class Start:
    """Weights to start a student from, and the images that they were trained on."""

    tensors: Mapping[str, Tensor] = field(repr=False)
    origin: Path
    normalisation: Normalisation | None
    """None: unknown."""
    notes: tuple[str, ...] = ()

    def normalise(self, data: ImageData) -> ImageData:
        """Return the images, normalised as these weights were trained: grey ones with the mean of the channels' numbers."""
        if self.normalisation is None:
            return data
        pair = self.normalisation
        if data.in_channels == GREY:
            pair = [(sum(numbers) / len(numbers),) for numbers in pair]
        mean, std = map(tuple, pair)
        return data.map_parts(lambda part: part.with_views(part.views.with_normalisation(mean, std)))

    def load_into(self, network: nn.Module, data: ImageData) -> list[str]:
        """Load them into a network, except for a head of another size. Return remarks, one line each.

        Raises:
            ValueError: They do not fit.
        """
        error = f"weights in {self.origin} do not fit the student for {data.name} ({data.num_classes} classes)"
        found = match_start(error, network.state_dict(), self.tensors, data.num_classes)
        network.load_state_dict(found.tensors)
        return [*self.notes, *(f"{self.origin}: {note}" for note in found.notes)]


def _format(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:.4g}" for number in numbers)


def _format_size(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def image_size(data: ImageData) -> tuple[int, int]:
    """Return height and width of the images."""
    return tuple(data.test.shape[:2])


def build(
    network: str,
    data: ImageData,
    seed: int,
    config: Mapping[str, object] | None = None,
    resizing: tuple[tuple[int, int], str] | None = None,
    in_channels: int | None = None,
) -> nn.Module:
    """Return a network with initial weights from the seed.

    Args:
        network: the network's name.
        data: the images, which it must take.
        seed: the seed of its weights.
        config: as for `models.build`.
        resizing: size and interpolation to which its images will be resized; None: they keep their size.
        in_channels: channels of the network; None: those of the images.
    """
    size = image_size(data) if resizing is None else resizing[0]
    with seeded(seed):
        return models.build(
            network,
            in_channels=in_channels or data.in_channels,
            num_classes=data.num_classes,
            image_size=size,
            config=config,
        )


def build_student(network: str, start: Start | None, data: ImageData, seed: int) -> tuple[nn.Module, list[str]]:
    """Return a student with initial weights from `start` or the seed, and remarks for the user, one line each.

    Raises as `build` and `Start.load_into` do.
    """
    student, notes, size = build(network, data, seed), [], image_size(data)
    if start is not None:
        notes += [f"{network} starts with the weights in {start.origin}", *start.load_into(student, data)]
        if start.normalisation is not None:
            views = data.train.views
            notes[0] += f"; images have mean {_format(views.mean)} and std {_format(views.std)}"
    if (found := models.resizing(student)) is not None:
        own, interpolation = found
        notes.append(
            f"{network} gets images resized from {_format_size(size)} to {_format_size(own)} pixels ({interpolation}): it does "
            f"not take them as they are"
        )
    return student, notes


def find(spec: str, network: str | None, default_network: str | None) -> Teacher:
    """Return the teacher that the user named.

    Args:
        spec: a network's name or `module:function`, for a network to train; the folder of a finished run, whose student
            becomes the teacher; a weights file (`models.weights.load_weights`); or a folder of transformers with weights,
            as a path or as `hf:FOLDER_OR_NAME`.
        network: the network of the weights, if the user named it.
        default_network: the network of a weights file otherwise.

    Raises:
        TypeError, ValueError: `spec` does not exist, the run is not finished, the file does not hold weights, or their
            network is unknown.
        ImportError: the network's package is not installed or does not load.
        OSError: a file cannot be read.
    """
    path, network = Path(spec), None if network is None else models.canonical(network)
    library = library_network(spec)
    if models.canonical(spec) in models.REGISTRY or library is not None or (":" in spec and not path.exists()):
        if network is not None and network != spec:
            raise ValueError(f"teacher_network={network!r} has no effect: teacher {spec!r} names a network already")
        weights = None if library is None else library.weights()
        if weights is None:
            return Teacher(models.canonical(spec))
        return _of_library(Teacher(spec, weights, library.folder()), library)
    if path.is_dir():
        return _find_in_folder(path, network)
    if not path.exists():
        raise ValueError(
            f"unknown teacher {spec!r}: neither a file, a folder nor one of the networks {', '.join(sorted(models.REGISTRY))} "
            f"(or, as in RepDistiller, {', '.join(models.ALIASES)}; or {', '.join(f'{prefix}:NAME' for prefix in LIBRARIES)})"
            f"{did_you_mean(spec, [*models.REGISTRY, *models.ALIASES])}"
        )
    if network is None and default_network is None:
        raise ValueError(f"--teacher-network is required: it names the network of the weights in {spec}")
    found, network = load_weights(path), network or default_network
    teacher, library = Teacher(network, found.tensors, path, notes=found.notes), library_network(network)
    return teacher if library is None else _of_library(teacher, library)


def _find_in_folder(path: Path, network: str | None) -> Teacher:
    """Return the student of a finished run, or the network of a folder of transformers. Raises as `find` does."""
    weights = path / WEIGHTS
    if not weights.exists():
        if is_folder(path):
            return find(f"hf:{path}", network if network is None or not network.startswith("hf:") else None, None)
        raise ValueError(f"teacher {path} is not the folder of a finished run: it has no {WEIGHTS}")
    check_weights(path)
    found, metadata = load_weights(weights), metadata_if_started(path)
    network = network or (metadata and metadata.student)
    if network is None:
        raise ValueError(f"{path / 'config.json'} does not say which network was trained: give --teacher-network")
    own = metadata.student_config if metadata and network == metadata.student else None
    return Teacher(
        network, found.tensors, path, metadata and metadata.normalisation, found.notes, is_run=True, config=own
    )


def _of_library(teacher: Teacher, library: Library) -> Teacher:
    """Return a teacher that gets the images of its library's weights."""
    found = library.network_input()
    resizing = None if found.size is None else (found.size, found.interpolation)
    if found.mean is not None:
        teacher = replace(teacher, normalisation=Normalisation(found.mean, found.std))
    else:
        note = f"{teacher.origin} does not say how its images were normalised: as the student's, unless you give --teacher-mean"
        teacher = replace(teacher, notes=(*teacher.notes, note))
    return replace(teacher, resizing=resizing, is_published=True, reason=library.source)


def has_weights(path: Path) -> bool:
    """Return whether there are weights at a path that `find` read before: a file, a run or a folder of transformers."""
    return is_folder(path) or (path / WEIGHTS if path.is_dir() else path).is_file()


def find_start(network: str, path: Path | None, option: str) -> Start | None:
    """Return the weights that a network starts from.

    Args:
        network: the network's name.
        path: a weights file or the folder of a finished run; None: the weights of an `hf:` folder.
        option: the name of the option that gave `path`, for errors.

    Returns:
        The weights; None if `path` is None and the network's name has no weights.

    Raises:
        TypeError, ValueError, ImportError, OSError: as `find`.
    """
    library = library_network(network)
    if path is None:
        tensors = None if library is None else library.weights()
        if tensors is None:
            return None
        found = _of_library(Teacher(network, tensors, library.folder()), library)
    elif path.exists():
        found = find(str(path), network, None)
    else:
        raise ValueError(f"{option} must be a weights file or the folder of a finished run, got {str(path)!r}")
    return Start(found.weights, found.origin, found.normalisation, found.notes)
