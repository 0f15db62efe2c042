"""Compile `ceilings.cpp` with the kernels' flags for the instruction set in use, and call it."""

import ctypes
import os
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

from torch import Tensor

from .machine import CHECKOUT

REPETITIONS = 3


class NoCompilerError(Exception):
    """The error if ceilings.cpp cannot be compiled on this machine."""


def compiler_flags(instruction_set: str, cmake: str) -> list[str]:
    """Return the compiler flags of a kernel, parsed from the text of csrc/CMakeLists.txt."""
    common = re.search(r"target_compile_options\(kernels_\$\{name\} PRIVATE ([^)]*)\)", cmake)
    specific = re.search(rf"^ *kcd_add_instruction_set\({instruction_set}\b([^)]*)\)", cmake, re.M)
    return [flag for match in (common, specific) for flag in match[1].split() if flag.startswith("-")]


class Compiled:
    """The functions of ceilings.cpp, compiled and loaded.

    Raises:
        NoCompilerError: the compiler ($CXX, else c++) is missing or fails.
    """

    def __init__(self, instruction_set: str) -> None:
        source = Path(__file__).with_suffix(".cpp")
        with tempfile.TemporaryDirectory() as folder:
            library = f"{folder}/ceilings.so"
            command = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++17", "-shared", "-fPIC", "-pthread"]
            command += [*compiler_flags(instruction_set, (CHECKOUT / "csrc" / "CMakeLists.txt").read_text())]
            command += [f"-I{CHECKOUT / 'csrc'}", str(source), "-o", library]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
            except FileNotFoundError as error:
                raise NoCompilerError(f"no compiler {command[0]}") from error
            except subprocess.CalledProcessError as error:
                raise NoCompilerError(next(iter(error.stderr.splitlines()), f"{command[0]} failed")) from error
            loaded = ctypes.CDLL(library)
        self._triad, self._exponentials = loaded.triad_seconds, loaded.exponentials_per_second
        self._triad.restype = self._exponentials.restype = ctypes.c_double
        self._triad.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64, ctypes.c_int, ctypes.c_int]
        self._exponentials.argtypes = [ctypes.c_bool, ctypes.c_int, ctypes.c_double]

    def triad_seconds(self, a: Tensor, b: Tensor, c: Tensor, threads: int) -> float:
        """Return the seconds of c = a + b for contiguous float32 tensors of one size."""
        return self._triad(a.data_ptr(), b.data_ptr(), c.data_ptr(), a.numel(), threads, REPETITIONS)

    def exponentials_per_second(self, *, in_double: bool, threads: int) -> float:
        """Return the rate of the kernels' own exponential in float32 or float64, on arrays in the first-level cache."""
        return max(self._exponentials(in_double, threads, 0.02) for _ in range(5))
