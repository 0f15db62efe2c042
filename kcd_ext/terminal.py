"""What `kcd` writes to a terminal. Names come from files of other people: what could steer the terminal is escaped."""

import re
import sys
from contextlib import suppress

from . import processes

# Control characters (C0, DEL, C1), what turns the direction of writing, line separators, characters without width that hide
# in a name, and halves of characters. Joiners (U+200C, U+200D) stay: emoji and several scripts need them.
UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
LONGEST = 4000  # characters of a line on stderr, in which a path has room


def printable(text: str) -> str:
    """Return `text` as one line that is safe to print: `UNPRINTABLE` characters become escapes as in Python's `repr`."""
    return UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


def show(*lines: str) -> None:
    """Print each of `lines`, which are printable but for names in them, as a line on stdout."""
    for line in lines:
        print(printable(line))


def say(*parts: str) -> None:
    """Print one line on stderr: who says it, and the parts that are not empty, with colons between them."""
    name = f"kcd: process {processes.rank()}" if processes.rank() else "kcd"
    line = ": ".join([name, *filter(None, parts)])
    with suppress(OSError):  # of a stderr that is full or has no reader: the exit code still tells
        print(printable(line if len(line) <= LONGEST else f"{line[:LONGEST]}..."), file=sys.stderr)
