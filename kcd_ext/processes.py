"""The ranks of a command that a launcher has started (torchrun, accelerate launch). Rank 0 reports for all."""

import atexit
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

BAD_INPUT = 2  # the exit code
SECONDS_TO_REPORT = 20  # that the others leave rank 0, on a busy machine too


def rank() -> int:
    """Return the rank of this process; 0 without a launcher."""
    return _int_from_environment("RANK", 0) if world_size() > 1 else 0


def world_size() -> int:
    """Return the number of processes; 1 without a launcher."""
    return _int_from_environment("WORLD_SIZE", 1)


def local_world_size() -> int:
    """Return the number of processes on this machine; the world size if the launcher does not set it."""
    return max(1, _int_from_environment("LOCAL_WORLD_SIZE", world_size())) if world_size() > 1 else 1


def _int_from_environment(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def in_process_group() -> bool:
    """Return whether the process group is initialised. Errors may then be caused by another rank that failed."""
    distributed = sys.modules.get("torch.distributed")
    return world_size() > 1 and distributed is not None and distributed.is_available() and distributed.is_initialized()


@contextmanager
def report_on_rank_zero() -> Iterator[None]:
    """Report errors that occur on every rank, such as a wrong option, on rank 0 only. The others exit silently.

    They first give rank 0 the time to report: torchrun terminates all ranks as soon as one has failed.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if rank() == 0 or (isinstance(error, SystemExit) and not error.code):
            raise
        time.sleep(SECONDS_TO_REPORT)
        raise SystemExit(BAD_INPUT) from error


def shutdown() -> None:
    """Wait for all ranks, then destroy the process group."""
    if in_process_group():
        distributed = sys.modules["torch.distributed"]
        distributed.barrier()
        distributed.destroy_process_group()


def exit_process(code: int) -> NoReturn:
    """Exit with this code. A rank skips the interpreter's finalization, which would occasionally abort it.

    DistributedDataParallel keeps the process group and thus gloo's threads alive (torch 2.13). Such a thread is terminated
    if it takes the interpreter's lock during finalization, and ends the process with SIGABRT.
    """
    if world_size() > 1:
        atexit._run_exitfuncs()  # temporary files, for example
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
