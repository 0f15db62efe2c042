"""Teachers: which weights files are read or refused, the measured accuracy, and the normalisation of their images."""

import argparse
import collections
import copy
import datetime
import json
import os
import pathlib
import shutil
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_runs import OPTIONS, mostly_slow
from torch import nn

from kcd_ext import cli, methods, models
from kcd_ext.commands import teachers
from kcd_ext.commands.report import Report
from kcd_ext.data import Views, load
from kcd_ext.data.images import assemble
from kcd_ext.models import weights
from kcd_ext.reports import page
from kcd_ext.reports.tables import results_table
from kcd_ext.training import Recipe, distill
from kcd_ext.training.diagnosis import teacher_warning
from kcd_ext.training.summary import Summary

DIGITS = ["--data", "digits", "--epochs", "1", "--threads", "1", "--device", "cpu"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data():
    return load("digits")


def kcd(*arguments):
    return cli.main([str(argument) for argument in arguments])


def resnet8():
    torch.manual_seed(3)
    network = models.build("resnet8", in_channels=1, num_classes=10)
    for name, tensor in network.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_()
        if name.endswith("num_batches_tracked"):
            tensor += 7
    return network


STATE = resnet8().state_dict()


def prefixed(prefix, state=STATE):
    return {prefix + name: tensor for name, tensor in state.items()}


# --- files read -------------------------------------------------------------------------------------------------------


class AttributeDict(dict):
    """A dictionary subclass like Lightning's."""


AttributeDict.__module__ = "pytorch_lightning.utilities.parsing"


def optimizer():
    """The state of RepDistiller's optimizer after its first learning-rate step, which NumPy computes."""
    network = resnet8()
    found = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    network(torch.zeros(2, 1, 8, 8)).sum().backward()
    found.step()
    found.param_groups[0]["lr"] = 0.05 * (0.1 ** np.sum(np.array([150, 180, 210]) < 160))
    return found.state_dict()


BESIDE = {
    "RepDistiller's optimizer": optimizer(),
    "numbers of NumPy": [
        np.float64(1),
        np.float32(1),
        np.int64(1),
        np.bool_(True),
        np.str_("a"),
        np.arange(3),
        np.float32,
    ],
    "options": argparse.Namespace(lr=0.1, path=pathlib.Path("a"), pure=pathlib.PurePosixPath("b"), milestones=[1, 2]),
    "a SimpleNamespace": types.SimpleNamespace(a=1),
    "collections": [collections.OrderedDict(a=1), collections.defaultdict(list, a=[1]), collections.Counter("aab")],
    "a queue": collections.deque([1, 2], maxlen=3),
    "Lightning": {
        "hyper_parameters": AttributeDict(lr=0.1),
        "callbacks": {"ModelCheckpoint{'mode': 'min'}": {"best": 1}},
    },
    "torch": [torch.Size([1]), torch.float16, torch.device("cpu"), torch.__version__],
    "times": [datetime.datetime(2026, 1, 1), datetime.timedelta(1), datetime.timezone.utc],
    "plain Python": [{1, 2}, frozenset([1]), range(3), slice(1), 1 + 2j, b"bytes", 2**70, None, True, ...],
    "schedule": torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD(resnet8().parameters(), 0.1), [1, 2]).state_dict(),
    "generators": [torch.get_rng_state(), np.random.RandomState(0).get_state()],
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("beside", BESIDE)
def test_plain_values_beside_the_weights_are_ignored(beside, zipped, here, data, monkeypatch):
    for name in ("pytorch_lightning", AttributeDict.__module__):  # pickle imports it from there
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(AttributeDict=AttributeDict))
    content = {"epoch": 160, "model": STATE, "beside": BESIDE[beside]}
    torch.save(content, here / "net.pth", _use_new_zipfile_serialization=zipped)
    teacher = teachers.find("net.pth", "resnet8", None)
    assert_same(teacher.build(data, 0), STATE)
    assert teacher.notes_on(data) == []


def assert_same(network, state):
    """Assert that a network has these tensors in this order."""
    found = network.state_dict()
    assert [*found] == [*state]
    assert all(torch.equal(found[name], state[name].to(found[name].dtype)) for name in found)


