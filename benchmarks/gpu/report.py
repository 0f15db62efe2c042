"""The Markdown report: sections, machine, times and floors, memory, launches, stalls."""

from collections.abc import Callable
from functools import partial

from harness.constants import BOTH, FORWARD
from harness.report import by_case, errors, facts, not_measured, number, table, times

from .ncu import dominant
from .sections import FAILED, NOT_AVAILABLE, NOT_REACHED, PASSED, TIMED_OUT


def verdict(sections: list[dict]) -> str:
    """Return one line: the failed sections with reasons, or how many passed; then those that cannot run here."""

    def named(statuses: tuple[str, ...]) -> list[str]:
        return [f"{each['name']}: {each['summary']}" for each in sections if each["status"] in statuses]

    failed, absent = named((FAILED, TIMED_OUT, NOT_REACHED)), named((NOT_AVAILABLE,))
    parts = [f"FAILED: {'; '.join(failed)}"] if failed else [f"passed: {sum(x['status'] == PASSED for x in sections)}"]
    return ". ".join([*parts, *([f"Cannot run here: {'; '.join(absent)}"] if absent else [])])


def markdown(results: dict) -> tuple[str, list[str]]:
    """Return the report, and the parts that could not be written; those do not hide the others."""
    data = {section["name"]: section["data"] for section in results["sections"]}
    figures, kernels = data.get("benchmarks"), data.get("ncu")
    parts: list[Callable[[], str]] = [partial(each, results) for each in (_verdict, _sections, _machine)]
    if figures:
        parts.append(lambda: f"## Ceilings\n\n{figures['ceilings']}")
        for each in (_times, _replays, _memory, _launches):
            parts += [partial(each, figures, direction) for direction in (FORWARD, BOTH)]
        parts += [lambda: f"## Errors\n\n{errors(figures)}", lambda: f"## Not measured\n\n{not_measured(figures)}"]
    if kernels:
        parts.append(partial(_stalls, kernels))
    written, faults = [], []
    for part in parts:
        try:
            written.append(part())
        except Exception as error:  # an error in one table must not hide the others
            faults.append(f"a part of the report could not be written: {type(error).__name__}: {error}")
            written.append(f"**{faults[-1]}**")
    return "\n\n".join(written) + "\n", faults


def _verdict(results: dict) -> str:
    return f"# {results['machine']['GPU']}\n\n**{results['verdict']}**"


def _machine(results: dict) -> str:
    return "## Machine\n\n" + facts({**results["machine"], "started": results["started"]})


def _sections(results: dict) -> str:
    lines = [
        [section["name"], section["status"], _tests(section), f"{section['seconds']:.0f}", section["summary"]]
        for section in results["sections"]
    ]
    lines += [[name, "not requested", "", "", ""] for name in results["not_requested"]]
    text = f"## Sections\n\n{table(['section', 'result', 'tests', 'seconds', 'summary'], lines)}"
    refused = results["wheels"]["refused"]
    return text + (f"\n\nWheels that could not be installed: {', '.join(refused)}." if refused else "")


def _tests(section: dict) -> str:
    """Return how many GPU tests passed, of how many."""
    data = section["data"]
    return f"{data['passed']} of {data['tests']}" if isinstance(data, dict) and "tests" in data else ""


def _times(figures: dict, direction: str) -> str:
    return f"""## Time of a call, {direction}

Medians and interquartile ranges in µs; the candidates take turns in each round; –: not defined. Liger-Kernel's losses follow two
log-softmaxes, select no rows and give no entropies.

{times(figures, direction)}"""


def _by_candidate(figures: dict, direction: str, name: str, cell: Callable[[dict], str]) -> str:
    """Return a table with a column per candidate that has a figure of this name; `cell` formats a row."""
    having = {row["candidate"] for row in figures["rows"] if name in row}
    columns = [candidate for candidate in figures["candidates"] if candidate in having]

    def cells(by_name: dict[str, dict]) -> list[str]:
        return [cell(by_name[column]) if name in by_name.get(column, {}) else "" for column in columns]

    return by_case(figures, direction, columns, cells)


def _replays(figures: dict, direction: str) -> str:
    def cell(row: dict) -> str:
        return row["replay_us"] if isinstance(row["replay_us"], str) else number(row["replay_us"])

    return f"""## Time of a call replayed, {direction}

Medians in µs of calls replayed from a CUDA graph, that is, without the host's part; only for few logits.

{_by_candidate(figures, direction, "replay_us", cell)}"""


def _memory(figures: dict, direction: str) -> str:
    return f"""## Memory of a call, {direction}

Peak in MiB, beyond what was allocated before the call.

{_by_candidate(figures, direction, "peak_bytes", lambda row: f"{row['peak_bytes'] / 2**20:.2f}")}"""


def _launches(figures: dict, direction: str) -> str:
    def cell(row: dict) -> str:
        numbers = " + ".join(f"{row[name]:g}" for name in ("kernels", "memsets", "copies"))
        return f"{numbers}: {number(row['device_us'])}"

    note = figures.get("launches", "empty: not counted")
    return f"""## Launches of a call, {direction}

Kernels + memsets + copies: device time in µs, from torch's profiler; {note}.

{_by_candidate(figures, direction, "kernels", cell)}"""


def _stalls(kernels: list[dict]) -> str:
    def percent(x: float) -> str:
        return f"{x:.0f} %"

    lines = [
        [
            kernel["shape"],
            kernel["kernel"].partition("(")[0].removeprefix("void "),
            number(kernel["microseconds"]),
            *(percent(kernel[f"{name}_percent"]) for name in ("dram", "memory", "sm", "occupancy")),
            dominant(kernel),
        ]
        for kernel in kernels
    ]
    head = ["rows × classes", "kernel", "µs", "DRAM", "memory", "multiprocessors", "occupancy", "stalls"]
    return f"""## Warp stalls

From Nsight Compute, which flushes the caches before each kernel: throughput in percent of the peak, resident warps in percent
of the maximum, and the longest stalls as shares of the cycles between two instructions of a warp. "selected" is the instruction.

{table(head, lines)}"""
