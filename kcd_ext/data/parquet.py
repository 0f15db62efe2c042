"""Folders of Parquet files, as the Hugging Face hub has them: which files there are, and which split each belongs to."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..describe import join_names, one_line

SUFFIX = ".parquet"
DEPTHS = ("*", "*/*", "*/*/*")  # such as data/train-00000-of-00002.parquet and default/train/0000.parquet
METADATA = "metadata.parquet"  # Hugging Face's name for a table about a folder of images
SEPARATORS = re.compile(r"[-._\s]+")


def find(path: Path) -> list[Path]:
    """Return the Parquet files of the data set at `path`, a file or a folder, sorted; none if it is another kind of data."""
    if path.is_file():
        return [path] if path.suffix == SUFFIX else []
    found = [file for depth in DEPTHS for file in path.glob(depth + SUFFIX) if file.is_file() and file.name != METADATA]
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts))


def by_split(path: Path, files: Sequence[Path], names: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the files of each split.

    The split is the first word of `names` in a file's name (train-00000-of-00002), else in its folder's, and so on upwards. Without
    such a word it is the first word of the file's name, or its folder if that is a number; but if no file has one, all are train.

    Args:
        path: The data set.
        files: Its files.
        names: Words for each part.

    Raises:
        ValueError: The files of several data sets are in the folder, or a file is damaged.
    """
    import pyarrow.parquet  # of the package datasets

    words = {word for part in names.values() for word in part}
    splits: dict[str, list[str]] = {}
    roots = set()
    named = {file: _split_of(file.relative_to(path), words) for file in files if file != path}
    for file in files:
        split, root = named.get(file) or (None, None)
        if split is not None:
            roots.add(root)
        elif any(named.values()):
            first = SEPARATORS.split(file.stem)[0]
            split = file.parent.name if first.isdecimal() else first
        else:
            split = "train"
        splits.setdefault(split, []).append(str(file))
    for file in files:
        try:
            pyarrow.parquet.read_schema(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{file}: cannot be read as Parquet: {one_line(error)}") from error
    if len(roots) > 1:
        folders = join_names([repr(str(path / root)) for root in sorted(roots)])
        raise ValueError(
            f"{path}: must have Parquet files of one data set, got several, in {folders}: name one of these folders"
        )
    return splits


def _split_of(file: Path, words: set[str]) -> tuple[str, Path] | None:
    """Return the split in a relative path, and the folder that contains all splits; None if it names none."""
    for component in (file.with_suffix(""), *file.parents):
        for word in SEPARATORS.split(component.name.lower()):
            if word in words:
                return word, component.parent
    return None
