"""Data sets of images that fit in memory, by name."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..condensation.checks import whole
from ..registry import call

REGISTRY = {
    "digits": "kcd_ext.data.digits:load",
    "mnist5k": "kcd_ext.data.mnist5k:load",
}


class ArrayDataset(Dataset):
    """Images and labels held as arrays; item i is `(image, label)`, raw, for `IndexedDataset` to mix and transform.

    Args:
        images: (n, h, w, c) uint8.
        labels: (n,) integers, 0 up to the number of classes - 1.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"images must be uint8 (n, h, w, c), got {images.dtype} {images.shape}")
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"labels must be {len(images)} integers, got {labels.dtype} {labels.shape}")
        self.images = images
        self.labels = labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])


@dataclass(frozen=True)
class ToTensor:
    """A uint8 image (h, w, c) -> a float32 tensor (c, h, w), scaled to [0, 1] and then to (x - mean) / std.

    One number for all channels: the images here are grey.
    """

    mean: float
    std: float

    @classmethod
    def of(cls, images: np.ndarray) -> "ToTensor":
        """With the mean and the standard deviation of these images, the training set; of images all alike, std is 1."""
        return cls(float(images.mean() / 255), float(images.std() / 255) or 1.0)

    def __call__(self, image: np.ndarray) -> Tensor:
        scaled = (image.transpose(2, 0, 1).astype(np.float32) / 255 - self.mean) / self.std
        return torch.from_numpy(scaled.astype(np.float32, copy=False))


@dataclass(frozen=True)
class ImageData:
    """A data set ready for `distill`: raw training and test images, and the transform that both take.

    Raises:
        TypeError, ValueError: a part is of another kind or empty, or a label lies outside [0, num_classes).
    """

    name: str
    train: ArrayDataset
    test: ArrayDataset
    transform: Callable[[np.ndarray], Tensor]
    num_classes: int

    def __post_init__(self) -> None:
        whole(f"data set {self.name!r}: num_classes", self.num_classes, 1)
        if not callable(self.transform):
            raise TypeError(f"data set {self.name!r}: transform must be callable, got {type(self.transform).__name__}")
        for part in ("train", "test"):
            held = getattr(self, part)
            if not isinstance(held, ArrayDataset):
                raise TypeError(f"data set {self.name!r}: {part} must be an ArrayDataset, got {type(held).__name__}")
            if not len(held):
                raise ValueError(f"data set {self.name!r}: {part} must hold at least one image, got none")
            low, high = held.labels.min(), held.labels.max()
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"data set {self.name!r}: labels of {part} must lie in [0, {self.num_classes}), got {low} to {high}"
                )

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return self.train.images.shape[-1]


def stratified_split(labels: np.ndarray, test_fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, test), ascending; int(test_fraction * count) of every class are test. Same seed, same split."""
    random = np.random.default_rng(seed)
    is_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        is_test[members[: int(test_fraction * len(members))]] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def split(name: str, images: np.ndarray, labels: np.ndarray, test_fraction: float) -> ImageData:
    """`ImageData` with a fixed stratified test set; the transform is fitted to the training images."""
    train, test = stratified_split(labels, test_fraction)
    return ImageData(
        name=name,
        train=ArrayDataset(images[train], labels[train]),
        test=ArrayDataset(images[test], labels[test]),
        transform=ToTensor.of(images[train]),
        num_classes=int(labels.max()) + 1,
    )


def load(name: str) -> ImageData:
    """The data set called `name`: a key of REGISTRY, or `module:function`, a function that gives an `ImageData`.

    Raises:
        ValueError: the name is unknown, or the function fails.
        ImportError: the package that holds the images is not installed; says which extra installs it.
        TypeError: the function gives something else.
    """
    data = call("data set", name, REGISTRY)
    if not isinstance(data, ImageData):
        raise TypeError(f"data set {name!r} must give a kcd_ext.data.images.ImageData, got {type(data).__name__}")
    return data
