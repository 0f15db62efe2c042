"""The command `kcd`: a thin shell that turns options into calls, and errors into one line and an exit code."""

import io
import itertools
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Annotated

from . import processes  # what imports torch comes later: Ctrl-C before `main` shows where it struck
from .processes import BAD_INPUT

DESCRIPTION = "Knowledge Condensation Distillation: distil only what the student has still to learn."
INTERRUPTED = 130
INSIDE = r"^Error parsing __tyro\S*: "  # before what a dataclass says of its own fields


@dataclass(frozen=True)
class Info:
    """Prints versions, instruction sets and devices, to paste into a bug report."""

    def run(self) -> None:
        """Works without any extra installed."""
        from . import environment

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
        with warnings.catch_warnings(record=True) as caught, _interrupts_show():
            with processes.first_one_says():
                command = _parse(sys.argv[1:] if arguments is None else list(arguments))
            command()
            processes.part()
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads what is printed, which comes last: all the work is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as interrupt:
        return _fail("interrupted", str(interrupt), code=INTERRUPTED) if processes.number() == 0 else INTERRUPTED
    except OSError as error:
        if os.environ.get("KCD_TRACEBACK"):
            raise
        return _fail(f"{error.strerror or error}", str(error.filename or ""), code=BAD_INPUT)
    except (ValueError, TypeError, IndexError, ArithmeticError, ImportError) as error:
        if os.environ.get("KCD_TRACEBACK"):
            raise
        return _fail(str(error), code=BAD_INPUT)
    except RuntimeError as error:
        if os.environ.get("KCD_TRACEBACK") or not processes.is_left_alone(error):
            raise
        if processes.number() == 0:
            _say("another process of this command has ended")
        return BAD_INPUT
    for text in dict.fromkeys(str(warning.message) for warning in caught if processes.number() == 0):
        _say("warning", text)
    return 0


def _parse(arguments: list[str]) -> Callable[[], None]:
    """What the arguments ask for, ready to be called. Only runs are the work of several processes together."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        # The value of an option of the method may be empty; it stands behind the option's name.
        if (not argument and (not before or before.startswith("-"))) or re.fullmatch("--[^=]*=", argument):
            raise ValueError(f"{argument[:-1] or before or 'the command'} must not be empty")
    alone = processes.number() == 0
    if arguments == ["--version"]:
        return _version if alone else _nothing
    try:
        import tyro

        from .training.commands import Distill, Train
        from .training.compare import Report
        from .training.demo import Demo
        from .training.evaluate import Evaluate
    except ImportError as error:
        if arguments == ["info"]:
            return Info().run if alone else _nothing
        raise ImportError(f'kcd needs the package {error.name}: pip install "kcd-ext[train]"') from error

    sub = tyro.conf.subcommand

    def parse(distill: Distill, train: Train) -> object:
        commands = (
            Annotated[Distill, sub("distill", default=distill)]
            | Annotated[Train, sub("teacher", default=train)]
            | Annotated[Report, sub("report")]
            | Annotated[Evaluate, sub("evaluate")]
            | Annotated[Demo, sub("demo")]
            | Annotated[Info, sub("info")]
        )
        return tyro.cli(commands, args=arguments, prog="kcd", description=DESCRIPTION)

    said, complaint = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()  # tyro's frames are what this can hold
    try:
        with redirect_stdout(said), redirect_stderr(complaint):
            command = parse(Distill(), Train())
            if isinstance(command, Distill):
                command = parse(command.implied(), Train())
            elif isinstance(command, Train):
                command = parse(Distill(), command.implied())
            return command.run if alone or isinstance(command, Distill | Train) else _nothing
    except SystemExit as end:
        if end.code:
            raise ValueError(_unboxed(complaint.getvalue())) from end
        said.seek(0)
        if alone:
            print(_folded(said.read()))  # --help
        raise


def _version() -> None:
    from . import __version__

    print(f"kcd {__version__}")


def _nothing() -> None:
    """What is left to do where the first process does it all."""


@contextmanager
def _interrupts_show() -> Iterator[None]:
    """Ctrl-C while something is imported can come out as an error of the import."""
    try:
        yield
    except Exception as error:
        earlier, seen = error, []
        while earlier is not None and earlier not in seen:
            if isinstance(earlier, KeyboardInterrupt):
                raise KeyboardInterrupt from error
            seen.append(earlier)
            earlier = earlier.__cause__ or earlier.__context__
        raise


def _folded(text: str) -> str:
    """What tyro writes outside of its frames is as long as it is; here it ends where the screen does."""
    width = shutil.get_terminal_size().columns
    return "\n".join(line if line[:1] in "╭│╰" else textwrap.fill(line, width) for line in text.splitlines())


def _unboxed(text: str) -> str:
    """What tyro complains about, out of the frame it draws; its advice, behind a rule inside the frame, is left out."""
    framed = [line.strip("│ ") for line in text.splitlines() if line.startswith("│")]
    sentence = " ".join(itertools.takewhile(lambda line: line.strip("─"), framed))
    return f"{re.sub(INSIDE, '', sentence) or text} (see kcd --help)"


def _fail(*parts: str, code: int) -> int:
    _say(*parts)
    return code


def _say(*parts: str) -> None:
    name = f"kcd: process {processes.number()}" if processes.number() else "kcd"
    print(": ".join([name, *(" ".join(part.split()) for part in parts if part)]), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
