"""The `kcd predict` command: classify images with the student of a finished run."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from tyro.conf import FlagCreatePairsOff, Positional, arg

from .. import terminal
from ..checks import check_device, check_int
from ..data.folder import is_image
from ..describe import one_line
from ..environment import threads
from ..reports.tables import as_text
from ..students import Student, load_student
from ..training.distributed import accelerator_on
from .options import checked_threads


@dataclass(frozen=True)
class Predict:
    """Classify images with the student of a finished run.

    The images are converted, resized and normalised as in the run. The command prints a line for every image: its path,
    its most probable class and the probability.
    """

    run_folder: Annotated[
        Positional[Path | None], arg(metavar="RUN", help="The run folder of kcd distill, kcd teacher or kcd demo.")
    ] = None
    images: Annotated[
        Positional[tuple[Path, ...]],
        arg(metavar="IMAGE [IMAGE ...]", help="Image files, and folders whose image files are classified."),
    ] = ()
    top: int = 1
    """Number of classes to print for every image, the most probable first."""
    json: Annotated[bool, FlagCreatePairsOff] = False
    """Print a JSON object per line: image, class, label, probability, and the same for the `top` classes."""
    batch_size: int = 64
    """Largest number of images per forward pass."""
    device: str = "auto"
    """auto (CUDA if available), cpu or cuda."""
    threads: int | None = None
    """Torch's CPU threads. None: torch's default."""

    def run(self) -> None:
        """Load the student, classify all images and print the results.

        An image that cannot be read does not stop the others. Afterwards it is reported.

        Raises:
            TypeError, ValueError: an option is invalid, the run is damaged, or images cannot be read.
            OSError: there is no such run or image.
        """
        check_int("top", self.top, 1)
        check_int("batch_size", self.batch_size, 1)
        check_device(self.device)
        checked_threads(self.threads)
        if self.run_folder is None or not self.images:
            raise ValueError("kcd predict needs a run folder and at least one image: kcd predict RUN IMAGE [IMAGE ...]")
        paths = [path for image in self.images for path in _files_in(image)]
        with accelerator_on(self.device, "no") as accelerator, threads(self.threads):
            student = load_student(self.run_folder, device=accelerator.device)
            failures: list[str] = []
            rows = []
            for path, probabilities in _classify(student, paths, self.batch_size, failures):
                classes = [
                    {"class": student.name_of(label), "label": label, "probability": float(probabilities[label])}
                    for label in probabilities.argsort(descending=True, stable=True)[: self.top].tolist()
                ]
                if self.json:
                    more = {} if self.top == 1 else {"top": classes}
                    terminal.print_lines(json.dumps({"image": str(path), **classes[0], **more}))
                rows += [(str(path), each["class"], f"{each['probability']:.4f}") for each in classes]
        if rows and not self.json:
            terminal.print_lines(*as_text([("image", "class", "probability"), *rows]))
        if failures:
            raise ValueError(f"{len(failures)} of {len(paths)} images cannot be classified: {'; '.join(failures)}")


def _files_in(path: Path) -> list[Path]:
    """Return the path itself, or the image files in a folder. Raises ValueError for a folder without images."""
    if not path.is_dir():
        return [path]
    found = [file for file in sorted(path.rglob("*")) if file.is_file() and is_image(file)]
    if not found:
        raise ValueError(f"{path} contains no image files")
    return found


def _classify(
    student: Student, paths: list[Path], batch_size: int, failures: list[str]
) -> Iterator[tuple[Path, Tensor]]:
    """Yield every image's path and probabilities. Append the reason to `failures` for an image that cannot be read."""
    remaining = iter(paths)
    while batch := list(islice(remaining, batch_size)):
        inputs = {}
        for path in batch:
            try:
                inputs[path] = student.preprocess(path)
            except OSError as error:
                failures.append(f"{path}: {error.strerror or one_line(error)}")
            except ValueError as error:
                failures.append(one_line(error))
        if inputs:
            yield from zip(inputs, student.logits_of(torch.stack([*inputs.values()])).softmax(-1), strict=True)
