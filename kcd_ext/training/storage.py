"""Files that are either the old one or the new one, whole: written beside, then renamed."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces the file in one step; a kill, a full disk or a crash of the machine leaves the old one.

    Raises:
        OSError: the file cannot be written; what was there before is intact, and nothing is left beside it.
    """
    beside = path.with_name(f".{path.name}.partial")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk does not say which file it was
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """As `write_bytes`. Raises ValueError for NaN and infinity, which are no JSON."""
    write_bytes(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def write_lines(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    """JSON lines, as `write_bytes`."""
    write_bytes(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode())


def read_lines(path: Path) -> list[dict]:
    """The JSON lines of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def remove(path: Path) -> None:
    """A file or a whole directory, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
