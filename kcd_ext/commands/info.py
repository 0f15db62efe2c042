"""The `kcd info` command: the facts for a bug report. It works without any extra installed."""

from dataclasses import dataclass

from .. import environment, terminal


@dataclass(frozen=True)
class Info:
    """Print versions, instruction sets and devices, to paste into a bug report."""

    def run(self) -> None:
        """Print one fact per line."""
        facts = environment.facts()
        width = max(map(len, facts))
        terminal.print_lines(*(f"{name.ljust(width)}  {fact}" for name, fact in facts.items()))
