"""Safe files and folders: reads refuse FIFOs and devices, writes are atomic, and a folder lock admits one process at a time."""

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from .describe import one_line

Parsed = TypeVar("Parsed")

_FILE_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_regular(path: str | os.PathLike) -> None:
    """Raise unless `path` is a regular file or a link to one. Does not open it.

    Raises:
        ValueError: The path is a FIFO, a socket, a device or a broken link.
        OSError: The path does not exist, or is a folder (IsADirectoryError).
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        if not os.path.islink(path):
            raise
        raise ValueError(f"{path}: is a broken link to {os.readlink(path)}") from error
    _check_mode(mode, path)


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file for reading, in binary mode. Never blocks on a FIFO.

    Raises:
        ValueError: As `check_regular`.
        OSError: As `check_regular`, or the file cannot be opened.
    """
    check_regular(path)  # before opening: opening a device can have side effects
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    try:
        _check_mode(os.fstat(file.fileno()).st_mode, path)  # again, in case the path has been replaced since
    except BaseException:
        file.close()
        raise
    return file


def read_regular(path: str | os.PathLike) -> bytes:
    """Return the contents of a regular file. Raises as `open_regular` does."""
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        if error.filename is None:  # a read error of the disk carries no file name
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _check_mode(mode: int, path: str | os.PathLike) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(Path(path)))
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _FILE_KINDS if is_kind(mode)), "another kind of file")
        raise ValueError(f"{path}: must be a regular file, is {kind}")


LOCK = ".kcd.lock"  # the lock file inside a locked folder
# Errors of flock on file systems without locks, such as some network file systems.
_LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes and threads. Create it if necessary, and then remove it if it stays empty.

    The lock is re-entrant: a command locks the folder, then its run does. The kernel releases the lock of a killed process. On file
    systems without locks everyone may enter.

    Raises:
        FileExistsError: Another process or thread has locked the folder.
        OSError: The folder cannot be created or is not writable.
    """
    from filelock import FileLock, Timeout  # of the extra `train`; the rest of this file needs no package

    created = [path for path in (folder, *folder.parents) if not path.exists()]
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
            if created or error.errno in _LOCKS_UNSUPPORTED:  # otherwise another process may own the file
                file.unlink(missing_ok=True)
            if error.errno not in _LOCKS_UNSUPPORTED:
                raise
        yield
    finally:
        if lock.lock_counter == 1:
            file.unlink(missing_ok=True)  # before the release: the next process creates its own file
        lock.release()
        with suppress(OSError):  # not empty
            for path in created:
                path.rmdir()


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file atomically: a kill, a full disk or a crash of the machine leaves the old one intact.

    Raises:
        OSError: The file cannot be written. The old file is intact, and no temporary file remains.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.unlink(missing_ok=True)  # left by a killed process; may be a link, which must not be followed
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # the error of a full disk carries no file name
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file atomically, as `write_bytes`. Raises ValueError for NaN and infinity, which JSON lacks."""
    write_bytes(path, json_bytes(content))


def json_bytes(content: Mapping[str, object]) -> bytes:
    """Return `content` encoded as JSON. Raises ValueError for NaN and infinity, which JSON lacks."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def write_lines(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    """Write a file of JSON lines atomically, as `write_bytes`."""
    write_bytes(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode())


def read_json(path: Path, parse: Callable[[dict], Parsed] = dict) -> Parsed:
    """Read the object in a JSON file and return the result of `parse`.

    Raises:
        ValueError: The file does not contain an object, or `parse` fails: "PATH is damaged: ...".
        OSError: The file cannot be read.
    """
    return _parse(path, read_regular(path), parse)


def read_lines(path: Path, parse: Callable[[dict], Parsed] = dict) -> list[Parsed]:
    """Read a file of JSON lines and return the result of `parse` for each line. Raises as `read_json` does."""
    return [_parse(path, line, parse) for line in read_regular(path).splitlines()]


def _parse(path: Path, text: bytes, parse: Callable[[dict], Parsed]) -> Parsed:
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
        return parse(content)
    except Exception as error:  # `parse` may raise anything for unexpected content
        kind = "it has no " if isinstance(error, KeyError) else f"{type(error).__name__}: "
        reason = one_line(error) if isinstance(error, TypeError | ValueError) else f"{kind}{one_line(error)}"
        raise ValueError(f"{path} is damaged: {reason}") from error


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not a JSON number")


def remove(path: Path) -> None:
    """Remove a file or a folder with its contents. A no-op if it does not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
