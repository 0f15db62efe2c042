"""The fingerprint of a run: all that decides its result, small enough to be kept in a checkpoint."""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from ..data import IndexedDataset
from ..data.images import ImageSet
from ..describe import brief
from ..models.normalisation import renormalisation
from ..randomness import seeded
from .distributed import Accelerator, full_state_dict
from .recipe import Recipe

PROBED = 5  # samples of a data set that are looked at, the first and the last among them
RESUMABLE_CHANGES = ("device", "name")  # of a recipe, which a resumed run may have otherwise
STEP_SIZE = ("batch_size", "gradient_accumulation")  # may change together with the number of processes


def fingerprint(
    recipe: Recipe,
    teacher: nn.Module | None,
    train: IndexedDataset | ImageSet,
    test: IndexedDataset | ImageSet,
    accelerator: Accelerator,
) -> dict[str, object]:
    """Return the fingerprint as JSON. The student is not in it: a resumed run takes its weights from the checkpoint."""
    return {
        "recipe": recipe.as_json(),
        "train": len(train),
        "test": len(test),
        "train_samples": digest_of_samples(train),
        "test_samples": digest_of_samples(test),
        "teacher": None if teacher is None else digest(full_state_dict(teacher.state_dict())),
        "teacher_input": None if teacher is None else renormalisation(teacher),  # the same weights can be given others
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
    }


def check_same(saved: Mapping, mine: Mapping, path: object) -> None:
    """Raise ValueError, naming the first difference, unless the run in `path` may go on as this one."""
    free = RESUMABLE_CHANGES if saved.get("processes") == mine["processes"] else RESUMABLE_CHANGES + STEP_SIZE
    recipe = saved["recipe"] if isinstance(saved.get("recipe"), Mapping) else {}
    pairs = [(key, saved.get(key), value) for key, value in mine.items() if key not in ("recipe", "processes")]
    pairs += [(key, recipe.get(key), value) for key, value in mine["recipe"].items() if key not in free]
    for key, old, new in pairs:
        if old != new:
            key, old, new = _first_difference(key, old, new)
            raise ValueError(
                f"{path} was run with {key}={brief(old)}, got {key}={brief(new)}: a run resumes only as it began"
            )


def _first_difference(key: str, old: object, new: object) -> tuple[str, object, object]:
    """Return where two unequal JSON values differ first, as condense.keep or milestones[1], and both values there."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        parts = [(f"{key}.{name}", old.get(name), new.get(name)) for name in {**old, **new}]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        parts = [(f"{key}[{index}]", *pair) for index, pair in enumerate(zip(old, new, strict=True))]
    else:
        return key, old, new
    # An entry that is None in one and missing in the other makes a difference, too.
    return next((_first_difference(*part) for part in parts if part[1] != part[2]), (key, old, new))


def digest(tensors: Mapping[str, object]) -> str:
    """Return 16 hexadecimal digits of the names, dtypes, shapes and bytes of the tensors among these."""
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def digest_of_samples(dataset: IndexedDataset | ImageSet) -> str:
    """Return the `digest` of a few samples and their labels, whatever the state of the generators that transforms draw from.

    Of images in memory it is that of all of them, and names their views.
    """
    if isinstance(dataset, ImageSet):
        images, labels = dataset.tensors(torch.device("cpu"))
        return digest({f"images {dataset.views}": images, "labels": labels})
    chosen = np.unique(np.linspace(0, len(dataset) - 1, PROBED).astype(int)).tolist()
    with seeded(0):
        samples = {index: default_collate([dataset[index]]) for index in chosen}
    return digest({f"{index} {part}": samples[index][place] for index in chosen for place, part in enumerate("xy")})
