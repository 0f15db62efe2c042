"""Images that stay on disk, and the choice between memory and disk."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import pairwise

import numpy as np

from .. import processes
from ..describe import one_line
from ..environment import usable_processors
from .decoding import Decoder, Files, ImageReadError, format_size, read_header, read_upright
from .images import ImageData, ImageSet, LabelledImages, printable_name
from .indexed import IndexedDataset
from .loading import Loader
from .reading import Reading
from .splits import divide
from .views import Views

MAX_WORKERS = 8  # a few keep a device busy, and each takes memory
BLOCK_SIZE = 2**22  # bytes of decoded images that a worker hands over at a time
UNKNOWN = 0.5  # mean and std of views until the images are read


class ImageFiles(LabelledImages):
    """Images that stay on disk. Each is decoded and resized whenever it is used.

    Item i is the raw `(image, label)`, as that of an `ImageSet`. Networks are trained on the same views. The trainer decodes
    images in `Recipe.num_workers` processes; with 0, in one per processor, at most 8.

    Args:
        files: The encoded images.
        labels: `(n,)` integers from 0 to the number of classes - 1; stored as int64.
        decoder: Decodes them.
        views: Converts batches of images to float tensors.
    """

    def __init__(self, files: Files, labels: np.ndarray, decoder: Decoder, views: Views):
        super().__init__(decoder.shape, labels, views)
        self.files = files
        self.decoder = decoder

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Return an image and its label. Raises `ImageReadError`, a ValueError that names the file."""
        try:
            return self.decoder.decode(self.files, index), int(self.labels[index])
        except ImageReadError:
            raise
        except OSError as error:
            raise ImageReadError(
                f"{self.files.name(index)}: cannot be read: {error.strerror or one_line(error)}"
            ) from error
        except ValueError as error:  # the file has become something else, such as a broken link; the message names it
            raise ImageReadError(one_line(error)) from error

    def with_views(self, views: Views) -> "ImageFiles":
        """Return the same images with other views. Raises as the class."""
        return ImageFiles(self.files, self.labels, self.decoder, views)

    def take(self, index: np.ndarray) -> "ImageFiles":
        """Return the images `index` `(m,)` int64, in this order, with the same views."""
        return ImageFiles(self.files.take(index), self.labels[index], self.decoder, self.views)

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all images in order, uint8 `(b, h, w, c)`, decoded by worker processes.

        Raises:
            ValueError: An image cannot be read. The message names it.
        """
        step = max(1, BLOCK_SIZE // math.prod(self.shape))
        bounds = [*range(0, len(self), step), len(self)]
        with closing(Loader(IndexedDataset(self), decoding_workers(), name="images", pin_memory=False)) as loader:
            for images, _, _ in loader.load([range(*pair) for pair in pairwise(bounds)], seed=0):
                yield images.numpy()


def decoding_workers() -> int:
    """Return how many processes decode images by default: one per processor of this process, in [1, MAX_WORKERS]."""
    return max(1, min(MAX_WORKERS, len(usable_processors()) // processes.local_world_size()))


def assemble_files(
    path: os.PathLike,
    name: str,
    files: Mapping[str, Files],
    labels: Mapping[str, np.ndarray],
    class_names: Sequence[str],
    num_classes: int,
    reading: Reading,
) -> ImageData:
    """Return `ImageData` from encoded images, in memory or on disk; training images are neither cropped nor flipped.

    Images are RGB, unless all are 8-bit grey (PIL mode L).

    Args:
        path: The file or folder, for messages.
        name: Name of the data set.
        files: The images of the parts that the data set has: train, and perhaps val and test.
        labels: `(n,)` integers for each part.
        class_names: Names of the classes. Empty: unknown.
        num_classes: Number of classes.
        reading: The options of `load`.

    Raises:
        ValueError: As `divide`; an image cannot be read; images differ in size and `reading` has none.
        OSError: A file cannot be opened.
    """
    divided = divide(path, labels, reading.val_fraction, reading.test_fraction)
    decoder = _choose_decoder(path, files, reading)
    in_memory = sum(map(len, files.values())) * math.prod(decoder.shape) <= reading.memory_limit
    views = Views(*((UNKNOWN,) * len(decoder.mode) for _ in range(2)))
    sets: dict[tuple[str, bytes], LabelledImages] = {}  # the same images can validate and test
    parts = {}
    for part, (source, index) in divided.items():
        key = source, index.tobytes()
        if key not in sets:
            chosen = ImageFiles(files[source].take(index), labels[source][index], decoder, views)
            sets[key] = _decode(chosen) if in_memory else chosen
        parts[part] = sets[key]
    if reading.normalisation is None:
        views = _measure(parts["train"], reading)
    parts = {part: images.with_views(views) for part, images in parts.items()}
    if divided.get("val") is divided["test"]:
        parts["val"] = parts["test"]
    return ImageData(
        printable_name(name),
        parts["train"],
        parts["test"],
        num_classes,
        tuple(class_names),
        parts.get("val"),
        reading.resize_or_default,
    )


def _choose_decoder(path: os.PathLike, files: Mapping[str, Files], reading: Reading) -> Decoder:
    """Return the decoder for all images. Only their headers are read, and without `size` the pixels of the first one."""
    grey, first_of_size = True, {}
    with reading.progress_over(sum(map(len, files.values())), "reading headers") as progress:
        for part in files.values():
            for index in range(len(part)):
                is_grey, size = read_header(part, index)
                grey = grey and is_grey
                first_of_size.setdefault(tuple(sorted(size)), (size, part.name(index)))  # EXIF may undo a rotation
                progress.update(1)
    mode = "L" if grey else "RGB"
    if reading.size is not None:
        return Decoder(mode, (reading.size, reading.size), reading.resize_or_default)
    if len(first_of_size) > 1:
        low, high = (extreme(first_of_size.values(), key=lambda found: math.prod(found[0])) for extreme in (min, max))
        low_name, high_name = (name.removeprefix(f"{path}/") for _, name in (low, high))
        raise ValueError(
            f"{path}: images must have one size, got {len(first_of_size)}, from {format_size(low[0])} ({low_name}) to "
            f"{format_size(high[0])} ({high_name}); size (--size) scales all to one size"
        )
    train = files["train"]
    return Decoder(mode, read_upright(train, 0, mode).size, first=train.name(0))


def _decode(images: ImageFiles) -> ImageSet:
    """Return the images in memory."""
    pixels = np.empty((len(images), *images.shape), dtype=np.uint8)
    for index, row in enumerate(pixels):
        row[...] = images.decoder.decode(images.files, index)
    return ImageSet(pixels, images.labels, images.views)


def _measure(train: LabelledImages, reading: Reading) -> Views:
    """Return views normalised by the training images."""
    if isinstance(train, ImageSet):
        return Views.from_images(train.images)
    with reading.progress_over(len(train), "reading images") as progress:

        def counted() -> Iterator[np.ndarray]:
            for block in train.blocks():
                yield block
                progress.update(len(block))

        return Views.from_blocks(counted(), train.shape[-1])
