"""Reproduce the paper's comparison: teacher, student without teacher, KD, controls and KC-KD with the same trainer.

    python benchmarks/reproduce.py --data cifar100 --pair resnet32x4-resnet8x4 --seeds 3 --side-by-side 4

A small pair and a fifth of the classes answer the same question in an hour on two CPU cores:

    python benchmarks/reproduce.py --data cifar100 --pair resnet20-resnet8 --classes 20 --epochs 24 --precision bfloat16

Several runs train in parallel on one GPU or CPU. Run the same command again to resume: finished runs are kept and
interrupted ones continue. The table with the paper's numbers and all figures as JSON are written to --results.
"""

import re
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import ClassVar

import numpy as np
import torch
import tyro

from kcd_ext import environment
from kcd_ext.checks import check_int
from kcd_ext.commands import teachers
from kcd_ext.commands.presets import CIFAR100
from kcd_ext.commands.study import TEACHER, PlannedRun, Study
from kcd_ext.commands.teachers import Teacher
from kcd_ext.data.images import ImageData, load
from kcd_ext.files import read_json, write_bytes, write_json
from kcd_ext.reports.tables import mean_and_deviation
from kcd_ext.training.recipe import Condense, Recipe

# The compared kinds of runs: label -> the options of its recipe. Random selection mixes no images, so a gain of KC-KD over
# "random" can come from selection or from mixing: "kc-kd unmixed" separates the two.
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
BASELINE, NO_TEACHER = "kd", "student alone"

