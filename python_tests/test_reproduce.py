"""benchmarks/reproduce.py: its statistics against NumPy, its constants against the paper, and the study it plans."""

import importlib.util
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kcd_ext import cli
from kcd_ext.commands.presets import CIFAR100
from kcd_ext.commands.study import Study
from kcd_ext.data.images import assemble, load
from kcd_ext.training import Recipe

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "reproduce.py"
if not SCRIPT.exists():
    pytest.skip("benchmarks/ exists in the source folder only", allow_module_level=True)

# Li et al., ECCV 2022, CIFAR-100, column by column as in the paper.
PUBLISHED = """
teacher  wrn_40_2 wrn_40_2 resnet56 resnet32x4 vgg13 vgg13        resnet50     resnet50 resnet32x4    resnet32x4    wrn_40_2
student  wrn_16_2 wrn_40_1 resnet20 resnet8x4  vgg8  mobilenet_v2 mobilenet_v2 vgg8     shufflenet_v1 shufflenet_v2 shufflenet_v1
alone    73.26    71.98    69.06    72.50      70.36 64.60        64.60        70.36    70.50         71.82         70.50
KD       74.92    73.54    70.66    73.33      72.98 67.37        67.35        73.81    74.07         74.45         74.83
KC-KD    75.70    73.84    70.75    74.05      73.44 68.61        67.94        74.41    74.33         75.19         75.60
"""