HALF = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in STATE.items()}
OTHER = {name: tensor + 1 for name, tensor in STATE.items()}
UNTRACKED = {name: tensor for name, tensor in STATE.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    ("content", "state", "notes"),
    [
        (prefixed("module."), STATE, []),
        (prefixed("_orig_mod."), STATE, []),
        (prefixed("module._orig_mod."), STATE, []),
        (prefixed("_orig_mod.module."), STATE, []),
        ({"state_dict": prefixed("model._orig_mod.")}, STATE, []),
        ({"state_dict": prefixed("student.")}, STATE, []),
        ({"net": prefixed("module."), "acc": 93.1}, STATE, []),
        ({"model_state_dict": collections.defaultdict(None, STATE)}, STATE, []),
        ({"checkpoint": {"model": STATE}, "model": {"state_dict": STATE, "step": 3}}, STATE, []),
        ({"my_network": STATE, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}, STATE, []),
        ({name.replace("layer1.", "layer1._orig_mod."): x for name, x in STATE.items()}, STATE, []),
        ({**prefixed("module."), "n_averaged": torch.tensor(5)}, STATE, ["ignored 'n_averaged' among the weights"]),
        (
            {**STATE, "total_ops": torch.zeros(1), "conv1.total_ops": torch.zeros(1)},
            STATE,
            ["ignored 'total_ops', 'conv1.total_ops' among"],
        ),
        ({**STATE, "epoch": 3, "note": "best"}, STATE, ["ignored 'epoch', 'note' among the weights"]),
        (
            {"state_dict": STATE, "state_dict_ema": OTHER},
            STATE,
            ["under 'state_dict', not those under 'state_dict_ema'"],
        ),
        (
            {"model_ema": OTHER, "optimizer": {}, "model": STATE},
            STATE,
            ["under 'model', not those under 'model_ema'"],
        ),
        ({"teacher": OTHER, "student": STATE}, STATE, ["under 'student', not those under 'teacher'"]),
        ({"state_dict_ema": STATE, "arch": "resnet8"}, STATE, []),
        (HALF, HALF, []),
        ({name: nn.Parameter(x) if x.is_floating_point() else x for name, x in STATE.items()}, STATE, []),
    ],
)
def test_wrappers_prefixes_and_counters_are_removed_with_notes(content, state, notes, here, data):
    torch.save(content, here / "net.pth")
    teacher = teachers.find("net.pth", "resnet8", None)
    assert_same(teacher.build(data, 0), state)
    found = teacher.notes_on(data)
    assert len(found) == len(notes)
    assert all(line.startswith("net.pth: ") and part in line for line, part in zip(found, notes, strict=True))


def test_missing_batch_counters_are_zero(here, data):
    torch.save(UNTRACKED, here / "net.pth")
    found = teachers.find("net.pth", "resnet8", None).build(data, 0).state_dict()
    assert all(torch.equal(found[name], UNTRACKED[name]) for name in UNTRACKED)
    assert [found[name].item() for name in found if name not in UNTRACKED] == [0] * (len(STATE) - len(UNTRACKED)) != []


def test_safetensors_are_recognised_under_any_file_name(here, data):
    save_file(prefixed("model."), here / "net.bin")
    assert_same(teachers.find("net.bin", "resnet8", None).build(data, 0), STATE)


class Wrapped(nn.Module):
    """A network whose parameter names start with a prefix that is usually removed."""

    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.model = nn.ModuleDict(
            {"module": models.build("resnet8", in_channels=in_channels, num_classes=num_classes)}
        )

    def forward(self, x):
        return self.model["module"](x)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_prefix_is_kept_if_the_names_fit(prefix, here, data):
    torch.save(prefixed(f"{prefix}model.module."), here / "net.pth")
    network = teachers.find("net.pth", f"{__name__}:Wrapped", None).build(data, 0)
    assert_same(network, prefixed("model.module."))


# --- files refused ----------------------------------------------------------------------------------------------------


class Ran:
    """A class that leaves a file when it is unpickled."""

    def __reduce__(self):
        return shutil.copyfile, ("text.pth", "executed")


class Mine:
    pass


def files(folder):
    """Write files that do not hold weights of this network."""
    network, first = resnet8(), STATE["conv1.weight"]
    torch.save(network, folder / "module.pth")
    torch.save({"model": network, "epoch": 3}, folder / "inside.pt")
    torch.save(network, folder / "old.pth", _use_new_zipfile_serialization=False)
    torch.jit.save(torch.jit.script(network), folder / "scripted.pt")
    torch.save({"model": STATE, "meter": Mine()}, folder / "mine.pth")
    torch.save({"model": STATE, "log": Ran()}, folder / "bomb.pth")
    torch.save({"model": {**STATE, "conv1.weight": first.to_sparse()}}, folder / "sparse.pth")
    torch.save({**STATE, "conv1.weight": first.to("meta")}, folder / "meta.pth")
    torch.save(
        {**STATE, "conv1.weight": torch.quantize_per_tensor(first, 0.1, 0, torch.qint8)}, folder / "quantised.pth"
    )
    torch.save({**STATE, "conv1.weight": first.to(torch.int8)}, folder / "integers.pth")
    torch.save({**STATE, "scale": torch.tensor(2.0)}, folder / "scale.pth")
    torch.save({**STATE, "optimizer": {"state": {0: {"momentum": torch.ones(1)}}}}, folder / "mixed.pth")
    torch.save({"generator": STATE, "critic": OTHER}, folder / "two.pth")
    torch.save({**prefixed("student."), **prefixed("teacher.")}, folder / "both.pth")
    torch.save(prefixed("encoder."), folder / "encoder.pth")
    torch.save(prefixed("module.", {n: x for n, x in STATE.items() if n != "fc.bias"}), folder / "less.pth")
    torch.save({"model": argparse.Namespace(weights=STATE)}, folder / "attributes.pth")
    torch.save([*STATE.values()], folder / "list.pth")
    torch.save({}, folder / "empty.pth")
    torch.save({"model": STATE}, folder / "protocol.pth", pickle_protocol=4)
    (folder / "text.pth").write_text("weights")
    (folder / "cut.pth").write_bytes((folder / "mine.pth").read_bytes()[:-100])
    os.mkfifo(folder / "pipe.pth")


