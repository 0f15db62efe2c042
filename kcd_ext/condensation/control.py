"""Random selection: the control that any claim about condensation must beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .condenser import KnowledgeCondenser
from .random_keys import RANKING, random_keys


class RandomCondenser(KnowledgeCondenser):
    """A `KnowledgeCondenser` that ranks at random: the same sizes at every stage, nothing mixed.

    The ranking is redrawn at every stage and is a pure function of `(seed, stage)`. Value table and state are those of
    `KnowledgeCondenser`, which also describes the arguments.
    """

    ranks_by_value = False

    def __init__(
        self,
        num_samples: int,
        *,
        keep: float = 0.7,
        every: int = 40,
        stages: int = 6,
        schedule: str = "reference",
        warmup: int = 0,
        labels: Tensor | np.ndarray | Sequence[int] | None = None,
        min_per_class: int = 0,
        seed: int = 0,
        device: torch.device | str | None = None,
        group: torch.distributed.ProcessGroup | None = None,
    ):
        super().__init__(
            num_samples,
            keep=keep,
            every=every,
            stages=stages,
            schedule=schedule,
            epsilon=0.0,
            warmup=warmup,
            labels=labels,
            min_per_class=min_per_class,
            seed=seed,
            device=device,
            group=group,
        )

    def score(self) -> Tensor:
        """Return `(N,)` float64 random numbers, new at every stage and the same on every rank."""
        keys = random_keys(self.num_samples, seed=self.config["seed"], step=self.stage, stream=RANKING)
        return torch.from_numpy((keys >> 11).astype("float64"))  # 53 bits: exact in float64
