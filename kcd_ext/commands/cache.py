"""The `kcd cache` command: run a teacher once and store its logits."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tqdm import tqdm
from tyro.conf import arg

from .. import files, processes, terminal
from ..cache.kinds import DTYPES
from ..checks import check_choice, check_int
from ..environment import threads
from ..training.teacher_cache import cache_teacher, count_views
from . import presets, teachers
from .options import Images, TeacherInput, checked_threads
from .progress import note, warnings_as_notes
from .teachers import Teacher
from .threads import batch_flops, threads_for

HALF = tuple(name for name in DTYPES if name != "float32")


@dataclass(frozen=True)
class Cache:
    """Run a teacher once on all training images and store its logits. Pass the folder to `kcd distill --teacher-cache`.

    A command that was interrupted continues where it stopped if you run it again.
    """

    output: Path | None = None
    """Folder of the cache. Required."""
    teacher: str | None = None
    """The teacher: a finished run's folder, or a weights file (.safetensors, .pt, .pth). Required."""
    teacher_network: str | None = None
    """The network of the weights in --teacher. None: the one named in the run's folder; for a file the default for the data."""
    teacher_input: Annotated[TeacherInput, arg(name="")] = field(default_factory=TeacherInput)
    images: Annotated[Images, arg(name="")] = field(default_factory=Images)
    views: int = 0
    """K: store the logits of the random views of K epochs. Students then see these K views in turn. 0: of the plain images."""
    seed: int = 0
    """The seed of the views: that of the students."""
    precision: Annotated[str, arg(help=f"Storage of the logits: {' or '.join(HALF)}, which has a larger range.")] = (
        "float16"
    )
    batch_size: int = 250
    """Images per batch."""
    device: str = "auto"
    """auto (CUDA if available), cpu or cuda."""
    threads: int | None = None
    """Torch's CPU threads. None: one for every 16 GFLOPs of a batch."""

    def run(self) -> None:
        """Check everything, run the teacher, and print what the cache has.

        Raises:
            TypeError, ValueError, ImportError, FileExistsError: an option is invalid; nothing has been written.
            OSError: a file cannot be written; what has been written is intact.
            KeyboardInterrupt: the command was interrupted; the message says how to continue.
        """
        is_rank_zero = processes.rank() == 0
        with processes.report_on_rank_zero():
            if self.output is None or self.teacher is None:
                raise ValueError("kcd cache needs a teacher and a folder: kcd cache --teacher TEACHER --output FOLDER")
            check_choice("precision", self.precision, HALF)
            check_int("views", self.views, 0)
            self.teacher_input.check()
            self._check_output()
            data = self.images.load()
            teacher = self._find_teacher()
            network = teacher.build(data, 0)
            chosen = checked_threads(self.threads)
            if chosen is None:
                flops = batch_flops([(1, network)], data.train, self.batch_size, self.device)
                chosen = threads_for(flops, "batch").count
        for line in teacher.notes_on(data):
            note(line)
        about = {
            "dataset": data.name,
            "teacher": str(teacher),
            "teacher_network": teacher.network,
            "teacher_path": str(teacher.origin.absolute()),
            **teacher.about_input(data),
        }
        lock = files.folder_lock(self.output) if is_rank_zero else nullcontext()
        with (
            lock,
            threads(chosen),
            tqdm(total=len(data.train), unit="image", disable=None if is_rank_zero else True) as bar,
        ):
            try:
                with warnings_as_notes():
                    cache = cache_teacher(
                        network,
                        data.train,
                        data.test,
                        self.output,
                        views=self.views,
                        seed=self.seed,
                        dtype=self.precision,
                        batch_size=self.batch_size,
                        device=self.device,
                        about=about,
                        progress=lambda done, _: bar.update(done - bar.n),
                    )
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"run the command again to continue in {self.output}") from None
        if is_rank_zero:
            views = count_views(cache)
            seen = f"{views} views each" if views else "not cropped, flipped or augmented"
            terminal.print_lines(
                f"{self.output}: logits of {cache.classes} classes for {len(cache)} images, {seen}, "
                f"{_size(self.output) / 1e6:.1f} MB; the teacher's accuracy on the test images is {cache.about['accuracy']:.1f} %"
            )

    def _check_output(self) -> None:
        """Raise FileExistsError if `output` is a file, or a folder with anything but a cache."""
        if self.output.exists() and not self.output.is_dir():
            raise FileExistsError(f"output {self.output} is a file: choose another --output")
        found = {path.name for path in self.output.iterdir()} - {files.LOCK} if self.output.is_dir() else set()
        if found and "cache.json" not in found:
            raise FileExistsError(f"output {self.output} holds {min(found)} and no cache: choose another --output")

    def _find_teacher(self) -> Teacher:
        """Return the teacher. Raises ValueError if it is not trained."""
        pair = presets.DEFAULT_PAIRS.get(self.images.data)
        teacher = teachers.find(self.teacher, self.teacher_network, pair.teacher if pair else None)
        if teacher.origin is None:
            raise ValueError(
                f"teacher must be the folder of a finished run or a weights file, got {self.teacher!r}: train it with kcd teacher"
            )
        return self.teacher_input.apply(teacher)


def _size(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())
