"""Files: read where they are regular ones, written as the old one or the new one, whole; folders one process at a time works in."""

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from filelock import FileLock, Timeout

from .registry import one_line

Parsed = TypeVar("Parsed")

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


LOCK = ".kcd.lock"  # in a folder while a process works there
# What flock says where files cannot be locked, as on some network file systems.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Keep other processes and threads out of a folder. It is made if there is none, and removed again if it stays empty.

    The thread that holds the lock may enter again, as the run of a command does. The kernel releases the lock of a
    process that is killed. Where files cannot be locked, everyone enters.

    Raises:
        FileExistsError: another process, or another thread, is inside.
        OSError: the folder cannot be made, or nothing can be written there.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder.resolve() / LOCK
    lock = FileLock(file, is_singleton=True)
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            message = f"another kcd is running in {folder}: wait for it, or choose another --output"
            raise FileExistsError(message) from None
        except OSError as error:
            if made or error.errno in NO_LOCKS:  # else the file may be another process's
                file.unlink(missing_ok=True)
            if error.errno not in NO_LOCKS:
                raise
        yield
    finally:
        if lock.lock_counter == 1:
            file.unlink(missing_ok=True)  # before the release: whoever is next makes a new one
        lock.release()
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces the file in one step; a kill, a full disk or a crash of the machine leaves the old one.

    Raises:
        OSError: the file cannot be written; what was there before is intact, and nothing is left beside it.
    """
    beside = path.with_name(f".{path.name}.partial")
    try:
        beside.unlink(missing_ok=True)  # of a process that was killed; whatever it is, it is not written through
        with open(beside, "xb") as file:
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
    write_bytes(path, json_bytes(content))


def json_bytes(content: Mapping[str, object]) -> bytes:
    """Return the content of a JSON file. Raises ValueError for NaN and infinity, which are no JSON."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def write_lines(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    """JSON lines, as `write_bytes`."""
    write_bytes(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode())


def read_json(path: Path, parse: Callable[[dict], Parsed] = dict) -> Parsed:
    """Return `parse` of the object in a JSON file.

    Raises:
        ValueError: the file holds no object, or one that `parse` cannot read: "PATH is damaged: ...".
        OSError: it cannot be read.
    """
    return _parsed(path, read_regular(path), parse)


def read_lines(path: Path, parse: Callable[[dict], Parsed] = dict) -> list[Parsed]:
    """Return `parse` of each line of a file of JSON lines. Raises as `read_json` does."""
    return [_parsed(path, line, parse) for line in read_regular(path).splitlines()]


def _parsed(path: Path, text: bytes, parse: Callable[[dict], Parsed]) -> Parsed:
    try:
        content = json.loads(text, parse_constant=_no_number)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
        return parse(content)
    except Exception as error:  # whatever `parse` raises of content that it does not expect
        kind = "it has no " if isinstance(error, KeyError) else f"{type(error).__name__}: "
        what = one_line(error) if isinstance(error, TypeError | ValueError) else f"{kind}{one_line(error)}"
        raise ValueError(f"{path} is damaged: {what}") from error


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no number in JSON")


def remove(path: Path) -> None:
    """A file or a whole directory, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
