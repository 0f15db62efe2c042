"""The `kcd demo` command: train a teacher, then a student without it, with KD, and with KD on fewer visits in four ways."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from .. import files, processes
from ..checks import check_int
from ..condensation.random_keys import MAX_SEED
from ..condensation.schedules import stage_size
from ..data.images import load
from ..reports.conclusion import CONDENSED
from ..students import WEIGHTS
from ..training.recipe import Condense, Recipe
from .evaluate import evaluate_students
from .options import checked_threads
from .study import TEACHER, PlannedRun, Study
from .teachers import Teacher

# InfoBatch can leave out samples whose loss is below the mean: about this share of them, as losses are skewed.
LOW_LOSS_SHARE = 0.68
ANNEALED = 0.125  # the share of a run, at its end, in which InfoBatch visits all samples


@dataclass(frozen=True)
class Demo:
    """Distil a small network on real images in about a minute and write a report.

    The demo trains a convolutional teacher, then a smaller student in six ways: without a teacher, with KD, and in four ways
    with KD on fewer visits to samples: for fewer epochs, on random samples, with InfoBatch, and with KC-KD, which selects
    samples by their knowledge value. All students start from the same weights. With three or more seeds, the report says
    whether selecting by value was better than the others.
    """

    data: str = "mnist5k"
    """The images: mnist5k (28x28), digits (8x8, takes a few seconds), or any value of kcd distill --data."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; every run is repeated for each. The table shows mean and standard deviation."""
    output: Path = Path("runs/demo")
    """Folder for the results. A finished demo in it is moved to OUTPUT.previous and replaces an older one there."""
    epochs: int = 24
    """Epochs of every run. Samples are dropped after each sixth of the run, rounded up to full epochs."""
    keep: float = 0.4
    """Fraction of the samples that remains at the end, in (0, 1). 0.4 makes half of the visits of KD in 24 epochs."""
    schedule: str = "immediate"
    """How fast samples are dropped: reference (as in the authors' code), cosine or immediate."""
    value: str = "entropy"
    """The value that KC-KD ranks by: the student's entropy, kl (to the teacher) or loss."""
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

    def recipes(self, seed: int, samples: int) -> dict[str, Recipe]:
        """Return the runs of a seed in their order, label -> recipe. They differ only in what their labels say.

        Args:
            seed: The seed.
            samples: The number of training samples, which decides the visits of KC-KD. The random selection makes exactly as
                many. `kd-shorter` is off by half an epoch at most, and InfoBatch's visits depend on the losses.
        """
        by_value = Condense(keep=self.keep, schedule=self.schedule, value=self.value)
        visited = sum(self._epoch_sizes(by_value, samples)) / samples  # in epochs of all samples
        # InfoBatch visits all samples in its first epoch and in the annealed ones.
        complete = 1 + self.epochs - int((1 - ANNEALED) * self.epochs)
        left_out = (self.epochs - visited) / max(1, self.epochs - complete) / LOW_LOSS_SHARE
        infobatch = Condense(selection="infobatch", keep=round(min(max(1 - left_out, 0.05), 0.95), 3))
        kinds = {
            TEACHER: {"method": "ce"},
            "student": {"method": "ce"},
            "kd": {"method": "kd"},
            "kd-shorter": {"method": "kd", "epochs": max(1, round(visited))},
            "random": {
                "method": "kd",
                "condense": Condense(selection="random", keep=self.keep, schedule=self.schedule),
            },
            "infobatch": {"method": "kd", "condense": infobatch},
            CONDENSED: {"method": "kd", "condense": by_value},
        }
        common = {name: getattr(self, name) for name in ("epochs", "batch_size", "lr", "device")}
        return {label: Recipe(name=label, seed=seed, **{**common, **kind}) for label, kind in kinds.items()}

    def run(self) -> None:
        """Check everything, train, compare the students with their teacher, write the report and print the table.

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
        data = load(self.data)
        runs = [run for seed in self.seeds for run in self._runs(seed, len(data.train))]
        self._check_drops_samples(runs[-1].recipe.condense, len(data.train))
        threads = checked_threads(self.threads)
        return Study(
            command="kcd demo",
            options={**asdict(self), "output": str(self.output)},
            title=f"Knowledge condensation on {data.name}",
            data=data,
            data_options={"spec": self.data},
            runs=runs,
            output=self.output,
            resume=self.resume,
            threads=threads,
            finish=partial(evaluate_students, data=data, device=self.device, threads=threads),
            keeps_previous=True,
        )

    def _runs(self, seed: int, samples: int) -> list[PlannedRun]:
        folder = self.output / "checkpoint" / f"seed-{seed}"
        taught = {"teacher": Teacher(self.teacher), "teacher_folder": folder / TEACHER}
        return [
            PlannedRun(
                network=self.teacher if label == TEACHER else self.student,
                recipe=recipe,
                folder=folder / label,
                **({} if label == TEACHER else taught),
            )
            for label, recipe in self.recipes(seed, samples).items()
        ]

    def _epoch_sizes(self, condense: Condense, samples: int) -> Sequence[int]:
        """Return the number of samples that KC-KD visits in each epoch."""
        config = condense.build(samples, seed=0, device="cpu", epochs=self.epochs).config
        sizes = [samples]
        for epoch in range(1, self.epochs):
            stage, within = divmod(epoch, config["every"])
            size = (config["schedule"], stage, sizes[-1], samples, config["keep"], config["stages"])
            sizes.append(sizes[-1] if within else stage_size(*size))
        return sizes

    def _check_drops_samples(self, condense: Condense, samples: int) -> None:
        """Raise ValueError if no stage shrinks the set before the last epoch: the report would compare equal runs."""
        if self._epoch_sizes(condense, samples)[-1] == samples:
            raise ValueError(
                f"keep={self.keep} drops none of {samples} samples in {self.epochs} epochs: use a smaller keep"
            )
