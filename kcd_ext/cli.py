"""The `kcd` command: turn options into calls, and errors into one line and an exit code.

`kcd_command.py` runs this file as `kcd_command.cli`. That skips the package's `__init__.py`, which imports torch. This file
and its top-level imports must therefore import no other part of the package at module level. Functions import the rest by
its name in `kcd_ext`.
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
from .describe import MAX_LENGTH, brief, did_you_mean, one_line
from .processes import BAD_INPUT
from .registry import unknown_name_error

DESCRIPTION = """Knowledge Condensation Distillation: distil only what the student still has to learn.

Run kcd COMMAND --help for the options of a command and kcd --version for the version."""


class _Command(NamedTuple):
    """The location of a command, and the first line of its docstring, which `kcd --help` shows without importing it."""

    target: str
    summary: str


COMMANDS = {
    "distill": _Command(
        "kcd_ext.commands.distill:Distill",
        "Distil a student from a teacher, with one seed or several, and write a report.",
    ),
    "teacher": _Command(
        "kcd_ext.commands.teacher:Train",
        "Train a teacher with cross entropy. Pass its run folder to `kcd distill --teacher`.",
    ),
    "cache": _Command(
        "kcd_ext.commands.cache:Cache",
        "Run a teacher once on all training images and store its logits. Pass the folder to `kcd distill --teacher-cache`.",
    ),
    "report": _Command(
        "kcd_ext.commands.report:Report",
        "Compare runs on one page: tables, curves, knowledge values and the options that differ.",
    ),
    "evaluate": _Command(
        "kcd_ext.commands.evaluate:Evaluate",
        "Measure how well finished students match their teachers, on the test images of each run.",
    ),
    "predict": _Command(
        "kcd_ext.commands.predict:Predict",
        "Classify images with the student of a finished run.",
    ),
    "export": _Command(
        "kcd_ext.commands.export:Export",
        "Export the student of a finished run to safetensors, ONNX or torch.export.",
    ),
    "demo": _Command(
        "kcd_ext.commands.demo:Demo",
        "Distil a small network on real images in about a minute and write a report.",
    ),
    "info": _Command(
        "kcd_ext.commands.info:Info",
        "Print versions, instruction sets and devices, to paste into a bug report.",
    ),
}
DISTRIBUTED = ("distill", "teacher", "cache")  # run on every rank; the other commands run on rank 0 only
HELP_FLAGS = {"-h", "--help"}
EXIT_INTERRUPTED = 130
MIN_COLUMNS = 40  # a narrower terminal wraps the lines itself


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    The current folder is searched for a `module:function` that the user names, and for no other import.
    Set the environment variable `KCD_TRACEBACK=1` to get the traceback of an error.

    Args:
        arguments: the command and its options; default: those of the process.

    Returns:
        - 0 on success, with one line on stderr for each warning;
        - 2 for bad input or a file that cannot be written, with one line on stderr (or tyro's message for an option
          that it cannot parse);
        - 130 after Ctrl-C.
    """
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # do not fail on a terminal that lacks ±
    try:
        with warnings.catch_warnings(record=True) as caught, _unwrap_interrupts():
            with processes.report_on_rank_zero():
                command = _parse(sys.argv[1:] if arguments is None else list(arguments))
            with _current_folder_importable():
                command()
            processes.shutdown()
        sys.stdout.flush()
    except SystemExit as end:  # from tyro, which has printed the reason, or from a rank that lets rank 0 report
        return end.code
    except BrokenPipeError:  # the reader closed the pipe; printing comes last, so all work is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as interrupt:
        if processes.rank() == 0:
            terminal.print_error("interrupted", str(interrupt))
        return EXIT_INTERRUPTED
    except OSError as error:
        return _fail(error, f"{error.strerror or error}", str(error.filename or ""))
    except (ValueError, TypeError, IndexError, ArithmeticError, ImportError) as error:
        return _fail(error, str(error).strip())
    except RuntimeError as error:
        if not processes.in_process_group():
            raise
        # When a process ends, torch's backends raise long messages of several types on the others.
        return _fail(error, "another process of this command may have ended", type(error).__name__, one_line(error))
    for text in dict.fromkeys(str(warning.message) for warning in caught if processes.rank() == 0):
        terminal.print_error("warning", " ".join(text.split()))
    return 0


