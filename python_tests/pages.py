"""Code blocks of the README and the documentation."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))

FENCE = re.compile(
    r"^<!-- test setup\n(?P<setup>.*?)^-->$"
    r'|^(?P<indent> *)(?P<fence>```+|~~~+)(?P<language>\w*)(?: title="(?P<title>[^"]*)")?[^\n]*\n'
    r"(?P<code>.*?)^(?P=indent)(?P=fence)$",
    re.S | re.M,
)


class Block(NamedTuple):
    """A fenced block, or a comment with setup code for the test (language "setup")."""

    language: str
    title: str | None
    code: str


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page, in order."""
    found = []
    for match in FENCE.finditer(page.read_text()):
        if match["setup"] is not None:
            found.append(Block("setup", None, match["setup"]))
        else:
            lines = match["code"].splitlines()
            code = "\n".join(line.removeprefix(match["indent"]) for line in lines)
            found.append(Block(match["language"], match["title"], code + "\n"))
    return found


def commands(block: Block) -> list[str]:
    """Return the `kcd` commands of a bash block, without comments and continuation lines."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [
        line.partition(" #")[0].strip() for line in lines if re.match(r" *(kcd|torchrun .* -m kcd_ext\.cli) ", line)
    ]
