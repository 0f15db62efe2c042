"""Data sets of Hugging Face `datasets` on disk: what `save_to_disk` wrote, and Parquet files. Nothing is downloaded or executed."""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..describe import did_you_mean, join_names, one_line
from ..files import open_regular
from . import parquet
from .folder import PARTS
from .image_files import assemble_files
from .images import ImageData, check_class_names, count_classes
from .reading import Reading
from .splits import ADVICE

MARKERS = ("dataset_dict.json", "state.json")  # files of a DatasetDict and of a Dataset
NAMES = {"train": PARTS["train"], "val": (*PARTS["val"], "dev"), "test": PARTS["test"]}  # of splits


class Rows:
    """The encoded images of a column.

    Args:
        dataset: A `datasets.Dataset` with this one column, not decoded, in Arrow format.
        name: The name of the data set in messages.
    """

    def __init__(self, dataset: Any, name: str):
        self._dataset = dataset
        self._name = name

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, index: int) -> str:
        """Return the path of the data set and the number of the row."""
        return f"{self._name}[{index}]"

    def open(self, index: int) -> BinaryIO:
        """Open the bytes of a row, or the file that it names. Raises ValueError or OSError."""
        import pyarrow

        image = self._dataset[index][0][0]
        if not image.is_valid:
            raise ValueError(f"{self.name(index)}: must have an image, got None")
        encoded = image["bytes"]
        if encoded.is_valid:
            return pyarrow.BufferReader(encoded.as_buffer())  # without a copy: a header is a small part of it
        path = image["path"].as_py()
        if path is None or "://" in path:
            raise ValueError(f"{self.name(index)}: must have the bytes of an image or a local path, got {path!r}")
        return open_regular(path)

    def stamp(self, index: int) -> str:
        """Return the number of bytes of a row's image."""
        with self.open(index) as file:
            return str(file.seek(0, os.SEEK_END))

    def take(self, index: np.ndarray) -> "Rows":
        """Return some of the rows."""
        return _TakenRows(self, index)


class _TakenRows(Rows):
    """Some of the rows, named by their number in the whole column."""

    def __init__(self, rows: Rows, index: np.ndarray):
        self._rows = rows
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def name(self, index: int) -> str:
        return self._rows.name(int(self._index[index]))

    def open(self, index: int) -> BinaryIO:
        return self._rows.open(int(self._index[index]))

    def stamp(self, index: int) -> str:
        return self._rows.stamp(int(self._index[index]))


def is_saved(path: Path) -> bool:
    """Return whether `path` is a folder that `save_to_disk` wrote, a Parquet file or a folder of such."""
    if any((path / marker).is_file() for marker in MARKERS):
        return True
    return not _has_class_folders(path) and bool(parquet.find(path))


def _has_class_folders(path: Path) -> bool:
    """Return whether `path` is a folder of images, with a folder for each class of the training part."""
    parts = [entry for entry in path.iterdir() if entry.name.lower() in PARTS["train"]] if path.is_dir() else []
    return any(entry.is_dir() for part in parts if part.is_dir() for entry in part.iterdir())


def read(path: Path, reading: Reading) -> ImageData:
    """Return the data set in a folder that `save_to_disk` of Hugging Face `datasets` wrote, or in Parquet files.

    - **Parquet files** are read by `datasets`, which keeps an uncompressed copy in its own cache (HF_DATASETS_CACHE). The names of
      files and folders name the splits, as on the hub: `data/train-00000-of-00002.parquet`, `test/0000.parquet`. A single
      file is the training part.
    - **Parts** are the splits train, validation and test, under the names that folders may have too, or `dev`. A saved
      `Dataset` without splits is the training part. `reading` can split off images. A warning names other splits.
    - **Columns.** Images are the column of the type `Image`, labels that of the type `ClassLabel`. If there are several,
      `reading` names one. A label column can also hold integers, which number the classes, or strings, which name them.
    - **Pixels** are read as those of a folder of images.

    Raises:
        ValueError: The folder is damaged, a column or part is missing, there are several candidates, or a row has no image or
            no label; or as `kcd_ext.data.folder.read` for the images.
        OSError: A file cannot be opened.
        ImportError: The package `datasets` or Pillow is not installed; names the extra that installs it.
    """
    try:
        import datasets
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'a data set of Hugging Face datasets needs the packages datasets and pillow: pip install "kcd-ext[train,datasets]"'
        ) from error
    files = [] if any((path / marker).is_file() for marker in MARKERS) else parquet.find(path)
    splits = parquet.by_split(path, files, NAMES)
    try:
        saved = _load_parquet(splits, quiet=reading.progress is None) if files else datasets.load_from_disk(str(path))
    except Exception as error:  # datasets and pyarrow raise any exception for malformed files
        reason = one_line(error.__cause__ or error)
        raise ValueError(f"{path}: cannot be read by Hugging Face datasets: {reason}") from error
    parts = _find_parts(path, saved if isinstance(saved, datasets.DatasetDict) else {"train": saved})
    if len(parts) == 1 and reading.val_fraction is None and reading.test_fraction is None:
        raise ValueError(f"{path}: has no split test; {ADVICE}")
    features = parts["train"][1].features
    image = _choose_column(path, features, "image", reading.image_column, datasets.Image)
    label = _choose_column(path, features, "label", reading.label_column, datasets.ClassLabel)
    if not isinstance(features[image], datasets.Image):
        raise ValueError(f"{path}: image_column must be a column of images, {image!r} is of {features[image]!r}")
    files, labels = {}, {}
    for part, (split, dataset) in parts.items():
        if dataset.features != features:
            raise ValueError(f"{path}: all splits must have the same columns, train and {split} differ")
        where = path if len(parts) == 1 and split == "train" and not isinstance(saved, dict) else path / split
        plain = dataset.with_format(None)
        images = plain.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        files[part] = Rows(images.with_format("arrow"), str(where))
        column = plain.select_columns([label]).with_format("arrow")[:][label]
        if column.null_count:
            raise ValueError(f"{where}: column {label!r} must have a label in every row, {column.null_count} have none")
        labels[part] = column.to_pylist() if column.type in ("string", "large_string") else column.to_numpy()
    names, labels, num_classes = _classes(path, features[label], label, labels)
    check_class_names(path.resolve().name, names)
    return assemble_files(path, path.resolve().name, files, labels, names, num_classes, reading)


