"""kcd distill, kcd teacher and kcd report: run, killed, resumed, and called with invalid options."""

import json
import os
import re
import shutil
import signal
from statistics import mean, stdev

import numpy as np
import pytest
import torch
from commands import NO_LAUNCHER_ENV, TORCHRUN, Page, contents, limit_files_to, run, stop
from safetensors.torch import load_file

from kcd_ext import cli, files, models
from kcd_ext.commands import teachers
from kcd_ext.data.images import load, split

SMALL = ["--data", "digits", "--epochs", "4", "--threads", "1", "--device", "cpu"]
TWO_SEEDS = ["distill", *SMALL, "--method", "kc-kd", "--seed", "5", "--seeds", "2", "--output", "two"]
RUN = {"config.json", "metrics.jsonl", "checkpoint", "student.safetensors", "summary.json"}
RUN |= {"model.json", "ranking.json", "thumbnails.png"}
REPORT = {"report.html", "report.png"}
TIMES = ("seconds", "condensation_seconds")


def names(folder):
    return {path.name for path in folder.iterdir()}


def lines(folder):
    """Return the lines of metrics.jsonl without times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]


def outcome(folder):
    """Return the student's weights and every line of metrics without times."""
    return (folder / "student.safetensors").read_bytes(), lines(folder)


def result(folder):
    return json.loads((folder / "summary.json").read_text())["results"]


def recipe(folder):
    return json.loads((folder / "config.json").read_text())["recipe"]


