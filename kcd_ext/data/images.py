"""Data sets of images that fit in memory: by name, out of a file or folder, or anybody's own."""

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
from ..describe import describe, some
from ..registry import call
from .views import Views, check_normalisation

REGISTRY = {
    "cifar10": "kcd_ext.data.cifar:cifar10",
    "cifar100": "kcd_ext.data.cifar:cifar100",
    "digits": "kcd_ext.data.packaged:digits",
    "mnist5k": "kcd_ext.data.packaged:mnist5k",
}
PATHS = "kcd_ext.data.files:read"


class ImageSet(Dataset):
    """Images and labels held as arrays, and the views that networks take of them.

    Item i is `(image, label)`, raw, for `IndexedDataset` to mix. Arrays that are not contiguous or may not be written
    are copied, others are held as they are.

    Args:
        images: (n, h, w, c) uint8.
        labels: (n,) integers, 0 up to the number of classes - 1; held as int64.
        views: what makes float tensors of batches of images; must be made for c channels.

    Raises:
        TypeError, ValueError: an argument is of another kind.
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
            raise ValueError(f"views must be made for {images.shape[-1]} channels, got one for {len(views.mean)}")
        self.images = np.require(images, requirements=("C", "W"))
        self.labels = labels.astype(np.int64)
        self.views = views

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])

    def tensors(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Images (n, h, w, c) uint8 and labels (n,) int64 on a device: on the CPU the arrays' own memory."""
        return torch.from_numpy(self.images).to(device), torch.from_numpy(self.labels).to(device)


@dataclass(frozen=True)
class ImageData:
    """A data set ready for `distill`: raw training and test images, each with its views.

    Raises:
        TypeError, ValueError: a part is of another kind or empty, a label lies outside [0, num_classes), the images of
            the parts differ in shape, the views of the test images are random, or class_names are given and are not
            num_classes strings.
    """

    name: str
    train: ImageSet
    test: ImageSet
    num_classes: int
    class_names: tuple[str, ...] = ()
    """What the labels stand for; empty: unknown."""

    def __post_init__(self) -> None:
        check_int(f"data set {self.name!r}: num_classes", self.num_classes, 1)
        for part in ("train", "test"):
            held = getattr(self, part)
            if not isinstance(held, ImageSet):
                raise TypeError(f"data set {self.name!r}: {part} must be an ImageSet, got {type(held).__name__}")
            if not held.images.size:
                raise ValueError(
                    f"data set {self.name!r}: {part} must hold at least one image, got shape {held.images.shape}"
                )
            low, high = held.labels.min(), held.labels.max()
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"data set {self.name!r}: labels of {part} must lie in [0, {self.num_classes}), got {low} to {high}"
                )
        train, test = (held.images.shape[1:] for held in (self.train, self.test))
        if train != test:
            raise ValueError(f"data set {self.name!r}: images of train and test must agree, got {train} and {test}")
        if self.test.views.padding or self.test.views.flip:
            raise ValueError(
                f"data set {self.name!r}: test must have views with padding=0 and flip=False, "
                f"got padding={self.test.views.padding} and flip={self.test.views.flip}"
            )
        check_class_names(self.name, self.class_names)
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"data set {self.name!r}: class_names must hold {self.num_classes} names, got {len(self.class_names)}"
            )

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return self.train.images.shape[-1]


def check_class_names(data_set: str, names: tuple[str, ...]) -> None:
    """Raise TypeError or ValueError unless `names` is a tuple of strings that can be written in UTF-8."""
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"data set {data_set!r}: class_names must be a tuple of strings, got {describe(names)}")
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:  # of a file's name in another encoding; no report could be written
            raise ValueError(f"data set {data_set!r}: class name {name!r} is no text in UTF-8") from error


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
    """`ImageData` of (images, labels) pairs, normalised by the training images; `padding` and `flip` as in `Views`.

    Bytes of a file's name that are no UTF-8 are written as escapes in the name, so that a report can hold it.
    """
    name = name.encode(errors="backslashreplace").decode()
    views = Views.of(train[0], padding=padding, flip=flip)
    plain = replace(views, padding=0, flip=False)
    return ImageData(name, ImageSet(*train, views), ImageSet(*test, plain), num_classes, class_names)


