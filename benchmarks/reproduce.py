"""The paper's comparison on one's own machine: teacher, student, KD, controls and KC-KD on the same stack.

    python benchmarks/reproduce.py --data cifar100 --pair resnet32x4-resnet8x4 --seeds 3 --side-by-side 4

An hour on two CPU cores answers the same question with a small pair and a fifth of the classes:

    python benchmarks/reproduce.py --data cifar100 --pair resnet20-resnet8 --classes 20 --epochs 24 --precision bfloat16

Several runs are trained side by side on one GPU or CPU. What is finished is not run again, and what was interrupted goes
on. Writes a table beside the paper's numbers, and all figures as JSON, to --results.
"""

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import torch
import tyro

from kcd_ext import environment
from kcd_ext.checks import check_int
from kcd_ext.commands import teachers
from kcd_ext.commands.presets import CIFAR100
from kcd_ext.commands.study import TEACHER, Run, Study
from kcd_ext.commands.teachers import Teacher
from kcd_ext.data.images import ImageData, load
from kcd_ext.files import read_json, write_bytes, write_json
from kcd_ext.reports.tables import spread
from kcd_ext.training.recipe import Condense, Recipe

# What is compared: the name of a run -> what is its own of the recipe. Random selection mixes no images, so what KC-KD is
# better by than "random" is both: "kc-kd unmixed" tells them apart.
KINDS: dict[str, dict[str, object]] = {
    "kd": {"method": "kd"},
    "student alone": {"method": "ce"},
    "random": {"method": "kd", "condense": Condense(selection="random")},
    "infobatch": {"method": "kd", "condense": Condense(selection="infobatch", keep=0.5)},
    "kc-kd": {"method": "kd", "condense": Condense()},
    "kc-kd immediate": {"method": "kd", "condense": Condense(schedule="immediate")},
    "kc-kd unmixed": {"method": "kd", "condense": Condense(epsilon=0.0)},
    "random immediate": {"method": "kd", "condense": Condense(selection="random", schedule="immediate")},
    "kd, half of a batch": {"method": "kd", "condense": Condense(keep=1.0, batch_keep=0.5)},
}
BASELINE, ALONE = "kd", "student alone"  # the second asks no teacher

# Li et al., ECCV 2022: top-1 of student alone, KD and KC-KD on CIFAR-100, percent.
PAPER = {
    "wrn_40_2-wrn_16_2": (73.26, 74.92, 75.70),
    "wrn_40_2-wrn_40_1": (71.98, 73.54, 73.84),
    "resnet56-resnet20": (69.06, 70.66, 70.75),
    "resnet32x4-resnet8x4": (72.50, 73.33, 74.05),
    "vgg13-vgg8": (70.36, 72.98, 73.44),
    "vgg13-mobilenet_v2": (64.60, 67.37, 68.61),
    "resnet50-mobilenet_v2": (64.60, 67.35, 67.94),
    "resnet50-vgg8": (70.36, 73.81, 74.41),
    "resnet32x4-shufflenet_v1": (70.50, 74.07, 74.33),
    "resnet32x4-shufflenet_v2": (71.82, 74.45, 75.19),
    "wrn_40_2-shufflenet_v1": (70.50, 74.83, 75.60),
}
HEADER = (
    "run",
    "accuracy last, %",
    "best, %",
    "minus KD, last",
    "sample visits",
    "teacher visits",
    "PFLOPs",
    "seconds, median",
    "condensation, % of the seconds",
)


