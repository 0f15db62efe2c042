"""Refuses what is neither a file nor a folder, before it is opened."""

import os
import stat
from pathlib import Path

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: str | os.PathLike) -> None:
    """Raise ValueError unless `path` is a regular file or a link to one.

    To open a FIFO waits for a writer, and to read a device may never end.

    Raises:
        ValueError: it is something else, or a link to nothing; says which.
        OSError: there is nothing at `path`, or it cannot be looked at.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        if not os.path.islink(path):
            raise
        raise ValueError(f"{path}: is a link to {os.readlink(path)}, where there is nothing") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{Path(path)}: must be a regular file, is {KINDS.get(stat.S_IFMT(mode), 'something else')}")
