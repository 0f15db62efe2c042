"""The command `kcd`: a thin shell that turns options into calls, and errors into one line and an exit code.

`kcd_command.py` runs this file as `kcd_command.cli`, without the package's `__init__.py`, which imports torch. So this file,
and each that it imports at the top, imports no other part of the package there. Functions import such parts, by their names
in `kcd_ext`.
"""

import codecs
import importlib
import io
import itertools
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import reduce
from importlib import metadata
from operator import or_
from typing import Annotated, Any, NamedTuple

from . import processes, terminal
from .describe import LENGTH, brief
from .processes import BAD_INPUT
from .registry import did_you_mean, unknown

DESCRIPTION = """Knowledge Condensation Distillation: distil only what the student has still to learn.

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
        f"{__name__}:Info",
        "Prints versions, instruction sets and devices, to paste into a bug report.",
    ),
}
TOGETHER = ("distill", "teacher")  # the work of several processes; the others are that of the first
HELP = ("-h", "--help")
OPTION = r"(?<![\w.-])--[a-z][\w.-]*"
INTERRUPTED = 130
NARROWEST = 40  # columns of a terminal; in fewer lines are broken by the terminal itself
UNBROKEN = 1_000_000
INSIDE = r"^Error parsing (?!-)\S+: "  # before what a dataclass says of its own fields


@dataclass(frozen=True)
class Info:
    """Prints versions, instruction sets and devices, to paste into a bug report."""

    def run(self) -> None:
        """Works without any extra installed."""
        from kcd_ext import environment

        facts = environment.describe()
        width = max(map(len, facts))
        terminal.show(*(f"{name.ljust(width)}  {fact}" for name, fact in facts.items()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; `arguments` default to those of the process.

    The current folder is searched for a `module:function` that the user names, and for no other import.

    Returns:
        0, with a line on stderr for every warning; 2 for bad input or a file that cannot be written, with one line on
        stderr; 130 after Ctrl-C. The environment variable KCD_TRACEBACK=1 shows where such an error comes from.
    """
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ± is no reason to fail
    try:
        with warnings.catch_warnings(record=True) as caught, _interrupts_show():
            with processes.first_one_says():
                command = _parse(sys.argv[1:] if arguments is None else list(arguments))
            with _searching_here():
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
        return _fail(str(error).strip(), code=BAD_INPUT)
    except RuntimeError as error:
        if os.environ.get("KCD_TRACEBACK") or not processes.is_left_alone(error):
            raise
        if processes.number() == 0:
            terminal.say("another process of this command has ended")
        return BAD_INPUT
    for text in dict.fromkeys(str(warning.message) for warning in caught if processes.number() == 0):
        terminal.say("warning", " ".join(text.split()))
    return 0


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
    """What the arguments ask for, ready to be called. Only runs are the work of several processes together."""
    before, option = "", ""
    for argument in arguments:
        # The value of an option of the method may be empty; it stands behind the option's name.
        is_value = option == "--options" != before
        if (not argument and not is_value) or re.fullmatch("--[^=]*=", argument):
            last = before if before.startswith("-") else f"the argument after {before}" if before else "the command"
            raise ValueError(f"{argument[:-1] or last} must not be empty")
        before, option = argument, argument if argument.startswith("--") else option
    alone = processes.number() == 0
    if arguments == ["--version"]:
        return _version if alone else _nothing
    if arguments == ["info"]:
        return Info().run if alone else _nothing
    name, *options = arguments or [""]
    if name in HELP:
        return (lambda: terminal.show(*_overview())) if alone else _nothing
    completions = name.startswith("--tyro-")  # for shells
    if name not in COMMANDS and not completions:
        raise _no_command(name, options)
    kinds = _imported(COMMANDS if completions else [name])
    with _searching_here():
        if completions:
            text = _completions(kinds, arguments)
        elif not {*HELP}.isdisjoint(options):
            text = _Command(name, kinds[name]).help([option for option in options if option not in HELP])
        else:
            asked = _Command(name, kinds[name]).read(options)
            return asked.run if alone or name in TOGETHER else _nothing
    return (lambda: terminal.show(*text)) if alone else _nothing


def _imported(commands: Iterable[str]) -> dict[str, type]:
    """Return the classes of these commands. Raises ImportError where a package is missing."""
    kinds = {}
    try:
        import tyro  # noqa: F401

        for command in commands:
            module, _, name = COMMANDS[command].kind.partition(":")
            kinds[command] = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ImportError(f'kcd needs the package {error.name}: pip install "kcd-ext[train]"') from error
    return kinds


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
        return ValueError(f"unrecognized option {_cut(name)}{nearest} (see kcd --help)")
    return ValueError(f"{unknown('command', name, COMMANDS)} (see kcd --help)")


def _overview() -> list[str]:
    """Return the help of `kcd` itself: every command in a sentence."""
    indent = " " * (max(map(len, COMMANDS)) + 4)
    commands = [
        line
        for name, place in COMMANDS.items()
        for line in _folded(place.sentence, f"  {name}".ljust(len(indent)), indent)
    ]
    description = [line for paragraph in DESCRIPTION.splitlines() for line in _folded(paragraph)]
    return ["usage: kcd COMMAND [OPTIONS]", "", *description, "", "commands:", *commands]


def _completions(kinds: Mapping[str, type], arguments: list[str]) -> list[str]:
    """Return what a shell reads to complete the commands and their options."""
    from tyro.conf import subcommand

    commands = [Annotated[kind, subcommand(name, description=COMMANDS[name].sentence)] for name, kind in kinds.items()]
    return _printed(lambda tyro: tyro.cli(reduce(or_, commands), args=arguments, prog="kcd", description=DESCRIPTION))


