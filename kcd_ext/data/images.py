"""Data sets of images that fit in memory: by name, from a file or folder, or from your own function."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..checks import check_int
from ..describe import brief, describe, did_you_mean, join_names
from ..registry import call, unknown_name_error
from .augmentation import POLICIES
from .views import Views, check_normalisation

REGISTRY = {
    "cifar10": "kcd_ext.data.cifar:cifar10",
    "cifar100": "kcd_ext.data.cifar:cifar100",
    "digits": "kcd_ext.data.packaged:digits",
    "mnist5k": "kcd_ext.data.packaged:mnist5k",
}
PATHS = "kcd_ext.data.files:read"
CROP_FLIP = "crop-flip"
AUGMENTATIONS = (CROP_FLIP, "none", *POLICIES)


class ImageSet(Dataset):
    """Images and labels as arrays, and the views that networks are trained on.

    Item i is the raw `(image, label)`, for `IndexedDataset` to mix. Images that are not contiguous or not writable
    are copied; others are used without a copy.

    Args:
        images: `(n, h, w, c)` uint8.
        labels: `(n,)` integers from 0 to the number of classes - 1; stored as int64.
        views: Converts batches of images to float tensors; must be for c channels.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An array has the wrong dtype or shape, a label does not fit int64, or `views` are for another number of
            channels.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, views: Views):
        for name, array in (("images", images), ("labels", labels)):
            if not isinstance(array, np.ndarray):
                raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}")
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"images must be uint8 (n, h, w, c), got {images.dtype} {images.shape}")
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"labels must be {len(images)} integers, got {labels.dtype} {labels.shape}")
        if labels.size and int(labels.max()) > np.iinfo(np.int64).max:
            raise ValueError(f"labels must fit int64, got {labels.max()}")
        if not isinstance(views, Views):
            raise TypeError(f"views must be a kcd_ext.data.views.Views, got {type(views).__name__}")
        if len(views.mean) != images.shape[-1]:
            raise ValueError(f"views must be for {images.shape[-1]} channels, got views for {len(views.mean)}")
        self.images = np.require(images, requirements=("C", "W"))
        self.labels = labels.astype(np.int64)
        self.views = views

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])

    def tensors(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Return images `(n, h, w, c)` uint8 and labels `(n,)` int64 on a device; on the CPU they share the arrays' memory."""
        return torch.from_numpy(self.images).to(device), torch.from_numpy(self.labels).to(device)


@dataclass(frozen=True)
class ImageData:
    """A data set ready for `distill`: raw training and test images, each with its views.

    Raises:
        TypeError: A part is not an `ImageSet`, `num_classes` is not an integer, or `class_names` is not a tuple of strings.
        ValueError: A part is empty, a label is outside [0, num_classes), the images of the two parts differ in shape, the
            views of the test images are random, or `class_names` are given but are not `num_classes` names in UTF-8.
    """

    name: str
    """The name of the data set, for messages and reports."""
    train: ImageSet
    """The training images."""
    test: ImageSet
    """The test images; their views neither crop nor flip, and have no policy."""
    num_classes: int
    """The number of classes, at least 1."""
    class_names: tuple[str, ...] = ()
    """The names of the classes, by label. Empty: unknown."""

    def __post_init__(self) -> None:
        check_int(f"data set {self.name!r}: num_classes", self.num_classes, 1)
        for part in ("train", "test"):
            images = getattr(self, part)
            if not isinstance(images, ImageSet):
                raise TypeError(f"data set {self.name!r}: {part} must be an ImageSet, got {type(images).__name__}")
            if not images.images.size:
                raise ValueError(
                    f"data set {self.name!r}: {part} must have at least one image, got shape {images.images.shape}"
                )
            low, high = images.labels.min(), images.labels.max()
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"data set {self.name!r}: labels of {part} must be in [0, {self.num_classes}), got {low} to {high}"
                )
        train, test = (images.images.shape[1:] for images in (self.train, self.test))
        if train != test:
            raise ValueError(
                f"data set {self.name!r}: images of train and test must have one shape, got {train} and {test}"
            )
        views = self.test.views
        if views.padding or views.flip or views.policy:
            raise ValueError(
                f"data set {self.name!r}: test must have views with padding=0, flip=False and policy=None, "
                f"got padding={views.padding}, flip={views.flip} and policy={views.policy!r}"
            )
        check_class_names(self.name, self.class_names)
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"data set {self.name!r}: class_names must be {self.num_classes} names, got {len(self.class_names)}"
            )

    @property
    def in_channels(self) -> int:
        """The number of channels of an image."""
        return self.train.images.shape[-1]

    @property
    def augment(self) -> str:
        """The augmentation of the training images, as `load` takes it."""
        views = self.train.views
        return views.policy or (CROP_FLIP if views.padding or views.flip else "none")

    def augmented(
        self, augment: str | None = None, *, padding: int | None = None, flip: bool | None = None
    ) -> "ImageData":
        """Return the data set with another augmentation of its training images. The arguments are those of `load`.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: `augment` is unknown, changes nothing, contradicts `padding` or `flip`, or is for another number of
                channels; or `padding` is not smaller than the images.
        """
        views, side = self.train.views, min(self.train.images.shape[1:3])
        options = {name: value for name, value in (("padding", padding), ("flip", flip)) if value is not None}
        if augment is not None:
            if not isinstance(augment, str):
                raise TypeError(f"augment must be {', '.join(AUGMENTATIONS)} or None, got {describe(augment)}")
            if augment not in AUGMENTATIONS:
                nearest = did_you_mean(augment, AUGMENTATIONS)
                raise ValueError(f"augment must be {', '.join(AUGMENTATIONS)} or None, got {brief(augment)}{nearest}")
            options["policy"] = augment if augment in POLICIES else None
        if augment == "none":
            options = {"padding": 0, "flip": False} | options
        views = replace(views, **options)
        if padding is not None and padding >= side:  # some crops would be entirely black
            raise ValueError(f"padding must be < {side}, the smaller side of the images, got {padding}")
        if augment == "none" and (views.padding or views.flip):
            raise ValueError(
                f"augment='none' means padding=0 and flip=False, got padding={views.padding} and flip={views.flip}"
            )
        if augment == CROP_FLIP and not (views.padding or views.flip):
            raise ValueError(
                f"augment={augment!r} has no effect with padding=0 and flip=False (the defaults of data set {self.name!r} "
                f"unless you give others)"
            )
        return replace(self, train=_with_views(self.train, views))


