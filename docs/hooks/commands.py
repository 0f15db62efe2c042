"""Fill the page reference/commands.md with the help texts of the installed `kcd`, when the site is built."""

import functools
import os
import re
import subprocess
import sys
import textwrap
from typing import Any

PAGE, MARKER = "reference/commands.md", "<!-- help of all commands -->"
WIDTH = 88  # columns
# One process prints all texts, because importing torch takes seconds.
SCRIPT = """
from kcd_ext.cli import COMMANDS, main
for arguments in ([], *([name] for name in COMMANDS)):
    print(end="\\f" + " ".join(["kcd", *arguments]) + "\\n", flush=True)
    assert main([*arguments, "--help"]) == 0
"""


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Replace the marker of the page by one section for each command."""
    return markdown.replace(MARKER, _sections()) if page.file.src_uri == PAGE else markdown


@functools.cache
def _sections() -> str:
    """Return a heading and a block of text for each command. Raises RuntimeError if a help text cannot be printed."""
    plain = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "RANK", "WORLD_SIZE")}
    plain |= {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=plain, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"kcd --help failed: {done.stderr.strip()}")
    texts = (text.partition("\n") for text in done.stdout.split("\f")[1:])
    return "\n\n".join(f"## {name}\n\n```text\n{_without_boxes(text)}\n```" for name, _, text in texts)


def _without_boxes(text: str) -> str:
    """Return tyro's help without frames around its sections, and with long lines wrapped."""
    lines = []
    for line in text.strip().splitlines():
        if title := re.match(r"╭─ (.*?) ─*╮", line):
            lines.append(f"{title[1]}:")
        elif line.startswith("│"):
            inner = line.strip("│").rstrip()
            lines += [] if set(inner) == {" ", "─"} else [f" {inner}".rstrip()]
        elif not line.startswith("╰"):
            lines += textwrap.wrap(line, WIDTH, break_on_hyphens=False) or [""]
            continue
        else:
            lines.append("")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
