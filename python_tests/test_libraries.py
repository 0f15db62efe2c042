"""Networks of timm, torchvision and transformers: built, given their own images, and used by the commands."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial, wraps
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Crew
from safetensors.torch import save_file
from torch import nn

from kcd_ext import models
from kcd_ext.cache import TeacherCache
from kcd_ext.data import load
from kcd_ext.models import weights
from kcd_ext.models.normalisation import renormalisation
from kcd_ext.randomness import seeded

pytestmark = pytest.mark.usefixtures("one_thread")

# torchvision's operators may be built for another torch. Nothing here calls them, but without their schemas it does not import.
DEFINE_OPERATORS = """
import torch
try:
    import torchvision
except RuntimeError:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
RUN_KCD = DEFINE_OPERATORS + "import sys\nfrom kcd_ext.cli import main\nsys.exit(main(sys.argv[1:]))"


def with_package(*packages):
    """Return a decorator that runs a test in a forked process where torchvision loads. Skips without these packages."""

    def decorate(test):
        @pytest.mark.slow
        @wraps(test)
        def run(tmp_path, capfd):
            for package in packages:
                if find_spec(package) is None:  # importorskip would import it here
                    pytest.skip(f"needs {package}")

            def job(_rank):
                os.chdir(tmp_path)
                # The library must live as long as the process.
                exec(DEFINE_OPERATORS, run.__dict__)
                test(tmp_path)

            (code,) = Crew(job).wait(timeout=300)
            assert code == 0, capfd.readouterr().err[-3000:]

        del run.__wrapped__  # pytest would ask for the test's own arguments
        return run

    return decorate


