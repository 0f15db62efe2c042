"""Distillation methods behind one protocol. The recipe names the method; the trainer knows none by name."""

import inspect
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import get_args

from ..describe import brief, did_you_mean
from ..registry import call, resolve
from .method_options import Option
from .method_options import options_of as _options_of
from .protocol import Batch, Method, Outcome, Pretraining, entropy, teacher_logits

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
    """Build a method by name.

    Args:
        name: A key of `REGISTRY`, or `module:Class`.
        options: Keyword arguments of the method. None: its defaults.

    Raises:
        ValueError: The name is unknown, or an option is out of range.
        TypeError: An option is unknown or of the wrong type, or the result is not a `Method`.
    """
    options = dict(options or {})
    _check_names(name, options)
    method = call("method", name, REGISTRY, **options)
    if not isinstance(method, Method):
        raise TypeError(f"method {name!r} must be a kcd_ext.methods.Method, got {type(method).__name__}")
    return method


def _check_names(name: str, options: Mapping[str, object]) -> None:
    """Raise TypeError for an option that the method does not take. The message lists those that it takes."""
    unknown, takes = unknown_options(name, options)
    if unknown:
        nearest = did_you_mean(unknown[0], takes)
        raise TypeError(
            f"method {name!r} has no option {brief(unknown[0])}{f'{nearest} It' if nearest else '; it'} takes "
            f"{', '.join(takes) or 'none'}"
        )


def unknown_options(name: str, options: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the options that the method does not take, and the names of all that it takes.

    Both lists are empty if the method takes `**kwargs` or has no readable signature. Raises as `build` does for an unknown
    name.
    """
    parameters = _parameters(name)
    if parameters is None or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return [], []
    takes = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return [option for option in options if option not in takes], takes


def options_of(name: str) -> list[Option]:
    """Return the method's options with their defaults and descriptions, read from its signature and docstring.

    The list is empty if the method has no readable signature. Raises as `build` does for an unknown name.
    """
    return _options_of(_parameters(name) or {}, resolve("method", name, REGISTRY))


def _parameters(name: str) -> Mapping[str, inspect.Parameter] | None:
    """Return the method's parameters; None if it is not callable or has no readable signature, as some C functions."""
    found = resolve("method", name, REGISTRY)
    for as_written in (False, True):  # evaluate string annotations if possible
        try:
            return inspect.signature(found, eval_str=not as_written).parameters
        except (TypeError, ValueError, NameError, AttributeError, SyntaxError):
            continue
    return None


def convert_options(name: str, options: Mapping[str, object]) -> dict[str, object]:
    """Convert options given as text, as on the command line, to the types in the method's annotations.

    A layer's name stays text even if it looks like a number ("1.10"). A parameter without a known annotation becomes a
    number or a bool if the text is one. Raises as `build` does for an unknown name.
    """
    parameters = _parameters(name) or {}
    others = next((p for p in parameters.values() if p.kind is p.VAR_KEYWORD), None)
    return {option: _convert(value, parameters.get(option, others)) for option, value in options.items()}


OPTION_TYPES = (int, float, bool, str)


def _convert(value: object, parameter: inspect.Parameter | None) -> object:
    if not isinstance(value, str):
        return value
    annotation = None if parameter is None else parameter.annotation
    annotated = [kind for kind in OPTION_TYPES if kind in (get_args(annotation) or (annotation,))]
    takes = annotated or OPTION_TYPES
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
    "build",
    "convert_options",
    "entropy",
    "options_of",
    "teacher_logits",
    "unknown_options",
]
