"""Faults planted in copies of the CUDA kernels, all in one build: which of them is in force is chosen when the program is run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import build

VARIABLE = "SIMT_FAULT"  # of the environment: the fault's place in the list, from 1 on; 0: none
DECLARED_IN = "math/portable.h"  # which every kernel includes
DECLARATION = f"""
#include <cstdlib>
static const int simt_fault = [] {{
  const char* number = std::getenv("{VARIABLE}");
  return number ? std::atoi(number) : 0;
}}();
"""


@dataclass(frozen=True)
class Fault:
    """A mistake in a kernel, and what must find it.

    file: under the folder of the kernels. original: what is there, once. faulty: what takes its place, where FAULT stands for
    whether this fault is in force. found_by, case: which check, in which case, for the tests.
    """

    name: str
    file: str
    original: str
    faulty: str
    found_by: str
    case: str


class KernelChangedError(AssertionError):
    """The list of faults must follow the kernels."""


def plant(kernels: Path, faults: Sequence[Fault]) -> Path:
    """A copy of the folder `kernels`, C++ sources, with all faults in it."""
    sources = [
        path for folder in (".", "math", "cuda") for path in sorted((kernels / folder).iterdir()) if path.is_file()
    ]
    texts = {str(path.relative_to(kernels)): path.read_text() for path in sources}
    edits = {name: [] for name in texts}
    for number, fault in enumerate(faults, start=1):
        text = texts[fault.file]
        if text.count(fault.original) != 1:
            raise KernelChangedError(f"{fault.name}: not there, or not once, in {fault.file}: {fault.original}")
        begin = text.index(fault.original)
        edits[fault.file].append((begin, fault.original, fault.faulty.replace("FAULT", f"(simt_fault == {number})")))
    for name in texts:
        texts[name] = _edited(texts[name], sorted(edits[name]))
    texts[DECLARED_IN] += DECLARATION
    return build.write_sources(texts)


def _edited(text: str, edits: list[tuple[int, str, str]]) -> str:
    """edits: (where, what is there, what takes its place), ascending."""
    parts, at = [], 0
    for begin, original, replacement in edits:
        assert at <= begin, f"two faults overlap at {original}"
        parts += [text[at:begin], replacement]
        at = begin + len(original)
    return "".join([*parts, text[at:]])