def _fail(error: Exception, *parts: str) -> int:
    """Print an error in one line. With KCD_TRACEBACK, raise it instead."""
    if os.environ.get("KCD_TRACEBACK"):
        raise error
    terminal.print_error(*parts)
    return BAD_INPUT


def _current_folder_importable() -> Any:
    """Return a context in which the package, if it is imported, finds the user's modules in the current folder."""
    package = sys.modules.get("kcd_ext.import_path")
    try:
        return nullcontext() if package is None else package.searching(os.getcwd())
    except OSError:  # the folder has been deleted
        return nullcontext()


def _open_streams() -> None:
    """Open os.devnull for a missing stdout or stderr, so that no file of ours gets their descriptor."""
    if sys.stdout is None or sys.stderr is None:
        while os.open(os.devnull, os.O_RDWR) < 2:
            pass
        sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))


def _parse(arguments: list[str]) -> Callable[[], None]:
    """Return the requested action, ready to call. On ranks above 0 it does nothing unless the command is distributed."""
    _check_no_empty_argument(arguments)
    name, *options = arguments or [""]
    on_every_rank = name in DISTRIBUTED and HELP_FLAGS.isdisjoint(options)
    if arguments == ["--version"]:
        action = _show_version
    elif name in HELP_FLAGS:
        action = _show_overview
    elif name.startswith("--tyro-"):
        action = partial(_print_completion, arguments)
    elif name not in COMMANDS:
        raise _unknown_command(name, options)
    else:
        kind = _load_command(name)
        with _current_folder_importable():
            action = _bind(name, kind, options)
    return action if processes.rank() == 0 or on_every_rank else lambda: None


def _check_no_empty_argument(arguments: list[str]) -> None:
    """Raise ValueError for an empty argument. The value of a method option, after its name, may be empty."""
    before, option = "", ""
    for argument in arguments:
        is_value = option == "--options" != before
        if (not argument and not is_value) or (argument.startswith("--") and argument.find("=") == len(argument) - 1):
            last = before if before.startswith("-") else f"the argument after {before}" if before else "the command"
            raise ValueError(f"{argument[:-1] or last} must not be empty")
        before, option = argument, argument if argument.startswith("--") else option


def _load_command(command: str) -> type:
    """Import and return the class of a command. Raises ImportError if a package is missing."""
    module, _, name = COMMANDS[command].target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ImportError(f'kcd needs the package {error.name}: pip install "kcd-ext[train]"') from error


def _bind(name: str, kind: type, options: list[str]) -> Callable[[], None]:
    """Return the action of a command with these options: run it, or show its help.

    Raises:
        ValueError, TypeError: a value is out of range, PRESET does not exist, or an option belongs after `--options`.
        SystemExit: tyro cannot parse the options and has printed the reason.
    """
    if name == "info" and not options:
        return kind().run  # works without tyro, which only the extras install
    others = [option for option in options if option not in HELP_FLAGS]
    shows_help = others != options
    # Parse twice: the method and PRESET determine the defaults of the other options.
    try:
        command, unread = _parse_with_tyro(name, kind, others, quiet=shows_help, return_unknown_args=True)
    except (SystemExit, ValueError, TypeError):
        if not shows_help:
            raise
        # `--epochs --help` still shows the help.
        command, unread = _parse_with_tyro(name, kind, [], return_unknown_args=True)
    given = {"default": command.defaults()} if hasattr(command, "defaults") and not unread else {}
    if shows_help:
        return partial(_show_help, name, kind, command, given)
    if hasattr(command, "recipe"):
        command.recipe.check_unread(unread)
    return _parse_with_tyro(name, kind, options, **given).run