REFUSED = {
    "module.pth": r'a pickled module \(kcd_ext.models.resnet.ResNet\), .*torch.save\(model.state_dict\(\), "weights.pth"\)$',
    "inside.pt": r"inside.pt contains a pickled module \(kcd_ext.models.resnet.ResNet\), which cannot be read without executing",
    "old.pth": r"old.pth contains a pickled module \(kcd_ext.models.resnet.ResNet\), which cannot be read without executing",
    "scripted.pt": r'scripted.pt is TorchScript, .*torch.save\(torch.jit.load\("scripted.pt"\).state_dict\(\), "weights.pth"\)$',
    "mine.pth": rf"mine.pth cannot be read as weights: it names {__name__}.Mine, which is neither a tensor nor a plain value",
    "bomb.pth": r"bomb.pth cannot be read as weights: it names shutil.copyfile, which is neither",
    "sparse.pth": r"sparse.pth must contain plain dense tensors, got conv1.weight, which is not dense \(torch.sparse_coo\)$",
    "meta.pth": r"meta.pth must contain plain dense tensors, got conv1.weight, which is without data, on the meta device$",
    "quantised.pth": r"got conv1.weight, which is quantised \(torch.qint8\)$",
    "integers.pth": r"conv1.weight is torch.int8, the network's is torch.float32$",
    "scale.pth": r"they have scale, which the network does not have$",
    "mixed.pth": r"must contain tensors by name \(a state_dict\), .* got the dict 'optimizer' among them$",
    "two.pth": r"two.pth must contain the weights of one network, got 'generator', 'critic'",
    "both.pth": r"they have no conv1.weight, but 'student.conv1.weight', 'student.bn1.weight', .* and \d+ more$",
    "encoder.pth": r"they have no conv1.weight, but 'encoder.conv1.weight', .* and \d+ more$",
    "less.pth": r"they have no fc.bias$",
    "attributes.pth": r"must contain tensors by name \(a state_dict\), .* got 'model'$",
    "list.pth": r"must contain tensors by name \(a state_dict\), .* got a list$",
    "empty.pth": r"must contain tensors by name \(a state_dict\), .* got an empty dictionary$",
    "protocol.pth": r"damaged, or not pickled with torch.save's protocol, 2$",
    "text.pth": r"text.pth cannot be read as weights: it is damaged or contains more than tensors$",
    "cut.pth": r"cut.pth cannot be read as weights: it is damaged or contains more than tensors$",
    "pipe.pth": r"pipe.pth: must be a regular file, is a FIFO$",
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_other_files_are_refused_in_one_line(here, data):
    files(here)
    assert {path.name for path in here.iterdir()} == REFUSED.keys()
    for name, message in REFUSED.items():
        with pytest.raises(ValueError, match=message) as error:
            teachers.find(name, "resnet8", None).build(data, 0)
        assert "\n" not in str(error.value)
    assert not (here / "executed").exists()
    (here / "run").mkdir()
    os.mkfifo(here / "run" / teachers.WEIGHTS)
    with pytest.raises(ValueError, match=r"student.safetensors: must be a regular file, is a FIFO$"):
        teachers.find("run", "resnet8", None)


def test_classes_named_in_a_pickle_are_never_called(here):
    """Every admitted name is replaced by a class that does nothing."""
    admitted = [name for _, name in weights.STAND_INS]
    assert len(admitted) == len(set(admitted))
    assert {stand_in.__module__ for stand_in, _ in weights.STAND_INS} == {weights.__name__}
    torch.save({"model": STATE, "path": pathlib.Path("a"), "opt": argparse.Namespace(a=1)}, here / "net.pth")
    content = weights._load(here / "net.pth", (here / "net.pth").read_bytes())
    assert [type(content[name]) for name in ("path", "opt")] == [weights._Value] * 2
    assert not {*torch.serialization.get_safe_globals()} & {*weights.STAND_INS}


def test_repdistiller_names_are_accepted(here, data):
    """The names of its model_dict. Parameter names, order and shapes were compared by building both."""
    theirs = "resnet8 resnet14 resnet20 resnet32 resnet44 resnet56 resnet110 resnet8x4 resnet32x4 ResNet50 wrn_16_1 wrn_16_2 "
    theirs += "wrn_40_1 wrn_40_2 vgg8 vgg11 vgg13 vgg16 vgg19 MobileNetV2 ShuffleV1 ShuffleV2"
    assert {models.canonical(name) for name in theirs.split()} == {
        n for n in models.REGISTRY if not n.startswith("cnn")
    }
    with torch.device("meta"):
        built = models.build("ShuffleV2", in_channels=3, num_classes=100)
    assert type(built).__name__ == "ShuffleNetV2"
    study = cli._parse(["distill", *DIGITS, "--teacher", "ResNet50", "--student", "ShuffleV1"]).__self__.study()
    assert [run.network for run in study.runs] == ["resnet50", "shufflenet_v1"]
    (run,) = cli._parse(["teacher", *DIGITS, "--network", "MobileNetV2"]).__self__.study().runs
    assert run.network == "mobilenet_v2"
    with pytest.raises(
        ValueError,
        match=r"nor one of the networks cnn_large, .*\(or, as in RepDistiller, MobileNetV2, ResNet50, ShuffleV1, ShuffleV2",
    ):
        teachers.find("ResNet49", None, None)


# --- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "student", "labels", "doubt"),
    [
        (97.8, 10.0, [100] * 10, ""),
        (9.0, 10.0, [100] * 10, "9.0 %, and always guessing the most frequent class gives 10.0 %"),
        (13.0, 10.0, [100] * 10, "13.0 %, and always guessing the most frequent class gives 10.0 %"),
        (19.1, 10.0, [100] * 10, ""),
        (60.0, 61.0, [100] * 10, "no more than the student before training (61.0 %)"),
        (60.0, 60.0, [100] * 10, "no more than the student before training (60.0 %)"),
        (60.0, None, [100] * 10, ""),
        (91.0, 10.0, [900, 100], "and always guessing the most frequent class gives 90.0 %"),
        (92.0, 10.0, [900, 100], ""),
        (70.0, 10.0, [5, 5], "and always guessing the most frequent class gives 50.0 %"),  # ten samples: may be chance
        (70.0, 10.0, [500, 500], ""),
        (8.0, 1.0, [100] * 100, "and always guessing the most frequent class gives 1.0 %"),
        (12.0, 1.0, [100] * 100, ""),
        (0.0, 0.0, [0, 0], ""),
    ],
)
def test_doubt_is_raised_near_chance_or_below_the_student(teacher, student, labels, doubt):
    said = teacher_warning(teacher, student, labels)
    assert bool(said) == bool(doubt) and doubt in said and "\n" not in said
    assert not said or ("--teacher-mean" in said and "order" in said)


