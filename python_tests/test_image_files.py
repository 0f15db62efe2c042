"""Tests of splits, resizing, and images on disk: a run that decodes its images as it goes equals the run in memory."""

import random
import shutil
import time
import types
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run as run_command
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import Crew
from small_runs import assert_same, final, network

from kcd_ext import environment, files
from kcd_ext.data import ImageData, ImageFiles, ImageSet, Views, load
from kcd_ext.data.images import assemble, stratified_split
from kcd_ext.data.reading import Reading, parse_bytes
from kcd_ext.data.resizing import resized
from kcd_ext.data.splits import stratified_parts
from kcd_ext.training import Condense, Recipe, checkpoint, distill
from kcd_ext.training.fingerprint import digest, digest_of_samples

pytestmark = pytest.mark.usefixtures("one_thread")
MODES = ("L", "RGB", "RGBA", "P", "CMYK", "LA")


def pixels(seed, height, width, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def write_folder(root, part, count, *, classes=4, size=None, mode=None, seed=0):
    """Write `count` images, in turn of every class; by default with sizes, modes and EXIF orientations that vary."""
    for i in range(count):
        rng = random.Random(1000 * seed + i)
        width, height = size or (rng.randrange(6, 15), rng.randrange(6, 15))
        label = i % classes
        array = np.clip(pixels(i, height, width).astype(int) // 3 + 50 * label, 0, 255).astype(np.uint8)
        image = Image.fromarray(array).convert(mode or MODES[i % len(MODES)])
        folder = Path(root, part, f"class-{label}")
        folder.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = 1 + i % 8 if size is None else 1
        image.save(folder / f"{i:03}.{'jpg' if image.mode == 'CMYK' else 'png'}", exif=exif)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of 45 images of 4 classes, without a split."""
    root = tmp_path_factory.mktemp("images") / "shapes"
    write_folder(root, "", 45)
    return root


def student(seed=1, width=6):
    """Return a network with dropout, for images of 6 x 6 pixels in colour."""
    built = network(seed, width)
    built[0] = torch.nn.Conv2d(3, width, 3, 2, padding=1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built[0].reset_parameters()
    return built


OPTIONS = {"size": 6, "val_fraction": 0.2, "test_fraction": 0.2, "padding": 1, "flip": True}


def recipe(**changes):
    chosen = changes.pop("condense", {})
    condense = Condense(**chosen if chosen.get("selection") == "infobatch" else {"keep": 0.5, "stages": 4} | chosen)
    given = {"epochs": 12, "batch_size": 8, "lr": 0.02, "device": "cpu", "seed": 5} | changes
    return Recipe("kd", condense=condense, **given)


def train(folder, output, memory, **changes):
    torch.set_num_threads(1)
    torch.manual_seed(random.SystemRandom().randrange(2**32))  # the caller's generator must not matter
    data = load(folder, memory=memory, **OPTIONS)
    given = {"output": output, "resume": True, "progress": changes.pop("progress", None)}
    return distill(student(), student(2, 10), data.train, data.test, recipe(**changes), **given)


# --- images on disk ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 6])
@pytest.mark.parametrize("resize", [None, "crop", "squash"])
def test_images_on_disk_equal_those_in_memory(size, resize, tmp_path):
    if resize and not size:
        pytest.skip("an error, which is tested elsewhere")
    write_folder(tmp_path, "train", 17, size=None if size else (9, 9))
    write_folder(tmp_path, "val", 9, size=None if size else (9, 9), seed=1)
    write_folder(tmp_path, "test", 6, size=None if size else (9, 9), seed=2)
    resident, streamed = (load(tmp_path, size=size, resize=resize, memory=memory, flip=True) for memory in (None, 0))
    assert resident.train.views == streamed.train.views == Views.from_images(resident.train.images, flip=True)
    assert resident.resize == streamed.resize == (size and (resize or "crop"))
    for part in ("train", "val", "test"):
        here, there = getattr(resident, part), getattr(streamed, part)
        assert isinstance(here, ImageSet) and isinstance(there, ImageFiles) and here.shape == there.shape
        assert np.array_equal(here.labels, there.labels) and here.views == there.views
        assert [x.tobytes() for x, _ in map(there.__getitem__, range(len(there)))] == [x.tobytes() for x in here.images]
        assert np.array_equal(np.concatenate([*there.blocks()]), here.images)
        chosen = np.array([2, 0, 2])
        assert np.array_equal(there.take(chosen)[0][0], here.take(chosen).images[0])


@pytest.mark.parametrize(
    "condense",
    [
        {},
        {"stages": 6, "accumulate": True, "keep": 0.3, "epsilon": 1.0},
        {"epsilon": 0.0},
        {"selection": "random"},
        {"selection": "infobatch", "keep": 0.8},
        {"min_per_class": 2},
    ],
    ids=str,
)
def test_streamed_run_equals_the_run_in_memory(condense, folder, tmp_path):
    """With dropout, so that streaming must draw no random number of the run."""
    summaries = [train(folder, tmp_path / str(memory), memory, condense=condense) for memory in (None, 1)]
    assert_same(final(tmp_path / "1"), final(tmp_path / "None"))
    mixed = checkpoint.load(tmp_path / "1" / "checkpoint").training["condenser"].get("mixed", ())
    assert len(mixed) > 5 or "selection" in condense or condense.get("epsilon") == 0
    if condense.get("accumulate"):
        trees = summaries[1].condenser.mix_trees.values()
        assert any(isinstance(part, tuple) for tree in trees for part in tree[:2])  # mixes of mixes


def test_run_moves_between_memory_and_disk(folder, tmp_path):
    class StopError(Exception):
        pass

    def stop_after(epoch):
        def progress(line):
            if line["epoch"] == epoch:
                raise StopError

        return progress

    train(folder, tmp_path / "reference", None)
    for first in (None, 1):
        output = tmp_path / str(first)
        for memory, epoch in ((first, 4), (1 - (first or 0), 7), (first, 9)):
            with pytest.raises(StopError):
                train(folder, output, memory, progress=stop_after(epoch))
        train(folder, output, None if first else 1)
        assert_same(final(output), final(tmp_path / "reference"))


@pytest.mark.slow
def test_streamed_runs_of_two_processes_killed_repeatedly_equal_the_run_in_memory(folder, tmp_path):
    reference, interrupted = tmp_path / "reference", tmp_path / "interrupted"
    more = {"epochs": 24, "gradient_accumulation": 2}
    assert Crew(lambda rank: train(folder, reference, None, **more), 2).wait() == [0, 0]
    rng = random.Random(0)
    for _ in range(3):
        metrics = interrupted / "metrics.jsonl"
        done = len(files.read_lines(metrics)) if metrics.exists() else 0
        crew = Crew(lambda rank: train(folder, interrupted, 1, **more), 2)
        deadline = time.monotonic() + 100
        while (len(files.read_lines(metrics)) if metrics.exists() else 0) < done + rng.randrange(1, 4):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        crew.kill()
        assert not (interrupted / "summary.json").exists()
    assert Crew(lambda rank: train(folder, interrupted, 1, **more), 2).wait() == [0, 0]
    assert_same(final(interrupted), final(reference))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the children of a process from /proc")
def test_workers_of_a_killed_run_end(folder, tmp_path):
    crew = Crew(lambda rank: train(folder, tmp_path / "run", 1, epochs=1000, num_workers=2))
    children = Path(f"/proc/{crew.pids[0]}/task/{crew.pids[0]}/children")
    deadline = time.monotonic() + 100
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = children.read_text().split()

    def run_on(pid):
        try:
            return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
        except OSError:  # it has gone
            return False

    assert len(workers) >= 2 and all(map(run_on, workers))
    crew.kill()
    while any(map(run_on, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("damage", ["deleted", "truncated", "a folder", "a broken link", "another size"])
def test_image_that_is_lost_in_mid_run_is_named_and_the_run_resumes(damage, tmp_path):
    root = tmp_path / "images"
    write_folder(root, "train", 24, size=(6, 6))
    write_folder(root, "test", 8, size=(6, 6), seed=1)
    data = load(root, memory=1, mean=0.5, std=0.25)
    broken, kept = root / "train" / "class-1" / "005.png", tmp_path / "kept.png"
    broken.rename(kept)
    kept.copy(broken) if hasattr(kept, "copy") else broken.write_bytes(kept.read_bytes())

    def damage_it(line):
        if line["epoch"] != 2:
            return
        broken.unlink()
        if damage == "truncated":
            broken.write_bytes(kept.read_bytes()[:60])
        elif damage == "a folder":
            broken.mkdir()
        elif damage == "a broken link":
            broken.symlink_to("nowhere.png")
        elif damage == "another size":
            Image.fromarray(pixels(0, 7, 6)).save(broken)

    def run(output, progress=None):
        networks = student(), student(2, 10)
        options = {"output": output, "resume": True, "progress": progress}
        return distill(*networks, data.train, data.test, recipe(condense={"keep": 1.0}, epochs=4), **options)

    run(tmp_path / "reference")
    with pytest.raises(ValueError, match=f"^train: {broken}: ") as caught:
        run(tmp_path / "run", damage_it)
    assert "\n" not in str(caught.value)
    assert len(files.read_lines(tmp_path / "run" / "metrics.jsonl")) == 2
    broken.rmdir() if broken.is_dir() else broken.unlink(missing_ok=True)
    kept.rename(broken)
    run(tmp_path / "run")
    assert_same(final(tmp_path / "run"), final(tmp_path / "reference"))


def test_given_normalisation_reads_no_pixels(folder, tmp_path):
    """Reading all images of a large set takes minutes. Only headers are read if mean and std are known."""
    write_folder(tmp_path, "train", 8, size=(6, 6))
    write_folder(tmp_path, "test", 4, size=(6, 6))
    path = tmp_path / "train" / "class-3" / "007.png"
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"IDAT") + 4])  # all that precedes the pixels
    data = load(tmp_path, memory=1, mean="imagenet")
    assert data.train.views.mean == data.test.views.mean == (0.485, 0.456, 0.406)
    for options in ({"memory": 1}, {"mean": "imagenet"}):
        with pytest.raises(ValueError, match=f"{path}: cannot be read as an image"):
            load(tmp_path, **options)


def test_progress_is_reported_while_images_are_read(folder):
    bars = []

    class Bar:
        def __init__(self, total, desc):
            self.total, self.done = total, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, count):
            self.done += count

    data = load(folder, memory=1, progress=Bar, **OPTIONS)
    assert [bar.done for bar in bars] == [bar.total for bar in bars] == [45, len(data.train)]


def test_digest_of_images_on_disk_has_the_form_of_a_recorded_one(folder):
    here, there = (load(folder, memory=memory, **OPTIONS).train for memory in (None, 1))
    images, labels = here.tensors("cpu")
    assert digest_of_samples(here) == digest({f"images {here.views}": images, "labels": labels})
    for like in (digest_of_samples(here), digest_of_samples(there)):
        assert digest_of_samples(here, like) == digest_of_samples(there, like) == like
    assert digest_of_samples(here) != digest_of_samples(there)
    other = load(folder, memory=1, **OPTIONS | {"resize": "squash"}).train
    for changed in (other, there.with_views(replace(there.views, flip=False)), there.take(np.arange(5))):
        for like in (digest_of_samples(here), digest_of_samples(there)):
            assert digest_of_samples(changed, like) != like


# --- memory -----------------------------------------------------------------------------------------------------------


def test_bytes_are_parsed():
    sizes = {0: 0, 7: 7, "12": 12, "4GB": 4 * 10**9, "1.5 GiB": 3 * 2**29, "500mb": 5 * 10**8, "2k": 2000, "1e3": 1000}
    assert {size: parse_bytes("memory", size) for size in sizes} == sizes
    for wrong, error in (
        ("", ValueError),
        ("GB", ValueError),
        ("4 XB", ValueError),
        ("-1", ValueError),
        ("1.2.3", ValueError),
        ("1e999", ValueError),
        (-1, ValueError),
        (1.5, TypeError),
        (True, TypeError),
    ):
        with pytest.raises(error, match="memory must be a number of bytes >= 0, such as 500MB, 4GB or 4GiB, got"):
            Reading(memory=wrong)


def test_images_are_in_memory_if_they_fit(folder, monkeypatch):
    size = 45 * 6 * 6 * 3
    for memory, kind in ((size, ImageSet), (size - 1, ImageFiles)):
        assert isinstance(load(folder, memory=memory, size=6, test_fraction=0.5).train, kind)
    for ranks, available, kind in (
        (1, 4 * size, ImageSet),
        (1, 4 * size - 4, ImageFiles),
        (2, 8 * size, ImageSet),
        (2, 4 * size, ImageFiles),
    ):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        monkeypatch.setattr("kcd_ext.data.reading.available_memory", lambda available=available: available)
        assert isinstance(load(folder, size=6, test_fraction=0.5).train, kind)
    assert 2**20 < environment.available_memory() < 2**50


# --- resizing ---------------------------------------------------------------------------------------------------------


def by_torchvision(image, side):
    """Return `Resize(side)` and `CenterCrop(side)` as torchvision defines them (antialiased, bilinear)."""
    short, long = min(image.size), max(image.size)
    scaled = int(side * long / short)
    image = image.resize((side, scaled) if image.width <= image.height else (scaled, side), Image.Resampling.BILINEAR)
    left, top = round((image.width - side) / 2.0), round((image.height - side) / 2.0)
    return image.crop((left, top, left + side, top + side))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 33))
def test_crop_is_that_of_torchvision(width, height, side):
    image = Image.fromarray(pixels(width, height, width))
    got, expected = np.asarray(resized(image, side, side)), np.asarray(by_torchvision(image, side))
    # Of elongated images only the centre is scaled, whose bounds are rounded.
    assert np.abs(got.astype(int) - expected).max() <= (max(width, height) > 16 * min(width, height))
    squashed = image.resize((side, side), Image.Resampling.BILINEAR)
    assert np.array_equal(resized(image, side, side, "squash"), squashed)


@settings(max_examples=40, deadline=None)
@given(*[st.integers(1, 30)] * 4, st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]))
def test_crop_keeps_proportions_and_the_centre(width, height, to_width, to_height, interpolation):
    ramp = np.zeros((height, width, 3), dtype=np.uint8)
    ramp[..., 0] = np.linspace(0, 255, width)
    ramp[..., 1] = np.linspace(0, 255, height)[:, None]
    result = resized(Image.fromarray(ramp), to_width, to_height, "crop", interpolation)
    assert result.size == (to_width, to_height)
    got = np.asarray(result).astype(float)
    if min(width, height, to_width, to_height) > 8 and interpolation != "nearest":
        for channel in (0, 1):
            assert abs((got[..., channel].min() + got[..., channel].max()) / 2 - 127.5) < 16  # the middle stays there
        slope = got[0, -1, 0] - got[0, 0, 0], got[-1, 0, 1] - got[0, 0, 1]
        shown = slope[0] / 255 * width / to_width, slope[1] / 255 * height / to_height
        assert abs(shown[0] - shown[1]) < 0.35 * max(shown)  # source pixels per pixel, in both directions


@pytest.mark.parametrize("size", [(3000, 2), (2, 3000), (1700, 100)], ids=str)
def test_only_the_centre_of_an_elongated_image_is_scaled(size, monkeypatch):
    image = Image.fromarray(pixels(3, *size))
    expected = image.resize([32 * side // min(size) for side in image.size], Image.Resampling.BILINEAR)
    left, top = ((side - 32) // 2 for side in expected.size)
    resize, sizes = Image.Image.resize, []
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *rest: sizes.append(size) or resize(self, size, *rest)
    )
    got = resized(image, 32, 32)
    assert sizes == [(32, 32)]
    difference = np.asarray(got).astype(int) - np.asarray(expected.crop((left, top, left + 32, top + 32)))
    assert np.abs(difference).max() <= 1


def test_bad_resizing_is_refused(folder):
    for options, message in (
        ({"size": 6, "resize": "fit"}, "resize must be one of 'crop', 'squash', got 'fit'"),
        ({"resize": "squash"}, r"resize='squash' has no effect without size \(--size\)"),
    ):
        with pytest.raises(ValueError, match=message):
            load(folder, test_fraction=0.2, **options)
    with pytest.raises(ValueError, match="interpolation must be one of"):
        resized(Image.new("L", (2, 2)), 1, 1, interpolation="cubic")


# --- splits -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60),
    st.floats(0.001, 0.999),
    st.floats(0.001, 0.999),
    st.integers(0, 3),
)
def test_parts_are_disjoint_stratified_and_leave_every_class(labels, first, second, seed):
    labels, fractions = np.array(labels), [first, second] if first + second < 1 else [first]
    rest, *parts = stratified_parts(labels, fractions, seed)
    assert sorted(np.concatenate([rest, *parts]).tolist()) == list(range(len(labels)))
    for label in np.unique(labels):
        count = (labels == label).sum()
        assert [(labels[part] == label).sum() for part in parts] == [int(fraction * count) for fraction in fractions]
        assert (labels[rest] == label).any()
    assert all((np.diff(part) > 0).all() for part in (rest, *parts))
    alone = stratified_split(labels, first, seed)
    assert np.array_equal(parts[0], alone[1])  # whatever else is split off


def names(images):
    return [Path(images.files.name(i)).name for i in range(len(images))]


def test_folder_without_a_split_is_divided(folder):
    data = load(folder, memory=1, **OPTIONS)
    train, val, test = map(names, (data.train, data.val, data.test))
    assert sorted(train + val + test) == sorted(path.name for path in folder.rglob("*.*g"))
    assert [len(part) for part in (train, val, test)] == [29, 8, 8]  # of 12, 11, 11 and 11 images, 2 each
    assert names(load(folder, memory=1, size=6, test_fraction=0.2).test) == test
    assert (
        data.train.views.mean
        == Views.from_images(np.stack([x for x, _ in map(data.train.__getitem__, range(29))])).mean
    )
    for wrong in ({}, {"size": 6}):
        with pytest.raises(
            ValueError, match=r"give test_fraction \(--test-fraction\) or val_fraction \(--val-fraction\)"
        ):
            load(folder, **wrong)


def test_classes_named_train_or_val_are_classes_beside_others(folder, tmp_path):
    folder = Path(shutil.copytree(folder, tmp_path / "copy"))
    classes = sorted(path.name for path in folder.iterdir())
    expected = [load(folder, memory=memory, **OPTIONS).test.labels.tolist() for memory in (None, 1)]
    for new, old in (("train", classes[1]), ("val", classes[-1])):
        (folder / old).rename(folder / new)
        data = [load(folder, memory=memory, **OPTIONS) for memory in (None, 1)]
        assert new in data[0].class_names and data[0].class_names == data[1].class_names
        assert [sorted(part.test.labels.tolist()) for part in data] == [sorted(labels) for labels in expected]
    (folder / "train" / "steam").mkdir()
    with pytest.raises(ValueError, match="val: must have a folder of images for every class, but has none"):
        load(folder, **OPTIONS)


def test_validation_images_test_too_if_there_are_no_others(folder):
    with pytest.warns(
        UserWarning, match="val_fraction=0.2 splits off validate and test, so the test accuracy is that"
    ) as found:
        data = load(folder, size=6, val_fraction=0.2)
    assert len(found) == 1 and data.val is data.test and len(data.train) == 37 and len(data.test) == 8


@pytest.mark.parametrize("memory", [None, 1])
def test_val_folder_validates_and_fractions_are_refused_where_they_have_no_effect(memory, tmp_path):
    write_folder(tmp_path, "Train", 16, size=(6, 6))
    write_folder(tmp_path, "valid", 8, size=(6, 6), seed=1)
    only = load(tmp_path, memory=memory)
    assert only.val is None and len(only.test) == 8
    split = load(tmp_path, memory=memory, val_fraction=0.25)
    assert (len(split.train), len(split.val), len(split.test)) == (12, 4, 8)
    split = load(tmp_path, memory=memory, test_fraction=0.5)
    assert (len(split.train), len(split.val), len(split.test)) == (8, 8, 8)
    write_folder(tmp_path, "TEST", 4, size=(6, 6), seed=2)
    data = load(tmp_path, memory=memory)
    assert (len(data.train), len(data.val), len(data.test)) == (16, 8, 4)
    for options, message in (
        ({"val_fraction": 0.5}, f"val_fraction=0.5 is for data without validation images, which {tmp_path} has"),
        ({"test_fraction": 0.5}, f"test_fraction=0.5 is for data without test images, which {tmp_path} has"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tmp_path, memory=memory, **options)
    (tmp_path / "valid" / "owl").mkdir()
    with pytest.raises(ValueError, match="every class must have a folder in Train too, which has none for 'owl'"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, r"val_fraction must be a number in \(0, 1\), got 1.0"),
        ({"test_fraction": 0}, r"test_fraction must be a number in \(0, 1\), got 0"),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "must add up to less than 1, got 0.6 and 0.5"),
        (
            {"val_fraction": 0.01, "test_fraction": 0.5},
            "val_fraction=0.01 must leave at least one image: .* class has 12",
        ),
        (
            {"val_fraction": 0.2, "image_column": "image"},
            "image_column is for a data set that Hugging Face datasets saved",
        ),
    ],
)
def test_bad_fractions_are_refused(options, message, folder):
    with pytest.raises(ValueError, match=message) as caught:
        load(folder, size=6, **options)
    assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match=r"val_fraction must be a number in \(0, 1\), got str '0.5'"):
        load(folder, size=6, val_fraction="0.5")


def test_npz_is_divided(tmp_path):
    images, labels = pixels(0, 40 * 5, 4).reshape(40, 5, 4, 3), np.arange(40) % 4
    np.savez(tmp_path / "one.npz", x_train=images, y_train=labels)
    data = load(tmp_path / "one.npz", val_fraction=0.2, test_fraction=0.3)
    assert (len(data.train), len(data.val), len(data.test)) == (20, 8, 12)
    assert data.test.views == Views.from_images(data.train.images)
    assert np.array_equal(data.test.images, images[stratified_split(labels, 0.3)[1]])
    with pytest.raises(ValueError, match=r"x_test, y_test missing, .*; without test images, give test_fraction"):
        load(tmp_path / "one.npz")
    parts = {
        f"{axis}_{part}": array[:n]
        for part, n in (("train", 40), ("val", 8))
        for axis, array in (("x", images), ("y", labels))
    }
    np.savez(tmp_path / "two.npz", **parts)
    data = load(tmp_path / "two.npz")
    assert data.val is None and len(data.test) == 8
    np.savez(tmp_path / "three.npz", **parts, x_test=images[:4], y_test=labels[:4])
    data = load(tmp_path / "three.npz")
    assert (len(data.train), len(data.val), len(data.test)) == (40, 8, 4)
    del parts["y_val"]
    np.savez(tmp_path / "four.npz", **parts, x_test=images[:4], y_test=labels[:4])
    with pytest.raises(ValueError, match="y_val missing"):
        load(tmp_path / "four.npz")


def test_any_data_set_gives_up_images_to_validate(monkeypatch):
    data = load("digits", val_fraction=0.25, flip=True)
    full = load("digits")
    assert len(data.train) + len(data.val) == len(full.train) and np.array_equal(data.test.images, full.test.images)
    rest = Views.from_images(data.train.images)
    assert data.train.views == replace(rest, flip=True) and data.val.views == data.test.views == rest
    own = Views((0.5,), (0.5,))
    given = ImageData("own", *(full.train.with_views(own), full.test.with_views(own)), full.num_classes)
    monkeypatch.setitem(__import__("sys").modules, "a_module", types.SimpleNamespace(own=lambda: given))
    kept = load("a_module:own", val_fraction=0.25)
    assert kept.train.views == kept.val.views == own  # a normalisation of its own stays
    with pytest.raises(
        ValueError, match="test_fraction is for data without test images, which data set 'digits' is not"
    ):
        load("digits", test_fraction=0.1)
    for part in ("memory", "image_column"):
        with pytest.raises(ValueError, match=f"{part} is for the path of a folder of images"):
            load("digits", **{part: "1"})


def test_validation_images_are_checked():
    images, labels = pixels(0, 4, 3, 1).reshape(4, 3, 1, 1), np.arange(4)
    parts = {"train": (images, labels), "test": (images, labels)}
    assert assemble("x", **parts, num_classes=4, val=(images[:2], labels[:2])).val.labels.tolist() == [0, 1]
    for val, message in (
        ((images[:0], labels[:0]), "val must have at least one image"),
        ((images, labels + 1), r"labels of val must be in \[0, 4\), got 1 to 4"),
        ((images[:, :2], labels), "images of train and val must have one shape"),
    ):
        with pytest.raises(ValueError, match=message):
            assemble("x", **parts, num_classes=4, val=val)
    data = load("digits", val_fraction=0.5)
    with pytest.raises(
        ValueError, match="val must have views with padding=0, flip=False and policy=None, got padding=0, flip=True"
    ):
        replace(data, val=data.val.with_views(replace(data.val.views, flip=True)))
    with pytest.raises(ValueError, match="resize must be one of"):
        replace(data, resize="fit")


# --- Hugging Face datasets --------------------------------------------------------------------------------------------


@pytest.fixture
def hub():
    """The package, quiet."""
    package = pytest.importorskip("datasets")
    package.disable_progress_bars()
    return package


def columns(hub, count, classes=("a", "b", "c"), size=(6, 5), **more):
    """Return a data set of random images in turn of every class."""
    features = {"id": hub.Value("int32"), "picture": hub.Image(), "kind": hub.ClassLabel(names=list(classes))}
    content = {
        "id": list(range(count)),
        "picture": [Image.fromarray(pixels(i, *size[::-1])) for i in range(count)],
        "kind": [i % len(classes) for i in range(count)],
    } | more
    return hub.Dataset.from_dict(content, features=hub.Features(features))


@pytest.mark.slow
@pytest.mark.parametrize("memory", [None, 1])
def test_saved_data_set_is_read(hub, memory, tmp_path):
    sizes = {"train": 12, "validation": 6, "test": 3}
    saved = hub.DatasetDict({part: columns(hub, count) for part, count in sizes.items()})
    saved.save_to_disk(tmp_path / "pets")
    data = load(tmp_path / "pets", memory=memory)
    assert (data.name, data.class_names, data.num_classes) == ("pets", ("a", "b", "c"), 3)
    for part, count in zip((data.train, data.val, data.test), sizes.values(), strict=True):
        assert isinstance(part, ImageFiles if memory else ImageSet)
        assert part.labels.tolist() == [i % 3 for i in range(count)]
        assert [part[i][0].tobytes() for i in range(count)] == [pixels(i, 5, 6).tobytes() for i in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("memory", [None, 1])
def test_saved_data_set_with_a_format_and_reordered_rows_is_divided(hub, memory, tmp_path):
    own = columns(hub, 20).shuffle(seed=1).select(range(2, 18))
    order = own["id"][:]
    own.with_format("numpy", columns=["id"]).save_to_disk(tmp_path / "one")
    data = load(tmp_path / "one", memory=memory, test_fraction=0.4, size=4)
    index = stratified_split(np.array([order[i] % 3 for i in range(16)]), 0.4)
    for part, chosen in zip((data.train, data.test), index, strict=True):
        expected = [resized(Image.fromarray(pixels(order[i], 5, 6)), 4, 4) for i in chosen]
        assert [part[i][0].tobytes() for i in range(len(part))] == [image.tobytes() for image in expected]
    with pytest.raises(ValueError, match="has no split test; give test_fraction"):
        load(tmp_path / "one", memory=memory)


@pytest.mark.slow
def test_label_column_can_be_chosen_and_hold_integers_or_strings(hub, tmp_path):
    features = hub.Features(
        {
            "image": hub.Image(),
            "fine": hub.ClassLabel(names=["x", "y"]),
            "coarse": hub.ClassLabel(names=["z"]),
            "number": hub.Value("int64"),
            "word": hub.Value("string"),
            "real": hub.Value("float32"),
        }
    )
    grey = [Image.fromarray(pixels(i, 4, 4)[..., 0]) for i in range(8)]
    content = {"image": grey, "fine": [0, 1] * 4, "coarse": [0] * 8, "number": [2, 0] * 4, "word": ["é", "b"] * 4}
    hub.Dataset.from_dict({**content, "real": [0.0] * 8}, features=features).save_to_disk(tmp_path / "x")
    for column, classes, found, labels in (
        ("fine", 2, ("x", "y"), {0, 1}),
        ("coarse", 1, ("z",), {0}),
        ("number", 3, (), {0, 2}),
        ("word", 2, ("b", "é"), {0, 1}),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the numbers leave a class without images
            data = load(tmp_path / "x", test_fraction=0.5, label_column=column)
        assert (data.num_classes, data.class_names, data.in_channels) == (classes, found, 1)
        assert {*data.train.labels.tolist()} == labels
    for column, message in (
        (None, "must have one column of type ClassLabel, got 'fine' and 'coarse' among .*; label_column .* names it"),
        ("real", "column 'real' must hold classes, integers or strings"),
        ("wrd", "label_column must be one of 'image', .*, got 'wrd': did you mean word"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            load(tmp_path / "x", test_fraction=0.5, label_column=column)
        assert "\n" not in str(caught.value) and str(tmp_path / "x") in str(caught.value)


@pytest.mark.slow
def test_damaged_or_unsuitable_saved_data_sets_are_refused(hub, tmp_path):
    def refuses(message, splits, path=tmp_path / "x", **options):
        if splits is not None:
            hub.DatasetDict(splits).save_to_disk(path)
        with pytest.raises(ValueError, match=message) as caught:
            load(path, **options)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    good = columns(hub, 6)
    refuses("must have a split train with images, it has 'fold'", {"fold": good})
    refuses(
        r"x/train\[1\]: must have an image, got None",
        {"train": columns(hub, 3, picture=[good[0]["picture"], None, good[0]["picture"]]), "test": good},
    )
    refuses(
        "column 'kind' must have a label in every row, 1 have none",
        {"train": columns(hub, 3, kind=[0, None, 1]), "test": good},
    )
    refuses(
        "column 'kind' of test must have labels >= 0, got -1",
        {"train": good, "test": columns(hub, 3, kind=[-1, -1, -1])},
    )
    refuses(
        "all splits must have the same columns, train and test differ",
        {"train": good, "test": columns(hub, 3, classes=("a", "c", "b"))},
    )
    refuses(
        r"images must have one size, got 2, from 6x5 \(train\[0\]\) to 7x6 \(test\[0\]\)",
        {"train": good, "test": columns(hub, 3, size=(7, 6))},
    )
    hub.DatasetDict({"train": good, "test": good}).save_to_disk(tmp_path / "y")
    next((tmp_path / "y" / "test").glob("*.arrow")).write_bytes(b"no arrow" * 20)
    refuses("cannot be read by Hugging Face datasets", None, tmp_path / "y")


@pytest.fixture
def write(hub, tmp_path, monkeypatch):
    """A function that writes Parquet files below `tmp_path`, each with a number of rows."""
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write_files(**counts):
        for name, count in counts.items():
            file = tmp_path / f"{name.replace('__', '/').replace('_', '-')}.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            columns(hub, count).to_parquet(file)

    return write_files


@pytest.mark.slow
@pytest.mark.parametrize("memory", [None, 1])
def test_parquet_files_of_the_hub_are_read(write, memory, tmp_path, recwarn):
    write(a__data__train_00000_of_00002=6, a__data__train_00001_of_00002=3, a__data__test_00000_of_00001_0f1e=4)
    write(a__data__validation_00000_of_00001=3, a__metadata=2, b__default__train__0000=6, b__default__train__0001=3)
    write(b__default__valid__0000=3, b__default__test__0000=4, c__train=9, c__dev=3, c__test=4)
    for name, root in (("a", "a"), ("b", "b"), ("c", "c"), ("default", "b/default"), ("data", "a/data")):
        data = load(tmp_path / root, memory=memory)
        assert (data.name, data.class_names) == (name, ("a", "b", "c"))
        for part, count in ((data.train, 9), (data.val, 3), (data.test, 4)):
            assert isinstance(part, ImageFiles if memory else ImageSet) and len(part) == count
        first = 0 if root == "c" else 6
        assert data.train[8][0].tobytes() == pixels(8 - first, 5, 6).tobytes()
    assert not recwarn
    file = load(tmp_path / "b" / "default" / "train" / "0000.parquet", memory=memory, test_fraction=0.5)
    assert len(file.train) == len(file.test) == 3
    write(b__default__extra__0000=3)
    with pytest.warns(UserWarning, match="b: read train, valid, test and ignored extra"):
        load(tmp_path / "b", memory=memory)


@pytest.mark.slow
def test_parquet_files_without_the_types_of_the_library_are_read(hub, write, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    plain = columns(hub, 6).cast_column("picture", hub.Image(decode=False))
    table = pyarrow.table({"picture": plain["picture"][:], "label": plain["kind"][:]})
    for part in ("train", "test"):
        parquet.write_table(table, tmp_path / f"{part}.parquet")
    with pytest.raises(ValueError, match=r"one column of type ClassLabel, got none among .*; label_column .* names it"):
        load(tmp_path)
    data = load(tmp_path, label_column="label")
    assert data.train[5][0].tobytes() == pixels(5, 5, 6).tobytes() and data.num_classes == 3


@pytest.mark.slow
def test_unsuitable_parquet_files_are_refused(write, tmp_path, capfd):
    write(a__fine__train=6, a__coarse__train=6, b__train=6, d__train=6, d__test=6, e__0000=6)
    (tmp_path / "d" / "test.parquet").write_bytes((tmp_path / "d" / "test.parquet").read_bytes()[:-40])
    for folder, message in (
        (
            "a",
            "must have Parquet files of one data set, got several, in '.*coarse', '.*fine': name one of these folders",
        ),
        ("b", "b: has no split test; give test_fraction"),
        ("d", "test.parquet: cannot be read as Parquet: "),
        ("e", "e: has no split test; give test_fraction"),
    ):
        capfd.readouterr()
        with pytest.raises(ValueError, match=message) as caught:
            load(tmp_path / folder)
        assert "\n" not in str(caught.value) and capfd.readouterr().err == ""


def test_folder_of_images_may_hold_a_parquet_file(tmp_path):
    for part in ("train", "test"):
        write_folder(tmp_path, part, 8, size=(6, 5))
    (tmp_path / "labels.parquet").write_bytes(b"a table about the images")
    assert len(load(tmp_path).train) == 8


@pytest.mark.slow
def test_missing_package_names_the_extra(hub, tmp_path, monkeypatch):
    columns(hub, 6).save_to_disk(tmp_path / "x")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "kcd-ext\[train,datasets\]"'):
        load(tmp_path / "x", test_fraction=0.5)


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_commands_train_and_evaluate_from_disk(folder, tmp_path):
    """The same table of the same folder, in memory and on disk; evaluation needs no option."""
    options = [
        "--size",
        6,
        "--val-fraction",
        0.2,
        "--test-fraction",
        0.2,
        "--epochs",
        6,
        "--threads",
        1,
        "--device",
        "cpu",
    ]
    networks = ["--teacher", "cnn_large", "--student", "cnn_small", "--method", "kc-kd", "--condense.keep", 0.6]
    for output, memory in (("here", "1GB"), ("there", "1")):
        command = ["distill", "--data", folder, *options, *networks, "--memory", memory, "--output", output]
        done = run_command(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert_same(final(tmp_path / "there"), final(tmp_path / "here"))
    for name in ("thumbnails.png", "teacher/student.safetensors"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert files.read_json(tmp_path / "there" / "config.json")["about"]["data"] | {"mean": 0, "std": 0} == {
        "spec": str(folder), "size": 6, "resize": "crop", "val_fraction": 0.2, "test_fraction": 0.2, "padding": 0,
        "flip": False, "augment": "none", "mean": 0, "std": 0,
    }  # fmt: skip
    done = run_command("evaluate", "here", "there", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, other = (files.read_json(tmp_path / name / "evaluation.json")["evaluation"] for name in ("here", "there"))
    assert one == other
    (damaged,) = folder.rglob("007.*")
    content = damaged.read_bytes()
    try:
        damaged.write_bytes(content[: len(content) // 2])
        done = run_command(
            "distill",
            "--data",
            folder,
            *options,
            "--mean",
            "half",
            "--memory",
            1,
            "--student",
            "cnn_small",
            "--method",
            "ce",
            "--output",
            "broken",
            cwd=tmp_path,
        )
    finally:
        damaged.write_bytes(content)
    assert done.returncode == 2 and f"{damaged}: cannot be read as an image" in done.stderr
    assert len(done.stderr.splitlines()) <= 2 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_older_run_with_a_size_is_evaluated_on_squashed_images(folder, tmp_path):
    options = ["--size", 6, "--resize", "squash", "--test-fraction", 0.2, "--epochs", 2, "--threads", 1]
    done = run_command(
        "distill",
        "--data",
        folder,
        *options,
        "--teacher",
        "cnn_small",
        "--student",
        "cnn_small",
        "--output",
        "old",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    config = files.read_json(tmp_path / "old" / "config.json")
    del config["about"]["data"]["resize"]  # as versions wrote it that squashed all images
    files.write_json(tmp_path / "old" / "config.json", config)
    done = run_command("evaluate", "old", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    options.remove("squash"), options.remove("--resize")
    done = run_command(
        "distill",
        "--data",
        folder,
        *options,
        "--teacher",
        "cnn_small",
        "--student",
        "cnn_small",
        "--output",
        "old",
        "--resume",
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "was run with resize='squash', got resize='crop': a resumed run must not change it" in done.stderr
