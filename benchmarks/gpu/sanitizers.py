"""Section sanitizers: the four tools of compute-sanitizer, each over the program of `sanitized`."""

import os
import re
import sys
import time
from dataclasses import asdict, dataclass

from harness.machine import write_json
from harness.timing import Deadline

from .process import UNAVAILABLE, output_of, section_options, tool_of_cuda
from .sanitized import READY
from .sections import FAILED, NOT_AVAILABLE, PASSED, TIMED_OUT

# API errors: torch itself probes for optional features. Padding: an overrun must not reach the next allocation.
TOOLS = {
    "memcheck": ("--report-api-errors", "no", "--padding", "512"),
    "racecheck": (),
    "initcheck": (),
    "synccheck": (),
}
ERRORS = 86  # the exit status that compute-sanitizer gives if it finds errors
MARGIN_SECONDS = 8  # for the tool's summary after the last case
REFUSES = "not supported|unsupported|unable to"  # a tool's message on an unsupported machine or driver


@dataclass
class Verdict:
    """The result of one tool."""

    tool: str
    status: str
    summary: str


def judge(tool: str, status: int | None, output: str) -> Verdict:
    """Interpret a tool's exit status (None: timed out) and output."""
    messages = [line.removeprefix("=========").strip() for line in output.splitlines() if line.startswith("=========")]
    messages = [line for line in messages if line not in ("", "COMPUTE-SANITIZER")]
    if READY not in output:  # not even torch's own first kernel ran
        others = [line for line in output.splitlines() if re.search("device not supported", line, re.IGNORECASE)]
        refusals = [line for line in messages if re.search(REFUSES, line, re.IGNORECASE)] + others
        if refusals:
            return Verdict(tool, NOT_AVAILABLE, refusals[0])
        if status is None:
            return Verdict(tool, TIMED_OUT, "the device did not respond in time")
        last = next((line for line in reversed(output.splitlines()) if line.strip()), "printed nothing")
        return Verdict(tool, FAILED, f"exit status {status}: {last.removeprefix('=========').strip()}")
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
    counted = re.findall(r"^(\d+ of \d+ cases, \d+ wrong)$", output, re.MULTILINE)
    found, cases = (summaries or ["no summary"])[-1], (counted or ["no case finished"])[-1]
    if status is None:
        return Verdict(tool, TIMED_OUT, f"stopped, {cases}")
    clean = status == 0 and bool(summaries) and bool(counted) and found.startswith("0 ")
    return Verdict(tool, PASSED if clean else FAILED, f"{found}, {cases}")


def check(sanitizer: str, tool: str, seconds: float) -> Verdict:
    """Run one tool with a time limit, and print its output."""
    until = time.time() + seconds - MARGIN_SECONDS
    command = [sanitizer, "--tool", tool, *TOOLS[tool], "--error-exitcode", str(ERRORS), "--print-limit", "20"]
    # Importing torch takes longer than the tool's default limit of 10 s until the first CUDA call.
    command += ["--target-processes", "application-only", "--launch-timeout", "120"]
    command += [sys.executable, "-m", "gpu.sanitized", "--until", str(until)]
    # torch's caching allocator puts many tensors in one allocation, which would hide overruns.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status, output = output_of(seconds, command, environment)
    print(f"---- {tool}\n{output}", flush=True)
    return judge(tool, status, output)


def main() -> int:
    """Print one line with the verdict of every tool."""
    options = section_options(__doc__)
    sanitizer = tool_of_cuda("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not installed: it comes with the CUDA toolkit")
        return 1
    deadline, verdicts = Deadline(options.seconds), []
    for i, tool in enumerate(TOOLS):
        verdicts.append(check(sanitizer, tool, deadline.left() / (len(TOOLS) - i)))
        write_json(options.data, [asdict(verdict) for verdict in verdicts])
    statuses = {verdict.status for verdict in verdicts}
    if statuses == {NOT_AVAILABLE}:  # one unsupported tool must not hide the others
        print(verdicts[0].summary)
        return UNAVAILABLE
    print("; ".join(f"{verdict.tool} {verdict.status}: {verdict.summary}" for verdict in verdicts))
    return 1 if statuses & {FAILED, TIMED_OUT} else 0


if __name__ == "__main__":
    sys.exit(main())
