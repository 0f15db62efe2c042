"""Code blocks of the README and the documentation."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))

FENCE = re.compile(
    r"^<!-- test setup\n(?P<setup>.*?)^-->$"
    r'|^(?P<indent> *)(?P<fence>```+|~~~+)(?P<language>\w*)(?: title="(?P<title>[^"]*)")?[^\n]*\n'
    r"(?P<code>.*?)^(?P=indent)(?P=fence)$",
    re.S | re.M,
)

# The variables that a reader of the README has already: networks, logits, labels, a data set and an optimizer.
READER = """
import torch
from torch import nn
torch.manual_seed(0)
student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(12, 10)) for _ in range(2))
x, labels = torch.randn(32, 3, 4), torch.arange(32) % 10
student_logits, teacher_logits = student(x), teacher(x).detach()
dataset = [(torch.full((3, 4), i % 10, dtype=torch.uint8), i % 10) for i in range(40)]
transform, optimizer = lambda image: image.float() / 10, torch.optim.SGD(student.parameters(), lr=0.1)
"""


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
    """Return the `kcd` commands of a bash or text block, without comments and continuation lines."""
    if block.language not in ("bash", "text"):
        return []
    lines = block.code.replace("\\\n", " ").splitlines()
    return [
        line.partition(" #")[0].strip() for line in lines if re.match(r" *(kcd|torchrun .* -m kcd_ext\.cli) ", line)
    ]


def snippets(page: Path) -> list[str]:
    """Return the Python blocks of a page that are not files."""
    return [block.code for block in blocks(page) if block.language == "python" and not block.title]
