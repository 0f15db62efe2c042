"""Damaged checkpoints: whatever is wrong with one, it is one line, and the folder stays as it was."""

import copy
import hashlib
import io
import json
import os
import random

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
from kcd_ext.training.folder import RunFolder

FILES = ("model.safetensors", "training.pt", "run.json")


class Blobs(torch.utils.data.Dataset):
    """Points of three classes, loaded one by one."""

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


class First(Method):
    """Cross entropy, after a part of its own was trained."""

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


RECIPE = Recipe(f"{__name__}:First", {}, Condense(0.5, every=1, stages=2), epochs=3, batch_size=8, device="cpu")


class _StopError(Exception):
    pass


def run(output, stop_after=None):
    def stop(line):
        if stop_after in line.items():
            raise _StopError

    torch.set_num_threads(1)
    return distill(network(), None, Blobs(), Blobs(9), RECIPE, output=output, resume=True, progress=stop)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a student that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return (folder / "student.safetensors").read_bytes()


@pytest.fixture
def begun(tmp_path):
    """The folder of a run that was stopped after its second epoch, and that of its checkpoint."""
    with pytest.raises(_StopError):
        run(tmp_path / "run", ("epoch", 2))
    (folder,) = (tmp_path / "run" / "checkpoint").iterdir()
    return tmp_path / "run", folder


def sums(folder):
    """As sha256sum writes them."""
    return "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in FILES)


def test_the_sums_are_those_of_sha256sum(begun):
    _, folder = begun
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "sha256sums"])
    assert (folder / "sha256sums").read_text() == sums(folder)
    assert checkpoint.load(folder.parent).source == folder


