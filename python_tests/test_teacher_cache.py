"""Distillation from a teacher cache equals distillation from its teacher, and a cache of anything else is refused."""

import dataclasses
import functools
import json
import re
import signal
import time
import warnings
from dataclasses import replace

import pytest
import torch
from commands import NO_LAUNCHER_ENV, TORCHRUN, contents, run, stop
from PIL import Image
from processes import Crew
from small_runs import CLASSES, StopError, assert_same, final, images, network, shaken, stop_after
from torch import nn
from torch.nn import functional

from kcd_ext import IndexedDataset, cli, files
from kcd_ext import data as data_module
from kcd_ext.cache import TeacherCache, TeacherCacheWriter, writer
from kcd_ext.data.images import ImageSet
from kcd_ext.data.views import Views
from kcd_ext.methods import Method, Outcome, entropy, teacher_logits
from kcd_ext.training import Condense, Recipe, cache_teacher, distill

pytestmark = pytest.mark.usefixtures("one_thread")
EPOCHS, SEED = 4, 5
quiet = pytest.mark.filterwarnings("ignore:the teacher's accuracy")


def teacher():
    return network(2, width=10).eval()


def recipe(condense=None, method="kd", options=None, **changes):
    unmixed = {} if "selection" in (condense or {}) else {"epsilon": 0.0, "stages": 3}
    chosen = None if condense is None else Condense(**{"keep": 0.5, **unmixed, **condense})
    changes = {"epochs": EPOCHS, "batch_size": 8, "lr": 0.02, "device": "cpu", "seed": SEED, **changes}
    return Recipe(method, options or {}, chosen, **changes)


def cached(path, train=None, given=None, **options):
    options = {"views": EPOCHS, "seed": SEED, "dtype": "float32", "device": "cpu", "batch_size": 16, **options}
    return cache_teacher(given or teacher(), train or images(69), images(30, seed=1), path, **options)


def normalised(data):
    return IndexedDataset(data, lambda image: data.views.normalize(torch.from_numpy(image)[None])[0])


def losses(found):
    return [line["loss"] for line in found.history]


def train(given, chosen=None, train=None, **options):
    return distill(network(1), given, train or images(69), images(30, seed=1), chosen or recipe(), **options)


def assert_same_run(one, other):
    """Assert that two runs agree up to the rounding of networks on batches of other sizes."""
    assert losses(one) == pytest.approx(losses(other), rel=2e-5)
    for name in ("sample_visits", "accuracy_last", "teacher_accuracy", "method"):
        assert getattr(one, name) == getattr(other, name)
    torch.testing.assert_close(one.condenser.values, other.condenser.values, rtol=1e-4, atol=1e-5)
    assert one.condenser.kept.tolist() == other.condenser.kept.tolist()


# --- the same run without the teacher -----------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize(
    "chosen",
    [
        recipe(),
        recipe({}),
        recipe({"selection": "random"}),
        recipe({"selection": "infobatch"}, batch_size=7),
        recipe({"keep": 1.0, "batch_keep": 0.4}),
        recipe(method="pwkd", options={"partial": False, "widths": "0.5,1"}, gradient_accumulation=2),
        recipe({"keep": 1.0, "batch_keep": 0.4}, method="kd+dkd", options={"dkd.warmup": 2}),
        recipe(method="dist", label_smoothing=0.1),
    ],
    ids=lambda chosen: f"{chosen.label}-{chosen.condense.batch_keep}",
)
def test_run_with_a_view_for_every_epoch_equals_the_live_run(chosen, tmp_path):
    cache = cached(tmp_path)
    assert cache.ids.tolist() == [*range(69)] and {*cache.lengths.tolist()} == {EPOCHS}
    live, from_cache = train(teacher(), chosen), train(cache, chosen)
    assert_same_run(from_cache, live)
    assert from_cache.teacher_visits == 0 < live.teacher_visits
    assert 0 < from_cache.flops < live.flops


class RepeatedViews(Views):
    """Views that repeat after two epochs."""

    def __call__(self, images, index, *, seed, epoch):
        return super().__call__(images, index, seed=seed, epoch=epoch % 2)


