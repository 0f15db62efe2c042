"""Results that are put in place all at once: killed before every rename and removal, and by two at the same time."""

import errno
import fcntl
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kcd_ext import files
from kcd_ext.commands.staging import Staging
from kcd_ext.training.folder import RunFolder

ENTRIES = ("config.json", "report.html", "checkpoint")


def fill(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"command": "kcd demo"}))
    (folder / "report.html").write_text(text)
    (folder / "checkpoint").mkdir(exist_ok=True)
    (folder / "checkpoint" / text).write_text(text)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def staging(output):
    return Staging(output, "kcd demo", ENTRIES)


def elsewhere(work):
    """What `work` returns or raises in a thread of its own."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result()


def entered(context):
    with context:
        return True


def killed_at(number, work):
    """Runs `work` in a process of its own, killed before its rename or removal of this number; whether it was."""
    child = os.fork()
    if child == 0:
        counted = 0

        def deadly(function):
            def call(*arguments, **options):
                nonlocal counted
                counted += 1
                if counted == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return call

        Path.rename, Path.rmdir, Path.unlink = map(deadly, (Path.rename, Path.rmdir, Path.unlink))
        files.remove = deadly(files.remove)
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("with_old", [True, False])
def test_killed_at_any_moment_it_is_put_right_the_next_time(tmp_path, with_old):
    number, results = 0, set()
    while True:
        number += 1
        output = tmp_path / str(number) / "demo"
        if with_old:
            fill(output, "old")
            (output / "notes.txt").write_text("the user's")
            (output / "pictures").mkdir()
            (output / "pictures" / "cat.txt").write_text("a cat")
        users = {"notes.txt": "the user's", "pictures/cat.txt": "a cat"} if with_old else {}
        fill(output.with_name("demo.partial"), "new")
        new = contents(output.with_name("demo.partial")) | users
        old = contents(output) if with_old else {}

        def publish(output=output):
            place = staging(output)
            with place.opened(resume=True):
                place.publish()

        killed = killed_at(number, publish)
        place = staging(output)
        with place.opened(resume=True):
            seen = contents(output) if output.exists() else {}
            assert seen in (old, new)
            results.add(seen == new)
            if seen == old:
                place.publish()
        assert contents(output) == new and [path.name for path in output.parent.iterdir()] == ["demo"]
        if not killed:
            break
    assert number > (3 if with_old else 1) and results == {True, False}


def test_files_of_one_name_on_both_sides_are_both_kept(tmp_path):
    fill(tmp_path / "demo", "old")
    (tmp_path / "demo" / "notes.txt").write_text("one")
    fill(tmp_path / "demo.partial", "new")
    (tmp_path / "demo.partial" / "notes.txt").write_text("two")
    place = staging(tmp_path / "demo")
    with place.opened(resume=True):
        place.publish()
    assert {"one", "two"} < set(contents(tmp_path / "demo").values())


def test_an_interrupted_one_is_not_started_over(tmp_path):
    fill(tmp_path / "demo.partial", "half")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"an interrupted demo is in .*demo.partial: --resume goes on with it"):
        with staging(tmp_path / "demo").opened(resume=False):
            pass
    assert contents(tmp_path) == before


@pytest.mark.parametrize("resume", [True, False])
def test_two_at_a_time_are_refused(tmp_path, resume):
    first, second = staging(tmp_path / "demo"), staging(tmp_path / "demo")
    with first.opened(resume=False):
        fill(first.partial, "first")
        with pytest.raises(FileExistsError, match="another kcd is running in"):
            elsewhere(lambda: entered(second.opened(resume)))
        first.publish()
    assert contents(tmp_path / "demo")["report.html"] == "first"
    with second.opened(resume):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["demo"] and len(contents(tmp_path / "demo")) == 3


def test_links_are_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "demo").symlink_to(tmp_path / "disk" / "results")  # dangling
    place = staging(tmp_path / "demo")
    with place.opened(resume=False):
        fill(place.partial, "new")
        place.publish()
    assert contents(tmp_path / "disk" / "results")["report.html"] == "new" and (tmp_path / "demo").is_symlink()


def test_what_cannot_be_replaced_is_found_out_first(tmp_path, monkeypatch):
    fill(tmp_path / "demo", "old")
    before = contents(tmp_path)

    def busy(self, target):
        raise OSError(16, "Device or resource busy", str(self))

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(OSError, match="resource busy"), staging(tmp_path / "demo").opened(resume=False):
        pytest.fail("work has begun")
    assert contents(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["demo"]
    with pytest.raises(ValueError, match="output must be a folder that can be replaced, got /"):
        staging(Path("/"))


def test_one_at_a_time_is_in_a_folder(tmp_path):
    folder = tmp_path / "new" / "run"
    refused = pytest.raises(
        FileExistsError, match=f"another kcd is running in {folder}: wait for it, or choose another"
    )
    with files.folder_lock(folder):
        assert entered(files.folder_lock(folder)) and list(folder.iterdir()) == []  # a command's own run
        with refused:
            elsewhere(lambda: entered(files.folder_lock(folder)))
        with refused:
            elsewhere(lambda: entered(RunFolder.opened(folder, {}, resume=True, writes=True)))
        assert elsewhere(lambda: entered(RunFolder.opened(folder, {}, resume=True, writes=False)))  # another rank
        assert entered(files.folder_lock(folder / "teacher")) and folder.exists()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), files.folder_lock(folder):
        (folder / "config.json").write_text("{}")
        raise KeyError
    assert elsewhere(lambda: entered(files.folder_lock(folder))) and contents(folder) == {"config.json": "{}"}


def test_who_is_killed_leaves_the_folder_to_others(tmp_path):
    child = os.fork()
    if child == 0:
        with files.folder_lock(tmp_path / "run"):
            (tmp_path / "run" / "begun").write_text("")
            time.sleep(60)
        os._exit(0)
    while not (tmp_path / "run" / "begun").exists():
        time.sleep(0.001)
    with pytest.raises(FileExistsError, match="another kcd is running"):
        entered(files.folder_lock(tmp_path / "run"))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert entered(files.folder_lock(tmp_path / "run"))


def test_what_was_forked_inside_does_not_keep_others_out(tmp_path):
    with files.folder_lock(tmp_path / "run"):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        (tmp_path / "run" / "begun").write_text("")
    try:
        assert elsewhere(lambda: entered(files.folder_lock(tmp_path / "run")))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_where_folders_cannot_be_locked_everybody_enters(tmp_path, monkeypatch):
    def fails(number):
        def flock(descriptor, operation):
            raise OSError(number, os.strerror(number))

        return flock

    monkeypatch.setattr(fcntl, "flock", fails(errno.ENOLCK))
    assert entered(files.folder_lock(tmp_path / "run"))
    monkeypatch.setattr(fcntl, "flock", fails(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        entered(files.folder_lock(tmp_path / "run"))
