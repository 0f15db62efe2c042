"""Data sets in an `.npz` file: x_train, y_train, x_test, y_test and optionally x_val, y_val and class_names."""

import zipfile
from pathlib import Path

import numpy as np

from ..describe import one_line
from ..files import open_regular
from .images import ImageData, assemble, count_classes
from .reading import Reading
from .splits import ADVICE, divide

PARTS = ("train", "val", "test")
REQUIRED = ("x_train", "y_train", "x_test", "y_test")


def read(path: Path, reading: Reading | None = None) -> ImageData:
    """Return the data set in the file; training images are neither cropped nor flipped.

    The file contains these arrays. Pickled objects are refused.

    - x_train, x_val, x_test: uint8 `(n, h, w, c)`, or `(n, h, w)` for one channel.
    - y_train, y_val, y_test: `(n,)` or `(n, 1)`, integers >= 0 or booleans (False is class 0, True class 1).
    - class_names (optional): `(classes,)` strings. Without them, the largest label determines the number of classes,
      which must not exceed the number of images.

    x_val and y_val are optional. Without x_test and y_test they are the test images, unless `reading` splits off others.

    Args:
        path: The file.
        reading: The options of `load`, of which the fractions are used. None: the defaults.

    Raises:
        ValueError: The file is damaged, or an array is missing or of another kind; names the file and the array. Or as `divide`.
        OSError: The file cannot be opened.
    """
    reading = reading or Reading()
    arrays = _read_arrays(path)
    splits = reading.val_fraction is not None or reading.test_fraction is not None
    required = [name for name in REQUIRED if not splits or name not in ("x_test", "y_test")]
    if {"x_val", "y_val"} <= {*arrays} and arrays.keys().isdisjoint(("x_test", "y_test")):
        required = ["x_train", "y_train"]
    for part in PARTS:  # both arrays or none
        required += [f"{other}_{part}" for one, other in ("xy", "yx") if f"{one}_{part}" in arrays]
    missing = [name for name in dict.fromkeys(required) if name not in arrays]
    if missing:
        advice = "" if "x_train" in missing or "y_train" in missing else f"; without test images, {ADVICE}"
        raise ValueError(
            f"{path}: {', '.join(missing)} missing, it must contain the arrays {', '.join(REQUIRED)}{advice}"
        )
    found = [part for part in PARTS if f"x_{part}" in arrays]
    images = {part: _images(path, f"x_{part}", arrays) for part in found}
    labels = {part: _labels(path, part, arrays) for part in found}
    names = _class_names(path, arrays)
    remedy = "if there really are so many classes, add class_names"
    num_classes = len(names) or count_classes(f"{path}: y_train and y_test", labels.values(), remedy)
    chosen = divide(path, labels, reading.val_fraction, reading.test_fraction)
    sets = {
        part: (images[source], labels[source])
        if len(index) == len(labels[source])
        else (images[source][index], labels[source][index])
        for part, (source, index) in chosen.items()
    }
    try:
        return assemble(path.stem, sets["train"], sets["test"], num_classes, names, val=sets.get("val"))
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
                for name in (*(f"{axis}_{part}" for part in PARTS for axis in "xy"), "class_names"):
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


def _class_names(path: Path, arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
    names = arrays.get("class_names", np.empty(0, dtype=np.str_))
    if names.ndim != 1 or names.dtype.kind != "U":
        raise ValueError(f"{path}: class_names must be strings (classes,), got {names.dtype} {names.shape}")
    return tuple(names.tolist())
