"""What is worth distilling: the value table, the stages, the mix plan, and the sampler that follows them."""

from .condensation import Condensation
from .condenser import KnowledgeCondenser
from .control import RandomCondenser
from .mixing import mix_images
from .sampler import CondensedSampler

__all__ = ["Condensation", "CondensedSampler", "KnowledgeCondenser", "RandomCondenser", "mix_images"]
