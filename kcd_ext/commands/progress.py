"""A bar over the epochs of all runs of a command."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from .. import processes
from ..terminal import printable, say


class Bar:
    """Runs of `epochs` each, one after the other."""

    def __init__(self, bar: tqdm, epochs: int):
        self._bar = bar
        self._epochs = epochs
        self._done = 0

    def begin(self, label: str) -> Callable[[dict], None]:
        """The next run; what `distill` is to call after its epochs."""
        self._bar.set_description(printable(label))
        before = self._done

        def show(line: dict) -> None:
            if "pretraining" in line:
                self._bar.set_postfix_str(f"pretraining epoch {line['pretraining']}")
                return
            self._bar.set_postfix_str(f"{line['accuracy']:.1f} %", refresh=False)
            self._bar.update(before + line["epoch"] - self._bar.n)  # a resumed run does not begin with the first

        return show

    def end(self) -> None:
        """The run is finished, and may have been from the beginning."""
        self._done += self._epochs
        self._bar.update(self._done - self._bar.n)


@contextmanager
def bar_over(runs: int, epochs: int) -> Iterator[Bar]:
    """None is drawn where nobody watches: a log file would be filled with it."""
    hidden = True if processes.rank() else None
    with tqdm(total=runs * epochs, unit="epoch", disable=hidden) as bar:
        yield Bar(bar, epochs)


def note(text: str) -> None:
    """A line for whoever watches, above the bar where there is one."""
    if processes.rank() == 0:
        with tqdm.external_write_mode(file=sys.stderr):
            say(" ".join(text.split()))


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Inside, a warning is a line as soon as it is raised, each text once: some are about hours that lie ahead."""
    seen = set()

    def show(message: Warning, *_: object) -> None:
        if str(message) not in seen:
            seen.add(str(message))
            note(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