@quiet
def test_views_repeat_if_there_are_fewer_than_epochs(tmp_path):
    data = images(69)
    repeated = ImageSet(data.images, data.labels, RepeatedViews(**dataclasses.asdict(data.views)))
    live = train(teacher(), train=repeated)
    assert_same_run(train(cached(tmp_path, views=2)), live)
    assert losses(live) != pytest.approx(losses(train(teacher())), rel=1e-3)


class Recorder(Method):
    """A method that keeps the indices and the teacher's logits of its batches in SEEN."""

    teacher_logits_suffice = True

    def forward(self, student, teacher, batch):
        logits = student(batch.x)
        SEEN.append((batch.index.clone(), teacher_logits(teacher, batch).clone()))
        return Outcome(functional.cross_entropy(logits, batch.label), logits.detach(), entropy(logits))


SEEN = []


@quiet
@pytest.mark.parametrize("loaded", [False, True])
def test_plain_cache_gives_every_batch_the_logits_of_plain_samples(loaded, tmp_path):
    """Of images, whatever their views, and of items with a transform, also from worker processes."""
    data = images(69)
    plain = data.views.normalize(data.tensors("cpu")[0])
    used = normalised(data) if loaded else data
    cache = cached(tmp_path, used, views=0, dtype="float16")
    with torch.no_grad():
        expected = teacher()(plain)
    for sample in (0, 7, 68):
        torch.testing.assert_close(cache[sample].float(), expected[sample], rtol=1e-3, atol=1e-3)
    SEEN.clear()
    name = f"{__name__}:Recorder"
    train(cache, recipe({}, name, num_workers=2 * loaded), used)
    assert len(SEEN) > 4 * EPOCHS
    for index, logits in SEEN[1:]:
        assert logits.dtype == torch.float32 and torch.equal(logits, cache.batch(index).float())


@quiet
@pytest.mark.parametrize("views", [0, EPOCHS])
def test_images_on_disk_are_cached_and_distilled_as_in_memory(views, tmp_path):
    data = images(69)
    for sample, (pixels, label) in enumerate(data):
        path = tmp_path / "images" / str(label) / f"{sample:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[..., 0]).save(path)
    load = functools.partial(data_module.load, tmp_path / "images", test_fraction=0.2, padding=1, flip=True)
    in_memory, on_disk = load(), load(memory=1)
    assert isinstance(in_memory.train, ImageSet) and not isinstance(on_disk.train, ImageSet)
    options = {"views": views, "seed": SEED, "dtype": "float32", "device": "cpu", "batch_size": 16}
    caches = {}
    for name, found in (("memory", in_memory), ("disk", on_disk)):
        caches[name] = cache_teacher(teacher(), found.train, found.test, tmp_path / name, **options)
        assert torch.equal(caches[name].batch(caches[name].ids), caches["memory"].batch(caches["memory"].ids))
        # A cache that images in memory began is continued by images on disk, and vice versa.
        assert (
            cache_teacher(teacher(), found.train, found.test, tmp_path / "memory", **options).digest
            == caches["memory"].digest
        )
    runs = [
        distill(network(1), cache, found.train, found.test, recipe({}))
        for cache in caches.values()
        for found in (in_memory, on_disk)
    ]
    assert all(losses(other) == losses(runs[0]) for other in runs) and runs[0].teacher_accuracy is not None
    assert len({found.teacher_accuracy for found in runs}) == 1


@quiet
@pytest.mark.slow
def test_two_processes_equal_their_live_run(tmp_path):
    """69 samples: one rank repeats one, with its own logits. Both ranks write the cache, in shards of their own."""

    def job(rank):
        torch.set_num_threads(1)
        cache = cached(tmp_path / "cache")
        assert len([*(tmp_path / "cache").glob("shard-*.data")]) == 2
        live, from_cache = train(teacher(), recipe({})), train(cache, recipe({}))
        assert [line["padding"] for line in live.history] == [line["padding"] for line in from_cache.history] != [0] * 4
        assert_same_run(from_cache, live)

    assert Crew(job, 2).wait() == [0, 0]
    one = cached(tmp_path / "one")
    both = TeacherCache(tmp_path / "cache")
    torch.testing.assert_close(both.batch(range(69)), one.batch(range(69)), rtol=1e-5, atol=1e-5)


