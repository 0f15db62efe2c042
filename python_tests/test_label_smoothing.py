"""Label smoothing in methods and recipes. (The operator's is in test_conformance.py.)"""

import random
import time

import pytest
import torch
from processes import Crew
from small_runs import CLASSES, OPTIONS, Samples, StopError, assert_same, final, images, network, stop_after
from torch.nn import functional

from kcd_ext import methods
from kcd_ext.training import Condense, Recipe, distill

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY = (*methods.REGISTRY, "kd+at", "at+kd")
SMOOTHING = 0.3


def outcome_of(name, label_smoothing):
    """Return a method and its outcome for one batch, the same for every call but for the label smoothing."""
    smoothing = {"label_smoothing": label_smoothing} if label_smoothing else {}
    method = methods.build(name, OPTIONS.get(name, {}) | smoothing)
    student, teacher = network(1, dropout=0.0), network(2, width=10, dropout=0.0).eval()
    x = torch.randn(23, 1, 6, 6, generator=torch.Generator().manual_seed(5))
    samples = Samples(x, torch.arange(23) * 7 % CLASSES)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        method.prepare(student, teacher if method.needs_teacher else None, samples)
        method.begin(0, 8)
        outcome = method(student, method.teacher_of(teacher), samples.at(torch.arange(11)))
    return method, outcome, samples.label[:11]


@pytest.mark.parametrize("name", EVERY)
def test_smoothing_changes_only_the_cross_entropy_of_a_method(name):
    """For one class index the smoothed cross entropy is (1 - s) CE + s / C sum_c -log pi_c (Szegedy et al., 2016)."""
    method, plain, label = outcome_of(name, 0)
    _, smooth, _ = outcome_of(name, SMOOTHING)
    inner = method.parts[0] if "+" in name else getattr(method, "base", method)
    log_pi = plain.logits.double().log_softmax(-1)
    own = log_pi[torch.arange(len(label)), label]
    change = getattr(inner, "ce_weight", 1.0) * SMOOTHING * (own - log_pi.mean(-1)).mean()
    if "peer_ce" in plain.terms:  # the peer learns the labels, too
        change = change + inner.ce_weight * (smooth.terms["peer_ce"] - plain.terms["peer_ce"])
    assert change.abs() > 1e-3
    torch.testing.assert_close((smooth.loss - plain.loss).double(), change, rtol=1e-3, atol=2e-5)
    assert torch.equal(smooth.value, plain.value)
    for term in plain.terms.keys() - {"peer_ce"}:
        assert torch.equal(smooth.terms[term], plain.terms[term]), term


@pytest.mark.parametrize("name", ["ce", "kd", "at", "dkd"])
def test_smoothing_works_with_weights_of_samples(name):
    method = methods.build(name, {"label_smoothing": SMOOTHING})
    student, teacher = network(1, dropout=0.0), network(2, width=10, dropout=0.0).eval()
    samples = Samples(torch.randn(12, 1, 6, 6, generator=torch.Generator().manual_seed(5)), torch.arange(12) % CLASSES)
    method.prepare(student, teacher, samples)
    one = method(student, teacher, samples.at(torch.arange(12)))
    other = method(student, teacher, samples.at(torch.arange(12), weight=torch.ones(12)))
    torch.testing.assert_close(other.loss, one.loss)


def recipe(**changes):
    return Recipe(**{"method": "kd", "epochs": 4, "batch_size": 8, "lr": 0.02, "device": "cpu", "seed": 5} | changes)


def train(output=None, *, progress=None, **changes):
    torch.set_num_threads(1)
    torch.manual_seed(random.SystemRandom().randrange(2**32))  # the caller's generator must not matter
    student, r = network(1), recipe(**changes)
    teacher = network(2, width=10) if methods.build(r.method).needs_teacher else None
    resume = output is not None
    distill(student, teacher, images(61), images(30, seed=1), r, output=output, resume=resume, progress=progress)
    return student


def test_run_trains_on_smoothed_labels():
    """Without dropout and views, the student equals one that is trained on the same soft labels by hand."""
    data = images(16)
    student, twin = network(1, dropout=0.0), network(1, dropout=0.0)
    data.views = images(16, seed=1).views  # no crop, no flip
    r = recipe(method="ce", epochs=3, batch_size=16, momentum=0.0, weight_decay=0.0, milestones=(), label_smoothing=0.2)
    distill(student, None, data, images(30, seed=1), r)
    x, label = data.views.normalize(torch.from_numpy(data.images)), torch.from_numpy(data.labels)
    soft = 0.8 * functional.one_hot(label, CLASSES) + 0.2 / CLASSES
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        (-(soft * twin(x).log_softmax(-1)).sum(-1).mean()).backward()
        optimizer.step()
    for one, other in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