class CountingTeacher(nn.Module):
    """A teacher that predicts the brightest of four pixels, shifted by `shift` classes, and counts its rows."""

    def __init__(self, shift=0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(5.0))
        self.shift, self.rows = shift, 0

    def forward(self, x):
        self.rows += len(x)
        return (self.scale * x.flatten(1)).roll(self.shift, 1)


def corners(right=1.0, count=40):
    """Images of four pixels. The pixel of the class is the brightest in a share `right` of the test set and in training."""
    images = np.zeros((2, count, 2, 2, 1), np.uint8)
    labels = np.arange(count) % 4
    for part, wrong in ((0, 0), (1, round((1 - right) * count))):
        for i, label in enumerate(labels):
            images[part, i].reshape(-1)[(label + (i < wrong)) % 4] = 200
    return assemble("corners", (images[0], labels), (images[1], labels), 4)


def linear():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    nn.init.zeros_(network[1].weight)
    return network


def test_teacher_is_measured_once_even_after_a_resume(tmp_path):
    made, recipe = corners(0.8), Recipe("kd", epochs=3, batch_size=8, device="cpu")
    teacher, seen = CountingTeacher(), []

    def stop(line):
        seen.append(line)
        if len(seen) == 1:
            raise KeyboardInterrupt

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        uninterrupted = distill(linear(), CountingTeacher(), made.train, made.test, recipe)
        with pytest.raises(KeyboardInterrupt):
            distill(linear(), teacher, made.train, made.test, recipe, output=tmp_path / "run", progress=stop)
        probed = 3 + 40 + 40  # one row of each set, one to count FLOPs; the test set; an epoch
        assert (
            teacher.rows == probed and json.loads((tmp_path / "run/config.json").read_text())["teacher_accuracy"] == 80
        )
        summary = distill(linear(), teacher, made.train, made.test, recipe, output=tmp_path / "run", resume=True)
        assert teacher.rows == probed + 3 + 2 * 40
    assert uninterrupted.teacher_accuracy == summary.teacher_accuracy == 80
    assert uninterrupted.teacher_visits == summary.teacher_visits == 3 * 40
    (entry,) = json.loads((tmp_path / "run" / "summary.json").read_text())["results"]
    assert entry["teacher_accuracy"] == 80
    alone = distill(linear(), None, made.train, made.test, Recipe("ce", epochs=1, device="cpu"))
    assert alone.teacher_accuracy is None


