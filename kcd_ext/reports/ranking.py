"""The most and the least valuable training images of a run: written when it ends, shown by its report."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..checks import check_float, check_int
from ..data.images import ImageSet
from ..describe import one_line
from ..files import read_json, read_regular, write_bytes, write_json
from ..training.summary import Summary
from .runs import check_fingerprint, fingerprint

RANKING, PICTURE = "ranking.json", "thumbnails.png"
SHOWN = 16  # of the most and of the least valuable images
SIDE = 128  # pixels of a thumbnail, at most
BESIDE = ("metrics.jsonl", PICTURE)  # files that a ranking goes with


@dataclass(frozen=True)
class Thumbnail:
    """A training image and what it is worth."""

    image: np.ndarray  # uint8 (h, w), (h, w, 3) or (h, w, 4)
    label: str
    value: float  # mean entropy of the student over its visits, nats


@dataclass(frozen=True)
class Ranking:
    """Equally many of the most and of the least valuable training images, the most valuable first."""

    most: Sequence[Thumbnail]
    least: Sequence[Thumbnail]


def write(folder: Path, summary: Summary, images: ImageSet, class_names: Sequence[str] = ()) -> None:
    """Write ranking.json and thumbnails.png into the folder of a finished run; nothing if it kept no knowledge values.

    The files depend on the run alone: writing them again changes nothing. thumbnails.png holds two rows of images, the most
    valuable above.

    Args:
        folder: that of the run.
        summary: what `distill` returned.
        images: its training images.
        class_names: what the labels stand for; empty: unknown.

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
    shown = [*order[:SHOWN], *order[-SHOWN:]]
    tiles = np.stack([_thumbnail(images.images[i]) for i in shown])
    rows = [np.concatenate([*row], axis=1) for row in np.split(tiles, 2)]
    write_bytes(folder / PICTURE, png(np.concatenate(rows)))
    content = {
        "samples": [int(i) for i in shown],
        "labels": [class_names[k] if class_names else f"class {k}" for k in images.labels[shown].tolist()],
        "values": [float(values[i]) for i in shown],
        "run": fingerprint(folder, BESIDE),
    }
    write_json(folder / RANKING, content)


def read(folder: Path) -> Ranking | None:
    """Return what `write` has left in a folder; None where it has not.

    Raises ValueError where a file is damaged, or of another student; OSError where it cannot be read.
    """
    path, picture = folder / RANKING, folder / PICTURE
    if not (path.exists() and picture.exists()):
        return None
    labels, values, of = read_json(path, _parse)
    check_fingerprint(path, of, fingerprint(folder, BESIDE))
    half, content = len(labels) // 2, read_regular(picture)
    try:
        pixels = np.asarray(Image.open(io.BytesIO(content), formats=["PNG"]))
        tiles = [tile for row in np.split(pixels, 2) for tile in np.split(row, half, axis=1)]
    except Exception as error:  # whatever Pillow raises
        raise ValueError(f"{picture} is damaged: {one_line(error)}") from error
    thumbnails = [Thumbnail(*one) for one in zip(tiles, labels, values, strict=True)]
    return Ranking(thumbnails[:half], thumbnails[half:])


def png(image: np.ndarray) -> bytes:
    """Return a PNG file of pixels, uint8 (h, w), (h, w, 3) or (h, w, 4)."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _thumbnail(image: np.ndarray) -> np.ndarray:
    """Return pixels that can be drawn: RGB and RGBA as they are, of any other number of channels the first one, as grey."""
    drawn = Image.fromarray(np.ascontiguousarray(image if image.shape[-1] in (3, 4) else image[..., 0]))
    drawn.thumbnail((SIDE, SIDE))
    return np.asarray(drawn)


def _parse(content: dict) -> tuple[list[str], list[float], dict]:
    labels, values, of = content["labels"], content["values"], dict(content["run"])
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise TypeError("labels must be names")
    count = check_int("the number of labels", len(labels), 2, 2 * SHOWN)
    if count % 2 or len(values) != count:
        raise ValueError(f"it has {count} labels, {len(values)} values")
    return labels, [check_float("values", value, "finite numbers", -math.inf) for value in values], of