K = Condense(keep=0.5, every=1, stages=3)
VARIANTS = {
    "kd": {},
    "infobatch": {"condense": Condense(keep=0.5, selection="infobatch")},
    "mixup": {"mixup": 0.4, "condense": K},
    "pretraining": {"method": "sskd", "options": {"head_epochs": 2, "head_lr": 0.02}},
    "bfloat16": {"method": "pkt", "precision": "bfloat16", "gradient_accumulation": 2, "condense": K},
}


@pytest.mark.parametrize("name", ["kd", *(pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS if n != "kd")])
def test_stopped_and_resumed_run_equals_an_uninterrupted_run(tmp_path, name):
    changes = {"label_smoothing": 0.1, **VARIANTS[name]}
    train(tmp_path / "reference", **changes)
    with pytest.raises(StopError):
        train(tmp_path / "stopped", progress=stop_after(2), **changes)
    train(tmp_path / "stopped", **changes)
    assert_same(final(tmp_path / "stopped"), final(tmp_path / "reference"))


@pytest.mark.slow
def test_killed_run_equals_an_uninterrupted_run(tmp_path):
    changes = {"label_smoothing": 0.1, "epochs": 30, "condense": Condense(keep=0.5, stages=6)}
    reference, interrupted = tmp_path / "reference", tmp_path / "interrupted"
    assert Crew(lambda rank: train(reference, **changes), 2).wait() == [0, 0]
    for line in (3, 9):
        crew, deadline = Crew(lambda rank: train(interrupted, **changes), 2), time.monotonic() + 60
        while not (found := interrupted / "metrics.jsonl").exists() or len(found.read_text().splitlines()) < line:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        crew.kill()
        assert not (interrupted / "summary.json").exists()
    assert Crew(lambda rank: train(interrupted, **changes), 2).wait() == [0, 0]
    assert_same(final(interrupted), final(reference))


def test_resumed_run_must_not_change_its_smoothing(tmp_path):
    train(tmp_path, epochs=2, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"was run with label_smoothing=0\.1, got label_smoothing=0\.0"):
        train(tmp_path, epochs=2)


class Unsmoothed(methods.Method):
    """A method without the argument."""

    needs_teacher = False

    def __init__(self, factor: float = 1.0):
        super().__init__()


class Keywords(Unsmoothed):
    """A method that passes its arguments on."""

    def __init__(self, **options):
        super().__init__(**options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be a number in \[0, 1\], got 1\.5"),
        ({"label_smoothing": float("nan")}, ValueError, r"label_smoothing must be a number in \[0, 1\], got nan"),
        ({"label_smoothing": True}, TypeError, r"label_smoothing must be a number in \[0, 1\], got bool True"),
        (
            {"options": {"label_smoothing": 0.1}},
            ValueError,
            "options must not contain label_smoothing, got 0.1: set label_sm",
        ),
        (
            {"label_smoothing": 0.1, "options": {"ce_weight": 0}},
            ValueError,
            "label_smoothing=0.1 has no effect with ce_weight=0",
        ),
        (
            {"label_smoothing": 0.1, "method": f"{__name__}:Unsmoothed"},
            ValueError,
            "label_smoothing=0.1 has no effect with method '.*:Unsmoothed', which has no argument label_smoothing",
        ),
        ({"label_smoothing": 0.1, "method": f"{__name__}:Keywords"}, TypeError, "label_smoothing"),
        (
            {"label_smoothing": 0.1, "method": "pwkd", "options": {"base": f"{__name__}:Unsmoothed"}},
            TypeError,
            "method 'pwkd' has no option 'label_smoothing', nor has its base",
        ),
    ],
)
def test_smoothing_that_cannot_work_is_refused_before_anything_is_written(changes, error, message, tmp_path):
    with pytest.raises(error, match=message) as caught:
        distill(network(1), network(2), images(20), images(20), recipe(**changes), output=tmp_path / "run")
    assert "\n" not in str(caught.value) and [*tmp_path.iterdir()] == []


def test_recipe_of_an_older_run_has_no_smoothing():
    plain = recipe(label_smoothing=0.2).as_json()
    assert Recipe.from_json(plain) == recipe(label_smoothing=0.2)
    del plain["label_smoothing"]
    assert Recipe.from_json(plain) == recipe()
