"""What a call takes beyond its inputs, in a fresh process each, where nothing that another candidate left is used again."""

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .candidates import Candidate
from .device import Device
from .devices import DEVICES
from .inputs import Rotation
from .loop import takes_part
from .names import BOTH, FORWARD
from .places import Place, Shape

WARM_UP = Shape(4096, 128)  # as many rows as bring all threads into being; 2 MB in float32


def peaks(device: Device, shape: Shape, candidates: Sequence[Candidate]) -> list[dict[str, object]]:
    """A row (shape, candidate, direction, logits_bytes, peak_bytes or why there are none) for each candidate and direction."""
    place, rows = Place(shape), []
    for candidate in candidates:
        for direction in (FORWARD, BOTH):
            if takes_part(candidate, place, (direction,)):
                row = {"shape": str(shape), "candidate": candidate.name, "direction": direction}
                row["logits_bytes"] = shape.rows * shape.classes * shape.dtype.itemsize
                rows.append(row | _in_fresh_process(device, shape, candidate.name, direction))
    return rows


def _in_fresh_process(device: Device, shape: Shape, candidate: str, direction: str) -> dict[str, object]:
    command = [sys.executable, "-m", __name__, device.kind, candidate, str(shape), direction]
    if device.threads is not None:
        command.append(f"--threads={device.threads}")
    # Without the buffer that is kept from call to call: what a call takes is counted in that call.
    environment = {**os.environ, "KCD_GRADIENT_MEMORY": "fresh"}
    folder = Path(__file__).resolve().parents[1]  # where this package is found, and kcd_ext's source folder is not
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"status": f"failed: {next(iter(done.stderr.splitlines()[-1:]), done.returncode)}"}
    return json.loads(done.stdout.splitlines()[-1])


def _measure(device: Device, place: Place, name: str, *, backward: bool) -> int:
    """Bytes of the second call; the first one, of another shape where nothing is compiled for it, loads code and starts threads."""
    (candidate,) = (each for each in device.candidates()[0] if each.name == name)
    given = Rotation(place.shape, 1, device.kind)
    warm_up = WARM_UP._replace(dtype=place.shape.dtype, ignored=place.shape.ignored)
    first = given if candidate.compiles else Rotation(warm_up, 1, device.kind)
    with torch.set_grad_enabled(backward):
        first.call(candidate, place.keep, backward=backward)
        del first
        gc.collect()
        device.release()
        return device.peak_bytes(lambda: given.call(candidate, place.keep, backward=backward))


def main() -> None:
    """Prints {"peak_bytes": ...}."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("device", "candidate"):
        parser.add_argument(name)
    parser.add_argument("shape", type=Shape.parse)
    parser.add_argument("direction", choices=(FORWARD, BOTH))
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = DEVICES[options.device]()
    peak = _measure(device, Place(options.shape), options.candidate, backward=options.direction == BOTH)
    print(json.dumps({"peak_bytes": peak}))


if __name__ == "__main__":
    main()
