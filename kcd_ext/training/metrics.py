"""The lines of metrics.jsonl and pretraining.jsonl, as a checkpoint holds them."""

import sys
from collections.abc import Callable, Mapping, Sequence


def check_history(history: object) -> None:
    """Check the lines of the student's epochs. Raises ValueError, naming the line and the entry."""
    _check_lines("history", history, "epoch", HISTORY)


def check_pretraining(pretraining: object) -> None:
    """Check the lines of a method's pretraining. Raises ValueError, naming the line and the entry."""
    _check_lines("pretraining", pretraining, "pretraining", PRETRAINING)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_flops(value: object) -> bool:
    return value is None or (type(value) is int and value >= 0 and _is_number(value))


def _are_terms(value: object) -> bool:
    return isinstance(value, dict) and all(term is None or _is_number(term) for term in value.values())


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _is_histogram(value: object) -> bool:
    if value is None:
        return True
    return (
        isinstance(value, dict)
        and value.keys() >= {"low", "high", "counts"}
        and _is_number(value["low"])
        and _is_number(value["high"])
        and _are_counts(value["counts"])
        and len(value["counts"]) > 0
    )


def _is_condensation(value: object) -> bool:
    if value is None:
        return True
    return (
        isinstance(value, dict)
        and value.keys() >= {"stage", "kept", "dropped", "mixed", "classes", "values"}
        and all(_is_count(value[name]) for name in ("stage", "kept", "dropped", "mixed"))
        and (value["classes"] is None or (_are_counts(value["classes"]) and sum(value["classes"]) == value["kept"]))
        and _is_histogram(value["values"])
    )


Check = tuple[Callable[[object], bool], str]
_COUNT: Check = (_is_count, "a whole number >= 0")
_NUMBER: Check = (_is_number, "a finite number")

PRETRAINING: Mapping[str, Check] = {
    "pretraining": _COUNT,
    "lr": _NUMBER,
    "loss": _NUMBER,
    "sample_visits": _COUNT,
    "teacher_visits": _COUNT,
    "flops": (_is_flops, "a whole number or null"),
    "seconds": _NUMBER,
    "condensation_seconds": _NUMBER,
}
HISTORY: Mapping[str, Check] = {
    "epoch": _COUNT,
    **{name: check for name, check in PRETRAINING.items() if name != "pretraining"},
    "train_accuracy": _NUMBER,
    "terms": (_are_terms, "an object of numbers"),
    "accuracy": _NUMBER,
    "samples": _COUNT,
    "padding": _COUNT,
    "non_finite": _COUNT,
    "condensation": (_is_condensation, "an E-step or null"),
}


def _check_lines(name: str, lines: object, number: str, entries: Mapping[str, Check]) -> None:
    if not isinstance(lines, Sequence) or isinstance(lines, str):
        raise ValueError(f"{name} must be a list of epochs, got {type(lines).__name__}")
    for position, line in enumerate(lines, 1):
        if not isinstance(line, dict):
            raise ValueError(f"{name}, line {position}, must be an object, got {type(line).__name__}")
        for entry, (is_one, takes) in entries.items():
            if entry not in line:
                raise ValueError(f"{name}, line {position}, has no {entry!r}")
            if not is_one(line[entry]):
                raise ValueError(f"{name}, line {position}: {entry!r} must be {takes}, got {line[entry]!r:.60}")
        if line[number] != position:
            raise ValueError(f"{name}, line {position}, is of epoch {line[number]}")
