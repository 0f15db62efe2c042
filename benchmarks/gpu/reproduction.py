"""Section reproduction: benchmarks/reproduce.py on the first pair of the paper's table, with a shorter schedule.

Runs as many trainings as the time allows. It fails if no seed finished in all kinds, because then there is nothing to compare.
"""

import json
import math
import os
import subprocess
import sys

from harness.machine import CHECKOUT, write_json

from .process import section_options

CLASSES = 100
SCRIPT = CHECKOUT / "benchmarks" / "reproduce.py"


def main() -> int:
    """Print the output of reproduce.py, and at the end which kinds it compared, or why it could not."""
    options, spec = section_options(__doc__), os.environ["KCD_CIFAR100"]
    from kcd_ext.data.images import load

    try:
        images = load(spec)
    except (OSError, ValueError) as error:
        print(f"KCD_CIFAR100: {error}")
        return 1
    if images.num_classes != CLASSES:
        print(f"KCD_CIFAR100 names {images.name}, which is not CIFAR-100: it has {images.num_classes} classes")
        return 1
    before = {path: path.stat().st_mtime_ns for path in options.out.glob("reproduce-*.json")}
    command = [sys.executable, str(SCRIPT), "--data", spec, "--epochs", "30", "--device", "cuda"]
    command += ["--precision", "bfloat16", "--minutes", f"{options.seconds / 60:.2f}", "--results", str(options.out)]
    if status := subprocess.run(command).returncode:
        print(f"reproduce.py failed with exit status {status}: see the log")
        return 1
    written = [path for path in options.out.glob("reproduce-*.json") if before.get(path) != path.stat().st_mtime_ns]
    if not written:
        print("no seed finished in all kinds, so nothing was compared: give it more time with --only reproduction")
        return 1
    figures = json.loads(written[0].read_text())
    runs = figures["runs"]
    if wrong := [run["kind"] for run in runs if not 0 <= run.get("accuracy_last", math.nan) <= 100]:
        print(f"no accuracy in the runs of {', '.join(wrong)}")
        return 1
    write_json(options.data, {"pair": figures["pair"], "file": written[0].name, "runs": len(runs)})
    print(f"{figures['pair']}: {len(runs)} runs of {len({run['kind'] for run in runs})} kinds, in {written[0].name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