@quiet
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_run_killed_twice_equals_an_uninterrupted_run(processes, tmp_path):
    cache = cached(tmp_path / "cache", views=3, dtype="bfloat16")

    def job(rank, folder):
        torch.set_num_threads(1)
        torch.manual_seed(time.perf_counter_ns())
        train(cache, recipe({}, epochs=30), output=tmp_path / folder, resume=True)

    assert Crew(lambda rank: job(rank, "whole"), processes).wait() == [0] * processes
    for _ in range(2):
        crew = Crew(lambda rank: job(rank, "killed"), processes)
        deadline, before = time.monotonic() + 60, len(_lines(tmp_path / "killed"))
        while len(_lines(tmp_path / "killed")) < before + 3:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        crew.kill()
    assert 6 <= len(_lines(tmp_path / "killed")) < 30
    assert Crew(lambda rank: job(rank, "killed"), processes).wait() == [0] * processes
    assert_same(final(tmp_path / "killed"), final(tmp_path / "whole"))


def _lines(folder):
    path = folder / "metrics.jsonl"
    return files.read_lines(path) if path.exists() else []


# --- what is recorded, and refused -------------------------------------------------------------------------------------


@quiet
def test_run_records_its_cache_and_resumes_only_with_it(tmp_path):
    cache, other = cached(tmp_path / "cache"), cached(tmp_path / "other", dtype="float16")
    with pytest.raises(StopError):
        train(cache, output=tmp_path / "run", progress=stop_after(2))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    live = train(teacher(), output=tmp_path / "live")
    expected = json.loads((tmp_path / "live" / "config.json").read_text())
    assert config.pop("teacher_cache") == cache.digest
    assert {**config, "versions": 0, "about": 0} == {**expected, "versions": 0, "about": 0}
    assert config["teacher_accuracy"] == live.teacher_accuracy is not None
    for given, digest in ((other, f"'{other.digest}'"), (teacher(), None)):
        with pytest.raises(
            ValueError, match=f"was run with teacher_cache='{cache.digest}', got teacher_cache={digest}"
        ):
            train(given, output=tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match=f"was run with teacher_cache=None, got teacher_cache='{cache.digest}'"):
        train(cache, output=tmp_path / "live", resume=True)
    assert train(cache, output=tmp_path / "run", resume=True).teacher_visits == 0


@quiet
@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (recipe(method="ce"), "teacher cache PATH has no effect with method 'ce', which uses no teacher"),
        (
            recipe(method="pkt"),
            "method 'pkt' needs the teacher itself, not only its logits: give the teacher instead of the cache PATH",
        ),
        (recipe(method="pwkd", options={"widths": "0.5,1"}), "method 'pwkd' needs the teacher itself"),
        (
            recipe({"epsilon": 0.3}),
            "condense.epsilon must be 0 with a teacher cache, which has no logits of mixed images, got 0.3",
        ),
        (recipe(mixup=0.4), "mixup must be 0 with a teacher cache, which has no logits of mixed images, got 0.4"),
        (recipe(cutmix=1.0), "cutmix must be 0 with a teacher cache"),
        (recipe(method="kd+at"), "method 'kd+at' needs the teacher itself"),
        (recipe(seed=6), "PATH was made with seed=5 of its views, got seed=6"),
    ],
    ids=["ce", "pkt", "pwkd", "mixing", "mixup", "cutmix", "sum", "seed"],
)
def test_run_that_a_cache_cannot_serve_is_refused(chosen, message, tmp_path):
    cache = cached(tmp_path / "cache")
    with pytest.raises(ValueError, match=f"^{re.escape(message).replace('PATH', str(tmp_path / 'cache'))}"):
        train(cache, chosen, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def without_last(data):
    return ImageSet(data.images[:-1], data.labels[:-1], data.views)


def with_another_pixel(data):
    pixels = data.images.copy()
    pixels[68, 5, 5, 0] ^= 1
    return ImageSet(pixels, data.labels, data.views)


def with_another_label(data):
    return ImageSet(data.images, (data.labels + 1) % CLASSES, data.views)


def with_views(**changes):
    return lambda data: ImageSet(data.images, data.labels, replace(data.views, **changes))


@quiet
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_last, "was made from other training data: samples=69 there, 68 here"),
        (with_another_pixel, "was made from other training data: train_samples="),
        (with_another_label, "was made from other training data: train_samples="),
        (with_views(padding=0), "was made with padding=1 of its views, got padding=0"),
        (with_views(policy="trivialaugment"), "was made with policy=None of its views, got policy='trivialaugment'"),
        (with_views(flip=False), "was made with flip=True of its views, got flip=False"),
        (lambda data: IndexedDataset(data, shaken), "was made from other training data: train_samples="),
    ],
    ids=["samples", "pixel", "label", "padding", "policy", "flip", "items"],
)
def test_other_training_data_are_refused(change, message, tmp_path):
    cache = cached(tmp_path)
    with pytest.raises(ValueError, match=message):
        train(cache, train=change(images(69)))


