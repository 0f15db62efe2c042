"""One sentence on whether selecting samples by value was better than other ways to make as few visits."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from ..training.summary import Summary
from .tables import format_number

CONDENSED = "kc-kd"
RIVALS = ("random", "kd-shorter", "infobatch")  # labels of runs with about as many visits
BASELINE = "kd"
MAX_DIFFERENCE = 0.05  # of visits, relative: runs that differ by more are not compared
MIN_SEEDS = 3
MIN_ERRORS = 2  # standard errors of the mean difference


def conclusion(groups: Mapping[str, Sequence[Summary]]) -> str:
    """Return the sentence for runs by method, or "" without runs of KC-KD and a rival with as many visits and the same seeds.

    Accuracies are compared seed by seed. KC-KD is better or worse if the mean difference exceeds two standard errors and all
    differences have its sign. Fewer than three seeds give no verdict.
    """
    rivals = [name for name in RIVALS if name in groups and _comparable(groups.get(CONDENSED, ()), groups[name])]
    if not rivals:
        return ""
    condensed = {run.seed: run for run in groups[CONDENSED]}
    if len(condensed) < MIN_SEEDS:
        return (
            f"No conclusion on whether {CONDENSED} is better than {_listed(rivals)}: it takes {MIN_SEEDS} seeds or more, such as "
            f"those of kcd demo --seeds 0 1 2 3 4, got {len(condensed)}."
        )
    verdicts: dict[str, list[str]] = {}
    for name in rivals:
        relation, difference = _verdict([condensed[run.seed].accuracy - run.accuracy for run in groups[name]])
        verdicts.setdefault(relation, []).append(f"{name} ({difference} points)")
    return (
        f"Conclusion: {_visits(groups)}, {CONDENSED} is "
        f"{_listed([f'{relation} {_listed(names)}' for relation, names in verdicts.items()])}. "
        f"(Mean difference in test accuracy ± its standard error over {len(condensed)} seeds; better or worse if it exceeds "
        f"{MIN_ERRORS} standard errors and has the same sign for every seed.)"
    )


def _comparable(ours: Sequence[Summary], theirs: Sequence[Summary]) -> bool:
    """Return whether runs have the same seeds and about as many visits."""
    if not ours or {run.seed for run in ours} != {run.seed for run in theirs}:
        return False
    visits, others = (mean(run.sample_visits for run in runs) for runs in (ours, theirs))
    return abs(visits - others) <= MAX_DIFFERENCE * visits


def _verdict(differences: Sequence[float]) -> tuple[str, str]:
    """Return what accuracies of KC-KD minus those of a rival, one per seed, say: the relation, and the mean ± its error."""
    average, error = mean(differences), stdev(differences) / math.sqrt(len(differences))
    same_sign = all(difference * average > 0 for difference in differences)
    distinct = same_sign and abs(average) > MIN_ERRORS * error
    relation = ("better than" if average > 0 else "worse than") if distinct else "not distinguishable from"
    return relation, f"{format_number(average, '+.2f')} ± {error:.2f}"


def _visits(groups: Mapping[str, Sequence[Summary]]) -> str:
    """Return the visits of KC-KD as a share of those of KD, or as a number without KD."""
    visits = mean(run.sample_visits for run in groups[CONDENSED])
    full = mean(run.sample_visits for run in groups.get(BASELINE, ())) if groups.get(BASELINE) else 0
    return f"at {100 * visits / full:.1f} % of KD's visits" if full else f"at {visits:,.0f} visits"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
