"""The command `kcd`: a thin shell that turns options into calls, and errors into one line and an exit code.

`kcd_command.py` runs this file as `kcd_command.cli`, without the package's `__init__.py`, which imports torch. So this file,
and each that it imports at the top, imports no other part of the package there. Functions import such parts, by their names
in `kcd_ext`.
"""

import importlib
import io
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

from . import processes, terminal
from .describe import LENGTH, brief, did_you_mean, one_line
from .processes import BAD_INPUT
from .registry import unknown

DESCRIPTION = """Knowledge Condensation Distillation: distil only what the student still has to learn.

kcd COMMAND --help describes a command, kcd --version prints the version."""


class _Place(NamedTuple):
    """Where a command is, and the first line of its docstring, which is shown without importing it."""

    kind: str
    sentence: str


COMMANDS = {
    "distill": _Place(
        "kcd_ext.commands.distill:Distill",
        "Distils a student from a teacher, by one seed or several, and writes a report.",
    ),
    "teacher": _Place(
        "kcd_ext.commands.teacher:Train",
        "Trains a teacher with cross entropy. Its folder is what --teacher of `kcd distill` takes.",
    ),
    "report": _Place(
        "kcd_ext.commands.report:Report",
        "Compares runs in one page: tables, curves, values, and what their options differ in.",
    ),
    "evaluate": _Place(
        "kcd_ext.commands.evaluate:Evaluate",
        "Measures what finished runs have really distilled, on the test images of each.",
    ),
    "demo": _Place(
        "kcd_ext.commands.demo:Demo",
        "Distils real images in about a minute and writes a report.",
    ),
    "info": _Place(
        "kcd_ext.commands.info:Info",
        "Prints versions, instruction sets and devices, to paste into a bug report.",
    ),
}
TOGETHER = ("distill", "teacher")  # the work of several processes; the others are that of the first
HELP = {"-h", "--help"}
INTERRUPTED = 130
NARROWEST = 40  # columns of a terminal; in fewer lines are broken by the terminal itself


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; `arguments` default to those of the process.

    The current folder is searched for a `module:function` that the user names, and for no other import.

    Returns:
        0, with a line on stderr for every warning; 2 for bad input or a file that cannot be written, with one line on
        stderr, or what tyro prints of an option that it cannot read; 130 after Ctrl-C. The environment variable
        KCD_TRACEBACK=1 shows where such an error comes from.
    """
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ± is no reason to fail
    try:
        with warnings.catch_warnings(record=True) as caught, _interrupts_show():
            with processes.report_on_rank_zero():
                command = _parse(sys.argv[1:] if arguments is None else list(arguments))
            with _searching_here():
                command()
            processes.shutdown()
        sys.stdout.flush()
    except SystemExit as end:  # of tyro, which has printed why, or of a rank that leaves it to rank 0
        return end.code
    except BrokenPipeError:  # nobody reads what is printed, which comes last: all the work is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as interrupt:
        if processes.rank() == 0:
            terminal.say("interrupted", str(interrupt))
        return INTERRUPTED
    except OSError as error:
        return _fail(error, f"{error.strerror or error}", str(error.filename or ""))
    except (ValueError, TypeError, IndexError, ArithmeticError, ImportError) as error:
        return _fail(error, str(error).strip())
    except RuntimeError as error:
        if not processes.in_process_group():
            raise
        # Of a process that has ended, torch's backends tell the others in many words and by several types.
        return _fail(error, "another process of this command may have ended", type(error).__name__, one_line(error))
    for text in dict.fromkeys(str(warning.message) for warning in caught if processes.rank() == 0):
        terminal.say("warning", " ".join(text.split()))
    return 0


def _fail(error: Exception, *parts: str) -> int:
    """Print an error in one line. With KCD_TRACEBACK, raise it instead."""
    if os.environ.get("KCD_TRACEBACK"):
        raise error
    terminal.say(*parts)
    return BAD_INPUT


def _searching_here() -> Any:
    """Return the context in which the package, if it is imported, finds the user's modules in the current folder."""
    package = sys.modules.get("kcd_ext.import_path")
    try:
        return nullcontext() if package is None else package.searching(os.getcwd())
    except OSError:  # the folder has been deleted
        return nullcontext()


def _open_streams() -> None:
    """Open os.devnull where the process was started without stdout or stderr, lest a file of ours takes their place."""
    if sys.stdout is None or sys.stderr is None:
        while os.open(os.devnull, os.O_RDWR) < 2:
            pass
        sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))


def _parse(arguments: list[str]) -> Callable[[], None]:
    """Return what the arguments ask for, ready to be called. Only runs are the work of several processes together."""
    _check_not_empty(arguments)
    name, *options = arguments or [""]
    together = name in TOGETHER and HELP.isdisjoint(options)
    if arguments == ["--version"]:
        action = _version
    elif name in HELP:
        action = _overview
    elif name.startswith("--tyro-"):
        action = partial(_complete, arguments)
    elif name not in COMMANDS:
        raise _no_command(name, options)
    else:
        kind = _imported(name)
        with _searching_here():
            action = _command(name, kind, options)
    return action if processes.rank() == 0 or together else lambda: None


def _check_not_empty(arguments: list[str]) -> None:
    """Raise ValueError for an empty argument, other than the value of an option of the method (behind its name)."""
    before, option = "", ""
    for argument in arguments:
        is_value = option == "--options" != before
        if (not argument and not is_value) or (argument.startswith("--") and argument.find("=") == len(argument) - 1):
            last = before if before.startswith("-") else f"the argument after {before}" if before else "the command"
            raise ValueError(f"{argument[:-1] or last} must not be empty")
        before, option = argument, argument if argument.startswith("--") else option