@pytest.mark.parametrize("name", [*FILES, "sha256sums"])
def test_any_byte_that_changed_and_any_end_that_is_missing_is_found(begun, name):
    _, folder = begun
    path, chance = folder / name, random.Random(name)
    sound = path.read_bytes()
    places = {0, len(sound) - 1, *(chance.randrange(len(sound)) for _ in range(60))}
    damaged = [sound[:i] + bytes([sound[i] ^ 1 << chance.randrange(8)]) + sound[i + 1 :] for i in places]
    damaged += [sound[:length] for length in {0, 1, len(sound) // 2, len(sound) - 1}] + [sound + b"\n"]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint .*epoch-0004 is damaged \(.*\): remove it") as caught:
            checkpoint.load(folder.parent)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(ValueError, match=r"epoch-0004 is damaged \(.*\): remove it"):
        checkpoint.load(folder.parent)
    os.mkfifo(path)  # nobody ever writes into it
    with pytest.raises(ValueError, match=r"epoch-0004 is damaged \(.*a FIFO"):
        checkpoint.load(folder.parent)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"epoch-0004 is damaged \("):
        checkpoint.load(folder.parent)


def paths(tree, prefix=()):
    """The keys of nested dictionaries, and of those in lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, part in items:
        yield (*prefix, key)
        if len(str(key)) < 40:
            yield from paths(part, (*prefix, key))


def at(tree, path):
    """The entry there."""
    for key in path:
        tree = tree[key]
    return tree


def changed(tree, path, value):
    """A copy in which one entry is another, or is missing."""
    tree = copy.deepcopy(tree)
    holder = tree
    for key in path[:-1]:
        holder = holder[key]
    if value is Ellipsis:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return tree


ODD = (..., None, True, -1, 0.5, "x", "", [], {}, [None], {"x": 1}, 10**400, float("nan"), float("-inf"), -(2**70))


def damaged_runs(folder):
    """Every entry of run.json missing or of another kind, and what JSON can be besides; the sums are right."""
    sound = json.loads((folder / "run.json").read_text())
    chance = random.Random(0)
    for path in paths(sound):
        if path[-2:-1] == ("counts",) and path[-1] > 1:
            continue
        for value in (..., *(value for value in chance.sample(ODD[1:], 2) if value != at(sound, path))):
            yield path, value, json.dumps(changed(sound, path, value)).encode()
    lines = sound["history"]
    for history in (lines[::-1], [lines[0]] * 2, lines[:1], lines * 2, [*lines, lines[-1]], []):
        yield "history", history, json.dumps({**sound, "history": history}).encode()
    for text in ("[]", "3", "null", '"x"', "[" * 100_000, '{"format": 2}', "NaN", "1" * 5000, "\ud800"):
        yield "run.json", text, text.encode(errors="surrogatepass")


def damaged_trainings(folder):
    """As `damaged_runs`, for training.pt."""
    sound = torch.load(folder / "training.pt", weights_only=True)
    odd = [*ODD[1:-4], torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2).to_sparse()]
    chance = random.Random(0)
    for path in paths(sound):
        if path[0] == "optimizer" and path[1:2] != ("state",) and len(path) > 1:
            continue  # what the recipe says of them counts
        for value in (..., None, *chance.sample(odd, 3)):
            yield path, changed(sound, path, value)
    yield from (((), value) for value in ({}, [], None, torch.zeros(3)))


def as_file(training):
    buffer = io.BytesIO()
    torch.save(training, buffer)
    return buffer.getvalue()


def refused(folder, read, what):
    """Whether `read` refuses the folder, in one line, and leaves it as it is."""
    before = contents(folder)
    try:
        read()
    except ValueError as error:
        assert "\n" not in str(error), what
        assert contents(folder) == before, what
        return True
    return False


def test_an_entry_that_is_missing_or_of_another_kind_is_named(begun, whole):
    """With right sums: what a program of the user's, or another version, has written."""
    output, folder = begun
    identity = {k: v for k, v in json.loads((folder / "run.json").read_text()).items() if k in IDENTITY}
    sound = (folder / "run.json").read_bytes()
    count = 0
    for path, value, content in damaged_runs(folder):
        (folder / "run.json").write_bytes(content)
        (folder / "sha256sums").write_text(sums(folder))
        if not refused(output, lambda: RunFolder(output, identity, resume=True), path):
            # What may change from start to start, and a number in the place of a number.
            is_free = path in FREE or path[-2] in ("terms", "counts")
            assert is_free or (value is not ... and path[-1] in NUMBERS), path
        count += 1
    assert count > 300
    (folder / "run.json").write_bytes(sound)
    (folder / "sha256sums").write_text(sums(folder))
    assert run(output) and (output / "student.safetensors").read_bytes() == whole


IDENTITY = (
    "recipe",
    "train",
    "test",
    "train_samples",
    "test_samples",
    "teacher",
    "teacher_input",
    "precision",
    "processes",
)
FREE = {("recipe", "device"), ("recipe", "name"), ("processes",), ("threads",)}
NUMBERS = {"loss", "lr", "accuracy", "train_accuracy", "seconds", "condensation_seconds", "low", "high", "flops"}
NUMBERS |= {"values", "classes", "condensation", "terms", "teacher"}  # may be null


@pytest.mark.slow
def test_a_state_that_is_of_another_kind_is_named(begun, whole):
    output, folder = begun
    sound, count = (folder / "training.pt").read_bytes(), 0
    kept = contents(output)
    for path, training in damaged_trainings(folder):
        (folder / "training.pt").write_bytes(as_file(training))
        (folder / "sha256sums").write_text(sums(folder))
        if not refused(output, lambda: run(output), path):
            same = (output / "student.safetensors").read_bytes() == whole
            assert same or path[-1] == "momentum_buffer", path  # None: there was no gradient yet
            for entry in (output / "checkpoint").iterdir():
                files.remove(entry)
            (output / "student.safetensors").unlink(), (output / "summary.json").unlink()
            folder.mkdir()
            for file, content in kept.items():
                file.write_bytes(content)
        count += 1
    assert count > 150
    (folder / "training.pt").write_bytes(sound)
    (folder / "sha256sums").write_text(sums(folder))
    assert run(output) and (output / "student.safetensors").read_bytes() == whole


@pytest.mark.parametrize("change", [lambda w: w.double(), lambda w: w[:1], lambda w: None])
def test_weights_of_another_kind_are_named(begun, change):
    output, folder = begun
    model = safetensors.torch.load_file(folder / "model.safetensors")
    model["student.0.weight"] = change(model["student.0.weight"])
    model = {name: tensor.contiguous() for name, tensor in model.items() if tensor is not None}
    safetensors.torch.save_file(model, folder / "model.safetensors")
    (folder / "sha256sums").write_text(sums(folder))
    before = contents(output)
    with pytest.raises(ValueError, match=r"student\.0\.weight is (missing|torch.float64|of shape \(1, 4\)) there"):
        run(output)
    assert contents(output) == before


def test_a_checkpoint_of_pretraining_is_checked_too(tmp_path, whole):
    with pytest.raises(_StopError):
        run(tmp_path, ("pretraining", 1))
    (folder,) = (tmp_path / "checkpoint").iterdir()
    training = torch.load(folder / "training.pt", weights_only=True)
    assert training["optimizer"]["state"].keys() == {0, 1}  # weight and bias of the part
    training["optimizer"]["state"][1]["momentum_buffer"] = torch.zeros(2)
    sound = (folder / "training.pt").read_bytes()
    (folder / "training.pt").write_bytes(as_file(training))
    (folder / "sha256sums").write_text(sums(folder))
    with pytest.raises(ValueError, match=r"training.pt: optimizer.state\[1\].momentum_buffer must be .*\(1,\), got"):
        run(tmp_path)
    (folder / "training.pt").write_bytes(sound)
    (folder / "sha256sums").write_text(sums(folder))
    run(tmp_path)
    assert (tmp_path / "student.safetensors").read_bytes() == whole


def test_another_number_of_threads_is_warned_of_once(begun):
    output, folder = begun
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


def test_what_lies_in_the_place_of_a_half_written_file_is_not_written_through(tmp_path):
    """A pipe there would be waited for; through a link another file would be lost."""
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".a.partial").symlink_to("precious")
    os.mkfifo(tmp_path / ".b.partial")
    for name in "ab":
        files.write_bytes(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"
    assert (tmp_path / "precious").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "precious"]


def test_a_student_that_changed_since_is_no_teacher(tmp_path, whole):
    run(tmp_path)
    path = tmp_path / "student.safetensors"
    assert path.read_bytes() == whole and teachers.find(str(tmp_path), "cnn_small", None).origin == tmp_path
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])  # one bit of a weight
    with pytest.raises(
        ValueError, match=r"student\.safetensors is not as the run wrote it: its SHA-256 is not that in"
    ):
        teachers.find(str(tmp_path), "cnn_small", None)
    summary = json.loads((tmp_path / "summary.json").read_text())
    for sums_, message in (("x", "sha256 must be an object"), (None, "sha256 must be an object"), ({}, None)):
        (tmp_path / "summary.json").write_text(json.dumps({**summary, "sha256": sums_}))
        if message is None:
            assert teachers.find(str(tmp_path), "cnn_small", None)  # of another program
            continue
        with pytest.raises(ValueError, match=message):
            teachers.find(str(tmp_path), "cnn_small", None)
