"""Tests of augmentation: each operation against Pillow, what the policies draw, and the options that choose them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats
from small_runs import NoWait

from kcd_ext.data import ImageSet, Views, load
from kcd_ext.data.augmentation import OPERATIONS, POLICIES, Draw, apply, augment
from kcd_ext.data.images import ImageData, assemble

pytestmark = pytest.mark.usefixtures("one_thread")

# The ranges of the papers' operations at the greatest strength, as torchvision has them: shear, rotation in degrees, distance
# of a factor from 1, bits.
RANGES = {"randaugment": (0.3, 30, 0.9, 4), "trivialaugment": (0.99, 135, 0.99, 6)}
SHAPES = [(1, 1), (2, 5), (3, 3), (9, 6), (17, 33), (32, 32)]


def shift(policy, side, strength):
    return int((150 / 331 * side if policy == "randaugment" else 32) * strength / 30)


def pillow(policy, name, image, strength, sign):
    """Return a PIL image after an operation, by Pillow's own functions."""
    shear, degrees, distance, bits = RANGES[policy]
    share, (width, height) = strength / 30, image.size

    def moved(*coefficients):
        return image.transform(image.size, Image.Transform.AFFINE, coefficients)

    def enhanced(kind):
        return kind(image).enhance(1 + sign * distance * share)

    return {
        "identity": lambda: image,
        "shear_x": lambda: moved(1, sign * shear * share, 0, 0, 1, 0),
        "shear_y": lambda: moved(1, 0, 0, sign * shear * share, 1, 0),
        "translate_x": lambda: moved(1, 0, sign * shift(policy, width, strength), 0, 1, 0),
        "translate_y": lambda: moved(1, 0, 0, 0, 1, sign * shift(policy, height, strength)),
        "rotate": lambda: image.rotate(sign * degrees * share),
        "brightness": lambda: enhanced(ImageEnhance.Brightness),
        "color": lambda: enhanced(ImageEnhance.Color),
        "contrast": lambda: enhanced(ImageEnhance.Contrast),
        "sharpness": lambda: enhanced(ImageEnhance.Sharpness),
        "posterize": lambda: ImageOps.posterize(image, 8 - round(bits * share)),
        "solarize": lambda: ImageOps.solarize(image, 255 * (30 - strength) / 30),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
    }[name]()


