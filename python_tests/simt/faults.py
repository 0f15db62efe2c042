"""Faults planted in copies of the CUDA kernels. One build contains all faults; an environment variable activates one of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import build

VARIABLE = "SIMT_FAULT"  # environment variable: the active fault's number, starting at 1; 0: none
DECLARED_IN = "math/portable.h"  # every kernel includes it
DECLARATION = f"""
#include <cstdlib>
static const int simt_fault = [] {{
  const char* number = std::getenv("{VARIABLE}");
  return number ? std::atoi(number) : 0;
}}();
"""


@dataclass(frozen=True)
class Fault:
    """A mistake in a kernel, and the check that must detect it.

    Attributes:
        name: the test's id.
        file: path below `csrc`.
        original: source text that occurs exactly once in the file.
        faulty: its replacement, in which FAULT is true if this fault is active.
        found_by: the check that detects it.
        case: the name of the case in which the check detects it.
    """

    name: str
    file: str
    original: str
    faulty: str
    found_by: str
    case: str


class KernelChangedError(AssertionError):
    """A kernel's source changed, so the list of faults must change too."""


def plant(kernels: Path, faults: Sequence[Fault]) -> Path:
    """Return the folder of a copy of the C++ sources `kernels` that contains all faults."""
    sources = [
        path for folder in (".", "math", "cuda") for path in sorted((kernels / folder).iterdir()) if path.is_file()
    ]
    texts = {str(path.relative_to(kernels)): path.read_text() for path in sources}
    edits = {name: [] for name in texts}
    for number, fault in enumerate(faults, start=1):
        text = texts[fault.file]
        if text.count(fault.original) != 1:
            raise KernelChangedError(f"{fault.name}: expected exactly once in {fault.file}: {fault.original}")
        begin = text.index(fault.original)
        edits[fault.file].append((begin, fault.original, fault.faulty.replace("FAULT", f"(simt_fault == {number})")))
    for name in texts:
        texts[name] = _edited(texts[name], sorted(edits[name]))
    texts[DECLARED_IN] += DECLARATION
    return build.write_sources(texts)


def _edited(text: str, edits: list[tuple[int, str, str]]) -> str:
    """Apply edits (position, original, replacement), sorted by position."""
    parts, position = [], 0
    for begin, original, replacement in edits:
        assert position <= begin, f"two faults overlap at {original}"
        parts += [text[position:begin], replacement]
        position = begin + len(original)
    return "".join([*parts, text[position:]])
