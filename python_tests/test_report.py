"""Reports: every curve, bar, picture and number is compared with the data behind it."""

import base64
import dataclasses
import html.parser
import io
import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from small_runs import comparison, mostly_slow

from kcd_ext.commands.report import Report
from kcd_ext.data.images import ImageSet, assemble
from kcd_ext.data.views import Views
from kcd_ext.reports import figures, page, ranking, runs
from kcd_ext.reports.conclusion import conclusion
from kcd_ext.reports.tables import kept_by_class, results_table
from kcd_ext.training import Condense, Recipe, Summary, distill

LAST_COLUMNS = ("FLOPs", "seconds", "condensation")
LEVELS = {"teacher": 90.0, "kd": 70.0, "kc-kd": 80.0}


def summaries(stages=True, flops=True):
    """Return summaries of three methods, two seeds and four epochs, with distinct numbers."""
    values = {"low": 0.0, "high": 2.0, "counts": [1, 0, 4, 3]}
    made = []
    for seed in (3, 1):
        for method, level in LEVELS.items():
            history = [
                {
                    "epoch": epoch,
                    "accuracy": level + epoch + seed,
                    "train_accuracy": 5.0 + epoch,
                    "loss": 1 / epoch,
                    "sample_visits": (900 if method == "kc-kd" else 1000) * epoch,
                    "teacher_visits": 7 * epoch,
                    "seconds": (2.0 if method == "kc-kd" else 3.0) * epoch + seed,
                    "flops": flops and (5 if method == "kc-kd" else 6) * 10**9 * epoch,
                    "condensation": {"stage": epoch, "kept": 8 - epoch, "mixed": 1, "values": values}
                    if stages and method == "kc-kd" and epoch < 3
                    else None,
                }
                for epoch in range(1, 5)
            ]
            last = history[-1]
            accuracy = last["accuracy"], last["accuracy"] + 1
            visits = last["sample_visits"], last["teacher_visits"], last["seconds"]
            made.append(Summary(method, seed, *accuracy, *visits, last["seconds"] / 8, last["flops"], history))
    return made


def ranked(channels=1, count=40):
    """Return a ranking, written and read again, in which image i has value 4 - i/10 and pixels 4i."""

    class Condenser:
        measure, counts = "value", torch.ones(count)
        values = 4 - torch.arange(count, dtype=torch.float64) / 10

    pixels = np.zeros((count, 4, 4, channels), np.uint8) + 4 * np.arange(count, dtype=np.uint8)[:, None, None, None]
    images = ImageSet(pixels, np.arange(count) % 7, Views((0.5,) * channels, (0.5,) * channels))
    with TemporaryDirectory() as folder:
        ranking.write(Path(folder), Summary("kc-kd", 0, 1.0, 1.0, 1, 1, 1.0, condenser=Condenser()), images)
        return ranking.read(Path(folder))


