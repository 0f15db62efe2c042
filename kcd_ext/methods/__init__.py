"""Methods of distillation behind one protocol. A recipe names one; the trainer knows none."""

from collections.abc import Mapping

from ..registry import call
from .protocol import Batch, Method, Outcome, entropy

REGISTRY = {
    "ce": "kcd_ext.methods.ce:CrossEntropy",
    "kd": "kcd_ext.methods.kd:KnowledgeDistillation",
}


def build(name: str, options: Mapping[str, object] | None = None) -> Method:
    """The method called `name` (a key of REGISTRY, or `module:Class`) with these keyword arguments.

    Raises:
        ValueError: the name is unknown, or an option's value is out of range.
        TypeError: an option is unknown or of the wrong type, or what was built is no `Method`.
    """
    method = call("method", name, REGISTRY, **(options or {}))
    if not isinstance(method, Method):
        raise TypeError(f"method {name!r} must give a kcd_ext.methods.Method, got {type(method).__name__}")
    return method


__all__ = ["REGISTRY", "Batch", "Method", "Outcome", "build", "entropy"]