@pytest.fixture(scope="module")
def script():
    """The script as a module; it belongs to no package."""
    spec = importlib.util.spec_from_file_location("reproduce", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_paper_accuracies_match_the_published_table(script):
    teachers, students, *rows = (line.split()[1:] for line in PUBLISHED.strip().splitlines())
    columns = zip(teachers, students, *rows, strict=True)
    published = {f"{teacher}-{student}": tuple(map(float, rest)) for teacher, student, *rest in columns}
    assert published == script.PAPER
    assert list(script.PAPER) == [f"{pair.teacher}-{pair.student}" for pair in CIFAR100]


def test_learning_rates_match_the_paper(script):
    for pair in script.PAPER:
        light = re.search("-(mobilenet|shufflenet)", pair) is not None
        assert script.lr_of(pair) == (0.01 if light else 0.05)
    assert script.lr_of("resnet20-resnet8") == script.lr_of("mobilenet_v2-vgg8") == 0.05


@pytest.mark.parametrize(
    ("kind", "method", "condenser", "sizes", "mixed"),
    [
        # 1000 samples, six stages: equal steps of int(1000 * 0.3 / 6) samples, all 300 at once, or none.
        ("kd", "kd", "KnowledgeCondenser", None, None),
        ("student alone", "ce", "KnowledgeCondenser", None, None),
        ("random", "kd", "RandomCondenser", [950, 900, 850, 800, 750, 700], [0] * 6),
        ("infobatch", "kd", "InfoBatch", ..., ...),
        ("kc-kd", "kd", "KnowledgeCondenser", [950, 900, 850, 800, 750, 700], [50] * 6),
        ("kc-kd immediate", "kd", "KnowledgeCondenser", [700] * 6, [300, 0, 0, 0, 0, 0]),
        ("kc-kd unmixed", "kd", "KnowledgeCondenser", [950, 900, 850, 800, 750, 700], [0] * 6),
        ("random immediate", "kd", "RandomCondenser", [700] * 6, [0] * 6),
        ("kd, half of a batch", "kd", "KnowledgeCondenser", None, None),
    ],
)
def test_kind_selects_and_mixes_as_its_label_says(script, kind, method, condenser, sizes, mixed):
    recipe = Recipe(name=kind, **script.KINDS[kind])
    assert recipe.method == method
    condense = recipe.condense
    assert condense.batch_keep == (0.5 if kind == "kd, half of a batch" else 1)
    built = condense.build(1000, seed=0, device="cpu", epochs=24)
    assert type(built).__name__ == condenser
    if condenser == "InfoBatch":
        assert (built.config["keep"], built.config["anneal"]) == (0.5, 0.125)
        return
    steps = []
    for epoch in range(24):
        built.update(torch.arange(1000), torch.rand(1000, generator=torch.Generator().manual_seed(epoch)))
        steps.append(built.step())
    steps = [step for step in steps if step is not None]
    assert ([len(step.kept) for step in steps] or None) == sizes
    assert ([len(step.mixed) for step in steps] or None) == mixed


def test_every_kind_is_tested_and_the_baseline_is_kd(script):
    tested = {case[0] for case in test_kind_selects_and_mixes_as_its_label_says.pytestmark[0].args[1]}
    assert tested == set(script.KINDS) and script.KINDS[script.BASELINE] == {"method": "kd"}


def images(classes, train=60, test=30):
    """Return small images with shuffled classes of different sizes."""
    draw = np.random.default_rng(0)
    parts = []
    for count in (train, test):
        labels = draw.permutation(np.concatenate((np.arange(classes), draw.integers(0, classes, count - classes))))
        parts.append((draw.integers(0, 256, (count, 6, 6, 1), np.uint8), labels))
    return assemble("pixels", *parts, classes)


@pytest.mark.parametrize(("classes", "chosen"), [(2, [0, 5]), (3, [0, 3, 6]), (4, [0, 2, 5, 7]), (10, [*range(10)])])
def test_subset_holds_evenly_spaced_complete_classes(script, classes, chosen):
    data = images(10)
    arrays = script.subset(data, classes)
    assert arrays.keys() == {"x_train", "y_train", "x_test", "y_test"}
    for part in ("train", "test"):
        images_of_part = getattr(data, part)
        expected = [
            (image.tolist(), chosen.index(label))
            for image, label in zip(images_of_part.images, images_of_part.labels.tolist(), strict=True)
            if label in chosen
        ]
        found = zip(arrays[f"x_{part}"].tolist(), arrays[f"y_{part}"].tolist(), strict=True)
        assert list(found) == expected and {label for _, label in expected} == set(range(classes))


@pytest.mark.parametrize(("classes", "error"), [(1, ValueError), (11, ValueError), (2.0, TypeError)])
def test_invalid_number_of_classes_is_an_error(script, classes, error):
    with pytest.raises(error, match=r"classes must be an integer in \[2, 10\], got"):
        script.subset(images(10), classes)


def result(seed, last, best=90.0, visits=(1000, 500), seconds=8.0, condensation=0.5, flops=1.5e15):
    return {
        "seed": seed,
        "accuracy_last": last,
        "accuracy_best": best,
        "sample_visits": visits[0],
        "teacher_visits": visits[1],
        "seconds": seconds,
        "condensation_seconds": condensation,
        "flops": flops,
    }


def test_table_row_matches_hand_computed_statistics(script):
    baseline = [
        result(0, 70.0, visits=(2000, 2000)),
        result(1, 74.0, visits=(2000, 2000)),
        result(2, 66.0, visits=(2000, 2000)),
    ]
    # The gains are 1, 2 and 6 over the run with the same seed; one run took a hundred times as long.
    results = [
        result(0, 71.0, 72.0, (1000, 501), 10.0, 0.1, 1e15),
        result(1, 76.0, 77.0, (1001, 501), 1000.0, 20.0, 2e15),
        result(2, 72.0, 73.5, (1002, 502), 12.0, 0.36, 6e15),
    ]
    deviation, best, error = np.std([71, 76, 72], ddof=1), np.std([72, 77, 73.5], ddof=1), np.std([1, 2, 6], ddof=1)
    found = script.row("kc-kd", results, baseline)
    assert found == [
        "kc-kd",
        f"73.00 ± {deviation:.2f}",
        f"74.17 ± {best:.2f}",
        f"+3.00 ± {error / 3**0.5:.2f}",
        "1,001 (50.0 %)",
        "501 (25.1 %)",
        "3",
        "12",
        "2.00",
    ]
    assert len(found) == len(script.HEADER)
    assert script.row("kc-kd", results, None)[3:6] == ["", "1,001", "501"]
    assert script.row("kd", baseline, baseline)[3:6] == ["", "2,000 (100.0 %)", "2,000 (100.0 %)"]
    alone = script.row("random", results[:1], baseline[1:2])
    assert alone[1:4] == ["71.00", "72.00", "-3.00"] and alone[4] == "1,000 (50.0 %)"


def test_difference_is_paired_by_seed(script):
    # Accuracies vary by ten points between seeds, their difference by none.
    assert script.difference(
        [result(i, 60.5 + 10 * i) for i in range(3)], [result(i, 60 + 10 * i) for i in range(3)]
    ) == ("+0.50 ± 0.00")
    with pytest.raises(ValueError):
        script.difference([result(0, 1.0)], [result(0, 1.0), result(1, 1.0)])
    assert script.visits(
        [result(0, 1.0, visits=(999_999, 0))], [result(0, 1.0, visits=(1_000_000, 7))], "sample_visits"
    ) == ("999,999 (100.0 %)")


# --- the script, with a study that trains nothing --------------------------------------------------------------------

ONLY = ("kd", "kc-kd", "kd, half of a batch")
ACCURACIES = {"kd": 70.0, "kc-kd": 72.0, "kd, half of a batch": 69.0, "teacher": 80.0}


@pytest.fixture
def studies(monkeypatch):
    """The studies that were run. Their runs write fixed results instead of training, if there is time."""
    made = []

    def run(study):
        made.append(study)
        for each in study.runs:
            if study._is_due(each):
                each.folder.mkdir(parents=True, exist_ok=True)
                seed = each.recipe.seed
                found = result(seed, ACCURACIES[each.recipe.label] + seed)
                (each.folder / "student.safetensors").touch()
                (each.folder / "summary.json").write_text(json.dumps({"results": [found]}))

    monkeypatch.setattr(Study, "checked", lambda study: study)
    monkeypatch.setattr(Study, "run", run)
    return made


@pytest.fixture
def comparison(script, tmp_path):
    """Build a comparison of three kinds with two seeds, on small images."""
    path = tmp_path / "pixels.npz"
    store(path, images(10))

    def build(**options):
        places = {"output": tmp_path / "runs", "results": tmp_path / "results"}
        defaults = {"data": str(path), "pair": "resnet20-resnet8", "seeds": 2, "only": ONLY, "epochs": 24}
        return script.Reproduce(**{**defaults, **places, "side_by_side": 1, "device": "cpu", **options})

    return build


def store(path, data):
    x_train, y_train, x_test, y_test = (a for part in (data.train, data.test) for a in (part.images, part.labels))
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)


