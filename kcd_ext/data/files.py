"""Data sets by path: chooses the reader of a file or folder."""

from pathlib import Path

from . import cifar, folder, npz
from .images import ImageData


def read(path: Path, size: int | None = None) -> ImageData:
    """Return the data set at `path`.

    Args:
        path: An `.npz` file, a CIFAR archive or its folder, or a folder of images by class.
        size: Height and width to scale a folder of images to. Not allowed for other kinds.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError, OSError, ImportError: The kind is not supported, or as its reader raises.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if path.is_dir() and not cifar.is_extracted(path):
        return folder.read(path, size)
    if size is not None:
        raise ValueError(f"size is for a folder of images by class, which {path} is not")
    return npz.read(path) if path.suffix == ".npz" else cifar.read(path)
