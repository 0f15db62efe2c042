"""Data sets by path: chooses the reader of a file or folder."""

from pathlib import Path

from . import cifar, folder, huggingface, npz
from .images import ImageData, split_off_validation
from .reading import Reading


def read(path: Path, reading: Reading) -> ImageData:
    """Return the data set at `path`.

    Args:
        path: An `.npz` file, a CIFAR archive or its folder, a folder of images by class, a folder that Hugging Face
            `datasets` saved, or Parquet files of images.
        reading: The options of `load`. Those that the kind of data cannot have are refused.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError, OSError, ImportError: The kind is not supported, or as its reader raises.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if huggingface.is_saved(path):
        return huggingface.read(path, reading)
    reading.check_unused(("image_column", "label_column"), "a data set that Hugging Face datasets saved", path)
    if path.is_dir() and not cifar.is_extracted(path):
        return folder.read(path, reading)
    reading.check_unused(("size", "memory"), "a folder of images by class", path)
    if path.suffix == ".npz":
        return npz.read(path, reading)
    reading.check_unused(("test_fraction",), "data without test images", path)
    return split_off_validation(cifar.read(path), reading.val_fraction)
