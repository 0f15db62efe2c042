"""Section build: cmake and ninja compile kcd_ext's module for this machine's GPU, the package loads it, and one call runs.

Where the variable KCD_LIBRARY names a module nothing is compiled: that one is loaded and called.
"""

import importlib.util
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from harness.machine import CHECKOUT, write_json

from .process import section_options


def configure(build: Path) -> str:
    """Configure the build folder by cmake's own look at the GPU, by torch's if that fails. Return the architecture.

    Raises RuntimeError where both fail, or pybind11 is missing.
    """
    import torch

    major, minor = torch.cuda.get_device_capability()
    candidates = ["native", f"{major}{minor}-real"]
    if importlib.util.find_spec("pybind11") is None:
        raise RuntimeError("pybind11 is not installed: pip install pybind11, or hand its wheel over with --wheels")
    # --fresh: the folder may be configured for another GPU.  -lineinfo costs nothing, and lets the sanitizers name lines.
    command = ["cmake", "--fresh", "-G", "Ninja", "-S", str(CHECKOUT), "-B", str(build)]
    command += [f"-DPython_EXECUTABLE={sys.executable}", "-DKCD_CUDA=ON", "-DCMAKE_CUDA_FLAGS=-lineinfo"]
    for architecture in candidates:
        if subprocess.run([*command, f"-DCMAKE_CUDA_ARCHITECTURES={architecture}"]).returncode == 0:
            return architecture
    raise RuntimeError(f"cmake configured for none of {', '.join(candidates)}: see the log")


def module_in(build: Path) -> Path:
    """Return where the compiled module is in a build folder."""
    return build / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def make(build: Path) -> dict[str, object]:
    """Builds the module, and returns what was asked for and how long it took.

    Raises:
        RuntimeError: cmake or ninja failed.
    """
    start = time.monotonic()
    architecture = configure(build)
    configured = time.monotonic()
    if status := subprocess.run(["ninja", "-C", str(build)]).returncode:
        raise RuntimeError(f"ninja failed with status {status}: see the log")
    return {
        "architecture_asked_for": architecture,
        "configure_seconds": round(configured - start, 1),
        "build_seconds": round(time.monotonic() - configured, 1),
    }


def call_once(library: Path) -> dict[str, object]:
    """Loads a library in this process and returns its facts, once a call on the GPU gave what the reference gives.

    Raises:
        RuntimeError: it has no kernels that run on this GPU, or they compute something else.
    """
    os.environ["KCD_LIBRARY"] = str(library)
    import torch

    import kcd_ext

    facts = kcd_ext.ops.build_info
    if not facts["cuda_architectures"]:
        raise RuntimeError(f"{library} has no CUDA kernels: cmake found no CUDA compiler that works, see the log")
    student, teacher = torch.randn(64, 1000), torch.randn(64, 1000)
    got = kcd_ext.condensed_kd_loss(student.to("cuda"), teacher.to("cuda"), keep=0.5).item()
    want = kcd_ext.reference.condensed_kd_loss(student, teacher, keep=0.5).item()
    if not abs(got - want) <= 1e-4 * abs(want):
        raise RuntimeError(f"the first loss is {got:.6g}, by the reference {want:.6g}")
    return facts


def main() -> int:
    """Prints one line: for which architectures, in which time."""
    options, given = section_options(__doc__), os.environ.get("KCD_LIBRARY")
    start = time.monotonic()
    try:
        figures = {} if given else make(options.build)
        figures["build_info"] = call_once(Path(given or module_in(options.build)))
    except (RuntimeError, ImportError, OSError) as error:
        print(next(iter(str(error).splitlines()), type(error).__name__))
        return 1
    write_json(options.data, figures)
    names = " ".join(figures["build_info"]["cuda_architectures"])
    made = f"not built: KCD_LIBRARY names {given}" if given else f"built in {time.monotonic() - start:.1f} s"
    print(f"kcd_ext for CUDA {names}, {made}; one call gives what the reference gives")
    return 0


if __name__ == "__main__":
    sys.exit(main())
