"""The program that section sanitizers runs under compute-sanitizer: it runs every path of the kernels once.

It compares loss, selection and gradient with the reference.
"""

import argparse
import sys
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .cases import Case

READY = "the device answers"


def check(case: "Case", device: str) -> list[str]:
    """Run a case on the device. Return how its results differ from the reference."""
    from . import cases, expected

    given = cases.inputs(case, seed=1)
    results = cases.call(case, cases.on_device(given, device))
    # Copy all results, so that initcheck sees them.
    return expected.faults(case, given, cases.on_device(results, "cpu"))


def main() -> int:
    """Print a line per case, and how many ran within the time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--until", type=float, required=True, help="start no case after this time, in seconds since 1970"
    )
    options = parser.parse_args()
    torch.ones(8, device="cuda").add_(1).cpu()
    print(READY, flush=True)
    from .cases import every_path  # import now: from here on errors are kcd_ext's, not the machine's

    cases, ran, wrong = every_path(), 0, 0
    for case in cases:
        if time.time() > options.until:
            break
        start = time.monotonic()
        found = check(case, "cuda")
        ran, wrong = ran + 1, wrong + bool(found)
        print(f"{time.monotonic() - start:6.2f} s  {case}: {'; '.join(found) or 'matches the reference'}", flush=True)
    print(f"{ran} of {len(cases)} cases, {wrong} wrong")
    return 1 if wrong or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
