"""Data sets in an `.npz` file: x_train, y_train, x_test, y_test and, if one likes, class_names."""

import zipfile
from pathlib import Path

import numpy as np

from ..describe import one_line
from ..files import open_regular
from .images import ImageData, assemble

REQUIRED = ("x_train", "y_train", "x_test", "y_test")


def read(path: Path) -> ImageData:
    """The data set in the file; training images are neither cropped nor flipped.

    x_train, x_test: uint8 (n, h, w, c), or (n, h, w) for one channel; y_train, y_test: (n,) or (n, 1), integers from 0
    on or booleans, of which False is class 0 and True class 1; class_names: (classes,) strings, without which there are
    as many classes as the largest label says, and no more than images. Nothing is unpickled.

    Raises:
        ValueError: the file is damaged, an array is missing, or of another kind; names the file and the array.
        OSError: the file cannot be opened.
    """
    arrays = _arrays(path)
    missing = [name for name in REQUIRED if name not in arrays]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} missing, it must hold the arrays {', '.join(REQUIRED)}")
    train, test = ((_images(path, f"x_{part}", arrays), _labels(path, part, arrays)) for part in ("train", "test"))
    names = _class_names(path, arrays)
    num_classes = len(names) or _counted(path, train[1], test[1])
    try:
        return assemble(path.stem, train, test, num_classes, names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Those that a data set has, by name."""
    with open_regular(path) as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path}: damaged, or no .npz file at all: it is no zip archive")
        name = "its directory"
        try:
            with zipfile.ZipFile(file) as archive:
                held = set(archive.namelist())
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                arrays = {}
                for name in (*REQUIRED, "class_names"):
                    if f"{name}.npy" in held:
                        arrays[name] = archive[name]
                return arrays
        except Exception as error:  # zipfile and NumPy raise what they like at bytes that make no sense
            raise ValueError(f"{path}: {name} cannot be read: {one_line(error)}") from error


def _images(path: Path, name: str, arrays: dict[str, np.ndarray]) -> np.ndarray:
    images = arrays[name]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise ValueError(
            f"{path}: {name} must be uint8 (n, h, w) or (n, h, w, c), not empty, got {images.dtype} {images.shape}"
        )
    if images.ndim == 4 and images.shape[3] > 4 and images.shape[1] <= 4:
        raise ValueError(f"{path}: {name} must have its channels last, (n, h, w, c), got shape {images.shape}")
    return images if images.ndim == 4 else images[..., np.newaxis]


def _labels(path: Path, part: str, arrays: dict[str, np.ndarray]) -> np.ndarray:
    labels, images = arrays[f"y_{part}"], arrays[f"x_{part}"]
    kind = f"{labels.dtype} {labels.shape}"
    if labels.shape == (len(images), 1):  # as databases and TensorFlow write them
        labels = labels[:, 0]
    if labels.dtype == np.bool_:
        labels = labels.astype(np.int64)
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        one_hot = labels.ndim == 2 and len(labels) == len(images)
        hint = f"; of one-hot labels y_{part}.argmax(1) gives them" if one_hot else ""
        raise ValueError(f"{path}: y_{part} must be {len(images)} integers, as many as x_{part}, got {kind}{hint}")
    if labels.min() < 0:
        raise ValueError(f"{path}: y_{part} must be integers from 0 on, got {labels.min()}")
    return labels


def _counted(path: Path, *parts: np.ndarray) -> int:
    """How many classes the labels of all parts speak of."""
    largest, images = max(int(labels.max()) for labels in parts), sum(map(len, parts))
    if largest >= images:  # rather numbers of something else than of classes
        raise ValueError(
            f"{path}: y_train and y_test must number classes from 0 on, got a label {largest} for {images} images; "
            f"where there are so many classes, class_names says so"
        )
    return largest + 1


def _class_names(path: Path, arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
    names = arrays.get("class_names", np.empty(0, dtype=np.str_))
    if names.ndim != 1 or names.dtype.kind != "U":
        raise ValueError(f"{path}: class_names must be strings (classes,), got {names.dtype} {names.shape}")
    return tuple(names.tolist())