def check_class_names(data_set: str, names: tuple[str, ...]) -> None:
    """Raise TypeError or ValueError unless `names` is a tuple of strings that UTF-8 can encode."""
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"data set {data_set!r}: class_names must be a tuple of strings, got {describe(names)}")
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:  # from a file name in another encoding; a report could not be written
            raise ValueError(f"data set {data_set!r}: class name {name!r} is not valid UTF-8") from error


def assemble(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    num_classes: int,
    class_names: tuple[str, ...] = (),
    *,
    padding: int = 0,
    flip: bool = False,
) -> ImageData:
    """Return `ImageData` from arrays, normalised by the training images.

    Args:
        name: Name of the data set. Bytes of a file name that are not UTF-8 are escaped, so that a report can contain it.
        train: Images `(n, h, w, c)` uint8 and labels `(n,)`.
        test: As `train`.
        num_classes: Number of classes.
        class_names: Names of the classes. Empty: unknown.
        padding: Pixels around training images for random crops, as in `Views`.
        flip: Whether to flip training images at random, as in `Views`.
    """
    name = name.encode(errors="backslashreplace").decode()
    views = Views.from_images(train[0], padding=padding, flip=flip)
    test_views = replace(views, padding=0, flip=False)
    return ImageData(name, ImageSet(*train, views), ImageSet(*test, test_views), num_classes, class_names)


