"""The most and least valuable training images of a run: written when it finishes, shown in its report."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..checks import check_float, check_int
from ..data.images import LabelledImages
from ..describe import one_line
from ..files import read_json, read_regular, write_bytes, write_json
from ..training.summary import Summary
from .runs import check_fingerprint, fingerprint

RANKING, PICTURE = "ranking.json", "thumbnails.png"
NUM_SHOWN = 16  # images at each end of the ranking
MAX_SIDE = 128  # pixels of a thumbnail
FINGERPRINTED = ("metrics.jsonl", PICTURE)  # files whose fingerprint the ranking records


@dataclass(frozen=True)
class Thumbnail:
    """A training image and its knowledge value."""

    image: np.ndarray  # uint8 (h, w), (h, w, 3) or (h, w, 4)
    label: str
    value: float  # the student's mean entropy over its visits, in nats


@dataclass(frozen=True)
class Ranking:
    """The most and the least valuable training images, equally many of each, by decreasing value."""

    most: Sequence[Thumbnail]
    least: Sequence[Thumbnail]


def write(folder: Path, summary: Summary, images: LabelledImages, class_names: Sequence[str] = ()) -> None:
    """Write ranking.json and thumbnails.png into the folder of a finished run, if its knowledge values are entropies.

    The files depend only on the run, so writing them is idempotent. thumbnails.png holds two rows of images, the most
    valuable ones above.

    Args:
        folder: the run folder.
        summary: the result of `distill`.
        images: the training images of the run.
        class_names: names of the classes; empty: unknown.

    Raises:
        OSError: a file cannot be written.
    """
    if summary.condenser.measure != "value":
        return
    values, counts = summary.condenser.values.cpu().numpy(), summary.condenser.counts.cpu().numpy()
    visited = np.flatnonzero(counts)
    order = visited[np.argsort(-values[visited], kind="stable")]
    if not len(order):
        return
    shown = [*order[:NUM_SHOWN], *order[-NUM_SHOWN:]]
    tiles = np.stack([_thumbnail(images[i][0]) for i in shown])
    rows = [np.concatenate([*row], axis=1) for row in np.split(tiles, 2)]
    write_bytes(folder / PICTURE, png(np.concatenate(rows)))
    content = {
        "samples": [int(i) for i in shown],
        "labels": [class_names[k] if class_names else f"class {k}" for k in images.labels[shown].tolist()],
        "values": [float(values[i]) for i in shown],
        "run": fingerprint(folder, FINGERPRINTED),
    }
    write_json(folder / RANKING, content)


def read(folder: Path) -> Ranking | None:
    """Return the ranking that `write` left in a folder, or None if there is none.

    Raises:
        ValueError: a file is damaged or belongs to another student.
        OSError: a file cannot be read.
    """
    path, picture = folder / RANKING, folder / PICTURE
    if not (path.exists() and picture.exists()):
        return None
    labels, values, recorded = read_json(path, _parse)
    check_fingerprint(path, recorded, fingerprint(folder, FINGERPRINTED))
    half, content = len(labels) // 2, read_regular(picture)
    try:
        pixels = np.asarray(Image.open(io.BytesIO(content), formats=["PNG"]))
        tiles = [tile for row in np.split(pixels, 2) for tile in np.split(row, half, axis=1)]
    except Exception as error:  # Pillow raises many types
        raise ValueError(f"{picture} is damaged: {one_line(error)}") from error
    thumbnails = [Thumbnail(*one) for one in zip(tiles, labels, values, strict=True)]
    return Ranking(thumbnails[:half], thumbnails[half:])


def png(image: np.ndarray) -> bytes:
    """Return pixels, uint8 (h, w), (h, w, 3) or (h, w, 4), as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _thumbnail(image: np.ndarray) -> np.ndarray:
    """Return a thumbnail in RGB or RGBA. Images with another number of channels give their first one, in grey."""
    drawn = Image.fromarray(np.ascontiguousarray(image if image.shape[-1] in (3, 4) else image[..., 0]))
    drawn.thumbnail((MAX_SIDE, MAX_SIDE))
    return np.asarray(drawn)


def _parse(content: dict) -> tuple[list[str], list[float], dict]:
    """Return labels, values and fingerprint of a ranking.json. Raises KeyError, TypeError or ValueError if it is damaged."""
    labels, values, recorded = content["labels"], content["values"], dict(content["run"])
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise TypeError("labels must be strings")
    count = check_int("the number of labels", len(labels), 2, 2 * NUM_SHOWN)
    if count % 2 or len(values) != count:
        raise ValueError(f"it has {count} labels but {len(values)} values")
    return labels, [check_float("values", value, "finite numbers", -math.inf) for value in values], recorded
