"""Section build: cmake and ninja make libkcd_ext.so for this machine's GPU, and the package loads it."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from harness.machine import CHECKOUT, write_json

_LOAD = "import json; from kcd_ext.ops import build_info; print(json.dumps(build_info))"


def architectures() -> list[str]:
    """CMAKE_CUDA_ARCHITECTURES to try in turn: cmake's own look at the GPU, and torch's if that fails."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return ["native", f"{major}{minor}-real"]


def configure(build: Path, candidates: list[str]) -> str:
    """Configures the build folder for the first of the candidates that works, which it returns.

    Raises:
        RuntimeError: none did.
    """
    # --fresh: the folder may be configured for another GPU.  -lineinfo costs nothing, and lets the sanitizers name lines.
    command = ["cmake", "--fresh", "-G", "Ninja", "-S", str(CHECKOUT), "-B", str(build)]
    command += ["-DKCD_CUDA=ON", "-DCMAKE_CUDA_FLAGS=-lineinfo"]
    for architecture in candidates:
        if subprocess.run([*command, f"-DCMAKE_CUDA_ARCHITECTURES={architecture}"]).returncode == 0:
            return architecture
    raise RuntimeError(f"cmake configured for none of {', '.join(candidates)}: see the log")


def main() -> int:
    """Prints one line: for which architectures, in which time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, required=True, help="the build folder")
    parser.add_argument("--data", type=Path, required=True, help="a JSON file for the figures")
    options = parser.parse_args()
    start = time.monotonic()
    try:
        architecture = configure(options.build, architectures())
    except RuntimeError as error:
        print(error)
        return 1
    configured = time.monotonic()
    if status := subprocess.run(["ninja", "-C", str(options.build)]).returncode:
        print(f"ninja failed with status {status}: see the log")
        return 1
    built = time.monotonic()
    environment = {**os.environ, "KCD_LIBRARY": str(options.build / "libkcd_ext.so")}
    loaded = subprocess.run([sys.executable, "-c", _LOAD], env=environment, stdout=subprocess.PIPE, text=True)
    if loaded.returncode:
        print("libkcd_ext.so was built but does not load: see the log")
        return 1
    facts = json.loads(loaded.stdout.splitlines()[-1])
    write_json(
        options.data,
        {
            "architecture_asked_for": architecture,
            "configure_seconds": round(configured - start, 1),
            "build_seconds": round(built - configured, 1),
            "build_info": facts,
        },
    )
    found = facts["cuda_architectures"]
    if not found:
        print("built without CUDA kernels: cmake found no CUDA compiler that works, see the log")
        return 1
    print(f"libkcd_ext.so for CUDA {' '.join(map(str, found))} ({architecture}) in {built - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