# Li et al., ECCV 2022: top-1 accuracy in percent on CIFAR-100 of the student without teacher, KD and KC-KD.
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
    """Run the comparison and write its table."""

    script: ClassVar[str] = "reproduce.py"  # this file

    data: str = "cifar100"
    """The images, as for kcd distill --data."""
    pair: str = "resnet32x4-resnet8x4"
    """The networks, TEACHER-STUDENT."""
    seeds: int = 3
    """Number of runs of each kind. All share one teacher."""
    only: tuple[str, ...] = field(default_factory=lambda: tuple(KINDS))
    """The kinds of runs to compare."""
    epochs: int = 240
    """Epochs of every run."""
    classes: int | None = None
    """Use only this many classes, evenly spaced; None: all."""
    teacher: Path | None = None
    """Folder of a finished teacher run; None: train the teacher first, with the same schedule."""
    precision: str = "auto"
    """As for kcd distill --precision."""
    device: str = "auto"
    """auto (CUDA if available), cpu or cuda."""
    threads: int = 1
    """CPU threads of each run."""
    side_by_side: int = 0
    """Runs to train at the same time; 0: four on a GPU, on a CPU as many as leave each run its --threads."""
    minutes: float | None = None
    """Time limit. Finished runs are shown; the same command continues interrupted ones. None: no limit."""
    output: Path = Path("runs/reproduce")
    """Folder for the runs."""
    results: Path = Path("benchmarks/results")
    """Folder for the table and the figures."""

    def run(self) -> None:
        """Train what is missing, then write the table. A second call with the same options resumes."""
        self._check()
        started = time.monotonic()
        full_data = load(self.data)
        study = self._study(load(self._write_images(full_data), padding=4, flip=True))
        if self.minutes is not None:
            study = replace(study, deadline=started + 60 * self.minutes)
        study.checked().run()
        students = [run for run in study.runs if run.recipe.label in self.kinds]
        found = {
            (run.recipe.label, run.recipe.seed): _result(run.folder) for run in students if _is_finished(run.folder)
        }
        print(f"{len(found)} of {len(students)} runs are finished, {time.monotonic() - started:.0f} s", flush=True)
        if found:
            self._write(full_data, _result(self._teacher_folder), found)

    def _study(self, data: ImageData) -> Study:
        """Return the plan: the teacher unless it is given, then all kinds for each seed."""
        teacher_name, student = self.pair.split("-")
        common = {"epochs": self.epochs, "device": self.device, "precision": self.precision}
        runs = []
        if self.teacher is None:
            teacher = Teacher(teacher_name)
            runs = [PlannedRun(teacher_name, Recipe("ce", name=TEACHER, **common), self._teacher_folder)]
        else:
            teacher = replace(teachers.find(str(self.teacher), None, None), weights=None, origin=None)
        for seed in range(self.seeds):  # finish all kinds of a seed first, so that an interrupted study can be compared
            for kind, options in self.kinds.items():
                folder = self.output / re.sub(r"[ ,%]+", "-", kind).strip("-") / f"seed-{seed}"
                teaching = {} if kind == NO_TEACHER else {"teacher": teacher, "teacher_folder": self._teacher_folder}
                recipe = Recipe(name=kind, seed=seed, lr=lr_of(self.pair), **common, **options)
                runs.append(PlannedRun(student, recipe, folder, **teaching))
        return Study(
            command=f"benchmarks/{self.script}",
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
    def kinds(self) -> Mapping[str, Mapping[str, object]]:
        """The compared kinds of runs: label -> the options of its recipe."""
        return {kind: KINDS[kind] for kind in self.only}

    @property
    def shell_command(self) -> str:
        """The running command, as typed in the source folder."""
        return shlex.join(["python", f"benchmarks/{self.script}", *sys.argv[1:]])

    @property
    def _teacher_folder(self) -> Path:
        return self.teacher or self.output / TEACHER

    def _side_by_side(self) -> int:
        on_gpu = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        return self.side_by_side or (4 if on_gpu else max(1, len(environment.usable_processors()) // self.threads))

    @property
    def _spec(self) -> str:
        """The argument of `load`: the data set itself, or a file with some of its classes."""
        return self.data if self.classes is None else str(self.output / f"{self.classes}-classes.npz")

    def _write_images(self, data: ImageData) -> str:
        """Write the file with some of the classes, if requested. Return the argument of `load`."""
        if self.classes is not None:
            arrays = subset(data, self.classes)
            self.output.mkdir(parents=True, exist_ok=True)
            beside = self.output / f".{self.classes}-classes.partial.npz"
            np.savez(beside, **arrays)
            beside.rename(self._spec)
        return self._spec

    def _check(self) -> None:
        """Raise TypeError or ValueError for options that would otherwise fail only after hours."""
        if self.pair.count("-") != 1:
            raise ValueError(f"pair must be TEACHER-STUDENT, got {self.pair!r}")
        check_among("only", self.only, KINDS)
        for name, least in (("seeds", 1), ("epochs", 1), ("threads", 1), ("side_by_side", 0)):
            check_int(name, getattr(self, name), least)
        if self.teacher is not None and not _is_finished(self.teacher):
            raise ValueError(f"teacher must be the folder of a finished run, got {self.teacher}")

    def _write(self, data: ImageData, teacher: dict, runs: dict) -> None:
        """Write the table and the figures, for the seeds that have finished in all kinds."""
        seeds = [seed for seed in range(self.seeds) if all((kind, seed) in runs for kind in self.kinds)]
        if not seeds:
            print("nothing to compare yet: no seed has finished in all kinds")
            return
        baseline = [runs[BASELINE, seed] for seed in seeds] if BASELINE in self.kinds else None
        rows = [row(kind, [runs[kind, seed] for seed in seeds], baseline) for kind in self.kinds]
        lines = ["| " + " | ".join(cells) + " |" for cells in (HEADER, ["---"] * len(HEADER), *rows)]
        as_published = self.epochs == 240 and self.classes is None and data.num_classes == 100
        paper = PAPER.get(self.pair) if as_published and len(data.train) == 50_000 else None
        paper_note = (
            "The paper's table: student {:.2f}, KD {:.2f}, KC-KD {:.2f} % (it takes its KD row from earlier work).\n".format(
                *paper
            )
            if paper
            else "Not the paper's setting; do not compare with its numbers.\n"
        )
        part = "" if self.classes is None else f"-{self.classes}-classes"
        name = f"{self.script.removesuffix('.py')}-{data.name}{part}-{self.pair}-{self.epochs}-epochs"
        text = f"""# {self.pair}, {data.name}{part.replace("-", " ")}, {self.epochs} epochs, {len(seeds)} seeds

`{self.shell_command}`

Teacher {teacher["accuracy_last"]:.2f} %. Mean ± standard deviation over seeds. "minus KD" is the mean difference to KD with the
same seed (same initial weights, same initial order of samples) ± its standard error.

{chr(10).join(lines)}

{paper_note}"""
        self.results.mkdir(parents=True, exist_ok=True)
        write_bytes(self.results / f"{name}.md", text.encode())
        content = {
            "command": self.shell_command,
            "environment": {name: fact for name, fact in environment.facts().items() if name != "executable"},
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


def check_among(name: str, chosen: Sequence[str], known: Iterable[str]) -> None:
    """Raise ValueError for a name that is not known."""
    known = list(known)
    if unknown := [each for each in chosen if each not in known]:
        raise ValueError(f"{name} must be among {', '.join(map(repr, known))}, got {unknown[0]!r}")


def lr_of(pair: str) -> float:
    """Return the paper's learning rate for the student, or 0.05 for a pair that is not in the paper."""
    return next((known.lr for known in CIFAR100 if pair == f"{known.teacher}-{known.student}"), 0.05)


def subset(data: ImageData, classes: int) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file with `classes` evenly spaced classes, renumbered from 0.

    Raises:
        TypeError, ValueError: `classes` is not an integer from 2 to the number of classes.
    """
    check_int("classes", classes, 2, data.num_classes)
    chosen = np.arange(classes) * data.num_classes // classes
    arrays = {}
    for part, images in (("train", data.train), ("test", data.test)):
        rows = np.flatnonzero(np.isin(images.labels, chosen))
        arrays[f"x_{part}"] = images.images[rows]
        arrays[f"y_{part}"] = np.searchsorted(chosen, images.labels[rows])
    return arrays


def _is_finished(folder: Path) -> bool:
    return (folder / "summary.json").exists()


def _result(folder: Path) -> Mapping[str, float]:
    """Return the result of a finished run."""
    return read_json(folder / "summary.json")["results"][0]


def row(kind: str, results: Sequence[dict], baseline: Sequence[dict] | None) -> list[str]:
    """Return a row of the table."""
    gap = "" if baseline is None or kind == BASELINE else difference(results, baseline)
    return [
        kind,
        mean_and_deviation([r["accuracy_last"] for r in results], ".2f"),
        mean_and_deviation([r["accuracy_best"] for r in results], ".2f"),
        gap,
        *(visits(results, baseline, name) for name in ("sample_visits", "teacher_visits")),
        f"{mean(r['flops'] / 1e15 for r in results):.3g}",
        f"{median(r['seconds'] for r in results):.0f}",
        f"{mean(100 * r['condensation_seconds'] / r['seconds'] for r in results):.2f}",
    ]


def visits(results: Sequence[dict], baseline: Sequence[dict] | None, name: str) -> str:
    """Return the mean number of visits and, with a baseline, its percentage of the baseline's."""
    count = mean(r[name] for r in results)
    part = f" ({100 * count / mean(r[name] for r in baseline):.1f} %)" if baseline else ""
    return f"{count:,.0f}{part}"


def difference(results: Sequence[dict], baseline: Sequence[dict]) -> str:
    """Return mean ± standard error of the differences in final accuracy, paired by seed."""
    gaps = [a["accuracy_last"] - b["accuracy_last"] for a, b in zip(results, baseline, strict=True)]
    return f"{mean(gaps):+.2f}" + (f" ± {stdev(gaps) / len(gaps) ** 0.5:.2f}" if len(gaps) > 1 else "")


if __name__ == "__main__":
    tyro.cli(Reproduce, description=__doc__).run()
