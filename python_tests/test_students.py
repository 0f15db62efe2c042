"""What happens to a student after training: `load_student`, `kcd predict` and `kcd export`."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import kcd_ext
from kcd_ext import cli, exporting, models
from kcd_ext.data import load
from kcd_ext.data.preprocessing import Preprocessing
from kcd_ext.students import Student

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = ["--data", "digits", "--epochs", "2", "--threads", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A finished run on digits. Do not change it."""
    folder = tmp_path_factory.mktemp("students") / "run"
    assert cli.main(["teacher", *SHORT, "--output", str(folder)]) == 0
    return folder


def output_of(capfd, *arguments):
    """Return exit code, stdout and stderr of a command."""
    capfd.readouterr()
    code = cli.main([*map(str, arguments)])
    return (code, *capfd.readouterr())


# --- load_student -----------------------------------------------------------------------------------------------------


def test_student_has_the_accuracy_of_its_run_on_image_files(run_folder, tmp_path):
    data = load("digits").test
    paths = [tmp_path / f"{index}.png" for index in range(len(data))]
    for path, image in zip(paths, data.images, strict=True):
        Image.fromarray(image[..., 0]).save(path)
    student = kcd_ext.load_student(run_folder)
    predicted = student.logits(paths, batch_size=100).argmax(-1).numpy()
    accuracy = json.loads((run_folder / "summary.json").read_text())["results"][0]["accuracy_last"]
    assert round(100 * (predicted == data.labels).mean(), 4) == accuracy


def test_student_gives_the_logits_of_a_network_built_by_hand(run_folder):
    data = load("digits").test
    network = models.build("cnn_large", in_channels=1, num_classes=10).eval()
    network.load_state_dict(load_file(run_folder / "student.safetensors"))
    x = (torch.from_numpy(data.images[:7]).double().permute(0, 3, 1, 2) / 255 - data.views.mean[0]) / data.views.std[0]
    expected = network.double()(x).detach()
    student = kcd_ext.load_student(run_folder)
    torch.testing.assert_close(student.logits(data.images[:7]).double(), expected, rtol=1e-5, atol=1e-5)
    name, probability = student(data.images[3])
    assert name == str(int(expected[3].argmax()))
    assert probability == pytest.approx(float(expected[3].softmax(-1).max()), rel=1e-5)
    assert student.logits([]).shape[0] == 0


def test_image_may_be_path_pil_image_array_or_tensor(run_folder, tmp_path):
    image = load("digits").test.images[0]
    Image.fromarray(image[..., 0]).convert("RGBA").save(tmp_path / "image.png")
    student = kcd_ext.load_student(run_folder)
    pil = Image.fromarray(image[..., 0])
    inputs = [str(tmp_path / "image.png"), pil, pil.convert("P"), image, image[..., 0], torch.from_numpy(image.copy())]
    assert len({student(each) for each in inputs}) == 1


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (3, TypeError, "image must be a path, a PIL image or a uint8 array, got int 3"),
        (np.zeros((8, 8, 3), np.uint8), ValueError, r"image must be uint8 \(h, w, 1\), got .* of shape \(8, 8, 3\)"),
        (np.zeros((8, 8), np.float32), ValueError, r"image must be uint8 \(h, w, 1\), got a float32"),
        (np.zeros((0, 8), np.uint8), ValueError, r"image must be uint8 \(h, w, 1\)"),
        (Image.new("I;16", (8, 8)), ValueError, "image must have 8 bits per channel, got PIL mode I;16"),
        ("missing.png", FileNotFoundError, "missing.png"),
    ],
)
def test_invalid_image_is_refused(run_folder, image, error, message):
    with pytest.raises(error, match=message):
        kcd_ext.load_student(run_folder)(image)


