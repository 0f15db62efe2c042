"""Data sets of images: by name, from a file or folder, or from your own function."""

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..checks import check_choice, check_int
from ..describe import brief, describe, did_you_mean, join_names
from ..registry import call, unknown_name_error
from .augmentation import POLICIES
from .reading import Reading
from .resizing import RESIZES
from .splits import divide, stratified_split
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
FOR_FILES = ("size", "memory", "image_column", "label_column")  # options for image files


class LabelledImages(Dataset):
    """Images of one shape with their labels, and the views that networks are trained on: an `ImageSet` or `ImageFiles`.

    Item i is the raw `(image, label)`: uint8 `(h, w, c)`, and an integer.

    Args:
        shape: Height, width and channels of every image.
        labels: `(n,)` integers from 0 to the number of classes - 1; stored as int64.
        views: Converts batches of images to float tensors; must be for c channels.

    Raises:
        TypeError: `views` has the wrong type.
        ValueError: A label does not fit int64, or `views` are for another number of channels.
    """

    def __init__(self, shape: tuple[int, int, int], labels: np.ndarray, views: Views):
        if labels.size and int(labels.max()) > np.iinfo(np.int64).max:
            raise ValueError(f"labels must fit int64, got {labels.max()}")
        if not isinstance(views, Views):
            raise TypeError(f"views must be a kcd_ext.data.views.Views, got {type(views).__name__}")
        if len(views.mean) != shape[-1]:
            raise ValueError(f"views must be for {shape[-1]} channels, got views for {len(views.mean)}")
        self.shape = shape
        self.labels = labels.astype(np.int64)
        self.views = views

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        raise NotImplementedError

    def with_views(self, views: Views) -> "LabelledImages":
        """Return the same images with other views, without a copy. Raises as the class."""
        raise NotImplementedError

    def take(self, index: np.ndarray) -> "LabelledImages":
        """Return the images `index` `(m,)` int64, in this order, with the same views."""
        raise NotImplementedError

    def blocks(self) -> Iterable[np.ndarray]:
        """Return all images in order, in blocks: uint8 `(b, h, w, c)` each."""
        raise NotImplementedError