@dataclass(frozen=True)
class _Command:
    """A command and what tyro makes of it."""

    name: str
    kind: type

    @property
    def see(self) -> str:
        return f"(see kcd {self.name} --help)"

    def read(self, options: list[str]) -> Any:
        """Return the command that these options ask for. Raises ValueError, TypeError: they ask for none."""
        command, others = self._read(options)
        if others:
            raise self._unexpected(others[0], command)
        return command

    def help(self, options: list[str]) -> list[str]:
        """Return the lines of the command's help, with the defaults that go with the other options where these can be read.

        Raises ValueError, TypeError, ImportError: they name a method or RECIPE that there is not.
        """
        try:
            command, _ = self._read(options, implied=False)
        except (ValueError, TypeError):  # so much as `--epochs` without its number, which the help is there for
            command, _ = self._read([], implied=False)
        default = command.implied() if hasattr(command, "implied") else None
        lines = _printed(lambda tyro: self._tyro(tyro, ["--help"], default))
        return lines + (
            _method_help(self.name, *command.method_options()) if hasattr(command, "method_options") else []
        )

    def _read(self, options: list[str], implied: bool = True) -> tuple[Any, list[str]]:
        """Return the command, and the options that it has not."""
        command, others = self._parsed(options, None)
        if implied and not others and hasattr(command, "implied"):
            command, others = self._parsed(options, command.implied())
        return command, others

    def _parsed(self, options: list[str], default: object) -> tuple[Any, list[str]]:
        import tyro

        # What tyro draws its frames with is what stdout can hold; in lines of any length it breaks none.
        stdout, stderr = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
        try:
            with redirect_stdout(stdout), redirect_stderr(stderr), _columns(UNBROKEN):
                return self._tyro(tyro, options, default)
        except SystemExit as end:
            if not end.code:  # tyro has written completions for a shell
                raise
            raise ValueError(f"{_unboxed(stderr.getvalue())} {self.see}") from end

    def _tyro(self, tyro: Any, options: list[str], default: object) -> tuple[Any, list[str]]:
        given = {} if default is None else {"default": default}
        return tyro.cli(self.kind, args=options, prog=f"kcd {self.name}", return_unknown_args=True, **given)

    def _unexpected(self, option: str, command: Any) -> ValueError:
        """Return the error for an option, or another word, that the command has not."""
        name = option.partition("=")[0]
        if not name.startswith("-"):
            return ValueError(f"unexpected argument {brief(option)} {self.see}")
        help_text = _printed(lambda tyro: self._tyro(tyro, ["--help"], None))
        names = [found for line in help_text if re.match("[│| ] -", line) for found in re.findall(OPTION, line)]
        nearest = did_you_mean(name, names)
        if not nearest and hasattr(command, "method_options"):
            method, options = command.method_options()
            argument = name.lstrip("-").replace("-", "_")
            if argument in [option.name for option in options]:
                nearest = f": method {method} takes it, as --options {argument} VALUE"
        return ValueError(f"unrecognized option {_cut(name)}{nearest} {self.see}")


def _method_help(command: str, method: str, options: Sequence[Any]) -> list[str]:
    """Return the lines with the options of a method."""
    other = f"for those of another: kcd {command} --method METHOD --help"
    if not options:
        return ["", *_folded(f"Method {method} has no options ({other}).")]
    rows = [(f"{option.name} {option.default}".rstrip(), option.text) for option in options]
    indent = " " * 22
    lines = [
        "",
        *_folded(f"Options of method {method}, with their defaults, given as --options NAME VALUE ... ({other}):"),
    ]
    for name, text in rows:
        start = f"  {name}"
        if len(start) >= len(indent) - 1 and text:
            lines.append(start)
            start = ""
        lines += _folded(text, start.ljust(len(indent)) if text else start, indent)
    return lines


def _printed(call: Callable[[Any], object]) -> list[str]:
    """Return the lines that tyro prints before it ends the process, folded to the terminal's width."""
    import tyro

    encoding = codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name
    stdout = io.TextIOWrapper(io.BytesIO(), encoding, errors="replace")
    with suppress(SystemExit), redirect_stdout(stdout):
        call(tyro)
    stdout.seek(0)
    return [folded for line in stdout.read().splitlines() for folded in _folded(line)]


@contextmanager
def _columns(number: int) -> Iterator[None]:
    """As wide as this a terminal seems inside."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(number)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _version() -> None:
    try:
        version = metadata.version("kcd-ext")
    except metadata.PackageNotFoundError:  # run from a source folder
        from kcd_ext import __version__ as version
    terminal.show(f"kcd {version}")


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


def _folded(text: str, start: str = "", indent: str = "") -> list[str]:
    """Return the lines of a paragraph, which end where the screen does; those of tyro's frames end there already."""
    if text[:1] in {*"╭│╰+|"}:
        return [text]
    width = max(shutil.get_terminal_size().columns, NARROWEST)
    return textwrap.wrap(text, width, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False) or [
        start.rstrip()
    ]


def _unboxed(text: str) -> str:
    """What tyro complains about, out of the frame it draws; its advice, behind a rule inside the frame, is left out."""
    framed = [line.strip("│ ") for line in text.splitlines() if line.startswith("│")]
    sentence = " ".join(itertools.takewhile(lambda line: line.strip("─"), framed))
    sentence = sentence.replace("Failed to parse key-value pairs!", "write pairs NAME VALUE, as in temperature 3")
    return re.sub(INSIDE, "", sentence) or text


def _cut(option: str) -> str:
    return option if len(option) <= LENGTH else f"{option[:LENGTH]}..."


def _fail(*parts: str, code: int) -> int:
    terminal.say(*parts)
    return code


if __name__ == "__main__":
    from .kcd_command import without_current_folder

    without_current_folder()
    sys.exit(main())
