"""The condenser: ranks samples by knowledge value and keeps fewer of them at every stage."""

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
from .classes import check_labels, keep_class_minimum, largest_minimum
from .condensation import Condensation
from .mixing import MixTree, build_mix_trees, mix_in_place, mix_strength, pixel_weight
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
    """The condenser of Knowledge Condensation Distillation: value estimation, ranking, stages and mixing.

    Li et al., ECCV 2022 (arXiv 2207.05409), Eq. 12–15, as in the authors' code. Pass every batch's knowledge values to
    `update`, and call `step` at the end of every epoch. A `CondensedSampler` then yields the kept samples.

    In a distributed run every rank has its own condenser, passes it the samples that the rank saw, and calls `step` after
    the same epochs.

    Args:
        num_samples: N, the size of the data set.
        keep: Fraction of samples kept in the end, in (0, 1]. 1 ranks but drops nothing: no condensation.
        every: Epochs from one condensation step (the paper's E-step) to the next.
        stages: Condensation steps over which the set shrinks.
        schedule: How fast the set shrinks (see `kcd_ext.condensation.schedules`):

            - "reference": the authors' equal steps. They reach `keep` only after the last of `stages` stages, so 240
              epochs cost 87.5 %, not 70 %, of full training.
            - "cosine": half a cosine, which reaches `keep` at stage `stages`.
            - "immediate": `keep` from the first stage on.
        alpha: Exponent of the number of visits in the score V·F^alpha (Eq. 13), >= 0.
        epsilon: Largest share of a dropped image in a mix (Eq. 15), in [0, 1]. 0 mixes nothing; raw items may then
            differ in shape.
        accumulate: True: mixes of several stages pile up, as in the authors' code, which overwrites its images. A sample
            that was mixed, dropped and kept again is still mixed. False: every condensation step mixes the raw images
            again.
        convex: True: (1 - e)·kept + e·dropped (the authors' code). False: kept + e·dropped (the paper's Eq. 14).
        warmup: No condensation step before the end of epoch `warmup` (the first epoch is 1), as the authors' `--warmup`.
            Steps stay at the multiples of `every`; earlier ones are skipped, and the first that is not is stage 1. So a
            run of the same length has fewer stages and keeps more in the end.
        labels: `(N,)` integers >= 0, the class of every sample, as a tensor, array or list. None: unknown. Used by
            `min_per_class`, `kept_per_class` and the warning about a class that is no longer kept.
        min_per_class: Samples to keep of every class at least, those of highest score; all of a class that has fewer. They
            replace the lowest-ranked others, so the sizes stay those of the schedule. 0: no minimum.
        seed: Seed of rankings that draw random numbers (`RandomCondenser`). Ranking by value draws none.
        device: Device of the value table. None: that of the first values passed to `update`.
        group: The `torch.distributed` process group that `step` sums over. None: the default group if one is initialised,
            because ranks that silently diverge are worse than one collective too many. To keep a condenser local, pass
            a group of this rank only.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range. `min_per_class` is given without `labels`, or is so large that the
            classes of `labels` need more than the final size.

    Warns:
        RuntimeWarning: The schedule drops less than one sample per stage, so nothing is ever condensed.

    **To rank differently** at the same sizes, override `score` in a subclass, and nothing else (see `RandomCondenser`).

    **To select differently**, for example a new set every epoch, override `select` and the two attributes that a training
    loop reads from every condenser (see `InfoBatch`): `measure`, the quantity to pass to `update`, and `sample_weight`,
    the factor of every sample's loss.

    A sample that was never visited has V = 0 and F = 0, hence score 0. It ranks last, with the samples of zero entropy,
    lower index first, and is dropped first. So visit every sample before the first condensation step.
    """

    measure = "value"
    """The field of `kcd_ext.methods.Outcome` to pass to `update`: "value", every sample's knowledge value (its entropy);
    "kl", its KL divergence; or "losses", its loss before its weight. `Condense.value` sets it for one condenser."""

    ranks_by_value = True
    """False in a subclass whose `score` needs no values: never visited samples then cause no warning."""

    _arguments: tuple[str, ...] = CONFIG  # the arguments that `config` returns
    _table_type = ValueTable
    # What happens to samples never visited before the first condensation step, and how to avoid it.
    _never_visited_advice = (
        "rank last, without a value; pass the values of every sample to update(), or increase `every`"
    )

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
        self._labels = None if labels is None else check_labels(labels, self._num_samples)
        self._check_min_per_class()
        self._seed = check_int("seed", seed, 0, MAX_SEED)
        check_group(group)
        self._group = group
        self._table = self._table_type(self._num_samples, device)
        self._set_kept(torch.arange(self._num_samples, dtype=torch.int64, device="cpu"))
        self._mix_log = _empty_mix_log()
        self._mix_trees: dict[int, MixTree] | None = None
        self._epoch = 0
        self._stage = 0
        self._has_warned_about_classes = False
        self._warn_if_never_condensed()

    def update(self, index: Tensor, value: Tensor) -> None:
        """Record one visit per entry. It only adds on the device: no synchronisation, no communication.

        Args:
            index: `(b,)` int64 original indices. A repeated index counts as several visits. Entries of -1 are skipped:
                the sampler marks padding repeats with it.
            value: `(b,)` knowledge values of any floating dtype on any device, e.g. the student's entropy (Eq. 7) in
                nats. For a subclass, the quantity that its `measure` names. A value that is not finite (or is beyond
                ±2^960) is left out and counted in `non_finite`.

        Raises:
            TypeError: An argument is not a tensor or has the wrong dtype.
            ValueError: A shape differs.
            IndexError: An index is neither -1 nor in [0, N). Only checked if `index` is on the CPU, because reading it
                on a GPU would synchronise. On a GPU such an entry is left out, and the next `step` warns.
        """
        # In every mode of the caller the table keeps ordinary tensors, which the next call can modify in place.
        with torch.inference_mode(False), torch.no_grad():
            self._table.add(index, value)

    def step(self) -> Condensation | None:
        """End an epoch; after every `every` epochs, run the condensation step. Synchronises with the device.

        The visits of the epoch are merged into the table, over the group with exactly one all-reduce of one float64
        tensor. Every rank then ranks the same numbers on its CPU, so the results are bit-identical. If the collective
        fails (a rank died), nothing has changed and no visit is lost.

        Returns:
            The result of the condensation step. None between condensation steps, and if `select` changes nothing. At the
                final size nothing is dropped or mixed any more, but all N samples are ranked again, so the kept set can
                still change.

        Warns:
            RuntimeWarning: Values were not finite (once); samples were never visited (at the first condensation step);
                a condensation step keeps no sample of a class, if `labels` are known (once); indices on a GPU were out
                of range.
        """
        with torch.inference_mode(False), torch.no_grad():
            messages = self._table.merge_pending(self._reduction_group())
            epoch, stage, condensation = self._epoch + 1, self._stage, None
            if epoch % self._every == 0 and epoch >= self._warmup:
                stage, selection = stage + 1, self.select()
                if selection is not None:
                    condensation = self._condensation(*selection, stage, epoch)
                    self._apply(condensation)
                messages += [*self._never_visited_warnings(stage), *self._vanished_class_warnings()]
            self._epoch, self._stage = epoch, stage
        for message in messages:
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return condensation

    def score(self) -> Tensor:
        """Return the score that samples are ranked by, highest first: V·F^alpha (Eq. 13), `(N,)` float64 on the CPU.

        Override it for another ranking. Return any `(N,)` float64 tensor without NaN that is a function of `values`,
        `counts`, `stage` (condensation steps before this one), `epoch` (epochs before the one that ends) and `config`.
        Every rank and every resumed run then computes the same. Of equal scores the lower index ranks first.
        """
        return self._table.values.cpu() * self._table.counts.cpu().double() ** self._alpha

    def select(self) -> tuple[Tensor, Tensor] | None:
        """Return the samples that a condensation step keeps and those it drops: the ranking, cut at the schedule's size.

        With `min_per_class`, samples of classes that would have fewer replace the lowest-ranked others.

        Override it for another selection, a function of everything `score` may depend on, and of `ranking` and `kept`
        (before this condensation step). It may keep any number of samples, even more than before.

        Returns:
            `Condensation.kept`, at least one sample, and `Condensation.dropped`: int64 original indices on the CPU,
                most valuable first, none in both. None: the kept set does not change.
        """
        order, before = self.ranking(), len(self._kept)
        size = stage_size(self._schedule, self._stage + 1, before, self._num_samples, self._keep, self._stages)
        if self._min_per_class:
            keep = keep_class_minimum(order, size, self._labels, self._min_per_class)
            order = torch.cat((order[keep], order[~keep]))
        return order[:size], order[size:before]

    def ranking(self) -> Tensor:
        """Return all N samples ordered by `score`, highest first, ties by lower index: `(N,)` int64 on the CPU."""
        score = self.score()
        if not isinstance(score, Tensor) or score.shape != (self._num_samples,) or score.dtype != torch.float64:
            got = f"{score.dtype} of shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
            raise ValueError(f"score() must return a float64 tensor of shape ({self._num_samples},), got {got}")
        if score.isnan().any():
            raise ValueError(f"score() must not return NaN, got {int(score.isnan().sum())} of them")
        # NumPy, because torch's first sort takes milliseconds: as long as ten epochs' bookkeeping of a small set.
        return torch.from_numpy(np.argsort(-score.cpu().numpy(), kind="stable"))

    @property
    def sample_weight(self) -> Tensor | None:
        """The factor of every sample's loss in the next epoch: `(N,)` float32 on the table's device. None: 1 for all.

        It is a function of the state, changes only in `step`, and is the same on every rank.
        """
        return None

    @property
    def kept(self) -> Tensor:
        """The kept set: `(n,)` int64 original indices, most valuable first (at the start 0 … N - 1)."""
        return self._kept.clone()

    @property
    def labels(self) -> Tensor | None:
        """The class of every sample, `(N,)` int64 on the CPU; None if unknown."""
        return None if self._labels is None else self._labels.clone()

    def set_labels(self, labels: Tensor | np.ndarray | Sequence[int]) -> None:
        """Set the class of every sample if it was unknown at first, as for a data set that is loaded item by item.

        Args:
            labels: `(N,)` integers >= 0.

        Raises:
            TypeError: `labels` are not integers. Nothing has changed then.
            ValueError: `labels` have another shape, are negative, or differ from the known ones. Nothing has changed
                then.
        """
        labels = check_labels(labels, self._num_samples)
        if self._labels is not None and not torch.equal(labels, self._labels):
            raise ValueError("labels must equal the labels this condenser already has, got different ones")
        self._labels = labels

    @property
    def kept_per_class(self) -> Tensor | None:
        """The number of kept samples of each class, `(largest label + 1,)` int64 on the CPU; None without labels."""
        if self._labels is None:
            return None
        return torch.bincount(self._labels[self._kept], minlength=int(self._labels.max()) + 1)

    @property
    def ascending(self) -> np.ndarray:
        """The kept set by ascending index, `(n,)` int64: a read-only array, not a copy."""
        return self._ascending

    @property
    def mix_trees(self) -> Mapping[int, MixTree]:
        """The mix tree of every mixed sample, by original index (see `kcd_ext.condensation.mixing`)."""
        if self._mix_trees is None:
            mixes = zip(*(self._mix_log[name].tolist() for name in ("mixed", "partner", "weight")), strict=True)
            self._mix_trees = build_mix_trees(mixes, self._convex)
        return MappingProxyType(self._mix_trees)

    def mix(self, images: Tensor) -> Tensor:
        """Return all images for the next epoch, mixed as `mix_trees` describes.

        Args:
            images: `(N, ...)` raw images, uint8 or floating point, on any device. Not modified.

        Returns:
            A copy with the mixes; `images` itself if there are none.

        Raises:
            TypeError: `images` is not a tensor, or its dtype cannot be mixed.
            ValueError: The number of images is not N.
        """
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a tensor of shape (N, ...), got {type(images).__name__}")
        if images.shape[:1] != (self._num_samples,):
            raise ValueError(f"images must have shape ({self._num_samples}, ...), got {tuple(images.shape)}")
        if not len(self._mix_log["mixed"]):
            return images
        mixed = images.clone()
        mix_in_place(mixed, **self._mix_log, convex=self._convex)
        return mixed

    @property
    def values(self) -> Tensor:
        """The mean value of every sample, `(N,)` float64 on the table's device, with this rank's visits since `step`."""
        with torch.inference_mode(False), torch.no_grad():
            return self._table.values

    @property
    def counts(self) -> Tensor:
        """The number of visits of every sample, `(N,)` int64 on the table's device, with this rank's since `step`."""
        with torch.inference_mode(False), torch.no_grad():
            return self._table.counts

    @property
    def non_finite(self) -> int:
        """The number of values left out because they were not finite. Synchronises with the device."""
        return self._table.non_finite

    @property
    def epoch(self) -> int:
        """The number of completed epochs."""
        return self._epoch

    @property
    def stage(self) -> int:
        """The number of condensation steps so far."""
        return self._stage

    @property
    def every(self) -> int:
        """The number of epochs from one condensation step to the next."""
        return self._every

    @property
    def num_samples(self) -> int:
        """The size of the data set, N."""
        return self._num_samples

    @property
    def config(self) -> dict[str, int | float | str | bool]:
        """The arguments of this condenser without labels, device and group: a resumed run must use the same."""
        return {name: getattr(self, f"_{name}") for name in self._arguments}

    def state_dict(self) -> dict[str, Tensor | int | float | str | bool]:
        """Return everything a resumed run needs, exactly: tensors on the CPU, and plain numbers, booleans and strings.

        Store it with `torch.save` and load it with `weights_only=True`, or store it as safetensors and JSON.

        `pending` contains this rank's visits since the last `step`. At the end of an epoch it is empty, and the state is
        the same on every rank. In mid-epoch every rank must store its own state; otherwise visits are counted once for
        every rank that loads them.
        """
        return {
            "version": STATE_VERSION,
            "condenser": type(self).__name__,
            **self.config,
            "epoch": self._epoch,
            "stage": self._stage,
            "kept": self._kept.clone(),
            "labels": _NO_LABELS.clone() if self._labels is None else self._labels.clone(),
            **{name: tensor.clone() for name, tensor in self._mix_log.items()},
            **self._table.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Load what `state_dict` returned; the run continues as if it had never stopped.

        Args:
            state: The state of a condenser with the same arguments.

        Raises:
            TypeError: `state` is not a mapping, or an entry has the wrong type. Nothing has changed then.
            ValueError: The arguments differ, or `state` is damaged. Nothing has changed then.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state_dict must be a mapping, got {type(state).__name__}")
        state = dict(state)
        self._check_state(state)
        with torch.inference_mode(False), torch.no_grad():
            self._table.load_state_dict(state)
            self._set_kept(state["kept"].detach().cpu().clone())
            self._set_mix_log({name: state[name].detach().cpu().clone() for name in self._mix_log})
            if len(state["labels"]):
                self._labels = state["labels"].detach().cpu().clone()
        self._epoch, self._stage = state["epoch"], state["stage"]

    def __repr__(self) -> str:
        config = ", ".join(f"{name}={value!r}" for name, value in self.config.items())
        return f"{type(self).__name__}({config}): {len(self._kept)} kept, epoch {self._epoch}, stage {self._stage}"

    def _condensation(self, kept: Tensor, dropped: Tensor, stage: int, epoch: int) -> Condensation:
        # With epsilon 0 a mix would change nothing. A drop to less than half leaves more partners than kept samples.
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

    def _never_visited_warnings(self, stage: int) -> list[str]:
        """Return the warning about never visited samples; only the first condensation step can have new ones."""
        count = self._table.never_visited if self.ranks_by_value and stage == 1 else 0
        if not count:
            return []
        return [
            f"{count} of {self._num_samples} samples were never visited before the first condensation step and "
            f"{self._never_visited_advice}"
        ]

    def _vanished_class_warnings(self) -> list[str]:
        """Return the warning about classes without a kept sample, the first time that there are any."""
        if self._labels is None or self._has_warned_about_classes:
            return []
        classes = self._labels.unique().numpy()  # not a table of counts: labels can be as large as 2^63 - 1
        vanished = np.setdiff1d(classes, self._labels[self._kept].numpy()).tolist()
        if not vanished:
            return []
        self._has_warned_about_classes = True
        names = ", ".join(map(str, vanished[:10])) + (", ..." if len(vanished) > 10 else "")
        return [
            f"{len(vanished)} of {len(classes)} classes have no sample in the kept set any more (labels {names}); "
            f"min_per_class keeps some of each"
        ]

    def _check_min_per_class(self) -> None:
        minimum = self._min_per_class
        if not minimum:
            return
        if self._labels is None:
            raise ValueError(f"min_per_class={minimum} needs labels, the class of every sample, got None")
        final = final_size(self._num_samples, self._keep)
        largest = largest_minimum(self._labels, final)
        if minimum > largest:
            raise ValueError(
                f"min_per_class must be at most {largest}, so that {len(self._labels.unique())} classes fit into the final "
                f"size {final} (keep={self._keep}), got {minimum}"
            )

    def _apply(self, condensation: Condensation) -> None:
        new = {name: getattr(condensation, name) for name in self._mix_log}
        old = self._mix_log if self._accumulate else _empty_mix_log()
        self._set_mix_log({name: torch.cat((old[name], new[name])) for name in old})
        self._set_kept(condensation.kept.clone())

    def _set_kept(self, kept: Tensor) -> None:
        self._kept, self._ascending = kept, np.sort(kept.numpy())
        self._ascending.flags.writeable = False

    def _set_mix_log(self, log: dict[str, Tensor]) -> None:
        self._mix_log = log
        self._mix_trees = None  # built on demand

    def _reduction_group(self) -> torch.distributed.ProcessGroup | None:
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
            raise ValueError(f"state_dict must be that of a condenser: {wrong}")
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
            raise ValueError(f"state_dict['kept'] must contain 1 to {self._num_samples} different indices")
        for name, dtype in (("mixed", torch.int64), ("partner", torch.int64), ("weight", torch.float64)):
            check_tensor(name, state[name], dtype, (None,))
            if len(state[name]) != len(state["mixed"]):
                raise ValueError(f"state_dict['{name}'] must be as long as 'mixed', got {len(state[name])} entries")
        check_tensor("labels", state["labels"], torch.int64, (None,))
        if len(state["labels"]):
            labels = check_labels(state["labels"], self._num_samples)
            if self._labels is not None and not torch.equal(labels, self._labels):
                raise ValueError("state_dict has other labels than this condenser")
        for name in ("kept", "mixed", "partner"):
            if ((state[name] < 0) | (state[name] >= self._num_samples)).any():
                raise ValueError(f"state_dict['{name}'] must contain indices in [0, {self._num_samples})")
        if not ((state["weight"] >= 0) & (state["weight"] <= 1)).all():
            raise ValueError("state_dict['weight'] must be in [0, 1]")

    def _warn_if_never_condensed(self) -> None:
        first = stage_size(self._schedule, 1, self._num_samples, self._num_samples, self._keep, self._stages)
        last = stage_size(self._schedule, self._stages, first, self._num_samples, self._keep, self._stages)
        if last == self._num_samples > final_size(self._num_samples, self._keep):
            warnings.warn(
                f"num_samples={self._num_samples}, keep={self._keep}, stages={self._stages}: schedule "
                f"{self._schedule!r} drops less than one sample per stage, so nothing is ever condensed; "
                f"use fewer stages or schedule='cosine'",
                RuntimeWarning,
                stacklevel=3,
            )


_NO_LABELS = torch.empty(0, dtype=torch.int64, device="cpu")


def _empty_mix_log() -> dict[str, Tensor]:
    """Return a log without mixes; its tensors are `(m,)` each, in chronological order, m = 0."""
    return {
        "mixed": torch.empty(0, dtype=torch.int64, device="cpu"),
        "partner": torch.empty(0, dtype=torch.int64, device="cpu"),
        "weight": torch.empty(0, dtype=torch.float64, device="cpu"),
    }
