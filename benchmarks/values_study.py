"""Compare values and selections of condensation at equal visits: is choosing by value better than random, and by which value?

    python benchmarks/values_study.py --data cifar100

20 classes of CIFAR-100, resnet20 -> resnet8, five seeds. Every arm trains at every budget, the percentage of the visits of
full training:

- kc-kd, kc-kd kl, kc-kd loss: KCD's ranking by the student's entropy, the KL divergence to the teacher, or the loss;
- random: sets of the same sizes as kc-kd's, redrawn at every stage, without mixing;
- importance entropy, importance kl, importance loss: drawn every epoch without bias, with weights;
- uniform: drawn every epoch like importance, with equal probabilities;
- infobatch.

Beside them are KD and the student alone, with all visits. Runs of a seed share their initial weights and the order of the
first epoch. All other options are those of reproduce.py, also how to resume: run the same command again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import ClassVar

import tyro
from reproduce import BASELINE, KINDS, NO_TEACHER, Reproduce, check_among
from tyro.conf import Fixed, Suppress

from kcd_ext.checks import check_float
from kcd_ext.training.recipe import Condense

STAGES = 6  # of KCD's schedule
ANNEAL = 0.125  # InfoBatch's last epochs with all samples
LOW_LOSS = 0.66  # the mean share of samples below the mean loss, which InfoBatch may leave out: measured on this task


def kcd_size(budget: float, epochs: int) -> dict[str, object]:
    """Return `keep` and `schedule` of KCD's stages for a share of the visits in (0, 1).

    The paper's equal steps, if a quarter or more is kept in the end (from 69 % of the visits on). Otherwise the final size from
    the first stage on.
    """
    every = epochs // STAGES
    keep = 1 - (1 - budget) * STAGES * epochs / sum(epoch // every for epoch in range(epochs))
    if keep > 0.25:
        return {"keep": round(keep, 4), "schedule": "reference"}
    return {"keep": round((budget * epochs - every) / (epochs - every), 4), "schedule": "immediate"}


def drawn_keep(budget: float, epochs: int) -> float:
    """Return `keep` of a selection that draws every epoch except the first, for a share of the visits in (0, 1)."""
    return round((budget * epochs - 1) / (epochs - 1), 4)


def infobatch_keep(budget: float, epochs: int) -> float:
    """Return InfoBatch's `keep` for about a share of the visits in (0, 1): how many samples are of low loss is not known before."""
    full = 1 + ceil(ANNEAL * epochs)
    visited = (budget * epochs - full) / (epochs - full)
    return round(max(0.01, 1 - (1 - visited) / LOW_LOSS), 4)


def arms(budget: float, epochs: int) -> dict[str, Condense]:
    """Return the compared arms at a share of the visits in (0, 1): name -> how it condenses."""
    sizes, drawn = kcd_size(budget, epochs), {"keep": drawn_keep(budget, epochs)}
    return {
        "kc-kd": Condense(**sizes),
        "kc-kd kl": Condense(**sizes, value="kl"),
        "kc-kd loss": Condense(**sizes, value="loss"),
        "random": Condense(**sizes, selection="random"),
        "importance entropy": Condense(**drawn, selection="importance"),
        "importance kl": Condense(**drawn, selection="importance", value="kl"),
        "importance loss": Condense(**drawn, selection="importance", value="loss"),
        "uniform": Condense(**drawn, selection="uniform"),
        "infobatch": Condense(keep=infobatch_keep(budget, epochs), selection="infobatch"),
    }


ARMS = tuple(arms(0.75, 24))


@dataclass(frozen=True)
class ValuesStudy(Reproduce):
    """Run the comparison and write its table."""

    script: ClassVar[str] = "values_study.py"  # this file

    pair: str = "resnet20-resnet8"
    """The networks, TEACHER-STUDENT."""
    seeds: int = 5
    """Number of runs of each kind. All share one teacher."""
    epochs: int = 24
    """Epochs of every run: a multiple of 6, so that the budgets are met."""
    classes: int | None = 20
    """Use only this many classes, evenly spaced; None: all."""
    precision: str = "bfloat16"
    """As for kcd distill --precision."""
    output: Path = Path("runs/values")
    """Folder for the runs."""
    budget: tuple[float, ...] = (87.5, 75.0, 50.0)
    """Visits in percent of those of full training."""
    arms: tuple[str, ...] = ARMS
    """The arms to compare at every budget."""
    only: Suppress[Fixed[tuple[str, ...]]] = ()

    @property
    def kinds(self) -> Mapping[str, Mapping[str, object]]:
        """KD, the student alone, and every arm at every budget: label -> the options of its recipe."""
        kinds = {kind: KINDS[kind] for kind in (BASELINE, NO_TEACHER)}
        for percent in self.budget:
            found = arms(percent / 100, self.epochs)
            kinds |= {f"{arm} {percent:g} %": {"method": "kd", "condense": found[arm]} for arm in self.arms}
        return kinds

    def _check(self) -> None:
        super()._check()
        check_among("arms", self.arms, ARMS)
        if self.epochs % STAGES or self.epochs < 2 * STAGES:
            raise ValueError(f"epochs must be a multiple of {STAGES}, at least {2 * STAGES}, got {self.epochs}")
        takes = "percentages of the visits in [40, 99]"
        if not isinstance(self.budget, Sequence) or not self.budget:
            raise ValueError(f"budget must be {takes}, got {self.budget!r}")
        for percent in self.budget:
            check_float("budget", percent, takes, 40, 99)


if __name__ == "__main__":
    tyro.cli(ValuesStudy, description=__doc__).run()