@contextmanager
def _quiet(progress_bars: bool) -> Iterator[None]:
    """Let `datasets` log nothing inside the context, for its errors say the same; hide its progress bars if asked to."""
    import datasets

    level, hides = datasets.logging.get_verbosity(), not (progress_bars or datasets.are_progress_bars_disabled())
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if hides:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if hides:
            datasets.enable_progress_bars()


def _load_parquet(splits: Mapping[str, list[str]], quiet: bool) -> Any:
    """Return the `datasets.DatasetDict` of these files. A column of encoded images gets the type Image if it has none."""
    import datasets

    with _quiet(progress_bars=not quiet):
        saved = datasets.load_dataset("parquet", data_files=dict(splits))
    for column, feature in next(iter(saved.values())).features.items():
        if isinstance(feature, dict) and feature.keys() == {"bytes", "path"}:  # written without the library's own types
            saved = saved.cast_column(column, datasets.Image())
    return saved


def _find_parts(path: Path, splits: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Return the name and the rows of every part's split. Warn about other splits."""
    parts = {}
    for part, names in NAMES.items():
        found = sorted((split for split in splits if split.lower() in names), key=lambda s: names.index(s.lower()))
        if found and len(splits[found[0]]):
            parts[part] = found[0], splits[found[0]]
    if "train" not in parts:
        raise ValueError(f"{path}: must have a split train with images, it has {join_names(map(repr, splits))}")
    used = [split for split, _ in parts.values()]
    if ignored := [split for split in splits if split not in used]:
        warnings.warn(f"{path}: read {', '.join(used)} and ignored {', '.join(ignored)}", stacklevel=2)
    return parts


def _choose_column(path: Path, features: Mapping[str, Any], role: str, named: str | None, kind: type) -> str:
    """Return the column that is named, or the only one of this type."""
    if named is not None:
        if named not in features:
            raise ValueError(
                f"{path}: {role}_column must be one of {', '.join(map(repr, features))}, got {named!r}"
                f"{did_you_mean(named, features)}"
            )
        return named
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        option = f"{role}_column (--{role}-column)"
        raise ValueError(
            f"{path}: must have one column of type {kind.__name__}, got "
            f"{' and '.join(map(repr, found)) or 'none'} among {join_names(map(repr, features))}; {option} names it"
        )
    return found[0]


def _classes(
    path: Path, feature: Any, column: str, labels: Mapping[str, Any]
) -> tuple[tuple[str, ...], dict[str, np.ndarray], int]:
    """Return the class names, the labels as integers, and the number of classes."""
    if isinstance(labels["train"], list):
        names = tuple(sorted(set(labels["train"])))
        number = {name: label for label, name in enumerate(names)}
        if unknown := sorted({name for part in labels.values() for name in part} - {*names}):
            raise ValueError(
                f"{path}: column {column!r}: train must have images of every class, it has none of "
                f"{join_names(map(repr, unknown))}"
            )
        return names, {part: np.array([number[name] for name in own]) for part, own in labels.items()}, len(names)
    for part, own in labels.items():
        if not np.issubdtype(own.dtype, np.integer):
            raise ValueError(f"{path}: column {column!r} must hold classes, integers or strings, got {feature!r}")
        if own.min() < 0:
            raise ValueError(f"{path}: column {column!r} of {part} must have labels >= 0, got {own.min()}")
    names = tuple(getattr(feature, "names", None) or ())
    if names:
        return names, dict(labels), len(names)
    remedy = "if there really are so many classes, cast the column to ClassLabel"
    return names, dict(labels), count_classes(f"{path}: column {column!r}", labels.values(), remedy)
