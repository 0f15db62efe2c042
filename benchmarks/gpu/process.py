"""What a section and the run of all of them agree on: options, time limits, exit statuses."""

import argparse
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

UNAVAILABLE = 77  # the exit status of a section that cannot run on this machine, as automake has it


def section_options(description: str | None) -> argparse.Namespace:
    """Return the options that every section is started with (`sections.Run`)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, required=True, help="for all of it")
    parser.add_argument("--data", type=Path, required=True, help="a JSON file for the figures")
    parser.add_argument("--build", type=Path, required=True, help="the build folder")
    parser.add_argument("--out", type=Path, required=True, help="the folder for results that are files of their own")
    return parser.parse_args()


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
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        return None
    finally:
        # A process that the driver holds on to may outlive even SIGKILL: go on without it.
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(5)


def output_of(
    seconds: float, command: Sequence[str], environment: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """Return the exit status, as `run_within` does, and the output of a command."""
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        status = run_within(seconds, command, file, environment=environment)
        file.seek(0)
        return status, file.read()
