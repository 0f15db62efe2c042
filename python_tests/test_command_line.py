"""The command line: wrong arguments, `--help`, control characters in names, and imports from the current folder."""

import ast
import html
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import unicodedata
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from kcd_ext import cli, methods, models, processes, terminal
from kcd_ext.commands import presets
from kcd_ext.commands.demo import Demo
from kcd_ext.commands.distill import Distill
from kcd_ext.commands.evaluate import Evaluate
from kcd_ext.commands.options import Images, RecipeArgs, TrainingOptions
from kcd_ext.commands.report import Report
from kcd_ext.condensation.options import SELECTIONS, Condense
from kcd_ext.condensation.schedules import SCHEDULES
from kcd_ext.data import images
from kcd_ext.data.images import load
from kcd_ext.training import recipe
from kcd_ext.training.logs import LOGS
from kcd_ext.training.optimizers import OPTIMIZERS
from kcd_ext.training.recipe import PRECISIONS, Recipe

TIMEOUT = 180

# --- wrong arguments and suggestions -----------------------------------------------------------------------------------


def constant():
    """A name for `module:function`; never called."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            f"missing command: use one of {', '.join(cli.COMMANDS)} " r"\(see kcd --help\)",
        ),
        (["distil"], r"unknown command 'distil': did you mean distill\? Choose from distill, .*\(see kcd --help\)"),
        (["help", "demo"], r"unknown command 'help': did you mean kcd demo --help\?"),
        (["--versio"], r"unrecognized option --versio: did you mean --version\? \(see kcd --help\)"),
        (["--version", "x"], "--version takes no arguments, got 'x'"),
        (["--epochs", "3", "demo"], "unrecognized option --epochs: put the command before its options"),
        (["--" + "a" * 10_000], r"unrecognized option --a{58}\.\.\.: put the command"),
        (
            ["distill", "--method", "crd", "--negatives", "1"],
            "unrecognized option --negatives: pass it to method crd as --options negatives VALUE",
        ),
        (["teacher", "--method", "kd", "--kd-weight=1"], "unrecognized option --kd-weight: pass it to method kd as"),
        (["distill", "--lr", "-1"], "lr must be a finite number >= 0, got -1.0"),
        (
            ["distill", "cifar100-vgg13-vgg9"],
            r"unknown preset '.*': did you mean cifar100-vgg13-vgg8\? Choose from cifar",
        ),
        (["distill", ""], "the argument after distill must not be empty"),
        (["distill", "--method", "kc-kdd"], r"unknown method 'kc-kdd': did you mean kc-kd\? Choose from at, ce, crd, "),
        (["distill", "--data", "digits", "--student", "resnet8x5"], r"unknown model '.*': did you mean resnet8x4\?"),
        (["distill", "--data", "digits", "--teacher", "resnet8x5"], r"unknown teacher .* did you mean resnet8x4\?"),
        (["distill", "--data", "cifar-100"], r"unknown data set 'cifar-100': did you mean cifar100\?"),
        (["distill", "--data", f"{__name__}:constnt"], r".*has no 'constnt': did you mean constant\?"),
        (["distill", "--options", "temprature", "4"], r".*no option 'temprature': did you mean temperature\? It takes"),
        (["distill", "--precision", "bfloat"], r"precision must be auto, .*, got 'bfloat': did you mean bfloat16\?"),
        (["distill", "--output", "a\0b", "--data", "digits"], ".*embedded null byte"),
    ],
)
def test_wrong_arguments_are_one_line_with_a_suggestion(arguments, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    out, error = capfd.readouterr()
    assert (out, error.count("\n"), list(tmp_path.iterdir())) == ("", 1, [])
    assert re.match(f"kcd: {message}", error), error


@pytest.mark.parametrize(
    ("arguments", "name", "meant"),
    [
        (["distill", "--epoch", "3"], "--epoch", "--epochs"),
        (["teacher", "--batch_siz=3"], "--batch-siz", "--batch-size"),
        (["distill", "--keep", "0.5"], "--keep", "--condense.keep"),
        (["distill", "--method", "crd", "--momentun", "1"], "--momentun", "--momentum"),
        (["distill", "--no-flop"], "--no-flop", "--no-flip"),
        (["report", "a", "--outpt", "b"], "--outpt", "--output"),
        (["info", "--xyz"], "--xyz", ""),
        (["distill", "cifar100-vgg13-vgg8", "more"], "more", ""),
        (["distill", "--epochs", "x"], "--epochs", "'x'"),
        (["distill", "--epochs"], "--epochs", ""),
        (["distill", "--options", "temperature"], "--options", "pairs"),
        (["demo", "--epochs", "2.5"], "--epochs", "'2.5'"),
        (["distill", "--condense.schedule", "cosin"], "schedule", "did you mean cosine?"),
        (["distill", "--condense.selection", "infobach"], "'infobach'", "did you mean infobatch?"),
    ],
)
def test_option_that_tyro_cannot_parse_is_named_on_rank_zero(arguments, name, meant, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(arguments) == 2
    out, error = capfd.readouterr()
    assert out == "" and name in error and meant in error and f"kcd {arguments[0]} --help" in error
    assert "Traceback" not in error and not list(tmp_path.iterdir())
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    waited = []
    monkeypatch.setattr(processes.time, "sleep", waited.append)
    assert cli.main(arguments) == 2 and capfd.readouterr() == ("", "")  # rank 0 reports it, and is left the time to
    assert waited == [processes.SECONDS_TO_REPORT]


# --- help -------------------------------------------------------------------------------------------------------------


class Custom(torch.nn.Module):
    """A custom method.

    Args:
        heat, cold: how warm
            it is.
        needed: an int.

    Raises:
        ValueError: never.
    """

    def __init__(self, needed: int, heat: float = 1.5, *, cold: str = "", layer: str | None = None, **others: float):
        super().__init__()


def help_of(*arguments, capfd):
    assert cli.main([*arguments, "--help"]) == 0
    out, error = capfd.readouterr()
    assert error == ""
    return out


@pytest.mark.parametrize("name", [*methods.REGISTRY, f"{__name__}:Custom"])
@pytest.mark.parametrize("command", ["distill", "teacher"])
def test_help_lists_the_options_of_the_method_with_defaults(command, name, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    module, _, attribute = methods.REGISTRY.get(name, name).partition(":")
    parameters = inspect.signature(getattr(importlib.import_module(module), attribute)).parameters.values()
    shown = help_of(command, "--method", name, capfd=capfd).rpartition("╯")[2]
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in ("batch_keep", "label_smoothing")]
    assert f"ethod {name}" in shown and ("has no options" in shown) == (not named)
    for p in named:
        default = "" if isinstance(p.default, tuple | str) or p.default is p.empty else str(p.default)
        assert re.search(rf"^  {p.name} {re.escape(default)}", shown, re.MULTILINE), p.name
    if name == f"{__name__}:Custom":
        assert shown.endswith(
            "  needed (required)   an int.\n"
            "  heat 1.5            how warm it is.\n"
            "  cold ''             how warm it is.\n"
            "  layer None\n"
            "  ...\n"
        )


def test_help_shows_the_defaults_of_preset_and_method(capfd):
    text = " ".join(help_of("distill", "cifar100-vgg13-mobilenet_v2", capfd=capfd).replace("│", " ").split())
    assert "(default: 0.01)" in text  # the learning rate of the preset
    assert "(default: 0.7)" in help_of("distill", "--method", "kc-kd", capfd=capfd)
    assert "--epochs" in help_of("distill", "--epochs", "many", capfd=capfd)
    assert cli.main(["distill", "--method", "crdd", "--help"]) == 2
    assert capfd.readouterr().err.startswith("kcd: unknown method 'crdd': did you mean crd?")


def test_help_lists_all_methods_networks_and_data_sets(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    words = set(re.findall(r"[\w-]+", help_of("distill", capfd=capfd)))
    for names in (
        methods.REGISTRY,
        models.REGISTRY,
        images.REGISTRY,
        SELECTIONS,
        PRECISIONS,
        SCHEDULES,
        recipe.SCHEDULES,
        OPTIMIZERS,
        LOGS,
        presets.PRESETS,
    ):
        assert names.keys() <= words
    assert models.REGISTRY.keys() <= set(re.findall(r"[\w-]+", help_of("teacher", capfd=capfd)))


@pytest.mark.parametrize(
    "kind", [Recipe, RecipeArgs, Condense, Images, TrainingOptions, Distill, Evaluate, Demo, Report]
)
def test_help_text_of_every_option_is_one_line(kind):
    """tyro keeps the line breaks of a docstring, so a second line would break a sentence on the screen."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body
    options = [(option, text) for option, text in pairwise(body) if isinstance(option, ast.AnnAssign)]
    texts = [text.value.value for _, text in options if isinstance(text, ast.Expr)]
    assert texts and not [text for text in texts if "\n" in text]


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("command", [[], ["distill", "--method", "kr"]])
def test_help_is_wrapped_to_the_terminal_width(command, width, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    text = help_of(*command, capfd=capfd)
    lines = (text.rpartition("╯\n")[2] if command else text).splitlines()  # without tyro's own lines
    assert max(map(len, lines), default=0) <= width
    if not command:
        assert all(name in "\n".join(lines) for name in (*cli.COMMANDS, "--version"))


# --- names from files -------------------------------------------------------------------------------------------------

CONTROL = "\x1b]0;owned\x07\x1b[31m\x9b1m\r\u202e\u2066\u2028\x7f"
ESCAPED = r"\x1b]0;owned\x07\x1b[31m\x9b1m\r\u202e\u2066\u2028\x7f"
DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def controls_terminal(text):
    """Return whether a terminal would do more than show these characters."""
    return any(
        unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(c) in DIRECTIONS for c in text
    )


def test_printable_escapes_control_characters_only():
    for code in range(sys.maxunicode + 1):
        shown = terminal.printable(chr(code))
        assert not controls_terminal(shown)
        assert shown == chr(code) or (shown.startswith("\\") and not chr(code).isprintable()), hex(code)
    for name in ("é ± 漢字 👩\u200d💻", r"a\b", "\N{NO-BREAK SPACE}"):
        assert terminal.printable(name) == name
    assert terminal.printable("a\nb\x1b\udcff") == r"a\nb\x1b\udcff"


def test_control_characters_in_names_are_escaped(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        (tmp_path / "images" / part / "a").mkdir(parents=True)
        (tmp_path / "images" / part / "a" / f"{CONTROL}\n\udcff.png").write_bytes(b"no image")
    assert cli.main(["teacher", "--data", "images", "--network", "cnn_small"]) == 2
    out, error = capfd.readouterr()
    assert (out, error.count("\n")) == ("", 1) and not controls_terminal(error[:-1])
    assert rf"/{ESCAPED}\n\udcff.png: cannot be read" in error

    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)
    labels = pixels[:, 0, 0] % 2
    np.savez("x.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    name, run = "\x1b[31m\u202e\n$a^ é", Path(f"run{CONTROL}")
    small = ["--data", "x.npz", "--network", "cnn_small", "--epochs", "1", "--threads", "1", "--device", "cpu"]
    assert cli.main(["teacher", *small, "--name", name, "--output", str(run)]) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["recipe"]["name"] == name
    shutil.copytree(run, "other")
    config["about"]["dataset"] = f"{CONTROL}\ud800"
    config["recipe"]["lr"] = CONTROL
    Path("other/config.json").write_text(json.dumps(config))
    assert cli.main(["report", str(run), "other", "--output", f"{CONTROL}.html"]) == 0
    out, error = capfd.readouterr()
    assert error == "" and not controls_terminal(out.replace("\n", ""))
    assert r"\x1b[31m\u202e\n$a^ é (other)  " in out and rf"{ESCAPED}\ud800" in out
    assert f"report: {ESCAPED}.html\n" in out
    assert CONTROL in html.unescape(Path(f"{CONTROL}.html").read_bytes().decode())
    assert cli.main(["report", f"nothing{CONTROL}\n"]) == 2
    out, error = capfd.readouterr()
    assert error.count("\n") == 1 and not controls_terminal(error[:-1]) and rf"{ESCAPED}\n" in error


def test_only_the_module_terminal_prints():
    package = Path(cli.__file__).parent
    prints = re.compile(r"\bprint\(|\bstd(out|err)\.write")
    assert {path.name for path in package.rglob("*.py") if prints.search(path.read_text())} == {"terminal.py"}


@pytest.mark.slow
@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_command_runs_with_closed_standard_streams(closed, tmp_path):
    def close():
        for descriptor in closed:
            os.close(descriptor)

    command = [sys.executable, "-m", "kcd_ext", "distil"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=close, timeout=TIMEOUT)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 2 not in closed)


# --- the current folder -----------------------------------------------------------------------------------------------

PROBED = ("torch_xla", "torch_mlu", "torch_npu", "torch_musa", "torch_sdaa", "mlflow", "triton", "colorama", "tabulate")
MINE = """
import concurrent.futures, multiprocessing
import beside
from kcd_ext.data.images import load
from kcd_ext.methods.kd import KnowledgeDistillation

def data():
    import part
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(part.square, 3).result() == 9
    return load("digits")

class Loss(KnowledgeDistillation):
    def forward(self, *arguments):
        import package.inner
        return super().forward(*arguments)
"""
# -P adds no folder to sys.path.
AS_INSTALLED = ("-P", "-c", "import sys; from kcd_ext.cli import main; sys.exit(main())")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [AS_INSTALLED, ("-m", "kcd_ext"), ("-m", "kcd_ext.cli")])
def test_only_user_modules_are_imported_from_the_current_folder(launcher, tmp_path):
    for name in PROBED:
        (tmp_path / f"{name}.py").write_text(f"import os; os.write(2, b'EXECUTED {name}')")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "inner.py").write_text("import os; os.write(1, b'imported in forward')")
    (tmp_path / "beside.py").touch()
    (tmp_path / "part.py").write_text("def square(x):\n    return x * x\n")
    (tmp_path / "mine.py").write_text(MINE)
    run = [
        "distill",
        "--data",
        "mine:data",
        "--method",
        "mine:Loss",
        "--teacher",
        "cnn_small",
        "--student",
        "cnn_small",
    ]
    run += ["--epochs", "1", "--threads", "1", "--device", "cpu", "--output", "o"]
    for arguments in (["info"], run)[launcher[0] == "-m" :]:
        command = [sys.executable, *launcher, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT)
        assert (done.returncode, done.stderr) == (0, "")
    assert "imported in forward" in done.stdout


def test_import_path_is_restored_after_a_command(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sees_it.py").write_text(
        "import sys\nseen = [*sys.path]\ndef data():\n    raise KeyError(sys.path[-1])\n"
    )
    (tmp_path / "fails.py").write_text("1 / 0")
    path, before = sys.path, ([*sys.path], [*sys.meta_path])
    for spec, message in (
        ("sees_it:data", f"raised KeyError: {str(tmp_path)!r}"),
        ("sees_it:nothing", "has no 'nothing'"),
        ("fails:data", "ZeroDivisionError"),
        ("absent:data", "there is no module 'absent'"),
    ):
        assert cli.main(["demo", "--data", spec]) == 2
        assert message in capfd.readouterr().err
        assert sys.path is path and ([*sys.path], [*sys.meta_path]) == before
    assert sys.modules.pop("sees_it").seen == [*path, str(tmp_path)]
    with pytest.raises(ValueError, match="there is no module 'fails'"):  # the library uses Python's import path only
        load("fails:data")
