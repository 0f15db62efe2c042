"""The `kcd demo` command: train a teacher, then a student without it, with KD and with KD on fewer and fewer samples."""

from dataclasses import asdict, dataclass
from pathlib import Path

from .. import files, processes
from ..checks import check_int
from ..condensation.random_keys import MAX_SEED
from ..condensation.schedules import stage_size
from ..data.images import load
from ..students import WEIGHTS
from ..training.recipe import Condense, Recipe
from .options import checked_threads
from .study import TEACHER, PlannedRun, Study
from .teachers import Teacher

CONDENSED = "kc-kd"


@dataclass(frozen=True)
class Demo:
    """Distil a small network on real images in about a minute and write a report.

    The demo trains a convolutional teacher, then a smaller student in four ways: without a teacher, with KD, with KD on
    randomly selected samples, and with KC-KD, which selects samples by their knowledge value. All students start from the
    same weights and see the samples in the same order.
    """

    data: str = "mnist5k"
    """The images: mnist5k (28x28), digits (8x8, takes a few seconds), or any value of kcd distill --data."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; every run is repeated for each. The table shows mean and standard deviation."""
    output: Path = Path("runs/demo")
    """Folder for the results. A finished demo in it is moved to OUTPUT.previous and replaces an older one there."""
    epochs: int = 24
    """Epochs of every run. Samples are dropped after each sixth of the run, rounded up to full epochs."""
    keep: float = 0.7
    """Fraction of the samples that remains at the end, in (0, 1)."""
    schedule: str = "reference"
    """How fast samples are dropped: reference (as in the authors' code), cosine or immediate."""
    batch_size: int = 64
    """Samples in a training step."""
    lr: float = 0.05
    """Initial learning rate."""
    teacher: str = "cnn_large"
    """The teacher: a network's name (kcd distill --help lists them) or module:function."""
    student: str = "cnn_small"
    """The student: a name or module:function, as for --teacher."""
    device: str = "auto"
    """auto (CUDA if available), cpu or cuda."""
    threads: int | None = None
    """Torch's CPU threads. None: as before for a resumed run, else one for every 16 GFLOPs of a training step."""
    resume: bool = False
    """Continue an interrupted demo that was started with the same options."""

    def recipes(self, seed: int) -> dict[str, Recipe]:
        """Return the runs of a seed in their order, label -> recipe. They differ only in what their labels say."""
        size = {"keep": self.keep, "schedule": self.schedule}
        kinds = {
            TEACHER: {"method": "ce"},
            "student": {"method": "ce"},
            "kd": {"method": "kd"},
            "random": {"method": "kd", "condense": Condense(selection="random", **size)},
            CONDENSED: {"method": "kd", "condense": Condense(**size)},
        }
        common = {name: getattr(self, name) for name in ("epochs", "batch_size", "lr", "device")}
        return {label: Recipe(name=label, seed=seed, **kind, **common) for label, kind in kinds.items()}

    def run(self) -> None:
        """Check everything, train, write the report and print the table.

        Raises:
            TypeError, ValueError, ImportError, FileExistsError: an option is invalid; nothing has been written.
            OSError: a file cannot be written; finished runs and the last checkpoint are intact.
            KeyboardInterrupt: the run was interrupted; the message says how to resume.
        """
        if processes.world_size() > 1:
            raise ValueError("kcd demo runs in one process: start it without torchrun or accelerate launch")
        study = self._study().checked()
        study.run()
        condensed = next(run for run in study.runs if run.recipe.label == CONDENSED)
        files.write_bytes(self.output / WEIGHTS, (condensed.folder / WEIGHTS).read_bytes())

    def _study(self) -> Study:
        for seed in self.seeds:
            check_int("seeds", seed, 0, MAX_SEED)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"seeds must be one or more distinct integers, got {' '.join(map(str, self.seeds)) or 'none'}"
            )
        check_int("epochs", self.epochs, 2)
        runs = [run for seed in self.seeds for run in self._runs(seed)]
        data = load(self.data)
        self._check_drops_samples(runs[-1].recipe, len(data.train))
        return Study(
            command="kcd demo",
            options={**asdict(self), "output": str(self.output)},
            title=f"Knowledge condensation on {data.name}",
            data=data,
            data_options={"spec": self.data},
            runs=runs,
            output=self.output,
            resume=self.resume,
            threads=checked_threads(self.threads),
            keeps_previous=True,
        )

    def _runs(self, seed: int) -> list[PlannedRun]:
        folder = self.output / "checkpoint" / f"seed-{seed}"
        taught = {"teacher": Teacher(self.teacher), "teacher_folder": folder / TEACHER}
        return [
            PlannedRun(
                network=self.teacher if label == TEACHER else self.student,
                recipe=recipe,
                folder=folder / label,
                **({} if label == TEACHER else taught),
            )
            for label, recipe in self.recipes(seed).items()
        ]

    def _check_drops_samples(self, recipe: Recipe, samples: int) -> None:
        """Raise ValueError if no stage shrinks the set before the last epoch: the report would compare equal runs."""
        config = recipe.condense.build(samples, seed=0, device="cpu", epochs=self.epochs).config
        size = samples
        for stage in range(1, (self.epochs - 1) // config["every"] + 1):
            size = stage_size(config["schedule"], stage, size, samples, config["keep"], config["stages"])
        if size == samples:
            raise ValueError(
                f"keep={self.keep} drops none of {samples} samples in {self.epochs} epochs: use a smaller keep"
            )
