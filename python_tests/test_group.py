"""`group=`: selection and means over all ranks equal one process on the concatenated batch, with DistributedDataParallel."""

import datetime
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from backends import copy_to_device, parameters
from processes import Crew
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kcd_ext import condensed_kd_loss, reference

RANKS, ROWS, CLASSES = 2, 12, 7
# Device, backend of torch.distributed, number of ranks. NCCL does not let two ranks share a GPU; gloo does.
WORLDS = {"cpu": ("cpu", "gloo", 2), "cuda": ("cuda", "gloo", 2), "cuda_nccl": ("cuda", "nccl", 1)}
NAMES = ("value", "entropy", "kl", "selected")

SOFT_LABELS = torch.linspace(-50, 50, RANKS * ROWS * CLASSES).sin().view(RANKS * ROWS, CLASSES).softmax(-1)
CASES = {
    "defaults": {"keep": 0.5},
    "all": {},
    "more rows than one rank has": {"keep": ROWS + 3},
    "labels": {"keep": 0.4, "labels": True},
    "smoothed labels": {"keep": 0.4, "labels": True, "label_smoothing": 0.1},
    "soft labels": {"keep": 0.4, "labels": SOFT_LABELS, "label_smoothing": 0.1, "value": "cross_entropy"},
    "sum": {"keep": 5, "labels": True, "reduction": "sum"},
    "none": {"keep": 0.3, "reduction": "none"},
    "tied scores": {"keep": 7, "value": torch.tensor([1.0, 2.0] * ROWS)},
    "weights": {"keep": 0.6, "row_weight": torch.linspace(0, 1, RANKS * ROWS)},
    "kl as value": {"keep": 0.5, "value": "kl"},
    "inplace": {"keep": 0.5, "inplace": True},
    "nan on one rank": {"keep": 3, "nan": True, "reduction": "none"},
    "partial teacher": {"keep": 0.4, "rows": True, "labels": True},
    "all rows of one rank ignored": {"keep": 0.5, "labels": torch.tensor([-100] * ROWS + [1] * ROWS)},
}


def data():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(RANKS * ROWS, 4, generator=generator)
    x[:ROWS] *= 4  # the rows of rank 0 have lower values
    teacher = torch.randn(RANKS * ROWS, CLASSES, generator=generator)
    model = nn.Linear(4, CLASSES)
    with torch.no_grad():
        model.weight.copy_(torch.randn(CLASSES, 4, generator=generator))
        model.bias.zero_()
    return model, x, teacher, torch.arange(RANKS * ROWS) % CLASSES


def inputs_of(case: dict, ranks: range, device: str):
    """Return the model, x and teacher of these ranks, and the options, on the device."""
    model, x, teacher, labels = data()
    options = dict(case)
    own_rows = slice(ranks.start * ROWS, ranks.stop * ROWS)
    if options.pop("nan", False):
        teacher[ROWS + 2, 0] = float("nan")
    if options.get("labels") is True:
        options["labels"] = labels
    options = {
        name: option[own_rows] if isinstance(option, torch.Tensor) else option for name, option in options.items()
    }
    x, teacher = x[own_rows], teacher[own_rows]
    if options.get("rows"):
        options["rows"] = torch.tensor([rank * ROWS + i for rank in range(len(ranks)) for i in (5, 0, 9, 2)])
        teacher = teacher[options["rows"]]
    options = {name: copy_to_device(option, device) for name, option in options.items()}
    return model.to(device), x.to(device), teacher.to(device), options


def step(function, model, x, teacher, **options):
    model.zero_grad()
    loss, knowledge = function(model(x), teacher, return_knowledge=True, **options)
    loss.sum().backward()
    return loss.detach(), knowledge, next(model.parameters()).grad.clone()


def worker(rank: int, folder: str, world: str) -> None:
    device, backend, ranks = WORLDS[world]
    torch.set_num_threads(1)
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    wrapped = DistributedDataParallel(data()[0].to(device))
    out = {}
    for name, case in CASES.items():
        _, x, teacher, options = inputs_of(case, range(rank, rank + 1), device)
        options["group"] = dist.group.WORLD
        loss, knowledge, grad = step(condensed_kd_loss, wrapped, x, teacher, **options)
        options.pop("inplace", None)
        other_loss, other, other_grad = step(reference.condensed_kd_loss, wrapped, x, teacher, **options)
        assert torch.allclose(loss, other_loss, rtol=1e-5, equal_nan=True), name
        assert torch.equal(knowledge.selected, other.selected), name
        assert torch.allclose(grad, other_grad, atol=1e-6, equal_nan=True), name
        rows = {n: getattr(knowledge, n).cpu() for n in NAMES}
        out[name] = (loss.cpu(), rows, knowledge.n_selected.cpu(), grad.cpu())
    torch.save(out, f"{folder}/{rank}.pt")
    dist.barrier()
    # Exit without stopping gloo's threads, which occasionally calls std::terminate. The results are saved.
    os._exit(0)


@pytest.fixture(scope="module", params=parameters(*WORLDS))
def world(request):
    return request.param


@pytest.fixture(scope="module")
def results(tmp_path_factory, world):
    folder, ranks = tmp_path_factory.mktemp("group"), WORLDS[world][2]
    if WORLDS[world][0] == "cpu":
        assert Crew(lambda rank: worker(rank, str(folder), world), ranks).wait() == [0] * ranks
    else:  # no process may be forked that has used CUDA
        mp.spawn(worker, (str(folder), world), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_process_on_all_rows(results, world, name):
    device, _, n_ranks = WORLDS[world]
    model, x, teacher, options = inputs_of(CASES[name], range(n_ranks), device)
    loss, knowledge, grad = step(condensed_kd_loss, model, x, teacher, **options)
    loss, grad = loss.cpu(), grad.cpu()
    ranks = [result[name] for result in results]
    for n in NAMES:
        assert torch.allclose(
            torch.cat([r[1][n] for r in ranks]).double(), getattr(knowledge, n).double().cpu(), equal_nan=True
        ), n
    assert sum(r[2] for r in ranks) == knowledge.n_selected
    reduction = options.get("reduction", "mean")
    if reduction == "none":
        assert torch.allclose(torch.cat([r[0] for r in ranks]), loss, equal_nan=True)
    else:
        assert torch.allclose(sum(r[0] for r in ranks) / (n_ranks if reduction == "mean" else 1), loss)
    # DistributedDataParallel averages: for a mean this is the gradient of one process, for a sum 1 / n_ranks of it
    expected = grad if reduction == "mean" else grad / n_ranks
    for r in ranks:
        assert torch.allclose(r[3], expected, atol=1e-6, equal_nan=True)


COMPILED = """
import os, tempfile
import torch
import torch.distributed as dist
from kcd_ext import condensed_kd_loss

with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    z, y = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)

    def step(z, y):
        return condensed_kd_loss(z * 1, y, keep=0.5, group=dist.group.WORLD, return_knowledge=True)

    results = []
    for function in (step, torch.compile(step, backend="aot_eager")):
        loss, knowledge = function(z, y)
        results.append((loss, *knowledge, torch.autograd.grad(loss, z)[0]))
    assert all(map(torch.equal, *results))
print("equal", flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_compiled_loss_over_a_group_equals_eager():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr
