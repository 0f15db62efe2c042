"""Several processes that run one command (torchrun, accelerate launch): the first one speaks for all."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

BAD_INPUT = 2  # the exit code
LOST = re.compile(  # of gloo's, NCCL's and the store's messages
    "connection closed|connection was lost|pair closure|socket closed|reset by peer|broken pipe|remote process exited",
    re.IGNORECASE,
)


def number() -> int:
    """Of this process among those of the command; 0 where it is the only one."""
    rank = os.environ.get("RANK", "0") if count() > 1 else "0"
    return int(rank) if rank.isdecimal() else 0


def count() -> int:
    """Of the processes of the command."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdecimal() else 1


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
