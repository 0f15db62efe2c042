"""The fingerprint of a run: everything that decides its result, small enough for a checkpoint."""

import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from ..cache import TeacherCache
from ..data import IndexedDataset
from ..data.images import ImageSet, LabelledImages
from ..describe import brief
from ..models.normalisation import renormalisation
from ..randomness import seeded
from .distributed import Accelerator, full_state_dict
from .recipe import Recipe

DIGESTED_SAMPLES = 5  # evenly spaced, the first and the last included
DIGESTED_FILES = 64  # likewise, of images on disk
PARTIAL = "64 images: "  # before the digest of so many images
SAMPLES = ("train_samples", "val_samples", "test_samples")  # entries of a fingerprint that are such digests
RESUMABLE_CHANGES = ("device", "name")  # fields of a recipe that a resumed run may change
STEP_SIZE_FIELDS = ("batch_size", "gradient_accumulation")  # may change together with the number of processes
OPTIONAL_ENTRIES = ("val", "teacher_cache")  # of a fingerprint


def fingerprint(
    recipe: Recipe,
    teacher: nn.Module | None,
    train: IndexedDataset | LabelledImages,
    test: IndexedDataset | LabelledImages,
    accelerator: Accelerator,
    val: IndexedDataset | LabelledImages | None = None,
    recorded: Mapping[str, str] = MappingProxyType({}),
    cache: TeacherCache | None = None,
) -> dict[str, object]:
    """Return the fingerprint as JSON. It omits the student: a resumed run loads its weights from the checkpoint.

    `recorded` are the digests in SAMPLES of the run to resume. This fingerprint's have the same form. With a teacher cache the
    entries on the teacher are those that the cache recorded.
    """
    validation, cached = {}, {}
    if val is not None:
        validation = {"val": len(val), "val_samples": digest_of_samples(val, recorded.get("val_samples"))}
    if cache is not None:
        cached = {name: cache.about.get(name) for name in ("teacher", "teacher_input")}
        cached["teacher_cache"] = cache.digest
    return {
        "recipe": recipe.as_json(),
        "train": len(train),
        "test": len(test),
        "train_samples": digest_of_samples(train, recorded.get("train_samples")),
        "test_samples": digest_of_samples(test, recorded.get("test_samples")),
        **validation,
        "teacher": None if teacher is None else digest(full_state_dict(teacher.state_dict())),
        "teacher_input": None if teacher is None else renormalisation(teacher),  # its weights do not show this
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        **cached,
    }


def check_same_run(saved: Mapping, mine: Mapping, path: object) -> None:
    """Raise ValueError, naming the first difference, unless the run in `path` may resume as this one."""
    free = RESUMABLE_CHANGES if saved.get("processes") == mine["processes"] else RESUMABLE_CHANGES + STEP_SIZE_FIELDS
    # A version that lacked a field of the recipe, or an option of its condensation, trained as the default does.
    defaults, recipe = Recipe().as_json(), saved["recipe"] if isinstance(saved.get("recipe"), Mapping) else {}
    recipe = {**defaults, **recipe}
    if isinstance(recipe["condense"], Mapping):
        recipe["condense"] = {**defaults["condense"], **recipe["condense"]}
    names = [name for name in dict.fromkeys([*mine, *OPTIONAL_ENTRIES]) if name not in ("recipe", "processes")]
    pairs = [(name, saved.get(name), mine.get(name)) for name in names]
    pairs += [(key, recipe.get(key), value) for key, value in mine["recipe"].items() if key not in free]
    for key, old, new in pairs:
        if old != new:
            key, old, new = _first_difference(key, old, new)
            raise ValueError(
                f"{path} was run with {key}={brief(old)}, got {key}={brief(new)}: a resumed run must not change it"
            )


def _first_difference(key: str, old: object, new: object) -> tuple[str, object, object]:
    """Return the path at which two unequal JSON values first differ (`condense.keep`, `milestones[1]`), and both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        parts = [(f"{key}.{name}", old.get(name), new.get(name)) for name in {**old, **new}]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        parts = [(f"{key}[{index}]", *pair) for index, pair in enumerate(zip(old, new, strict=True))]
    else:
        return key, old, new
    # If the only difference is an entry that is None in one and missing in the other, report the whole value.
    return next((_first_difference(*part) for part in parts if part[1] != part[2]), (key, old, new))


def digest(tensors: Mapping[str, object]) -> str:
    """Return a digest of the names, dtypes, shapes and bytes of all tensors in a mapping: 16 hexadecimal digits."""
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            sha.update(_heading(name, tensor.dtype, tensor.shape))
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def _heading(name: str, dtype: torch.dtype, shape: Sequence[int]) -> bytes:
    return f"{name} {dtype} {tuple(shape)}".encode()


def digest_of_samples(dataset: IndexedDataset | LabelledImages, like: str | None = None, seed: int = 0) -> str:
    """Return the `digest` of samples and their labels. It does not depend on the state of random generators.

    For images in memory it covers all images and labels, and the settings of their views. For images on disk it covers all
    labels, the settings, and DIGESTED_FILES images, because decoding all would take long; PARTIAL is then in front. For any
    other data set it covers a few samples.

    Args:
        dataset: The data set.
        like: An earlier digest. The digest of images has its form, wherever they are now. All images on disk are decoded if
            they were in memory then.
        seed: The seed of random generators while items are loaded one by one.
    """
    if isinstance(dataset, LabelledImages):
        in_memory = isinstance(dataset, ImageSet)
        if in_memory if like is None else not like.startswith(PARTIAL):
            return _digest_of_all(dataset)
        chosen = np.unique(np.linspace(0, len(dataset) - 1, DIGESTED_FILES).astype(int)).tolist()
        images = torch.from_numpy(np.stack([dataset[index][0] for index in chosen]))
        own = {f"images {dataset.views}": images, "labels": torch.from_numpy(dataset.labels)}
        return PARTIAL + digest(own)
    chosen = np.unique(np.linspace(0, len(dataset) - 1, DIGESTED_SAMPLES).astype(int)).tolist()
    with seeded(seed):
        samples = {index: default_collate([dataset[index]]) for index in chosen}
    return digest(
        {f"{index} {part}": samples[index][position] for index in chosen for position, part in enumerate("xy")}
    )


def _digest_of_all(dataset: LabelledImages) -> str:
    """Return the `digest` of all images and labels. Images on disk are decoded."""
    sha = hashlib.sha256(_heading(f"images {dataset.views}", torch.uint8, (len(dataset), *dataset.shape)))
    for block in dataset.blocks():
        sha.update(block)
    sha.update(_heading("labels", torch.int64, dataset.labels.shape))
    sha.update(dataset.labels)
    return sha.hexdigest()[:16]