class ImageSet(LabelledImages):
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
        super().__init__(images.shape[1:], labels, views)
        self.images = np.require(images, requirements=("C", "W"))

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])

    def with_views(self, views: Views) -> "ImageSet":
        """Return the same images with other views, without a copy. Raises as the class."""
        return ImageSet(self.images, self.labels, views)

    def take(self, index: np.ndarray) -> "ImageSet":
        """Return a copy of the images `index` `(m,)` int64, in this order, with the same views."""
        return ImageSet(self.images[index], self.labels[index], self.views)

    def blocks(self) -> Iterable[np.ndarray]:
        """Return all images as one block."""
        return [self.images]

    def tensors(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Return images `(n, h, w, c)` uint8 and labels `(n,)` int64 on a device; on the CPU they share the arrays' memory."""
        return torch.from_numpy(self.images).to(device), torch.from_numpy(self.labels).to(device)


@dataclass(frozen=True)
class ImageData:
    """A data set ready for `distill`: raw images to train, to validate and to test, each part with its views.

    Raises:
        TypeError: A part is neither an `ImageSet` nor an `ImageFiles`, `num_classes` is not an integer, or `class_names` is not
            a tuple of strings.
        ValueError: A part is empty, a label is outside [0, num_classes), the images of the parts differ in shape, the
            views of validation or test images are random, `class_names` are given but are not `num_classes` names in UTF-8, or
            `resize` is unknown.
    """

    name: str
    """The name of the data set, for messages and reports."""
    train: LabelledImages
    """The training images: an `ImageSet` in memory, or `ImageFiles` on disk."""
    test: LabelledImages
    """The test images; their views neither crop nor flip, and have no policy."""
    num_classes: int
    """The number of classes, at least 1."""
    class_names: tuple[str, ...] = ()
    """The names of the classes, by label. Empty: unknown."""
    val: LabelledImages | None = None
    """The validation images; their views neither crop nor flip. None: there are none."""
    resize: str | None = None
    """How the images were brought to their size, `crop` or `squash`, as in `kcd_ext.data.resizing.resized`. None: as stored."""

    def __post_init__(self) -> None:
        check_int(f"data set {self.name!r}: num_classes", self.num_classes, 1)
        for part in ("train", "test") if self.val is None else ("train", "val", "test"):
            images = getattr(self, part)
            if not isinstance(images, LabelledImages):
                raise TypeError(
                    f"data set {self.name!r}: {part} must be an ImageSet or ImageFiles, got {type(images).__name__}"
                )
            if not len(images) or 0 in images.shape:
                raise ValueError(
                    f"data set {self.name!r}: {part} must have at least one image, got shape {(len(images), *images.shape)}"
                )
            low, high = images.labels.min(), images.labels.max()
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"data set {self.name!r}: labels of {part} must be in [0, {self.num_classes}), got {low} to {high}"
                )
            if images.shape != self.train.shape:
                raise ValueError(
                    f"data set {self.name!r}: images of train and {part} must have one shape, got {self.train.shape} and "
                    f"{images.shape}"
                )
            views = images.views
            if part != "train" and (views.padding or views.flip or views.policy):
                raise ValueError(
                    f"data set {self.name!r}: {part} must have views with padding=0, flip=False and policy=None, "
                    f"got padding={views.padding}, flip={views.flip} and policy={views.policy!r}"
                )
        if self.resize is not None:
            check_choice(f"data set {self.name!r}: resize", self.resize, RESIZES)
        check_class_names(self.name, self.class_names)
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"data set {self.name!r}: class_names must be {self.num_classes} names, got {len(self.class_names)}"
            )

    @property
    def in_channels(self) -> int:
        """The number of channels of an image."""
        return self.train.shape[-1]

    def map_parts(self, change: Callable[[LabelledImages], LabelledImages]) -> "ImageData":
        """Return the data set with every part changed by a function."""
        val = None if self.val is None else change(self.val)
        return replace(self, train=change(self.train), test=change(self.test), val=val)

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
        views, side = self.train.views, min(self.train.shape[:2])
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
        return replace(self, train=self.train.with_views(views))


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
    val: tuple[np.ndarray, np.ndarray] | None = None,
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
        val: As `train`, for validation. None: no validation images.
    """
    views = Views.from_images(train[0], padding=padding, flip=flip)
    test_views = replace(views, padding=0, flip=False)
    validation = None if val is None else ImageSet(*val, test_views)
    return ImageData(
        printable_name(name), ImageSet(*train, views), ImageSet(*test, test_views), num_classes, class_names, validation
    )


def count_classes(what: str, parts: Iterable[np.ndarray], remedy: str) -> int:
    """Return the largest label of all parts plus 1. Raises ValueError if there are fewer images: these are no class numbers."""
    parts = list(parts)
    largest, images = max(int(labels.max()) for labels in parts), sum(map(len, parts))
    if largest >= images:
        raise ValueError(f"{what} must number the classes from 0, got label {largest} for {images} images; {remedy}")
    return largest + 1


def printable_name(name: str) -> str:
    """Return the name with bytes of a file name that are not UTF-8 escaped, so that a report can contain it."""
    return name.encode(errors="backslashreplace").decode()


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
    resize: str | None = None,
    mean: str | float | Sequence[float] | None = None,
    std: str | float | Sequence[float] | None = None,
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    memory: int | str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    progress: Callable[..., AbstractContextManager] | None = None,
) -> ImageData:
    """Return the data set that `spec` names.

    Args:
        spec: One of

            - a key of `REGISTRY`. `cifar10` and `cifar100` are searched for in the folder that the environment variable
              KCD_DATA names, or in `./data` if it is not set.
            - `module:function`, a function that returns an `ImageData`.
            - the path of a CIFAR archive or the folder in it (`cifar.py`), of an `.npz` file (`npz.py`), of a folder of
              images by class (`folder.py`), or of a data set that Hugging Face `datasets` saved, or of Parquet files
              (`huggingface.py`).
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
        size: Height and width in pixels that every image of a folder or a Hugging Face data set is resized to. None: all
            images must have one size.
        resize: How: `crop` (default) scales the shorter side to `size` and crops the centre; `squash` scales both sides.
        mean: Networks take (pixels / 255 - mean) / std. One number in [0, 1], or one per channel; or "imagenet"
            (0.485, 0.456, 0.406 and 0.229, 0.224, 0.225) or "half" (0.5 and 0.5), which include the std. None: the data
            set's, which is the mean of its training images for all here.
        std: One number in (0, 1], or one per channel. None: the data set's, as for `mean`.
        val_fraction: Share of the training images of every class that is split off for validation, in (0, 1). The split
            depends only on the labels and the order of the images. None: validation images are those of the data set, if
            it has any.
        test_fraction: Likewise for a file, folder or Hugging Face data set without test images. Without both test images
            and `test_fraction`, the validation images test too.
        memory: Bytes that the images of a folder or a Hugging Face data set may take in memory, decoded: an integer, or a
            text such as "4GB". Larger sets stay on disk (`ImageFiles`); the results are the same. None: a quarter of the
            memory that is available, divided among the processes on this machine.
        image_column: The column with the images of a Hugging Face data set. None: the only one of the type `Image`.
        label_column: The column with its labels. None: the only one of the type `ClassLabel`.
        progress: Called as `progress(total=..., desc=...)` when many files are read, for a context manager with `update(n)`,
            such as `tqdm.tqdm`. None: nothing is reported.

    Warns:
        UserWarning: A class has no images in a part, entries of a folder are skipped, a folder has several parts of the same
            kind, such as `val` and `valid`, or the validation images test too; names them.

    Raises:
        ValueError: The name is unknown, the function fails, a file has the wrong content, `augment` is unknown, has no effect,
            contradicts `padding` or `flip` or is for another number of channels, `padding` is not smaller than the images,
            an option is given for data that it is not for or has no effect, a fraction leaves a part without images, or
            `mean` or `std` is missing, out of range or for another number of channels.
        OSError: A file or folder is missing or cannot be read.
        ImportError: The package that contains or reads the images is not installed; names the extra that installs it.
        TypeError: An argument is of another kind, or the function returns something else.
    """
    normalisation = check_normalisation(mean, std)
    reading = Reading(
        size, resize, val_fraction, test_fraction, memory, image_column, label_column, normalisation, progress
    )
    if isinstance(spec, str) and spec not in REGISTRY and ":" not in spec and not _is_path(spec):
        raise unknown_name_error("data set", spec, sorted(REGISTRY), "a path such as ./images, or module:function")
    if _is_path(spec):
        data = call("data set", PATHS, {}, path=Path(spec), reading=reading)
    else:
        if isinstance(spec, str):
            reading.check_unused(
                FOR_FILES, "the path of a folder of images or of a saved data set", f"data set {spec!r}"
            )
            reading.check_unused(("test_fraction",), "data without test images", f"data set {spec!r}")
        data = call("data set", spec, REGISTRY)
        if isinstance(data, ImageData):
            data = split_off_validation(data, val_fraction)
    if not isinstance(data, ImageData):
        raise TypeError(f"data set {spec!r} must return a kcd_ext.data.images.ImageData, got {type(data).__name__}")
    _warn_about_classes_without_images(data)
    if normalisation is not None:
        try:
            data = data.map_parts(lambda part: part.with_views(part.views.with_normalisation(*normalisation)))
        except ValueError as error:
            raise ValueError(f"{error} (images of {spec})") from error
    return data.augmented(augment, padding=padding, flip=flip)


def split_off_validation(data: ImageData, val_fraction: float | None) -> ImageData:
    """Return the data set with a share of its training images as validation images; unchanged for None.

    If the images are in memory and normalised by the training images, they are normalised by those that remain.

    Raises:
        ValueError: As `divide`.
    """
    if val_fraction is None:
        return data
    parts = {"train": data.train, "val": data.val, "test": data.test}
    labels = {name: part.labels for name, part in parts.items() if part is not None}
    divided = divide(f"data set {data.name!r}", labels, val_fraction, None)
    train, val = (data.train.take(divided[part][1]) for part in ("train", "val"))
    views = data.train.views
    if isinstance(data.train, ImageSet) and views == replace(
        views, mean=(own := Views.from_images(data.train.images)).mean, std=own.std
    ):
        rest = Views.from_images(train.images)
        views = replace(views, mean=rest.mean, std=rest.std)
        test = data.test.with_views(replace(data.test.views, mean=rest.mean, std=rest.std))
        data = replace(data, test=test)
    return replace(data, train=train.with_views(views), val=val.with_views(data.test.views))


def _warn_about_classes_without_images(data: ImageData) -> None:
    names = list(map(repr, data.class_names or range(data.num_classes)))
    notes = []
    for part, images in (("training", data.train), ("validation", data.val), ("test", data.test)):
        if images is None or (part == "test" and images is data.val):
            continue
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