def test_own_module_is_loaded_with_a_description(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    (folder / "model.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model.json, .*: pass network and preprocessing"):
        kcd_ext.load_student(folder)
    network = models.build("cnn_large", in_channels=1, num_classes=10)
    preprocessing = kcd_ext.load_student(run_folder).preprocess
    student = kcd_ext.load_student(
        folder, network=network, preprocessing=preprocessing, class_names=[f"digit {n}" for n in range(10)]
    )
    image = load("digits").test.images[0]
    assert student.module is network and student(image).name == "digit 0"
    with pytest.raises(ValueError, match=r"weights in .* do not fit network 'cnn_small'"):
        kcd_ext.load_student(run_folder, network="cnn_small")


def test_damaged_or_unfinished_run_is_named(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "runs" / "seed-0")
    with pytest.raises(FileNotFoundError, match=r"has no student.safetensors, but holds seed-0: name one of these"):
        kcd_ext.load_student(folder.parent)
    (tmp_path / "begun" / "checkpoint").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match=r"has no student.safetensors; it has started, so continue it with --resume"
    ):
        kcd_ext.load_student(tmp_path / "begun")
    weights = folder / "student.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"student.safetensors has changed since the run wrote it"):
        kcd_ext.load_student(folder)
    shutil.copy(run_folder / "student.safetensors", weights)
    for content in ("{", "[]", "{}", '{"version": 2}'):
        (folder / "model.json").write_text(content)
        with pytest.raises(ValueError, match=r"model.json is damaged"):
            kcd_ext.load_student(folder)


# --- preprocessing ----------------------------------------------------------------------------------------------------


def test_crop_keeps_the_centre_and_squash_all(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, :10], wide[:, 10:20], wide[:, 20:] = 50, 100, 200
    options = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3, "interpolation": "nearest"}
    crop = Preprocessing(10, 10, **options)
    assert (crop(wide) == 100).all() and (crop(wide.transpose(1, 0, 2)) == 100).all()
    squash = Preprocessing(10, 10, **options, resize="squash")(wide)
    assert squash.unique().tolist() == [50, 100, 200]
    rotated = Image.fromarray(wide)
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated.save(tmp_path / "rotated.png", exif=exif)
    assert torch.equal(
        Preprocessing(30, 10, **options)(tmp_path / "rotated.png"),
        torch.from_numpy(np.rot90(wide, -1).copy()).permute(2, 0, 1).float(),
    )


def test_preprocessing_survives_json_and_refuses_wrong_fields():
    preprocessing = Preprocessing(8, 9, (0.5,), (0.25,), "squash", "bicubic")
    assert Preprocessing.from_json(json.loads(json.dumps(preprocessing.as_json()))) == preprocessing
    for wrong, message in (
        ({"height": 0}, "height must be"),
        ({"resize": "stretch"}, "resize must be one of 'crop', 'squash', got 'stretch'"),
        ({"interpolation": "cubic"}, "interpolation must be one of .*: did you mean bicubic"),
        ({"std": (0.0,)}, "std must be"),
    ):
        with pytest.raises(ValueError, match=message):
            Preprocessing(**{**preprocessing.as_json(), "mean": (0.5,), "std": (0.25,), **wrong})


# --- kcd predict ------------------------------------------------------------------------------------------------------