def images_of(shape, channels):
    """Return noise, a gradient, low contrast, few levels, one level, black and white, uint8 (7, h, w, c)."""
    random = np.random.default_rng(math.prod(shape) + channels)
    noise = random.integers(0, 256, (*shape, channels))
    row, column = np.indices(shape)
    gradient = (8 * row + 5 * column)[..., None] % 256 + np.arange(channels)
    few = random.choice([3, 90, 91, 255], size=noise.shape, p=[0.1, 0.2, 0.6, 0.1])
    flat = [np.full(noise.shape, level) for level in (77, 0, 255)]
    return np.stack([noise, gradient % 256, 100 + noise // 9, few, *flat]).astype(np.uint8)


def each_strength_and_sign(count):
    """Return strengths 0 ... 30 with both signs, repeated for `count` images: (62 * count,) each."""
    strength, sign = (part.flatten() for part in np.meshgrid(np.arange(31), [1, -1]))
    return torch.from_numpy(strength).repeat(count), torch.from_numpy(sign).repeat(count)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_equals_pillow_at_every_strength(policy, channels, name):
    """All grey levels of all pixels are equal, without a tolerance."""
    for shape in SHAPES:
        images = images_of(shape, channels)
        strength, sign = each_strength_and_sign(len(images))
        which = torch.arange(len(images)).repeat_interleave(62)
        draw = Draw(torch.full_like(which, OPERATIONS.index(name)), strength, sign)
        got = apply(POLICIES[policy], torch.from_numpy(images)[which], draw)
        expected = [
            np.asarray(
                pillow(policy, name, Image.fromarray(images[i].squeeze(2) if channels == 1 else images[i]), s, d)
            )
            for i, s, d in zip(which.tolist(), strength.tolist(), sign.tolist(), strict=True)
        ]
        np.testing.assert_array_equal(got.numpy(), np.stack(expected).reshape(got.shape), err_msg=f"{shape}")


def test_images_of_a_batch_are_changed_independently():
    """Every image of a batch of all operations equals that of the operation alone."""
    images = torch.from_numpy(images_of((9, 7), 3))
    generator = torch.Generator().manual_seed(0)
    which = torch.randint(len(images), (300,), generator=generator)
    draw = Draw(
        torch.arange(300) % len(OPERATIONS),
        torch.randint(31, (300,), generator=generator),
        1 - 2 * torch.randint(2, (300,), generator=generator),
    )
    together = apply(POLICIES["trivialaugment"], images[which], draw)
    for i in range(300):
        one = apply(POLICIES["trivialaugment"], images[which[i : i + 1]], Draw(*(part[i : i + 1] for part in draw)))
        assert torch.equal(one[0], together[i])


def test_rotation_does_not_depend_on_the_last_bits_of_cos_and_sin():
    """Devices differ there. Fixed-point coefficients are the same unless they are within that distance of a boundary."""
    sizes, strengths = np.arange(1, 1025)[:, None], np.arange(31)
    for degrees in (30, 135):
        cos, sin = (function(np.radians(degrees) * strengths / 30) for function in (np.cos, np.sin))
        fixed = [cos, sin, cos * (0.5 * sizes - 0.5), sin * (0.5 * sizes - 0.5)]
        for across in (fixed[2], 0.5 * sizes - fixed[2]):
            for down in (fixed[3], -fixed[3]):
                fixed.append(across + down)
        for numbers in fixed:
            boundary = np.abs(numbers * 2**16 % 1 - 0.5)
            assert boundary.min() > 1e-8  # 2^16 * 1024 * 2^-53 = 7e-9


# --- policies ---------------------------------------------------------------------------------------------------------------


def drawn_operations(policy, index, seed=0, epoch=0):
    """Return what `augment` draws for samples, by an oracle in Python integers: (operation, strength, sign) of each step."""
    word, found = 2**64 - 1, []
    philox = np.random.Philox(counter=np.array([0, 0, 0, 4], np.uint64), key=np.array([seed, epoch], np.uint64))
    for key in map(int, philox.random_raw(2 if policy == "randaugment" else 1)):
        z = (key + 0x9E3779B97F4A7C15 * index) & word
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        z ^= z >> 31
        strength = 9 if policy == "randaugment" else ((z >> 31) % 2**31 * 31) >> 31
        found.append((OPERATIONS[(z % 2**31 * 14) >> 31], strength, -1 if z >> 63 else 1))
    return found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (2**64 - 1, 239)])
def test_policy_equals_its_drawn_operations_in_pillow(policy, seed, epoch):
    images = images_of((12, 9), 3)
    index = [0, 1, 2, 3, 49999, 2**31, 2**40, 2**63 - 1, *range(1000, 1100)]
    which = [i % len(images) for i in range(len(index))]
    got = augment(policy, torch.from_numpy(images[which]), torch.tensor(index), seed=seed, epoch=epoch)
    for i, number in enumerate(index):
        image = Image.fromarray(images[which[i]])
        for operation in drawn_operations(policy, number, seed, epoch):
            image = pillow(policy, operation[0], image, *operation[1:])
        np.testing.assert_array_equal(got[i].numpy(), np.asarray(image))


