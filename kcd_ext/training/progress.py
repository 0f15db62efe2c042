"""A bar over the epochs of all runs of a command."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from .. import processes


class Bar:
    """Runs of `epochs` each, one after the other."""

    def __init__(self, bar: tqdm, epochs: int):
        self._bar = bar
        self._epochs = epochs
        self._done = 0

    def begin(self, label: str) -> Callable[[dict], None]:
        """The next run; what `distill` is to call after its epochs."""
        self._bar.set_description(label)
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
    hidden = True if processes.number() else None
    with tqdm(total=runs * epochs, unit="epoch", disable=hidden) as bar:
        yield Bar(bar, epochs)