def kcd(*arguments, here, code=0):
    """Run the command where torchvision loads; return stdout and stderr."""
    words = [sys.executable, "-c", RUN_KCD, *map(str, arguments)]
    done = subprocess.run(words, cwd=here, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout, done.stderr


def refused(call, *parts):
    """Assert that a call fails in one line that contains these parts."""
    with pytest.raises((ValueError, TypeError, ImportError)) as error:
        call()
    assert "\n" not in str(error.value), error.value
    assert all(part in str(error.value) for part in parts), error.value


# --- images of another size ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "filter_"), [("bilinear", Image.BILINEAR), ("bicubic", Image.BICUBIC)])
@pytest.mark.parametrize("size", [(5, 17), (16, 8), (31, 33)])
def test_resized_input_equals_pillow(name, filter_, size):
    x = torch.randn(2, 3, 16, 11, generator=torch.Generator().manual_seed(0)) * 50
    expected = [
        [np.asarray(Image.fromarray(channel.numpy()).resize(size[::-1], filter_)) for channel in image] for image in x
    ]
    network = models.resize_input(nn.Identity(), size, name)
    torch.testing.assert_close(network(x), torch.from_numpy(np.array(expected)), rtol=1e-4, atol=2e-3)


def test_resizing_keeps_state_and_names_and_follows_copies():
    network = models.build("resnet8", in_channels=3, num_classes=3).eval()
    names = [*network.state_dict()], [name for name, _ in network.named_modules()]
    x, own = torch.rand(2, 3, 9, 7), torch.rand(2, 3, 12, 10)
    expected = network(own), network(models.resize_input(nn.Identity(), (12, 10))(x))
    models.resize_input(network, (12, 10), "bilinear")
    for same in (network, copy.deepcopy(network), torch.compile(network, backend="eager", fullgraph=True)):
        torch.testing.assert_close((same(own), same(x)), expected)
    assert ([*network.state_dict()], [name for name, _ in network.named_modules()]) == names
    assert models.resizing(network) == ((12, 10), "bilinear")
    assert renormalisation(network) == {"size": [12, 10], "interpolation": "bilinear"}
    models.resize_input(network, (12, 10))
    refused(lambda: models.resize_input(network, (12, 11)), "already resizes its images to (12, 10), got (12, 11)")
    refused(lambda: models.resize_input(nn.Identity(), (2, 2), "lanczos"), "one of bilinear, bicubic, nearest, got")
    refused(lambda: models.resize_input(torch.jit.script(nn.Identity()), (2, 2)), "TorchScript")


def test_grey_images_are_repeated_for_a_network_of_three_channels():
    own = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    pixels = torch.rand(2, 1, 4, 4)
    repeated = models.renormalise(models.repeat_channel(nn.Identity(), 3), given=((0.6,), (0.7,)), own=own)
    broadcast = models.renormalise(nn.Identity(), given=((0.6,), (0.7,)), own=own)
    expected = (pixels - torch.tensor(own[0]).view(3, 1, 1)) / torch.tensor(own[1]).view(3, 1, 1)
    for network in (repeated, broadcast):
        torch.testing.assert_close(network((pixels - 0.6) / 0.7), expected, rtol=1e-5, atol=1e-5)
    assert models.repeat_channel(nn.Identity(), 3)(torch.rand(2, 3, 4, 4)).shape == (2, 3, 4, 4)


# --- functions of the user ----------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """A network that keeps the arguments of the function that made it."""

    def __init__(self, **arguments):
        super().__init__()
        self.arguments = arguments


class Classifier(Recorder):
    def __init__(self, num_classes=1000, width=8):
        super().__init__(num_classes=num_classes, width=width)


def strict(in_chans=3, num_classes=1000, **options):
    """A factory that passes its options on, as those of timm."""
    return Recorder(in_chans=in_chans, num_classes=num_classes, **options)


def _inner(num_classes=1000):
    return Recorder(num_classes=num_classes)


def _inner_of_timm(in_chans=3, num_classes=1000):
    return Recorder(in_chans=in_chans, num_classes=num_classes)


FORMS = {
    "both": (lambda in_channels, num_classes: Recorder(i=in_channels, n=num_classes), {"i": 2, "n": 5}),
    "in_chans": (lambda num_classes, in_chans=3: Recorder(i=in_chans, n=num_classes), {"i": 2, "n": 5}),
    "keywords": (lambda *, num_classes: Recorder(n=num_classes), {"n": 5}),
    "positional": (lambda classes: Recorder(n=classes), {"n": 5}),
    "two_positional": (lambda classes, channels, /: Recorder(i=channels, n=classes), {"i": 2, "n": 5}),
    "nothing": (lambda: Recorder(), {}),
    "defaults": (lambda depth=18: Recorder(depth=depth), {"depth": 18}),
    "options": (lambda *, weights=None, progress=True, **options: _inner(**options), {"num_classes": 5}),
    "timm_options": (lambda pretrained=False, **options: _inner_of_timm(**options), {"in_chans": 2, "num_classes": 5}),
    "everything": (lambda **options: Recorder(**options), {"in_channels": 2, "num_classes": 5}),
    "strict": (strict, {"in_chans": 2, "num_classes": 5}),
    "a_class": (Classifier, {"num_classes": 5, "width": 8}),
    "a_partial": (partial(Classifier, width=3), {"num_classes": 5, "width": 3}),
}
globals().update({f"form_{name}": function for name, (function, _) in FORMS.items()})


@pytest.mark.parametrize("form", FORMS)
def test_function_gets_the_arguments_that_it_takes(form):
    network = models.build(f"{__name__}:form_{form}", in_channels=2, num_classes=5)
    assert network.arguments == FORMS[form][1]


def form_three(classes, channels, depth):
    return Recorder()


def form_mixed(num_classes, depth):
    return Recorder()


def form_refuses(**options):
    return (lambda depth=1: Recorder())(**options)


def form_own_error(num_classes, **options):
    raise TypeError("got an unexpected keyword argument 'num_classes' inside")


def form_number(num_classes):
    return 3


@pytest.mark.parametrize(
    ("form", "parts"),
    [
        ("three", ["num_classes alone, or nothing, but it takes classes, channels, depth: missing", "'classes'"]),
        ("mixed", ["but it takes num_classes, depth: missing a required argument: 'depth'"]),
        ("own_error", ["inside"]),
        ("number", ["must return a torch.nn.Module, got int"]),
    ],
)
def test_other_functions_are_refused_in_one_line(form, parts):
    refused(lambda: models.build(f"{__name__}:form_{form}", in_channels=2, num_classes=5), *parts)


def test_function_whose_options_all_fail_is_called_with_none():
    assert models.build(f"{__name__}:form_refuses", in_channels=2, num_classes=5).arguments == {}


# --- weights to start from ----------------------------------------------------------------------------------------------


def resnet8(in_channels=3, num_classes=10, seed=0):
    with seeded(seed):
        return models.build("resnet8", in_channels=in_channels, num_classes=num_classes)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_start_takes_all_but_a_head_of_another_size(prefix):
    saved = {prefix + name: tensor for name, tensor in resnet8(num_classes=7, seed=1).state_dict().items()}
    own = resnet8().state_dict()
    found = weights.match_start("no", own, saved, 10)
    head = {"fc.weight", "fc.bias"}
    assert all(torch.equal(found.tensors[name], own[name]) for name in head)
    assert all(torch.equal(found.tensors[name], saved[prefix + name]) for name in own.keys() - head)
    assert found.notes == ("'fc.weight', 'fc.bias' keep their initial values: the file has 7 classes, the data 10",)
    headless = {name: tensor for name, tensor in saved.items() if ".fc." not in f".{name}"}
    assert weights.match_start("no", own, headless, 10).notes[0].endswith("the file has none, the data 10")
    same = weights.match_start("no", own, resnet8(seed=1).state_dict(), 10)
    assert same.notes == () and not torch.equal(same.tensors["fc.weight"], own["fc.weight"])


def test_start_of_a_grey_network_gives_the_logits_of_repeated_grey_images():
    colour, grey = resnet8(seed=1).eval(), resnet8(in_channels=1).eval()
    found = weights.match_start("no", grey.state_dict(), colour.state_dict(), 10)
    grey.load_state_dict(found.tensors)
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(grey(x), colour(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    assert found.notes == ("conv1.weight is summed over its 3 channels, for grey images",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("layer1.0.conv1.weight"), "no: they have no layer1.0.conv1.weight"),
        (lambda state: state.update(more=torch.zeros(2)), "no: they have more, which the network does not have"),
        (lambda state: state.update({"fc.weight": torch.zeros(7, 65)}), "no: fc.weight has shape (7, 65)"),
        (lambda state: state.update({"conv1.weight": torch.zeros(16, 4, 3, 3)}), "no: conv1.weight has shape"),
    ],
)
def test_start_refuses_other_differences(change, message):
    state = resnet8().state_dict()
    change(state)
    refused(lambda: weights.match_start("no", resnet8().state_dict(), state, 10), message)


# --- packages that are missing or do not load ---------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "package"), [("timm:resnet18", "timm"), ("torchvision:resnet18", "torchvision")])
def test_missing_package_is_one_line_with_the_extra(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    build = partial(models.build, name, in_channels=3, num_classes=2)
    refused(build, f"network '{name}' needs the package {package}: pip install \"kcd-ext[networks]\"")


@pytest.mark.parametrize("name", ["timm:", "torchvision:", "hf:"])
def test_prefix_without_a_name_is_refused(name):
    refused(
        partial(models.build, name, in_channels=3, num_classes=2), f"network '{name}' must have a name after {name}"
    )


@pytest.mark.slow
def test_torchvision_for_another_torch_is_one_line_with_the_one_to_install(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    for package in ("timm", "transformers"):
        (tmp_path / f"{package}.py").write_text("import torchvision")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "resnet"}')
    code = (
        "import sys; from kcd_ext import models\n"
        "assert not {'timm', 'torchvision', 'transformers'} & {*sys.modules}\n"
        "import torch; torch.__version__ = type(torch.__version__)('2.13.0+cpu')\n"
        "for name in ('timm:resnet18', 'torchvision:resnet18', 'hf:hf'):\n"
        "    try: models.build(name, in_channels=3, num_classes=2)\n"
        "    except ImportError as error: print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    run = [sys.executable, "-c", code]
    lines = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert "does not load beside torch 2.13.0+cpu (RuntimeError: operator torchvision::nms does not exist)" in line
        assert '"torchvision==0.28.*" --index-url https://download.pytorch.org/whl/cpu (KCD_TRACEBACK=1 shows' in line
    environment["KCD_TRACEBACK"] = "1"
    words = [
        sys.executable,
        "-m",
        "kcd_ext",
        "distill",
        "--data",
        "digits",
        "--student",
        "timm:resnet18",
        "--method",
        "ce",
    ]
    for value, shows_cause in (("1", True), ("", False)):
        environment["KCD_TRACEBACK"] = value
        error = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True).stderr
        assert ("Traceback" in error) == shows_cause and "does not load beside torch" in error
        assert shows_cause or error.count("\n") == 1


# --- timm and torchvision -----------------------------------------------------------------------------------------------


def built(name, in_channels=3, num_classes=5, size=None, seed=0):
    with seeded(seed):
        return models.build(name, in_channels=in_channels, num_classes=num_classes, image_size=size).eval()


def same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@with_package("timm")
def test_timm_networks_fit_the_images_and_name_their_own(_folder):
    import timm

    for name in ("test_resnet", "test_vit", "mobilenetv3_small_050"):
        for channels in (1, 3, 4):
            network = built(f"timm:{name}", channels, 5, (32, 32))
            assert network(torch.rand(2, channels, 32, 32)).shape == (2, 5) and models.resizing(network) is None
        assert same_state(network, built(f"timm:{name}", 4, 5, (32, 32)))
        assert not same_state(network, built(f"timm:{name}", 4, 5, (32, 32), seed=1))
        config = timm.data.resolve_data_config(model=timm.create_model(name))
        own = models.network_input(f"timm:{name}")
        assert (own.mean, own.std, own.size) == (config["mean"], config["std"], config["input_size"][1:])
        assert own.interpolation == config["interpolation"] and models.config(f"timm:{name}") is None
    fixed = built("timm:vit_tiny_patch16_224", 3, 5, (32, 32))
    assert models.resizing(fixed) == ((224, 224), "bicubic") and fixed(torch.rand(1, 3, 32, 32)).shape == (1, 5)
    assert models.resizing(built("timm:vit_tiny_patch16_224", 3, 5, (224, 224))) is None
    assert models.network_input("timm:resnet18.tv_in1k").interpolation == "bilinear"
    for name, part in (
        ("resnett18", "unknown network 'timm:resnett18': did you mean resnet18? timm.list_models()"),
        ("resnet18.tv", "resnet18 has no pretrained tag 'tv', but a1_in1k"),
    ):
        refused(partial(built, f"timm:{name}"), part)
        refused(partial(models.network_input, f"timm:{name}"), part)


@with_package("torchvision")
def test_torchvision_networks_take_colour_or_repeated_grey(_folder):
    colour, grey = built("torchvision:resnet18"), built("torchvision:resnet18", 1, 5, (20, 24))
    x = torch.rand(2, 1, 20, 24)
    assert same_state(colour, grey) and torch.equal(grey(x), colour(x.expand(-1, 3, -1, -1)))
    refused(partial(built, "torchvision:resnet18", 4), "takes images of 3 channels, or of one, got 4")
    own = models.network_input("torchvision:resnet18")
    assert own == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (224, 224), "bilinear")
    assert models.network_input("torchvision:swin_t").interpolation == "bicubic"
    for name in ("resnte18", "fcn_resnet50"):
        refused(partial(built, f"torchvision:{name}"), f"unknown network 'torchvision:{name}'", "list_models")
    factory = models.build("torchvision.models:resnet18", in_channels=3, num_classes=5)  # a function with **options
    assert factory.fc.out_features == 5


@with_package("torchvision")
def test_networks_that_normalise_inside_get_their_images_as_with_weights(_folder):
    """torchvision turns transform_input on with its weights; our network has it off and gets (x - 0.5) / 0.5."""
    import torchvision

    ours = built("torchvision:googlenet", 3, 5)
    theirs = torchvision.models.googlenet(num_classes=5, transform_input=True, init_weights=False).eval()
    theirs.load_state_dict(ours.state_dict())
    own, pixels = models.network_input("torchvision:googlenet"), torch.rand(1, 3, 64, 64)
    transforms = torchvision.models.GoogLeNet_Weights.DEFAULT.transforms()
    mean, std, own_mean, own_std = (
        torch.tensor(numbers).view(3, 1, 1) for numbers in (transforms.mean, transforms.std, own.mean, own.std)
    )
    torch.testing.assert_close(ours((pixels - own_mean) / own_std), theirs((pixels - mean) / std), rtol=1e-4, atol=1e-4)


# --- transformers -------------------------------------------------------------------------------------------------------


def vit(**options):
    """A tiny vision transformer for images of 16 x 16 pixels."""
    from transformers import AutoModelForImageClassification, ViTConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTConfig(**sizes, image_size=16, patch_size=4, **{"num_labels": 10, "num_channels": 3} | options)
    torch.manual_seed(5)
    return AutoModelForImageClassification.from_config(config).eval()


def resnet(**options):
    from transformers import AutoModelForImageClassification, ResNetConfig

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **options)
    return AutoModelForImageClassification.from_config(config).eval()


