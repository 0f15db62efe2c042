"""Data-set condensation: the value table, ranking, stages, mixing, and the sampler that follows them."""

from .condensation import Condensation
from .condenser import KnowledgeCondenser
from .control import RandomCondenser
from .infobatch import InfoBatch
from .mixing import mix_images
from .sampler import CondensedSampler

__all__ = [
    "Condensation",
    "CondensedSampler",
    "InfoBatch",
    "KnowledgeCondenser",
    "RandomCondenser",
    "mix_images",
]
