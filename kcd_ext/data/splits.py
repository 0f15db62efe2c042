"""Fixed splits of a data set: which images train, validate and test."""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np

# For errors about data without test images.
ADVICE = "give test_fraction (--test-fraction) or val_fraction (--val-fraction) to split off training images"


def stratified_parts(labels: np.ndarray, fractions: Sequence[float], seed: int = 0) -> list[np.ndarray]:
    """Return ascending indices of the rest and of a part for every fraction.

    A part has int(fraction * count) images of every class, drawn at random with this seed. The parts are disjoint, and every
    class keeps at least one image in the rest. An earlier part does not depend on later fractions.

    Args:
        labels: `(n,)` integers.
        fractions: Numbers in (0, 1) whose sum is below 1.
        seed: Seed of the draw.
    """
    random = np.random.default_rng(seed)
    part_of = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        start = 0
        for part, fraction in enumerate(fractions, 1):
            stop = min(start + int(fraction * len(members)), len(members) - 1)
            part_of[members[start:stop]] = part
            start = stop
    return [np.flatnonzero(part_of == part) for part in range(len(fractions) + 1)]


def stratified_split(labels: np.ndarray, test_fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return ascending indices (train, test); int(test_fraction * count) of every class are test. The seed fixes it."""
    train, test = stratified_parts(labels, [test_fraction], seed)
    return train, test


def divide(
    source: object, labels: Mapping[str, np.ndarray], val_fraction: float | None, test_fraction: float | None
) -> dict[str, tuple[str, np.ndarray]]:
    """Return the images that train, validate and test.

    - Without test images, those held out by `test_fraction` test; without it the validation images do.
    - If both fractions are given, the test images are those that `test_fraction` alone would give.

    Args:
        source: The data set, for messages.
        labels: The labels of the parts that the data set has: `train`, and perhaps `val` and `test`.
        val_fraction: Share of the training images of every class that validate, in (0, 1). None: none of them.
        test_fraction: Share of the training images of every class that test, in (0, 1). None: none of them.

    Returns:
        train, test and perhaps val: the part of the data set, and ascending indices in it. If the same images validate and
        test, both have the same pair.

    Raises:
        ValueError: The data set has the part that a fraction would split off, has no images to test and no fraction is
            given, the fractions leave nothing to train, or a part would be empty.

    Warns:
        UserWarning: Images that `val_fraction` splits off test too.
    """
    found = dict(labels)
    if "test" not in found and "val" in found and test_fraction is None:
        found["test"] = found.pop("val")  # the only part that is not trained on
        parts = {"test": ("val", np.arange(len(found["test"])))}
    else:
        parts = {part: (part, np.arange(len(found[part]))) for part in ("val", "test") if part in found}
    fractions = {"test": test_fraction, "val": val_fraction}
    fractions = {part: fraction for part, fraction in fractions.items() if fraction is not None}
    for part, fraction in fractions.items():
        if part in parts:
            kind = {"val": "validation", "test": "test"}[part]
            raise ValueError(f"{part}_fraction={fraction} is for data without {kind} images, which {source} has")
    if sum(fractions.values()) >= 1:
        raise ValueError(
            f"val_fraction and test_fraction must add up to less than 1, got {val_fraction} and {test_fraction}"
        )
    if "test" not in parts and not fractions:
        raise ValueError(f"{source}: has no test images; {ADVICE}")
    rest, *held_out = stratified_parts(found["train"], list(fractions.values()))
    for (part, fraction), index in zip(fractions.items(), held_out, strict=True):
        if not len(index):
            raise ValueError(
                f"{source}: {part}_fraction={fraction} must leave at least one image: it takes "
                f"int({part}_fraction * n) of the n images of each class, and the largest class has "
                f"{np.bincount(found['train']).max()}"
            )
        parts[part] = "train", index
    if "test" not in parts:
        parts["test"] = parts["val"]
        warnings.warn(
            f"{source}: the images that val_fraction={val_fraction} splits off validate and test, so the test accuracy is that "
            "of the validation images; test_fraction (--test-fraction) splits off others to test",
            stacklevel=2,
        )
    return {"train": ("train", rest), **parts}