def parsed(*arguments):
    """Return the command object for these arguments."""
    return cli._parse(list(arguments)).__self__


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a finished teacher, `teacher`, and finished runs of two seeds, `two`. Do not change it."""
    folder = tmp_path_factory.mktemp("home")
    assert cli.main(["teacher", *SMALL, "--output", str(folder / "teacher")]) == 0
    done = run(*TWO_SEEDS, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    (folder / "printed").write_text(done.stdout)
    return folder


# --- files of a run ---------------------------------------------------------------------------------------------------


def read(path):
    """Return a page with the tables of kept samples by class moved to `by_class`."""
    page = Page(path.read_text())
    page.by_class = page.without_classes()
    return page


def cells(results):
    """Return the expected row of the table, from the numbers of summary.json."""

    def spread(name, form):
        numbers = [r[name] for r in results]
        return f"{mean(numbers):{form}} ± {stdev(numbers):{form}}" if len(numbers) > 1 else f"{numbers[0]:{form}}"

    visits = [f"{mean(r[name] for r in results):,.0f}" for name in ("sample_visits", "teacher_visits")]
    share = sum(r["condensation_seconds"] for r in results) / sum(r["seconds"] for r in results)
    flops = f"{mean(r['flops'] for r in results) / 1e9:.4g} G"
    accuracies = [spread(f"accuracy_{name}", ".2f") for name in ("last", "best")]
    return [*accuracies, *visits, flops, spread("seconds", ".1f"), f"{100 * share:.1f} %"]


def test_runs_of_several_seeds_write_their_folders_and_one_report(home):
    folder = home / "two"
    assert names(folder) == {"seed-5", "seed-6", "teacher", "config.json", "metrics.jsonl", "summary.json", *REPORT}
    assert names(folder / "seed-5") == names(folder / "seed-6") == names(folder / "teacher") == RUN
    runs = [folder / "seed-5", folder / "seed-6"]
    assert [recipe(run)["seed"] for run in (*runs, folder / "teacher")] == [5, 6, 5]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["dataset"], summary["seeds"]) == ("digits", [5, 6])
    assert summary["results"] == [*result(runs[0]), *result(runs[1])]
    assert [r["method"] for r in summary["results"]] == ["kc-kd", "kc-kd"]
    assert outcome(runs[0]) != outcome(runs[1])

    page = read(folder / "report.html")
    assert all(reference.startswith(("data:image/png;base64,", "#")) for reference in page.references)
    rows = {"teacher": cells(result(folder / "teacher")), "kc-kd": cells(summary["results"])}
    assert {row[0]: row[1:] for row in page.rows[1:]} == rows
    (by_class,) = page.by_class  # of the first seed; the classes of digits have no names
    steps = [step for line in files.read_lines(runs[0] / "metrics.jsonl") if (step := line["condensation"])]
    assert by_class[0] == ["class", *(f"stage {step['stage']}" for step in steps)]
    assert by_class[4] == ["class 3", *(str(step["classes"][3]) for step in steps)]
    assert by_class[-1] == ["all", *(f"{step['kept']:,}" for step in steps)]
    assert (page.drawings, page.images) == (4, 32)
    printed = [re.split(r" {2,}", line) for line in (home / "printed").read_text().splitlines()]
    assert {row[0]: row[1:] for row in printed if row[0] in rows} == rows

    about = json.loads((folder / "seed-5" / "config.json").read_text())["about"]
    assert (about["dataset"], about["student"], about["teacher"]) == ("digits", "cnn_small", "cnn_large")
    views = load("digits").train.views
    normalisation = {"mean": [*views.mean], "std": [*views.std]}
    assert about["data"] == {
        "spec": "digits",
        "size": None,
        "augment": "none",
        "padding": 0,
        "flip": False,
        **normalisation,
    }
    assert about["teacher_normalisation"] == normalisation
    assert np.array_equal(load(**about["data"]).train.images, load("digits").train.images)


def test_teacher_run_writes_loadable_weights(home):
    assert names(home / "teacher") == RUN | REPORT
    assert recipe(home / "teacher")["method"] == "ce" and result(home / "teacher")[0]["method"] == "teacher"
    network = models.build("cnn_large", in_channels=1, num_classes=10)
    network.load_state_dict(load_file(home / "teacher" / "student.safetensors"))


def test_run_is_the_same_alone_and_among_several_seeds(home, here, capfd):
    teacher = home / "two" / "teacher"
    assert cli.main(["distill", *SMALL, "--method", "kc-kd", "--seed", "6", "--teacher", str(teacher)]) == 0
    out, error = capfd.readouterr()
    alone = here / "runs" / "digits-cnn_small-kc-kd-6"
    assert error == "" and out.endswith("report: runs/digits-cnn_small-kc-kd-6/report.html\n")
    assert names(alone) == RUN | REPORT and outcome(alone) == outcome(home / "two" / "seed-6")
    assert json.loads((alone / "config.json").read_text())["about"]["teacher"] == f"cnn_large of {teacher}"


# --- interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_interrupted_runs_resume_bit_for_bit(home, here, capfd):
    code, out, error = stop(*TWO_SEEDS, "--resume", cwd=here, until="two/teacher/metrics.jsonl", number=signal.SIGKILL)
    assert (code, out, error) == (-signal.SIGKILL, "", "kcd: nothing to resume in two: starting from the beginning\n")

    def second():
        everything = contents(here)
        assert cli.main([*TWO_SEEDS, "--resume"]) == 2
        message = "kcd: another kcd is running in two: wait for it, or choose another --output\n"
        assert capfd.readouterr().err == message and contents(here) == everything

    code, out, error = stop(
        *TWO_SEEDS, "--resume", cwd=here, until="two/seed-5/metrics.jsonl", number=signal.SIGINT, meanwhile=second
    )
    assert (code, out, error) == (130, "", "kcd: interrupted: run the command again with --resume to continue in two\n")
    everything = contents(here)
    for more, message in (
        ([], "output two already holds teacher: give --resume to continue its run, or choose another --output"),
        (
            ["--resume", "--epochs", "5"],
            "two/teacher was run with epochs=4, got epochs=5: a resumed run must not change it",
        ),
        (["--resume", "--seeds", "1"], "output two holds several seeds: give the same --seeds, or choose another"),
    ):
        assert cli.main([*TWO_SEEDS, *more]) == 2
        assert capfd.readouterr().err.startswith(f"kcd: {message}")
        assert contents(here) == everything
    assert cli.main([*TWO_SEEDS, "--resume"]) == 0
    assert capfd.readouterr().err == ""
    for name in ("teacher", "seed-5", "seed-6"):
        assert outcome(here / "two" / name) == outcome(home / "two" / name)
    assert cli.main([*TWO_SEEDS, "--seeds", "3", "--resume"]) == 0  # one more
    assert [r["seed"] for r in result(here / "two")] == [5, 6, 7]
    assert outcome(here / "two" / "seed-6") == outcome(home / "two" / "seed-6")


@pytest.mark.slow
def test_run_resumes_after_files_could_not_grow(home, here, capfd):
    """A limit on file sizes simulates a full disk: the teacher's files fit, the condenser's state does not."""
    shutil.copytree(home / "two" / "teacher", here / "two" / "teacher")
    before = contents(here / "two")
    done = run(*TWO_SEEDS, "--resume", cwd=here, preexec_fn=limit_files_to(20_000))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert re.match(r"kcd: File too large: two/", done.stderr)
    assert before.items() <= contents(here / "two").items()
    assert cli.main([*TWO_SEEDS, "--resume"]) == 0
    assert outcome(here / "two" / "seed-6") == outcome(home / "two" / "seed-6")


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_write_one_run_and_report_errors_once(here):
    done = run("distill", *SMALL, "--output", "run", cwd=here, launcher=TORCHRUN, env=NO_LAUNCHER_ENV)
    assert done.returncode == 0, done.stderr
    assert names(here / "run") == RUN | REPORT | {"teacher"}
    config = json.loads((here / "run" / "config.json").read_text())
    assert config["processes"] == 2
    assert result(here / "run")[0]["sample_visits"] == 4 * 1083
    assert len(re.findall(r"^kd ", done.stdout, re.MULTILINE)) == 1 and done.stdout.count("report: ") == 1
    assert result(here / "run")[0]["teacher_accuracy"] == lines(here / "run" / "teacher")[-1]["accuracy"] > 80

    refused = run("distill", *SMALL, "--output", "run", cwd=here, launcher=TORCHRUN, env=NO_LAUNCHER_ENV)
    said = [line for line in refused.stderr.splitlines() if line.startswith("kcd:")]
    assert refused.returncode != 0 and len(said) == 1 and "output run already holds config.json" in said[0]


# --- teachers ---------------------------------------------------------------------------------------------------------


def test_teacher_is_found_as_folder_file_and_name(home, here):
    data = load("digits")
    weights = load_file(home / "teacher" / "student.safetensors")
    (here / "model.safetensors").write_bytes((home / "teacher" / "student.safetensors").read_bytes())
    torch.save(weights, here / "plain.pt")
    torch.save({"epoch": 240, "model": weights, "best_acc": torch.tensor(75.0)}, here / "repdistiller.pth")
    torch.save({"state_dict": {f"module.{name}": x for name, x in weights.items()}}, here / "parallel.pth")
    strange = here / os.fsdecode(b"\xff")  # not valid UTF-8
    shutil.copytree(home / "teacher", strange)
    shutil.copy(here / "plain.pt", strange / "plain.pt")
    (here / "cnn_large").mkdir()  # a network's name takes precedence over a folder
    found = {
        str(home / "teacher"): None,
        str(strange): None,
        str(strange / "plain.pt"): "cnn_large",
        **{str(path): "cnn_large" for path in here.iterdir() if path.is_file()},
    }
    assert len(found) == 7
    for spec, network in found.items():
        state = teachers.find(spec, None, network).build(data, seed=1).state_dict()
        assert state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in weights)
    fresh = [teachers.find("cnn_large", None, None).build(data, seed=seed).state_dict() for seed in (1, 1, 2)]
    first, same, other = (state["0.0.weight"] for state in fresh)
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.slow
def test_weights_file_teaches_like_the_run_it_came_from(home, here):
    torch.save({"model": load_file(home / "teacher" / "student.safetensors")}, here / "teacher.pth")
    common = ["distill", *SMALL, "--epochs", "2"]
    assert cli.main([*common, "--teacher", str(home / "teacher"), "--output", "folder"]) == 0
    file = ["--teacher", "teacher.pth", "--teacher-network", "cnn_large"]
    assert cli.main([*common, *file, "--output", "file"]) == 0
    assert outcome(here / "folder") == outcome(here / "file") and not (here / "file" / "teacher").exists()
    (trained, _), (measured, _) = (read(here / name / "report.html").rows[1:] for name in ("folder", "file"))
    accuracy = lines(home / "teacher")[-1]["accuracy"]
    assert trained[:3] == ["teacher", *cells(result(home / "teacher"))[:2]] and trained[1] == f"{accuracy:.2f}"
    assert measured == ["teacher", trained[1], *["-"] * 6]
    assert [result(here / name)[0]["teacher_accuracy"] for name in ("folder", "file")] == [accuracy, accuracy]


def inverted():
    """Digits with inverted pixels."""
    data = load("digits")
    return split("inverted", 255 - data.train.images, data.train.labels, 0.2)


@pytest.mark.slow
def test_teacher_of_other_images_is_measured_on_the_students_images(home, here, capfd):
    other = ["--data", f"{__name__}:inverted", "--student", "cnn_small", "--teacher", str(home / "teacher")]
    assert cli.main(["distill", *SMALL, *other, "--epochs", "1", "--output", "run"]) == 0
    normalised, trained_on, warned = capfd.readouterr().err.splitlines()
    assert normalised.startswith(
        f"kcd: teacher {home / 'teacher'} gets images normalised as in its training, with mean 0.3056 and"
    )
    assert (
        trained_on == f"kcd: warning: teacher {home / 'teacher'} was trained on digits, not on these images of inverted"
    )
    data, network = inverted().test, models.build("cnn_large", in_channels=1, num_classes=10)
    network.load_state_dict(load_file(home / "teacher" / "student.safetensors"))
    x = load("digits").train.views.normalize(torch.from_numpy(data.images))
    with torch.no_grad():
        accuracy = 100 * (network.eval()(x).argmax(1).numpy() == data.labels).mean()
    assert warned.startswith(f"kcd: warning: the teacher's accuracy on the test set is {accuracy:.1f} %, and always")
    row, _ = read(here / "run" / "report.html").rows[1:]
    assert row[:2] == ["teacher", f"{accuracy:.2f}"]


@pytest.mark.slow
def test_method_without_teacher_trains_only_the_student(here):
    assert cli.main(["distill", *SMALL, "--method", "kc-ce", "--output", "run", "--condense.batch-keep", "1"]) == 0
    assert names(here / "run") == RUN | REPORT
    assert [row[0] for row in read(here / "run" / "report.html").rows[1:]] == ["kc-ce"]


# --- options ----------------------------------------------------------------------------------------------------------


def test_prefix_kc_turns_condensation_on():
    def parsed_recipe(*arguments):
        return parsed("distill", "--data", "digits", *arguments).study().runs[-1].recipe

    assert parsed_recipe("--method", "kc-pkt") == parsed_recipe("--method", "pkt", "--condense.keep", "0.7")
    assert parsed_recipe("--method", "kc-pkt").label == "kc-pkt"
    assert parsed_recipe("--method", "kc-kd", "--condense.keep", "0.5").condense.keep == 0.5
    assert parsed_recipe("--method", "kc-kd", "--condense.keep", "1").condense.keep == 1
    assert parsed_recipe("--method", "kd").condense.keep == 1
    (run,) = parsed("teacher", "--data", "digits", "--method", "kc-ce").study().runs
    teacher = run.recipe
    assert (teacher.method, teacher.condense.keep, teacher.label) == ("ce", 0.7, "teacher")


def test_method_options_are_converted_to_the_types_of_the_method():
    def options(method, *words):
        study = parsed("distill", "--data", "digits", "--method", method, "--options", *words).study()
        return dict(study.runs[-1].recipe.options)

    assert options("kd", "temperature", "2", "kd_weight", "1e-3") == {"temperature": 2, "kd_weight": 0.001}
    assert options("pkt", "student_layer", "2", "teacher_layer", "1.10") == {
        "student_layer": "2",
        "teacher_layer": "1.10",
    }
    assert options("sskd", "head_milestones", "0.5,0.75") == {"head_milestones": "0.5,0.75"}
    assert options("pwkd", "partial", "False", "widths", "0.5,1") == {"partial": False, "widths": "0.5,1"}
    with pytest.raises(TypeError, match="kd_weight must be a finite number, got str 'much'"):
        options("kd", "kd_weight", "much")


def test_every_field_of_the_recipe_has_an_option():
    options = "--epochs 9 --batch-size 7 --gradient-accumulation 2 --lr 0.5 --momentum 0.25 --weight-decay 0.125"
    options += (
        " --optimizer sgd --schedule milestones --warmup-epochs 1.5 --clip-norm 2 --ema 0.75 --keep-best --patience 4"
    )
    options += " --milestones 0.5 0.75 --gamma 0.2 --seed 8 --device cpu --precision bfloat16 --compile --name it"
    options += " --method crd --options dim 64 temperature 0.5 student_layer fc"
    options += " --condense.keep 0.5 --condense.every 2 --condense.stages 3 --condense.schedule cosine"
    options += " --condense.alpha 0.5 --condense.epsilon 0.25 --condense.no-accumulate --condense.no-convex"
    options += " --condense.selection value --condense.value kl --condense.batch-keep 0.75"
    options += " --condense.warmup 3 --condense.min-per-class 4 --mixup 0.25 --cutmix 1.5 --label-smoothing 0.125"
    assert parsed("distill", *options.split()).recipe.as_json() == {
        "method": "crd",
        "options": {"dim": "64", "temperature": "0.5", "student_layer": "fc"},
        "condense": {
            "keep": 0.5,
            "every": 2,
            "stages": 3,
            "schedule": "cosine",
            "alpha": 0.5,
            "epsilon": 0.25,
            "accumulate": False,
            "convex": False,
            "selection": "value",
            "value": "kl",
            "warmup": 3,
            "min_per_class": 4,
            "batch_keep": 0.75,
        },
        "epochs": 9,
        "batch_size": 7,
        "gradient_accumulation": 2,
        "optimizer": "sgd",
        "lr": 0.5,
        "momentum": 0.25,
        "weight_decay": 0.125,
        "schedule": "milestones",
        "milestones": [0.5, 0.75],
        "gamma": 0.2,
        "warmup_epochs": 1.5,
        "clip_norm": 2.0,
        "ema": 0.75,
        "keep_best": True,
        "patience": 4,
        "mixup": 0.25,
        "cutmix": 1.5,
        "label_smoothing": 0.125,
        "seed": 8,
        "device": "cpu",
        "precision": "bfloat16",
        "compile": True,
        "num_workers": 0,
        "name": "it",
    }


@pytest.mark.parametrize(
    ("arguments", "views"),
    [([], (0, False)), (["--padding", "2", "--flip"], (2, True)), (["--padding", "0", "--no-flip"], (0, False))],
)
def test_padding_and_flip_options_set_the_views(arguments, views):
    data = parsed("distill", "--data", "digits", *arguments).study().data
    assert (data.train.views.padding, data.train.views.flip) == views


@pytest.mark.slow
def test_augmentation_and_mixing_options_reach_the_run(here, capsys):
    options = ["--augment", "trivialaugment", "--flip", "--mixup", "0.2", "--cutmix", "1"]
    assert cli.main(["distill", *SMALL, "--method", "ce", *options, "--output", "run"]) == 0
    config = json.loads((here / "run" / "config.json").read_text())
    data = config["about"]["data"]
    assert (data["augment"], data["padding"], data["flip"]) == ("trivialaugment", 0, True)
    assert load(**data).train.views.policy == "trivialaugment" and load(**data).test.views.policy is None
    assert (config["recipe"]["mixup"], config["recipe"]["cutmix"]) == (0.2, 1.0)
    other = ["--augment", "randaugment", *options[2:]]
    assert cli.main(["distill", *SMALL, "--method", "ce", *other, "--output", "run", "--resume"]) == 2
    assert "run with augment='trivialaugment', got augment='randaugment'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--augment", "crop-flip"], "augment='crop-flip' has no effect with padding=0 and flip=False"),
        (["--augment", "autoaugment"], "augment must be crop-flip, none, randaugment, trivialaugment or None"),
        (["--augment", "none", "--flip"], "augment='none' means padding=0 and flip=False"),
        (["--method", "crd", "--cutmix", "1"], "cutmix=1.0 gives every sample the shares of two classes"),
        (["--mixup", "-1"], "mixup must be a finite number >= 0, got -1.0"),
    ],
)
def test_augmentation_and_mixing_that_do_not_fit_are_refused(here, options, message, capsys):
    assert cli.main(["distill", "--data", "digits", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and [*here.iterdir()] == []


# Teacher, student and the student's learning rate, from the paper's tables and text.
PAPER = """
wrn_40_2 wrn_16_2 .05, wrn_40_2 wrn_40_1 .05, resnet56 resnet20 .05, resnet32x4 resnet8x4 .05, vgg13 vgg8 .05,
vgg13 mobilenet_v2 .01, resnet50 mobilenet_v2 .01, resnet50 vgg8 .05, resnet32x4 shufflenet_v1 .01,
resnet32x4 shufflenet_v2 .01, wrn_40_2 shufflenet_v1 .01
"""


@pytest.mark.slow
def test_presets_match_the_pairs_and_recipe_of_the_paper():
    for teacher, student, lr in (pair.split() for pair in PAPER.split(",")):
        command = parsed("distill", f"cifar100-{teacher}-{student}", "--method", "kc-kd")
        assert (command.images.data, command.images.padding, command.images.flip) == ("cifar100", None, False)
        recipe = command.recipe.resolve_method()
        assert (recipe.lr, recipe.epochs, recipe.batch_size, recipe.momentum) == (float(lr), 240, 64, 0.9)
        assert (recipe.weight_decay, recipe.gamma, recipe.condense.keep, recipe.options) == (5e-4, 0.1, 0.7, {})
        assert [round(recipe.lr_at(e) / recipe.lr, 9) for e in (149, 150, 180, 210)] == [1, 0.1, 0.01, 0.001]
        first, second = parsed("distill", f"cifar100-{teacher}-{student}", "--data", "digits").study().runs
        assert (first.network, second.network, second.recipe.lr) == (teacher, student, float(lr))
        assert (first.recipe.lr, first.recipe.method, first.recipe.condense.keep) == (0.05, "ce", 1)


@pytest.mark.slow
def test_options_override_those_of_the_preset(here):
    small = ["--student", "cnn_small", "--teacher", "cnn_large", "--epochs", "2", *SMALL[:2], *SMALL[4:]]
    assert (
        cli.main(
            ["distill", "cifar100-resnet32x4-shufflenet_v1", *small, "--output", "run", "--lr", "0.02", "--name", "it"]
        )
        == 0
    )
    assert [row[0] for row in read(here / "run" / "report.html").rows[1:]] == ["teacher", "it"]
    assert (recipe(here / "run")["lr"], recipe(here / "run" / "teacher")["lr"]) == (0.02, 0.05)
    assert [line["samples"] for line in lines(here / "run")] == [1083, 1083]


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def three_channels(*, in_channels, num_classes):
    """A network that rejects grey images."""
    return torch.nn.Sequential(torch.nn.Conv2d(3, num_classes, 8), torch.nn.Flatten())


def another(*, in_channels, num_classes):
    """A network with the same parameters as cnn_small."""
    return torch.nn.Sequential(*models.build("cnn_small", in_channels=in_channels, num_classes=num_classes))


def needs_stages(*, in_channels, num_classes):
    """A network without a linear layer, so that its features cannot be found."""
    return torch.nn.Sequential(torch.nn.Conv2d(in_channels, num_classes, 8), torch.nn.Flatten())


AGAIN = ["--output", "{two}/seed-5", "--resume", "--method", "kc-kd", "--seed", "5"]
BAD = [
    (["--data", "imagenet"], "unknown data set 'imagenet'"),
    (["--data", "missing/folder"], "missing/folder"),
    (
        ["--size", "8"],
        "size is for the path of a folder of images or of a saved data set, which data set 'digits' is not",
    ),
    (["--num-workers", "2"], "num_workers=2 has no effect on images in memory"),
    (["--flip", "--no-flip"], "give --flip or --no-flip, not both"),
    (["--padding", "-1"], "padding must be an integer >= 0, got -1"),
    (["--padding", "8"], "padding must be < 8, the smaller side of the images, got 8"),
    (["--method", "kc-"], "method must have a name after kc-, as in kc-kd, got 'kc-'"),
    (
        ["--method", "nothing"],
        "unknown method 'nothing': choose from at, ce, crd, dist, dkd, fitnet, ie-dml, iekd, kd, kr, pkt, pwkd, reviewkd, sskd",
    ),
    (["--method", "kc-nothing"], "unknown method 'kc-nothing'"),
    (["--method", "os:path"], "method 'os:path' must be callable, got module"),
    (["--options", "warmth", "4"], "method 'kd' has no option 'warmth'; it takes temperature, "),
    (["--options", "temperature", "-4"], "temperature must be"),
    (
        ["--method", "iekd", "--options", "student_layer", "5"],
        r"student's layer '5' had a torch.float32 tensor of shape \(1, 10\)",
    ),
    (
        ["--method", "kr", "--options", "student_layers", "0,2", "teacher_layers", "1"],
        r"groups, got 2 \(0,2\) and 1 \(1\)",
    ),
    (["--method", "pkt", "--student", f"{__name__}:needs_stages"], "Linear"),
    (["--method", "pkt", "--condense.selection", "infobatch", "--condense.keep", ".5"], "method 'pkt' does not"),
    (["--condense.keep", "0"], r"keep must be a number in \(0, 1\], got 0"),
    (["--condense.keep", "0.5", "--condense.every", "4"], "condense.every must be < epochs=4, got 4"),
    (["--condense.selection", "infobatch", "--condense.epsilon", "0.5"], "epsilon=0.5 has no effect with selection"),
    (["--lr", "-1"], "lr must be a finite number >= 0, got -1.0"),
    (["--name", "teacher"], "name must not be 'teacher'"),
    (["--method", "ce", "--teacher", "cnn_large"], "teacher='cnn_large' has no effect with method 'ce', which uses no"),
    (
        ["--method", "ce", "--teacher-network", "cnn_large"],
        "teacher_network='cnn_large' has no effect with method 'ce'",
    ),
    (["--method", "kc-ce", "--teacher-lr", "0.1"], "teacher_lr=0.1 has no effect with method 'ce'"),
    (
        ["--teacher", "{teacher}", "--teacher-lr", "0.1"],
        "teacher_lr=0.1 has no effect: teacher .* is already trained",
    ),
    (["--output", ""], "--output must not be empty"),
    (
        ["--condense.selection", "random"],
        "condense.selection='random' has no effect with condense.keep=1: use --method kc-kd",
    ),
    (["--condense.every", "2", "--condense.batch-keep", "0.5"], "condense.every=2 has no effect with condense.keep=1"),
    (["--teacher="], "--teacher must not be empty"),
    (["--precision", "int8"], "precision must be auto, float32, bfloat16, float16, got 'int8'"),
    pytest.param(
        ["--device", "cuda"],
        "device 'cuda' is not available",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it is"),
    ),
    (["--seeds", "0"], "seeds must be an integer >= 1, got 0"),
    (["--seed", str(2**64 - 1), "--seeds", "2"], "seed must be an integer in"),
    (["--threads", "0"], r"threads must be an integer in \[1, 4096\], got 0"),
    (["--student", "resnet"], "unknown model 'resnet'"),
    (["--student", f"{__name__}:three_channels"], "student does not take x of torch.float32"),
    (["--teacher", "resnet"], "unknown teacher 'resnet': neither a file, a folder nor one of the networks cnn_large, "),
    (["--teacher", "cnn_large", "--teacher-network", "cnn_small"], "teacher_network='cnn_small' has no effect"),
    (["--teacher", "empty"], "teacher empty is not the folder of a finished run: it has no student.safetensors"),
    (["--teacher", "{two}"], "two is not the folder of a finished run"),
    (["--teacher", "bare"], "bare/config.json"),
    (["--teacher", "text.pt"], "text.pt cannot be read as weights: it is damaged or contains more than tensors"),
    (["--teacher", "text.safetensors"], "text.safetensors cannot be read as weights"),
    (["--teacher", "bomb.pt"], r"bomb.pt cannot be read as weights: it names posix.mkdir, which is neither a"),
    (["--teacher", "numbers.pt"], r"numbers.pt must contain tensors by name \(a state_dict\)"),
    (
        ["--teacher", "{two}/seed-5", "--teacher-network", "cnn_large"],
        r"weights in .*/seed-5 do not fit network 'cnn_large' for digits \(10 classes\): 0.0.weight has shape "
        r"\(4, 1, 3, 3\), the network's has \(16, 1, 3, 3\)",
    ),
    (["--teacher", "less.pt"], "less.pt do not fit network 'cnn_large' for digits .*: they have no 7.bias"),
    (["--teacher", "more.pt"], "more.pt do not fit network .*: they have extra, which the network does not have"),
    (["nothing"], "unknown preset 'nothing': choose from cifar100-wrn_40_2-wrn_16_2, "),
    (["--data", "missing.npz"], "missing.npz"),
    (["--output", "dangling/run"], "output dangling is a broken link to nowhere"),
    (["--output", "text.pt"], "output text.pt is a file: choose another --output"),
    (["--output", "text.pt/run"], "Not a directory"),
    (["--output", "{two}/seed-5"], "seed-5 already holds config.json: give --resume"),
    (["--output", "{two}", "--resume"], "two holds several seeds"),
    (["--output", "{two}/seed-5", "--resume", "--seeds", "2"], "seed-5 holds a single run: give the same --seeds"),
    (
        ["--output", "{two}", "--resume", "--seed", "6", "--seeds", "2"],
        "two holds seed-5, which is not one of these runs",
    ),
    (["--output", "{teacher}", "--resume"], "teacher was run with student='cnn_large', got student='cnn_small'"),
    ([*AGAIN, "--seed", "4"], "seed-5 was run with seed=5, got seed=4"),
    ([*AGAIN, "--student", f"{__name__}:another"], "seed-5 was run with student='cnn_small', got student='.*:another'"),
    ([*AGAIN, "--padding", "1"], "seed-5 was run with padding=0, got padding=1"),
    (
        [*AGAIN, "--data", f"{__name__}:inverted", "--student", "cnn_small", "--teacher", "cnn_large"],
        "seed-5 was run with spec='digits', got spec='.*:inverted'",
    ),
    (["--output", "/proc/kcd/run"], "No such file or directory: /proc/kcd"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_invalid_distill_option_is_one_line_and_changes_nothing(arguments, message, home, here, capfd):
    (here / "empty").mkdir()
    (here / "bare").mkdir()
    (here / "dangling").symlink_to("nowhere")
    (here / "text.pt").write_text("weights")
    (here / "text.safetensors").write_text("weights")
    weights = load_file(home / "teacher" / "student.safetensors")
    (here / "bare" / "student.safetensors").write_bytes((home / "teacher" / "student.safetensors").read_bytes())
    torch.save({"model": Bomb()}, here / "bomb.pt")
    torch.save({"model": {"accuracy": 3}}, here / "numbers.pt")
    torch.save({name: x for name, x in weights.items() if name != "7.bias"}, here / "less.pt")
    torch.save({**weights, "extra": torch.zeros(1)}, here / "more.pt")
    before, theirs = contents(here), contents(home)
    filled = [argument.format(two=home / "two", teacher=home / "teacher") for argument in arguments]
    assert cli.main(["distill", *SMALL, *filled]) == 2
    out, error = capfd.readouterr()
    assert out == "" and (error.startswith("╭") or (error.count("\n"), error[:5]) == (1, "kcd: "))  # tyro's, or ours
    assert re.search(message, " ".join(error.replace("│", " ").split())), error
    assert contents(here) == before and contents(home) == theirs and not (here / "executed").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "kd"], "method 'kd' needs a teacher: use ce, or run kcd distill"),
        (["--data", "NPZ"], "--network is required: there is no default network for data 'NPZ'"),
        (["--network", "nothing"], "unknown model 'nothing'"),
    ],
)
def test_invalid_teacher_option_is_one_line_and_changes_nothing(arguments, message, here, capfd):
    np.savez(here / "images.npz")
    assert cli.main(["teacher", *SMALL, *[a.replace("NPZ", f"{__name__}:digits") for a in arguments]]) == 2
    assert message.replace("NPZ", f"{__name__}:digits") in capfd.readouterr().err and names(here) == {"images.npz"}


def digits():
    return load("digits")


# --- kcd report -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed_runs(home, tmp_path_factory):
    """Copies of runs: finished, in the layout of a demo, unfinished, and started without a finished epoch."""
    folder = tmp_path_factory.mktemp("mixed_runs")
    teacher = ["--teacher", str(home / "two" / "teacher")]
    assert cli.main(["distill", *SMALL, *teacher, "--lr", "0.04", "--output", str(folder / "kd")]) == 0
    shutil.copytree(home / "two", folder / "two")
    shutil.copytree(home / "two" / "seed-5", folder / "demo" / "checkpoint" / "seed-5" / "kc-kd")
    shutil.copytree(home / "two" / "teacher", folder / "demo" / "checkpoint" / "seed-5" / "teacher")
    (folder / "demo" / "config.json").write_text('{"command": "kcd demo"}')
    shutil.copytree(folder / "kd", folder / "half")
    (folder / "half" / "summary.json").unlink()
    kept = (folder / "kd" / "metrics.jsonl").read_text().splitlines(keepends=True)[:3]
    (folder / "half" / "metrics.jsonl").write_text("".join(kept))
    (folder / "begun").mkdir()
    (folder / "begun" / "config.json").write_text((folder / "kd" / "config.json").read_text())
    return folder


def test_report_of_two_methods_shows_results_and_differences(mixed_runs, here, capfd):
    assert cli.main(["report", str(mixed_runs / "two"), str(mixed_runs / "kd"), "--output", "page.html"]) == 0
    out, error = capfd.readouterr()
    assert (error, names(here)) == ("", {"page.html", "page.png"})
    page = read(here / "page.html")
    visits = [r["sample_visits"] for r in (*result(mixed_runs / "two"), *result(mixed_runs / "kd"))]
    assert visits[0] == visits[1] < visits[2]
    rows = {row[0]: row[1:] for row in page.rows[1:4]}
    (teacher,) = result(mixed_runs / "two" / "teacher")  # of both
    assert rows["teacher"][:2] == cells([teacher])[:2] and rows["teacher"][4:] == cells([teacher])[4:]
    part = f"{visits[0]:,} ({100 * visits[0] / visits[2]:.1f} %)"
    assert rows["kc-kd"] == [*cells(result(mixed_runs / "two"))[:2], part, part, *cells(result(mixed_runs / "two"))[4:]]
    full = f"{visits[2]:,} (100.0 %)"
    assert rows["kd"] == [*cells(result(mixed_runs / "kd"))[:2], full, full, *cells(result(mixed_runs / "kd"))[4:]]
    trained = json.loads((mixed_runs / "kd" / "config.json").read_text())["about"]["teacher"]
    assert page.rows[4:] == [
        ["run", "lr", "condense.keep", "teacher"],
        ["kc-kd", "0.05", "0.7", "cnn_large"],
        ["kd", "0.04", "1.0", trained],
    ]
    assert page.headings[0] == "kc-kd, kd on digits" and "Knowledge values of kc-kd, stage by stage" in page.headings
    assert all(reference.startswith(("data:image/png;base64,", "#")) for reference in page.references)
    assert (page.drawings, page.images) == (4, 32)
    for row in page.rows:
        assert re.search(r" {2,}".join(map(re.escape, row)), out)


def test_report_groups_runs_of_demo_and_distill_by_seed(mixed_runs, here):
    paths = [mixed_runs / "demo", mixed_runs / "two" / "seed-6", mixed_runs / "two" / "seed-5" / ".." / "seed-6"]
    assert cli.main(["report", *map(str, paths)]) == 0
    rows = {row[0]: row[1:] for row in read(here / "report.html").rows[1:3]}
    assert rows.keys() == {"kc-kd", "teacher"}  # seeds 5 and 6 form one group whatever their folders; 6 counts once
    assert rows["kc-kd"] == cells(result(mixed_runs / "two"))


@pytest.mark.slow
def test_runs_with_equal_seed_are_listed_separately(mixed_runs, here):
    assert cli.main(["report", str(mixed_runs / "two"), str(mixed_runs / "demo")]) == 0
    labels = [row[0] for row in read(here / "report.html").rows[1:4]]
    two, demo = (f"kc-kd ({mixed_runs / name})" for name in ("two", "demo"))
    assert labels == [two, "teacher", demo]  # runs keep the order of their command


def test_report_depends_only_on_the_run_folders(home, here):
    """A second report is identical. With a changed or missing teacher run it shows the measured accuracy instead."""
    shutil.copytree(home / "two", here / "two")
    before, args = contents(here), ["report", "two", "--output", "two/report.html"]
    assert cli.main(args) == 0 and contents(here) == before
    accuracy = result(here / "two" / "seed-6")[0]["teacher_accuracy"]
    assert read(here / "two" / "report.html").rows[1][1:] == cells(result(home / "two" / "teacher"))
    for change in (lambda path: path.write_text(path.read_text() + "\n"), lambda path: shutil.rmtree(path.parent)):
        change(here / "two" / "teacher" / "metrics.jsonl")
        assert cli.main(args) == 0
        assert read(here / "two" / "report.html").rows[1] == ["teacher", f"{accuracy:.2f}", *["-"] * 6]


def test_run_of_an_older_version_is_reported_without_images(home, here):
    shutil.copytree(home / "two" / "seed-5", here / "run")
    config = json.loads((here / "run" / "config.json").read_text())
    del config["about"]["page"], config["about"]["teacher_run"], config["teacher_accuracy"]
    (here / "run" / "config.json").write_text(json.dumps(config))
    for name in ("ranking.json", "thumbnails.png"):
        (here / "run" / name).unlink()
    assert cli.main(["report", "run"]) == 0
    page = read(here / "report.html")
    assert (page.images, page.headings[0], [row[0] for row in page.rows]) == (0, "kc-kd on digits", ["method", "kc-kd"])


@pytest.mark.slow
def test_resume_writes_the_ranking_files_that_a_kill_left_out(home, here):
    shutil.copytree(home / "two", here / "two")
    before = contents(here)
    (here / "two" / "seed-5" / "ranking.json").unlink()
    (here / "two" / "seed-6" / "thumbnails.png").unlink()
    assert cli.main([*TWO_SEEDS, "--resume"]) == 0
    assert contents(here) == before


def test_unfinished_runs_are_reported_with_their_progress(mixed_runs, here, capfd):
    assert cli.main(["report", *(str(mixed_runs / name) for name in ("half", "begun", "two"))]) == 0
    out = capfd.readouterr().out
    for text in (out, (here / "report.html").read_text()):
        assert f"Unfinished: {mixed_runs / 'half'}: 3 of 4 epochs." in text
        assert f"Unfinished: {mixed_runs / 'begun'}: 0 of 4 epochs." in text
    row = read(here / "report.html").rows[2]
    assert row[0] == f"kd ({mixed_runs / 'half'})"
    third = json.loads((mixed_runs / "kd" / "metrics.jsonl").read_text().splitlines()[2])
    assert row[1] == f"{third['accuracy']:.2f}" and row[3] == f"{third['sample_visits']:,}"


def test_report_claims_a_saved_student_only_for_a_finished_run(here, capfd):
    run, saved = ["distill", *SMALL, "--method", "ce", "--val-fraction", "0.2", "--keep-best"], "Saved student of"
    assert cli.main([*run, "--output", "best"]) == 0
    assert saved in capfd.readouterr().out
    for name in ("summary.json", "student.safetensors", "ranking.json", "thumbnails.png"):
        (here / "best" / name).unlink(missing_ok=True)
    first = (here / "best" / "metrics.jsonl").read_text().splitlines(keepends=True)[0]
    (here / "best" / "metrics.jsonl").write_text(first)
    assert cli.main(["report", "best"]) == 0
    out = capfd.readouterr().out
    assert "Unfinished: best: 1 of 4 epochs." in out and saved not in out


def test_report_shows_odd_names_literally(mixed_runs, here, capfd):
    """A name that matplotlib would set as a formula, a lone surrogate, and a data set of another size."""
    runs = here / "runs"
    for source, folder in (("kd", "b"), ("two/seed-5", "c"), ("two/seed-6", "d")):
        shutil.copytree(mixed_runs / source, runs / folder)
    replaced("summary.json", '"kc-kd"', json.dumps("$\\foo$ <b>"))(runs / "c")
    replaced("summary.json", '"kc-kd"', json.dumps("\ud800"))(runs / "d")
    replaced("config.json", '"train": 1083', '"train": 3000')(runs / "b")
    assert cli.main(["report", "runs", "--output", "new/folder/page.html"]) == 0
    error = capfd.readouterr().err
    page = read(here / "new" / "folder" / "page.html")
    assert error == "" and [row[0] for row in page.rows[1:5]] == ["teacher", "kd", "$\\foo$ <b>", "?"]
    assert not any("%" in cell for row in page.rows[1:5] for cell in row[3:5])  # no percentages across data sets
    assert page.headings[1] == "Results, seeds 0, 5, 6"
    ids = re.findall(r' id="([^"]*)"', (here / "new" / "folder" / "page.html").read_text())
    assert len(ids) == len(set(ids)) > 100


def replaced(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


def truncated(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "is not a run folder and contains none"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged: "),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff"), "config.json is damaged: "),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json is damaged: it holds a list"),
        (replaced("config.json", '"recipe"', '"cake"'), "is not a run folder"),
        (replaced("config.json", '"epochs": 4', '"epochs": "4"'), "config.json is damaged: epochs must be an integer"),
        (
            replaced("config.json", '"epochs": 4', '"epochs": 2'),
            "its lines must be for epochs 1, 2, ... up to 2",
        ),
        (replaced("config.json", '"options": {}', '"options": 3'), "damaged: options must be an object, got int 3"),
        (replaced("metrics.jsonl", '"accuracy"', '"precision"'), "metrics.jsonl is damaged: it has no 'accuracy'"),
        (replaced("metrics.jsonl", '"epoch": 3', '"epoch": 4'), "metrics.jsonl is damaged: its lines must be"),
        (replaced("metrics.jsonl", '"counts"', '"count"'), "metrics.jsonl is damaged: it has no 'counts'"),
        (lambda folder: (folder / "metrics.jsonl").write_text(""), "nothing to report: no epoch has finished in "),
        (lambda folder: (folder / "ranking.json").write_text("{}"), "ranking.json is damaged: it has no 'labels'"),
        (replaced("ranking.json", '"class 1"', "[]"), "ranking.json is damaged: labels must be strings"),
        (
            replaced("ranking.json", '"values": [', '"values": [1,'),
            "ranking.json is damaged: it has 32 labels but 33 values",
        ),
        (
            replaced("metrics.jsonl", '"lr": 0.05', '"lr": 0.5'),
            "ranking.json belongs to another student: metrics.jsonl has",
        ),
        (truncated("thumbnails.png", 200), "ranking.json belongs to another student: thumbnails.png has"),
        (replaced("ranking.json", '"labels": [', '"label": ['), "ranking.json is damaged: it has no 'labels'"),
        (lambda folder: (folder / "summary.json").write_text("{}"), "summary.json is damaged: it has no 'results'"),
        (
            lambda folder: ((folder / "metrics.jsonl").unlink(), os.mkfifo(folder / "metrics.jsonl")),
            "must be a regular file, is a FIFO",
        ),
    ],
)
def test_damaged_run_file_is_named_in_one_line(change, message, home, here, capfd):
    shutil.copytree(home / "two" / "seed-5", here / "run")
    change(here / "run")
    before = contents(here)
    assert cli.main(["report", "run"]) == 2
    out, error = capfd.readouterr()
    assert (out, error.count("\n")) == ("", 1) and message in error
    assert contents(here) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "kcd report needs at least one run folder"),
        (["nowhere"], "nowhere is not a run folder"),
        (["{two}", "--output", "page"], "output must end in .html, got page"),
        (["{two}", "--output", "/proc/page.html"], "/proc/page.html"),
    ],
)
def test_invalid_report_argument_is_one_line_and_writes_nothing(arguments, message, home, here, capfd):
    assert cli.main(["report", *(argument.format(two=home / "two") for argument in arguments)]) == 2
    out, error = capfd.readouterr()
    assert (out, error.count("\n")) == ("", 1) and message in error and names(here) == set()


@pytest.mark.parametrize("command", [*cli.COMMANDS])
def test_help_of_every_command_is_printed(command, capsys):
    assert cli.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: kcd {command}")
    assert ("cifar100-vgg13-mobilenet_v2" in out) == (command == "distill")


@pytest.mark.slow
def test_warnings_of_check_and_run_are_printed_once(tmp_path):
    (tmp_path / "nets.py").write_text(
        "import torch\n\n\n"
        "class Pair(torch.nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x), x\n\n\n"
        "def pair(in_channels, num_classes):\n"
        "    return Pair(torch.nn.Flatten(), torch.nn.Linear(64, num_classes))\n"
    )
    options = [*SMALL, "--condense.keep", "0.9995", "--method", "kc-ce"]
    done = run("distill", *options, "--student", "nets:pair", "--output", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for warning in ("student gives a tuple of Tensor, Tensor", "drops less than one sample per stage"):
        assert done.stderr.count(warning) == 1