@pytest.mark.parametrize("loaded", [False, True])
def test_teacher_at_chance_is_warned_about_before_training(loaded):
    made, trained = corners(), []
    sets = made.train, made.test
    if loaded:
        sets = (
            [(x, int(y)) for x, y in zip(v(part), part.labels, strict=True)] for part, v in ((s, plain) for s in sets)
        )
    shifted, recipe = CountingTeacher(shift=1), Recipe("kd", epochs=1, device="cpu")
    with pytest.warns(
        UserWarning, match=r"the teacher's accuracy on the test set is 0.0 %, and always guessing .* 25.0 %"
    ) as caught:
        summary = distill(linear(), shifted, *sets, recipe, progress=lambda line: trained.append(len(caught)))
    assert summary.teacher_accuracy == 0 and trained == [1] and caught[0].filename == __file__


def plain(part):
    return part.views.normalize(torch.from_numpy(part.images))


def test_student_better_than_its_teacher_is_warned_about():
    made = corners(0.6)
    student = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    x, labels = plain(made.test).flatten(1), torch.from_numpy(made.test.labels)
    with torch.no_grad():  # fit the test set
        student[1].weight.copy_(torch.linalg.lstsq(x, nn.functional.one_hot(labels, 4).float()).solution.T)
        student[1].bias.zero_()
        better = 100 * (student(x).argmax(1) == labels).float().mean().item()
    if better < 60:
        student[1].load_state_dict({"weight": torch.eye(4), "bias": torch.zeros(4)})
        better = 60.0
    with pytest.warns(UserWarning, match=rf"is 60.0 %, no more than the student before training \({better:.1f} %\)"):
        distill(student, CountingTeacher(), made.train, made.test, Recipe("kd", epochs=1, device="cpu"))


def test_table_has_one_row_for_each_distinct_teacher():
    def run(method, seed=0, accuracy=50.0, teacher=None):
        return Summary(method, seed, accuracy, accuracy, 1, 1, 1.0, teacher_accuracy=teacher)

    def rows(*summaries):
        return [tuple(row[:3]) for row in results_table(summaries)[1:]]

    kd, condensed = ("kd", "50.00", "50.00"), ("kc-kd", "50.00", "50.00")
    assert rows(run("kd"), run("kc-kd")) == [kd, condensed]
    assert rows(run("kd", teacher=90.0), run("kc-kd", teacher=90.0)) == [("teacher", "90.00", "-"), kd, condensed]
    apart = [("teacher of kd", "90.00", "-"), ("teacher of kc-kd", "70.00", "-")]
    assert rows(run("kd", teacher=90.0), run("kc-kd", teacher=70.0)) == [*apart, kd, condensed]
    trained = [run("teacher", seed, 90.0 + seed) for seed in (0, 1)]
    table = rows(*trained, run("kd", 0, teacher=90.0), run("kd", 1, teacher=91.0))
    assert table == [("teacher", "90.50 ± 0.71", "90.50 ± 0.71"), ("kd", "50.00 ± 0.00", "50.00 ± 0.00")]
    assert rows(trained[0], run("kd", teacher=70.0))[0] == ("teacher of kd", "70.00", "-")
    seeds = rows(run("kd", 0, teacher=90.0), run("kd", 1, teacher=92.0))
    assert seeds[0] == ("teacher", "91.00 ± 1.41", "-")


@pytest.mark.slow
def test_report_shows_the_teacher_if_its_accuracy_was_recorded(tmp_path, capsys):
    made = corners(0.8)
    for name in ("new", "old"):
        distill(
            linear(),
            CountingTeacher(),
            made.train,
            made.test,
            Recipe("kd", epochs=1, device="cpu"),
            output=tmp_path / name,
        )
    path = tmp_path / "old" / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("teacher_accuracy") == 80
    path.write_text(json.dumps(config))
    for name, shown in (("old", False), ("new", True)):
        Report((tmp_path / name,), tmp_path / f"{name}.html").run()
        assert ("teacher" in [line.split(" ")[0] for line in capsys.readouterr().out.splitlines()]) == shown
        assert ("<td>teacher</td><td>80.00</td>" in (tmp_path / f"{name}.html").read_text()) == shown
    for wrong in ("high", -1, 101, [1]):
        path.write_text(json.dumps({**config, "teacher_accuracy": wrong}))
        with pytest.raises(ValueError, match=r"old/config.json is damaged: teacher_accuracy must"):
            page.write(tmp_path / "page.html", [tmp_path / "old"])


