"""Distillation methods behind one protocol. The recipe names the method; the trainer knows none by name."""

import inspect
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import get_args

from ..describe import brief, did_you_mean
from ..registry import call, resolve
from .combined import Combined, owners_of, split_name, split_options
from .method_options import Option
from .method_options import options_of as _options_of
from .protocol import Batch, Method, Outcome, Pretraining, entropy, teacher_logits

REGISTRY = {
    "at": "kcd_ext.methods.at:AttentionTransfer",
    "ce": "kcd_ext.methods.ce:CrossEntropy",
    "crd": "kcd_ext.methods.crd:ContrastiveRepresentationDistillation",
    "dist": "kcd_ext.methods.dist:StrongerTeacherDistillation",
    "dkd": "kcd_ext.methods.dkd:DecoupledKnowledgeDistillation",
    "fitnet": "kcd_ext.methods.fitnet:FitNets",
    "ie-dml": "kcd_ext.methods.iekd:InheritanceExplorationMutualLearning",
    "iekd": "kcd_ext.methods.iekd:InheritanceExplorationDistillation",
    "kd": "kcd_ext.methods.kd:KnowledgeDistillation",
    "kr": "kcd_ext.methods.kr:KnowledgeRepresenting",
    "pkt": "kcd_ext.methods.pkt:ProbabilisticKnowledgeTransfer",
    "pwkd": "kcd_ext.methods.pwkd:PartialToWholeDistillation",
    "reviewkd": "kcd_ext.methods.reviewkd:KnowledgeReview",
    "sskd": "kcd_ext.methods.sskd:SelfSupervisedKnowledgeDistillation",
}


def build(name: str, options: Mapping[str, object] | None = None) -> Method:
    """Build a method by name.

    Args:
        name: A key of `REGISTRY`, or `module:Class`; or several of these with + between them, which gives the sum of their
            losses (`Combined`).
        options: Keyword arguments of the method. None: its defaults. Those of several methods have the name of their part in
            front, as in at.power, unless only one part takes them. ce_weight without a part is the first part's; the others'
            is 0 by default. label_smoothing without a part is that of all parts with a ce_weight, batch_keep that of all.

    Raises:
        ValueError: The name is unknown, or an option is out of range or could belong to several parts.
        TypeError: An option is unknown or of the wrong type, or the result is not a `Method`.
    """
    options = dict(options or {})
    parts = split_name(name)
    _check_names(name, options)
    if len(parts) > 1:
        own = split_options(name, options, _taken_by(parts))
        return Combined({part: build(part, own[part]) for part in parts})
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
    name. Those of several methods (a+b) have the name of their part in front.
    """
    if len(parts := split_name(name)) > 1:
        return _unknown_to_all(parts, options)
    parameters = _parameters(name)
    if parameters is None or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return [], []
    takes = _named(parameters)
    return [option for option in options if option not in takes], takes


def _named(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    return [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _taken_by(parts: Iterable[str]) -> dict[str, list[str]]:
    """Return the options that each part of a combined method takes by name."""
    return {part: _named(_parameters(part) or {}) for part in parts}


def _unknown_to_all(parts: Iterable[str], options: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return what `unknown_options` returns for a combined method."""
    takes = _taken_by(parts)

    def is_known(option: str) -> bool:
        own = option.rpartition(".")[2]
        return any(not unknown_options(part, [own])[0] for part in owners_of(option, takes))

    return [x for x in options if not is_known(x)], [f"{part}.{name}" for part in takes for name in takes[part]]


def options_of(name: str) -> list[Option]:
    """Return the method's options with their defaults and descriptions, read from its signature and docstring.

    The list is empty if the method has no readable signature. Those of several methods (a+b) have the name of their part in
    front. Raises as `build` does for an unknown name.
    """
    if len(parts := split_name(name)) > 1:
        zeros = {(part, "ce_weight") for part in parts[1:]}
        return [
            replace(
                option, name=f"{part}.{option.name}", **({"default": "0.0"} if (part, option.name) in zeros else {})
            )
            for part in parts
            for option in options_of(part)
        ]
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
    if len(parts := split_name(name)) > 1:
        takes = _taken_by(parts)
        return {option: _convert_for(owners_of(option, takes), option, value) for option, value in options.items()}
    parameters = _parameters(name) or {}
    others = next((p for p in parameters.values() if p.kind is p.VAR_KEYWORD), None)
    return {option: _convert(value, parameters.get(option, others)) for option, value in options.items()}


def _convert_for(parts: list[str], option: str, value: object) -> object:
    """Return the option of a combined method as its first owner takes it; unchanged if it has none."""
    own = option.rpartition(".")[2]
    return convert_options(parts[0], {own: value})[own] if parts else value


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
    "Combined",
    "Method",
    "Option",
    "Outcome",
    "Pretraining",
    "build",
    "convert_options",
    "entropy",
    "options_of",
    "split_name",
    "teacher_logits",
    "unknown_options",
]
