"""The command `kcd`: a thin shell that turns options into calls, and errors into one line and an exit code."""

import io
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Annotated

from . import __version__, environment

DESCRIPTION = "Knowledge Condensation Distillation: distil only what the student has still to learn."
BAD_INPUT, INTERRUPTED = 2, 130


@dataclass(frozen=True)
class Info:
    """Prints versions, instruction sets and devices, to paste into a bug report."""

    def run(self) -> None:
        """Works without any extra installed."""
        facts = environment.describe()
        width = max(map(len, facts))
        for name, fact in facts.items():
            print(f"{name.ljust(width)}  {fact}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; `arguments` default to those of the process.

    Returns:
        0, with a line on stderr for every warning; 2 for bad input or a file that cannot be written, with one line on
        stderr; 130 after Ctrl-C. The environment variable KCD_TRACEBACK=1 shows where such an error comes from.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ± is no reason to fail
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())  # module:function finds the user's file, as with `python -m`
    try:
        with warnings.catch_warnings(record=True) as caught:
            _parse(sys.argv[1:] if arguments is None else list(arguments))()
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads what is printed, which comes last: all the work is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as interrupt:
        return _fail("interrupted", str(interrupt), code=INTERRUPTED)
    except OSError as error:
        if os.environ.get("KCD_TRACEBACK"):
            raise
        return _fail(f"{error.strerror or error}", str(error.filename or ""), code=BAD_INPUT)
    except (ValueError, TypeError, IndexError, ArithmeticError, ImportError) as error:
        if os.environ.get("KCD_TRACEBACK"):
            raise
        return _fail(str(error), code=BAD_INPUT)
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        _say("warning", text)
    return 0


def _parse(arguments: list[str]) -> Callable[[], None]:
    """What the arguments ask for, ready to be called."""
    if arguments == ["--version"]:
        return lambda: print(f"kcd {__version__}")
    try:
        import tyro

        from .training.demo import Demo
    except ImportError as error:
        if arguments == ["info"]:
            return Info().run
        raise ImportError(f'kcd needs the package {error.name}: pip install "kcd-ext[train]"') from error
    commands = Annotated[Demo, tyro.conf.subcommand("demo")] | Annotated[Info, tyro.conf.subcommand("info")]
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            return tyro.cli(commands, args=arguments, prog="kcd", description=DESCRIPTION).run
    except SystemExit as end:
        if not end.code:
            raise  # --help
        raise ValueError(_unboxed(complaint.getvalue())) from end


def _unboxed(text: str) -> str:
    """What tyro complains about, out of the frame it draws; its advice, behind a rule inside the frame, is left out."""
    framed = [line.strip("│ ") for line in text.splitlines() if line.startswith("│")]
    sentence = itertools.takewhile(lambda line: line.strip("─"), framed)
    return f"{' '.join(sentence) or text} (see kcd --help)"


def _fail(*parts: str, code: int) -> int:
    _say(*parts)
    return code


def _say(*parts: str) -> None:
    print("kcd: " + ": ".join(" ".join(part.split()) for part in parts if part), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
