"""Run the sections and write the results; see benchmarks/gpu_check.sh."""

# Start the clock before importing torch, which can take half a minute on a fresh machine.

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from harness.machine import CHECKOUT, slug, write_json
from harness.timing import Deadline

from . import machine, report
from .build import module_in
from .sections import NOT_REACHED, SECTIONS, Outcome, execute, limit

NAMES = [section.name for section in SECTIONS]
BUILD = SECTIONS[0]


def main() -> int:
    """Run the kit. Return 0, 1 if a section failed, or 2 if nothing could run."""
    started = time.monotonic()
    options = _arguments()
    deadline = Deadline(options.minutes * 60)
    if requirements := machine.missing(building="KCD_LIBRARY" not in os.environ):
        print(f"gpu_check: missing on this machine: {'; '.join(requirements)}", file=sys.stderr)
        return 2
    if problem := unwritable(options.out):
        print(f"gpu_check: --out: {problem}", file=sys.stderr)
        return 2
    # A background shell ignores interrupts, and the sections would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as name:
        folder = Path(name)
        wheels = install_wheels(options.wheels, folder / "wheels")
        results = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "minutes": options.minutes,
            "machine": machine.facts(),
            "wheels": wheels,
            "not_requested": [name for name in NAMES if name not in {BUILD.name, *options.only}],
            "sections": [],
        }
        base = options.out / slug(results["machine"]["GPU"])
        outcomes, requested = [], {BUILD.name, *options.only}
        with base.with_suffix(".log").open("w") as log:
            for outcome in _run(options.only, deadline, folder, options.out, log):
                outcomes.append(outcome)
                print(
                    f"{outcome.name:13} {outcome.status:13} {outcome.seconds:6.1f} s  {outcome.summary}",
                    flush=True,
                )
                # Write after each section: an interrupted run keeps the finished sections and names the missing ones.
                missing = [name for name in NAMES if name in requested and name not in {x.name for x in outcomes}]
                not_run = [Outcome(name, NOT_REACHED, "the run was stopped before it") for name in missing]
                results["sections"] = [dataclasses.asdict(outcome) for outcome in outcomes + not_run]
                results["seconds"] = round(time.monotonic() - started, 1)
                results["verdict"] = report.verdict(results["sections"])
                write_json(base.with_suffix(".json"), results)
                text, problems = report.markdown(results)
                base.with_suffix(".md").write_text(text)
    print(f"written: {base}.json, {base}.md, {base}.log")
    print(f"gpu_check: {'; '.join([*problems, results['verdict']])}")
    return 0 if all(outcome.good for outcome in outcomes) and not problems else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description="Build, check and measure the CUDA kernels.")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="wheels of packages that this machine lacks")
    default = Path(os.environ.get("OUT") or CHECKOUT / "benchmarks" / "results")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", default=default, help="folder for the results (%(default)s)"
    )
    parser.add_argument(
        "--only",
        metavar="SECTION,...",
        default=",".join(NAMES),
        help="sections to run, of %(default)s; build always runs",
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="time limit of the whole run (%(default)s)")
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := [name for name in options.only if name not in NAMES]:
        parser.error(f"--only: unknown section {', '.join(unknown)}; the sections are {', '.join(NAMES)}")
    if options.wheels is not None and not options.wheels.is_dir():
        parser.error(f"--wheels: {options.wheels} is not a folder")
    if not options.minutes > 0:
        parser.error(f"--minutes must be > 0, got {options.minutes}")
    options.out = options.out.absolute()
    return options


def install_wheels(source: Path | None, target: Path) -> dict[str, list[str]]:
    """Install the wheels of a folder for this run. Return the names of those installed and those refused."""
    wheels = [] if source is None else sorted(source.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
    pip += ["--disable-pip-version-check", "--upgrade", "--target", str(target)]

    def install(wheels: list[Path]) -> bool:
        return subprocess.run([*pip, *map(str, wheels)], capture_output=True).returncode == 0

    installed = wheels if not wheels or install(wheels) else [wheel for wheel in wheels if install([wheel])]
    if installed:
        sys.path.append(str(target))  # to find the modules that a section needs
        os.environ["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(target)]).strip(os.pathsep)
    refused = [wheel for wheel in wheels if wheel not in installed]
    if refused:
        print(f"wheels that could not be installed: {', '.join(wheel.name for wheel in refused)}", flush=True)
    return {"installed": [wheel.name for wheel in installed], "refused": [wheel.name for wheel in refused]}


def _run(only: list[str], deadline: Deadline, folder: Path, out: Path, log: IO[str]) -> Iterator[Outcome]:
    """Yield the outcomes in turn. The build runs first; without it nothing else runs."""
    # Sections run in another folder, so paths must be absolute. KCD_CIFAR100 may also be a name instead of a path.
    library, images = os.environ.get("KCD_LIBRARY"), os.environ.get("KCD_CIFAR100", "")
    if os.path.exists(images):
        os.environ["KCD_CIFAR100"] = os.path.abspath(images)
    if library:
        os.environ["KCD_LIBRARY"] = os.path.abspath(library)
    reused = CHECKOUT / "build" / "gpu_check"  # contains the previous build
    build = folder / "build" if library or unwritable(reused) else reused
    chosen = [section for section in SECTIONS if section.name in only and section is not BUILD]
    outcome = execute(BUILD, limit(BUILD, chosen, deadline.left()), folder, build, out, log)
    yield outcome
    if not outcome.good:
        yield from (Outcome(section.name, NOT_REACHED, "the build failed") for section in chosen)
        return
    if not library:
        os.environ["KCD_LIBRARY"] = str(module_in(build))
    while chosen:
        section = chosen.pop(0)
        yield execute(section, limit(section, chosen, deadline.left()), folder, build, out, log)


def unwritable(folder: Path) -> str | None:
    """Create a folder. Return why it cannot be written to, or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return str(error)
    return None if os.access(folder, os.W_OK) else f"{folder} is not writable"


if __name__ == "__main__":
    sys.exit(main())
