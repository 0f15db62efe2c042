"""Data sets: `load` reads named ones and files; `IndexedDataset` wraps any `(x, label)` data set."""

from .image_files import ImageFiles
from .images import ImageData, ImageSet, load
from .indexed import IndexedDataset
from .views import Views

__all__ = ["ImageData", "ImageFiles", "ImageSet", "IndexedDataset", "Views", "load"]
