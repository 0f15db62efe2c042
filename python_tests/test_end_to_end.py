"""From a folder of images to a student at work: what the commands report is what the student does with the image files."""

import json
import runpy
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import run
from pages import ROOT, blocks, commands

from kcd_ext import cli
from kcd_ext.data import load

PAGE = ROOT / "docs" / "how-to" / "end-to-end.md"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Return a folder with the images, the network and the teacher of the page. Do not change them."""
    folder = tmp_path_factory.mktemp("photos")
    for block in blocks(PAGE):
        if block.language == "python":
            (folder / block.title).write_text(block.code)
    (setup,) = [block.code for block in blocks(PAGE) if block.language == "setup"]
    subprocess.run([sys.executable, "-c", setup], cwd=folder, check=True, timeout=180)
    return folder


def kcd(*arguments, cwd):
    """Run a command and return its output."""
    done = run(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def results(folder):
    (found,) = json.loads((folder / "summary.json").read_text())["results"]
    return found


def files_of(part):
    """Return the files of images that stay on disk."""
    return [part.files.name(index) for index in range(len(part))]


def predicted_accuracy(folder, paths, cwd):
    """Return the percentage of image files that `kcd predict` assigns to the class that their folder is named after."""
    lines = [json.loads(line) for line in kcd("predict", folder, *paths, "--json", cwd=cwd).splitlines()]
    assert [line["image"] for line in lines] == [str(path) for path in paths]
    return 100 * np.mean([line["image"].split("/")[-2] == line["class"] for line in lines])


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--resize", "squash", "--memory", "1")], ids=["memory", "streamed-squash"])
def test_commands_of_page_report_the_true_accuracies_and_export_the_student(more, photos):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    distil = next(shlex.split(command) for block in blocks(PAGE) for command in commands(block))
    output = photos / f"run-{len(more)}"
    table = kcd(*distil[1:], *more, "--output", output, "--device", "cpu", "--threads", 1, cwd=photos)

    split = {"size": 16, "val_fraction": 0.15, "test_fraction": 0.15, "resize": more[1] if more else None}
    test = load(str(photos / "photos"), memory="1", **split).test
    images = np.stack([image for image, _ in test])
    network = runpy.run_path(photos / "mine.py")["teacher"](10)
    network.load_state_dict(torch.load(photos / "teacher.pth")["state_dict"])
    with torch.no_grad():
        logits = network.eval()((torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
    truth = 100 * (logits.argmax(1).numpy() == test.labels).mean()
    (row,) = [line.split() for line in table.splitlines() if line.startswith("teacher ")]
    assert truth > 90 and row[1] == f"{truth:.2f}"

    saved = results(output)
    assert saved["accuracy_best"] > 60
    history = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    best = max(history, key=lambda line: line["val_accuracy"])
    assert predicted_accuracy(output, files_of(test), photos) == pytest.approx(best["accuracy"], abs=1e-4)

    kcd("export", output, "--format", "onnx", "--output", output / "student.onnx", cwd=photos)
    described = json.loads((output / "model.json").read_text())["preprocessing"]
    mean, std = (np.array(described[name], np.float32) for name in ("mean", "std"))
    x = ((images / np.float32(255) - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    (found,) = onnxruntime.InferenceSession(output / "student.onnx").run(None, {"x": x})
    assert 100 * (found.argmax(1) == test.labels).mean() == pytest.approx(best["accuracy"], abs=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--keep-best"],
            "keep_best=True needs a validation set, got val=None: a result that the test set chose is no",
        ),
        (["--epochs", "9", "--patience", "2"], "(kcd: --val-fraction)"),
        (["--num-workers", "2"], "num_workers=2 has no effect on images in memory"),
        (["--memory", "1GB"], "memory is for the path of a folder of images or of a saved data set"),
        (["--resize", "squash"], "resize='squash' has no effect without size"),
        (["--method", "ce", "--teacher-size", "3"], "teacher_size=3 has no effect with method 'ce'"),
        (
            ["--teacher", "cnn_small", "--teacher-mean", "half"],
            "teacher_mean has no effect: the teacher is trained first",
        ),
        (["--method", "dkd", "--mixup", "0.2"], "which method 'dkd' does not take"),
        (["--optimizer", "adamw", "--momentum", "0.5"], "momentum=0.5 has no effect with optimizer 'adamw'"),
        (["--schedule", "cosine", "--gamma", "0.5"], "gamma=0.5 has no effect with schedule 'cosine'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_without_effect_together_are_one_line_and_write_nothing(words, message, here, capfd):
    base = ["distill", "--data", "digits", "--epochs", "1", "--threads", "1", "--device", "cpu", "--output", "run"]
    assert cli.main([*base, *words]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line and not [*here.iterdir()]