def stratified_split(labels: np.ndarray, test_fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return ascending indices (train, test); int(test_fraction * count) of every class are test. The seed fixes it."""
    random = np.random.default_rng(seed)
    is_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        is_test[members[: int(test_fraction * len(members))]] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def split(name: str, images: np.ndarray, labels: np.ndarray, test_fraction: float) -> ImageData:
    """Return `ImageData` with a fixed stratified test set, normalised by the training images, without crops and flips."""
    train, test = stratified_split(labels, test_fraction)
    return assemble(name, (images[train], labels[train]), (images[test], labels[test]), int(labels.max()) + 1)


def load(
    spec: str | os.PathLike,
    *,
    augment: str | None = None,
    padding: int | None = None,
    flip: bool | None = None,
    size: int | None = None,
    mean: str | float | Sequence[float] | None = None,
    std: str | float | Sequence[float] | None = None,
) -> ImageData:
    """Return the data set that `spec` names.

    Args:
        spec: One of

            - a key of `REGISTRY`. `cifar10` and `cifar100` are searched for in the folder that the environment variable
              KCD_DATA names, or in `./data` if it is not set.
            - `module:function`, a function that returns an `ImageData`.
            - the path of a CIFAR archive or the folder in it (`cifar.py`), of an `.npz` file (`npz.py`), or of a folder
              of images by class (`folder.py`).
        augment: How training images change from epoch to epoch. None: as the data set has it, which is "crop-flip" for CIFAR
            and "none" for all others here.

            - "crop-flip": crops and flips, as `padding` and `flip` say.
            - "none": neither.
            - "randaugment" (Cubuk et al., 2020): crops and flips, then 2 random operations of magnitude 9 out of 30.
            - "trivialaugment" (Müller and Hutter, 2021, wide space): crops and flips, then 1 random operation of random
              strength.
        padding: Pixels around training images for random crops (`Views`). None: the data set's, which is 4 for CIFAR and
            0 for all others here.
        flip: Whether to flip training images at random (`Views`). None: the data set's, which is True for CIFAR and False
            for all others here.
        size: Height and width in pixels to scale a folder of images to. None: all images must have one size.
        mean: Networks take (pixels / 255 - mean) / std. One number in [0, 1], or one per channel; or "imagenet"
            (0.485, 0.456, 0.406 and 0.229, 0.224, 0.225) or "half" (0.5 and 0.5), which include the std. None: the data
            set's, which is the mean of its training images for all here.
        std: One number in (0, 1], or one per channel. None: the data set's, as for `mean`.

    Warns:
        UserWarning: A class has no training or no test images, entries of a folder are skipped, or a folder has several
            parts of the same kind, such as `test` and `val`; names them.

    Raises:
        ValueError: The name is unknown, the function fails, a file has the wrong content, `augment` is unknown, has no effect,
            contradicts `padding` or `flip` or is for another number of channels, `padding` is not smaller than the images,
            `size` is given for anything but a folder of images, or `mean` or `std` is missing, out of range or for another
            number of channels.
        OSError: A file or folder is missing or cannot be read.
        ImportError: The package that contains or reads the images is not installed; names the extra that installs it.
        TypeError: An argument is of another kind, or the function returns something else.
    """
    normalisation = check_normalisation(mean, std)
    if isinstance(spec, str) and spec not in REGISTRY and ":" not in spec and not _is_path(spec):
        raise unknown_name_error("data set", spec, sorted(REGISTRY), "a path such as ./images, or module:function")
    if _is_path(spec):
        data = call("data set", PATHS, {}, path=Path(spec), size=size)
    elif size is not None and isinstance(spec, str) and (spec in REGISTRY or ":" in spec):
        raise ValueError(f"size is for the path of a folder of images, got size={size!r} for data set {spec!r}")
    else:
        data = call("data set", spec, REGISTRY)
    if not isinstance(data, ImageData):
        raise TypeError(f"data set {spec!r} must return a kcd_ext.data.images.ImageData, got {type(data).__name__}")
    _warn_about_classes_without_images(data)
    if normalisation is not None:
        try:
            train, test = (part.views.with_normalisation(*normalisation) for part in (data.train, data.test))
        except ValueError as error:
            raise ValueError(f"{error} (images of {spec})") from error
        data = replace(data, train=_with_views(data.train, train), test=_with_views(data.test, test))
    return data.augmented(augment, padding=padding, flip=flip)


def _with_views(images: ImageSet, views: Views) -> ImageSet:
    return ImageSet(images.images, images.labels, views)


def _warn_about_classes_without_images(data: ImageData) -> None:
    names = list(map(repr, data.class_names or range(data.num_classes)))
    notes = []
    for part, images in (("training", data.train), ("test", data.test)):
        counts = np.bincount(images.labels, minlength=data.num_classes)
        if empty := [names[label] for label in np.flatnonzero(counts == 0)]:
            notes.append(f"{len(empty)} of {data.num_classes} classes have no {part} images: {join_names(empty)}")
    if notes:
        warnings.warn(f"data set {data.name!r}: {'; '.join(notes)}", stacklevel=3)


def _is_path(spec: object) -> bool:
    """Return whether `spec` is a path. A key of REGISTRY is not, even if a file has that name; `./name` is."""
    if not isinstance(spec, str) or spec in REGISTRY:
        return isinstance(spec, os.PathLike)
    return os.sep in spec or (spec != "" and Path(spec).exists())