# --- normalisation of its images --------------------------------------------------------------------------------------


IMAGENET = Views((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("mean", "std", "views"),
    [
        ("half", None, Views((0.5,) * 3, (0.5,) * 3)),
        ("imagenet", None, IMAGENET),
        ("imagenet", "imagenet", IMAGENET),
        (0.25, 0.5, Views((0.25,) * 3, (0.5,) * 3)),
        ([0.1, 0.2, 0.3], (0.5, 0.6, 1), Views((0.1, 0.2, 0.3), (0.5, 0.6, 1.0))),
        (np.float32(0.5), np.array([0.5]), Views((0.5,) * 3, (0.5,) * 3)),
        (None, None, Views((0.5, 0.0, 1.0), (0.5, 1.0, 1.0))),
    ],
)
def test_mean_and_std_set_the_views(mean, std, views):
    made = load(f"{__name__}:colours", mean=mean, std=std, flip=True)
    assert made.test.views == views and (made.train.views.mean, made.train.views.std) == (views.mean, views.std)
    assert made.train.views.flip and load(f"{__name__}:colours").train.views.mean == (0.5, 0.0, 1.0)


def colours():
    images = np.zeros((4, 8, 8, 3), np.uint8)
    images[::2, ..., 0], images[..., 2] = 255, 255
    return assemble("colours", (images, np.arange(4) % 2), (images, np.arange(4) % 2), 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mean 0.5", "mean and std must be given together, got no std"),
        ("--std 0.5", "mean and std must be given together, got no mean"),
        ("--mean imagenet", "mean must be one number or one per channel (1 here), got 3 numbers (images of digits)"),
        ("--mean nothing", "mean must be numbers or one of half, imagenet, got 'nothing'"),
        ("--mean half --std 0.2", "mean='half' includes its std, got std=[0.2] too"),
        ("--std half", "std must be numbers, got 'half': pass the names half, imagenet as mean"),
        ("--mean 0.5 --std 0", "std must be of pixels / 255, in (0, 1], got 0.0"),
        ("--mean 123.675 --std 58.395", "mean must be of pixels / 255, in [0, 1], got 123.675"),
        ("--mean 0.5 0.5 --std 0.5", "mean must be one number or one per channel (1 here), got 2 numbers"),
        ("--mean nan --std 0.5", "mean must be finite numbers, got nan"),
        ("--mean --std 0.5", "mean must be one number or one per channel, got none"),
    ],
)
def test_invalid_normalisation_is_one_line(words, message, here, capfd):
    assert kcd("distill", *DIGITS, *words.split()) == 2
    out, error = capfd.readouterr()
    assert (out, error.count("\n")) == ("", 1) and message in error and not any(here.iterdir())


@pytest.mark.slow
def test_mean_and_std_are_split_at_commas_and_checked_on_resume(here, capfd):
    command = ["distill", *DIGITS, "--method", "ce", "--student", "cnn_small", "--output", "run"]
    assert kcd(*command, "--mean", "0.5,", "--std", "0.25") == 2
    assert kcd(*command, "--mean", "half") == 0
    found = json.loads((here / "run" / "config.json").read_text())["about"]["data"]
    assert (found["mean"], found["std"]) == ([0.5], [0.5]) and load(**found).train.views == Views((0.5,), (0.5,))
    assert '"mean": [' in (here / "run" / "report.html").read_text().replace("&#34;", '"')
    capfd.readouterr()
    assert kcd(*command, "--mean", "half", "--resume") == 0
    for more, got in (([], "got mean[0]=0.30"), (["--mean", "0.5", "--std", "0.25"], "got std[0]=0.25")):
        assert kcd(*command, *more, "--resume") == 2
        error = capfd.readouterr().err
        assert error.startswith("kcd: run was run with ") and got in error and error.count("\n") == 1


GIVEN, HAD = ((0.3, 0.4, 0.5), (0.2, 0.25, 0.3)), ((0.5, 0.5, 0.5), (0.5, 0.4, 0.5))


def coloured(count=24):
    """Return noise with three channels."""
    draw = np.random.default_rng(0)
    part = draw.integers(0, 256, (count, 8, 8, 3), np.uint8), np.arange(count) % 3
    return load_as(assemble("noise", part, part, 3))


def load_as(made):
    views = Views(*GIVEN)
    return type(made.train)(made.train.images, made.train.labels, views)


def written_out(network):
    """Return the same network and layer names with the normalisation written into its forward pass."""
    kind = type(network)

    def forward(self, x):
        mean, std, own_mean, own_std = (torch.tensor(part).view(-1, 1, 1) for pair in (GIVEN, HAD) for part in pair)
        return kind.forward(self, (x * std + mean - own_mean) / own_std)

    network.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return network


