"""The teacher on disk: what it says about every sample, written once and read by any number of processes.

The format is documented in docs/reference/cache.md. Nothing is unpickled.
"""

from .reader import TeacherCache
from .writer import TeacherCacheWriter

__all__ = ["TeacherCache", "TeacherCacheWriter"]
