"""Section build: compile kcd_ext's module for this machine's GPU with cmake and ninja, load it, and run one call.

If the environment variable KCD_LIBRARY names a module, that one is loaded and called instead.
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
    """Configure the build folder for the GPU that cmake detects, or else for torch's. Return the architecture.

    Raises:
        RuntimeError: both failed, or pybind11 is missing.
    """
    import torch

    major, minor = torch.cuda.get_device_capability()
    candidates = ["native", f"{major}{minor}-real"]
    if importlib.util.find_spec("pybind11") is None:
        raise RuntimeError("pybind11 is not installed: pip install pybind11, or provide its wheel with --wheels")
    # --fresh: the folder may be configured for another GPU.  -lineinfo costs nothing and gives the sanitizers line numbers.
    command = ["cmake", "--fresh", "-G", "Ninja", "-S", str(CHECKOUT), "-B", str(build)]
    command += [f"-DPython_EXECUTABLE={sys.executable}", "-DKCD_CUDA=ON", "-DCMAKE_CUDA_FLAGS=-lineinfo"]
    for architecture in candidates:
        if subprocess.run([*command, f"-DCMAKE_CUDA_ARCHITECTURES={architecture}"]).returncode == 0:
            return architecture
    raise RuntimeError(f"cmake could not configure for {' or '.join(candidates)}: see the log")


def module_in(build: Path) -> Path:
    """Return the path of the compiled module in a build folder."""
    return build / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def make(build: Path) -> dict[str, object]:
    """Build the module. Return the architecture and the times.

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
    """Load a library, compare a call on the GPU with the reference, and return the library's build info.

    Raises:
        RuntimeError: it has no kernels for this GPU, or they give a wrong result.
    """
    os.environ["KCD_LIBRARY"] = str(library)
    import torch

    import kcd_ext

    facts = kcd_ext.ops.build_info
    if not facts["cuda_architectures"]:
        raise RuntimeError(f"{library} has no CUDA kernels: cmake found no working CUDA compiler, see the log")
    student, teacher = torch.randn(64, 1000), torch.randn(64, 1000)
    got = kcd_ext.condensed_kd_loss(student.to("cuda"), teacher.to("cuda"), keep=0.5).item()
    want = kcd_ext.reference.condensed_kd_loss(student, teacher, keep=0.5).item()
    if not abs(got - want) <= 1e-4 * abs(want):
        raise RuntimeError(f"the first loss is {got:.6g}, the reference gives {want:.6g}")
    return facts


def main() -> int:
    """Print one line: the architectures and the time."""
    options, library = section_options(__doc__), os.environ.get("KCD_LIBRARY")
    start = time.monotonic()
    try:
        figures = {} if library else make(options.build)
        figures["build_info"] = call_once(Path(library or module_in(options.build)))
    except (RuntimeError, ImportError, OSError) as error:
        print(next(iter(str(error).splitlines()), type(error).__name__))
        return 1
    write_json(options.data, figures)
    names = " ".join(figures["build_info"]["cuda_architectures"])
    origin = f"not built: KCD_LIBRARY names {library}" if library else f"built in {time.monotonic() - start:.1f} s"
    print(f"kcd_ext for CUDA {names}, {origin}; one call matches the reference")
    return 0


if __name__ == "__main__":
    sys.exit(main())
