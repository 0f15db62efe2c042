"""Results that are collected beside their place and put there all at once."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .. import files

CONFIG = "config.json"
REPLACED = ".replaced"  # in the folder of the new results: the old folder, until all of the user's is out of it


class Staging:
    """`partial`, the folder `<output>.partial` in which a command fills `entries`, and `output`, where they end up.

    Args:
        output: the folder for the results; links are followed.
        command: what writes `"command": command` into the config.json of both folders.
        entries: the names that are the command's own in `output`. All others are the user's and stay.

    Raises:
        ValueError: `output` can have no folder beside it.
        OSError: `output` or `partial` is a file, or holds what the command has not written. Nothing has changed.
    """

    def __init__(self, output: Path, command: str, entries: Sequence[str]):
        self.output = Path(os.path.realpath(output))
        self.entries = entries
        if not self.output.name:
            raise ValueError(f"output must be a folder that can be replaced, got {output}")
        self.partial = self.output.with_name(f"{self.output.name}.partial")
        _check_is_of(command, self.output, entries)
        _check_is_of(command, self.partial)

    @contextmanager
    def opened(self, resume: bool) -> Iterator[None]:
        """Inside, `partial` is there and this process alone writes into it and replaces `output`.

        Raises:
            FileExistsError: `partial` holds an interrupted command and `resume` is False, or another process works there.
            OSError: it cannot be written, or `output` cannot be replaced. Nothing has changed.
        """
        with files.folder_lock(self.partial):
            self._settle()
            if not resume and any(self.partial.iterdir()):
                raise FileExistsError(
                    f"an interrupted demo is in {self.partial}: --resume goes on with it, or remove it"
                )
            self._try_to_replace()
            yield

    def publish(self) -> None:
        """`partial` becomes `output`, by renaming whole folders; what is the user's in the old one is carried over.

        Killed at any moment, `opened` puts it right the next time.
        """
        if self.output.exists():
            self.output.rename(self.partial / REPLACED)
        self.partial.rename(self.output)
        self._settle()

    def _settle(self) -> None:
        """Takes a half-done `publish` back, or to its end."""
        aside = self.partial / REPLACED
        if aside.exists() and not self.output.exists():
            aside.rename(self.output)
        old = self.output / REPLACED
        if not old.exists():
            return
        for path in list(old.iterdir()):
            if path.name in self.entries:
                files.remove(path)
            elif not os.path.lexists(self.output / path.name):
                path.rename(self.output / path.name)
        with suppress(OSError):  # not empty: the user has files of one name in both folders
            old.rmdir()

    def _try_to_replace(self) -> None:
        """Finds out now, not after all the work, that the folder is the root of a disk or another user's."""
        if self.output.exists():
            self.output.rename(self.partial / REPLACED)
            self._settle()


def _check_is_of(command: str, folder: Path, names: Sequence[str] = ()) -> None:
    """Raises FileExistsError if replacing these entries (none named: all) would destroy what is not the command's."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output {folder} is a file: choose another --output")
    config = folder / CONFIG
    present = {path.name for path in folder.glob("*")} - {REPLACED}
    taken = sorted(present & set(names) if names else present)
    if taken and not (config.is_file() and f'"command": {json.dumps(command)}' in config.read_text(errors="replace")):
        raise FileExistsError(f"output {folder} holds a {taken[0]} that is not of a demo: choose another --output")
