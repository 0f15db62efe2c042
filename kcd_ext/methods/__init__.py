"""Methods of distillation behind one protocol. A recipe names one; the trainer knows none."""

import inspect
from collections.abc import Mapping

from ..registry import call, resolve
from .protocol import Batch, Method, Outcome, Pretraining, entropy

REGISTRY = {
    "ce": "kcd_ext.methods.ce:CrossEntropy",
    "crd": "kcd_ext.methods.crd:ContrastiveRepresentationDistillation",
    "kd": "kcd_ext.methods.kd:KnowledgeDistillation",
    "pkt": "kcd_ext.methods.pkt:ProbabilisticKnowledgeTransfer",
    "sskd": "kcd_ext.methods.sskd:SelfSupervisedKnowledgeDistillation",
}


def build(name: str, options: Mapping[str, object] | None = None) -> Method:
    """The method called `name` (a key of REGISTRY, or `module:Class`) with these keyword arguments.

    Raises:
        ValueError: the name is unknown, or an option's value is out of range.
        TypeError: an option is unknown or of the wrong type, or what was built is no `Method`.
    """
    options = dict(options or {})
    _check_names(name, options)
    method = call("method", name, REGISTRY, **options)
    if not isinstance(method, Method):
        raise TypeError(f"method {name!r} must give a kcd_ext.methods.Method, got {type(method).__name__}")
    return method


def _check_names(name: str, options: Mapping[str, object]) -> None:
    """Raises TypeError for an option that the method does not take, and says which ones it does."""
    found = resolve("method", name, REGISTRY)
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return  # no function, or one of C's that does not tell
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    takes = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unknown = [option for option in options if option not in takes]
    if unknown:
        raise TypeError(f"method {name!r} has no option {unknown[0]!r}; it takes {', '.join(takes) or 'none'}")


__all__ = ["REGISTRY", "Batch", "Method", "Outcome", "Pretraining", "build", "entropy"]
