"""What a section and the run of all of them agree on: time limits, exit statuses."""

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

UNAVAILABLE = 77  # the exit status of a section that cannot run on this machine, as automake has it


def tool_of_cuda(name: str) -> str | None:
    """Return the path of one of CUDA's tools: on PATH, in a folder of its own in the toolkit, or in Nsight Compute's."""
    nvcc = shutil.which("nvcc")
    toolkit = Path(os.path.realpath(nvcc)).parents[1] if nvcc else Path("/usr/local/cuda")
    folders = [toolkit / name, toolkit / "bin", *sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders)))


def run_within(
    seconds: float,
    command: Sequence[str],
    output: IO,
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> int | None:
    """Runs a command with its output going to a file; None if it was stopped because the seconds were over.

    It is asked to stop as by Ctrl-C, so that pytest still says how far it came, and killed 10 s later, with everything it
    started in its session.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=folder,
        start_new_session=True,
    )
    patience = 0.0
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        patience = 10.0
        return None
    finally:
        _end_session(process, patience)


def _end_session(process: subprocess.Popen, patience: float) -> None:
    """Interrupts a process that still runs, and after so many seconds kills it and whatever it left behind."""
    if process.poll() is None and patience:
        os.killpg(process.pid, signal.SIGINT)
        _wait(process, patience)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    _wait(process, 5)


def _wait(process: subprocess.Popen, seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass  # a process that the driver holds on to may outlive even SIGKILL: go on without it
