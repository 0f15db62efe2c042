"""Data sets in an `.npz` file: x_train, y_train, x_test, y_test and optionally class_names."""

import zipfile
from pathlib import Path

import numpy as np

from ..describe import one_line
from ..files import open_regular
from .images import ImageData, assemble

REQUIRED = ("x_train", "y_train", "x_test", "y_test")


def read(path: Path) -> ImageData:
    """Return the data set in the file; training images are neither cropped nor flipped.

    The file contains these arrays. Pickled objects are refused.

    - x_train, x_test: uint8 `(n, h, w, c)`, or `(n, h, w)` for one channel.
    - y_train, y_test: `(n,)` or `(n, 1)`, integers >= 0 or booleans (False is class 0, True class 1).
    - class_names (optional): `(classes,)` strings. Without them, the largest label determines the number of classes,
      which must not exceed the number of images.

    Raises:
        ValueError: The file is damaged, or an array is missing or of another kind; names the file and the array.
        OSError: The file cannot be opened.
    """
    arrays = _read_arrays(path)
    missing = [name for name in REQUIRED if name not in arrays]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} missing, it must contain the arrays {', '.join(REQUIRED)}")
    train, test = ((_images(path, f"x_{part}", arrays), _labels(path, part, arrays)) for part in ("train", "test"))
    names = _class_names(path, arrays)
    num_classes = len(names) or _count_classes(path, train[1], test[1])
    try:
        return assemble(path.stem, train, test, num_classes, names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a data set by name; others are not read."""
    with open_regular(path) as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path}: not an .npz file, or damaged: it is no zip archive")
        name = "its directory"
        try:
            with zipfile.ZipFile(file) as archive:
                members = set(archive.namelist())
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                arrays = {}
                for name in (*REQUIRED, "class_names"):
                    if f"{name}.npy" in members:
                        arrays[name] = archive[name]
                return arrays
        except Exception as error:  # zipfile and NumPy raise any exception for malformed bytes
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
    if labels.shape == (len(images), 1):  # the form of databases and TensorFlow
        labels = labels[:, 0]
    if labels.dtype == np.bool_:
        labels = labels.astype(np.int64)
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        one_hot = labels.ndim == 2 and len(labels) == len(images)
        hint = f"; convert one-hot labels with y_{part}.argmax(1)" if one_hot else ""
        raise ValueError(f"{path}: y_{part} must be {len(images)} integers, as many as x_{part}, got {kind}{hint}")
    if labels.min() < 0:
        raise ValueError(f"{path}: y_{part} must be integers >= 0, got {labels.min()}")
    return labels


def _count_classes(path: Path, *parts: np.ndarray) -> int:
    """Return the largest label of all parts plus 1."""
    largest, images = max(int(labels.max()) for labels in parts), sum(map(len, parts))
    if largest >= images:  # probably not class numbers
        raise ValueError(
            f"{path}: y_train and y_test must number the classes from 0, got label {largest} for {images} images; "
            f"if there really are so many classes, add class_names"
        )
    return largest + 1


def _class_names(path: Path, arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
    names = arrays.get("class_names", np.empty(0, dtype=np.str_))
    if names.ndim != 1 or names.dtype.kind != "U":
        raise ValueError(f"{path}: class_names must be strings (classes,), got {names.dtype} {names.shape}")
    return tuple(names.tolist())
