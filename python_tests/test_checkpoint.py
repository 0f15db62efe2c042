"""Damaged checkpoints: each is refused in one line, and the folder is unchanged."""

import copy
import hashlib
import io
import json
import os
import random
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from commands import contents
from torch import nn

from kcd_ext import files
from kcd_ext.commands import teachers
from kcd_ext.files import check_regular, open_regular, read_regular
from kcd_ext.methods import Method, Outcome, Pretraining, entropy
from kcd_ext.training import Condense, Recipe, checkpoint, distill

FILES = ("model.safetensors", "training.pt", "run.json")


class Blobs(torch.utils.data.Dataset):
    """Points of three classes, loaded item by item."""

    def __init__(self, size=24):
        self.x = torch.randn(size, 4, generator=torch.Generator().manual_seed(size))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], index % 3


def network():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


class WithPretraining(Method):
    """Cross entropy, after the pretraining of a part."""

    needs_teacher = False
    flops_known = False

    def prepare(self, student, teacher, samples):
        self.part = nn.Linear(4, 1)

    def pretraining(self):
        return [Pretraining(self.part, lambda _, batch: self.part(batch.x).square().mean(), epochs=2, lr=0.1)]

    def forward(self, student, teacher, batch):
        logits = student(batch.x)
        loss = nn.functional.cross_entropy(logits, batch.label)
        return Outcome(loss, logits.detach(), entropy(logits))


RECIPE = Recipe(
    f"{__name__}:WithPretraining", {}, Condense(0.5, every=1, stages=2), epochs=3, batch_size=8, device="cpu"
)


class _StopError(Exception):
    pass


def run(output, stop_after=None, recipe=RECIPE):
    def stop(line):
        if stop_after in line.items():
            raise _StopError

    torch.set_num_threads(1)
    return distill(network(), None, Blobs(), Blobs(9), recipe, output=output, resume=True, progress=stop)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return the bytes of the student of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(folder)
    return (folder / "student.safetensors").read_bytes()


@pytest.fixture
def stopped(tmp_path):
    """Return the folder of a run that was stopped after its second epoch, and its checkpoint folder."""
    with pytest.raises(_StopError):
        run(tmp_path / "run", ("epoch", 2))
    (folder,) = (tmp_path / "run" / "checkpoint").iterdir()
    return tmp_path / "run", folder


def sums(folder):
    """Return the checksums in the format of sha256sum."""
    return "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in FILES)


def test_checksums_have_the_format_of_sha256sum(stopped):
    _, folder = stopped
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "sha256sums"])
    assert (folder / "sha256sums").read_text() == sums(folder)
    assert checkpoint.load(folder.parent).source == folder


@pytest.mark.parametrize("name", [*FILES, "sha256sums"])
def test_changed_bytes_and_missing_ends_are_found(stopped, name):
    _, folder = stopped
    path, rng = folder / name, random.Random(name)
    intact = path.read_bytes()
    positions = {0, len(intact) - 1, *(rng.randrange(len(intact)) for _ in range(60))}
    damaged = [intact[:i] + bytes([intact[i] ^ 1 << rng.randrange(8)]) + intact[i + 1 :] for i in positions]
    damaged += [intact[:length] for length in {0, 1, len(intact) // 2, len(intact) - 1}] + [intact + b"\n"]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint .*epoch-0004 is damaged \(.*\): remove it") as caught:
            checkpoint.load(folder.parent)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(ValueError, match=r"epoch-0004 is damaged \(.*\): remove it"):
        checkpoint.load(folder.parent)
    os.mkfifo(path)  # a FIFO without a writer would block a reader
    with pytest.raises(ValueError, match=r"epoch-0004 is damaged \(.*a FIFO"):
        checkpoint.load(folder.parent)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"epoch-0004 is damaged \("):
        checkpoint.load(folder.parent)


def as_file(training):
    buffer = io.BytesIO()
    torch.save(training, buffer)
    return buffer.getvalue()


def without(tree, path):
    """Return a copy without one entry."""
    tree = copy.deepcopy(tree)
    holder = tree
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    return tree


def damages(folder):
    """Yield damaged files of the checkpoint: the file, the damage, the content."""
    run = json.loads((folder / "run.json").read_text())
    for path in (("recipe",), ("history",), ("pretraining",), ("threads",), ("teacher_accuracy",)):
        yield "run.json", path, json.dumps(without(run, path)).encode()
    for text in ("[]", "3", "null", '"x"', "[" * 100_000, '{"format": 2}', "NaN", "1" * 5000, "\ud800"):
        yield "run.json", text, text.encode(errors="surrogatepass")
    training = torch.load(folder / "training.pt", weights_only=True)
    paths = [("optimizer",), ("optimizer", "state"), ("optimizer", "state", 1), ("scaler",), ("trained",)]
    for path in (*paths, ("condenser",), *(("condenser", name) for name in training["condenser"])):
        yield "training.pt", path, as_file(without(training, path))
    for value in ({}, [], None, torch.zeros(3)):
        yield "training.pt", value, as_file(value)


def test_checkpoint_with_missing_entry_is_refused_in_one_line(stopped, uninterrupted):
    """The checksums are right, as if another program had written the files."""
    output, folder = stopped
    intact = contents(folder)
    cases = [*damages(folder)]
    assert len(cases) > 30
    for name, damage, content in cases:
        (folder / name).write_bytes(content)
        (folder / "sha256sums").write_text(sums(folder))
        before = contents(output)
        with pytest.raises(
            ValueError, match=r"^checkpoint .* (is damaged \(|is of another version)|was run with"
        ) as caught:
            run(output)
        assert "\n" not in str(caught.value), damage
        assert contents(output) == before, damage
        for path, bytes_ in intact.items():
            path.write_bytes(bytes_)
    assert run(output) and (output / "student.safetensors").read_bytes() == uninterrupted


@pytest.mark.parametrize("change", [lambda w: w.double(), lambda w: w[:1], lambda w: None])
def test_weights_of_another_dtype_or_shape_are_named(stopped, change):
    output, folder = stopped
    model = safetensors.torch.load_file(folder / "model.safetensors")
    model["student.0.weight"] = change(model["student.0.weight"])
    model = {name: tensor.contiguous() for name, tensor in model.items() if tensor is not None}
    safetensors.torch.save_file(model, folder / "model.safetensors")
    (folder / "sha256sums").write_text(sums(folder))
    before = contents(output)
    with pytest.raises(ValueError, match=r"student\.0\.weight is (missing|torch.float64|of shape \(1, 4\)) there"):
        run(output)
    assert contents(output) == before


def test_run_resumes_in_its_pretraining(tmp_path, uninterrupted):
    with pytest.raises(_StopError):
        run(tmp_path, ("pretraining", 1))
    (folder,) = (tmp_path / "checkpoint").iterdir()
    training = torch.load(folder / "training.pt", weights_only=True)
    assert training["optimizer"]["state"].keys() == {0, 1}  # weight and bias of the part
    run(tmp_path)
    assert (tmp_path / "student.safetensors").read_bytes() == uninterrupted


class WithTwoPretrainings(WithPretraining):
    """A method that pretrains two parts."""

    plan = (2, 1)  # epochs of each part

    def prepare(self, student, teacher, samples):
        self.parts = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 2)])

    def pretraining(self):
        return [
            Pretraining(part, lambda _, batch, part=part: part(batch.x).square().mean(), epochs=epochs, lr=0.1)
            for part, epochs in zip(self.parts, self.plan, strict=True)
        ]


