"""The folder lock with threads, forked and killed processes, and file systems without locks."""

import errno
import fcntl
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from kcd_ext import files
from kcd_ext.training.folder import RunFolder


def in_another_thread(work):
    """Return the result of `work` in another thread, or raise its error."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result()


def enter(context):
    with context:
        return True


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_folder_is_locked_for_other_threads_and_left_clean(tmp_path):
    folder = tmp_path / "new" / "run"
    raises_locked = pytest.raises(
        FileExistsError, match=f"another kcd is running in {folder}: wait for it, or choose another"
    )
    with files.folder_lock(folder):
        assert enter(files.folder_lock(folder)) and names(folder) == [
            files.LOCK
        ]  # re-entrant, for the run of a command
        with raises_locked:
            in_another_thread(lambda: enter(files.folder_lock(folder)))
        with raises_locked:
            in_another_thread(lambda: enter(RunFolder.locked(folder, {}, resume=True, writes=True)))
        assert in_another_thread(lambda: enter(RunFolder.locked(folder, {}, resume=True, writes=False)))  # another rank
        assert enter(files.folder_lock(folder / "teacher")) and folder.exists()
        assert enter(files.folder_lock(folder / ".." / "run"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), files.folder_lock(folder):
        (folder / "config.json").write_text("{}")
        raise KeyError
    assert in_another_thread(lambda: enter(files.folder_lock(folder))) and names(folder) == ["config.json"]


def test_lock_is_released_when_process_is_killed(tmp_path):
    child = os.fork()
    if child == 0:
        with files.folder_lock(tmp_path / "run"):
            (tmp_path / "run" / "started").write_text("")
            time.sleep(60)
        os._exit(0)
    while not (tmp_path / "run" / "started").exists():
        time.sleep(0.001)
    with pytest.raises(FileExistsError, match="another kcd is running"):
        enter(files.folder_lock(tmp_path / "run"))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert enter(files.folder_lock(tmp_path / "run"))


def test_lock_is_released_although_forked_process_is_alive(tmp_path):
    with files.folder_lock(tmp_path / "run"):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        (tmp_path / "run" / "started").write_text("")
    try:
        assert in_another_thread(lambda: enter(files.folder_lock(tmp_path / "run")))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_folder_lock_is_no_op_without_lock_support(tmp_path, monkeypatch):
    def fails(number):
        def flock(descriptor, operation):
            raise OSError(number, os.strerror(number))

        return flock

    for number in (errno.ENOLCK, errno.ENOTSUP):
        monkeypatch.setattr(fcntl, "flock", fails(number))
        assert enter(files.folder_lock(tmp_path / "run")) and names(tmp_path) == []
    monkeypatch.setattr(fcntl, "flock", fails(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        enter(files.folder_lock(tmp_path / "run"))
    monkeypatch.setattr(fcntl, "flock", fails(errno.ENOSYS))  # filelock falls back to another kind of lock
    with pytest.warns(UserWarning, match="flock not supported"):
        assert enter(files.folder_lock(tmp_path / "run"))