def table(folder):
    (page,) = folder.glob("*.md")
    text = page.read_text()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_every_run_is_planned_and_appears_in_the_table(comparison, studies, tmp_path, capsys):
    comparison(threads=3, side_by_side=2).run()
    assert "6 of 6 runs are finished" in capsys.readouterr().out
    (study,) = studies
    teacher, *runs = study.runs
    assert (study.threads, study.side_by_side, study.deadline, study.output) == (3, 2, None, tmp_path / "runs")
    assert (study.data.train.views.padding, study.data.train.views.flip) == (4, True)
    assert (teacher.network, teacher.recipe.method, teacher.recipe.lr, teacher.recipe.epochs) == (
        "resnet20",
        "ce",
        0.05,
        24,
    )
    assert [(run.recipe.name, run.recipe.seed) for run in runs] == [(kind, seed) for seed in (0, 1) for kind in ONLY]
    names = {str(run.folder.relative_to(study.output)) for run in runs}
    assert names == {f"{kind}/seed-{seed}" for kind in ("kd", "kc-kd", "kd-half-of-a-batch") for seed in (0, 1)}
    for run in runs:
        assert (run.network, run.teacher.network, run.teacher_folder) == ("resnet8", "resnet20", teacher.folder)
        assert (run.recipe.lr, run.recipe.epochs, run.recipe.device) == (0.05, 24, "cpu")
    assert [row[:4] for row in table(tmp_path / "results")[2:]] == [
        ["kd", "70.50 ± 0.71", "90.00 ± 0.00", ""],
        ["kc-kd", "72.50 ± 0.71", "90.00 ± 0.00", "+2.00 ± 0.00"],
        ["kd, half of a batch", "69.50 ± 0.71", "90.00 ± 0.00", "-1.00 ± 0.00"],
    ]
    (page,) = (tmp_path / "results").glob("*.md")
    assert page.name == "reproduce-pixels-resnet20-resnet8-24-epochs.md" and "Teacher 80.00 %" in page.read_text()
    assert "Not the paper's setting" in page.read_text()
    content = json.loads(page.with_suffix(".json").read_text())
    found = {(run["kind"], run["seed"], run["accuracy_last"]) for run in content["runs"]}
    assert found == {(kind, seed, ACCURACIES[kind] + seed) for kind in ONLY for seed in (0, 1)}


