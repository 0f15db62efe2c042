"""Terminal output of `kcd`. Names may come from untrusted files, so control characters are escaped."""

import re
import sys
from contextlib import suppress

from . import processes

# Control characters (C0, DEL, C1), bidirectional controls, line separators, zero-width characters and surrogates. Joiners (U+200C,
# U+200D) are allowed: emoji and several scripts need them.
UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
MAX_LINE_LENGTH = 4000  # on stderr; enough for a path


def printable(text: str) -> str:
    """Return `text` as one line that is safe to print: `UNPRINTABLE` characters are escaped as in `repr`."""
    return UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


def print_lines(*lines: str) -> None:
    """Print lines on stdout, with `UNPRINTABLE` characters escaped."""
    for line in lines:
        print(printable(line))


def print_error(*parts: str) -> None:
    """Print one line on stderr: `kcd`, with the rank if it is not 0, and the non-empty parts, joined by colons."""
    name = f"kcd: process {processes.rank()}" if processes.rank() else "kcd"
    line = ": ".join([name, *filter(None, parts)])
    with suppress(OSError):  # stderr is full or closed; the exit code still reports the error
        print(printable(line if len(line) <= MAX_LINE_LENGTH else f"{line[:MAX_LINE_LENGTH]}..."), file=sys.stderr)
