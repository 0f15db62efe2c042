"""Logs: subscribers of `progress` that write metrics for other programs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..checks import is_number
from ..describe import describe
from ..files import read_lines
from ..registry import call, resolve

LOGS = {"tensorboard": "kcd_ext.training.logs:TensorBoard"}
EARLIER = {"epoch": "metrics.jsonl", "pretraining": "pretraining.jsonl"}  # files of the run folder with these lines


class TensorBoard:
    """A `progress` that writes all numbers of its lines as TensorBoard scalars, in the folder `tensorboard` of a run folder.

    Lines of epochs and of steps are series of their own: `tensorboard/epoch` and `tensorboard/step`, and for a method's
    pretraining `tensorboard/pretraining` and `tensorboard/pretraining-step`. The first line of a run that resumes removes what
    is logged from there on, and adds earlier epochs from the run folder. So each epoch is shown once, wherever the run was
    interrupted.

    Args:
        folder: The run folder, `output` of `distill`.

    Raises:
        ImportError: The package tensorboard is missing.
    """

    def __init__(self, folder: Path | str):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            message = 'log tensorboard needs the package tensorboard: pip install "kcd-ext[log]"'
            raise ImportError(message, name=error.name) from error
        self._new_writer = SummaryWriter
        self._folder = Path(folder)
        self._writers: dict[str, SummaryWriter] = {}

    def __call__(self, line: Mapping[str, object]) -> None:
        """Write a line of progress."""
        counter = next(name for name in ("step", "pretraining", "epoch") if name in line)
        series = "pretraining-step" if counter == "step" and "pretraining" in line else counter
        if series not in self._writers:
            earlier = self._earlier(series, line[counter])
            # What is logged from this number on is of an interrupted run.
            first = min([line[counter], *(each[counter] for each in earlier)])
            self._writers[series] = self._new_writer(self._folder / "tensorboard" / series, purge_step=first)
            for each in earlier:
                self._write(series, counter, each)
        self._write(series, counter, line)

    def _earlier(self, series: str, before: int) -> list[dict]:
        """Return the lines of earlier epochs in the run folder. There are none of steps."""
        path = self._folder / EARLIER.get(series, "")
        return [each for each in read_lines(path) if each[series] < before] if path.is_file() else []

    def _write(self, series: str, counter: str, line: Mapping[str, object]) -> None:
        writer = self._writers[series]
        for name, value in {**line, **(line.get("terms") or {})}.items():
            if name != counter and is_number(value):
                writer.add_scalar(name, value, line[counter])
        writer.flush()  # a killed process keeps its epochs

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()


def check_log(name: str) -> None:
    """Check that a log exists: `module:Class`, or a key of LOGS with its packages. Raises as `open_log` does."""
    resolve("log", name, LOGS)
    if name in LOGS:
        with open_log(name, Path()):
            pass


@contextmanager
def open_log(name: str, folder: Path) -> Iterator[Callable[[dict], None]]:
    """Yield the log of a run: `name` called with the run folder. Close it afterwards if it has a method `close`.

    Raises:
        TypeError, ValueError: The name is unknown, the call fails, or the result is not callable.
        ImportError: A package is missing.
    """
    log = call("log", name, LOGS, folder=folder)
    if not callable(log):
        raise TypeError(f"log {name!r} must be callable with a line of progress, got {describe(log)}")
    try:
        yield log
    finally:
        getattr(log, "close", lambda: None)()
