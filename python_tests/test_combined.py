"""Several methods at once: the sum of their losses from one pass of each network, their options, and runs."""

import pytest
import torch
from commands import run
from small_runs import CLASSES, Samples, network
from torch import nn

from kcd_ext import files, methods
from kcd_ext.methods import Method, Outcome
from kcd_ext.methods.features import Tap

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = 13
SMALL = {"crd": {"negatives": 12, "dimension": 5}}


def samples():
    x = torch.randn(SAMPLES, 1, 6, 6, generator=torch.Generator().manual_seed(5))
    return Samples(x, torch.arange(SAMPLES) * 3 % CLASSES)


def prepared(name, options=None, student=None, teacher=None):
    student = student or network(1, dropout=0.0)
    teacher = (teacher or network(2, width=10)).eval()
    method = methods.build(name, options)
    torch.manual_seed(3)
    method.prepare(student, teacher, samples())
    method.begin(0, 8)
    return method, student, teacher


def count_rows(net):
    rows = []
    net.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    return rows


def parts_of(name, options):
    """Return the parts' options, by part."""
    parts = name.split("+")
    own = {part: {**SMALL.get(part, {}), **({"ce_weight": 0.0} if part != parts[0] else {})} for part in parts}
    return {part: {**own[part], **options} for part in parts}


