"""Requirements for every method of the registry, and for sums of methods. A newly registered method is tested without adding a
line here."""

import copy
import functools
import inspect
import math
import pickle
import re
from types import SimpleNamespace

import pytest
import torch
from processes import Crew
from small_runs import (
    CLASSES,
    OPTIONS,
    NoWait,
    Samples,
    StopError,
    assert_same,
    final,
    images,
    mostly_slow,
    network,
    stop_after,
)
from torch import nn

from kcd_ext import files, methods
from kcd_ext.training import Condense, Recipe, distill

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = 23
# Options that exercise other paths through a method.
VARIANTS = {
    "iekd": {"batch_keep": 0.5, "kd_weight": 1, "split": "permuted", "standardize": True},
    "ie-dml": {"distance": "cosine", "standardize": True},
    "kr": {"batch_keep": 0.4, "kd_weight": 0.5, "standardize": True},
    "sskd": {"batch_keep": 0.4, "standardize": True},
    "kd": {"batch_keep": 0.4, "standardize": True},
    "dkd": {"standardize": True},
    "dist": {"standardize": True},
    "at": {"power": 3},
    "fitnet": {"relu": False, "label_smoothing": 0.1},
    "reviewkd": {"mid_channels": 3, "warmup": 0},
}
COMBINATIONS = ("kd+at", "dkd+reviewkd", "crd+kd+fitnet")
NAMES = (*methods.REGISTRY, *COMBINATIONS)
EVERY = [
    *((name, {}) for name in NAMES),
    *((name, {"batch_keep": 0.4}) for name in NAMES if not methods.unknown_options(name, ["batch_keep"])[0]),
    *VARIANTS.items(),
]
every_method = pytest.mark.parametrize("name", NAMES)
every_registered = pytest.mark.parametrize("name", methods.REGISTRY)
every_variant = pytest.mark.parametrize(("name", "options"), EVERY)


def samples(dtype=torch.float32):
    x = torch.randn(SAMPLES, 1, 6, 6, generator=torch.Generator().manual_seed(5))
    return Samples(x.to(dtype), torch.arange(SAMPLES) * 7 % CLASSES)


def build_small(name, options=None):
    return methods.build(name, {**OPTIONS.get(name, {}), **(options or {})})


