"""Every code block of the README and the documentation runs as it is printed."""

import re
import shlex
import sys

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from commands import run
from pages import PAGES, READER, README, ROOT, blocks, commands, snippets

from kcd_ext import cli

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = ("bash", "run")
BENCHMARKS = ROOT / "benchmarks"
NAMES = {page: page.relative_to(ROOT).as_posix() for page in (README, *PAGES)}


def pages_that_run() -> pytest.MarkDecorator:
    """Parametrize a test over the pages with Python blocks or commands to run. Those with commands to run are slow."""
    pages = []
    for page in PAGES:
        kinds = {(block.language, block.title) for block in blocks(page)}
        if RUN in kinds or "python" in {language for language, _ in kinds}:
            pages.append(pytest.param(page, marks=[pytest.mark.slow] * (RUN in kinds)))
    return pytest.mark.parametrize("page", pages, ids=NAMES.get)


def write_files(page, folder) -> None:
    """Write the blocks whose title is the name of a module, and make `folder` the place to import it from."""
    for block in blocks(page):
        if block.language == "python" and block.title:
            assert re.fullmatch(r"\w+\.py", block.title)
            (folder / block.title).write_text(block.code)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Work in an empty folder. Forget the modules that were imported from it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name, module in [*sys.modules.items()]:
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]
    AcceleratorState._reset_state(reset_partial_state=True)  # a page may create an Accelerator
    GradientState._reset_state()


def execute(code: str, names: dict, page: str) -> None:
    """Run one block. Its tracebacks name the page."""
    exec(compile(code, f"<{page}>", "exec"), names)


@pages_that_run()
def test_blocks_of_page_run(page, folder):
    torch.manual_seed(0)
    names = {"__name__": "__main__"}
    write_files(page, folder)
    for block in blocks(page):
        if block.language in ("python", "setup") and not block.title:
            execute(block.code, names, NAMES[page])
    for block in blocks(page):
        for command in commands(block) if (block.language, block.title) == RUN else ():
            assert command.startswith("kcd ")
            done = run(*shlex.split(command)[1:], cwd=folder)
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", NAMES, ids=NAMES.get)
def test_commands_of_page_have_valid_options(page, folder):
    """Parse every command that the page shows. Its data, teachers and runs need not exist."""
    write_files(page, folder)
    for block in blocks(page):
        for command in commands(block):
            if "$" not in command:  # a loop of the shell
                words = shlex.split(re.sub(r"^.*-m kcd_ext\.cli", "kcd", command))[1:]
                cli._parse([word for word in words if word not in cli.HELP_FLAGS])


@pytest.mark.parametrize("page", NAMES, ids=NAMES.get)
def test_blocks_of_page_are_marked(page):
    """A fence without a language, or with one that no test knows, would be shown without being checked."""
    for block in blocks(page):
        assert block.language in ("setup", "python", "bash", "text", "cpp", "json", "yaml"), block
    text = re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.S)
    assert len(re.findall(r"^ *(?:```|~~~)", text, re.M)) == 2 * sum(
        block.language != "setup" for block in blocks(page)
    )


@pytest.mark.parametrize("page", NAMES, ids=NAMES.get)
def test_links_of_page_exist(page):
    """`mkdocs build --strict` checks the site's links; this also checks links to files outside it."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    paths = [page.parent / target for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", text)]
    paths += [ROOT / name for name in re.findall(r"`((?:kcd_ext|csrc|python_tests|benchmarks|docs)/[\w/.-]*)`", text)]
    if not BENCHMARKS.exists():  # as in a source distribution
        paths = [path for path in paths if not path.resolve().is_relative_to(BENCHMARKS)]
    assert [path for path in paths if not path.exists()] == []


# What the README claims, beyond running

PYTHON = snippets(README)


@pytest.fixture
def names():
    """The variables that a reader of the README has already."""
    names = {}
    execute(READER, names, "READER")
    return names


def test_readme_is_at_most_100_lines():
    assert len(README.read_text().splitlines()) <= 100


def test_readme_has_no_placeholder():
    """No figure is still to be filled in."""
    text = re.sub(r"`[^`]*`", "", README.read_text())
    assert not re.search(r"\b[A-Z]+_[A-Z]+\b", text)


def test_readme_loss_equals_the_loss_that_it_replaces(names):
    lines = PYTHON[0].splitlines(keepends=True)
    (same,) = (i for i, line in enumerate(lines) if line.startswith("# The same loss"))
    (fewer,) = (i for i, line in enumerate(lines) if line.startswith("# Distil only"))
    losses = []
    for end in (same, fewer, len(lines)):
        execute("".join(lines[:end]), names, "README")
        losses.append(names["loss"].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] != pytest.approx(losses[0], rel=1e-5)


def test_readme_loop_condenses_and_learns(names):
    student, visits = names["student"], []
    names["student"] = lambda x: visits.append(len(x)) or student(x)
    execute(PYTHON[1].replace("range(240)", "range(12)").replace("every=40", "every=2"), names, "README")
    condenser = names["condenser"]
    assert condenser.stage == 6 and len(condenser.kept) == 28 and condenser.mix_trees
    assert sum(visits) == 2 * (40 + 38 + 36 + 34 + 32 + 30)
    images = torch.stack([x for x, _ in names["dataset"]]).float() / 10
    assert F.cross_entropy(student(images), torch.arange(40) % 10) < 2.3


def test_readme_trainer_prints_what_it_visited(tmp_path, capsys):
    execute(PYTHON[2].replace("epochs=12", "epochs=4").replace("runs/mine", str(tmp_path)), {}, "README")
    accuracy, visits, teacher_visits = map(float, capsys.readouterr().out.split())
    # Six stages of four epochs: 1083 samples, then int(1083 * 0.3 / 6) = 54 fewer in each.
    assert accuracy > 70 and visits == teacher_visits == sum(4 * (1083 - 54 * stage) for stage in range(6))


def test_readme_commands_are_those_of_ci():
    lines = re.findall(r"^python3 -m venv .*$", README.read_text(), re.M)
    assert [line.split("&& ")[-1] for line in lines] == [".venv/bin/kcd demo", ".venv/bin/pytest -n auto"]
    assert all("-c constraints.txt" in line for line in lines)
