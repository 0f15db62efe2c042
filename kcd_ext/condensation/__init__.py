"""Data-set condensation: the value table, ranking, stages, mixing, and the sampler that follows them."""

from .condensation import Condensation
from .condenser import KnowledgeCondenser
from .control import RandomCondenser
from .importance import ImportanceCondenser, UniformCondenser
from .infobatch import InfoBatch
from .mixing import mix_images
from .sampler import CondensedSampler

__all__ = [
    "Condensation",
    "CondensedSampler",
    "ImportanceCondenser",
    "InfoBatch",
    "KnowledgeCondenser",
    "RandomCondenser",
    "UniformCondenser",
    "mix_images",
]
