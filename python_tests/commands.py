"""Helpers for tests of the `kcd` command: run it as a process, read its files and parse its pages."""

import html.parser
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

TIMEOUT = 180  # seconds; only a hang takes that long
MODULE = ("-m", "kcd_ext.cli")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", *MODULE)
# The environment of a process without a launcher.
NO_LAUNCHER_ENV = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
NO_LAUNCHER_ENV["OMP_NUM_THREADS"] = "1"


def run(*arguments, cwd: Path, launcher=MODULE, **options) -> subprocess.CompletedProcess:
    """Run a command and return the completed process."""
    command = [sys.executable, *launcher, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT, **options)


def stop(
    *arguments, cwd: Path, until: str, number: signal.Signals, meanwhile: Callable[[], None] | None = None
) -> tuple[int, str, str]:
    """Start a command and send it a signal once the file `until` exists.

    `meanwhile` is called before the signal, while the command is suspended.
    Returns exit status, stdout and stderr.
    """
    command = [sys.executable, *MODULE, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = subprocess.Popen(command, cwd=cwd, preexec_fn=heed_interrupts, **pipes)
    try:
        deadline = time.monotonic() + TIMEOUT
        while not (cwd / until).exists():
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        if meanwhile:
            started.send_signal(signal.SIGSTOP)
            meanwhile()
            started.send_signal(signal.SIGCONT)
        started.send_signal(number)
        out, error = started.communicate(timeout=TIMEOUT)
    finally:
        started.kill()
    return started.returncode, out, error


def heed_interrupts() -> None:
    """Restore the default handler of SIGINT: a background shell ignores the signal, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def limit_files_to(size: int) -> Callable[[], None]:
    """Return a function that limits the size of the files a process may write, to simulate a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def contents(folder: Path) -> dict[Path, bytes]:
    """Return the contents of every file in a folder."""
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


class Page(html.parser.HTMLParser):
    """A parsed HTML page: tables, headings, text and references. Asserts that tags are closed in order and ids are unique."""

    def __init__(self, source: str):
        super().__init__()
        self.open, self.rows, self.headings, self.text = [], [], [], []
        self.references, self.ids, self.drawings, self.images = [], [], 0, 0
        self.feed(source)
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))

    def handle_startendtag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        self.drawings += tag == "svg"
        self.images += tag == "img"
        if tag == "tr":
            self.rows.append([])
        if tag in ("h1", "h2"):
            self.headings.append("")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        tag = self.open[-1] if self.open else ""
        if tag in ("td", "th"):
            self.rows[-1].append(data)
        if tag in ("h1", "h2"):
            self.headings[-1] += data

    def without_classes(self) -> list[list[list[str]]]:
        """Remove the tables of kept samples per class from `rows` and return them."""
        tables = []
        while ["class"] in (heads := [row[:1] for row in self.rows]):
            start = heads.index(["class"])
            end = heads.index(["all"], start) + 1
            tables.append(self.rows[start:end])
            del self.rows[start:end]
        return tables