@functools.cache
def fitted():
    """Return a teacher that has learnt the labels."""
    teacher, data = network(2, width=10, dropout=0.0), samples()
    optimizer = torch.optim.Adam(teacher.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(teacher(data.x), data.label).backward()
        optimizer.step()
    return teacher.eval()


def prepared(name, options=None, seed=1, dtype=torch.float32, given=None):
    """Return a method as it is while the student trains. `given` is the original teacher, `teacher` that of `teacher_of`."""
    method = build_small(name, options)
    student = network(seed, dropout=0.0).to(dtype)
    if given is None and method.needs_teacher:
        given = copy.deepcopy(fitted()).to(dtype)
    data = samples(dtype)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        method.prepare(student, given, data)
    for plan in method.pretraining():
        plan.part.requires_grad_(False).eval()  # as the trainer leaves pretrained parts
    method.begin(0, 8)
    return SimpleNamespace(
        method=method, student=student, given=given, teacher=method.teacher_of(given), samples=data, dtype=dtype
    )


def step(it, index, **more):
    """Return the outcome of a batch after its backward pass."""
    torch.manual_seed(len(index))
    it.student.zero_grad(), it.method.zero_grad()
    outcome = it.method(it.student, it.teacher, it.samples.at(index, **more))
    outcome.loss.backward()
    return outcome


def trainable(it):
    return [p for p in (*it.student.parameters(), *it.method.parameters()) if p.requires_grad]


def numbers_of(it, outcome):
    """Return all numbers of a step."""
    return [outcome.loss, *outcome.terms.values(), *(p.grad for p in it.student.parameters()), *it.method.buffers()]


def state_of(*networks):
    return [x.clone() for net in networks if net is not None for x in net.state_dict().values()]


def assert_equal(one, other):
    assert len(one) == len(other) and all(map(torch.equal, one, other))


def hooks_of(*networks):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = [module for net in networks if net is not None for module in net.modules()]
    return sum(len(getattr(module, kind)) for module in modules for kind in kinds)


# --- a step -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_variant
def test_step_follows_protocol(name, options, dtype):
    """For odd batches, single samples, padding and weights."""
    it = prepared(name, options, dtype=dtype)
    if dtype == torch.float64 and any(True for _ in it.method.parameters()):
        pytest.skip("has its own parts, which are float32")
    before = state_of(it.given, it.teacher)
    for index in ([1, 2, 3, 4, 5, 6, 7], [8, 9, 10, -1, 8, 0, -1], [3], [4, -1], [-1, -1, -1]):
        outcome = step(it, index)
        assert outcome.loss.shape == () and outcome.loss.dtype == dtype and outcome.loss.isfinite()
        assert outcome.logits.shape == (len(index), CLASSES) and outcome.value.shape == (len(index),)
        assert outcome.value.is_floating_point() and outcome.value.isfinite().all() and outcome.losses is None
        numbers = (outcome.logits, outcome.value, *outcome.terms.values())
        if outcome.kl is not None:
            torch.testing.assert_close(outcome.kl.mean(), outcome.terms["kl"])
            assert outcome.kl.shape == (len(index),)
            numbers += (outcome.kl,)
        assert not any(x.requires_grad for x in numbers)
        assert all(term.shape == () and term.isfinite() for term in outcome.terms.values())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable(it))
        assert any(p.grad.any() for p in it.student.parameters())
        frozen = [p for net in (it.given, it.teacher) if net is not None for p in net.parameters()]
        assert all(p.grad is None for p in frozen)
    assert_equal(state_of(it.given, it.teacher), before)

    it.student.eval()
    index = [1, 2, 3, 4, 5]
    outcome = step(it, index)
    torch.testing.assert_close(outcome.logits, it.student(it.samples.at(index).x), rtol=1e-4, atol=1e-5)
    if it.method.weighs_samples:
        for weight in (torch.ones(5), torch.tensor([0.5, 0.0, 2.0, 1.0, 3.0])):
            weighted = step(it, index, weight=weight)
            assert weighted.losses.shape == (5,) and not weighted.losses.requires_grad
            torch.testing.assert_close(weighted.loss, (weighted.losses * weight).mean().to(dtype))
            if weight.eq(1).all():
                torch.testing.assert_close(weighted.loss, outcome.loss)


@every_variant
def test_loss_is_float32_under_autocast(name, options):
    it = prepared(name, options)
    for index in ([1, 2, 3, 4, 5], [3]):
        it.student.zero_grad(), it.method.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            outcome = it.method(it.student, it.teacher, it.samples.at(index))
        assert outcome.logits.dtype == torch.bfloat16 and outcome.loss.dtype == torch.float32
        assert outcome.loss.isfinite() and all(term.dtype == torch.float32 for term in outcome.terms.values())
        outcome.loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable(it))


@every_variant
def test_step_does_not_wait_for_device(name, options):
    it = prepared(name, options)
    weight = torch.rand(7) if it.method.weighs_samples else None
    with NoWait():
        for index in ([1, 2, 3, 4, 5, 6, 7], [8, 9, 10, -1, 8, 0, -1]):
            for batch in (it.samples.at(index), it.samples.at(index, weight=weight)):
                it.method(it.student, it.teacher, batch).loss.backward()
        for plan in it.method.pretraining():
            plan.loss(it.teacher, batch)


def test_no_wait_detects_waiting():
    batch, weight = samples().at([1, 2, -1]), torch.rand(7)
    for waits in (lambda: weight.max().item(), lambda: batch.x[batch.index >= 0], lambda: bool(batch.x.any())):
        with NoWait(), pytest.raises((AssertionError, AttributeError)):
            waits()


@every_variant
def test_step_ignores_caller_generator_and_validation(name, options):
    """Two equal steps give the same bits, whatever the caller drew and with a validation in between."""
    found = []
    for validates in (False, True):
        torch.manual_seed(100 + validates)
        it = prepared(name, options)
        step(it, [4, 2, 0])
        if validates:
            it.student.eval()
            with torch.no_grad():
                for net in (it.student, it.given, it.teacher):
                    net is None or net(it.samples.x)
            it.student.train()
        found.append([x.clone() for x in numbers_of(it, step(it, [5, 2, 9, 11]))])
    assert_equal(*found)