def test_operations_strengths_and_signs_are_uniform():
    drawn = [drawn_operations("trivialaugment", index, 3, 7)[0] for index in range(20_000)]
    counts = [np.unique([each[part] for each in drawn], return_counts=True)[1] for part in range(3)]
    assert [len(count) for count in counts] == [14, 31, 2]
    assert min(stats.chisquare(count).pvalue for count in counts) > 1e-4
    table = np.histogram2d([OPERATIONS.index(each[0]) for each in drawn], [each[1] for each in drawn], bins=(14, 31))[0]
    assert stats.chi2_contingency(table).pvalue > 1e-4
    first, second = zip(*(drawn_operations("randaugment", index, 3, 7) for index in range(20_000)), strict=True)
    table = np.histogram2d(*([OPERATIONS.index(each[0]) for each in part] for part in (first, second)), bins=(14, 14))[
        0
    ]
    assert stats.chi2_contingency(table).pvalue > 1e-4


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_views_augment_after_flip_and_crop(policy, channels):
    images, index = torch.from_numpy(images_of((9, 6), channels)), torch.arange(7) * 977
    cropped = Views((0.0,) * channels, (1 / 255,) * channels, padding=2, flip=True)
    pixels = cropped(images, index, seed=3, epoch=8).permute(0, 2, 3, 1).round().to(torch.uint8)
    views = Views((0.4,) * channels, (0.3,) * channels, padding=2, flip=True, policy=policy)
    expected = views.normalize(augment(policy, pixels, index, seed=3, epoch=8))
    got = views(images, index, seed=3, epoch=8)
    assert torch.equal(got, expected) and got.is_contiguous() and got.dtype == torch.float32
    assert torch.equal(views.normalize(images), replace(views, policy=None).normalize(images))