class Page(html.parser.HTMLParser):
    """A parsed page: table cells by row, and the pictures in order as (section, class, caption, pixels)."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.pictures, self.headings, self.stack, self.text = [], [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.stack.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "h2":
            self.headings.append("")
        if tag == "img":
            attributes = dict(attributes)
            png = base64.b64decode(attributes["src"].partition(",")[2])
            self.pictures.append([self.headings[-1], attributes["alt"], "", imread(io.BytesIO(png))])

    def handle_data(self, data):
        self.text += data
        if self.stack and self.stack[-1] in ("td", "th"):
            self.rows[-1].append(data)
        if self.stack and self.stack[-1] == "h2":
            self.headings[-1] += data
        if "figcaption" in self.stack[-2:]:
            self.pictures[-1][2] += f" {data}"

    def handle_endtag(self, tag):
        while self.stack.pop() != tag:
            pass


@pytest.fixture
def rendered(tmp_path, monkeypatch):
    """Render a report. Return the page and all axes drawn for it and for the picture."""

    def write(summaries, ranking=None, **more):
        drawn, real = [], figures._figure

        def kept(*arguments, **options):
            figure, axes = real(*arguments, **options)
            drawn.extend(axes)
            return figure, axes

        monkeypatch.setattr(figures, "_figure", kept)
        html, picture = page.render(comparison(summaries, ranking=ranking, **more), tmp_path)
        assert picture[:4] == b"\x89PNG"
        return Page(html.decode()), drawn

    return write


def test_accuracy_axis_hides_the_steep_start_and_nothing_else():
    """Of twelve epochs the first three may be below the axis. A curve that falls at the end is shown, and so is its peak."""
    curves = {
        "kd": [10, 30, 60, *[90 + i / 10 for i in range(9)]],
        "falls": [10, 95, 92, *[91 - i / 10 for i in range(9)]],
    }

    class Drawn:
        levels, drawn, colours = {"teacher": 96.0}, curves, dict.fromkeys(curves, "#000000")

        def curve(self, method, name):
            return np.array(curves[method], dtype=float) if name == "accuracy" else np.arange(12.0)

        def deviation(self, method):
            return 0.0

        def are_validated(self, method):
            return False

    axes = Figure().subplots()
    figures.draw_accuracy(axes, Drawn(), "sample_visits", "sample visits")
    low, high = axes.get_ylim()
    assert 89 < low < 90 and 96 < high < 97
    Drawn.levels, curves["kd"], curves["falls"] = {}, [50.0], [50.0]  # one epoch, one accuracy
    Drawn.curve = lambda self, method, name: np.array([50.0])
    axes = Figure().subplots()
    figures.draw_accuracy(axes, Drawn(), "sample_visits", "sample visits")
    assert axes.get_ylim() == (49.0, 51.0)


@pytest.mark.parametrize("count", [3, 40])
def test_curves_are_drawn_large_however_many_methods_there_are(count, recwarn):
    curves = {f"dkd+reviewkd {number}": np.linspace(10, 90, 12) for number in range(count)}

    class Drawn:
        levels, drawn, colours = {}, curves, dict.fromkeys(curves, "#000000")
        curve = staticmethod(lambda method, name: curves[method])
        deviation = are_validated = staticmethod(lambda method: 0)

    def draw(axes):
        figures.draw_accuracy(axes, Drawn(), "sample_visits", "sample visits")
        sizes.append(axes)

    sizes = []
    text = figures.svg("accuracy", draw)
    width, height = sizes[0].get_position().size
    assert width > 0.4 and height > 0.7
    assert all(f"dkd+reviewkd {number}" in text for number in (0, count - 1))
    assert not recwarn.list  # matplotlib warns if there is no room


def test_curves_show_the_mean_over_seeds_after_every_epoch(rendered):
    _, drawn = rendered(summaries(), ranked())
    by_label = {}
    for axes in drawn:
        if axes.get_ylabel() == "test accuracy, %":
            by_label.setdefault(axes.get_xlabel(), []).append(axes)
    flops = "floating-point operations of training"
    assert {label: len(x) for label, x in by_label.items()} == {"sample visits": 2, "seconds of training": 1, flops: 1}
    epochs = np.arange(1, 5)
    x = {
        "sample visits": {"kd": 1000 * epochs, "kc-kd": 900 * epochs},
        "seconds of training": {"kd": 3 * epochs + 2, "kc-kd": 2 * epochs + 2},  # seeds 3 and 1: 2 on average
        flops: {"kd": 6e9 * epochs, "kc-kd": 5e9 * epochs},
    }
    for label, found in by_label.items():
        for axes in found:
            lines = {line.get_label(): line for line in axes.lines}
            assert lines.keys() == LEVELS.keys()
            for method in ("kd", "kc-kd"):
                points = np.stack([x[label][method], LEVELS[method] + epochs + 2], axis=1)
                assert lines[method].get_xydata().tolist() == points.tolist()
                assert points[1:, 1].min() > axes.get_ylim()[0] and points[:, 1].max() < axes.get_ylim()[1]
            bars = [bar.get_segments()[0].tolist() for bar in axes.collections]
            assert bars == [
                [[x[label][method][-1], LEVELS[method] + 6 + sign * 2**0.5] for sign in (-1, 1)]
                for method in ("kd", "kc-kd")
            ]
            assert set(lines["teacher"].get_ydata()) == {LEVELS["teacher"] + 4 + 2}
            assert [text.get_text() for text in axes.get_legend().get_texts()] == ["kd", "kc-kd", "teacher"]


def test_histograms_show_the_values_at_the_end_of_each_stage(rendered):
    _, drawn = rendered(summaries(), ranked())
    found = [axes for axes in drawn if axes.get_ylabel() == "samples, %"]
    assert len(found) == 2
    for axes in found:
        assert [patch.get_label() for patch in axes.patches] == ["stage 1: 7 kept", "stage 2: 6 kept"]
        for patch in axes.patches:
            heights, edges, _ = patch.get_data()
            assert heights.tolist() == [12.5, 0.0, 50.0, 37.5] and edges.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_results_table_shows_means_deviations_and_percentages(rendered):
    shown, _ = rendered(summaries(), ranked())
    visits = "4,000 (100.0 %)", "28 (100.0 %)"
    assert shown.rows == [
        ["method", "accuracy last, %", "accuracy best, %", "sample visits", "teacher visits", *LAST_COLUMNS],
        ["teacher", "96.00 ± 1.41", "97.00 ± 1.41", *visits, "24 G", "14.0 ± 1.4", "12.5 %"],
        ["kd", "76.00 ± 1.41", "77.00 ± 1.41", *visits, "24 G", "14.0 ± 1.4", "12.5 %"],
        ["kc-kd", "86.00 ± 1.41", "87.00 ± 1.41", "3,600 (90.0 %)", visits[1], "20 G", "10.0 ± 1.4", "12.5 %"],
    ]


def with_accuracies(**accuracies):
    """Return groups of runs, one seed for each accuracy; KD makes twice as many visits as others."""
    return {
        method.replace("_", "-"): [
            Summary(method, seed, accuracy, accuracy, 2000 if method == "kd" else 1000, 0, 1.0)
            for seed, accuracy in enumerate(found)
        ]
        for method, found in accuracies.items()
    }


def test_conclusion_compares_accuracies_seed_by_seed():
    """The differences are 1, 2, 3; -1, -1, -4; 1, 2, -1: means 2, -2, 2/3, standard errors 0.577, 1, 0.882."""
    ours = [92.0, 80.0, 88.0]
    groups = with_accuracies(
        kd=[99.0] * 3,
        kc_kd=ours,
        random=[91.0, 78.0, 85.0],
        kd_shorter=[93.0, 81.0, 92.0],
        infobatch=[91.0, 78.0, 89.0],
    )
    text = conclusion(groups)
    assert text.startswith(
        "Conclusion: at 50.0 % of KD's visits, kc-kd is better than random (+2.00 ± 0.58 points) and not distinguishable from "
        "kd-shorter (-2.00 ± 1.00 points) and infobatch (+0.67 ± 0.88 points). (Mean difference"
    )
    groups = with_accuracies(kc_kd=ours, random=[93.0, 81.5, 89.0])  # the other way round, and without KD
    assert conclusion(groups).startswith(
        "Conclusion: at 1,000 visits, kc-kd is worse than random (-1.17 ± 0.17 points). ("
    )
    equal = conclusion(with_accuracies(kc_kd=ours, random=ours))
    assert "not distinguishable from random (0.00 ± 0.00 points)" in equal
    assert "is better than random (+1.00 ± 0.00 points)" in conclusion(
        with_accuracies(kc_kd=ours, random=[91.0, 79.0, 87.0])
    )


def test_conclusion_needs_three_seeds_and_as_many_visits():
    two = with_accuracies(kd=[99.0] * 2, kc_kd=[90.0, 91.0], random=[80.0, 81.0])
    assert conclusion(two) == (
        "No conclusion on whether kc-kd is better than random: it takes 3 seeds or more, such as those of kcd demo --seeds 0 1 2 "
        "3 4, got 2."
    )
    three = with_accuracies(kd=[99.0] * 3, kc_kd=[90.0] * 3, random=[80.0] * 3)
    assert "kc-kd is better than random" in conclusion(three)
    more = [dataclasses.replace(run, sample_visits=1100) for run in three["random"]]
    fewer_seeds = [dataclasses.replace(run, seed=run.seed + 1) for run in three["random"]]
    for others in (more, fewer_seeds, []):
        assert conclusion({**three, "random": others}) == ""
    assert conclusion({"random": three["random"]}) == conclusion({"kd": three["kd"], "kc-kd": three["kc-kd"]}) == ""


@pytest.mark.parametrize("channels", mostly_slow([1, 2, 3, 4, 5], kept=[1, 3]))
def test_images_are_those_at_both_ends_of_the_ranking(rendered, channels):
    made, drawn = rendered(summaries(), ranked(channels))
    shown = [("Most valuable training images", i) for i in range(16)]
    shown += [("Least valuable training images", i) for i in range(24, 40)]
    assert len(made.pictures) == 32
    for (heading, alt, caption, pixels), (section, i) in zip(made.pictures, shown, strict=True):
        assert (heading, alt) == (section, f"an image of class {i % 7}")
        assert re.fullmatch(rf"class {i % 7} +{4 - i / 10:.2f}", caption.strip())
        assert round(255 * np.atleast_1d(pixels[0, 0])[0]) == 4 * i
    tiled = {axes.get_title(): axes.images[0].get_array() for axes in drawn if axes.images}
    for title, first in (("most valuable for the student", 0), ("least valuable for the student", 24)):
        corner = np.atleast_1d(tiled[title][1, 1])[0], np.atleast_1d(tiled[title][1, 7])[0]
        assert corner == (4 * first, 4 * (first + 1))


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ((2.5e9, 1.5e8), ["2.5 G", "0.15 G"]),
        ((2.5e12, 1.5e9), ["2.5 T", "0.0015 T"]),
        ((2.5e15, 1.5e15), ["2.5 P", "1.5 P"]),
        ((2.5e12, None), ["2.5 T", "unknown"]),
        ((None, None), ["unknown", "unknown"]),
    ],
)
def test_flops_of_a_table_share_one_unit(counts, shown):
    made = [Summary(f"m{i}", 0, 1.0, 1.0, 1, 1, 1.0, flops=count) for i, count in enumerate(counts)]
    assert [row[5] for row in results_table(made)[1:]] == shown


def test_report_omits_sections_without_data(rendered):
    shown, drawn = rendered(summaries(stages=False, flops=None))
    assert [h for h in shown.headings if "aluable" in h or "alues" in h or "FLOP" in h] == []
    assert not shown.pictures
    assert {axes.get_xlabel() for axes in drawn} == {"sample visits", "seconds of training"}
    assert [row[5] for row in shown.rows] == ["FLOPs", *["unknown"] * 3]


def test_curve_ends_with_the_shortest_run(rendered):
    runs = summaries()
    shorter = [dataclasses.replace(run, history=run.history[: 4 - (run.seed == 1)]) for run in runs]
    _, drawn = rendered(shorter)
    line = next(line for axes in drawn for line in axes.lines if line.get_label() == "kd")
    assert line.get_xydata().tolist() == [[1000 * epoch, 72 + epoch] for epoch in (1, 2, 3)]


def test_teacher_is_drawn_as_a_curve_if_it_is_the_only_method(rendered):
    _, drawn = rendered([run for run in summaries() if run.method == "teacher"])
    assert all(len(line.get_xdata()) == 4 for axes in drawn for line in axes.lines)


def test_markup_in_notes_and_cells_is_escaped(rendered):
    shown, _ = rendered(summaries(), notes=["a <b> & c"], differences=[["method", "lr<"], ["kd", "<i>"]])
    assert shown.rows[4:] == [["method", "lr<"], ["kd", "<i>"]]
    assert "Options that differ" in shown.headings and "a <b> & c" in shown.text


def test_ranking_of_four_images_matches_the_hand_computed_order(tmp_path):
    class Condenser:
        values, counts = torch.tensor([0.5, 9.0, 0.1, 2.0]), torch.tensor([3, 0, 1, 2])
        measure = "value"

    summary = Summary("kc-kd", 0, 1.0, 1.0, 1, 1, 1.0, condenser=Condenser())
    images = ImageSet(np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1), np.array([2, 1, 0, 1]), Views((0.5,), (0.5,)))
    for names, shown in (((), ("class 1", "class 2", "class 0")), (("cat", "dog", "emu"), ("dog", "emu", "cat"))):
        ranking.write(tmp_path, summary, images, names)
        found = ranking.read(tmp_path)
        for thumbnails in (found.most, found.least):
            made = [(int(one.image.item()), one.label, round(one.value, 6)) for one in thumbnails]
            assert made == [*zip((3, 0, 2), shown, (2.0, 0.5, 0.1), strict=True)]
    Condenser.measure = "losses"
    ranking.write(tmp_path / "none", summary, images)
    assert ranking.read(tmp_path / "none") is None


@pytest.mark.parametrize("shape", [(300, 200, 3), (129, 1, 1), (128, 128, 4)])
def test_large_images_are_scaled_to_thumbnails(tmp_path, shape):
    class Condenser:
        values, counts, measure = torch.ones(2), torch.ones(2), "value"

    images = ImageSet(np.full((2, *shape), 77, np.uint8), np.arange(2), Views((0.5,) * shape[2], (0.5,) * shape[2]))
    ranking.write(tmp_path, Summary("kc-kd", 0, 1.0, 1.0, 1, 1, 1.0, condenser=Condenser()), images)
    for one in (found := ranking.read(tmp_path)).most:
        assert max(one.image.shape[:2]) == 128 and (one.image == 77).all()
    assert len(found.most) == len(found.least) == 2


# --- real runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run with InfoBatch and one that ranks by value: six epochs on random images."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    draw = np.random.default_rng(0)
    data = assemble("noise", *[(draw.integers(0, 256, (n, 2, 2, 1), np.uint8), np.arange(n) % 3) for n in (31, 7)], 3)
    here = tmp_path_factory.mktemp("runs")
    condensations = {
        "infobatch": Condense(keep=0.5, selection="infobatch"),
        "kc-kd": Condense(keep=0.5, every=2, stages=2),
    }
    for name, condense in condensations.items():
        networks = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)) for _ in range(2)]
        recipe = Recipe(condense=condense, epochs=6, batch_size=8, device="cpu")
        distill(*networks, data.train, data.test, recipe, output=here / name)
    torch.set_num_threads(threads)
    return here


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_run_not_ranked_by_value_is_reported_without_histogram(folders, tmp_path):
    steps = [line["condensation"] for line in lines(folders / "infobatch") if line["condensation"]]
    assert steps and all(step["values"] is None for step in steps)
    Report((folders / "infobatch", folders / "kc-kd"), tmp_path / "both.html").run()
    Report((folders / "infobatch",), tmp_path / "alone.html").run()
    both, alone = (Page((tmp_path / name).read_text()) for name in ("both.html", "alone.html"))
    for shown, methods in ((both, ["infobatch", "kc-kd"]), (alone, ["infobatch"])):
        last = [lines(folders / method)[-1] for method in methods]
        expected = [(m, f"{x['accuracy']:.2f}", f"{x['sample_visits']:,}") for m, x in zip(methods, last, strict=True)]
        assert [(row[0], row[1], row[3]) for row in shown.rows if row[0] in methods][: len(methods)] == expected
    found = [heading for heading in both.headings if heading.startswith("Knowledge values")]
    assert found == ["Knowledge values of kc-kd, stage by stage"]
    assert not [heading for heading in alone.headings if "alues" in heading]


@pytest.mark.slow
def test_mixing_selection_without_values_has_no_histogram(rendered):
    made = summaries()
    for run in made:
        for line in run.history:
            if line["condensation"]:
                line["condensation"] = {**line["condensation"], "values": None}
    shown, drawn = rendered(made)
    assert not [heading for heading in shown.headings if "alues" in heading]
    assert {axes.get_xlabel() for axes in drawn} == {
        "sample visits",
        "seconds of training",
        "floating-point operations of training",
    }


@pytest.mark.parametrize(
    "change",
    [
        {"condensation": 3},
        {"condensation": {"stage": 1, "kept": 2, "mixed": 0}},
        {"condensation": {"stage": 1, "kept": 2, "mixed": None, "values": None}},
        {"condensation": {"stage": 1, "kept": 2, "mixed": 0, "values": None, "classes": [1, 1.5]}},
        {"condensation": {"stage": 1, "kept": 2, "mixed": 0, "values": None, "classes": 3}},
        {"condensation": {"stage": 1, "kept": 2, "mixed": 0, "values": None, "classes": [1]}},
        {"values": 3},
        {"values": {"low": 0, "high": 1, "counts": []}},
        {"values": {"low": 0, "high": 1, "counts": [1, True]}},
        {"values": {"low": 0, "high": 1, "counts": [1, 10**400]}},
        {"values": {"low": 0, "high": 1, "counts": {"1": 1}}},
        {"values": {"low": 0, "counts": [1]}},
        {"values": {"low": 1, "high": 0, "counts": [1]}},
        {"values": {"low": float("nan"), "high": 1, "counts": [1]}},
        {"seconds": float("inf")},
        {"seconds": "1"},
        {"accuracy": 101},
        {"accuracy": True},
        {"sample_visits": 1.5},
        {"flops": 10**400},
        {"flops": -1},
        {"epoch": 1},
        {"deep": "DEEP"},
    ],
)
def test_damaged_metrics_line_is_an_error_that_names_the_file(change, folders, tmp_path):
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((folders / "kc-kd" / name).read_bytes())
    found = lines(tmp_path)
    line = next(line for line in found if line["condensation"])
    if "values" in change:
        line["condensation"].update(change)
    else:
        line.update(change)
    text = "".join(json.dumps(line) + "\n" for line in found)
    (tmp_path / "metrics.jsonl").write_text(text.replace('"DEEP"', "[" * 9**5))  # nested too deep for the parser
    with pytest.raises(ValueError) as error:
        runs.read(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'metrics.jsonl'} is damaged: ")
    assert "\n" not in str(error.value)


def test_class_table_is_limited_to_the_smallest_classes_and_eight_stages():
    steps = [{"stage": s, "kept": 0, "classes": [1000 + s, *[1200 - s] * 28, 3 - s % 3]} for s in range(1, 31)]
    head, *rows, totals = kept_by_class(steps, [f"<{label}>" for label in range(30)])
    assert head == ["class", *(f"stage {s}" for s in (1, 5, 9, 13, 17, 21, 25, 30))]
    assert len(rows) == 20 and [row[0] for row in rows] == [*(f"<{label}>" for label in range(19)), "<29>"]
    assert rows[0][1:] == ["1,001", "1,005", "1,009", "1,013", "1,017", "1,021", "1,025", "1,030"]
    assert totals[1] == f"{sum(steps[0]['classes']):,}"
    assert kept_by_class(steps[:1])[1] == ["class 0", "1,001"]
