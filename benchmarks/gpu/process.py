"""The interface between a section and the kit: options, time limits and exit statuses."""

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

UNAVAILABLE = 77  # exit status of a section that cannot run on this machine, as in automake


def section_options(description: str | None) -> argparse.Namespace:
    """Parse the options of a section (`sections.Run`)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, required=True, help="time limit")
    parser.add_argument("--data", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--build", type=Path, required=True, help="build folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for further result files")
    return parser.parse_args()


def tool_of_cuda(name: str) -> str | None:
    """Return the path of a CUDA tool: on PATH, in the toolkit, or in Nsight Compute's folder."""
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
    """Run a command with a time limit and its output redirected to a file. Return the exit status, or None if it timed out.

    On timeout the command gets SIGINT, so that pytest still prints its summary. After 10 s its whole session is killed.
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
        # A process stuck in the driver may survive even SIGKILL: continue without it.
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(5)


def output_of(
    seconds: float, command: Sequence[str], environment: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """Run a command. Return its exit status as `run_within` does, and its output."""
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        status = run_within(seconds, command, file, environment=environment)
        file.seek(0)
        return status, file.read()