@quiet
def test_other_items_are_refused_wherever_they_differ(tmp_path):
    """The changed item, 1, is none of those that are loaded for the digest of the samples."""
    data = images(69)
    cached(tmp_path / "cache", normalised(data), views=0)
    for change in (with_another_label(data), ImageSet(with_another_pixel(data).images, data.labels, data.views)):
        labels, pixels = data.labels.copy(), data.images.copy()
        labels[1], pixels[1] = change.labels[1], change.images[0]
        other = normalised(ImageSet(pixels, labels, data.views))
        for use in (
            lambda other=other: train(TeacherCache(tmp_path / "cache"), train=other),
            lambda other=other: cached(tmp_path / "cache", other, views=0),
        ):
            with pytest.raises(ValueError, match=r"was made from other training data: train\.dataset\.\w+ differs"):
                use()
    assert train(TeacherCache(tmp_path / "cache"), recipe(epochs=1), normalised(data)).teacher_visits == 0


@quiet
def test_views_and_normalisation_of_the_student_are_free_with_plain_logits(tmp_path):
    cache = cached(tmp_path, views=0)
    for change in (with_views(padding=0, flip=False), with_views(mean=(0.4,), std=(0.5,))):
        found = train(cache, recipe(seed=77), train=change(images(69)))
        assert found.teacher_accuracy is not None
    assert train(cache, train=None, chosen=recipe(epochs=1)).teacher_visits == 0
    other = distill(network(1), cache, images(69), images(31, seed=1), recipe(epochs=1))
    assert other.teacher_accuracy is None  # measured on other test images


@quiet
def test_cache_of_your_own_writer_is_checked_as_far_as_it_is_described(tmp_path):
    def written(folder, samples, shape, classes=CLASSES, **about):
        with TeacherCacheWriter(tmp_path / folder, classes=classes, about=about) as made:
            for sample in samples:
                made.write(sample, torch.full((*shape, classes), float(sample)))
        return TeacherCache(tmp_path / folder)

    assert train(written("plain", range(70), ()), recipe(epochs=1)).teacher_accuracy is None
    for cache, message in (
        (written("classes", range(69), (), 5), "has logits of 5 classes, the student gives 4"),
        (written("lacking", [*range(50), *range(51, 69)], ()), "lacks 1 of 69 samples, such as 50"),
        (written("empty", [], ()), "lacks 69 of 69 samples, such as 0"),
        (written("views", range(69), (3,)), "has 3 views of each sample and does not record which"),
    ):
        with pytest.raises(ValueError, match=message):
            train(cache)
    ragged = tmp_path / "ragged"
    with TeacherCacheWriter(ragged, classes=CLASSES) as made:
        for sample in range(69):
            made.write(sample, torch.zeros(1 + sample % 2, CLASSES))
    with pytest.raises(ValueError, match="must have records of one length, got 1 and 2"):
        train(TeacherCache(ragged))