@every_variant
def test_step_after_loading_checkpoint_is_the_same(name, options):
    it = prepared(name, options)
    step(it, [4, 2, 0])
    saved = copy.deepcopy(nn.ModuleDict({"method": it.method, "student": it.student}).state_dict())
    expected = [x.clone() for x in numbers_of(it, step(it, [5, 2, 9, 11]))]
    again = prepared(name, options, seed=50, given=it.given)
    step(again, [1, 2])  # loading must also replace what this batch left behind
    nn.ModuleDict({"method": again.method, "student": again.student}).load_state_dict(saved)
    assert_equal(expected, numbers_of(again, step(again, [5, 2, 9, 11])))


@every_method
def test_networks_are_unchanged_and_hooks_removed(name):
    """`prepare` runs twice; hooks stay until `release`; copies of a student work during training."""
    method, student = build_small(name), network(1)
    given = network(2, width=10).eval() if method.needs_teacher else None
    student[1].eval()  # modes differ between modules
    networks = [net for net in (student, given) if net is not None]
    modes = [module.training for net in networks for module in net.modules()]
    learns = [p.requires_grad for net in networks for p in net.parameters()]
    before, counts = state_of(student, given), []
    for _ in range(2):
        method.prepare(student, given, samples())
        counts.append(hooks_of(student, given))
    assert counts[0] == counts[1]
    assert [module.training for net in networks for module in net.modules()] == modes
    assert [p.requires_grad for net in networks for p in net.parameters()] == learns
    assert_equal(state_of(student, given), before)

    method.begin(0, 8)
    teacher, batch = method.teacher_of(given), samples().at([1, 2, 3])
    method(student, teacher, batch).loss.backward()
    student(samples().x)  # captured features are not leaves, so copying them would fail
    twins = copy.deepcopy(student), pickle.loads(pickle.dumps(student))
    method.release()
    method.release()
    assert hooks_of(student, given, teacher) == 0
    student.eval()
    assert all(torch.equal(twin.eval()(samples().x), student(samples().x)) for twin in twins)
    if counts[0]:
        with pytest.raises(RuntimeError, match="needs prepare"):
            method(student, teacher, batch)


