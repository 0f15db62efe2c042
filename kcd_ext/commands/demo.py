"""`kcd demo`: a teacher, and its student trained alone, distilled, and distilled from ever fewer samples."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from .. import files, processes, terminal
from ..checks import check_int
from ..condensation.random_keys import MAX_SEED
from ..condensation.schedules import stage_size
from ..data.images import ImageData, load
from ..describe import describe
from ..environment import versions
from ..reports import page, ranking
from ..reports.tables import as_text
from ..training.checks import check_networks
from ..training.device import MOST_THREADS, threads
from ..training.loop import build_method, distill
from ..training.randomness import seeded
from ..training.recipe import Condense, Recipe
from ..training.summary import Summary, results
from . import teachers
from .progress import bar_over, note
from .staging import CONFIG, Staging
from .study import REPORT, TEACHER, about
from .teachers import Teacher
from .threads import Threads, announcement, choose, step_flops

COMMAND = "kcd demo"
CONDENSED = "kc-kd"
ENTRIES = (
    "config.json",
    "metrics.jsonl",
    "checkpoint",
    "student.safetensors",
    *REPORT,
    "summary.json",
)
FREE = ("output", "device", "threads", "resume")  # options that may change when a demo goes on


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
    """The folder for the results. An earlier demo there is replaced when this one has finished, not before."""
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
        """Checks everything, trains, writes the report and prints the table.

        Results are collected in `<output>.partial` and moved to `output` when all of them are there.

        Raises:
            TypeError, ValueError, ImportError: an option does not fit; nothing has been written then.
            OSError: a file cannot be written; an earlier demo in `output` is as it was.
            KeyboardInterrupt: with a message that says where the finished runs are.
        """
        if processes.world_size() > 1:
            raise ValueError("kcd demo runs in one process: start it without torchrun and accelerate launch")
        plan = self._plan()
        data = load(self.data)
        self._check_something_is_dropped(plan[0][CONDENSED], len(data.train))
        self._check_networks(data)
        staging = Staging(self.output, COMMAND, ENTRIES)
        config = {"command": COMMAND, "options": self._options, "versions": versions()}
        with staging.opened(self.resume):
            self._check_same_options(staging.partial / CONFIG, config)
            files.write_json(staging.partial / CONFIG, config)
            try:
                summaries = list(self._summaries(plan, data, staging.partial))
            except KeyboardInterrupt:
                message = f"finished runs are in {staging.partial}; --resume goes on with them"
                raise KeyboardInterrupt(message) from None
            report = self._report(staging.partial, summaries)
            staging.publish()
        terminal.show(*as_text(report.tables[0]), "", f"report: {self.output / REPORT[0]}")

    @property
    def _options(self) -> dict[str, object]:
        return {**asdict(self), "output": str(self.output)}

    def _plan(self) -> list[dict[str, Recipe]]:
        for seed in self.seeds:
            check_int("seeds", seed, 0, MAX_SEED)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be one or more different integers, got {describe(self.seeds)}")
        check_int("epochs", self.epochs, 2)
        if self.threads is not None:
            check_int("threads", self.threads, 1, MOST_THREADS)
        return [self.recipes(seed) for seed in self.seeds]

    def _check_something_is_dropped(self, recipe: Recipe, samples: int) -> None:
        """There is nothing to compare, and nothing to draw, unless a stage shrinks the set before the last epoch."""
        config = recipe.condense.build(samples, seed=0, device="cpu", epochs=self.epochs).config
        size = samples
        for stage in range(1, (self.epochs - 1) // config["every"] + 1):
            size = stage_size(config["schedule"], stage, size, samples, config["keep"], config["stages"])
        if size == samples:
            raise ValueError(f"keep={self.keep} drops none of {samples} samples in {self.epochs} epochs: take less")

    def _check_same_options(self, path: Path, config: dict) -> None:
        """A demo goes on only with the options it was started with."""
        if not path.exists():
            return
        saved = files.read_json(path).get("options")
        if not isinstance(saved, dict):
            raise ValueError(f"{path} is damaged: it has no options")
        for name, value in json.loads(json.dumps(config["options"])).items():
            if name not in FREE and saved.get(name) != value:
                raise ValueError(
                    f"the demo in {path.parent} was started with --{name.replace('_', '-')} {saved.get(name)}, "
                    f"got {value}: give the same options, or remove it"
                )

    def _check_networks(self, data: ImageData) -> None:
        teacher, student = (teachers.build(name, data, 0) for name in (self.teacher, self.student))
        with seeded(0):
            check_networks(student, teacher, data.train, data.test, torch.device("cpu"))

    def _choose_threads(self, plan: list[dict[str, Recipe]], data: ImageData, folder: Path) -> dict[Path, Threads]:
        """Choose the threads of the run in each folder. Raises ValueError where a config.json there is damaged."""
        labels = {_folder_of(recipe, folder): label for recipes in plan for label, recipe in recipes.items()}
        if self.threads is not None:
            return dict.fromkeys(labels, Threads(self.threads))
        teacher, student = (teachers.build(name, data, 0) for name in (self.teacher, self.student))
        flops = {}
        for label, recipe in plan[0].items():
            network = teacher if label == TEACHER else student
            asked = teacher if build_method(recipe).needs_teacher else None
            flops[label] = step_flops(network, asked, data.train, recipe.batch_size, recipe.device)
        return choose(labels, flops)

    def _summaries(self, plan: list[dict[str, Recipe]], data: ImageData, folder: Path) -> Iterator[Summary]:
        """One after the other; what is finished is on disk before the next one starts."""
        summaries: list[Summary] = []
        chosen = self._choose_threads(plan, data, folder)
        if line := announcement((home.name, threads) for home, threads in chosen.items()):
            note(line)
        with bar_over(sum(map(len, plan)), self.epochs) as bar:
            for recipes in plan:
                teacher: nn.Module | None = None
                for label, recipe in recipes.items():
                    name = self.student if teacher else self.teacher
                    network = teachers.build(name, data, recipe.seed)
                    output = _folder_of(recipe, folder)
                    with threads(chosen[output].count):
                        summary = distill(
                            network,
                            teacher,
                            data.train,
                            data.test,
                            recipe,
                            output=output,
                            resume=True,  # of a folder that is new unless the user asked to go on with it
                            progress=bar.begin(f"seed {recipe.seed}, {label}"),
                            about=about(
                                COMMAND,
                                data,
                                {"spec": self.data},
                                name,
                                Teacher(self.teacher) if teacher else None,
                                {home.name: threads.count for home, threads in chosen.items()},
                                {"title": f"Knowledge condensation on {data.name}", "options": self._options},
                            ),
                        )
                    ranking.write(output, summary, data.train, data.class_names)
                    bar.end()
                    teacher = teacher or network
                    summaries.append(summary)
                    _write_results(folder, data.name, self.seeds, summaries)
                    yield summary

    def _report(self, folder: Path, summaries: list[Summary]) -> page.Report:
        first = next(s for s in summaries if s.method == CONDENSED)
        student = folder / "checkpoint" / f"seed-{first.seed}" / CONDENSED / "student.safetensors"
        files.write_bytes(folder / "student.safetensors", student.read_bytes())
        return page.write(folder / REPORT[0], [folder])


def _folder_of(recipe: Recipe, folder: Path) -> Path:
    return folder / "checkpoint" / f"seed-{recipe.seed}" / recipe.label


def _write_results(folder: Path, dataset: str, seeds: tuple[int, ...], summaries: list[Summary]) -> None:
    lines = [{"method": s.method, "seed": s.seed, **line} for s in summaries for line in s.history]
    files.write_lines(folder / "metrics.jsonl", lines)
    files.write_json(folder / "summary.json", results(dataset, seeds, summaries))