# --- filling a cache ---------------------------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize(
    ("made", "warns"),
    [(lambda data: IndexedDataset(data, shaken), True), (lambda data: data, False), (normalised, False)],
)
def test_random_items_cause_a_warning(made, warns, tmp_path):
    """Images have views instead: `kcd distill` prints a line if the student's are random and the cache's are not."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cached(tmp_path, made(images(69)), views=0)
    assert sum("another x whenever it is read" in str(warning.message) for warning in caught) == warns


@quiet
def test_interrupted_caching_continues_and_refuses_another_teacher(tmp_path):
    class StopCachingError(Exception):
        pass

    def stop_at(done, total):
        assert total == 69
        if done >= 32:
            raise StopCachingError

    with pytest.raises(StopCachingError):
        cached(tmp_path / "cache", progress=stop_at, about={"name": "first"})
    partial = TeacherCache(tmp_path / "cache")
    assert partial.ids.tolist() == [*range(32)]
    with pytest.raises(ValueError, match="is not complete: it lacks 37 of 69 samples, such as 32; run the command"):
        train(partial)
    for changes, named in (
        ({"given": network(3, width=10).eval()}, "teacher="),
        ({"views": 3}, "views.count=4, got views.count=3"),
        ({"views": 0}, "views=dict of length ., got views=None"),
        ({"seed": 6}, "views.seed=5, got views.seed=6"),
        ({"train": without_last(images(69))}, "samples=69, got samples=68"),
        ({"dtype": "float16"}, "dtype='float32', got dtype='float16'"),
    ):
        before = contents(tmp_path / "cache")
        with pytest.raises(ValueError, match=f"was made with .*{named}"):
            cached(tmp_path / "cache", **changes)
        assert contents(tmp_path / "cache") == before
    calls = []
    done = cached(tmp_path / "cache", about={"name": "second"}, progress=lambda done, total: calls.append(done))
    assert calls == [48, 64, 69] and done.about["source"] == {"name": "first"}
    assert done.digest == cached(tmp_path / "again", about={"name": "first"}).digest
    assert cached(tmp_path / "cache").digest == done.digest


@quiet
def test_damage_is_found_before_training_and_mended_by_caching_again(tmp_path):
    whole = cached(tmp_path / "cache")
    digest, data = whole.digest, tmp_path / "cache" / "shard-0000.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    calls = []
    for use in (
        lambda: train(TeacherCache(tmp_path / "cache"), output=tmp_path / "run"),
        lambda: cached(tmp_path / "cache", progress=lambda *_: calls.append(1)),
    ):
        with pytest.raises(ValueError, match=r"remove shard-0000.data and shard-0000.index, and run the command"):
            use()
    assert not calls and not (tmp_path / "run").exists()
    for suffix in ("data", "index"):
        (tmp_path / "cache" / f"shard-0000.{suffix}").unlink()
    assert cached(tmp_path / "cache").digest == digest


@quiet
def test_killed_caching_continues_with_what_is_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "BUFFER_SIZE", 100)
    sizes = []
    while len(sizes) < 3:
        crew = Crew(lambda rank: cached(tmp_path / "killed", batch_size=1, progress=lambda *_: time.sleep(0.01)))
        deadline = time.monotonic() + 60
        while not (tmp_path / "killed" / f"shard-{len(sizes):04d}.index").exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        crew.kill()
        sizes.append(len(TeacherCache(tmp_path / "killed")))
    assert sizes == sorted(sizes) and sizes[-1] < 69
    assert cached(tmp_path / "killed", batch_size=1).digest == cached(tmp_path / "whole", batch_size=1).digest


@quiet
def test_teacher_ends_as_it_was(tmp_path):
    given = network(2, width=10).train()
    given[1].eval()
    before = {name: x.clone() for name, x in given.state_dict().items()}
    state = torch.get_rng_state()
    cached(tmp_path, given=given)
    assert given.training and not given[1].training and torch.equal(torch.get_rng_state(), state)
    assert_same(dict(given.state_dict()), before)
    assert all(parameter.requires_grad for parameter in given.parameters())


def test_teacher_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    nan = network(2, width=10)
    nan[-1].bias.data[1] = float("nan")
    for given, message in (
        (nn.Linear(2, CLASSES), r"teacher does not take x of torch.float32 \(1, 1, 6, 6\) from train"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(36, 2)),
            r"train must give labels in \[0, 2\), the teacher's classes, got 3",
        ),
        ("resnet20", "teacher must be a torch.nn.Module, got str"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            cached(tmp_path / "cache", given=given)
        assert not (tmp_path / "cache").exists()
    for options, message in (
        ({"views": -1}, "views must be an integer >= 0, got -1"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"seed": -1}, "seed must be"),
        ({"dtype": "int8"}, "dtype must be one of"),
        (
            {"train": IndexedDataset(images(69), shaken)},
            "views must be 0 for items with transforms of their own, got 4",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            cached(tmp_path / "y", **options)
        assert not (tmp_path / "y").exists()
    with (
        pytest.warns(UserWarning, match="accuracy on the test set"),
        pytest.raises(ValueError, match=r"^sample 0: .*nan"),
    ):
        cached(tmp_path / "z", given=nan)


# --- the commands ------------------------------------------------------------------------------------------------------

SMALL = ["--data", "digits", "--threads", "1", "--device", "cpu"]


def kcd(*arguments):
    return cli.main([*map(str, arguments)])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a teacher, and caches of the plain images and of two views. Do not change it."""
    folder = tmp_path_factory.mktemp("home")
    assert kcd("teacher", *SMALL, "--epochs", 3, "--output", folder / "teacher") == 0
    make = ["cache", *SMALL, "--teacher", folder / "teacher"]
    assert kcd(*make, "--output", folder / "plain") == 0
    assert kcd(*make, "--padding", 2, "--views", 2, "--precision", "bfloat16", "--output", folder / "views") == 0
    return folder


