"""Several ranks, sharded students, gradient accumulation and low precision, compared with one plain process."""

import warnings
from functools import partial

import pytest
import torch
from processes import Crew
from small_runs import StopError, images, network, shaken, stop_after
from test_resume import recipe
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from kcd_ext import IndexedDataset, files
from kcd_ext.methods import Method, Outcome
from kcd_ext.training import Condense, Recipe, checkpoint, distill

SIZE = 71  # odd, so that two ranks need padding


def plain_network(seed):
    """Return a network without batch statistics and dropout: its step is the mean over samples, however they are batched."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 4))


class Recorder(Method):
    """A method that derives the value of a sample from its index and records every index and a random number."""

    seen: list = []  # noqa: RUF012 - per process
    drawn: list = []  # noqa: RUF012

    def prepare(self, student, teacher, samples):
        self.teacher = teacher  # a submodule now, but still not trained

    def begin(self, epoch, epochs):
        if epoch == 0:  # discard the trial step
            Recorder.seen.clear(), Recorder.drawn.clear()

    def forward(self, student, teacher, batch):
        logits = student(batch.x)
        teacher(batch.x)
        Recorder.seen.append(batch.index.tolist())
        Recorder.drawn.append(torch.rand(()).item())
        value = ((batch.index * 7919 + 13) % 101).double() / 101
        return Outcome(functional.cross_entropy(logits, batch.label), logits.detach(), value)


def record(folder, loaded, least, rank):
    torch.set_num_threads(1)
    marks = []
    train = IndexedDataset(images(SIZE), shaken) if loaded else images(SIZE)
    summary = distill(
        plain_network(0),
        plain_network(1),
        train,
        IndexedDataset(images(20, seed=1), shaken) if loaded else images(20, seed=1),
        Recipe(
            f"{__name__}:Recorder",
            condense=Condense(keep=0.4, every=2, stages=3, min_per_class=least),
            epochs=8,
            batch_size=8,
            device="cpu",
        ),
        output=folder / "run",
        progress=lambda line: marks.append(len(Recorder.seen)),
    )
    # All ranks have equally many batches, but only rank 0 gets progress calls.
    state = {
        "seen": Recorder.seen,
        "drawn": Recorder.drawn,
        "kept": summary.condenser.kept,
        "counts": summary.condenser.counts,
    }
    torch.save({**state, "marks": marks, "lines": list(summary.history)}, folder / f"rank{rank}.pt")


@pytest.mark.slow
def test_two_ranks_visit_kept_set_once_and_keep_same_samples(tmp_path):
    found = {}
    # Images in memory; items whose labels the first epoch collects; items that are all loaded once before it.
    for name, processes, loaded, least in (("one", 1, False, 0), ("two", 2, True, 0), ("minimum", 2, True, 2)):
        folder = tmp_path / name
        folder.mkdir()
        assert Crew(partial(record, folder, loaded, least), processes).wait() == [0] * processes
        found[name] = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]
    (one,), (first, second) = found["one"], found["two"]
    labels = torch.arange(SIZE) % 4
    for ranks in found.values():
        steps = [line["condensation"] for line in ranks[0]["lines"] if line["condensation"]]
        assert steps[-1]["classes"] == labels[one["kept"]].bincount(minlength=4).tolist()
        assert [sum(step["classes"]) for step in steps] == [step["kept"] for step in steps]
    for name in ("kept", "counts"):
        assert torch.equal(one[name], first[name]) and torch.equal(first[name], second[name])

    for ranks in found.values():
        marks = [0, *ranks[0]["marks"]]
        for epoch, line in enumerate(ranks[0]["lines"]):
            part = slice(marks[epoch], marks[epoch + 1])
            indices = [i for rank in ranks for batch in rank["seen"][part] for i in batch]
            samples = [i for i in indices if i >= 0]
            assert len(set(samples)) == len(samples) == line["samples"]
            assert len(indices) - len(samples) == line["padding"]
            assert line["padding"] == line["samples"] % len(ranks)
        before = {"sample_visits": 0, "teacher_visits": 0, "flops": 0}
        for line in ranks[0]["lines"]:  # padding costs as much as a sample, but is not a visit
            spent, rows = {name: line[name] - before[name] for name in before}, line["samples"] + line["padding"]
            assert spent == {
                "sample_visits": line["samples"],
                "teacher_visits": rows,
                "flops": rows * 4 * 2 * (36 + 4) * 16,
            }
            before = {name: line[name] for name in before}
        drawn = [number for rank in ranks for number in rank["drawn"]]
        assert len(set(drawn)) == len(drawn)  # random numbers differ between ranks and steps
    sizes = [line["samples"] for line in one["lines"]]
    assert sizes == [line["samples"] for line in first["lines"]] and sizes[0] == SIZE > sizes[-1]
    # The set of samples of an epoch is the same for every world size.
    for epoch in range(8):
        sets = []
        for ranks in found.values():
            marks = [0, *ranks[0]["marks"]]
            batches = [b for rank in ranks for b in rank["seen"][marks[epoch] : marks[epoch + 1]]]
            sets.append({i for batch in batches for i in batch if i >= 0})
        assert sets[0] == sets[1] == sets[2]


def trained(output, student=plain_network, resume=False, progress=None, **changes):
    torch.set_num_threads(1)
    settings = {"epochs": 4, "condense": {"every": 2}} | changes
    network_ = student(0)
    summary = distill(
        network_,
        plain_network(1),
        images(64),
        images(20, seed=1),
        recipe("kd", **settings),
        output=output,
        resume=resume,
        progress=progress,
    )
    return network_, summary


def weights(output):
    return checkpoint.load(output / "checkpoint").model


def assert_close(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=2e-4, atol=2e-5)


@pytest.mark.slow
def test_step_is_mean_of_samples_for_any_accumulation_and_world_size(tmp_path):
    """Compares batches of 16 with 2 x 8 and 4 x 4 accumulated, on one and on two ranks."""
    condense = Condense(keep=0.75, every=2, schedule="immediate")
    runs = {}
    for batch_size, accumulation, processes in ((16, 1, 1), (8, 2, 1), (4, 4, 1), (8, 1, 2), (4, 2, 2)):
        output = tmp_path / f"{batch_size}-{accumulation}-{processes}"

        def job(rank, output=output, batch_size=batch_size, accumulation=accumulation):
            torch.set_num_threads(1)
            options = {"batch_size": batch_size, "gradient_accumulation": accumulation, "condense": condense}
            settings = Recipe(epochs=4, lr=0.02, device="cpu", seed=5, **options)
            distill(plain_network(0), plain_network(1), images(64), images(20, seed=1), settings, output=output)

        assert Crew(job, processes).wait() == [0] * processes
        runs[output] = weights(output)
        samples = [line["samples"] for line in files.read_lines(output / "metrics.jsonl")]
        assert samples == [64, 64, 48, 48]
    first, *others = runs.values()
    for other in others:
        assert_close(first, other)


class Unused(nn.Sequential):
    """A network with a layer that its forward pass does not use."""

    def __init__(self):
        super().__init__(*plain_network(0))
        self.spare = nn.Linear(3, 3)

    def forward(self, x):
        return self[3](self[2](self[1](self[0](x))))


def test_unused_weights_and_separate_folders_are_refused_on_every_rank(tmp_path):
    """A weight without a gradient, and a folder that differs between ranks, raise one line on every rank."""

    def refused(error, student, output, rank):
        torch.set_num_threads(1)
        settings, data = recipe("kd", epochs=4, condense={"every": 2}), (images(64), images(20, seed=1))
        with pytest.raises(ValueError, match=error):
            distill(student, plain_network(1), *data, settings, output=output(rank), resume=True)

    unused_weight = partial(refused, r"^student\.spare\.weight has no part in the loss", Unused(), lambda rank: None)
    assert Crew(unused_weight, 2).wait() == [0, 0]
    trained(tmp_path / "0", epochs=4)  # visible to rank 0 only
    separate_folders = partial(
        refused, r"found runs of \[4, 0\] epochs there", plain_network(0), lambda rank: tmp_path / str(rank)
    )
    assert Crew(separate_folders, 2).wait() == [0, 0]


@pytest.mark.slow
def test_sharded_student_trains_saves_and_resumes_like_unsharded_one(tmp_path):
    def job(output, sharded, epochs, rank, method="kd"):
        torch.set_num_threads(1)
        from accelerate import PartialState
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        PartialState(cpu=True)
        student = plain_network(0)
        if sharded:
            mesh = init_device_mesh("cpu", (2,))
            fully_shard(student[1], mesh=mesh)  # the last layer stays in the root, which is not always sharded
            fully_shard(student, mesh=mesh)

        def stop(line):
            assert line["epoch"] < epochs

        settings, data = recipe(method, epochs=4, condense={"every": 2}), (images(64), images(20, seed=1))
        distill(student, plain_network(1), *data, settings, output=output, resume=True, progress=stop)

    unsharded, sharded, interrupted = (tmp_path / name for name in ("unsharded", "sharded", "interrupted"))
    assert Crew(partial(job, unsharded, False, 9), 2).wait() == [0, 0]
    assert Crew(partial(job, sharded, True, 9), 2).wait() == [0, 0]
    assert_close(weights(unsharded), weights(sharded))
    assert (unsharded / "student.safetensors").stat().st_size == (sharded / "student.safetensors").stat().st_size

    compared = [tmp_path / name for name in ("compared", "compared-sharded")]  # pkt inspects features before training
    for output, cut in zip(compared, (False, True), strict=True):
        assert Crew(partial(job, output, cut, 9, method="pkt"), 2).wait() == [0, 0]
    assert_close(*map(weights, compared))

    assert Crew(partial(job, interrupted, True, 2), 2).wait()[0] == 1
    assert checkpoint.load(interrupted / "checkpoint").epoch == 2
    assert Crew(partial(job, interrupted, True, 9), 2).wait() == [0, 0]
    assert (interrupted / "student.safetensors").read_bytes() == (sharded / "student.safetensors").read_bytes()


def test_bfloat16_precision_keeps_float32_weights(tmp_path):
    reference, _ = trained(tmp_path / "float32")
    student, summary = trained(tmp_path / "bfloat16", precision="bfloat16")
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters())
    gaps = [(a - b).abs().max().item() for a, b in zip(reference.parameters(), student.parameters(), strict=True)]
    assert 0 < max(gaps) < 0.05 and summary.history[-1]["loss"] < summary.history[0]["loss"]


@pytest.mark.slow
def test_compiled_student_equals_eager_student_and_resumes(tmp_path):
    """Visits, FLOPs and the names of weights are equal, too. The order of compilation does not affect results."""
    _, plain = trained(tmp_path / "eager", student=network)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    _, summary = trained(tmp_path / "compiled", student=network, compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3  # training, validation, teacher
    assert weights(tmp_path / "eager").keys() == weights(tmp_path / "compiled").keys()
    assert summary.teacher_visits == plain.teacher_visits and summary.flops == plain.flops
    assert [line["samples"] for line in summary.history] == [line["samples"] for line in plain.history]

    with pytest.raises(StopError):
        trained(tmp_path / "interrupted", student=network, compile=True, progress=stop_after(2))
    torch._dynamo.reset()
    trained(tmp_path / "interrupted", student=network, compile=True, resume=True)
    names = ("interrupted", "compiled")
    assert len({(tmp_path / name / "student.safetensors").read_bytes() for name in names}) == 1


@pytest.mark.parametrize("precision", ["float8", 16])
def test_unknown_precision_is_refused(precision):
    with pytest.raises((ValueError, TypeError), match="precision must be auto, float32, bfloat16, float16"):
        recipe("kd", precision=precision)


class Waits(TorchDispatchMode):
    """A dispatch mode that counts operators whose result, or its shape, the host must wait for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waiting = (
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::masked_select",
            "aten::equal",
            "aten::is_nonzero",
            "aten::_unique2",
            "aten::unique_dim",
            "aten::unique_consecutive",
            "aten::repeat_interleave",
        )
        # Indexing by a mask needs the number of selected elements.
        masks = func._schema.name in ("aten::index", "aten::index_put", "aten::index_put_")
        masks = masks and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        self.count += masks or func._schema.name in waiting
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "condense",
    [
        {},
        {"selection": "infobatch"},
        {"batch_keep": 0.5},
        {"value": "kl"},
        {"value": "loss", "selection": "importance"},
        {"selection": "uniform"},
    ],
)
def test_steps_never_wait_for_the_device(condense):
    """Eight steps per epoch wait as often as two."""
    torch.set_num_threads(1)
    counts = []
    for batch_size in (32, 8):
        settings = Recipe(epochs=3, batch_size=batch_size, device="cpu", condense=Condense(keep=0.5, **condense))
        with Waits() as waits:
            distill(network(0), plain_network(1), images(64), images(20, seed=1), settings)
        counts.append(waits.count)
    assert counts[0] == counts[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_never_synchronise_on_a_gpu():
    counts = []
    for batch_size in (32, 8):
        settings = Recipe(epochs=3, batch_size=batch_size, device="cuda", condense=Condense(keep=0.5))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                distill(network(0), plain_network(1), images(64), images(20, seed=1), settings)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in caught))
    assert counts[0] == counts[1]
