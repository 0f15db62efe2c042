"""Knowledge Condensation Distillation for PyTorch: distil only what the student still has to learn.

- `condensed_kd_loss` is the fused operator. It reads student and teacher logits once and returns the
  distillation loss, the knowledge value of every row, and the rows worth distilling.
- `KnowledgeCondenser` keeps these values for the whole data set and shrinks the set that the teacher
  must teach.
- `kcd_ext.training` contains a thin trainer; the command `kcd` runs it.
"""

from typing import TYPE_CHECKING

from . import reference
from .condensation import CondensedSampler, KnowledgeCondenser, mix_images
from .data import IndexedDataset
from .knowledge import Knowledge
from .loops import condense
from .losses import CondensedKDLoss, condensed_kd_loss, select_rows
from .ops import build_info as _build_info

if TYPE_CHECKING:
    from .students import load_student

__version__: str = _build_info["version"]

__all__ = [
    "CondensedKDLoss",
    "CondensedSampler",
    "IndexedDataset",
    "Knowledge",
    "KnowledgeCondenser",
    "condense",
    "condensed_kd_loss",
    "load_student",
    "mix_images",
    "reference",
    "select_rows",
]


def __getattr__(name: str) -> object:
    """Import `load_student` when it is first used: it needs the extra `train`."""
    if name != "load_student":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .students import load_student

    return load_student