def test_command_distils_from_a_cache_and_evaluates_the_student(home, here, capfd):
    measured = json.loads((home / "teacher" / "summary.json").read_text())["results"][0]["accuracy_last"]
    about = TeacherCache(home / "views").about
    assert about["accuracy"] == pytest.approx(measured, abs=0.2)
    assert about["views"] == {"count": 2, "seed": 0, "padding": 2, "flip": False, "policy": None}
    assert (
        kcd("distill", *SMALL, "--epochs", 2, "--teacher-cache", home / "plain", "--output", "run", "--seeds", 2) == 0
    )
    printed = capfd.readouterr()
    (row,) = [line.split() for line in printed.out.splitlines() if line.startswith("teacher ")]
    assert row[1] == f"{about['accuracy']:.2f}" and "plain images" not in printed.err
    for seed in (0, 1):
        summary = json.loads((here / "run" / f"seed-{seed}" / "summary.json").read_text())["results"][0]
        assert summary["teacher_visits"] == 0 and summary["teacher_accuracy"] == about["accuracy"]
        config = json.loads((here / "run" / f"seed-{seed}" / "config.json").read_text())
        assert config["about"]["teacher_cache"] == str(home / "plain")
        assert config["about"]["teacher_path"] == str(home / "teacher")
    assert (
        kcd("distill", *SMALL, "--padding", 2, "--epochs", 2, "--teacher-cache", home / "plain", "--output", "moved")
        == 0
    )
    assert "the teacher cache has the logits of plain images" in capfd.readouterr().err
    assert kcd("evaluate", "run/seed-0", "--threads", 1) == 0  # the teacher is found where the cache says
    assert "Compared with their own teacher, cnn_large" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--teacher-cache", "HOME/plain", "--teacher", "HOME/teacher"],
            "teacher='HOME/teacher' has no effect with teacher_cache",
        ),
        (["--teacher-cache", "HOME/plain", "--teacher-lr", "0.1"], "teacher_lr=0.1 has no effect with teacher_cache"),
        (["--teacher-cache", "HOME/plain", "--method", "ce"], "has no effect with method 'ce', which uses no teacher"),
        (
            ["--teacher-cache", "HOME/plain", "--method", "crd"],
            "method 'crd' needs the teacher itself, not only its logits",
        ),
        (["--teacher-cache", "HOME/plain", "--method", "kc-kd"], "condense.epsilon must be 0 with a teacher cache"),
        (["--teacher-cache", "HOME/views"], "was made with padding=2 of its views, got padding=0"),
        (
            ["--teacher-cache", "HOME/views", "--padding", "2", "--seeds", "2"],
            "was made with seed=0 of its views, got seed=1",
        ),
        (["--teacher-cache", "HOME/teacher"], "HOME/teacher is not a teacher cache: it has no cache.json"),
        (["--teacher-cache", "HOME/none"], "HOME/none is not a teacher cache: it has no cache.json"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_cache_that_does_not_fit_is_one_line(arguments, message, home, here, capfd):
    words = [word.replace("HOME", str(home)) for word in arguments]
    assert kcd("distill", *SMALL, "--epochs", 2, *words, "--output", "run") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message.replace("HOME", str(home)) in line and not [*here.iterdir()]


def test_cache_without_a_record_is_not_complete(home, here, capfd):
    """As a writer leaves it that was killed before its first block."""
    TeacherCacheWriter(here / "empty", classes=10).close()
    assert kcd("distill", *SMALL, "--epochs", 2, "--teacher-cache", "empty", "--output", "run") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("kcd: empty is not complete: it lacks") and not (here / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--teacher", "cnn_large", "--output", "new"],
            "teacher must be the folder of a finished run or a weights file, got 'cnn_large'",
        ),
        (["--teacher", "nothing", "--output", "new"], "unknown teacher 'nothing'"),
        (
            ["--teacher", "HOME/teacher", "--output", "new", "--precision", "float32"],
            "precision must be one of 'float16', 'bfloat16'",
        ),
        (["--teacher", "HOME/teacher", "--output", "new", "--views", "-1"], "views must be an integer >= 0, got -1"),
        (
            ["--teacher", "HOME/teacher", "--output", "HOME/teacher"],
            "output HOME/teacher holds checkpoint and no cache",
        ),
        (
            ["--teacher", "HOME/teacher", "--output", "HOME/plain", "--views", "1"],
            "HOME/plain was made with views=None, got views=dict",
        ),
        (["--teacher", "HOME/teacher", "--output", "file"], "output file is a file: choose another --output"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_invalid_cache_option_is_one_line(arguments, message, home, here, capfd):
    (here / "file").write_text("")
    before = contents(home)
    words = [word.replace("HOME", str(home)) for word in arguments]
    assert kcd("cache", *SMALL, *words) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("kcd: ")]
    assert message.replace("HOME", str(home)) in line and contents(home) == before and not (here / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_cache_command_continues(number, home, here):
    command = ["cache", *SMALL, "--padding", 2, "--teacher", home / "teacher", "--views", 20, "--output", "cache"]
    code, _, error = stop(*command, "--batch-size", 20, cwd=here, until="cache/cache.json", number=number)
    assert code == (130 if number == signal.SIGINT else -number)
    if number == signal.SIGINT:
        assert error.splitlines()[-1] == "kcd: interrupted: run the command again to continue in cache"
    before = len(TeacherCache(here / "cache"))
    done = run(*command, cwd=here)
    assert (done.returncode, done.stderr) == (0, "") and "20 views each" in done.stdout
    cache = TeacherCache(here / "cache")
    assert cache.ids.tolist() == [*range(1083)] and {*cache.lengths.tolist()} == {20} and before < 1083
    assert not (here / "cache" / files.LOCK).exists()


@pytest.mark.slow
def test_two_ranks_make_and_use_a_cache(home, here):
    done = run(
        "cache",
        *SMALL,
        "--teacher",
        home / "teacher",
        "--output",
        "cache",
        cwd=here,
        launcher=TORCHRUN,
        env=NO_LAUNCHER_ENV,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and "1083 images" in done.stdout
    torch.testing.assert_close(
        TeacherCache(here / "cache").batch(range(1083)),
        TeacherCache(home / "plain").batch(range(1083)),
        rtol=2e-3,
        atol=2e-3,
    )
    command = ["distill", *SMALL, "--epochs", 2, "--teacher-cache", "cache", "--output", "run"]
    done = run(*command, cwd=here, launcher=TORCHRUN, env=NO_LAUNCHER_ENV)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((here / "run" / "summary.json").read_text())["results"]
    assert result["teacher_visits"] == 0 and result["sample_visits"] == 2 * 1083