def _parse_with_tyro(name: str, kind: type, options: list[str], quiet: bool = False, **more: object) -> Any:
    """Parse the options with tyro. On an error, print it on rank 0 unless `quiet`, and raise SystemExit."""
    import tyro

    # Redirect stderr, because tyro prints invalid values even with `console_outputs=False`.
    quiet = quiet or processes.rank() > 0
    with redirect_stderr(io.StringIO()) if quiet else nullcontext():
        return tyro.cli(kind, args=options, prog=f"kcd {name}", **more)


def _show_help(name: str, kind: type, command: Any, given: dict[str, object]) -> None:
    """Print tyro's help for a command, then the options of its method. Raises ValueError for an unknown method."""
    lines = _method_help(name, *command.recipe.method_options()) if hasattr(command, "recipe") else []
    with suppress(SystemExit):
        _parse_with_tyro(name, kind, ["--help"], **given)
    terminal.print_lines(*lines)


def _method_help(command: str, method: str, options: Sequence[Any]) -> list[str]:
    """Return the lines that describe the options of a method."""
    other = f"For another method: kcd {command} --method METHOD --help"
    if not options:
        return ["", *_wrap(f"Method {method} has no options. {other}.")]
    title = f"Options of method {method}, with defaults. Pass them as --options NAME VALUE [NAME VALUE ...]. {other}."
    return ["", *_wrap(title), *_definition_list({f"{o.name} {o.default}".rstrip(): o.text for o in options}, 22)]


def _show_overview() -> None:
    """Print the help of `kcd` itself, with one sentence for each command."""
    description = [line for paragraph in DESCRIPTION.splitlines() for line in _wrap(paragraph)]
    commands = _definition_list({name: command.summary for name, command in COMMANDS.items()}, 12)
    terminal.print_lines("usage: kcd COMMAND [OPTIONS]", "", *description, "", "commands:", *commands)


def _definition_list(texts: Mapping[str, str], column: int) -> list[str]:
    """Return lines with each name and its text. The text starts in this column, or below a name that is too long."""
    lines = []
    for name, text in texts.items():
        start = f"  {name}"
        if text and len(start) >= column - 1:
            lines.append(start)
            start = ""
        lines += _wrap(text, start.ljust(column), " " * column) if text else [start]
    return lines


def _wrap(text: str, start: str = "", indent: str = "") -> list[str]:
    """Return the lines of a paragraph, wrapped to the width of the terminal."""
    width = max(shutil.get_terminal_size().columns, MIN_COLUMNS)
    return textwrap.wrap(text, width, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False) or [""]


def _print_completion(arguments: list[str]) -> None:
    """Print the script with which a shell completes the commands and their options."""
    kinds = {name: _load_command(name) for name in COMMANDS}
    from tyro.extras import subcommand_cli_from_dict

    with suppress(SystemExit):
        subcommand_cli_from_dict(kinds, prog="kcd", description=DESCRIPTION, args=arguments)


def _unknown_command(name: str, options: Sequence[str]) -> ValueError:
    """Return the error for a first argument that is not a command."""
    if not name:
        return ValueError(f"missing command: use one of {', '.join(COMMANDS)} (see kcd --help)")
    if name == "help":
        return ValueError(f"unknown command 'help': did you mean kcd {' '.join([*options[:1], '--help'])}?")
    if name == "--version":
        return ValueError(f"--version takes no arguments, got {brief(options[0])}")
    if name.startswith("-"):
        nearest = did_you_mean(name, (*HELP_FLAGS, "--version")) or ": put the command before its options"
        option = name if len(name) <= MAX_LENGTH else f"{name[:MAX_LENGTH]}..."
        return ValueError(f"unrecognized option {option}{nearest} (see kcd --help)")
    return ValueError(f"{unknown_name_error('command', name, COMMANDS)} (see kcd --help)")


def _show_version() -> None:
    """Print the version."""
    try:
        version = metadata.version("kcd-ext")
    except metadata.PackageNotFoundError:  # run from a source folder
        from kcd_ext import __version__ as version
    terminal.print_lines(f"kcd {version}")


@contextmanager
def _unwrap_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt if it is behind another error: an import can turn Ctrl-C into another error."""
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
    processes.exit_process(main())
