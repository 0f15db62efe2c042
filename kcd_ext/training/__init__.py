"""The trainer: recipes, the training loop and checkpoints. Needs the extra `train`."""

try:
    import safetensors as _safetensors  # noqa: F401

    from . import distributed as _distributed  # noqa: F401 - imports accelerate
except ImportError as error:
    message = f'kcd_ext.training needs the package {error.name}: pip install "kcd-ext[train]"'
    raise ImportError(message, name=error.name) from error

from .loop import distill
from .recipe import Condense, Recipe
from .summary import Summary
from .teacher_cache import cache_teacher

__all__ = ["Condense", "Recipe", "Summary", "cache_teacher", "distill"]