def _imported(command: str) -> type:
    """Return the class of a command. Raises ImportError where a package is missing."""
    module, _, name = COMMANDS[command].kind.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ImportError(f'kcd needs the package {error.name}: pip install "kcd-ext[train]"') from error


def _command(name: str, kind: type, options: list[str]) -> Callable[[], None]:
    """Return what a command does with these options: it runs, or shows its help.

    Raises:
        ValueError, TypeError: a value is out of range, or they name a RECIPE that does not exist, or an option of the method.
        SystemExit: tyro cannot read them, and has printed why.
    """
    if name == "info" and not options:
        return kind().run  # without tyro, which is an extra
    others = [option for option in options if option not in HELP]
    shows_help = others != options
    # Read twice: the method and RECIPE decide the defaults of what is not given.
    try:
        command, unread = _tyro(name, kind, others, quiet=shows_help, return_unknown_args=True)
    except (SystemExit, ValueError, TypeError):
        if not shows_help:
            raise
        command, unread = _tyro(name, kind, [], return_unknown_args=True)  # help on `--epochs` without its number
    given = {"default": command.defaults()} if hasattr(command, "defaults") and not unread else {}
    if shows_help:
        return partial(_help, name, kind, command, given)
    if hasattr(command, "recipe"):
        command.recipe.check_unread(unread)
    return _tyro(name, kind, options, **given).run


def _tyro(name: str, kind: type, options: list[str], quiet: bool = False, **more: object) -> Any:
    """Return what tyro reads. It prints what is wrong on rank 0, unless `quiet`, and raises SystemExit."""
    import tyro

    # Not by `console_outputs`: tyro prints errors of values all the same.
    quiet = quiet or processes.rank() > 0
    with redirect_stderr(io.StringIO()) if quiet else nullcontext():
        return tyro.cli(kind, args=options, prog=f"kcd {name}", **more)


def _help(name: str, kind: type, command: Any, given: dict[str, object]) -> None:
    """Print tyro's help of a command, and below it the options of the method. Raises ValueError for an unknown method."""
    lines = _method_help(name, *command.recipe.method_options()) if hasattr(command, "recipe") else []
    with suppress(SystemExit):
        _tyro(name, kind, ["--help"], **given)
    terminal.show(*lines)


def _method_help(command: str, method: str, options: Sequence[Any]) -> list[str]:
    """Return the lines with the options of a method."""
    other = f"for those of another: kcd {command} --method METHOD --help"
    if not options:
        return ["", *_folded(f"Method {method} has no options ({other}).")]
    title = f"Options of method {method}, with their defaults, given as --options NAME VALUE ... ({other}):"
    return ["", *_folded(title), *_listed({f"{o.name} {o.default}".rstrip(): o.text for o in options}, 22)]


def _overview() -> None:
    """Print the help of `kcd` itself: every command in a sentence."""
    description = [line for paragraph in DESCRIPTION.splitlines() for line in _folded(paragraph)]
    commands = _listed({name: place.sentence for name, place in COMMANDS.items()}, 12)
    terminal.show("usage: kcd COMMAND [OPTIONS]", "", *description, "", "commands:", *commands)


def _listed(texts: Mapping[str, str], column: int) -> list[str]:
    """Return lines with a text beside each name, which begins in this column; below a name that is too long for it."""
    lines = []
    for name, text in texts.items():
        start = f"  {name}"
        if text and len(start) >= column - 1:
            lines.append(start)
            start = ""
        lines += _folded(text, start.ljust(column), " " * column) if text else [start]
    return lines


def _folded(text: str, start: str = "", indent: str = "") -> list[str]:
    """Return the lines of a paragraph, which end where the screen does."""
    width = max(shutil.get_terminal_size().columns, NARROWEST)
    return textwrap.wrap(text, width, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False) or [""]


def _complete(arguments: list[str]) -> None:
    """Print what a shell reads to complete the commands and their options."""
    kinds = {name: _imported(name) for name in COMMANDS}
    from tyro.extras import subcommand_cli_from_dict

    with suppress(SystemExit):
        subcommand_cli_from_dict(kinds, prog="kcd", description=DESCRIPTION, args=arguments)


def _no_command(name: str, options: Sequence[str]) -> ValueError:
    """Return the error for what is in the place of a command."""
    if not name:
        return ValueError(f"a command must be given: {', '.join(COMMANDS)} (see kcd --help)")
    if name == "help":
        return ValueError(f"unknown command 'help': did you mean kcd {' '.join([*options[:1], '--help'])}?")
    if name == "--version":
        return ValueError(f"--version goes alone, got {brief(options[0])} after it")
    if name.startswith("-"):
        nearest = did_you_mean(name, (*HELP, "--version")) or ": a command comes before its options"
        option = name if len(name) <= LENGTH else f"{name[:LENGTH]}..."
        return ValueError(f"unrecognized option {option}{nearest} (see kcd --help)")
    return ValueError(f"{unknown('command', name, COMMANDS)} (see kcd --help)")


def _version() -> None:
    try:
        version = metadata.version("kcd-ext")
    except metadata.PackageNotFoundError:  # run from a source folder
        from kcd_ext import __version__ as version
    terminal.show(f"kcd {version}")


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


if __name__ == "__main__":
    from .kcd_command import without_current_folder

    without_current_folder()
    sys.exit(main())