@pytest.mark.parametrize("plan", [(1, 1), (2, 2)])
@pytest.mark.parametrize("stop_after", [("pretraining", 2), ("pretraining", 3), ("epoch", 1)])
def test_run_does_not_resume_with_another_pretraining(tmp_path, monkeypatch, stop_after, plan):
    """A checkpoint from before the second part does not tell how many epochs that part should have."""
    recipe = replace(RECIPE, method=f"{__name__}:WithTwoPretrainings")
    with pytest.raises(_StopError):
        run(tmp_path, stop_after, recipe)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(WithTwoPretrainings, "plan", plan)
        if (stop_after, plan) != (("pretraining", 2), (2, 2)):
            with pytest.raises(
                ValueError, match=r"epochs of pretraining, method|optimizer state does not fit the param"
            ):
                run(tmp_path, recipe=recipe)
            assert contents(tmp_path) == before
    assert len(run(tmp_path, recipe=recipe).history) == 3


def test_resume_warns_once_of_another_number_of_threads(stopped):
    output, folder = stopped
    run_json = json.loads((folder / "run.json").read_text())
    assert run_json["threads"] == 1
    (folder / "run.json").write_text(json.dumps({**run_json, "threads": 7}))
    (folder / "sha256sums").write_text(sums(folder))
    with pytest.warns(
        RuntimeWarning, match="with 7 threads of torch, this process has 1: .* not bit for bit"
    ) as caught:
        run(output)
    assert len([w for w in caught if "threads" in str(w.message)]) == 1


def test_only_regular_files_are_opened(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "link"):
        check_regular(tmp_path / name)
        assert read_regular(tmp_path / name) == b"content"
        with open_regular(str(tmp_path / name)) as file:
            assert file.read(3) == b"con"
    for path, kind in ((tmp_path / "pipe", "a FIFO"), ("/dev/null", "a device")):
        for function in (check_regular, open_regular, read_regular):
            with pytest.raises(ValueError, match=f"{path}: must be a regular file, is {kind}"):
                function(path)
    with pytest.raises(IsADirectoryError) as caught:
        read_regular(tmp_path)
    assert caught.value.filename == str(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "nothing")


def test_link_or_pipe_in_place_of_a_partial_file_is_not_written_through(tmp_path):
    """Writing into a pipe would block; writing through a link would destroy its target."""
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".a.partial").symlink_to("precious")
    os.mkfifo(tmp_path / ".b.partial")
    for name in "ab":
        files.write_bytes(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"
    assert (tmp_path / "precious").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "precious"]


def test_changed_student_file_is_refused_as_teacher(tmp_path, uninterrupted):
    run(tmp_path)
    path = tmp_path / "student.safetensors"
    assert path.read_bytes() == uninterrupted and teachers.find(str(tmp_path), "cnn_small", None).origin == tmp_path
    path.write_bytes(uninterrupted[:-3] + bytes([uninterrupted[-3] ^ 1]) + uninterrupted[-2:])  # one bit of a weight
    with pytest.raises(
        ValueError, match=r"student\.safetensors has changed since the run wrote it: its SHA-256 is not that in"
    ):
        teachers.find(str(tmp_path), "cnn_small", None)
    summary = json.loads((tmp_path / "summary.json").read_text())
    for sums_, message in (("x", "sha256 must be an object"), (None, "sha256 must be an object"), ({}, None)):
        (tmp_path / "summary.json").write_text(json.dumps({**summary, "sha256": sums_}))
        if message is None:
            assert teachers.find(str(tmp_path), "cnn_small", None)  # written by another program
            continue
        with pytest.raises(ValueError, match=message):
            teachers.find(str(tmp_path), "cnn_small", None)
