"""The README's code runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kcd_ext import cli

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 10))


@pytest.fixture
def names():
    torch.manual_seed(0)
    student, x, labels = network(), torch.randn(32, 3, 4), torch.arange(32) % 10
    labels[3] = -100
    return {"student": student, "teacher": network(), "x": x, "labels": labels, "student_logits": student(x)}


def test_the_loss_in_place_of_kl_div(names):
    names["teacher_logits"] = names["teacher"](names["x"]).detach()
    names["labels"] = names["labels"].clamp(min=0)  # F.kl_div knows nothing of ignored rows
    lines = BLOCKS[0].split("\n# and with a choice")[0]
    before, after = lines.split("\n# after")
    exec(before, names)
    want = names["loss"].item()
    exec("\n".join(after.splitlines()[1:]), names)
    assert names["loss"].item() == pytest.approx(want, rel=1e-5)
    exec(BLOCKS[0], names)
    assert names["loss"].isfinite() and names["loss"].item() != pytest.approx(want, rel=1e-5)


def test_the_teacher_spared(names):
    seen = []
    teacher = names["teacher"]
    names["teacher"] = lambda x: seen.append(len(x)) or teacher(x)
    exec(BLOCKS[1], names)
    names["loss"].backward()
    assert seen == [9] and names["student"][1].weight.grad.abs().sum() > 0


def test_the_loop(names):
    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, i):
            return torch.full((3, 4), i % 10, dtype=torch.uint8), i % 10

    student, visits = names["student"], []
    names |= {
        "data": Data(),
        "transform": lambda image: image.float() / 10,
        "optimizer": torch.optim.SGD(student.parameters(), lr=0.1),
        "student": lambda x: visits.append(len(x)) or student(x),
    }
    exec(BLOCKS[2].replace("range(240)", "range(12)").replace("every=40", "every=2"), names)
    condenser = names["condenser"]
    assert condenser.stage == 6 and len(condenser.kept) == 28 and condenser.mix_trees
    assert sum(visits) == 2 * (40 + 38 + 36 + 34 + 32 + 30)
    images = torch.stack([Data()[i][0] for i in range(40)]).float() / 10
    logits = student(images)
    assert F.cross_entropy(logits, torch.arange(40) % 10) < 2.3


def test_the_trainer(tmp_path, capsys):
    exec(BLOCKS[3].replace("epochs=12", "epochs=4").replace("runs/mine", str(tmp_path)), {})
    accuracy, visits, asked = map(float, capsys.readouterr().out.split())
    # Six stages of four epochs: 1083 samples, then int(1083 * 0.3 / 6) = 54 fewer at each.
    assert accuracy > 70 and visits == asked == sum(4 * (1083 - 54 * stage) for stage in range(6))


def test_the_commands_are_understood(tmp_path, monkeypatch):
    """All options of the commands shown exist: what fails, fails for want of data or of a finished run."""
    monkeypatch.chdir(tmp_path)
    shown = re.findall(r"^(?:kcd|torchrun .* -m kcd_ext.cli) ((?:distill|teacher|evaluate|report) .*)$", README, re.M)
    assert len(shown) == 7
    for line in shown:
        cli._parse(line.partition("#")[0].split())


def test_the_commands_are_the_ones_that_are_tested():
    commands = re.findall(r"^python3 -m venv .*$", README, re.M)
    assert [c.split("&& ")[-1] for c in commands] == [".venv/bin/kcd demo", ".venv/bin/pytest -n auto"]
    assert all("-c constraints.txt" in c for c in commands)


def test_nothing_is_missing():
    """Every file that is linked or shown exists, and no table waits to be filled in."""
    for name in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / name).is_file(), name
    assert not re.search(r"\b[A-Z]+_[A-Z]+\b", re.sub(r"KCD_\w+|`[^`]*`", "", README))
