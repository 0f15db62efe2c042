"""Forked processes for tests. Everything is imported already, so that a start takes milliseconds."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import closing, suppress


class Crew:
    """Processes that run `job(rank)`. Several of them get the environment variables of torch.distributed."""

    def __init__(self, job: Callable[[int], None], processes: int = 1):
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pids = [self._fork(job, rank, processes, port) for rank in range(processes)]

    @staticmethod
    def _fork(job: Callable[[int], None], rank: int, processes: int, port: int) -> int:
        sys.stdout.flush(), sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(processes)}
            job(rank)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)  # without stopping gloo's threads, which occasionally calls std::terminate

    def kill(self) -> None:
        """Kill all processes."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()

    def wait(self, timeout: float = 120, together: bool = True) -> list[int]:
        """Return the exit codes (negative for signals). Kill all on timeout, and with `together` once one has failed."""
        deadline, codes = time.monotonic() + timeout, {}
        while len(codes) < len(self.pids):
            for pid in set(self.pids) - codes.keys():
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            # The others would wait for a failed one forever.
            if time.monotonic() > deadline or (together and any(codes.values())):
                for pid in set(self.pids) - codes.keys():
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
        return [codes[pid] for pid in self.pids]
