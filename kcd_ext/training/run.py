"""The state of a run: everything that changes while a student is trained, and how it is saved and restored."""

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..condensation import CondensedSampler, KnowledgeCondenser
from ..methods import Batch, Method
from ..networks import LogitsAlone
from .batches import Feed, batches_of_steps, with_weight
from .checkpoint import Checkpoint, reading
from .checks import check_same_parts
from .distributed import Accelerator, full_state_dict, sharded_like, sum_over_ranks
from .folder import RunFolder
from .phases import Phase, StudentStep
from .recipe import Recipe
from .summary import Summary

MIN_EVAL_BATCH_SIZE = 250  # networks that record no gradients take larger batches
INITIAL_TOTALS = {"sample_visits": 0, "teacher_visits": 0, "flops": 0, "seconds": 0.0, "condensation_seconds": 0.0}


@dataclass(eq=False)
class Run:
    """A run, before, between and after its epochs."""

    recipe: Recipe
    accelerator: Accelerator
    method: Method
    outputs: Mapping[str, LogitsAlone]  # the hooks on student and teacher as they were given
    classes: int
    condenser: KnowledgeCondenser
    feed: Feed
    test_feed: Feed
    folder: RunFolder | None
    dataset: str  # the name of the data
    teacher: nn.Module | None  # that is asked: the given one, or one of the method's own
    module: StudentStep  # student and method: what a checkpoint holds
    flops: Mapping[str, int | None]  # of a network's forward pass for a row; None: not countable
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
        """What is called for the student's logits: the network, or what was compiled of it."""
        return self.module.called[0]

    @property
    def rank(self) -> int:
        """The number of this process."""
        return self.accelerator.process_index

    @property
    def device(self) -> torch.device:
        """Where the run computes."""
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes and warns."""
        return self.accelerator.is_main_process

    @property
    def phase(self) -> Phase:
        """What is trained next, or was trained last."""
        return next((phase for phase in self.phases if phase.remaining_epochs()), self.phases[-1])

    @property
    def begun(self) -> bool:
        """Whether an epoch has ended."""
        return bool(self.history or self.pretraining_history)

    def sum(self, numbers: Iterable[Tensor | float]) -> list[float]:
        """Return the sum of each number over all processes, in float64."""
        return sum_over_ranks(self.accelerator, numbers)

    # --- an epoch ---

    @contextmanager
    def timed(self, total: str) -> Iterator[None]:
        """Add the seconds that the context takes to a total."""
        start = time.perf_counter()
        yield
        self.totals[total] = round(self.totals[total] + time.perf_counter() - start, 4)

    def batches(self, phase: Phase, epoch: int) -> Iterator[tuple[Batch, float, bool]]:
        """Yield the epoch's batches: each with its share in its step, and whether it ends the step."""
        recipe, number = self.recipe, phase.stream + epoch
        with self.timed("condensation_seconds"):
            self.sampler.set_epoch(number, consumed=0)
            entries = self.feed.entries(self.sampler)
        parts = [*batches_of_steps(len(self.sampler), recipe.batch_size, recipe.gradient_accumulation)]
        batches = self.feed.epoch(entries, [rows for rows, _, _ in parts], recipe.seed, number)
        for batch, (_, share, ends_step) in zip(batches, parts, strict=True):
            yield with_weight(batch, phase.sample_weight), share, ends_step

    def test_batches(self, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield the test set, or this process's share."""
        return self.test_feed.eval_batches(max(MIN_EVAL_BATCH_SIZE, self.recipe.batch_size), rank, world_size)

    def count(self, student_rows: Iterable[int], teacher_rows: Iterable[int]) -> None:
        """Add the rows that this process's networks were asked about, and what they cost, to the totals."""
        ranks, totals = self.accelerator.num_processes, self.totals
        totals["teacher_visits"] += ranks * sum(teacher_rows)
        # Of a step of the student's the backward pass counts as two forward passes.
        for name, passes, rows in (("student", 3, sum(student_rows)), ("teacher", 1, sum(teacher_rows))):
            if rows:
                known = totals["flops"] is not None and self.flops[name] is not None
                totals["flops"] = totals["flops"] + passes * ranks * rows * self.flops[name] if known else None

    # --- what is written ---

    def report_outputs(self) -> None:
        """Warn of what networks give beside their logits."""
        if self.is_main:
            for output in self.outputs.values():
                output.report()

    def begin(self, about: Mapping[str, object]) -> None:
        """Write config.json. Of a finished run everything stays as it was written."""
        self.about = about
        self.accelerator.wait_for_everyone()  # all have looked into the folder before one writes there
        if self.folder is not None and self.is_main and self.phase.remaining_epochs():
            self.folder.write_config(self.recipe.label, about, self.teacher_accuracy)

    def save(self, phase: Phase, metrics: dict[str, object]) -> dict[str, object]:
        """End an epoch: add its line of metrics to the history and write both, with a checkpoint. Return the line."""
        line = metrics | self.totals
        phase.history.append(line)
        if self.folder is not None:
            checkpoint = self.checkpoint()  # on every process: the student may be sharded
            if self.is_main:
                self.folder.save_epoch(self.pretraining_history, self.history, checkpoint)
        return line

    def finish(self) -> Summary:
        """Write the student and the summary; return it."""
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
        """Return all of this that the next epoch needs. With a sharded student every process must call it."""
        optimizer, scaler = full_state_dict(self.phase.optimizer.state_dict()), self.accelerator.scaler
        # With an entry for every parameter: one that got no gradient yet has no momentum.
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
        """Go on from a checkpoint.

        Raises ValueError where the networks or the condenser are others, or the checkpoint lacks something.

        Warns:
            RuntimeWarning: on the CPU, where torch has another number of threads than before.
        """
        own = self.module.state_dict()
        check_same_parts(found.model, own)
        with reading(found.source):
            trained, state, scaler = (found.training[name] for name in ("trained", "optimizer", "scaler"))
            self.pretraining_history += found.run["pretraining"]
            self.history += found.run["history"]
            self.teacher_accuracy = found.run["teacher_accuracy"]
            self.totals = {name: (self.history or self.pretraining_history)[-1][name] for name in self.totals}
            threads = found.run["threads"]
        for name in sorted({*trained} ^ {*self.phases[-1].trained}):
            now, then = ("is not", "was") if name in trained else ("is", "was not")
            raise ValueError(f"{name} {now} to be trained, but {then} before: requires_grad must be as it was")
        done, planned = len(self.pretraining_history), sum(len(phase.epochs) for phase in self.phases[:-1])
        if done > planned or (self.history and done < planned):
            raise ValueError(
                f"{found.source} is of a run with {done} epochs of pretraining, method {self.recipe.method!r} has {planned} "
                "now: a run resumes only as it began"
            )
        with reading(found.source):
            self.condenser.load_state_dict(found.training["condenser"])
            optimizer, parameters = self.phase.optimizer, self.phase.parameters
            momenta = [entry["momentum_buffer"] for entry in state["state"].values()]
            shapes = [p.shape if m is None else m.shape for m, p in zip(momenta, parameters, strict=False)]
            if len(momenta) != len(parameters) or shapes != [p.shape for p in parameters]:
                raise ValueError("training.pt: the momentum is not that of the parameters that are trained next")
            shards = {i: {"momentum_buffer": sharded_like(p, momenta[i])} for i, p in enumerate(parameters)}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": shards})
            self.module.load_state_dict({name: sharded_like(own[name], x) for name, x in found.model.items()})
            if self.accelerator.scaler is not None and scaler:
                self.accelerator.scaler.load_state_dict(scaler)
        here = torch.get_num_threads()
        if self.device.type == "cpu" and self.phase.remaining_epochs() and threads != here:
            warnings.warn(
                f"{found.source} was written with {threads} threads of torch, this process has {here}: "
                "the run goes on, but not bit for bit as it would have with as many",
                RuntimeWarning,
                stacklevel=6,  # the caller of distill
            )


@contextmanager
def count_rows(network: nn.Module | None) -> Iterator[list[int]]:
    """Yield a list that gets the number of rows of every batch that the network is asked about."""
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
