"""Data sets. Those with a name are in `images.py`; this is the wrapper that condensation needs around any of them."""

from .indexed import IndexedDataset

__all__ = ["IndexedDataset"]
