"""The condenser: ranks the data by knowledge value and says, stage by stage, what is still worth distilling."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from ..arguments import check_group
from ..checks import check_bool, check_choice, check_fraction, check_int, check_non_negative, check_unit_interval
from ..describe import brief
from .classes import checked_labels, largest_minimum, with_minimum
from .condensation import Condensation
from .mixing import MixTree, build_recipes, mix_strength, overwrite, pixel_weight
from .random_keys import MAX_SEED
from .schedules import SCHEDULES, final_size, stage_size
from .table import ValueTable, check_tensor

STATE_VERSION = 2
CONFIG = (
    "num_samples",
    "keep",
    "every",
    "stages",
    "schedule",
    "alpha",
    "epsilon",
    "accumulate",
    "convex",
    "warmup",
    "min_per_class",
    "seed",
)


class KnowledgeCondenser:
    """Online value estimation, ranking, stages and mixing of Knowledge Condensation Distillation.

    Li et al., ECCV 2022 (arXiv 2207.05409), Eq. 12–15, as in the authors' code. Feed every batch's knowledge values to
    `update` and call `step` at the end of every epoch; a `CondensedSampler` then yields what is kept.

    In a distributed run every rank has a condenser, feeds it what that rank saw, and calls `step` at the same epoch
    ends.

    Args:
        num_samples: N, the size of the data set.
        keep: the fraction of samples that remains in the end, in (0, 1]. 1 ranks and drops nothing: no condensation.
        every: epochs from one E-step to the next.
        stages: E-steps over which the data shrinks.
        schedule: "reference", the authors' equal steps, which reach `keep` only after the last of `stages` stages (so
            that 240 epochs cost 87.5 %, not 70 %, of full training); "cosine", along half a cosine to `keep` at stage
            `stages`; "immediate", `keep` from the first stage on. See `schedules.py`.
        alpha: exponent of the visits in the score V·F^alpha (Eq. 13), >= 0.
        epsilon: the largest share of a dropped image in a mix (Eq. 15), in [0, 1]. 0 mixes nothing: raw items
            may then differ in shape.
        accumulate: mixes of several stages pile up, as in the authors' code, which overwrites its images; a sample
            that was mixed, dropped and comes back is still mixed. False: at every E-step all mixes start over from the
            raw images.
        convex: blend (1 - e)·own + e·dropped (the authors' code); False: own + e·dropped (the paper's Eq. 14).
        warmup: no E-step before the end of epoch `warmup` (the first is 1), as the authors' `--warmup`: E-steps stay at the
            multiples of `every`, those before are left out, and the first that is not is stage 1. So a run of the same
            length has fewer stages, and keeps more in the end.
        labels: (N,) integers >= 0, the class of every sample, as a tensor, an array or a list. None: unknown. They are for
            `min_per_class`, `kept_per_class` and the warning of a class that is no longer kept.
        min_per_class: at least so many samples of every class stay, or all where a class has fewer: those of highest score.
            They replace the lowest-ranked others, so the sizes stay those of the schedule. 0: ranking alone decides.
        seed: for rankings that draw random numbers (`RandomCondenser`); ranking by knowledge value draws none.
        device: where the value table lives. None: where the first values given to `update` are.
        group: the `torch.distributed` process group that `step` sums over. None: the default group if one is
            initialised (ranks that silently diverge would be worse than a collective too many); a group of this rank
            alone keeps a condenser to itself.

    Raises:
        TypeError, ValueError: an argument is out of range, named with what it got and what it takes; `min_per_class` without
            `labels`, or so large that the classes of `labels` together take more than the final size.

    **Another ranking** at the same sizes is a subclass that overrides `score` and nothing else (see `RandomCondenser`).

    **Another selection**, as one that is made anew every epoch, overrides `select` and the two things that a training
    loop asks of every condenser (see `InfoBatch`): `measure`, what `update` is to be fed with, and `sample_weight`,
    what the loss of every sample is multiplied by.

    A sample that was never visited has V = 0 and F = 0, hence score 0: it ranks last, among the samples of no entropy,
    the lower index first. It is then dropped first, unless every sample is visited before the first E-step, as it
    should be.
    """

    measure = "value"
    """The field of a `kcd_ext.methods.Outcome` that `update` is to be fed with: "value", the knowledge value of every
    sample, or "losses", every sample's own loss before its weight."""

    ranks_by_value = True
    """False in a subclass whose `score` needs no values: samples without one are then no surprise."""

    _arguments: tuple[str, ...] = CONFIG  # what `config` holds
    _table_type = ValueTable
    # What becomes of samples never visited before the first E-step, and what to do.
    _unvisited = "rank last, without a value; give update() the values of every sample, or take a larger `every`"

    def __init__(
        self,
        num_samples: int,
        *,
        keep: float = 0.7,
        every: int = 40,
        stages: int = 6,
        schedule: str = "reference",
        alpha: float = 0.03,
        epsilon: float = 0.3,
        accumulate: bool = True,
        convex: bool = True,
        warmup: int = 0,
        labels: Tensor | np.ndarray | Sequence[int] | None = None,
        min_per_class: int = 0,
        seed: int = 0,
        device: torch.device | str | None = None,
        group: torch.distributed.ProcessGroup | None = None,
    ):
        self._num_samples = check_int("num_samples", num_samples, 1)
        self._keep = check_fraction("keep", keep)
        self._every = check_int("every", every, 1)
        self._stages = check_int("stages", stages, 1)
        self._schedule = check_choice("schedule", schedule, SCHEDULES)
        self._alpha = check_non_negative("alpha", alpha)
        self._epsilon = check_unit_interval("epsilon", epsilon)
        self._accumulate = check_bool("accumulate", accumulate)
        self._convex = check_bool("convex", convex)
        self._warmup = check_int("warmup", warmup, 0)
        self._min_per_class = check_int("min_per_class", min_per_class, 0)
        self._labels = None if labels is None else checked_labels(labels, self._num_samples)
        self._check_min_per_class()
        self._seed = check_int("seed", seed, 0, MAX_SEED)
        check_group(group)
        self._group = group
        self._table = self._table_type(self._num_samples, device)
        self._set_kept(torch.arange(self._num_samples, dtype=torch.int64, device="cpu"))
        self._log = _no_mixes()
        self._recipes: dict[int, MixTree] | None = None
        self._epoch = 0
        self._stage = 0
        self._has_warned_of_classes = False
        self._warn_if_nothing_is_ever_dropped()

    def update(self, index: Tensor, value: Tensor) -> None:
        """Records one visit an entry. It only adds on the device: nothing is waited for, nothing is communicated.

        Args:
            index: (b,) int64 original indices. One that is repeated is visited as often. Entries of -1 are skipped: so
                the sampler marks the repeats that only fill up a rank.
            value: (b,) knowledge values of any floating dtype on any device, e.g. the student's entropy (Eq. 7) in
                nats; in a subclass, what its `measure` names. A value that is not finite (or beyond ±2^960) is left out
                and counted in `non_finite`.

        Raises:
            TypeError, ValueError: shapes or dtypes are not these.
            IndexError: an index is neither -1 nor in [0, N). This can be seen only while `index` is on the CPU: on a
                GPU looking would mean waiting, so there such an entry is left out and the next `step` warns of it.
        """
        # Whatever mode the caller is in, the table stays made of ordinary tensors that the next call may change.
        with torch.inference_mode(False), torch.no_grad():
            self._table.add(index, value)

    def step(self) -> Condensation | None:
        """Ends an epoch; every `every` epochs this is the E-step. Waits for the device.

        The visits of the epoch are merged into the table, over the group with exactly one all-reduce of one float64
        tensor, after which every rank ranks the same numbers on its CPU: the same answer on each, bit for bit. If the
        collective fails (a rank died), nothing has changed and no visit is lost.

        Returns:
            What the E-step decided, or None between E-steps (and where `select` leaves all as it is). At the final
            size nothing is dropped or mixed any more, but all N samples are ranked anew, so the kept set can still
            change.

        Warns:
            RuntimeWarning: once, of values that were not finite; at the first E-step, of samples never visited; once, of
                classes that an E-step keeps no sample of, where `labels` are known; and of out-of-range indices on a GPU.
        """
        with torch.inference_mode(False), torch.no_grad():
            messages = self._table.fold(self._communicator())
            epoch, stage, condensation = self._epoch + 1, self._stage, None
            if epoch % self._every == 0 and epoch >= self._warmup:
                stage, selection = stage + 1, self.select()
                if selection is not None:
                    condensation = self._condensation(*selection, stage, epoch)
                    self._adopt(condensation)
                messages += [*self._of_never_visited(stage), *self._of_vanished_classes()]
            self._epoch, self._stage = epoch, stage
        for message in messages:
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return condensation

    def score(self) -> Tensor:
        """What samples are ranked by, highest first: V·F^alpha (Eq. 13), (N,) float64 on the CPU.

        This is the seam for other rankings: a subclass overrides it with any (N,) float64 tensor without NaN that is a
        function of `values`, `counts`, `stage` (E-steps before this one), `epoch` (epochs before the one that ends) and
        `config`, so that every rank and every resumed run computes the same. Equal scores rank the lower index first.
        """
        return self._table.values.cpu() * self._table.counts.cpu().double() ** self._alpha

    def select(self) -> tuple[Tensor, Tensor] | None:
        """What an E-step keeps and what it gives up: the ranking, cut where the schedule says.

        Where `min_per_class` asks for it, samples of the classes that would have fewer come before the lowest-ranked others.

        This is the seam for other selections: a subclass overrides it with a function of what `score` is a function of,
        and of `ranking` and `kept` (before this E-step). It may keep any number of samples, more than before too.

        Returns:
            `Condensation.kept`, at least one sample, and `Condensation.dropped`: int64 original indices on the CPU,
            most valuable first, none in both. None: what is kept stays as it is.
        """
        order, before = self.ranking(), len(self._kept)
        size = stage_size(self._schedule, self._stage + 1, before, self._num_samples, self._keep, self._stages)
        if self._min_per_class:
            stays = with_minimum(order, size, self._labels, self._min_per_class)
            order = torch.cat((order[stays], order[~stays]))
        return order[:size], order[size:before]

    def ranking(self) -> Tensor:
        """All N samples by `score`, highest first, of equal ones the lower index: (N,) int64 on the CPU."""
        score = self.score()
        if not isinstance(score, Tensor) or score.shape != (self._num_samples,) or score.dtype != torch.float64:
            got = f"{score.dtype} of shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
            raise ValueError(f"score() must return a float64 tensor of shape ({self._num_samples},), got {got}")
        if score.isnan().any():
            raise ValueError(f"score() must not return NaN, got {int(score.isnan().sum())} of them")
        # By NumPy: torch's sort takes milliseconds when it is first called, as much as ten epochs' bookkeeping of a small set.
        return torch.from_numpy(np.argsort(-score.cpu().numpy(), kind="stable"))

    @property
    def sample_weight(self) -> Tensor | None:
        """What each sample's loss is multiplied by in the epoch to come: (N,) float32 on the table's device.

        None: 1 for all. It changes at `step` alone, is a function of the state, and is the same on every rank.
        """
        return None

    @property
    def kept(self) -> Tensor:
        """(n,) int64 original indices of what is distilled, most valuable first (at the start: 0 … N - 1)."""
        return self._kept.clone()

    @property
    def labels(self) -> Tensor | None:
        """(N,) int64 class of every sample, on the CPU; None: unknown."""
        return None if self._labels is None else self._labels.clone()

    def set_labels(self, labels: Tensor | np.ndarray | Sequence[int]) -> None:
        """Tell the class of every sample where that was not known at first, as of a data set that is loaded item by item.

        Raises:
            TypeError, ValueError: not (N,) integers >= 0, or others than those that are known. Nothing has changed then.
        """
        labels = checked_labels(labels, self._num_samples)
        if self._labels is not None and not torch.equal(labels, self._labels):
            raise ValueError("labels must be those that this condenser has, got others")
        self._labels = labels

    @property
    def kept_per_class(self) -> Tensor | None:
        """(largest label + 1,) int64 on the CPU: how many samples of each class are kept; None without labels."""
        if self._labels is None:
            return None
        return torch.bincount(self._labels[self._kept], minlength=int(self._labels.max()) + 1)

    @property
    def ascending(self) -> np.ndarray:
        """`kept` by ascending index, (n,) int64, not to be written to: it is no copy."""
        return self._ascending

    @property
    def recipes(self) -> Mapping[int, MixTree]:
        """Original index -> what the image is made of (see `mixing.py`), for all samples that are mixes."""
        if self._recipes is None:
            mixes = zip(*(self._log[name].tolist() for name in ("mixed", "partner", "weight")), strict=True)
            self._recipes = build_recipes(mixes, self._convex)
        return MappingProxyType(self._recipes)

    def mix(self, images: Tensor) -> Tensor:
        """All images as `recipes` says: what the epoch to come is to be trained on.

        That is a copy with the mixes in it; where there are none, `images` itself.

        Args:
            images: (N, ...) raw images, uint8 or floating point, on any device. They are not changed.

        Raises:
            TypeError: `images` is no tensor, or of a dtype that cannot be mixed.
            ValueError: it does not hold N images.
        """
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a tensor of shape (N, ...), got {type(images).__name__}")
        if images.shape[:1] != (self._num_samples,):
            raise ValueError(f"images must have shape ({self._num_samples}, ...), got {tuple(images.shape)}")
        if not len(self._log["mixed"]):
            return images
        mixed = images.clone()
        overwrite(mixed, **self._log, convex=self._convex)
        return mixed

    @property
    def values(self) -> Tensor:
        """(N,) float64 on the table's device: mean value of every sample, this rank's visits since `step` included."""
        with torch.inference_mode(False), torch.no_grad():
            return self._table.values

    @property
    def counts(self) -> Tensor:
        """(N,) int64 on the table's device: visits of every sample, this rank's visits since `step` included."""
        with torch.inference_mode(False), torch.no_grad():
            return self._table.counts

    @property
    def non_finite(self) -> int:
        """How many values have been left out because they were not finite. Waits for the device."""
        return self._table.non_finite

    @property
    def epoch(self) -> int:
        """How many epochs have ended."""
        return self._epoch

    @property
    def stage(self) -> int:
        """How many E-steps there have been."""
        return self._stage

    @property
    def num_samples(self) -> int:
        """N, the size of the data set."""
        return self._num_samples

    @property
    def config(self) -> dict[str, int | float | str | bool]:
        """The arguments this was built with, device and group left out: a resumed run must have the same."""
        return {name: getattr(self, f"_{name}") for name in self._arguments}

    def state_dict(self) -> dict[str, Tensor | int | float | str | bool]:
        """Everything a resumed run needs, exactly: tensors on the CPU and plain numbers, booleans and strings.

        It can be stored with `torch.save` and loaded with `weights_only=True`, or as safetensors and JSON. `pending`
        is what this rank saw since the last `step`: at the end of an epoch it is empty and the state is the same on
        every rank; in mid-epoch every rank has to store its own, or visits would be counted once for every rank that
        loads them.
        """
        return {
            "version": STATE_VERSION,
            "condenser": type(self).__name__,
            **self.config,
            "epoch": self._epoch,
            "stage": self._stage,
            "kept": self._kept.clone(),
            "labels": _NO_LABELS.clone() if self._labels is None else self._labels.clone(),
            **{name: tensor.clone() for name, tensor in self._log.items()},
            **self._table.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Takes over what `state_dict` returned; the run goes on as if it had never stopped.

        Raises:
            TypeError, ValueError: `state` is not of a condenser built with the same arguments, or is damaged. Nothing
                has changed then.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state_dict must be a mapping, got {type(state).__name__}")
        state = dict(state)
        self._check_state(state)
        with torch.inference_mode(False), torch.no_grad():
            self._table.load_state_dict(state)
            self._set_kept(state["kept"].detach().cpu().clone())
            self._set_log({name: state[name].detach().cpu().clone() for name in self._log})
            if len(state["labels"]):
                self._labels = state["labels"].detach().cpu().clone()
        self._epoch, self._stage = state["epoch"], state["stage"]

    def __repr__(self) -> str:
        config = ", ".join(f"{name}={value!r}" for name, value in self.config.items())
        return f"{type(self).__name__}({config}): {len(self._kept)} kept, epoch {self._epoch}, stage {self._stage}"

    def _condensation(self, kept: Tensor, dropped: Tensor, stage: int, epoch: int) -> Condensation:
        # epsilon 0 would blend in nothing at all. A drop to less than half leaves more partners than kept samples.
        pairs = min(len(dropped), len(kept)) if self._epsilon else 0
        return Condensation(
            kept=kept.clone(),
            dropped=dropped.clone(),
            mixed=kept[len(kept) - pairs :].clone(),
            partner=dropped[:pairs].clone(),
            mix=mix_strength(pairs, len(dropped), self._epsilon),
            weight=pixel_weight(pairs, len(dropped), self._epsilon, self._convex),
            convex=self._convex,
            stage=stage,
            epoch=epoch,
        )

    def _of_never_visited(self, stage: int) -> list[str]:
        """What the first E-step warns of; later ones have no other samples to warn of."""
        unknown = self._table.never_visited if self.ranks_by_value and stage == 1 else 0
        if not unknown:
            return []
        return [
            f"{unknown} of {self._num_samples} samples were never visited before the first E-step and {self._unvisited}"
        ]

    def _of_vanished_classes(self) -> list[str]:
        """What is said of classes without a sample in the kept set, the first time that there are any."""
        if self._labels is None or self._has_warned_of_classes:
            return []
        there = self._labels.unique().numpy()  # labels can be larger than any table of counts
        gone = np.setdiff1d(there, self._labels[self._kept].numpy()).tolist()
        if not gone:
            return []
        self._has_warned_of_classes = True
        names = ", ".join(map(str, gone[:10])) + (", ..." if len(gone) > 10 else "")
        return [
            f"{len(gone)} of {len(there)} classes have no sample in the kept set any more (labels {names}); "
            f"min_per_class keeps some of each"
        ]

    def _check_min_per_class(self) -> None:
        least = self._min_per_class
        if not least:
            return
        if self._labels is None:
            raise ValueError(f"min_per_class={least} needs labels, the class of every sample, got None")
        final = final_size(self._num_samples, self._keep)
        most = largest_minimum(self._labels, final)
        if least > most:
            raise ValueError(
                f"min_per_class must be at most {most}, so that {len(self._labels.unique())} classes fit into the final "
                f"size {final} (keep={self._keep}), got {least}"
            )

    def _adopt(self, condensation: Condensation) -> None:
        new = {name: getattr(condensation, name) for name in self._log}
        old = self._log if self._accumulate else _no_mixes()
        self._set_log({name: torch.cat((old[name], new[name])) for name in old})
        self._set_kept(condensation.kept.clone())

    def _set_kept(self, kept: Tensor) -> None:
        self._kept, self._ascending = kept, np.sort(kept.numpy())
        self._ascending.flags.writeable = False

    def _set_log(self, log: dict[str, Tensor]) -> None:
        self._log = log
        self._recipes = None  # made where they are asked for

    def _communicator(self) -> torch.distributed.ProcessGroup | None:
        distributed = torch.distributed
        if self._group is None and not (distributed.is_available() and distributed.is_initialized()):
            return None
        group = distributed.group.WORLD if self._group is None else self._group
        return group if distributed.get_world_size(group) > 1 else None

    def _check_state(self, state: dict[str, object]) -> None:
        own = self.state_dict()
        if state.keys() != own.keys():
            missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys(), key=str)
            wrong = f"entry {missing[0]!r} is missing" if missing else f"entry {brief(unknown[0])} is unknown"
            raise ValueError(f"state_dict is none of a condenser: {wrong}")
        for name in ("version", "condenser", *self._arguments):
            if type(state[name]) is not type(own[name]) or state[name] != own[name]:
                raise ValueError(
                    f"state_dict has {name}={brief(state[name])}, this condenser has {name}={brief(own[name])}"
                )
        for name in ("epoch", "stage"):
            check_int(f"state_dict['{name}']", state[name], 0, MAX_SEED)
        self._table.check_state(state)
        check_tensor("kept", state["kept"], torch.int64, (None,))
        if not 1 <= len(state["kept"]) <= self._num_samples or len(state["kept"].unique()) != len(state["kept"]):
            raise ValueError(f"state_dict['kept'] must hold 1 to {self._num_samples} different indices")
        for name, dtype in (("mixed", torch.int64), ("partner", torch.int64), ("weight", torch.float64)):
            check_tensor(name, state[name], dtype, (None,))
            if len(state[name]) != len(state["mixed"]):
                raise ValueError(f"state_dict['{name}'] must be as long as 'mixed', got {len(state[name])} entries")
        check_tensor("labels", state["labels"], torch.int64, (None,))
        if len(state["labels"]):
            labels = checked_labels(state["labels"], self._num_samples)
            if self._labels is not None and not torch.equal(labels, self._labels):
                raise ValueError("state_dict has other labels than this condenser")
        for name in ("kept", "mixed", "partner"):
            if ((state[name] < 0) | (state[name] >= self._num_samples)).any():
                raise ValueError(f"state_dict['{name}'] must hold indices in [0, {self._num_samples})")
        if not ((state["weight"] >= 0) & (state["weight"] <= 1)).all():
            raise ValueError("state_dict['weight'] must lie in [0, 1]")

    def _warn_if_nothing_is_ever_dropped(self) -> None:
        first = stage_size(self._schedule, 1, self._num_samples, self._num_samples, self._keep, self._stages)
        last = stage_size(self._schedule, self._stages, first, self._num_samples, self._keep, self._stages)
        if last == self._num_samples > final_size(self._num_samples, self._keep):
            warnings.warn(
                f"num_samples={self._num_samples}, keep={self._keep}, stages={self._stages}: schedule "
                f"{self._schedule!r} drops less than one sample a stage, which is none, so nothing is ever condensed; "
                f"take fewer stages or schedule='cosine'",
                RuntimeWarning,
                stacklevel=3,
            )


_NO_LABELS = torch.empty(0, dtype=torch.int64, device="cpu")


def _no_mixes() -> dict[str, Tensor]:
    """The log of mixes, (m,) each, in the order they were made; m = 0."""
    return {
        "mixed": torch.empty(0, dtype=torch.int64, device="cpu"),
        "partner": torch.empty(0, dtype=torch.int64, device="cpu"),
        "weight": torch.empty(0, dtype=torch.float64, device="cpu"),
    }
