"""The program that section sanitizers runs under compute-sanitizer: every path of the kernels once, against the CPU's."""

import argparse
import sys
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .cases import Case

READY = "the device answers"
TOLERANCE = 1e-3  # relative; a row more or less at the cut changes a loss by less


def check(case: "Case", device: str) -> str | None:
    """What is wrong with a case's loss on the device, None if it is the CPU's."""
    from . import cases

    given = cases.inputs(case, seed=1)
    results = {name: x.cpu() for name, x in cases.call(case, given.to(device)).items()}  # all, for initcheck to look at
    got, want = results["loss"], cases.call(case, given)["loss"]
    if got.shape == want.shape and torch.allclose(got.sum(), want.sum(), rtol=TOLERANCE, atol=1e-6):
        return None
    return f"loss {got.sum().item():.6g}, on the CPU {want.sum().item():.6g}"


def main(device: str = "cuda") -> int:
    """Prints a line for each case and how many ran before the time was over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--until", type=float, required=True, help="no case begins after this time, seconds since 1970")
    options = parser.parse_args()
    torch.ones(8, device=device).add_(1).cpu()
    print(READY, flush=True)
    from .cases import every_path  # only now: what goes wrong from here on is ours, not the machine's

    everything, ran, wrong = every_path(), 0, 0
    for case in everything:
        if time.time() > options.until:
            break
        start = time.monotonic()
        fault = check(case, device)
        ran, wrong = ran + 1, wrong + (fault is not None)
        print(f"{time.monotonic() - start:6.2f} s  {case}: {fault or 'as on the CPU'}", flush=True)
    print(f"{ran} of {len(everything)} cases, {wrong} wrong")
    return 1 if wrong or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