@pytest.mark.slow
@every_variant
def test_compiled_networks_give_the_same_step(name, options):
    found = []
    torch.compiler.reset()  # code compiled for another method's networks has no hooks
    for compiled in (False, True):
        it = prepared(name, options)
        student = torch.compile(it.student, backend="aot_eager") if compiled else it.student
        teacher = torch.compile(it.teacher, backend="aot_eager") if compiled and it.teacher is not None else it.teacher
        torch.manual_seed(0)
        outcome = it.method(student, teacher, it.samples.at(range(9)))
        outcome.loss.backward()
        found.append([outcome.loss, *outcome.terms.values(), *(p.grad for p in it.student.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# Methods whose terms may rise: peers first move apart, and a growing teacher changes its targets.
TERMS_MAY_RISE = ("ie-dml", "pwkd")


@pytest.mark.parametrize(
    ("name", "options"), [pytest.param(*each, marks=pytest.mark.slow if each[1] else ()) for each in EVERY]
)
def test_loss_and_terms_fall_in_training(name, options):
    it = prepared(name, options)
    optimizer, seen = torch.optim.Adam(trainable(it), 0.03), []
    for number in range(40):
        torch.manual_seed(number % 2)
        outcome = it.method(it.student, it.teacher, it.samples.at(range(SAMPLES)))
        optimizer.zero_grad()
        outcome.loss.backward()
        optimizer.step()
        seen.append([x.item() for x in (outcome.loss, *(outcome.terms.values() if name not in TERMS_MAY_RISE else ()))])
    assert all(last < 0.6 * first for first, last in zip(seen[0], seen[-1], strict=True)), (seen[0], seen[-1])


# --- options ----------------------------------------------------------------------------------------------------


@every_registered
def test_source_and_options_are_documented(name):
    method = type(methods.build(name))
    assert inspect.getdoc(method) and method.__doc__ is not methods.Method.__doc__
    if method.needs_teacher:  # the docstring must name the source
        source = f"{inspect.getmodule(method).__doc__} {method.__doc__}"
        assert re.search(r"arXiv:? ?\d{4}\.\d{4,5}|\w+ (et al\.|and \w+), ([A-Z]\w+,? )*\d{4}\)", source)
    for option in methods.options_of(name):
        assert option.text, option.name


@every_registered
def test_invalid_option_is_named(name):
    parameters = inspect.signature(type(methods.build(name))).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for option in named:
        number = isinstance(option.default, int | float) and not isinstance(option.default, bool)
        for bad in [object(), *([math.nan, "much"] if number else [])]:
            with pytest.raises((TypeError, ValueError), match=option.name) as caught:
                methods.build(name, {option.name: bad})
            message = str(caught.value)
            assert "\n" not in message and ("must be" in message or "no effect" in message), message
    nearly = f"{named[0].name}x" if named else "temperature"
    with pytest.raises(TypeError, match=f"has no option '{nearly}'"):
        methods.build(name, {nearly: 1})


# --- through distill --------------------------------------------------------------------------------------------------

CONDENSE = {"all samples": None, "condensed": Condense(keep=0.5, every=1, stages=2)}


def run(name, condense, output, size=30, progress=None, resume=False):
    torch.manual_seed(len(output.name))  # must have no effect
    options = OPTIONS.get(name, {})
    recipe = Recipe(name, options, condense, epochs=3, batch_size=8, lr=0.02, device="cpu", seed=5)
    student, teacher = network(1), network(2, width=10) if methods.build(name).needs_teacher else None
    before = state_of(teacher)
    data = images(size), images(12, seed=1)
    try:
        return distill(student, teacher, *data, recipe, output=output, progress=progress, resume=resume)
    finally:
        assert hooks_of(student, teacher) == 0
        assert_equal(state_of(teacher), before)


@pytest.mark.parametrize("condense", mostly_slow(CONDENSE, kept=["condensed"]))
@every_method
def test_resumed_run_ends_in_same_state(name, condense, tmp_path):
    """The run stops in pretraining, if there is any, or after an epoch."""
    method, condense = methods.build(name), CONDENSE[condense]
    summary = run(name, condense, tmp_path / "straight")
    for count in (1, 2):
        with pytest.raises(StopError):
            run(name, condense, tmp_path / "stopped", progress=stop_after(count), resume=count > 1)
    again = run(name, condense, tmp_path / "stopped", resume=True)
    assert_same(final(tmp_path / "stopped"), final(tmp_path / "straight"))

    assert again.flops == summary.flops
    assert summary.flops > 0 if method.flops_known else summary.flops is None
    history = summary.history
    assert all(math.isfinite(line["loss"]) for line in history) and history[-1]["epoch"] == 3
    assert all(line["terms"].keys() == history[0]["terms"].keys() for line in history)
    assert all(math.isfinite(term) for line in history for term in line["terms"].values())
    assert [line["samples"] for line in history] == ([30] * 3 if condense is None else [30, 23, 16])
    pretraining = tmp_path / "straight" / "pretraining.jsonl"
    first = files.read_lines(pretraining) if pretraining.exists() else []
    assert all(math.isfinite(line["loss"]) for line in first)
    if first:  # pretraining runs the teacher too
        assert summary.teacher_visits > summary.sample_visits
    else:
        assert summary.teacher_visits == (summary.sample_visits if method.needs_teacher else 0)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("name", mostly_slow(NAMES, kept=["crd"]))
def test_run_on_two_ranks_finishes(name, tmp_path):
    """With two ranks every parameter must contribute to the loss."""

    def train_on_rank(rank):
        torch.set_num_threads(1)
        run(name, CONDENSE["condensed"], tmp_path / "run", size=29)

    assert Crew(train_on_rank, 2).wait() == [0, 0]
    lines = files.read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 3 and all(math.isfinite(line["loss"]) for line in lines)
