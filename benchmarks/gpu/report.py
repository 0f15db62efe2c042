"""The results as Markdown: how every section went, the machine, the times beside their floors, memory, launches, waits."""

from collections.abc import Callable
from functools import partial

from harness.names import BOTH, FORWARD
from harness.report import by_place, errors, facts, not_measured, number, table, times

from .ncu import dominant
from .sections import FAILED, NOT_AVAILABLE, NOT_REACHED, PASSED, TIMED_OUT


def verdict(sections: list[dict]) -> str:
    """One line: which sections failed and why, which could not run here, else that all passed."""

    def named(statuses: tuple[str, ...]) -> list[str]:
        return [f"{each['name']}: {each['summary']}" for each in sections if each["status"] in statuses]

    failed, absent = named((FAILED, TIMED_OUT, NOT_REACHED)), named((NOT_AVAILABLE,))
    said = [f"FAILED: {'; '.join(failed)}"] if failed else [f"passed: {sum(x['status'] == PASSED for x in sections)}"]
    return ". ".join([*said, *([f"Cannot run here: {'; '.join(absent)}"] if absent else [])])


def markdown(results: dict) -> tuple[str, list[str]]:
    """Return the whole report, and what of it could not be written, which does not hide the rest."""
    data = {section["name"]: section["data"] for section in results["sections"]}
    figures, kernels = data.get("benchmarks"), data.get("ncu")
    parts: list[Callable[[], str]] = [partial(each, results) for each in (_verdict, _sections, _machine)]
    if figures:
        parts.append(lambda: f"## Ceilings\n\n{figures['ceilings']}")
        for each in (_times, _replays, _memory, _launches):
            parts += [partial(each, figures, direction) for direction in (FORWARD, BOTH)]
        parts += [lambda: f"## Errors\n\n{errors(figures)}", lambda: f"## Not measured\n\n{not_measured(figures)}"]
    if kernels:
        parts.append(partial(_waits, kernels))
    written, faults = [], []
    for part in parts:
        try:
            written.append(part())
        except Exception as error:  # a fault of this kit's in one table must not hide the others
            faults.append(f"a part of the report could not be written: {type(error).__name__}: {error}")
            written.append(f"**{faults[-1]}**")
    return "\n\n".join(written) + "\n", faults


def _verdict(results: dict) -> str:
    return f"# {results['machine']['GPU']}\n\n**{results['verdict']}**"


def _machine(results: dict) -> str:
    return "## Machine\n\n" + facts({**results["machine"], "begun": results["started"]})


def _sections(results: dict) -> str:
    lines = [
        [section["name"], section["status"], _tests(section), f"{section['seconds']:.0f}", section["summary"]]
        for section in results["sections"]
    ]
    lines += [[name, "not asked for", "", "", ""] for name in results["not_asked_for"]]
    text = f"## Sections\n\n{table(['section', 'result', 'tests', 'seconds', 'what it says'], lines)}"
    refused = results["wheels"]["refused"]
    return text + (f"\n\nWheels that could not be installed: {', '.join(refused)}." if refused else "")


def _tests(section: dict) -> str:
    """How many tests of the GPU passed, of how many."""
    data = section["data"]
    return f"{data['passed']} of {data['tests']}" if isinstance(data, dict) and "tests" in data else ""


def _times(figures: dict, direction: str) -> str:
    return f"""## Time of a call, {direction}

Medians and middle halves in µs, of rounds in which the candidates take turns; –: not defined there. Liger-Kernel's losses, after
two log-softmaxes, choose no rows and give no entropies.

{times(figures, direction)}"""


def _by_candidate(figures: dict, direction: str, name: str, cell: Callable[[dict], str]) -> str:
    """Return a table with a column for each candidate that has a figure of this name, made into a cell of it."""
    having = {row["candidate"] for row in figures["rows"] if name in row}
    columns = [candidate for candidate in figures["candidates"] if candidate in having]

    def cells(by_name: dict[str, dict]) -> list[str]:
        return [cell(by_name[column]) if name in by_name.get(column, {}) else "" for column in columns]

    return by_place(figures, direction, columns, cells)


def _replays(figures: dict, direction: str) -> str:
    def cell(row: dict) -> str:
        return row["replay_us"] if isinstance(row["replay_us"], str) else number(row["replay_us"])

    return f"""## Time of a call replayed, {direction}

Medians in µs of calls that a CUDA graph holds, so that the host has no part in them; only where logits are few.

{_by_candidate(figures, direction, "replay_us", cell)}"""


def _memory(figures: dict, direction: str) -> str:
    return f"""## Memory of a call, {direction}

MiB at the peak, beyond what was allocated before the call.

{_by_candidate(figures, direction, "peak_bytes", lambda row: f"{row['peak_bytes'] / 2**20:.2f}")}"""


def _launches(figures: dict, direction: str) -> str:
    def cell(row: dict) -> str:
        numbers = " + ".join(f"{row[name]:g}" for name in ("kernels", "memsets", "copies"))
        return f"{numbers}: {number(row['device_us'])}"

    note = figures.get("launches", "empty: not counted")
    return f"""## Launches of a call, {direction}

Kernels + memsets + copies: µs in which the device is at them, as torch's profiler sees them; {note}.

{_by_candidate(figures, direction, "kernels", cell)}"""


def _waits(kernels: list[dict]) -> str:
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
    head = ["rows × classes", "kernel", "µs", "DRAM", "memory", "multiprocessors", "occupancy", "warps wait for"]
    return f"""## What warps wait for

By Nsight Compute, which flushes the caches before a kernel: throughput in percent of the peak, warps resident in percent of the
most, and of the cycles between two instructions of a warp the longest waits; "selected" is the instruction itself.

{table(head, lines)}"""
