"""Several processes that run one command (torchrun, accelerate launch, mpirun): the first one speaks for all."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

BAD_INPUT = 2  # the exit code
# What torch's launchers and MPI's say, in the order in which Accelerate looks for it. MPI's counts where MASTER_ADDR says that
# processes are to meet: others start runs that have nothing to do with each other by it.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
HERE = (  # processes of this machine
    "LOCAL_WORLD_SIZE",
    "MPI_LOCALNRANKS",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_SIZE",
)
LOST = re.compile(  # of gloo's, NCCL's and the store's messages
    "connection closed|connection was lost|pair closure|socket closed|reset by peer|broken pipe|remote process exited",
    re.IGNORECASE,
)


def number() -> int:
    """Of this process among those of the command; 0 where it is the only one."""
    return _said_by(RANKS, 0) if count() > 1 else 0


def count() -> int:
    """Of the processes of the command."""
    return _said_by(SIZES, 1)


def count_here() -> int:
    """Of the processes of the command on this machine; all of them where the launcher does not say it."""
    return max(1, _said_by(HERE, count())) if count() > 1 else 1


def _said_by(names: tuple[str, ...], otherwise: int) -> int:
    of_torch, *of_mpi = names
    names = (of_torch, *(of_mpi if "MASTER_ADDR" in os.environ else ()))
    said = next((os.environ[name] for name in names if name in os.environ), "")
    return int(said) if said.isdecimal() else otherwise


def is_left_alone(error: RuntimeError) -> bool:
    """Whether this process fails because another one has ended, which has said why."""
    distributed = sys.modules.get("torch.distributed")
    if count() == 1 or distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return False
    return isinstance(error, distributed.DistError) or LOST.search(str(error)) is not None


@contextmanager
def first_one_says() -> Iterator[None]:
    """For what goes wrong in every process alike, as a wrong option does: all but the first end without a word."""
    try:
        yield
    except Exception as error:
        if number() == 0:
            raise
        raise SystemExit(BAD_INPUT) from error


def part() -> None:
    """They end together. What they share is taken down here: left to the interpreter's end, that now and then aborts."""
    distributed = sys.modules.get("torch.distributed")
    if count() > 1 and distributed is not None and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
