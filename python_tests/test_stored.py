"""A changed data set has other digests of what it stores; loading items, moving files and other transforms do not change them."""

import copy
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import images
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from kcd_ext import IndexedDataset
from kcd_ext import data as data_module
from kcd_ext.training.stored import differing_part, digests_of_stored

COUNT = 9


class Items(Dataset):
    """A data set as users write them, with whatever it stores as attributes."""

    def __init__(self, **stored):
        self.__dict__ |= stored
        self.transform = lambda x: x
        self.names = {"a": 0}
        self.visits = 0
        self.decoded = [None] * COUNT

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        self.visits += 1
        self.decoded[index] = torch.ones(3)
        return self.decoded[index], 0


def digests(dataset):
    return digests_of_stored(IndexedDataset(dataset))


def table(pandas, labels):
    return pandas.DataFrame({"file": [f"{n}.png" for n in range(COUNT)], "label": labels})


def with_one_changed(value):
    changed = copy.deepcopy(value)
    if isinstance(changed, list) and isinstance(changed[3], tuple):
        changed[3] = (*changed[3][:-1], changed[3][-1] + 1)
    else:
        changed[3] += 1
    return changed


STORED = {
    "labels": list(range(COUNT)),
    "numpy_labels": [np.int64(n) for n in range(COUNT)],
    "samples": [(f"{n}.png", n) for n in range(COUNT)],
    "tensors": [(torch.full((2,), float(n)), n) for n in range(COUNT)],
    "array": np.arange(COUNT * 2.0).reshape(COUNT, 2),
    "strided": np.arange(COUNT * 2)[::2],
    "tensor": torch.arange(COUNT, dtype=torch.bfloat16),
    "objects": np.array([n for n in range(COUNT)], object),
}


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda items: items,
        lambda items: Subset(items, [8, 1, 2]),
        lambda items: ConcatDataset([Items(), items]),
        lambda items: Subset(ConcatDataset([items, items]), [0]),
    ],
    ids=["plain", "subset", "concatenated", "nested"],
)
def test_one_changed_entry_is_found(name, wrap):
    dataset = wrap(Items(**{name: STORED[name]}))
    before = digests(dataset)
    for _ in range(2):
        assert differing_part(before, digests(dataset)) is None
        for index in range(len(dataset)):  # fills in `decoded`
            dataset[index]
    assert digests(wrap(Items(**{name: copy.deepcopy(STORED[name])}))) == before
    other = digests(wrap(Items(**{name: with_one_changed(STORED[name])})))
    assert differing_part(before, other).endswith(f".{name}")


def test_lists_tensor_datasets_and_other_subsets_are_compared():
    x, y = torch.rand(COUNT, 3), torch.arange(COUNT)
    for one, other in (
        (TensorDataset(x, y), TensorDataset(x, y + 1)),
        (TensorDataset(x, y), TensorDataset(x.flip(0), y)),
        (Subset(TensorDataset(x, y), [0, 1]), Subset(TensorDataset(x, y), [0, 2])),
        ([*zip(x, y.tolist(), strict=True)], [*zip(x, y.flip(0).tolist(), strict=True)]),
        (images(COUNT), images(COUNT, seed=1)),
    ):
        assert differing_part(digests(one), digests(pickle.loads(pickle.dumps(one)))) is None
        assert differing_part(digests(one), digests(other)) is not None


def test_tables_of_pandas_are_compared():
    pandas = pytest.importorskip("pandas")
    labels = list(range(COUNT))
    before = digests(Items(table=table(pandas, labels)))
    assert digests(Items(table=table(pandas, labels))) == before and before
    assert differing_part(before, digests(Items(table=table(pandas, with_one_changed(labels))))) == "dataset.table"


def test_what_cannot_be_digested_is_left_out():
    sparse = torch.eye(COUNT).to_sparse()
    assert digests(Items(sparse=sparse, dates=[object()] * COUNT, scalar=np.array(3))) == {}
    cycle = Items()
    cycle.itself = cycle
    assert digests(cycle) == {}


def test_paths_stand_for_names_and_sizes_of_files(tmp_path):
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        for n in range(COUNT):
            (tmp_path / folder / f"{n}.bin").write_bytes(b"x" * n)
    paths = {folder: [(str(tmp_path / folder / f"{n}.bin"), n) for n in range(COUNT)] for folder in ("one", "other")}
    before = digests(Items(samples=paths["one"]))
    assert digests(Items(samples=paths["other"])) == before
    (tmp_path / "other" / "3.bin").write_bytes(b"longer")
    assert differing_part(before, digests(Items(samples=paths["other"]))) == "dataset.samples"


def test_files_of_images_on_disk_are_compared(tmp_path):
    for n in range(200):  # more than are decoded for the digest of the samples
        path = tmp_path / "one" / "ab"[n % 2] / f"{n:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), n, np.uint8)).save(path)

    def train(folder):
        return data_module.load(tmp_path / folder, test_fraction=0.1, memory=1).train

    before = digests_of_stored(train("one"))
    os.rename(tmp_path / "one", tmp_path / "moved")
    assert digests_of_stored(train("moved")) == before
    path = train("moved").files.name(101)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4), np.uint8)).save(path)
    assert differing_part(before, digests_of_stored(train("moved"))) == "files"
