"""Figures as Markdown tables: times and their floors, memory, errors. Needs no torch."""

from collections.abc import Callable

from .constants import BOTH, COMPILE, EAGER, FORWARD, LEAST, MEASURED, OURS

COMPARED = (EAGER, COMPILE)

Row = dict[str, object]


def times(figures: dict, direction: str) -> str:
    """Return a table with a line for each case: medians and quartiles, ratios, the floor."""
    others = [name for name in figures["candidates"] if name != OURS]
    compared = [name for name in COMPARED if name in others]
    head = [OURS, *others, *(f"× {name}" for name in compared), "floor", f"{OURS} of the floor"]

    def cells(by_name: dict[str, Row]) -> list[str]:
        own = by_name.get(OURS, {})
        return [
            _time(own),
            *(figures["absent"].get(name, _time(by_name.get(name))).partition(":")[0] for name in others),
            *(_ratio(by_name.get(name), own) for name in compared),
            f"{number(own['floor_us'])} ({own['floor_bound']})" if "floor_us" in own else "",
            f"{own['of_floor']:.0%}" if "of_floor" in own else "",
        ]

    return by_case(figures, direction, head, cells)


def errors(figures: dict) -> str:
    """Return a table of the largest error of each candidate's loss."""
    largest: dict[str, float] = {}
    for row in figures["rows"]:
        if row.get("relative_error") is not None:
            largest[row["candidate"]] = max(largest.get(row["candidate"], 0.0), row["relative_error"])
    lines = [[name, f"{error:.0e}"] for name, error in largest.items()]
    return f"Largest relative error of the loss compared with float64.\n\n{table(['candidate', 'error'], lines)}"


def not_measured(figures: dict) -> str:
    """Return a list of what was not measured, and why."""
    reasons: dict[str, list[str]] = {}
    for row in figures["rows"]:
        if row["status"] != MEASURED:
            case = f"{row['candidate']} at {shape_text(row)}, keep {row['keep']}, {row['direction']}"
            reasons.setdefault(row["status"], []).append(case)
    lines = [f"- {name}: {reason}" for name, reason in figures["absent"].items()]
    lines += [f"- {status}: {'; '.join(cases)}" for status, cases in reasons.items()]
    return "\n".join(lines) or "Everything was measured."


def overhead(figures: dict) -> str:
    """Return a table with a line for each candidate at one small shape."""
    rows = {(row["candidate"], row["direction"]): row for row in figures["rows"]}
    least = rows[LEAST, BOTH].get("median_us")

    def line(name: str) -> list[str]:
        own = rows[name, BOTH].get("median_us")
        times_least = f"{own / least:.1f}" if own and least else ""
        return [name, *(_time(rows[name, direction]) for direction in figures["directions"]), times_least]

    head = ["µs", *figures["directions"], f"× {LEAST}.backward()"]
    return table(head, [line(name) for name in figures["candidates"] if (name, BOTH) in rows])


def memory(rows: list[Row]) -> str:
    """Return a table of peak memory with a line for each shape and candidate."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        peak = row.get("peak_bytes")
        text = row["status"] if peak is None else f"{peak / 2**20:.3g} ({peak / row['logits_bytes']:.2f} × the logits)"
        cells.setdefault((row["shape"], row["candidate"]), {})[row["direction"]] = text
    lines = [[*key, *(found.get(direction, "–") for direction in (FORWARD, BOTH))] for key, found in cells.items()]
    return table(["logits", "candidate", "forward without gradient, MiB", "forward + backward, MiB"], lines)


def ratios(figures: dict) -> dict[str, dict[str, float]]:
    """Return shape -> candidate -> how many times longer than kcd_ext it takes, forward and backward."""
    medians: dict[str, dict[str, float]] = {}
    for row in figures["rows"]:
        if row["direction"] == BOTH and row["status"] == MEASURED:
            medians.setdefault(shape_key(row), {})[row["candidate"]] = row["median_us"]
    return {
        shape: {name: round(median / by_name[OURS], 2) for name, median in by_name.items() if name in COMPARED}
        for shape, by_name in medians.items()
        if OURS in by_name
    }


def shape_key(row: Row) -> str:
    """Return the shape of a row as `str(Shape)` writes it."""
    labels = "" if row.get("ignored") is None else f":labels={row['ignored']:g}"
    return f"{row['rows']}x{row['classes']}:{row['dtype']}{labels}"


def shape_text(row: Row) -> str:
    """Return the shape of a row for a reader."""
    labels = "" if row.get("ignored") is None else f", labels, {row['ignored']:.0%} ignored"
    return f"{row['rows']} × {row['classes']} {row['dtype']}{labels}"


def by_case(figures: dict, direction: str, head: list[str], cells: Callable[[dict[str, Row]], list[str]]) -> str:
    """Return a table with a line for each case; `cells` maps candidate -> row to its cells.

    A column shows the number of threads if it differs between rows.
    """
    rows = [row for row in figures["rows"] if row["direction"] == direction]
    threads = ["threads"] if len({row.get("threads") for row in rows}) > 1 else []
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        case = (shape_text(row), *(str(row[name]) for name in ("keep", *threads)))
        cases.setdefault(case, {})[row["candidate"]] = row
    return table(["rows × classes", "keep", *threads, *head], [[*case, *cells(some)] for case, some in cases.items()])


def _time(row: Row | None) -> str:
    if row is None:
        return "–"
    if row.get("status") != MEASURED:
        return row.get("status", "").partition(":")[0]
    return f"{number(row['median_us'])} ({number(row['low_us'])}–{number(row['high_us'])})"


def _ratio(other: Row | None, own: Row) -> str:
    known = other is not None and "median_us" in other and "median_us" in own
    return f"{other['median_us'] / own['median_us']:.1f}" if known else ""


def number(microseconds: float) -> str:
    """Return a time with three digits; a measurement deserves no more."""
    return f"{microseconds:.0f}" if microseconds >= 100 else f"{microseconds:.3g}"


def facts(known: dict[str, object]) -> str:
    """Return a table of facts by name."""
    return table(["", ""], [[name, "unknown" if fact is None else str(fact)] for name, fact in known.items()])


def table(head: list[str], lines: list[list[str]]) -> str:
    """Return a Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
