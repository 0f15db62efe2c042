"""Reading of files whose paths a user or a folder gives: regular files alone, so that opening one never waits."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_regular(path: str | os.PathLike) -> None:
    """Check that `path` leads to a regular file; links are followed, nothing is opened.

    Raises:
        ValueError: it leads to a FIFO, a socket or a device, or is a link to nothing.
        OSError: there is nothing at `path`, or a folder (IsADirectoryError).
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        if not os.path.islink(path):
            raise
        raise ValueError(f"{path}: is a link to {os.readlink(path)}, where there is nothing") from error
    _check(mode, path)


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Return a regular file opened for reading, in binary mode. A FIFO is refused, not waited for.

    Raises as `check_regular` does, and OSError where the file cannot be opened.
    """
    check_regular(path)  # before it is opened: to open a device can do something
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    try:
        _check(os.fstat(file.fileno()).st_mode, path)  # what was opened, should the path lead elsewhere by now
    except BaseException:
        file.close()
        raise
    return file


def read_regular(path: str | os.PathLike) -> bytes:
    """Return the content of a regular file. Raises as `open_regular` does."""
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        if error.filename is None:  # a failing disk does not say which file it was
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _check(mode: int, path: str | os.PathLike) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(Path(path)))
    if not stat.S_ISREG(mode):
        kind = next((name for is_one, name in _KINDS if is_one(mode)), "something else")
        raise ValueError(f"{path}: must be a regular file, is {kind}")
