"""Progress within an epoch: a line after every so many optimizer steps."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..checks import check_int

if TYPE_CHECKING:
    from .phases import Phase
    from .run import Run


def report_steps(run: "Run", progress: Callable[[dict], None] | None, every: int | None) -> None:
    """Make the run call `progress` with a line after every `every` steps. None: do nothing.

    Raises:
        TypeError, ValueError: `every` is not an integer >= 1, or there is no `progress` in a single process.
    """
    if every is None:
        return
    check_int("progress_every", every, 1)
    if progress is None and run.accelerator.num_processes == 1:
        raise ValueError(f"progress_every={every} has no effect without progress")
    run.step_hooks.append(StepReports(run, progress, every))


class StepReports:
    """A step hook of a run that reports every so many steps. Every rank must have it: the sums are of all ranks."""

    def __init__(self, run: "Run", progress: Callable[[dict], None] | None, every: int):
        self.run, self.progress, self.every = run, progress, every
        self._seen = (0, 0.0, 0.0)  # rows, their summed loss, and time at the last line of the epoch

    def __call__(self, phase: "Phase") -> None:
        """Report a step if it is due."""
        if phase.steps_done == 1:
            self._steps_before, self._seen = phase.steps_before(phase.epoch), (0, 0.0, phase.started)
        step = self._steps_before + phase.steps_done
        if step % self.every:
            return
        rows, loss = self.run.sum([phase.rows, phase.sums[0]])
        seen, self._seen = self._seen, (rows, loss, time.perf_counter())
        rows, loss, seconds = (now - before for now, before in zip(self._seen, seen, strict=True))
        if self.run.is_main and self.progress is not None:
            counted = {"step": step, phase.epoch_key: phase.epoch + 1, "lr": phase.step_lr}
            self.progress({**counted, "loss": loss / rows, "samples_per_second": round(rows / seconds, 1)})
