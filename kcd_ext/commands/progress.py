"""Progress of a command: a bar over the epochs of all its runs, and lines above it. Without a terminal: a line per minute."""

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from .. import processes
from ..terminal import print_error, printable

SECONDS_BETWEEN_LINES = 60


class Bar:
    """A progress bar over consecutive runs of `epochs` each, drawn on rank 0 if stderr is a terminal.

    If stderr is a file or a pipe, as in a batch job, rank 0 prints a line about every SECONDS_BETWEEN_LINES instead.
    """

    def __init__(self, runs: int, epochs: int):
        self._bar = tqdm(total=runs * epochs, unit="epoch", disable=True if processes.rank() else None)
        self._runs, self._epochs, self._done = runs, epochs, 0
        self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES

    def _print(self, text: str) -> None:
        """Print a line in place of the bar, unless the last one is too recent."""
        if self._bar.disable and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            note(text)

    def start(self, label: str) -> Callable[[dict], None]:
        """Start the next run. Return the callback that `distill` calls with its lines of progress."""
        self._bar.set_description(printable(label))
        before = self._done

        def show(line: dict) -> None:
            if "step" in line:
                self._bar.set_postfix_str(f"step {line['step']}, loss {line['loss']:.4g}")
                return
            if "pretraining" in line:
                self._bar.set_postfix_str(f"pretraining epoch {line['pretraining']}")
                return
            self._bar.set_postfix_str(f"{line['accuracy']:.1f} %", refresh=False)
            self._bar.update(before + line["epoch"] - self._bar.n)  # a resumed run starts at a later epoch
            self._print(f"{label}: epoch {line['epoch']} of {self._epochs}, {line['accuracy']:.1f} %")

        return show

    def finish(self) -> None:
        """Count a finished run, even if it had finished before this command."""
        self._done += self._epochs
        self._bar.update(self._done - self._bar.n)
        self._print(f"{self._done // self._epochs} of {self._runs} runs are finished")

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def reading_bar(total: int, desc: str) -> tqdm:
    """Return a bar for images that are read, shown if that takes more than a second, on rank 0 if stderr is a terminal."""
    disable = True if processes.rank() else None
    return tqdm(total=total, desc=desc, unit="image", unit_scale=True, delay=1, leave=False, disable=disable)


def note(text: str) -> None:
    """Print a line on rank 0, above the progress bar if there is one."""
    if processes.rank() == 0:
        with tqdm.external_write_mode(file=sys.stderr):
            print_error(" ".join(text.split()))


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Print each distinct warning immediately: some concern hours of training that are still to come."""
    seen = set()

    def show(message: Warning, *_: object) -> None:
        if str(message) not in seen:
            seen.add(str(message))
            note(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