def test_predict_prints_every_image_and_reports_those_it_cannot_read(run_folder, tmp_path, capfd):
    data = load("digits").test
    for index in range(3):
        Image.fromarray(data.images[index, ..., 0]).resize((20, 16)).save(tmp_path / f"{index}.png")
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "notes.txt").write_text("not an image")
    code, out, error = output_of(capfd, "predict", run_folder, tmp_path, "--json", "--top", 2, "--batch-size", 2)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 2 and error.count("\n") == 1 and "1 of 4 images cannot be classified: " in error
    student = kcd_ext.load_student(run_folder)
    for index, line in enumerate(lines):
        path = tmp_path / f"{index}.png"
        probabilities = student.probabilities([path])[0]
        assert line["image"] == str(path) and len(line["top"]) == 2
        assert line["label"] == int(probabilities.argmax()) and line["class"] == str(line["label"])
        assert line["probability"] == pytest.approx(float(probabilities.max()), rel=1e-5)
        assert line["top"][1]["probability"] == pytest.approx(float(probabilities.topk(2).values[1]), rel=1e-5)
    code, out, error = output_of(capfd, "predict", run_folder, tmp_path / "0.png")
    assert (code, error, len(out.splitlines())) == (0, "", 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "kcd predict needs a run folder and at least one image"),
        (["missing.png"], "1 of 1 images cannot be classified: missing.png: No such file or directory"),
        (["0.png", "--top", "0"], "top must be an integer >= 1, got 0"),
        (["empty"], "empty contains no image files"),
    ],
)
def test_predict_refuses_wrong_arguments_in_one_line(run_folder, tmp_path, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    code, out, error = output_of(capfd, "predict", run_folder, *arguments)
    assert (code, out, error.count("\n")) == (2, "", 1) and message in error


# --- kcd export -------------------------------------------------------------------------------------------------------


def expected_logits(run_folder, size):
    """Return pixels (size, 1, 8, 8) from 0 to 255, their normalised form, and the student's logits."""
    student, data = kcd_ext.load_student(run_folder), load("digits").test
    images = data.images[:size]
    pixels = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float()
    return pixels, torch.stack([student.preprocess(image) for image in images]), student.logits(images)


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("normalises", [False, True])
def test_torch_export_computes_the_students_logits(run_folder, tmp_path, size, normalises):
    student, path = kcd_ext.load_student(run_folder), tmp_path / "student.pt2"
    assert exporting.export(student, path, "torch-export", include_normalisation=normalises) < 1e-4
    pixels, x, expected = expected_logits(run_folder, size)
    extra = {"kcd_ext": ""}
    found = torch.export.load(path, extra_files=extra).module()(pixels if normalises else x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert json.loads(extra["kcd_ext"])["preprocessing"] == student.preprocess.as_json()


def test_safetensors_hold_the_weights_and_the_description(run_folder, tmp_path):
    from safetensors import safe_open

    path = tmp_path / "student.safetensors"
    assert exporting.export(kcd_ext.load_student(run_folder), path, "safetensors") == 0
    weights, own = load_file(path), load_file(run_folder / "student.safetensors")
    assert weights.keys() == own.keys() and all(torch.equal(weights[name], own[name]) for name in own)
    with safe_open(path, "pt") as opened:
        assert json.loads(opened.metadata()["kcd_ext"])["input"] == "normalised pixels"


@pytest.mark.slow
@pytest.mark.parametrize("normalises", [False, True])
def test_onnx_computes_the_students_logits(run_folder, tmp_path, capfd, normalises):
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    path = tmp_path / "student.onnx"
    flags = ["--include-normalisation"] * normalises
    code, out, error = output_of(capfd, "export", run_folder, "--format", "onnx", "--output", path, *flags)
    assert (code, error) == (0, "") and "x: float32 (b, 1, 8, 8)" in out
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in (1, 5):
        pixels, x, expected = expected_logits(run_folder, size)
        (found,) = session.run(["logits"], {"x": (pixels if normalises else x).numpy()})
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)
    assert [entry.key for entry in onnx.load(path).metadata_props] == ["kcd_ext"]


@pytest.mark.slow
@pytest.mark.parametrize("network", sorted(models.REGISTRY))
def test_every_network_is_exported_to_torch_export(network, tmp_path):
    torch.manual_seed(0)
    module = models.build(network, in_channels=3, num_classes=7).eval()
    student = Student(module, Preprocessing(32, 32, (0.5,) * 3, (0.5,) * 3))
    assert exporting.export(student, tmp_path / "student.pt2", "torch-export") < 1e-3


class TupleOutput(torch.nn.Module):
    """A network that gives a tuple whose first element is the logits."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 10)

    def forward(self, x):
        return self.linear(x.flatten(1)), x


def test_export_reduces_outputs_to_logits(tmp_path):
    student = Student(TupleOutput(), Preprocessing(8, 8, (0.5,), (0.5,)))
    exporting.export(student, tmp_path / "student.pt2", "torch-export")
    x = torch.randn(3, 1, 8, 8)
    found = torch.export.load(tmp_path / "student.pt2").module()(x)
    torch.testing.assert_close(found, student.logits_of(x))


class WrongFormat(exporting.SafetensorsFormat):
    """A format whose file gives other logits than the network."""

    def outputs(self, content, network, x):
        return super().outputs(content, network, x) + 0.01


def test_failed_export_writes_no_file(run_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(exporting.FORMATS, "wrong", f"{__name__}:WrongFormat")
    code, out, error = output_of(capfd, "export", run_folder, "--format", "wrong", "--output", tmp_path / "x")
    assert (code, out, error.count("\n")) == (2, "", 1) and "logits differ from the network's by up to 0.01" in error
    (tmp_path / "taken").write_text("mine")
    for arguments, message in (
        (["--format", "onx", "--output", tmp_path / "x"], "unknown format 'onx': did you mean onnx?"),
        (["--format", "safetensors", "--output", tmp_path / "taken"], "already exists"),
        (
            ["--format", "safetensors", "--output", tmp_path / "x", "--include-normalisation"],
            "include_normalisation has no effect with format 'safetensors'",
        ),
    ):
        code, out, error = output_of(capfd, "export", run_folder, *arguments)
        assert (code, out, error.count("\n")) == (2, "", 1) and message in error
    assert [path.name for path in tmp_path.iterdir()] == ["taken"] and (tmp_path / "taken").read_text() == "mine"
