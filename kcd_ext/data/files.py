"""Data sets by path: which reader a file or folder is for."""

from pathlib import Path

from . import cifar, folder, npz
from .images import ImageData


def read(path: Path, size: int | None = None) -> ImageData:
    """The data set at `path`; `size` is for a folder of images by class alone.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError, OSError, ImportError: it is of no kind that is read here, or as its reader does.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if path.is_dir() and not cifar.is_extracted(path):
        return folder.read(path, size)
    if size is not None:
        raise ValueError(f"size is for a folder of images by class, which {path} is not")
    return npz.read(path) if path.suffix == ".npz" else cifar.read(path)
