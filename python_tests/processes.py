"""Real processes for tests, forked from one that has imported everything already: a start costs milliseconds."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import closing, suppress


class Crew:
    """`processes` processes that run `job(rank)`, together by torch.distributed's environment if there are several."""

    def __init__(self, job: Callable[[int], None], processes: int = 1):
        with closing(socket.socket()) as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
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
            os._exit(code)  # without taking gloo's threads down, which now and then ends in std::terminate

    def kill(self) -> None:
        """All of them, at once."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()

    def wait(self, timeout: float = 120, together: bool = True) -> list[int]:
        """Their exit codes, or minus the signal; kills what has not ended by then, and where one has failed the others."""
        give_up, codes = time.monotonic() + timeout, {}
        while len(codes) < len(self.pids):
            for pid in set(self.pids) - codes.keys():
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            # One that failed leaves the others waiting for it.
            if time.monotonic() > give_up or (together and any(codes.values())):
                for pid in set(self.pids) - codes.keys():
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
        return [codes[pid] for pid in self.pids]
