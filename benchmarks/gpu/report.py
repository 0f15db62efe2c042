"""The results as Markdown: the machine, how every section went, the times beside their floors, memory and launches."""

import re
from collections.abc import Callable

OWN, COMPARED = "kcd_ext", ("eager", "compile")


def slug(name: str) -> str:
    """A GPU's name as a file's."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def markdown(results: dict) -> str:
    """The whole report."""
    sections = {section["name"]: section for section in results["sections"]}
    parts = [_head(results), _sections(results)]
    figures = sections.get("benchmarks", {}).get("data")
    if figures:
        tables = [
            each(figures, direction) for each in (_times, _memory, _launches) for direction in figures["directions"]
        ]
        parts += [_ceilings(figures), *tables, _errors(figures), _not_measured(figures)]
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


def _ceilings(figures: dict) -> str:
    copied = f"A large copy on the device reads and writes {figures['copy_bytes_per_second'] / 1e12:.2f} TB/s."
    rate = figures["exponentials_per_second"]
    exponentials = (
        "The multiprocessors' clock is not known, so that floors are of bytes alone."
        if rate is None
        else f"Exponentials: {rate / 1e12:.2f} · 10¹² a second, computed, not measured: 16 a clock on every multiprocessor at"
        f" {figures['clock_under_load_hz'] / 1e6:.0f} MHz, the clock under load."
    )
    return f"""## Ceilings

{copied} {exponentials}
With N the bytes of the student's logits and k of B rows selected, the floor is the larger of two times: bytes that must move,
2N forward, (2k/B + 1)N more backward; exponentials, two a pair of logits forward, two a pair of the selected rows backward.
Where the logits fit in L2 a backward pass need not read them from memory, and a time may be below the floor."""


def _times(figures: dict, direction: str) -> str:
    others = [name for name in figures["candidates"] if name != OWN]
    head = [OWN, "middle half", *others, *(f"× {name}" for name in COMPARED), "floor", f"{OWN} of the floor"]

    def cells(by_name: dict[str, dict]) -> list[str]:
        own = by_name.get(OWN, {})
        return [
            _time(own).partition(":")[0],
            f"{_number(own['low_us'])}–{_number(own['high_us'])}" if "low_us" in own else "",
            *(figures["absent"].get(name, _time(by_name.get(name))).partition(":")[0] for name in others),
            *(_ratio(by_name.get(name), own) for name in COMPARED),
            f"{_number(own['floor_us'])} ({own['floor_bound']})" if own else "",
            f"{own['of_floor']:.0%}" if "of_floor" in own else "",
        ]

    return f"""## Time of a call, {direction}

Medians in µs, of rounds in which the candidates take turns; –: not defined there. Liger-Kernel's losses, after two log-softmaxes,
choose no rows and give no entropies.

{_by_place(figures, direction, head, cells)}"""


def _memory(figures: dict, direction: str) -> str:
    def cells(by_name: dict[str, dict]) -> list[str]:
        peaks = [by_name.get(name, {}).get("peak_bytes") for name in figures["candidates"]]
        return ["" if peak is None else f"{peak / 2**20:.2f}" for peak in peaks]

    return f"""## Memory of a call, {direction}

MiB at the peak, beyond what was allocated before the call.

{_by_place(figures, direction, figures["candidates"], cells)}"""


def _launches(figures: dict, direction: str) -> str:
    def cell(row: dict) -> str:
        if "kernels" not in row:
            return ""
        numbers = " + ".join(f"{row[name]:g}" for name in ("kernels", "memsets", "copies"))
        return f"{numbers}: {_number(row['device_us'])}"

    def cells(by_name: dict[str, dict]) -> list[str]:
        return [cell(by_name.get(name, {})) for name in figures["candidates"]]

    note = figures.get("launches", "empty: not counted")
    return f"""## Launches of a call, {direction}

Kernels + memsets + copies: µs in which the device is at them, as torch's profiler sees them; {note}.

{_by_place(figures, direction, figures["candidates"], cells)}"""


def _errors(figures: dict) -> str:
    largest: dict[str, float] = {}
    for row in figures["rows"]:
        if row.get("relative_error") is not None:
            largest[row["candidate"]] = max(largest.get(row["candidate"], 0.0), row["relative_error"])
    lines = [[name, f"{error:.0e}"] for name, error in largest.items()]
    return f"""## Errors

Largest relative error of the loss, against float64.

{table(["candidate", "error"], lines)}"""


def _not_measured(figures: dict) -> str:
    reasons: dict[str, list[str]] = {}
    for row in figures["rows"]:
        if row["status"] != "measured":
            place = f"{row['candidate']} at {row['rows']} × {row['classes']} {row['dtype']}"
            reasons.setdefault(row["status"], []).append(f"{place}, keep {row['keep']}, {row['direction']}")
    lines = [f"- {name}: {reason}" for name, reason in figures["absent"].items()]
    lines += [f"- {status}: {'; '.join(places)}" for status, places in reasons.items()]
    return "## Not measured\n\n" + ("\n".join(lines) or "Nothing: all was reached.")


def _by_place(figures: dict, direction: str, head: list[str], cells: Callable[[dict[str, dict]], list[str]]) -> str:
    """A table with a line for each shape and keep; its cells are a function of candidate -> row."""
    places: dict[tuple[str, str], dict[str, dict]] = {}
    for row in figures["rows"]:
        if row["direction"] == direction:
            place = (f"{row['rows']} × {row['classes']} {row['dtype']}", str(row["keep"]))
            places.setdefault(place, {})[row["candidate"]] = row
    lines = [[*place, *cells(by_name)] for place, by_name in places.items()]
    return table(["rows × classes", "keep", *head], lines)


def _time(row: dict | None) -> str:
    if row is None:
        return "–"
    return _number(row["median_us"]) if row["status"] == "measured" else row["status"]


def _ratio(other: dict | None, own: dict) -> str:
    known = other is not None and "median_us" in other and "median_us" in own
    return f"{other['median_us'] / own['median_us']:.1f}" if known else ""


def _number(microseconds: float) -> str:
    """Three digits are what a measurement of time is worth."""
    return f"{microseconds:.0f}" if microseconds >= 100 else f"{microseconds:.3g}"


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