@pytest.mark.filterwarnings("ignore:the teacher's accuracy")
@pytest.mark.parametrize(
    "method", mostly_slow((name for name in methods.REGISTRY if methods.build(name).needs_teacher), kept=["kd"])
)
def test_renormalised_teacher_equals_one_that_normalises_in_forward(method):
    images = coloured()

    def taught(renormalised):
        torch.manual_seed(1)
        teacher, student = (models.build("resnet8", in_channels=3, num_classes=3) for _ in range(2))
        recipe = Recipe(method, OPTIONS.get(method, {}), epochs=2, batch_size=8, lr=0.01, device="cpu")
        distill(student, renormalised(teacher), images, images, recipe)
        return torch.cat([tensor.flatten().float() for tensor in student.state_dict().values()])

    hooked, written, neither = (
        taught(change)
        for change in (lambda net: models.renormalise(net, given=GIVEN, own=HAD), written_out, lambda net: net)
    )
    torch.testing.assert_close(hooked, written, rtol=1e-3, atol=1e-3)
    assert (hooked - neither).abs().max() > 10 * (hooked - written).abs().max()


@pytest.mark.filterwarnings("ignore:the teacher's accuracy")
def test_run_resumes_only_with_the_same_teacher_normalisation(tmp_path):
    """Equal weights can have different normalisations: a run folder has one, a weights file none."""
    images, recipe = coloured(), Recipe("kd", epochs=2, batch_size=8, lr=0.01, device="cpu")

    def taught(folder, own, **options):
        torch.manual_seed(1)
        teacher, student = (models.build("cnn_small", in_channels=3, num_classes=3) for _ in range(2))
        if own is not None:
            models.renormalise(teacher, given=GIVEN, own=own)
        distill(student, teacher, images, images, recipe, output=tmp_path / folder, **options)
        return (tmp_path / folder / "student.safetensors").read_bytes()

    def stop(_line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        taught("stopped", HAD, progress=stop)
    for other in (None, (HAD[1], HAD[0])):
        with pytest.raises(ValueError, match=r"was run with teacher_input.*: a resumed run must not change it"):
            taught("stopped", other, resume=True)
    assert taught("stopped", HAD, resume=True) == taught("whole", HAD)


def test_renormalise_keeps_state_layers_and_names():
    network = models.build("cnn_small", in_channels=3, num_classes=3).eval()
    state, layers = copy.deepcopy(network.state_dict()), [name for name, _ in network.named_modules()]
    images = torch.from_numpy(coloured().images)
    expected = network(Views(*HAD).normalize(images))
    assert models.renormalise(network, given=GIVEN, own=HAD) is network
    x = Views(*GIVEN).normalize(images)
    for same in (network, copy.deepcopy(network), torch.compile(network, backend="eager")):
        torch.testing.assert_close(same(x), expected, rtol=1e-4, atol=1e-4)
    assert [*network.state_dict()] == [*state] and [name for name, _ in network.named_modules()] == layers
    double = copy.deepcopy(network).double()
    assert double(x.double()).dtype == torch.float64
    with pytest.raises(ValueError, match="already been renormalised"):
        models.renormalise(network, given=GIVEN, own=HAD)
    with pytest.raises(ValueError, match="one mean and one std per channel"):
        models.renormalise(nn.Identity(), given=GIVEN, own=((0.5,), (0.5,)))
    with pytest.raises(TypeError, match="TorchScript"):
        models.renormalise(torch.jit.script(nn.Identity()), given=GIVEN, own=HAD)


def write_images(path):
    """Write digits as an .npz file, whose normalisation is that of its images."""
    data = load("digits")
    parts = {"x_train": data.train.images, "y_train": data.train.labels, "x_test": data.test.images}
    np.savez(path, **parts, y_test=data.test.labels)


@pytest.mark.slow
def test_teacher_run_keeps_its_own_normalisation(here, capfd):
    """A teacher trained with --mean half keeps its accuracy for a student with the file's mean, also in kcd evaluate."""
    write_images(here / "digits.npz")
    common = ["--data", "digits.npz", "--threads", 1, "--device", "cpu", "--epochs", 3]
    assert kcd("teacher", *common, "--network", "cnn_large", "--mean", "half", "--output", "taught") == 0
    (own,) = json.loads((here / "taught" / "summary.json").read_text())["results"]
    capfd.readouterr()
    command = ["distill", *common, "--student", "cnn_small", "--teacher", "taught", "--epochs", 1]
    assert kcd(*command, "--output", "run") == 0
    out, error = capfd.readouterr()
    (result,) = json.loads((here / "run" / "summary.json").read_text())["results"]
    assert own["accuracy_last"] > 70 and abs(result["teacher_accuracy"] - own["accuracy_last"]) < 0.2
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["teacher", "kd"]
    assert error == (
        "kcd: teacher taught gets images normalised as in its training, with mean 0.5 and std 0.5; "
        "the student's have mean 0.3056 and std 0.376\n"
    )
    about = json.loads((here / "run" / "config.json").read_text())["about"]
    assert about["teacher_normalisation"] == {"mean": [0.5], "std": [0.5]} and about["data"]["mean"] != [0.5]

    same_weights = ["--teacher", "taught/student.safetensors", "--teacher-network", "cnn_large"]
    for more in ([], ["--teacher", "taught"], same_weights):
        assert kcd("evaluate", "run", "--threads", 1, *more) == 0
        evaluation = json.loads((here / "run" / "evaluation.json").read_text())["evaluation"]
        assert abs(evaluation["teacher"]["accuracy"] - result["teacher_accuracy"]) < 0.2
        assert " gets images normalised as in its training, with mean 0.5" in capfd.readouterr().err

    assert kcd(*command[:-4], *same_weights, "--epochs", 1, "--output", "file") == 0  # a file records no normalisation
    (lost,) = json.loads((here / "file" / "summary.json").read_text())["results"]
    assert lost["teacher_accuracy"] < own["accuracy_last"]
    assert kcd(*command[:-4], *same_weights, "--epochs", 1, "--mean", "half", "--output", "both") == 0
    (found,) = json.loads((here / "both" / "summary.json").read_text())["results"]
    assert found["teacher_accuracy"] == own["accuracy_last"]


@pytest.mark.slow
def test_run_without_recorded_mean_is_evaluated_resumed_and_teaches(here, capfd):
    assert kcd("distill", *DIGITS, "--output", "run") == 0
    for path in (here / "run" / "config.json", here / "run" / "teacher" / "config.json"):
        config = json.loads(path.read_text())
        del config["about"]["data"]["mean"], config["about"]["data"]["std"], config["about"]["teacher_normalisation"]
        del config["teacher_accuracy"]
        path.write_text(json.dumps(config))
    capfd.readouterr()
    assert kcd("evaluate", "run", "--threads", 1) == 0
    assert kcd("distill", *DIGITS, "--output", "run", "--resume") == 0
    assert kcd("distill", *DIGITS, "--teacher", "run/teacher", "--output", "again") == 0
    assert capfd.readouterr().err == ""
    path.write_text(json.dumps({**config, "about": {**config["about"], "data": {"mean": ["half"], "std": [1]}}}))
    assert kcd("distill", *DIGITS, "--teacher", "run/teacher", "--output", "other") == 2
    assert "teacher/config.json is damaged: mean must be finite numbers, got str 'half'" in capfd.readouterr().err


def test_repdistiller_checkpoint_teaches_with_its_true_accuracy(here, capfd):
    """The checkpoint holds optimizer and options too; the table shows the true accuracy."""
    data = load("digits", mean="half")
    torch.manual_seed(0)
    network = models.build("cnn_large", in_channels=1, num_classes=10)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    x, y = plain(data.train), torch.from_numpy(data.train.labels)
    for step in range(60):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.1 ** np.sum(np.array([40]) < step)
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
        optimizer.step()
    assert isinstance(optimizer.param_groups[0]["lr"], np.float64)
    network.eval()
    with torch.no_grad():
        accuracy = 100 * (network(plain(data.test)).argmax(1).numpy() == data.test.labels).mean()
    options = argparse.Namespace(model="cnn_large", learning_rate=0.05, lr_decay_epochs=[40])
    content = {"opt": options, "model": network.state_dict(), "optimizer": optimizer.state_dict(), "best_acc": accuracy}
    torch.save(content, here / "last.pth")
    command = ["distill", *DIGITS, "--mean", "half", "--teacher", "last.pth", "--output", "run"]
    assert accuracy > 70 and kcd(*command) == 0
    out, error = capfd.readouterr()
    assert error == "" and out.splitlines()[2].split()[:3] == ["teacher", f"{accuracy:.2f}", "-"]


@pytest.mark.slow
def test_teacher_warning_is_printed_before_training(here, capfd, monkeypatch):
    network = models.build("cnn_large", in_channels=1, num_classes=10)
    torch.save(network.state_dict(), here / "net.pth")
    from kcd_ext.commands import progress

    shown, note = [], progress.note
    monkeypatch.setattr(
        progress, "note", lambda text: (shown.append((here / "run" / "config.json").exists()), note(text))
    )
    assert kcd("distill", *DIGITS, "--teacher", "net.pth", "--seeds", 2, "--output", "run") == 0
    assert shown == [False]
    assert capfd.readouterr().err.startswith("kcd: warning: the teacher's accuracy on the test set is ")
