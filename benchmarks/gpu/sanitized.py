"""The program that section sanitizers runs under compute-sanitizer: every path of the kernels once, against the reference.

Loss, selection and gradient are compared.
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
    """What is wrong with a case's results on the device."""
    from . import cases, expected

    given = cases.inputs(case, seed=1)
    results = cases.call(case, cases.on_device(given, device))
    return expected.faults(case, given, cases.on_device(results, "cpu"))  # all of them, for initcheck to look at


def main() -> int:
    """Prints a line for each case and how many ran before the time was over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--until", type=float, required=True, help="no case begins after this time, seconds since 1970")
    options = parser.parse_args()
    torch.ones(8, device="cuda").add_(1).cpu()
    print(READY, flush=True)
    from .cases import every_path  # only now: what goes wrong from here on is ours, not the machine's

    everything, ran, wrong = every_path(), 0, 0
    for case in everything:
        if time.time() > options.until:
            break
        start = time.monotonic()
        found = check(case, "cuda")
        ran, wrong = ran + 1, wrong + bool(found)
        print(f"{time.monotonic() - start:6.2f} s  {case}: {'; '.join(found) or 'as the reference'}", flush=True)
    print(f"{ran} of {len(everything)} cases, {wrong} wrong")
    return 1 if wrong or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
