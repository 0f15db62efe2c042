"""The fingerprint of a run: everything that decides its result, small enough for a checkpoint."""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from ..cache import TeacherCache
from ..data import IndexedDataset
from ..data.images import ImageSet
from ..describe import brief
from ..models.normalisation import renormalisation
from ..randomness import seeded
from .distributed import Accelerator, full_state_dict
from .recipe import Recipe

DIGESTED_SAMPLES = 5  # evenly spaced, the first and the last included
RESUMABLE_CHANGES = ("device", "name")  # fields of a recipe that a resumed run may change
STEP_SIZE_FIELDS = ("batch_size", "gradient_accumulation")  # may change together with the number of processes
OPTIONAL_ENTRIES = ("teacher_cache",)  # of a fingerprint


def fingerprint(
    recipe: Recipe,
    teacher: nn.Module | None,
    train: IndexedDataset | ImageSet,
    test: IndexedDataset | ImageSet,
    accelerator: Accelerator,
    cache: TeacherCache | None = None,
) -> dict[str, object]:
    """Return the fingerprint as JSON. It omits the student: a resumed run loads its weights from the checkpoint.

    With a teacher cache the entries on the teacher are those that the cache recorded.
    """
    cached = {}
    if cache is not None:
        cached = {name: cache.about.get(name) for name in ("teacher", "teacher_input")} | {
            "teacher_cache": cache.digest
        }
    return {
        "recipe": recipe.as_json(),
        "train": len(train),
        "test": len(test),
        "train_samples": digest_of_samples(train),
        "test_samples": digest_of_samples(test),
        "teacher": None if teacher is None else digest(full_state_dict(teacher.state_dict())),
        "teacher_input": None if teacher is None else renormalisation(teacher),  # its weights do not show this
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        **cached,
    }


def check_same_run(saved: Mapping, mine: Mapping, path: object) -> None:
    """Raise ValueError, naming the first difference, unless the run in `path` may resume as this one."""
    free = RESUMABLE_CHANGES if saved.get("processes") == mine["processes"] else RESUMABLE_CHANGES + STEP_SIZE_FIELDS
    recipe = saved["recipe"] if isinstance(saved.get("recipe"), Mapping) else {}
    keys = dict.fromkeys([*mine, *OPTIONAL_ENTRIES])
    pairs = [(key, saved.get(key), mine.get(key)) for key in keys if key not in ("recipe", "processes")]
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
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def digest_of_samples(dataset: IndexedDataset | ImageSet) -> str:
    """Return the `digest` of a few samples and their labels. It does not depend on the state of random generators.

    For images in memory it covers all images and labels, and the settings of their views.
    """
    if isinstance(dataset, ImageSet):
        images, labels = dataset.tensors(torch.device("cpu"))
        return digest({f"images {dataset.views}": images, "labels": labels})
    chosen = np.unique(np.linspace(0, len(dataset) - 1, DIGESTED_SAMPLES).astype(int)).tolist()
    with seeded(0):
        samples = {index: default_collate([dataset[index]]) for index in chosen}
    return digest(
        {f"{index} {part}": samples[index][position] for index in chosen for position, part in enumerate("xy")}
    )
