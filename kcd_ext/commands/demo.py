"""`kcd demo`: a teacher, and its student trained alone, distilled, and distilled from ever fewer samples."""

from dataclasses import asdict, dataclass
from pathlib import Path

from .. import files, processes
from ..checks import check_int
from ..condensation.random_keys import MAX_SEED
from ..condensation.schedules import stage_size
from ..data.images import load
from ..describe import describe
from ..training.folder import WEIGHTS
from ..training.recipe import Condense, Recipe
from .options import checked_threads
from .study import TEACHER, Run, Study
from .teachers import Teacher

CONDENSED = "kc-kd"


@dataclass(frozen=True)
class Demo:
    """Distils real images in about a minute and writes a report.

    Trains a convolutional teacher, then a smaller student four ways, from the same weights and in the same order
    of samples: alone, with KD, with KD on randomly chosen samples, and with KC-KD, which chooses them by their
    knowledge value.
    """

    data: str = "mnist5k"
    """The images: mnist5k (28x28), digits (8x8, a few seconds), or what --data of kcd distill takes."""
    seeds: tuple[int, ...] = (0,)
    """Everything is run once for each; the table shows mean and standard deviation."""
    output: Path = Path("runs/demo")
    """The folder for the results. A finished demo there is moved to OUTPUT.previous, in place of an older one."""
    epochs: int = 24
    """Epochs of every run. Samples are dropped after every sixth of them, rounded up to whole epochs."""
    keep: float = 0.7
    """The fraction of the samples that is left in the end, in (0, 1)."""
    schedule: str = "reference"
    """How fast samples are dropped: reference (the authors'), cosine or immediate."""
    batch_size: int = 64
    """Samples of a training step."""
    lr: float = 0.05
    """The learning rate at the start."""
    teacher: str = "cnn_large"
    """A network by name (`kcd distill --help` lists them), or module:function."""
    student: str = "cnn_small"
    """As --teacher."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu or cuda."""
    threads: int | None = None
    """Threads of torch on the CPU. None: those of the run that goes on, else one for every 16 GFLOPs of a training step."""
    resume: bool = False
    """Goes on with a demo that was interrupted, given the same options."""

    def recipes(self, seed: int) -> dict[str, Recipe]:
        """What is run for a seed, in this order: label -> recipe. Only what the labels say differs."""
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
            TypeError, ValueError, ImportError, FileExistsError: an option does not fit; nothing has been written then.
            OSError: a file cannot be written; what was finished before is intact.
            KeyboardInterrupt: with a message that says how to go on.
        """
        if processes.world_size() > 1:
            raise ValueError("kcd demo runs in one process: start it without torchrun and accelerate launch")
        study = self._study().checked()
        study.run()
        condensed = next(run for run in study.runs if run.recipe.label == CONDENSED)
        files.write_bytes(self.output / WEIGHTS, (condensed.folder / WEIGHTS).read_bytes())

    def _study(self) -> Study:
        for seed in self.seeds:
            check_int("seeds", seed, 0, MAX_SEED)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be one or more different integers, got {describe(self.seeds)}")
        check_int("epochs", self.epochs, 2)
        runs = [run for seed in self.seeds for run in self._runs(seed)]
        data = load(self.data)
        self._check_something_is_dropped(runs[-1].recipe, len(data.train))
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

    def _runs(self, seed: int) -> list[Run]:
        folder = self.output / "checkpoint" / f"seed-{seed}"
        taught = {"teacher": Teacher(self.teacher), "teacher_folder": folder / TEACHER}
        return [
            Run(
                network=self.teacher if label == TEACHER else self.student,
                recipe=recipe,
                folder=folder / label,
                **({} if label == TEACHER else taught),
            )
            for label, recipe in self.recipes(seed).items()
        ]

    def _check_something_is_dropped(self, recipe: Recipe, samples: int) -> None:
        """There is nothing to compare, and nothing to draw, unless a stage shrinks the set before the last epoch."""
        config = recipe.condense.build(samples, seed=0, device="cpu", epochs=self.epochs).config
        size = samples
        for stage in range(1, (self.epochs - 1) // config["every"] + 1):
            size = stage_size(config["schedule"], stage, size, samples, config["keep"], config["stages"])
        if size == samples:
            raise ValueError(f"keep={self.keep} drops none of {samples} samples in {self.epochs} epochs: take less")