@pytest.mark.parametrize("policy", POLICIES)
def test_augmented_views_depend_only_on_seed_epoch_and_index(policy):
    images, index = torch.from_numpy(images_of((9, 6), 3)).repeat(5, 1, 1, 1), torch.arange(35) * 977
    views = Views((0.5,) * 3, (0.25,) * 3, policy=policy)
    expected = views(images, index, seed=3, epoch=8)
    order = torch.randperm(35, generator=torch.Generator().manual_seed(0))
    assert torch.equal(views(images[order], index[order], seed=3, epoch=8), expected[order])
    for strided in (images.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0), images.mT.contiguous().mT):
        assert not strided.is_contiguous() and torch.equal(views(strided, index, seed=3, epoch=8), expected)
    before = torch.get_rng_state()
    assert not torch.equal(views(images, index, seed=3, epoch=9), expected)
    assert not torch.equal(views(images, index, seed=4, epoch=8), expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert views(images[:0], index[:0], seed=3, epoch=8).shape == (0, 3, 9, 6)


@pytest.mark.parametrize("policy", POLICIES)
def test_augmented_views_do_not_wait_for_the_device(policy):
    views = Views((0.5,) * 3, (0.2,) * 3, padding=2, flip=True, policy=policy)
    images, index = torch.empty(4, 8, 8, 3, dtype=torch.uint8, device="meta"), torch.arange(4, device="meta")
    assert views(images, index, seed=1, epoch=1).shape == (4, 3, 8, 8)
    with NoWait():
        views(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.arange(4), seed=1, epoch=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("policy", POLICIES)
def test_augmented_views_on_cuda_equal_the_cpu_bit_for_bit(policy):
    images, index = torch.from_numpy(images_of((32, 32), 3)).repeat(200, 1, 1, 1), torch.arange(1400) + 2**33
    views = Views((0.5,) * 3, (0.25,) * 3, padding=4, flip=True, policy=policy)
    on_cpu = views(images, index, seed=2**64 - 1, epoch=5)
    images, index = images.cuda(), index.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_cuda = views(images, index, seed=2**64 - 1, epoch=5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(on_cuda.cpu(), on_cpu)


# --- options ----------------------------------------------------------------------------------------------------------------


def striped(padding=1, flip=True, policy=None, channels=1):
    images = images_of((6, 5), channels)
    data = assemble("striped", (images, np.arange(7) % 2), (images, np.arange(7) % 2), 2, padding=padding, flip=flip)
    train = ImageSet(images, data.train.labels, replace(data.train.views, policy=policy))
    return replace(data, train=train)


def plain():
    return striped(padding=0, flip=False)


def augmenting():
    return striped(policy="trivialaugment")


@pytest.mark.parametrize(
    ("data", "options", "expected"),
    [
        (striped, {}, (1, True, None)),
        (striped, {"augment": "crop-flip"}, (1, True, None)),
        (striped, {"augment": "crop-flip", "flip": False}, (1, False, None)),
        (striped, {"augment": "none"}, (0, False, None)),
        (striped, {"augment": "none", "padding": 0, "flip": False}, (0, False, None)),
        (striped, {"augment": "randaugment"}, (1, True, "randaugment")),
        (striped, {"augment": "randaugment", "padding": 3, "flip": False}, (3, False, "randaugment")),
        (plain, {"augment": "trivialaugment"}, (0, False, "trivialaugment")),
        (plain, {"augment": "crop-flip", "padding": 2}, (2, False, None)),
        (augmenting, {}, (1, True, "trivialaugment")),
        (augmenting, {"padding": 2}, (2, True, "trivialaugment")),
        (augmenting, {"augment": "crop-flip"}, (1, True, None)),
        (augmenting, {"augment": "none"}, (0, False, None)),
    ],
)
def test_augment_option_sets_the_views(data, options, expected):
    loaded = load(f"{__name__}:{data.__name__}", **options)
    views = loaded.train.views
    assert (views.padding, views.flip, views.policy) == expected
    assert loaded.test.views == replace(views, padding=0, flip=False, policy=None)
    again = load(f"{__name__}:{data.__name__}", augment=loaded.augment, padding=views.padding, flip=views.flip)
    assert again.train.views == views  # what config.json says gives the same views


def four_channels():
    return striped(channels=4)


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        (plain, {"augment": "autoaugment"}, ValueError, "augment must be crop-flip, none, .*got 'autoaugment'"),
        (plain, {"augment": "randaugmet"}, ValueError, "did you mean randaugment"),
        (plain, {"augment": True}, TypeError, "augment must be crop-flip, none, randaugment, .*got bool True"),
        (
            plain,
            {"augment": "crop-flip"},
            ValueError,
            "augment='crop-flip' has no effect with padding=0 and flip=False",
        ),
        (plain, {"augment": "none", "padding": 2}, ValueError, "augment='none' means .*got padding=2 and flip=False"),
        (striped, {"augment": "none", "flip": True}, ValueError, "augment='none' means .*got padding=0 and flip=True"),
        (striped, {"augment": "randaugment", "padding": 5}, ValueError, "padding must be < 5"),
        (
            four_channels,
            {"augment": "randaugment"},
            ValueError,
            "'randaugment' is for images with 1 or 3 channels, got 4",
        ),
    ],
)
def test_augment_option_that_does_not_fit_is_refused(data, options, error, message):
    with pytest.raises(error, match=message) as caught:
        load(f"{__name__}:{data.__name__}", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("policy", "error"), [("none", ValueError), ("", ValueError), (3, TypeError)])
def test_views_refuse_an_unknown_policy(policy, error):
    with pytest.raises(error, match="policy must be randaugment, trivialaugment or None, got"):
        Views((0.5,), (0.5,), policy=policy)


def test_test_images_must_not_be_augmented():
    data = plain()
    test = ImageSet(data.test.images, data.test.labels, replace(data.test.views, policy="randaugment"))
    with pytest.raises(ValueError, match=r"test must have views with .*policy=None, got .*policy='randaugment'"):
        ImageData("x", data.train, test, 2)


def test_views_without_a_policy_are_printed_as_before():
    """Fingerprints of runs contain this text."""
    views = Views((0.5,), (0.25,), padding=1)
    assert repr(views) == "Views(mean=(0.5,), std=(0.25,), padding=1, flip=False)"
    assert repr(replace(views, policy="randaugment")) == f"{repr(views)[:-1]}, policy='randaugment')"
    assert eval(repr(replace(views, policy="randaugment"))) == replace(views, policy="randaugment")
