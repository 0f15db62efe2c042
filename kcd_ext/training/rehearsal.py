"""A training step that is undone: it finds what does not fit before anything is written."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import product

import torch
from torch import nn

from ..describe import describe_error
from ..methods import Batch, Outcome
from ..module_state import Layout, restored
from ..networks import LogitsOnly, OutputError
from ..randomness import seeded
from .batches import batches_of_steps, with_sample_weight
from .checks import check_outcome
from .diagnosis import NotFiniteError, check_first_step
from .distributed import autocast, is_sharded, reshard
from .optimizers import check_optimizer
from .phases import PRETRAINING_SEED_OFFSET
from .run import Run

REHEARSAL_SEED = PRETRAINING_SEED_OFFSET - 2  # used instead of an epoch; no epoch has this number


class Rehearsal:
    """A step of every phase on the first samples of a run. The phases need not be prepared.

    Args:
        run: The run, before its first epoch.
    """

    def __init__(self, run: Run):
        self.run = run
        run.sampler.set_epoch(0, consumed=0)
        recipe = run.recipe
        rows, *_ = next(batches_of_steps(len(run.sampler), recipe.batch_size, recipe.gradient_accumulation))
        self.batch_size = rows.stop  # the size of the run's first batch
        self._first = cache(lambda source, size: source.first(size))

    def choose_layouts(self, layouts: Sequence[Layout]) -> None:
        """Take the step, and leave the networks in the memory layout in which it succeeds.

        Every network is tried in channels-last first, then in its original layout. In each layout the step is tried
        with two samples, then with a full batch: some methods cannot take a step on few samples. If a network gives
        more than logits and the method cannot use that, its output is reduced to the logits.

        Args:
            layouts: The layouts of the networks that may be channels-last. Empty: no layout changes.

        Raises:
            TypeError, ValueError: The step fails in every layout. The error is that of the original layouts.
        """
        outputs = [*self.run.outputs.values()]
        modes = [set(output.acts_in) for output in outputs]
        # A sharded student cannot be used again after a failed step, so it gets one attempt.
        few = self.batch_size if is_sharded(self.run.module) else min(2, self.batch_size)
        tried: set[tuple[bool, ...]] = set()
        for channels_last in product((True, False), repeat=len(layouts)):
            changed = tuple(layout.choose(last) for layout, last in zip(layouts, channels_last, strict=True))
            if changed in tried:
                continue
            tried.add(changed)
            for size in sorted({few, self.batch_size}):
                for output, mode in zip(outputs, modes, strict=True):
                    output.acts_in = set(mode)
                failed = self._find_failure(size, outputs)
                if failed is None:
                    return
            if isinstance(failed, OutputError | NotFiniteError):
                break  # no layout causes these
        raise failed

    def take_step(self, size: int, validate: bool = True) -> None:
        """Take a step of every phase on `size` samples, validate the student on as many, and undo everything.

        Raises:
            TypeError, ValueError: The networks, the method and the batch do not fit.
        """
        run = self.run
        networks = {"student": run.student} | ({} if run.teacher is None else {"teacher": run.teacher})
        roots = (run.module,) if run.teacher is None else (run.module, run.teacher)
        with ExitStack() as stack:
            stack.enter_context(seeded(run.recipe.seed, REHEARSAL_SEED, device=run.device))
            batch = with_sample_weight(self._first(run.train_source, size), run.sample_weight)
            tested = self._first(run.held_out["test"], size) if validate else None
            stack.enter_context(restored(*roots))
            stack.callback(reshard, *roots)
            running = stack.enter_context(_track_running(networks))
            try:
                self._step(batch, running)
                if tested is not None:
                    with torch.no_grad():
                        run.student.eval()(tested.x).argmax(-1)
            except (OutputError, torch.OutOfMemoryError, torch.distributed.DistError):
                raise  # callers handle these, and no network causes them
            except Exception as error:
                reason = describe_error(error)
                if running:
                    x = f"x of {batch.x.dtype} {tuple(batch.x.shape)}"
                    raise ValueError(f"{running[-1]} fails in a training step on {x}: {reason}") from error
                if isinstance(error, TypeError | ValueError) and "\n" not in str(error):
                    raise
                raise ValueError(
                    f"method {run.recipe.method!r} fails in a training step with this {' and '.join(networks)}: {reason}"
                ) from error

    def _step(self, batch: Batch, running: list[str]) -> None:
        run, method, student = self.run, self.run.recipe.method, self.run.phases[-1]
        for phase in run.phases[:-1]:
            phase.begin_epoch(phase.epochs.start)
            with autocast(run.accelerator):
                loss = phase.module(run.teacher, batch)
            loss.backward()
            phase.freeze()
        student.begin_epoch(0)
        (mixed,) = student.training_batches([batch], 1, 0)
        trained = student.trained
        for parameter in trained.values():
            parameter.grad = None
        with autocast(run.accelerator):
            outcome = student.module(run.teacher, mixed)
        if isinstance(outcome, Outcome) and not getattr(outcome.loss, "requires_grad", True):
            if not getattr(run.student(batch.x), "requires_grad", True):
                raise ValueError(
                    "student gives logits without a gradient in training mode: does it detach them, or run in "
                    "torch.no_grad()?"
                )
        check_outcome(outcome, batch, run.condenser.measure, method)
        running.append("student")
        outcome.loss.backward()
        running.pop()
        gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
        if not any(name.startswith("student.") for name in gradients):
            raise ValueError(
                f"student has no part in the loss of method {method!r}: none of its parameters gets a gradient"
            )
        unused = [name for name in trained if name not in gradients]
        if unused and run.accelerator.num_processes > 1:
            # Ranks reduce gradients in buckets. A bucket would wait forever for the gradient of an unused parameter.
            raise ValueError(
                f"{unused[0]} has no part in the loss: with several processes every parameter must get a gradient or "
                "have requires_grad=False"
            )
        if run.folder is None or run.folder.epoch == 0:  # else the checkpoint's weights, loaded later, replace these
            scaled = run.accelerator.scaler is not None  # float16 gradients may overflow, and the step is then skipped
            check_first_step(outcome, batch, {} if scaled else gradients, run.module.student, run.teacher, method)
        check_optimizer(student.new_optimizer(run.recipe), run.recipe.optimizer)

    def _find_failure(self, size: int, outputs: Sequence[LogitsOnly]) -> Exception | None:
        """Return the error of the step, tried also with outputs reduced to logits, or None if it succeeds."""
        while True:
            try:
                self.take_step(size)
            except (TypeError, ValueError) as error:
                if not any([output.restrict_to_found_modes() for output in outputs]):
                    return error
            else:
                return None


@contextmanager
def _track_running(networks: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Yield a list of the networks whose forward pass is running, by name: after an error it tells which one failed."""
    running: list[str] = []
    with ExitStack() as hooks:
        for name, network in networks.items():
            before = network.register_forward_pre_hook(lambda *_, name=name: running.append(name))
            after = network.register_forward_hook(lambda *_: running.pop() and None)
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        yield running