def stratified_split(labels: np.ndarray, test_fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, test), ascending; int(test_fraction * count) of every class are test. Same seed, same split."""
    random = np.random.default_rng(seed)
    is_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        is_test[members[: int(test_fraction * len(members))]] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def split(name: str, images: np.ndarray, labels: np.ndarray, test_fraction: float) -> ImageData:
    """`ImageData` with a fixed stratified test set, normalised by the training images, neither cropped nor flipped."""
    train, test = stratified_split(labels, test_fraction)
    return assemble(name, (images[train], labels[train]), (images[test], labels[test]), int(labels.max()) + 1)


def load(
    spec: str | os.PathLike,
    *,
    padding: int | None = None,
    flip: bool | None = None,
    size: int | None = None,
    mean: str | float | Sequence[float] | None = None,
    std: str | float | Sequence[float] | None = None,
) -> ImageData:
    """The data set that `spec` stands for.

    Args:
        spec: a key of REGISTRY; or `module:function`, a function that gives an `ImageData`; or the path of a CIFAR
            archive or of the folder that was in it (`cifar.py`), of an `.npz` file (`npz.py`), or of a folder of images
            by class (`folder.py`). `cifar10` and `cifar100` are looked for in the folder that the environment variable
            KCD_DATA names, without it in `./data`.
        padding, flip: how training images are cropped and flipped (`Views`). None: as the data set has it, which is 4
            and True for CIFAR, 0 and False for all others here.
        size: for a folder of images: height and width in pixels that all are scaled to. None: they must agree.
        mean, std: networks take (pixels / 255 - mean) / std: a number each, in [0, 1], or one for every channel; or
            mean="imagenet" (0.485, 0.456, 0.406 and 0.229, 0.224, 0.225) or mean="half" (0.5 and 0.5), alone. None: as
            the data set has it, which is the mean and standard deviation of its training images for all here.

    Warns:
        UserWarning: a class has no training or no test images, or a folder holds what is skipped; names them.

    Raises:
        ValueError: the name is unknown, the function fails, a file does not hold what it should, `padding` is not
            smaller than the images, or one of `mean` and `std` is missing, out of range or for other channels.
        OSError: a file or folder is missing or cannot be read.
        ImportError: the package that holds or reads the images is not installed; says which extra installs it.
        TypeError: an argument is of another kind, or the function gives something else.
    """
    normalisation = check_normalisation(mean, std)
    if _is_path(spec):
        data = call("data set", PATHS, {}, path=Path(spec), size=size)
    elif size is not None and isinstance(spec, str) and (spec in REGISTRY or ":" in spec):
        raise ValueError(f"size is for the path of a folder of images, got size={size!r} for data set {spec!r}")
    else:
        data = call("data set", spec, REGISTRY)
    if not isinstance(data, ImageData):
        raise TypeError(f"data set {spec!r} must give a kcd_ext.data.images.ImageData, got {type(data).__name__}")
    _warn_of_classes_without_images(data)
    if normalisation is not None:
        try:
            train, test = (part.views.normalised_by(*normalisation) for part in (data.train, data.test))
        except ValueError as error:
            raise ValueError(f"{error} (images of {spec})") from error
        data = replace(data, train=_viewed(data.train, train), test=_viewed(data.test, test))
    asked = {name: value for name, value in (("padding", padding), ("flip", flip)) if value is not None}
    if not asked:
        return data
    views, side = replace(data.train.views, **asked), min(data.train.images.shape[1:3])
    if padding is not None and padding >= side:  # crops of black alone
        raise ValueError(f"padding must be < {side}, the smaller side of the images, got {padding}")
    return replace(data, train=_viewed(data.train, views))


def _viewed(images: ImageSet, views: Views) -> ImageSet:
    return ImageSet(images.images, images.labels, views)


def _warn_of_classes_without_images(data: ImageData) -> None:
    names = list(map(repr, data.class_names or range(data.num_classes)))
    notes = []
    for part, held in (("training", data.train), ("test", data.test)):
        counts = np.bincount(held.labels, minlength=data.num_classes)
        if empty := [names[label] for label in np.flatnonzero(counts == 0)]:
            notes.append(f"{len(empty)} of {data.num_classes} classes have no {part} images: {some(empty)}")
    if notes:
        warnings.warn(f"data set {data.name!r}: {'; '.join(notes)}", stacklevel=3)


def _is_path(spec: object) -> bool:
    """A name of REGISTRY is none, whatever lies in the working directory; `./name` is one."""
    if not isinstance(spec, str) or spec in REGISTRY:
        return isinstance(spec, os.PathLike)
    return os.sep in spec or (spec != "" and Path(spec).exists())
