"""The results as Markdown: the machine, how every section went, the times beside their floors, memory and launches."""

from harness.report import by_place, errors, not_measured, number, table, times


def markdown(results: dict) -> str:
    """The whole report."""
    sections = {section["name"]: section for section in results["sections"]}
    parts = [_head(results), _sections(results)]
    figures = sections.get("benchmarks", {}).get("data")
    if figures:
        tables = [
            each(figures, direction) for each in (_times, _memory, _launches) for direction in figures["directions"]
        ]
        parts += [f"## Ceilings\n\n{figures['ceilings']}", *tables]
        parts += [f"## Errors\n\n{errors(figures)}", f"## Not measured\n\n{not_measured(figures)}"]
    return "\n\n".join(parts) + "\n"


def _head(results: dict) -> str:
    machine = results["machine"]
    facts = [
        ("GPU", f"{machine['gpu']}, compute capability {machine['compute_capability']}"),
        ("multiprocessors, memory, L2", _sizes(machine)),
        ("driver", machine["driver"]),
        ("torch", machine["torch"]),
        ("nvcc", machine["nvcc"]),
        ("Triton, Liger-Kernel", f"{machine['triton'] or 'none'}, {machine['liger_kernel'] or 'none'}"),
        ("Python", machine["python"]),
        ("processor", machine["processor"]),
        ("system", machine["platform"]),
        ("commit", machine["commit"]),
        ("begun", results["started"]),
    ]
    return f"# {machine['gpu']}\n\n" + table(["", ""], [[name, fact or "not known"] for name, fact in facts])


def _sizes(machine: dict) -> str:
    memory, l2 = machine["memory_bytes"] / 2**30, machine["l2_bytes"] / 2**20
    return f"{machine['multiprocessors']}, {memory:.0f} GiB, {l2:.0f} MiB"


def _sections(results: dict) -> str:
    lines = [
        [section["name"], section["status"], f"{section['seconds']:.0f}", section["summary"]]
        for section in results["sections"]
    ]
    lines += [[name, "not asked for", "", ""] for name in results["not_asked_for"]]
    text = f"## Sections\n\n{table(['section', 'result', 'seconds', 'what it says'], lines)}"
    refused = results["wheels"]["refused"]
    return text + (f"\n\nWheels that could not be installed: {', '.join(refused)}." if refused else "")


def _times(figures: dict, direction: str) -> str:
    return f"""## Time of a call, {direction}

Medians and middle halves in µs, of rounds in which the candidates take turns; –: not defined there. Liger-Kernel's losses, after
two log-softmaxes, choose no rows and give no entropies.

{times(figures, direction)}"""


def _memory(figures: dict, direction: str) -> str:
    def cells(by_name: dict[str, dict]) -> list[str]:
        peaks = [by_name.get(name, {}).get("peak_bytes") for name in figures["candidates"]]
        return ["" if peak is None else f"{peak / 2**20:.2f}" for peak in peaks]

    return f"""## Memory of a call, {direction}

MiB at the peak, beyond what was allocated before the call.

{by_place(figures, direction, figures["candidates"], cells)}"""


def _launches(figures: dict, direction: str) -> str:
    def cell(row: dict) -> str:
        if "kernels" not in row:
            return ""
        numbers = " + ".join(f"{row[name]:g}" for name in ("kernels", "memsets", "copies"))
        return f"{numbers}: {number(row['device_us'])}"

    def cells(by_name: dict[str, dict]) -> list[str]:
        return [cell(by_name.get(name, {})) for name in figures["candidates"]]

    note = figures.get("launches", "empty: not counted")
    return f"""## Launches of a call, {direction}

Kernels + memsets + copies: µs in which the device is at them, as torch's profiler sees them; {note}.

{by_place(figures, direction, figures["candidates"], cells)}"""
