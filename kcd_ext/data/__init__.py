"""Data sets: `load` gives those with a name and those in files; `IndexedDataset` wraps any (x, label) data set."""

from .images import ImageData, ImageSet, load
from .indexed import IndexedDataset
from .views import Views

__all__ = ["ImageData", "ImageSet", "IndexedDataset", "Views", "load"]