@with_package("transformers")
def test_folder_of_transformers_is_built_and_read(folder):
    saved = vit()
    saved.half().save_pretrained("vit", max_shard_size="2KB")
    assert not (folder / "vit" / "model.safetensors").exists()  # in several files
    x, own = torch.rand(2, 3, 16, 16), models.pretrained_weights("hf:vit")
    network = built("hf:vit", 3, 10, (16, 16))
    assert not same_state(network, saved.float()) and same_state(network, built("hf:vit", 3, 10, (16, 16)))
    network.load_state_dict(own)
    torch.testing.assert_close(network(x), saved(x).logits)  # the output of ours is a tensor
    assert all(tensor.dtype == torch.float32 for tensor in own.values())
    assert models.resizing(built("hf:vit", 1, 4, (8, 8))) == ((16, 16), "bilinear")

    stored = json.loads(json.dumps(models.config("hf:vit")))
    (folder / "vit").rename("elsewhere")
    refused(partial(models.config, "hf:./vit"), "network 'hf:./vit': there is no folder ./vit")
    moved = models.build("hf:vit", in_channels=1, num_classes=4, image_size=(8, 8), config=stored)
    assert moved(torch.rand(1, 1, 8, 8)).shape == (1, 4)


@with_package("transformers")
def test_preprocessor_of_a_folder_is_followed(folder):
    """The same logits' input as from transformers' own processor, up to the rounding of its resized pixels."""
    from transformers import EfficientNetImageProcessor, ViTImageProcessor

    saved, pixels = (
        vit(),
        torch.randint(0, 256, (2, 3, 24, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    )
    saved.save_pretrained("vit")
    processors = [
        ViTImageProcessor(
            size={"height": 16, "width": 16}, resample=2, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
        ),
        ViTImageProcessor(do_resize=False, do_normalize=False),
        ViTImageProcessor(do_resize=False, rescale_factor=1 / 127.5, image_mean=[1, 1, 1], image_std=[1, 1, 1]),
        ViTImageProcessor(do_resize=False, do_rescale=False, image_mean=[100, 110, 120], image_std=[50, 60, 70]),
        EfficientNetImageProcessor(do_resize=False, do_center_crop=False),
        EfficientNetImageProcessor(
            do_resize=False, do_center_crop=False, rescale_factor=1 / 127.5, rescale_offset=True, include_top=False
        ),
    ]
    for number, processor in enumerate(processors):
        expected = processor(images=list(pixels), return_tensors="pt")["pixel_values"]
        processor.save_pretrained("vit")
        own = models.network_input("hf:vit")
        assert own.size == (16, 16)
        network = models.renormalise(
            nn.Identity(), given=((0.0,), (1.0,)), own=[x * 3 if len(x) == 1 else x for x in own[:2]]
        )
        x = pixels / 255
        if number == 0:
            x = models.resize_input(nn.Identity(), own.size, own.interpolation)(x.clamp(0, 1)).clamp(0, 1)
        torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=0.02 if number == 0 else 1e-3)
    path = folder / "vit" / "preprocessor_config.json"
    path.write_text(json.dumps({"do_flip_channel_order": True}))
    refused(partial(models.network_input, "hf:vit"), "turns images to BGR")
    path.write_text(json.dumps({"size": {"width": 3}}))
    refused(partial(models.network_input, "hf:vit"), "preprocessor_config.json cannot be used: KeyError")
    path.write_text("{")
    refused(partial(models.network_input, "hf:vit"), "is damaged")


@with_package("transformers")
def test_folders_that_are_no_classifier_are_refused_in_one_line(folder):
    os.environ["HF_HUB_OFFLINE"] = "1"
    build, read = partial(built, "hf:net"), partial(models.pretrained_weights, "hf:net")
    net = folder / "net"
    net.mkdir()
    refused(build, "net has no config.json, which save_pretrained writes")
    for text, part in (
        ("{", "is damaged"),
        ("{}", "it has no model_type"),
        ('{"model_type": "nosuch"}', "of model_type 'nosuch' cannot be built as an image classifier"),
        ('{"model_type": "bert"}', "of model_type 'bert' cannot be built as an image classifier"),
        ('{"model_type": "vit", "hidden_size": "x"}', "of model_type 'vit' cannot be built"),
    ):
        (net / "config.json").write_text(text)
        refused(build, "net", part)
    (net / "config.json").write_text(
        '{"model_type": "mine", "auto_map": {"AutoModelForImageClassification": "ran.Model", "AutoConfig": "ran.Config"}}'
    )
    (net / "ran.py").write_text("open('executed', 'w')")
    refused(build, "of model_type 'mine' cannot be built")
    vit().save_pretrained("net")
    content = (net / "model.safetensors").read_bytes()
    (net / "model.safetensors").write_bytes(content[:-100])
    refused(read, "weights of network 'hf:net' cannot be read")
    (net / "model.safetensors").unlink()
    assert models.pretrained_weights("hf:net") is None
    torch.save(vit().state_dict(), net / "pytorch_model.bin")
    refused(read, "must have its weights as safetensors, got pytorch_model.bin")
    assert not (folder / "executed").exists()
    refused(partial(built, "hf:google/nosuch"), "'hf:google/nosuch' is neither a folder here nor in the cache")


# --- commands -----------------------------------------------------------------------------------------------------------

DIGITS = ["--data", "digits", "--threads", 1, "--device", "cpu", "--epochs", 1]


def fit(network, size, channels=1, steps=80, logits=lambda output: output):
    """Train a network on digits of this size, as (x - 0.5) / 0.5. Return its accuracy on the test set, in percent."""
    data = load("digits", mean="half")
    sets = []
    for part in (data.train, data.test):
        x = part.views.normalize(torch.from_numpy(part.images))
        sets.append(models.resize_input(nn.Identity(), (size, size))(x).expand(-1, channels, -1, -1))
    labels, test_labels = (torch.from_numpy(part.labels) for part in (data.train, data.test))
    optimizer = torch.optim.AdamW(network.train().parameters(), 2e-3)
    for _ in range(steps):
        rows = torch.randint(len(labels), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits(network(sets[0][rows])), labels[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        found = logits(network.eval()(sets[1])).argmax(1)
    return round(100 * (found == test_labels).double().mean().item(), 4)


def results(folder):
    (found,) = json.loads((folder / "summary.json").read_text())["results"]
    return found


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """Return a folder with teachers on digits that got (x - 0.5) / 0.5, and their accuracies."""
    for package in ("timm", "transformers"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}")
    folder = tmp_path_factory.mktemp("taught")

    def job(_rank):
        os.chdir(folder)
        operators = {}
        exec(DEFINE_OPERATORS, operators)
        import timm
        from transformers import ViTImageProcessor

        torch.manual_seed(0)
        network = timm.create_model("test_resnet", in_chans=1, num_classes=10)
        accuracy = {"timm": fit(network, 32)}
        torch.save({"state_dict": network.state_dict(), "arch": "test_resnet"}, "timm.pth")
        network = vit()
        accuracy["hf"] = fit(network, 16, 3, steps=250, logits=lambda output: output.logits)
        network.save_pretrained("hf")
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        ViTImageProcessor(size={"height": 16, "width": 16}, resample=2, **half).save_pretrained("hf")
        Path("accuracy.json").write_text(json.dumps(accuracy))

    assert Crew(job).wait(timeout=300) == [0]
    return folder, json.loads((folder / "accuracy.json").read_text())


@pytest.mark.slow
def test_teacher_of_timm_is_measured_with_its_true_accuracy(taught, tmp_path):
    folder, accuracy = taught
    file = ["--teacher", folder / "timm.pth", "--teacher-network", "timm:test_resnet", "--student", "resnet8"]
    command = ["distill", *DIGITS, *file, "--teacher-size", 32]
    out, error = kcd(*command, "--output", "run", here=tmp_path)
    assert accuracy["timm"] > 80 and out.splitlines()[2].split()[:2] == ["teacher", f"{accuracy['timm']:.2f}"]
    assert "resized and normalised as for the published weights of timm:test_resnet and as your options say" in error
    assert "with 32 x 32 pixels (bilinear), mean 0.5 and std 0.5; the student's have 8 x 8 pixels, mean 0.3" in error
    assert error.count("\n") == 1
    about = json.loads((tmp_path / "run" / "config.json").read_text())["about"]
    assert about["teacher_resizing"] == {"size": [32, 32], "interpolation": "bilinear"}
    kcd("evaluate", "run", "--threads", 1, here=tmp_path)
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())["evaluation"]
    assert evaluation["teacher"]["accuracy"] == pytest.approx(accuracy["timm"], abs=0.01)
    _, error = kcd(
        *command, "--teacher-mean", 0.1, "--teacher-std", 0.1, "--output", "run", "--resume", here=tmp_path, code=2
    )
    assert error.splitlines()[-1].endswith("a resumed run must not change it")
    for more, part in (
        (
            ["--teacher-mean", 0.5, 0.4, "--teacher-std", 1, 1],
            "must be one number or one per channel (1 here), got 2 numbers",
        ),
        (["--teacher-mean", 0.5], "teacher_mean and teacher_std must be given together, got no teacher_std"),
        (["--teacher", "resnet8", "--teacher-size", 9], "teacher_size has no effect: the teacher is trained first"),
        (["--teacher", "run", "--teacher-mean", "half"], "teacher_mean has no effect: the run in run records"),
        (["--method", "ce", "--teacher-size", 9], "has no effect with method 'ce', which uses no teacher"),
    ):
        own = file[4:] if "--teacher" in more or "ce" in more else file
        _, error = kcd("distill", *DIGITS, *own, *more, "--output", "other", here=tmp_path, code=2)
        assert part in error and error.count("\n") == 1 and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_folder_of_transformers_teaches_and_starts_a_student(taught, tmp_path):
    """The grey channel is repeated for the teacher, and summed into the student's first layer: both have its accuracy."""
    folder, accuracy = taught
    (tmp_path / "vit").symlink_to(folder / "hf")
    out, error = kcd(
        "distill", *DIGITS, "--teacher", "hf:vit", "--student", "resnet8", "--output", "run", here=tmp_path
    )
    assert accuracy["hf"] > 30 and out.splitlines()[2].split()[:2] == ["teacher", f"{accuracy['hf']:.2f}"]
    assert "takes images of 3 channels: the one of digits is repeated" in error
    assert "resized and normalised as preprocessor_config.json says, with 16 x 16 pixels (bilinear)" in error
    command = ["distill", *DIGITS, "--teacher", "run", "--student", "hf:vit", "--lr", 0, "--output", "again"]
    _, error = kcd(*command, here=tmp_path)
    assert results(tmp_path / "again")["accuracy_last"] == pytest.approx(accuracy["hf"], abs=0.3)
    assert "hf:vit starts with the weights in vit; images have mean 0.5 and std 0.5" in error
    assert "hf:vit gets images resized from 8 x 8 to 16 x 16 pixels (bilinear)" in error
    assert json.loads((tmp_path / "again" / "config.json").read_text())["about"]["data"]["mean"] == [0.5]
    (tmp_path / "vit").unlink()  # as on another machine
    kcd("evaluate", "again", "--threads", 1, here=tmp_path)
    _, error = kcd("evaluate", "run", "--threads", 1, here=tmp_path, code=2)
    assert "give its path with --teacher" in error
    kcd("evaluate", "run", "--teacher", folder / "hf", "--threads", 1, here=tmp_path)
    command = ["distill", *DIGITS, "--teacher", "again", "--student", "resnet8", "--output", "third"]
    kcd(*command, here=tmp_path)
    assert results(tmp_path / "third")["teacher_accuracy"] == results(tmp_path / "again")["accuracy_last"]


@pytest.mark.slow
def test_killed_run_with_its_own_images_and_weights_resumes_to_the_same_bytes(taught, tmp_path):
    folder, _ = taught
    start = resnet8(in_channels=1, num_classes=4, seed=9).state_dict()
    save_file(start, tmp_path / "start.safetensors")
    command = ["distill", *DIGITS, "--epochs", 3, "--teacher", f"hf:{folder / 'hf'}", "--student", "resnet8"]
    command += ["--student-weights", "start.safetensors", "--method", "kc-kd"]
    _, error = kcd(*command, "--output", "whole", here=tmp_path)
    assert "resnet8 starts with the weights in start.safetensors" in error
    assert "keep their initial values: the file has 4 classes, the data 10" in error
    words = [sys.executable, "-c", RUN_KCD, *map(str, command), "--output", "killed"]
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "killed" / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed" / "summary.json").exists()
    kcd(*command, "--output", "killed", "--resume", here=tmp_path)
    assert (tmp_path / "killed" / "student.safetensors").read_bytes() == (
        tmp_path / "whole" / "student.safetensors"
    ).read_bytes()
    refused_words = [*command, "--student", "resnet20", "--output", "other"]
    _, error = kcd(*refused_words, here=tmp_path, code=2)
    assert "weights in start.safetensors do not fit the student" in error and error.count("\n") == 1


@pytest.mark.slow
def test_fresh_networks_of_libraries_are_taught_and_teach(taught, tmp_path):
    """A teacher that the command trains first, of one library, and a student of another, with a method on features."""
    words = ["--teacher", "timm:test_resnet", "--student", "torchvision:mobilenet_v3_small", "--method", "pkt"]
    out, error = kcd("distill", *DIGITS, *words, "--output", "run", here=tmp_path)
    assert error == "" and [line.split()[0] for line in out.splitlines()[2:4]] == ["teacher", "pkt"]
    kcd("evaluate", "run", "--threads", 1, here=tmp_path)
    for method, more in (("iekd", ["--options", "factor_epochs", 1]), ("kr", [])):
        _, error = kcd("distill", *DIGITS, *words[:-1], method, *more, "--output", "other", here=tmp_path, code=2)
        assert "stages" in error and error.count("\n") == 1 and not (tmp_path / "other").exists()
    _, error = kcd(
        "teacher",
        *DIGITS,
        "--network",
        "timm:test_resnet",
        "--weights",
        taught[0] / "timm.pth",
        "--output",
        "t",
        here=tmp_path,
    )
    assert "starts with the weights in" in error and "images have mean 0.5 and std 0.5" in error


@pytest.mark.slow
def test_cache_of_a_teacher_of_other_images_equals_the_live_teacher(taught, tmp_path):
    """A grey data set, and teachers of another size, normalisation and number of channels: a file and a folder."""
    folder, accuracy = taught
    timm_file = ["--teacher", folder / "timm.pth", "--teacher-network", "timm:test_resnet", "--teacher-size", 32]
    for name, teacher in (("timm", timm_file), ("hf", ["--teacher", folder / "hf"])):
        data = DIGITS[: DIGITS.index("--epochs")]
        _, error = kcd("cache", *data, *teacher, "--output", f"{name}-cache", here=tmp_path)
        assert "gets images resized and normalised" in error
        cache = TeacherCache(tmp_path / f"{name}-cache")
        assert cache.about["accuracy"] == pytest.approx(accuracy[name], abs=0.01)
        runs = {f"{name}-live": teacher, f"{name}-cached": ["--teacher-cache", f"{name}-cache"]}
        found = []
        for output, given in runs.items():
            kcd("distill", *DIGITS, *given, "--student", "cnn_small", "--output", output, here=tmp_path)
            kcd("evaluate", output, "--threads", 1, here=tmp_path)
            config = json.loads((tmp_path / output / "config.json").read_text())
            evaluation = json.loads((tmp_path / output / "evaluation.json").read_text())["evaluation"]["teacher"]
            about = {part: config["about"].get(part) for part in ("teacher_resizing", "teacher_normalisation")}
            found.append((config["teacher_input"], about, evaluation["accuracy"]))
        assert found[0] == found[1] and found[0][0]["size"] == found[0][1]["teacher_resizing"]["size"]
    for more, part in (
        (["--teacher", "timm-live", "--teacher-size", 32], "teacher_size has no effect: the run in timm-live records"),
        (["--teacher", folder / "hf", "--teacher-mean", 0.5], "teacher_mean and teacher_std must be given together"),
        (["--teacher", folder / "hf", "--teacher-size", 0], "teacher_size must be an integer >= 1, got 0"),
    ):
        _, error = kcd("cache", *data, *more, "--output", "other", here=tmp_path, code=2)
        assert part in error and error.count("\n") == 1 and not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.parametrize("student", ["hf:vit", "timm:test_resnet", "timm:test_resnet with weights"])
def test_student_of_a_library_works_after_its_run_moved(student, taught, tmp_path):
    """Also without the folder that its configuration was read from: on the image files it has the accuracy of its run."""
    folder, _ = taught
    shutil.copytree(folder / "hf", tmp_path / "vit")
    network, _, with_weights = student.partition(" ")
    start = ["--student-weights", folder / "timm.pth"] if with_weights else []
    command = ["distill", *DIGITS, "--teacher", "cnn_small", "--student", network, *start, "--lr", 0.01]
    kcd(*command, "--output", "run", here=tmp_path)
    shutil.rmtree(tmp_path / "vit")
    (tmp_path / "run").rename(tmp_path / "moved")
    paths, test = [], load("digits").test
    for index, (image, label) in enumerate(test):
        paths.append(tmp_path / "images" / str(label) / f"{index:03}.png")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(paths[-1])
    out, _ = kcd("predict", "moved", *paths, "--json", here=tmp_path)
    found = [json.loads(line) for line in out.splitlines()]
    right = [path.parent.name == line["class"] for path, line in zip(paths, found, strict=True)]
    accuracies = {result["method"]: result["accuracy_last"] for result in summary_results(tmp_path / "moved")}
    assert 100 * np.mean(right) == pytest.approx(accuracies["kd"], abs=1e-4)
    for form, suffix in (("safetensors", "safetensors"), ("torch-export", "pt2"), ("onnx", "onnx")):
        kcd("export", "moved", "--format", form, "--output", f"student.{suffix}", here=tmp_path)
        assert (tmp_path / f"student.{suffix}").stat().st_size > 1000
    kcd("evaluate", "moved", "--threads", 1, here=tmp_path)


def summary_results(folder):
    return json.loads((folder / "summary.json").read_text())["results"]
