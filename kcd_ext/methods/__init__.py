"""Methods of distillation behind one protocol. A recipe names one; the trainer knows none."""

import inspect
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import get_args

from ..describe import brief, did_you_mean
from ..registry import call, resolve
from .documented import Option
from .documented import options_of as _options_of
from .protocol import Batch, Method, Outcome, Pretraining, entropy

REGISTRY = {
    "ce": "kcd_ext.methods.ce:CrossEntropy",
    "crd": "kcd_ext.methods.crd:ContrastiveRepresentationDistillation",
    "ie-dml": "kcd_ext.methods.iekd:InheritanceExplorationMutualLearning",
    "iekd": "kcd_ext.methods.iekd:InheritanceExplorationDistillation",
    "kd": "kcd_ext.methods.kd:KnowledgeDistillation",
    "kr": "kcd_ext.methods.kr:KnowledgeRepresenting",
    "pkt": "kcd_ext.methods.pkt:ProbabilisticKnowledgeTransfer",
    "pwkd": "kcd_ext.methods.pwkd:PartialToWholeDistillation",
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
    unknown, takes = unknown_of(name, options)
    if unknown:
        nearest = did_you_mean(unknown[0], takes)
        raise TypeError(
            f"method {name!r} has no option {brief(unknown[0])}{f'{nearest} It' if nearest else '; it'} takes "
            f"{', '.join(takes) or 'none'}"
        )


def unknown_of(name: str, options: Iterable[str]) -> tuple[list[str], list[str]]:
    """Those of the options that the method does not take, and the names of those it does.

    None are unknown where it takes any, or does not tell. Raises as `build` does for a name that is unknown.
    """
    parameters = _parameters(name)
    if parameters is None or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return [], []
    takes = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return [option for option in options if option not in takes], takes


def options_of(name: str) -> list[Option]:
    """What the method takes: names, defaults and, out of its docstring, what they mean. None where it does not tell.

    Raises as `build` does for a name that is unknown.
    """
    return _options_of(_parameters(name) or {}, resolve("method", name, REGISTRY))


def _parameters(name: str) -> Mapping[str, inspect.Parameter] | None:
    """What the method takes; None where it is no function, or one of C's that does not tell."""
    found = resolve("method", name, REGISTRY)
    for as_written in (False, True):  # annotations that are text are looked up, where that can be done
        try:
            return inspect.signature(found, eval_str=not as_written).parameters
        except (TypeError, ValueError, NameError, AttributeError, SyntaxError):
            continue
    return None


def as_typed(name: str, options: Mapping[str, object]) -> dict[str, object]:
    """Options that are text, as on a command line, as what the method takes: numbers and truths where it takes them.

    By its annotations: a layer's name stays text, though it looks like a number ("1.10"). What is annotated by nothing that
    is known here becomes a number or a truth where it is one. Raises as `build` does for a name that is unknown.
    """
    parameters = _parameters(name) or {}
    others = next((p for p in parameters.values() if p.kind is p.VAR_KEYWORD), None)
    return {option: _typed(value, parameters.get(option, others)) for option, value in options.items()}


KINDS = (int, float, bool, str)


def _typed(value: object, parameter: inspect.Parameter | None) -> object:
    if not isinstance(value, str):
        return value
    annotation = None if parameter is None else parameter.annotation
    told = [kind for kind in KINDS if kind in (get_args(annotation) or (annotation,))]
    takes = told or KINDS
    if bool in takes and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if int in takes or float in takes:
        for kind in (int, float):
            with suppress(ValueError):
                return kind(value)
    return value


__all__ = [
    "REGISTRY",
    "Batch",
    "Method",
    "Option",
    "Outcome",
    "Pretraining",
    "as_typed",
    "build",
    "entropy",
    "options_of",
    "unknown_of",
]
