"""The state of a run, and how it is saved and restored."""

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..condensation import CondensedSampler, KnowledgeCondenser
from ..methods import Batch, Method
from ..networks import LogitsOnly
from .batches import BatchSource, batches_of_steps, with_sample_weight
from .checkpoint import Checkpoint, report_damage
from .checks import check_same_state
from .distributed import Accelerator, full_state_dict, shard_like, sum_over_ranks
from .folder import RunFolder
from .phases import Phase, StudentStep
from .recipe import Recipe
from .summary import Summary

MIN_EVAL_BATCH_SIZE = 250  # without gradients, larger batches fit in memory
INITIAL_TOTALS = {"sample_visits": 0, "teacher_visits": 0, "flops": 0, "seconds": 0.0, "condensation_seconds": 0.0}


@dataclass(eq=False)
class Run:
    """A run: its parts, its metrics so far, and its totals."""

    recipe: Recipe
    accelerator: Accelerator
    method: Method
    outputs: Mapping[str, LogitsOnly]  # the hooks on the given student and teacher
    classes: int
    condenser: KnowledgeCondenser
    train_source: BatchSource
    test_source: BatchSource
    folder: RunFolder | None
    dataset: str  # the name of the data set's class
    teacher: nn.Module | None  # the one that is called: the given teacher, or one that the method made
    module: StudentStep  # student and method, as checkpoints hold them
    flops: Mapping[str, int | None]  # of one row's forward pass; None: cannot be counted
    phases: list[Phase] = field(default_factory=list)
    history: list[dict] = field(default_factory=list)
    pretraining_history: list[dict] = field(default_factory=list)
    totals: dict = field(default_factory=lambda: {**INITIAL_TOTALS})
    teacher_accuracy: float | None = None
    about: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks = self.accelerator.num_processes
        self.sampler = CondensedSampler(self.condenser, seed=self.recipe.seed, rank=self.rank, world_size=ranks)

    @property
    def student(self) -> nn.Module:
        """The module that is called for the student's logits: the network itself, or its compiled form."""
        return self.module.callee[0]

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return self.accelerator.process_index

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes and warns."""
        return self.accelerator.is_main_process

    @property
    def phase(self) -> Phase:
        """The phase with the next epoch, or the last phase of a finished run."""
        return next((phase for phase in self.phases if phase.remaining_epochs()), self.phases[-1])

    @property
    def has_metrics(self) -> bool:
        """Whether an epoch has ended, of training or of pretraining."""
        return bool(self.history or self.pretraining_history)

    def sum(self, numbers: Iterable[Tensor | float]) -> list[float]:
        """Return the sum of each number over all ranks, in float64."""
        return sum_over_ranks(self.accelerator, numbers)

    # --- an epoch ---

    @contextmanager
    def timed(self, total: str) -> Iterator[None]:
        """Add the context's duration in seconds to `totals[total]`."""
        start = time.perf_counter()
        yield
        self.totals[total] = round(self.totals[total] + time.perf_counter() - start, 4)

    def batches(self, phase: Phase, epoch: int) -> Iterator[tuple[Batch, float, bool]]:
        """Yield the epoch's batches, each with its share of the optimizer step and whether it ends that step."""
        recipe, seeded_epoch = self.recipe, phase.seed_offset + epoch
        with self.timed("condensation_seconds"):
            self.sampler.set_epoch(seeded_epoch, consumed=0)
            entries = self.train_source.entries(self.sampler)
        parts = [*batches_of_steps(len(self.sampler), recipe.batch_size, recipe.gradient_accumulation)]
        batches = self.train_source.epoch(entries, [rows for rows, _, _ in parts], recipe.seed, seeded_epoch)
        batches = phase.training_batches(batches, len(parts), epoch)
        for batch, (_, share, ends_step) in zip(batches, parts, strict=True):
            yield with_sample_weight(batch, phase.sample_weight), share, ends_step

    def test_batches(self, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield the batches of the test set, or of one rank's share of it."""
        return self.test_source.eval_batches(max(MIN_EVAL_BATCH_SIZE, self.recipe.batch_size), rank, world_size)

    def add_rows(self, student_rows: Iterable[int], teacher_rows: Iterable[int]) -> None:
        """Add the rows that both networks processed on this rank, and their FLOPs, to the totals of all ranks."""
        ranks, totals = self.accelerator.num_processes, self.totals
        totals["teacher_visits"] += ranks * sum(teacher_rows)
        # The student's backward pass counts as two forward passes.
        for name, passes, rows in (("student", 3, sum(student_rows)), ("teacher", 1, sum(teacher_rows))):
            if rows:
                known = totals["flops"] is not None and self.flops[name] is not None
                totals["flops"] = totals["flops"] + passes * ranks * rows * self.flops[name] if known else None

    # --- output ---

    def warn_about_outputs(self) -> None:
        """Warn about networks that give more than logits."""
        if self.is_main:
            for output in self.outputs.values():
                output.report()

    def start(self, about: Mapping[str, object]) -> None:
        """Write config.json, unless the run is finished."""
        self.about = about
        self.accelerator.wait_for_everyone()  # every rank must have checked the folder before rank 0 writes there
        if self.folder is not None and self.is_main and self.phase.remaining_epochs():
            self.folder.write_config(self.recipe.label, about, self.teacher_accuracy)

    def save(self, phase: Phase, metrics: dict[str, object]) -> dict[str, object]:
        """Add an epoch's metrics to the history, write them with a checkpoint, and return them with the totals."""
        line = metrics | self.totals
        phase.history.append(line)
        if self.folder is not None:
            checkpoint = self.checkpoint()  # on every rank: the student may be sharded
            if self.is_main:
                self.folder.save_epoch(self.pretraining_history, self.history, checkpoint)
        return line

    def finish(self) -> Summary:
        """Write the student and the summary, and return the summary."""
        accuracy = [line["accuracy"] for line in self.history]
        summary = Summary(
            method=self.recipe.label,
            seed=self.recipe.seed,
            accuracy_last=accuracy[-1],
            accuracy_best=max(accuracy),
            **self.totals,
            teacher_accuracy=self.teacher_accuracy,
            history=self.history,
            condenser=self.condenser,
        )
        weights = full_state_dict(self.module.student.state_dict())
        if self.folder is not None and self.is_main:
            self.folder.save_final(weights, str(self.about.get("dataset", self.dataset)), summary)
        self.accelerator.wait_for_everyone()
        return summary

    def checkpoint(self) -> Checkpoint:
        """Return the state that the next epoch needs. Every rank must call this method: the student may be sharded."""
        optimizer, scaler = full_state_dict(self.phase.optimizer.state_dict()), self.accelerator.scaler
        # The optimizer has no entry for a parameter that got no gradient yet: add one without momentum.
        momenta = {i: optimizer["state"].get(i) or {"momentum_buffer": None} for i in range(len(self.phase.parameters))}
        return Checkpoint(
            epoch=len(self.pretraining_history) + len(self.history),
            model=full_state_dict(self.module.state_dict()),
            training={
                "optimizer": {**optimizer, "state": momenta},
                "scaler": {} if scaler is None else scaler.state_dict(),
                "condenser": self.condenser.state_dict(),
                "trained": self.phases[-1].trained,
            },
            run={
                **self.folder.fingerprint,
                "teacher_accuracy": self.teacher_accuracy,
                "threads": torch.get_num_threads(),
                "pretraining": self.pretraining_history,
                "history": self.history,
            },
        )

    def restore(self, found: Checkpoint) -> None:
        """Restore the state from a checkpoint.

        Raises:
            ValueError: The networks or the condenser differ, or the checkpoint lacks an entry.

        Warns:
            RuntimeWarning: On the CPU, if torch has another number of threads than before.
        """
        own = self.module.state_dict()
        check_same_state(found.model, own)
        with report_damage(found.source):
            trained, state, scaler = (found.training[name] for name in ("trained", "optimizer", "scaler"))
            self.pretraining_history += found.run["pretraining"]
            self.history += found.run["history"]
            self.teacher_accuracy = found.run["teacher_accuracy"]
            self.totals = {name: (self.history or self.pretraining_history)[-1][name] for name in self.totals}
            threads = found.run["threads"]
        for name in sorted({*trained} ^ {*self.phases[-1].trained}):
            now, before = ("is not", "was") if name in trained else ("is", "was not")
            raise ValueError(f"{name} {now} trained now, but {before} before: requires_grad must not change")
        done, planned = len(self.pretraining_history), sum(len(phase.epochs) for phase in self.phases[:-1])
        if done > planned or (self.history and done < planned):
            raise ValueError(
                f"{found.source} has {done} epochs of pretraining, method {self.recipe.method!r} plans {planned} now: "
                "a resumed run must not change its pretraining"
            )
        with report_damage(found.source):
            self.condenser.load_state_dict(found.training["condenser"])
            optimizer, parameters = self.phase.optimizer, self.phase.parameters
            momenta = [entry["momentum_buffer"] for entry in state["state"].values()]
            shapes = [p.shape if m is None else m.shape for m, p in zip(momenta, parameters, strict=False)]
            if len(momenta) != len(parameters) or shapes != [p.shape for p in parameters]:
                raise ValueError("training.pt: its momentum does not fit the parameters that are trained next")
            shards = {i: {"momentum_buffer": shard_like(p, momenta[i])} for i, p in enumerate(parameters)}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": shards})
            self.module.load_state_dict({name: shard_like(own[name], x) for name, x in found.model.items()})
            if self.accelerator.scaler is not None and scaler:
                self.accelerator.scaler.load_state_dict(scaler)
        current = torch.get_num_threads()
        if self.device.type == "cpu" and self.phase.remaining_epochs() and threads != current:
            warnings.warn(
                f"{found.source} was written with {threads} threads of torch, this process has {current}: "
                "the run resumes, but not bit for bit",
                RuntimeWarning,
                stacklevel=6,  # the caller of distill
            )


@contextmanager
def count_rows(network: nn.Module | None) -> Iterator[list[int]]:
    """Yield a list to which every call of the network appends its number of rows."""
    rows: list[int] = []
    if network is None:
        yield rows
        return
    hook = network.register_forward_hook(
        lambda _module, inputs, given: rows.append(len(given if isinstance(given, Tensor) else inputs[0]))
    )
    try:
        yield rows
    finally:
        hook.remove()
