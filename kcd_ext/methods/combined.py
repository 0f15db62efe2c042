"""Several methods at once: the sum of their losses, from one forward pass of each network."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from .features import SharedPasses, captures_made
from .protocol import Batch, Method, Outcome, Pretraining
from .selection import shared_selection

SHARED_OPTION = "batch_keep"  # of all parts, so that they share the teacher's pass
CROSS_ENTROPY_OPTIONS = ("ce_weight", "label_smoothing")
LEFT_TO_TRAINER = {"teacher_of": "chooses the teacher", "lr_factor": "has its own learning rates"}


class Combined(Method):
    """The sum of several methods' losses.

    - Student and teacher run once per batch. Every part sees the same output and captures its features in the same pass
      (`features.Tap`). A part that calls a network with another input, as sskd with its rotated views, has a pass of its own.
    - The knowledge value is the first part's. `Outcome.losses` is the sum over the parts.
    - A term that several parts have is called part.term.
    - Pretraining is that of all parts, in order.

    `build` gives every part but the first ce_weight=0 unless you set it, so that the cross entropy counts once. (As a later part,
    ie-dml needs a ce_weight, because its peer learns the labels with it.)

    Args:
        parts: Name -> method, at least one. The first one decides the knowledge value.

    Raises:
        ValueError: A part chooses the teacher or has its own learning rates, as pwkd. (But pwkd takes a sum as its base.)
    """

    def __init__(self, parts: Mapping[str, Method]):
        super().__init__()
        for name, part in parts.items():
            for overridden, meaning in LEFT_TO_TRAINER.items():
                if getattr(type(part), overridden) is not getattr(Method, overridden):
                    raise ValueError(f"method {name!r} cannot be combined with others, because it {meaning}")
        self.names = tuple(parts)
        self.parts = nn.ModuleList(parts.values())
        self.needs_teacher = any(part.needs_teacher for part in self.parts)
        self.weighs_samples = all(part.weighs_samples for part in self.parts)
        self.takes_soft_labels = all(part.takes_soft_labels for part in self.parts)
        self.teacher_logits_suffice = all(part.teacher_logits_suffice or not part.needs_teacher for part in self.parts)
        self.flops_known = all(part.flops_known for part in self.parts)
        self.compiles_teacher = all(part.compiles_teacher for part in self.parts)
        self.batch_keep = max((part.batch_keep for part in self.parts if part.needs_teacher), default=1.0)
        self._captures = ()

    def prepare(self, student: nn.Module, teacher: nn.Module | None, samples: Iterable[Batch]) -> None:
        """Prepare every part. Raises as they do."""
        with captures_made() as captures:
            for part in self.parts:
                part.prepare(student, teacher, samples)
        self._captures = captures

    def pretraining(self) -> tuple[Pretraining, ...]:
        """Return the plans of all parts, in order."""
        return tuple(plan for part in self.parts for plan in part.pretraining())

    def begin(self, epoch: int, epochs: int) -> None:
        """Start an epoch of every part."""
        for part in self.parts:
            part.begin(epoch, epochs)

    def forward(self, student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Outcome:
        """Return the sum of the parts' losses; `terms` are those of all parts, without weights."""
        student, teacher = (net if net is None else SharedPasses(net, self._captures) for net in (student, teacher))
        with shared_selection():
            outcomes = [part(student, teacher, batch) for part in self.parts]
        first, losses = outcomes[0], [outcome.losses for outcome in outcomes]
        loss = sum(outcome.loss for outcome in outcomes)
        summed = None if any(each is None for each in losses) else sum(losses)
        kl = next((outcome.kl for outcome in outcomes if outcome.kl is not None), None)
        return Outcome(loss, first.logits, first.value, self._merge_terms(outcomes), summed, kl)

    def _merge_terms(self, outcomes: Sequence[Outcome]) -> dict:
        """Return the terms of all parts, with the part's name in front of those that occur more than once."""
        count = Counter(term for outcome in outcomes for term in outcome.terms)
        return {
            term if count[term] == 1 else f"{name}.{term}": value
            for name, outcome in zip(self.names, outcomes, strict=True)
            for term, value in outcome.terms.items()
        }

    def release(self) -> None:
        """Release every part."""
        for part in self.parts:
            part.release()


def split_name(name: str) -> tuple[str, ...]:
    """Return the parts of a method's name: a+b is ("a", "b"). Raises ValueError if one is empty or occurs twice."""
    parts = tuple(name.split("+"))
    if len(parts) > 1 and not all(parts):
        raise ValueError(f"method must have names around every +, as in kd+at, got {name!r}")
    if repeated := [part for part, number in Counter(parts).items() if number > 1]:
        raise ValueError(f"method must not name a part twice, got {name!r} with {repeated[0]!r} twice")
    return parts


def owners_of(option: str, takes: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the parts of a combined method that an option belongs to.

    "part.option" belongs to that part. Without prefix, `batch_keep` belongs to all parts that take it, and the options of the
    cross entropy to the first of these (`split_options` then gives `label_smoothing` to every part with a cross entropy).

    Args:
        option: The option, with or without prefix.
        takes: Part -> the options that it takes, in the order of the parts.
    """
    part, dot, own = option.rpartition(".")
    if dot:
        return [part] if part in takes else []
    owners = [part for part, names in takes.items() if own in names]
    return owners[:1] if own in CROSS_ENTROPY_OPTIONS else owners


def split_options(
    name: str, options: Mapping[str, object], takes: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, object]]:
    """Return the options of each part of a combined method, without prefix (`owners_of`).

    `label_smoothing` without prefix is that of all parts whose cross entropy has a weight.
    A part after the first gets ce_weight=0 if it takes it and `options` does not set it.

    Args:
        name: The method's name, for errors.
        options: The options, with and without prefix.
        takes: Part -> the options that it takes, in the order of the parts.

    Raises:
        ValueError: Several parts take an option that is given without prefix, or an option is given twice.
    """
    found: dict[str, dict[str, object]] = {part: {} for part in takes}

    def give(parts: Sequence[str], own: str, value: object) -> None:
        for part in parts:
            if own in found[part]:
                raise ValueError(f"method {name!r} got {own} of {part!r} twice: as {own} and as {part}.{own}")
            found[part][own] = value

    for option, value in options.items():
        owners, own = owners_of(option, takes), option.rpartition(".")[2]
        if own == SHARED_OPTION and own != option:
            raise ValueError(f"{own} of method {name!r} applies to all its parts: write {own}, got {option}")
        if len(owners) > 1 and own != SHARED_OPTION:
            written = " or ".join(f"{part}.{own}" for part in owners)
            raise ValueError(f"option {own!r} of method {name!r} must name its part: write {written}")
        if option != "label_smoothing":
            give(owners, own, value)
    for part in [*takes][1:]:
        if "ce_weight" in takes[part]:
            found[part].setdefault("ce_weight", 0.0)
    if "label_smoothing" in options:  # now that every part has its ce_weight
        smoothed = [part for part, names in takes.items() if "label_smoothing" in names]
        with_weight = [part for part in smoothed if found[part].get("ce_weight", 1.0) != 0]
        give(with_weight or smoothed[:1], "label_smoothing", options["label_smoothing"])  # the latter will refuse it
    return found
