"""Data sets: `load` reads named ones and files; `IndexedDataset` wraps any `(x, label)` data set."""

from .images import ImageData, ImageSet, load
from .indexed import IndexedDataset
from .views import Views

__all__ = ["ImageData", "ImageSet", "IndexedDataset", "Views", "load"]