def test_given_teacher_is_used_by_all_kinds_except_student_alone(comparison, tmp_path):
    folder = tmp_path / "trained"
    small = ["--data", "digits", "--network", "cnn_small", "--epochs", "1", "--threads", "1", "--device", "cpu"]
    assert cli.main(["teacher", *small, "--output", str(folder)]) == 0
    alone, kd = comparison(teacher=folder, only=("student alone", "kd"), seeds=1)._study(load("digits")).runs
    assert (alone.teacher, alone.teacher_folder) == (None, None)
    assert (kd.teacher.network, kd.teacher.weights, kd.teacher_folder) == ("cnn_small", None, folder)


def summaries(folder):
    return list((folder / "runs").rglob("summary.json"))


def test_no_run_starts_without_time_and_finished_ones_are_shown(comparison, studies, tmp_path, capsys):
    comparison(minutes=0).run()
    assert "0 of 6 runs are finished" in capsys.readouterr().out and not summaries(tmp_path)
    comparison().run()
    complete = table(tmp_path / "results")
    for seed, kind in ((1, "kc-kd"), (0, "kd")):
        capsys.readouterr()
        comparison(minutes=0).run()
        count = len(summaries(tmp_path)) - 1
        assert f"{count} of 6 runs are finished" in capsys.readouterr().out
        rows = table(tmp_path / "results")
        assert rows == complete if count == 6 else rows[2:][1][:4] == ["kc-kd", "72.00", "90.00", "+2.00"]
        (tmp_path / "runs" / kind / f"seed-{seed}" / "summary.json").unlink()
    capsys.readouterr()
    comparison(minutes=0).run()
    out = capsys.readouterr().out
    assert "4 of 6 runs are finished" in out and "no seed has finished in all kinds" in out
    comparison(minutes=5).run()
    assert 0 < studies[-1].deadline - time.monotonic() <= 300
    assert table(tmp_path / "results") == complete


@pytest.mark.parametrize(
    ("train", "epochs", "classes", "says"),
    [
        (50_000, 240, None, "The paper's table: student 72.50, KD 73.33, KC-KD 74.05 %"),
        (50_000, 239, None, "Not the paper's setting"),
        (49_999, 240, None, "Not the paper's setting"),
        (50_000, 240, 50, "Not the paper's setting"),
    ],
)
def test_paper_accuracies_are_shown_only_for_its_setting(comparison, studies, tmp_path, train, epochs, classes, says):
    store(tmp_path / "pixels.npz", images(100, train, 100))
    comparison(pair="resnet32x4-resnet8x4", epochs=epochs, classes=classes, seeds=1).run()
    (page,) = (tmp_path / "results").glob("*.md")
    assert says in page.read_text() and ("50-classes" in page.name) == (classes == 50)
    spec = str(tmp_path / "pixels.npz") if classes is None else str(tmp_path / "runs" / "50-classes.npz")
    (study,) = studies
    assert study.data_options == {"spec": spec} and study.data.num_classes == (classes or 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pair": "resnet20"}, "pair must be TEACHER-STUDENT, got 'resnet20'"),
        ({"only": ("kd", "kc")}, "only must be among 'kd', .*, got 'kc'"),
        ({"seeds": 0}, "seeds must be an integer >= 1, got 0"),
        ({"epochs": 0}, "epochs must be an integer >= 1, got 0"),
        ({"side_by_side": -1}, "side_by_side must be an integer >= 0, got -1"),
        ({"teacher": Path("nowhere")}, "teacher must be the folder of a finished run, got nowhere"),
    ],
)
def test_invalid_option_is_an_error_before_anything_runs(comparison, studies, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        comparison(**options).run()
    assert studies == [] and not (tmp_path / "runs").exists()
