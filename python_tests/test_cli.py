"""`kcd demo`, `kcd info` and errors of the command, in real processes that are interrupted or run out of space."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from statistics import mean, stdev

import commands
import numpy as np
import pytest
import torch
from commands import Page, contents, limit_files_to

from kcd_ext import __version__, cli, processes
from kcd_ext.data.images import ImageData, ImageSet, load
from kcd_ext.data.views import Views
from kcd_ext.training import checkpoint

ENTRIES = {
    "config.json",
    "metrics.jsonl",
    "summary.json",
    "checkpoint",
    "student.safetensors",
    "report.html",
    "report.png",
}
METHODS = ["teacher", "student", "kd", "kd-shorter", "random", "infobatch", "kc-kd"]
EPOCHS = {"kd-shorter": 3}  # as many visits as KC-KD makes in six epochs; other runs have six
SMALL = ["demo", "--data", "digits", "--epochs", "6", "--threads", "1", "--device", "cpu"]
WITH_TESTS = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def without_seconds(folder):
    """Return the results of a demo without times."""
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for entry in (*summary["results"], *lines):
        del entry["seconds"], entry["condensation_seconds"]
    return summary, lines


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A finished demo with two seeds. Tests that change files work on a copy."""
    folder = tmp_path_factory.mktemp("demo")
    done = commands.run(*SMALL, "--seeds", 3, 1, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "demo", done


# --- kcd demo ---------------------------------------------------------------------------------------------------------


def test_demo_writes_its_runs_and_prints_the_table(demo):
    folder, done = demo
    assert {path.name for path in folder.iterdir()} == ENTRIES
    assert [path.name for path in folder.parent.iterdir()] == ["demo"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary.keys() == {"dataset", "seeds", "results"}
    assert (summary["dataset"], summary["seeds"]) == ("digits", [3, 1])
    assert [(r["seed"], r["method"]) for r in summary["results"]] == [(s, m) for s in (3, 1) for m in METHODS]
    fields = ["method", "seed", "accuracy_last", "accuracy_best", "sample_visits", "teacher_visits", "seconds"]
    assert all(list(r) == [*fields, "condensation_seconds", "flops", "teacher_accuracy"] for r in summary["results"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(r["seed"], r["method"], r["epoch"]) for r in lines] == [
        (s, m, e) for s in (3, 1) for m in METHODS for e in range(1, EPOCHS.get(m, 6) + 1)
    ]
    config = json.loads((folder / "config.json").read_text())
    assert config["options"]["data"] == "digits" and config["options"]["seeds"] == [3, 1]

    from safetensors.torch import load_file

    saved = load_file(folder / "checkpoint" / "seed-3" / "kc-kd" / "student.safetensors")
    assert {k: v.tolist() for k, v in load_file(folder / "student.safetensors").items()} == {
        k: v.tolist() for k, v in saved.items()
    }
    for method in METHODS:
        assert re.search(rf"^{method} +\d+\.\d\d ± \d+\.\d\d ", done.stdout, re.MULTILINE)
    assert done.stderr == ""


def test_demo_students_share_weights_and_order_and_differ_in_visits(demo):
    folder, _ = demo
    summary, lines = without_seconds(folder)
    n = 1083
    condensed = n + 5 * int(0.4 * n)
    expected = {
        "teacher": (6 * n, 0),
        "student": (6 * n, 0),
        "kd": (6 * n, 6 * n),
        "kd-shorter": (3 * n, 3 * n),
        "random": (condensed, condensed),
        "kc-kd": (condensed, condensed),
    }
    assert abs(condensed - 3 * n) < 0.01 * n
    for result in summary["results"]:
        visits = (result["sample_visits"], result["teacher_visits"])
        if result["method"] == "infobatch":  # its visits depend on the losses
            assert 2 * n < visits[0] == visits[1] < 6 * n
        else:
            assert visits == expected[result["method"]]
        history = [x for x in lines if (x["method"], x["seed"]) == (result["method"], result["seed"])]
        assert result["accuracy_last"] == history[-1]["accuracy"]
        assert result["accuracy_best"] == max(line["accuracy"] for line in history) > 50
        # Same weights and order: the runs are identical until samples are dropped.
        kd_line = next(x for x in lines if x["method"] == "kd" and x["seed"] == result["seed"])
        if result["method"] in ("random", "infobatch", "kc-kd"):
            # InfoBatch's losses are weighted, so they are rounded differently.
            assert history[0]["loss"] == pytest.approx(
                kd_line["loss"], rel=1e-6 if result["method"] == "infobatch" else 0
            )
            assert history[0]["accuracy"] == kd_line["accuracy"]
    accuracy = {r["method"]: r["accuracy_best"] for r in summary["results"]}
    assert accuracy["teacher"] > accuracy["student"]


def test_demo_report_is_self_contained_and_shows_the_results(demo):
    folder, _ = demo
    source = (folder / "report.html").read_text()
    page = Page(source)
    assert page.open == [] and page.drawings == 4 + 4 * 5 and page.images == 32
    assert all(reference.startswith(("data:image/png;base64,", "#")) for reference in page.references)
    assert "<script" not in source and "@import" not in source and 'name="viewport"' in source
    text = " ".join(" ".join(page.text).split())
    for method in METHODS:
        assert f" {method} " in text
    assert "Knowledge condensation on digits" in text and torch.__version__ in text
    results = json.loads((folder / "summary.json").read_text())["results"]
    assert all(round(r[name], 4) == r[name] for r in results for name in ("accuracy_last", "accuracy_best"))
    for method in METHODS:
        last, best = ([r[f"accuracy_{name}"] for r in results if r["method"] == method] for name in ("last", "best"))
        cells = " ".join(f"{mean(numbers):.2f} ± {stdev(numbers):.2f}" for numbers in (last, best))
        assert f" {method} {cells} " in text
    for method in METHODS[2:]:  # the evaluation is that of the saved student and its own teacher
        found = [
            json.loads((folder / "checkpoint" / f"seed-{seed}" / method / "evaluation.json").read_text())["evaluation"]
            for seed in (3, 1)
        ]
        agreement, ece = (
            f"{mean(numbers):.2f} ± {stdev(numbers):.2f}"
            for numbers in ([one["agreement"] for one in found], [one["student"]["ece"] for one in found])
        )
        assert f" {agreement} {ece} " in text
        assert [one["student"]["accuracy"] for one in found] == pytest.approx(
            [r["accuracy_last"] for r in results if r["method"] == method], abs=1e-4
        )
    assert "No conclusion on whether kc-kd is better than random and kd-shorter: it takes 3 seeds or more" in text
    state = checkpoint.load(folder / "checkpoint" / "seed-1" / "kc-kd" / "checkpoint").training["condenser"]
    order = sorted(range(len(state["values"])), key=lambda i: (-state["values"][i].item(), i))
    labels = load("digits").train.labels
    shown = [(str(labels[i]), f"{state['values'][i].item():.2f}") for i in order[:16] + order[-16:]]
    assert re.findall(r"class (\d+)<br>([\d.]+)<", source) == shown
    picture = (folder / "report.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">2I", picture[16:24])[0] > 1000


@pytest.fixture
def running(tmp_path):
    """Start a demo with the same options as `demo`, and send it a signal once a file has appeared."""

    def run(until, number, *more, meanwhile=None):
        return commands.stop(
            *SMALL, "--seeds", 3, 1, *more, cwd=tmp_path, until=until, number=number, meanwhile=meanwhile
        )

    return run


@pytest.mark.slow
def test_demo_resumes_after_kill_and_interrupt_without_losing_files(demo, running, tmp_path):
    earlier, previous = tmp_path / "runs" / "demo", tmp_path / "runs" / "demo.previous"
    earlier.mkdir(parents=True)
    (earlier / "config.json").write_text('{"command": "kcd demo"}')
    (earlier / "report.html").write_text("the earlier one")
    before = {path.name: content for path, content in contents(earlier).items()}
    (earlier / "notes.txt").write_text("the user's")

    runs = "runs/demo/checkpoint"
    code, out, _ = running(f"{runs}/seed-3/teacher/metrics.jsonl", signal.SIGKILL)
    assert (code, out) == (-signal.SIGKILL, "")
    assert {path.name: content for path, content in contents(previous).items()} == before
    code, out, error = running(f"{runs}/seed-3/random/metrics.jsonl", signal.SIGINT, "--resume")
    assert (code, out, error) == (
        130,
        "",
        "kcd: interrupted: run the command again with --resume to continue in runs/demo\n",
    )
    finished = json.loads((earlier / "summary.json").read_text())["results"]
    assert [r["method"] for r in finished] == METHODS[:4]
    everything = contents(tmp_path)
    for options, message in (
        ([], r"kcd: output runs/demo already holds config.json: give --resume to continue its run, or choose another"),
        (["--resume", "--keep", "0.5"], "random was run with condense.keep=0.4, got condense.keep=0.5"),
        (["--resume", "--lr", "0.1"], "seed-3/teacher was run with lr=0.05, got lr=0.1"),
        (["--resume", "--data", f"{__name__}:constant"], "seed-3/teacher was run with spec='digits', got spec='test_"),
        (["--resume", "--seeds", "1"], "runs/demo holds checkpoint/seed-3/kd, which is not one of these runs"),
    ):
        refused = commands.run(*SMALL, "--seeds", 3, 1, *options, cwd=tmp_path, env=WITH_TESTS)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1) and re.search(message, refused.stderr)
        assert contents(tmp_path) == everything

    done = commands.run(*SMALL, "--seeds", 3, 1, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (earlier / "notes.txt").unlink()  # it was kept
    assert without_seconds(earlier) == without_seconds(demo[0])
    assert {path.name for path in earlier.iterdir()} == ENTRIES
    assert {path.name: content for path, content in contents(previous).items()} == before

    shutil.rmtree(previous)
    small = ["demo", "--data", "digits", "--epochs", "3", "--keep", "0.5", "--threads", "1", "--device", "cpu"]
    for results in ([3, 1], [0]):  # the seeds of the demo that each run replaces
        done = commands.run(*small, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads((previous / "summary.json").read_text())["seeds"] == results
    (previous / "notes.txt").write_text("the user's")
    everything = contents(tmp_path)
    refused = commands.run(*small, cwd=tmp_path)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert f"{previous} holds notes.txt: move it away" in refused.stderr and contents(tmp_path) == everything


@pytest.mark.slow
def test_second_demo_in_the_same_output_is_refused(running, tmp_path):
    def second():
        for resume, message in (
            ([], "output runs/demo already holds checkpoint"),
            (["--resume"], "another kcd is ru"),
        ):
            done = commands.run(*SMALL, "--seeds", 3, 1, *resume, cwd=tmp_path)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1)
            assert done.stderr.startswith(f"kcd: {message}")

    code, _, error = running("runs/demo/checkpoint/seed-3/teacher/metrics.jsonl", signal.SIGINT, meanwhile=second)
    assert code == 130 and "--resume" in error


@pytest.mark.slow
def test_demo_fails_in_one_line_when_files_cannot_grow(tmp_path):
    """A limit on file sizes simulates a full disk where mounting is not allowed."""
    done = commands.run(*SMALL, cwd=tmp_path, preexec_fn=limit_files_to(50_000))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("kcd: File too large: ")


@pytest.mark.slow
def test_demo_fails_in_one_line_when_the_disk_is_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        done = commands.run(*SMALL, "--output", disk / "demo", cwd=tmp_path)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("kcd: No space left on device: ")


# --- bad input --------------------------------------------------------------------------------------------------------


def constant():
    images = np.zeros((60, 8, 8, 1), np.uint8)
    part = ImageSet(images, np.arange(60) % 4, Views.from_images(images))
    return ImageData("constant", part, part, 4)


def key_error():
    raise KeyError("no such file")


def runtime_error():
    raise RuntimeError("boom\nand more")


def leaves():
    raise SystemExit(3)


def of_lists():
    return ImageData("lists", [1], [2], 2)


def three_channels(*, in_channels, num_classes):
    """A network that rejects grey images."""
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(num_classes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data", "imagenet"],
            "unknown data set 'imagenet': choose from cifar10, cifar100, digits, mnist5k, or a path such as ",
        ),
        (["--keep", "0"], r"keep must be a number in \(0, 1\], got 0.0"),
        (["--keep", "1"], "keep=1.0 drops none of 1083 samples in 24 epochs: use a smaller keep"),
        (["--keep", "0.995", "--schedule", "reference"], "keep=0.995 drops none of 1083 samples in 24 epochs"),
        (["--data", f"{__name__}:key_error"], r"data set 'test_cli:key_error' raised KeyError: 'no such file'"),
        (["--data", f"{__name__}:runtime_error"], "raised RuntimeError: boom\n"),
        (["--data", f"{__name__}:leaves"], "raised SystemExit: 3"),
        (["--data", f"{__name__}:of_lists"], "data set 'lists': train must be an ImageSet or ImageFiles, got list"),
        (["--data", "unreadable:load"], "data set 'unreadable:load': import of unreadable raised SyntaxError: "),
        (["--output", "/"], "output must not be the root folder, got /"),
        (["--seeds", str(10**22)], r"seeds must be an integer in \[0, 18446744073709551615\]"),
        (["--keep", "1.5"], r"keep must be a number in \(0, 1\], got 1.5"),
        (["--schedule", "linear"], "schedule must be one of 'reference', 'cosine', 'immediate', got 'linear'"),
        (["--epochs", "1"], "epochs must be an integer >= 2, got 1"),
        (["--seeds"], "seeds must be one or more distinct integers, got none"),
        (["--seeds", "1", "1"], "seeds must be one or more distinct integers, got 1 1"),
        (["--seeds", "-1"], r"seeds must be an integer in \[0, 18446744073709551615\], got -1"),
        (["--threads", "0"], r"threads must be an integer in \[1, 4096\], got 0"),
        (["--lr", "inf"], "lr must be a finite number"),
        (["--student", "resnet"], "unknown model 'resnet': did you mean resnet8. Choose from cnn_large, cnn_small, "),
        (["--student", f"{__name__}:three_channels"], r"student does not take x of torch.float32 \(1, 1, 8, 8\)"),
        (["--teacher", f"{__name__}:ENTRIES"], "model 'test_cli:ENTRIES' must be callable, got set of length"),
        (["--output", "file"], "is a file: choose another --output"),
        (["--output", "file/demo"], "Not a directory"),
        (["--output", "project"], "output project already holds config.json"),
        (["--output", "project", "--resume"], "output project holds a config.json that kcd demo did not write"),
        (["--output", "kept"], "kept.previous was not written by kcd demo: move it away, or choose another --output"),
        (["--output", "/proc/kcd/demo"], "No such file or directory: /proc/kcd"),
    ],
)
def test_invalid_demo_option_is_one_line_and_changes_nothing(arguments, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "unreadable.py").write_text("def")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.json").write_text("{}")
    (tmp_path / "kept.previous").mkdir()
    (tmp_path / "kept.previous" / "report.html").write_text("the user's")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "config.json").write_text('{"command": "kcd demo"}')
    (tmp_path / "kept" / "report.html").write_text("")
    before = contents(tmp_path)
    assert cli.main(["demo", "--data", "digits", *arguments]) == 2
    out, error = capfd.readouterr()
    assert (out, error.count("\n"), error[:5]) == ("", 1, "kcd: ")
    assert re.search(message, error)
    assert contents(tmp_path) == before
    assert {p.name for p in tmp_path.iterdir()} == {"file", "project", "kept", "kept.previous", "modules"}


@pytest.mark.slow
def test_process_prints_one_line_or_a_traceback_on_request(tmp_path):
    done = commands.run("demo", "--data", "imagenet", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("kcd: unknown data set 'imagenet'")
    shown = commands.run("demo", "--data", "imagenet", cwd=tmp_path, env={**os.environ, "KCD_TRACEBACK": "1"})
    assert "Traceback" in shown.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_demo_refuses_several_processes(tmp_path):
    done = commands.run(*SMALL, cwd=tmp_path, env={**os.environ, "WORLD_SIZE": "2"})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "runs in one process" in done.stderr


@pytest.mark.slow
def test_diverging_run_fails_in_one_line_after_its_warnings(tmp_path):
    done = commands.run(*SMALL, "--lr", "1e30", cwd=tmp_path)
    *warned, failed = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "") and all(line.startswith("kcd: warning: ") for line in warned)
    assert re.match(r"kcd: (the loss|weights).* not finite after epoch 1", failed)


def test_each_distinct_warning_is_printed_as_one_line(monkeypatch, capfd):
    def warn():
        for _ in range(2):
            warnings.warn("something\n  is odd", RuntimeWarning, stacklevel=1)
        print("done")

    monkeypatch.setattr(cli, "_parse", lambda arguments: warn)
    assert cli.main([]) == 0
    assert capfd.readouterr() == ("done\n", "kcd: warning: something is odd\n")


def failing(error):
    def command():
        raise error

    return lambda arguments: command


def test_interrupt_hidden_behind_an_import_error_exits_with_130(monkeypatch, capfd):
    """C modules, and modules that explain why they cannot be imported, turn Ctrl-C into an error of their own."""
    error = SystemError("initialization of spam raised unreported exception")
    error.__context__ = KeyError("a cache")
    error.__context__.__cause__ = KeyboardInterrupt()
    monkeypatch.setattr(cli, "_parse", failing(error))
    assert cli.main([]) == 130
    assert capfd.readouterr() == ("", "kcd: interrupted\n")


def set_rank(number, monkeypatch):
    monkeypatch.setenv("RANK", str(number))
    monkeypatch.setenv("WORLD_SIZE", "2")


def test_error_of_a_lost_process_is_one_line_on_every_rank(monkeypatch, capfd):
    """Backends raise several types, gloo a plain RuntimeError: once the process group exists, any error is one line."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    lost = "[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:12345"
    for error in (RuntimeError(lost), torch.distributed.DistBackendError("NCCL error\nwith a call stack")):
        monkeypatch.setattr(cli, "_parse", failing(error))
        for number, who in ((1, "kcd: process 1"), (0, "kcd")):
            set_rank(number, monkeypatch)
            first_line = str(error).splitlines()[0]
            said = f"{who}: another process of this command may have ended: {type(error).__name__}: {first_line}\n"
            assert cli.main([]) == 2 and capfd.readouterr() == ("", said)
    monkeypatch.setenv("KCD_TRACEBACK", "1")
    with pytest.raises(torch.distributed.DistBackendError):
        cli.main([])
    monkeypatch.delenv("KCD_TRACEBACK")
    monkeypatch.setenv("WORLD_SIZE", "1")  # in one process it is a bug
    with pytest.raises(torch.distributed.DistBackendError):
        cli.main([])


def test_rank_and_world_size_come_from_the_launcher_variables(monkeypatch):
    def seen(**variables):
        with monkeypatch.context() as patch:
            for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
                patch.delenv(name, raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            return processes.rank(), processes.world_size(), processes.local_world_size()

    assert seen() == seen(RANK="1") == seen(WORLD_SIZE="", RANK="x") == (0, 1, 1)
    assert seen(RANK="1", WORLD_SIZE="3") == (1, 3, 3)
    assert seen(RANK="1", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2") == (1, 4, 2)


@pytest.mark.parametrize("command", ["info", "demo", "report", "--version"])
def test_other_commands_run_on_rank_zero_only(command, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    set_rank(1, monkeypatch)
    assert cli.main([command]) == 0 and capfd.readouterr() == ("", "") and list(tmp_path.iterdir()) == []
    set_rank(0, monkeypatch)
    assert cli.main([command]) == (2 if command in ("demo", "report") else 0)
    assert sum(map(bool, capfd.readouterr())) == 1


@pytest.mark.slow
def test_closed_stdout_pipe_is_not_an_error(tmp_path):
    command = [sys.executable, "-m", "kcd_ext.cli", "info"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert (process.wait(timeout=commands.TIMEOUT), process.stderr.read()) == (0, "")
    process.stderr.close()


# --- kcd info ---------------------------------------------------------------------------------------------------------

BARE = (
    "import sys; sys.modules['tyro'] = sys.modules['accelerate'] = None; from kcd_ext.cli import main; sys.exit(main())"
)


def bare(*arguments, cwd):
    """Run the command as if the extras were not installed."""
    return subprocess.run(
        [sys.executable, "-c", BARE, *arguments], cwd=cwd, capture_output=True, text=True, timeout=commands.TIMEOUT
    )


@pytest.mark.slow
def test_info_prints_the_same_facts_without_the_extras(tmp_path):
    full, plain = commands.run("info", cwd=tmp_path), bare("info", cwd=tmp_path)
    assert (full.returncode, plain.returncode) == (0, 0), full.stderr + plain.stderr
    assert full.stdout == plain.stdout
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in full.stdout.splitlines())
    assert facts["torch"] == torch.__version__
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"kcd_ext", "platform", "processor", "threads", "torch CUDA", "CUDA driver", "CUDA devices"} <= facts.keys()
    for name in ("compiler", "instruction sets", "instruction set in use", "CUDA architectures"):
        assert facts[name]
    built = facts["CUDA compiler"].startswith("nvcc ")
    assert re.fullmatch(r"sm_\d+( sm_\d+)*" if built else "none", facts["CUDA architectures"])
    assert built or "kcd_ext.reference takes the kernels' place" in facts["CUDA compiler"]


@pytest.mark.slow
def test_command_names_the_extra_that_is_missing(tmp_path):
    done = bare("demo", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert 'pip install "kcd-ext[train]"' in done.stderr


@pytest.mark.slow
def test_version_works_without_the_extras(tmp_path):
    done = bare("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"kcd {__version__}\n", "")


@pytest.mark.slow
def test_help_is_printed_and_a_missing_command_is_an_error(tmp_path):
    done = commands.run("demo", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "--keep" in done.stdout and done.stderr == ""
    nothing = commands.run(cwd=tmp_path)
    assert (nothing.returncode, nothing.stderr.count("\n")) == (2, 1) and "demo" in nothing.stderr