@pytest.mark.parametrize("options", [{}, {"batch_keep": 0.5}], ids=["all rows", "half of the rows"])
@pytest.mark.parametrize("name", ["kd+at", "dkd+reviewkd", "pkt+kd", "kr+fitnet+dist", "crd+kd", "iekd+kd", "sskd+kd"])
def test_loss_and_gradient_are_sums_of_the_parts_from_one_pass(name, options):
    """The sum of runs of each part on networks of its own. sskd needs rotated views, so it has passes of its own."""
    batch = samples().at(range(SAMPLES))
    own = parts_of(name, options)
    given = {f"{part}.{x}": value for part in SMALL if part in own for x, value in SMALL[part].items()} | options
    method, student, teacher = prepared(name, given)
    rows = {"student": count_rows(student), "teacher": count_rows(teacher)}
    sum_of_losses, gradient, terms = 0, [torch.zeros_like(p) for p in student.parameters()], {}
    for part, twin in zip(own, method.parts, strict=True):
        alone, its_student, its_teacher = prepared(part, own[part])
        alone.load_state_dict(twin.state_dict())
        torch.manual_seed(0)
        outcome = alone(its_student, its_teacher, batch)
        outcome.loss.backward()
        sum_of_losses = sum_of_losses + outcome.loss.detach()
        gradient = [g + p.grad for g, p in zip(gradient, its_student.parameters(), strict=True)]
        terms |= outcome.terms
        if part == name.split("+")[0]:
            value = outcome.value
    torch.manual_seed(0)
    outcome = method(student, teacher, batch)
    torch.testing.assert_close(outcome.loss.detach(), sum_of_losses)
    assert torch.equal(outcome.value, value)
    outcome.loss.backward()
    largest = max(g.abs().max().item() for g in gradient)
    for p, g in zip(student.parameters(), gradient, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6 * largest)
    if "sskd" not in own:
        assert rows == {"student": [SAMPLES], "teacher": [SAMPLES if not options else SAMPLES // 2]}
        assert student[1].num_batches_tracked == 1
        assert outcome.terms.keys() == terms.keys()
    else:
        assert len(rows["student"]) == len(rows["teacher"]) == 2
        assert {"sskd.kl", "kd.kl"} <= outcome.terms.keys()


def test_second_step_uses_its_own_batch():
    """Nothing of an earlier batch is used again, although a new tensor may get the address of an old one."""
    method, student, teacher = prepared("kd+at")
    expected = []
    for index in ([1, 2, 3], [4, 5, 6]):
        twin, *nets = prepared("kd+at")
        expected.append(twin(*nets, samples().at(index)).terms)
    for index, terms in zip(([1, 2, 3], [4, 5, 6]), expected, strict=True):
        assert method(student, teacher, samples().at(index)).terms == terms


def test_weighted_losses_are_those_of_all_parts():
    weight = torch.arange(SAMPLES) / 5.0
    batch = samples().at(range(SAMPLES), weight=weight)
    outcome = (lambda it: it[0](*it[1:], batch))(prepared("kd+at"))
    kd, at = ((lambda it: it[0](*it[1:], batch))(prepared(*each)) for each in (("kd",), ("at", {"ce_weight": 0.0})))
    torch.testing.assert_close(outcome.losses, kd.losses + at.losses)
    torch.testing.assert_close(outcome.loss, (outcome.losses * weight).mean())
    assert not methods.build("kd+pkt").weighs_samples


def test_colliding_terms_have_the_name_of_their_part():
    method, student, teacher = prepared("kd+kr+iekd", {"kr.kd_weight": 0.5})
    assert [*method(student, teacher, samples().at([1, 2, 3])).terms] == [
        "kd.kl",
        "kr",
        "kr.kl",
        "inheritance",
        "exploration",
    ]


def test_pretraining_is_that_of_all_parts_in_order():
    method, *_ = prepared("sskd+kd+iekd")
    assert [plan.part for plan in method.pretraining()] == [method.parts[0].teacher_head, method.parts[2].auto_encoder]


class ChangesInTraining(nn.Module):
    """A ReLU that changes its input in place in training mode."""

    def forward(self, x):
        return x.relu_() if self.training else x.relu()


def test_changed_features_are_refused_in_every_part():
    """A later layer that changes the features in place is found in the part that did not run the pass, too."""
    student = nn.Sequential(
        nn.Conv2d(1, 4, 3), ChangesInTraining(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, CLASSES)
    )
    student.stages = ("2",)
    method, _, teacher = prepared("kr+at", {"at.student_layers": "0", "at.teacher_layers": "2"}, student)
    with pytest.raises(RuntimeError, match="student's layer '0' had its features changed in place"):
        method(student, teacher, samples().at([1, 2]))


class CountsCalls(Method):
    """A user's method: it taps a layer, calls the student in both modes, and takes no ce_weight."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = scale

    def prepare(self, student, teacher, samples):
        self.tap = Tap(student, "0", "student", output=True)

    def forward(self, student, teacher, batch):
        with torch.no_grad():
            student(batch.x)
        logits, features = self.tap.run(student, batch.x)
        loss = self.scale * features.square().mean()
        return Outcome(loss, logits.detach(), logits.detach().amax(1), {"size": loss.detach()})

    def release(self):
        self.tap.remove()


def test_own_method_can_be_a_part():
    own = f"{__name__}:CountsCalls"
    method, student, teacher = prepared(f"kd+{own}", {f"{own}.scale": 2.0, "temperature": 3.0})
    rows = count_rows(student)
    outcome = method(student, teacher, samples().at([1, 2, 3]))
    outcome.loss.backward()
    assert rows == [3, 3]  # with and without gradients
    expected = 2 * student[0](samples().at([1, 2, 3]).x).square().mean()
    torch.testing.assert_close(outcome.terms["size"], expected.detach())
    assert method.parts[0].temperature == 3


# --- options ----------------------------------------------------------------------------------------------------------


def test_options_reach_their_part():
    options = {"kd.temperature": 2.0, "power": 3.0, "batch_keep": 0.5, "ce_weight": 0.7, "label_smoothing": 0.1}
    kd, at = methods.build("kd+at", options).parts
    assert (kd.temperature, kd.ce_weight, kd.batch_keep, kd.label_smoothing) == (2, 0.7, 0.5, 0.1)
    assert (at.power, at.ce_weight, at.batch_keep, at.label_smoothing) == (3, 0, 0.5, 0)
    at = methods.build("kd+at", {"at.ce_weight": 1.0, "at.label_smoothing": 0.1}).parts[1]
    assert (at.ce_weight, at.label_smoothing) == (1, 0.1)
    assert methods.build("kd+at").parts[0].ce_weight == 0.1
    assert methods.convert_options("kd+at", {"kd.temperature": "2", "power": "3", "student_layers": "1.10"}) == {
        "kd.temperature": 2,
        "power": 3,
        "student_layers": "1.10",
    }
    shown = {option.name: option for option in methods.options_of("kd+at")}
    assert shown["kd.ce_weight"].default == "0.1" and shown["at.ce_weight"].default == "0.0"
    assert all(option.text for option in shown.values())


@pytest.mark.parametrize(
    ("weights", "expected"),
    [({}, [0.1, 0]), ({"at.ce_weight": 1.0}, [0.1, 0.1]), ({"ce_weight": 0.0, "at.ce_weight": 1.0}, [0, 0.1])],
)
def test_label_smoothing_is_that_of_every_cross_entropy(weights, expected):
    parts = methods.build("kd+at", {"label_smoothing": 0.1, **weights}).parts
    assert [part.label_smoothing for part in parts] == expected


def test_label_smoothing_reaches_a_part_without_ce_weight():
    parts = methods.build("kd+ce", {"label_smoothing": 0.1}).parts
    assert [part.label_smoothing for part in parts] == [0.1, 0.1]


def test_label_smoothing_is_not_given_twice_and_not_without_a_cross_entropy():
    both = {"label_smoothing": 0.1, "at.label_smoothing": 0.2, "at.ce_weight": 1.0}
    with pytest.raises(
        ValueError, match=r"got label_smoothing of 'at' twice: as label_smoothing and as at\.label_smoothing"
    ):
        methods.build("kd+at", both)
    with pytest.raises(ValueError, match=r"label_smoothing=0\.1 has no effect with ce_weight=0"):
        methods.build("kd+at", {"label_smoothing": 0.1, "kd.ce_weight": 0.0})


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "kd+dkd",
            {"temperature": 2.0},
            ValueError,
            "'temperature' of method .* write kd.temperature or dkd.temperature",
        ),
        ("kd+at", {"power": 1.0, "at.power": 2.0}, ValueError, "method 'kd.at' got power of 'at' twice"),
        ("kd+at", {"at.batch_keep": 0.5}, ValueError, "batch_keep of method 'kd.at' applies to all its parts"),
        (
            "kd+at",
            {"at.powr": 1.0},
            TypeError,
            r"has no option 'at.powr': did you mean at.power\? It takes kd.temperature",
        ),
        ("kd+at", {"kr.tau": 1.0}, TypeError, "method 'kd.at' has no option 'kr.tau'"),
        ("kd+at", {"at.power": 0.0}, ValueError, "power must be a finite number >= 1, got 0"),
        ("kd+kd", {}, ValueError, "method must not name a part twice, got 'kd.kd' with 'kd' twice"),
        ("kd+", {}, ValueError, r"method must have names around every \+, as in kd\+at, got 'kd\+'"),
        ("kd+att", {}, ValueError, "unknown method 'att'"),
        ("kd+pwkd", {}, ValueError, "method 'pwkd' cannot be combined with others, because it chooses the teacher"),
    ],
)
def test_wrong_name_or_option_is_refused(name, options, error, message):
    with pytest.raises(error, match=message) as caught:
        methods.build(name, options)
    assert "\n" not in str(caught.value)


def test_combination_can_be_the_base_of_pwkd():
    method = methods.build("pwkd", {"base": "kd+at", "at.power": "3", "widths": "0.5,1"})
    assert method.base.parts[1].power == 3


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_command_trains_condensed_combination(tmp_path):
    command = ["distill", "--data", "digits", "--method", "kc-kd+at", "--options", "kd.temperature", "3", "power", "3"]
    more = [
        "--epochs",
        "3",
        "--condense.every",
        "1",
        "--condense.batch-keep",
        "0.5",
        "--threads",
        "1",
        "--output",
        "run",
    ]
    found = run(*command, *more, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    config = files.read_json(tmp_path / "run" / "config.json")
    assert config["recipe"]["method"] == "kd+at"
    assert config["recipe"]["options"] == {"kd.temperature": 3, "power": 3}
    lines = files.read_lines(tmp_path / "run" / "metrics.jsonl")
    assert all(line["terms"].keys() == {"kl", "at"} for line in lines)
    assert lines[-1]["samples"] < lines[0]["samples"]
    summary = files.read_json(tmp_path / "run" / "summary.json")["results"][-1]
    visits = sum(line["samples"] for line in lines)
    assert 0.45 * visits < summary["teacher_visits"] <= 0.5 * visits  # both parts share the teacher's pass


@pytest.mark.slow
def test_command_names_the_mistake_in_one_line(tmp_path):
    for arguments, message in (
        (("--method", "kd+dk"), "unknown method 'dk': did you mean dkd? Choose from"),
        (("--method", "kc-kd+dkd", "--options", "temperature", "2"), "write kd.temperature or dkd.temperature"),
        (("--method", "kd+at", "--power", "2"), "pass it to method kd+at as --options at.power VALUE"),
        (("--method", "kd+pwkd"), "method 'pwkd' cannot be combined"),
    ):
        found = run("distill", "--data", "digits", *arguments, "--output", "run", cwd=tmp_path)
        assert found.returncode == 2 and message in found.stderr and len(found.stderr.splitlines()) == 1, found.stderr
    assert not (tmp_path / "run").exists()
    shown = run("distill", "--method", "kd+at", "--help", cwd=tmp_path).stdout
    assert "at.power 2.0" in shown and "kd.temperature 4.0" in shown and "batch_keep 1" not in shown