@dataclass(frozen=True)
class Reproduce:
    """Runs the comparison and writes its table."""

    data: str = "cifar100"
    """As `kcd distill --data`."""
    pair: str = "resnet32x4-resnet8x4"
    """Teacher and student."""
    seeds: int = 3
    """Runs of each kind; all have the same teacher."""
    only: tuple[str, ...] = field(default_factory=lambda: tuple(KINDS))
    """The kinds to run."""
    epochs: int = 240
    classes: int | None = None
    """So many classes at equal distances; None: all."""
    teacher: Path | None = None
    """The folder of a trained one; None: it is trained first, by the same schedule."""
    precision: str = "auto"
    device: str = "auto"
    threads: int = 1
    """Of each run on the CPU."""
    side_by_side: int = 0
    """Runs at a time; 0: one a processor on a CPU, four on a GPU."""
    minutes: float | None = None
    """No longer than that; what is interrupted goes on the next time, what is finished is shown. None: until all is
    done."""
    output: Path = Path("runs/reproduce")
    """Where the runs lie."""
    results: Path = Path("benchmarks/results")
    """Where the table goes."""

    def run(self) -> None:
        """Everything; goes on where an earlier call of the same options stopped."""
        self._check()
        started = time.monotonic()
        whole = load(self.data)
        study = self._study(load(self._images(whole), padding=4, flip=True))
        if self.minutes is not None:
            study = replace(study, deadline=started + 60 * self.minutes)
        study.checked().run()
        students = [run for run in study.runs if run.recipe.label in self.only]
        found = {
            (run.recipe.label, run.recipe.seed): _result(run.folder) for run in students if _is_finished(run.folder)
        }
        print(f"{len(found)} of {len(students)} runs are finished, {time.monotonic() - started:.0f} s", flush=True)
        if found:
            self._write(whole, _result(self._teacher_folder), found)

    def _study(self, data: ImageData) -> Study:
        teacher_name, student = self.pair.split("-")
        common = {"epochs": self.epochs, "device": self.device, "precision": self.precision}
        runs = []
        if self.teacher is None:
            teacher = Teacher(teacher_name)
            runs = [Run(teacher_name, Recipe("ce", name=TEACHER, **common), self._teacher_folder)]
        else:
            teacher = replace(teachers.find(str(self.teacher), None, None), weights=None, origin=None)
        for seed in range(self.seeds):  # all kinds of a seed first: what is interrupted is a smaller comparison
            for kind in self.only:
                folder = self.output / kind.replace(" ", "-").replace(",", "") / f"seed-{seed}"
                taught = {} if kind == ALONE else {"teacher": teacher, "teacher_folder": self._teacher_folder}
                recipe = Recipe(name=kind, seed=seed, lr=lr_of(self.pair), **common, **KINDS[kind])
                runs.append(Run(student, recipe, folder, **taught))
        return Study(
            command="benchmarks/reproduce.py",
            options={name: str(value) for name, value in asdict(self).items()},
            data=data,
            data_options={"spec": self._spec},
            runs=runs,
            output=self.output,
            resume=self.output.exists(),
            threads=self.threads,
            side_by_side=self._side_by_side(),
        )

    @property
    def _teacher_folder(self) -> Path:
        return self.teacher or self.output / TEACHER

    def _side_by_side(self) -> int:
        on_gpu = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        return self.side_by_side or (4 if on_gpu else max(1, len(environment.usable_processors()) // self.threads))

    @property
    def _spec(self) -> str:
        """What `load` takes: the data set itself, or a file of some of its classes."""
        return self.data if self.classes is None else str(self.output / f"{self.classes}-classes.npz")

    def _images(self, whole: ImageData) -> str:
        """Write the file of some classes anew, if only these are taken. Return what `load` takes."""
        if self.classes is not None:
            arrays = subset(whole, self.classes)
            self.output.mkdir(parents=True, exist_ok=True)
            beside = self.output / f".{self.classes}-classes.partial.npz"
            np.savez(beside, **arrays)
            beside.rename(self._spec)
        return self._spec

    def _check(self) -> None:
        """Raises ValueError for what would be found out only after hours."""
        if self.pair.count("-") != 1:
            raise ValueError(f"pair must be TEACHER-STUDENT, got {self.pair!r}")
        if unknown := [kind for kind in self.only if kind not in KINDS]:
            raise ValueError(f"only must be out of {', '.join(map(repr, KINDS))}, got {unknown[0]!r}")
        for name, least in (("seeds", 1), ("epochs", 1), ("threads", 1), ("side_by_side", 0)):
            check_int(name, getattr(self, name), least)
        if self.teacher is not None and not _is_finished(self.teacher):
            raise ValueError(f"teacher must be the folder of a finished run, got {self.teacher}")

    def _write(self, data: ImageData, teacher: dict, runs: dict) -> None:
        # The seeds that all kinds have: only these can be compared.
        seeds = [seed for seed in range(self.seeds) if all((kind, seed) in runs for kind in self.only)]
        if not seeds:
            print("no seed is finished in all kinds: nothing to compare yet")
            return
        kinds = [kind for kind in KINDS if kind in self.only]
        baseline = [runs[BASELINE, seed] for seed in seeds] if BASELINE in kinds else None
        rows = [row(kind, [runs[kind, seed] for seed in seeds], baseline) for kind in kinds]
        # The teacher serves all seeds, so it has one run.
        lines = ["| " + " | ".join(cells) + " |" for cells in (HEADER, ["---"] * len(HEADER), *rows)]
        as_published = self.epochs == 240 and self.classes is None and data.num_classes == 100
        paper = PAPER.get(self.pair) if as_published and len(data.train) == 50_000 else None
        beside = (
            "The paper's table: student {:.2f}, KD {:.2f}, KC-KD {:.2f} % (its KD row is older work's).\n".format(
                *paper
            )
            if paper
            else "Smaller than the paper's setting, and not to be compared with its numbers.\n"
        )
        part = "" if self.classes is None else f"-{self.classes}-classes"
        name = f"reproduce-{data.name}{part}-{self.pair}-{self.epochs}-epochs"
        text = f"""# {self.pair}, {data.name}{part.replace("-", " ")}, {self.epochs} epochs, {len(seeds)} seeds

`{command()}`

Teacher {teacher["accuracy_last"]:.2f} %. Mean ± standard deviation over seeds; "minus KD" is the mean of the differences to KD of
the same seed (same weights and order of samples at the start) ± its standard error.

{chr(10).join(lines)}

{beside}"""
        self.results.mkdir(parents=True, exist_ok=True)
        write_bytes(self.results / f"{name}.md", text.encode())
        content = {
            "command": command(),
            "environment": {name: fact for name, fact in environment.describe().items() if name != "executable"},
            "pair": self.pair,
            "epochs": self.epochs,
            "data": {"name": data.name, "classes": self.classes or data.num_classes},
            "side_by_side": self._side_by_side(),
            "threads_each": self.threads,
            "teacher": teacher,
            "runs": [{"kind": kind, **result} for (kind, _), result in runs.items()],
        }
        write_json(self.results / f"{name}.json", content)
        print(text)


def command() -> str:
    """That which is running, as one types it in the source folder."""
    return shlex.join(["python", "benchmarks/reproduce.py", *sys.argv[1:]])


def lr_of(pair: str) -> float:
    """The paper's learning rate for the student; 0.05 for a pair that it has not."""
    return next((known.lr for known in CIFAR100 if pair == f"{known.teacher}-{known.student}"), 0.05)


def subset(data: ImageData, classes: int) -> dict[str, np.ndarray]:
    """The arrays of an .npz with `classes` whole classes at equal distances, numbered anew. Raises ValueError."""
    check_int("classes", classes, 2, data.num_classes)
    chosen = np.arange(classes) * data.num_classes // classes
    arrays = {}
    for part, held in (("train", data.train), ("test", data.test)):
        rows = np.flatnonzero(np.isin(held.labels, chosen))
        arrays[f"x_{part}"] = held.images[rows]
        arrays[f"y_{part}"] = np.searchsorted(chosen, held.labels[rows])
    return arrays


def _is_finished(folder: Path) -> bool:
    return (folder / "summary.json").exists()


def _result(folder: Path) -> Mapping[str, float]:
    """Return what a finished run came to."""
    return read_json(folder / "summary.json")["results"][0]


def row(kind: str, results: Sequence[dict], baseline: Sequence[dict] | None) -> list[str]:
    """A line of the table."""
    gap = "" if baseline is None or kind == BASELINE else difference(results, baseline)
    return [
        kind,
        spread([r["accuracy_last"] for r in results], ".2f"),
        spread([r["accuracy_best"] for r in results], ".2f"),
        gap,
        *(visits(results, baseline, name) for name in ("sample_visits", "teacher_visits")),
        f"{mean(r['flops'] / 1e15 for r in results):.3g}",
        f"{median(r['seconds'] for r in results):.0f}",
        f"{mean(100 * r['condensation_seconds'] / r['seconds'] for r in results):.2f}",
    ]


def visits(results: Sequence[dict], baseline: Sequence[dict] | None, name: str) -> str:
    """A mean count, and its share of the baseline's."""
    count = mean(r[name] for r in results)
    part = f" ({100 * count / mean(r[name] for r in baseline):.1f} %)" if baseline else ""
    return f"{count:,.0f}{part}"


def difference(results: Sequence[dict], baseline: Sequence[dict]) -> str:
    """Mean ± standard error of what the last epoch's accuracy differs by, seed by seed."""
    gaps = [a["accuracy_last"] - b["accuracy_last"] for a, b in zip(results, baseline, strict=True)]
    return f"{mean(gaps):+.2f}" + (f" ± {stdev(gaps) / len(gaps) ** 0.5:.2f}" if len(gaps) > 1 else "")


if __name__ == "__main__":
    tyro.cli(Reproduce, description=__doc__).run()
