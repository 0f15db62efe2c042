"""The state of a run, and how it is saved and restored."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from .distributed import Accelerator, full_state_dict, local_shard, shard_like, sum_over_ranks
from .folder import RunFolder
from .phases import Phase, StudentStep
from .recipe import Recipe
from .summary import Summary, best_accuracy, best_epoch

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
    held_out: Mapping[str, BatchSource]  # test, and val if there is one
    folder: RunFolder | None
    dataset: str  # the name of the data set's class
    teacher: nn.Module | None  # the one that is called: the given teacher, or one that the method made
    module: StudentStep  # student and method, as checkpoints hold them
    flops: Mapping[str, int | None]  # of one row's forward pass; None: cannot be counted
    phases: list[Phase] = field(default_factory=list)
    step_hooks: list[Callable[[Phase], None]] = field(default_factory=list)  # called after every optimizer step
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

    @property
    def sample_weight(self) -> Tensor | None:
        """The factor of every sample's loss in the next epoch, (N,) float32; None: 1 for all."""
        weight = self.condenser.sample_weight
        if weight is None and self.condenser.measure == "losses":  # methods give the losses of weighted batches only
            weight = torch.ones(self.condenser.num_samples, device=self.device)
        return weight

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
        phase.begin_steps(sum(ends_step for *_, ends_step in parts))
        batches = self.train_source.epoch(entries, [rows for rows, _, _ in parts], recipe.seed, seeded_epoch)
        batches = phase.training_batches(batches, len(parts), epoch)
        for batch, (_, share, ends_step) in zip(batches, parts, strict=True):
            yield with_sample_weight(batch, phase.sample_weight), share, ends_step

    def eval_batches(self, part: str, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield the batches of a held-out set, `test` or `val`, or of one rank's share of it."""
        return self.held_out[part].eval_batches(max(MIN_EVAL_BATCH_SIZE, self.recipe.batch_size), rank, world_size)

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
        """Give the student its final weights, write it and the summary, and return the summary."""
        self.phases[-1].finish()
        summary = Summary(
            method=self.recipe.label,
            seed=self.recipe.seed,
            accuracy_last=self.history[-1]["accuracy"],
            accuracy_best=best_accuracy(self.history),
            **self.totals,
            teacher_accuracy=self.teacher_accuracy,
            history=self.history,
            condenser=self.condenser,
            best_epoch=best_epoch(self.history),
            keeps_best=self.recipe.keep_best,
        )
        weights = full_state_dict(self.module.student.state_dict())
        if self.folder is not None and self.is_main:
            self.folder.save_final(weights, str(self.about.get("dataset", self.dataset)), summary)
        self.accelerator.wait_for_everyone()
        return summary

    def checkpoint(self) -> Checkpoint:
        """Return the state that the next epoch needs. Every rank must call this method: the student may be sharded."""
        optimizer, scaler = full_state_dict(self.phase.optimizer.state_dict()), self.accelerator.scaler
        # The optimizer has no entry for a parameter that got no gradient yet: add one without content.
        entries = {i: optimizer["state"].get(i) or {"momentum_buffer": None} for i in range(len(self.phase.parameters))}
        student = self.phases[-1]
        return Checkpoint(
            epoch=len(self.pretraining_history) + len(self.history),
            model=full_state_dict(self.module.state_dict()),
            training={
                "optimizer": {**optimizer, "state": entries},
                "scaler": {} if scaler is None else scaler.state_dict(),
                "condenser": self.condenser.state_dict(),
                "trained": [*student.trained],
                **({} if student.averages is None else {"averages": student.averages.state_dict()}),
                **({} if student.best is None else {"best": student.best}),
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
            self._restore_optimizer(state)
            student = self.phases[-1]
            if student.averages is not None:
                student.averages.load_state_dict(found.training["averages"])
            if self.recipe.keep_best and self.history:
                student.best = found.training["best"]
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

    def _restore_optimizer(self, saved: Mapping[str, object]) -> None:
        """Restore the state of the next phase's optimizer. Raises ValueError if it does not fit the parameters."""
        optimizer, parameters = self.phase.optimizer, self.phase.parameters
        entries = [*saved["state"].values()]
        if len(entries) != len(parameters) or len(saved["param_groups"]) != len(optimizer.param_groups):
            raise ValueError("training.pt: its optimizer state does not fit the parameters that are trained next")
        state = {}
        for i, (parameter, entry) in enumerate(zip(parameters, entries, strict=True)):
            tensors = {name: x for name, x in entry.items() if isinstance(x, Tensor) and x.dim()}
            # Other optimizers may have tensors of other shapes, but none that belong to shards.
            of_one_shape = (
                isinstance(optimizer, torch.optim.SGD | torch.optim.AdamW) or local_shard(parameter) is not parameter
            )
            if of_one_shape and any(x.shape != parameter.shape for x in tensors.values()):
                raise ValueError("training.pt: its optimizer state does not fit the parameters that are trained next")
            if any(x is not None for x in entry.values()):
                same_shape = {name: x for name, x in tensors.items() if x.shape == parameter.shape}
                state[i] = entry | {name: shard_like(parameter, x) for name, x in same_shape.items()}
        groups = [
            {**own, **group, "params": own["params"]}
            for own, group in zip(optimizer.state_dict()["param_groups"], saved["param_groups"], strict=True)
        ]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


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
