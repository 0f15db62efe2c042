"""Knowledge Condensation Distillation for PyTorch: distil only what the student has still to learn.

`condensed_kd_loss` reads student and teacher logits once and gives the distillation loss, every row's knowledge value and the
rows worth distilling; `KnowledgeCondenser` keeps those values over the data set and shrinks what the teacher must teach.
"""

from . import reference
from .condensation import CondensedSampler, KnowledgeCondenser, mix_images
from .data import IndexedDataset
from .knowledge import Knowledge
from .losses import CondensedKDLoss, condensed_kd_loss, select_rows
from .ops import build_info as _build_info

__version__: str = _build_info["version"]

__all__ = [
    "CondensedKDLoss",
    "CondensedSampler",
    "IndexedDataset",
    "Knowledge",
    "KnowledgeCondenser",
    "condensed_kd_loss",
    "mix_images",
    "reference",
    "select_rows",
]
