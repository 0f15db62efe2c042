"""The peak memory of a call beyond its inputs. Each call gets a fresh process, so no candidate reuses another's memory."""

import gc
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from unittest.mock import patch

import torch

from kcd_ext.describe import describe_error

from .candidates import Candidate
from .cases import Case, Shape
from .constants import BOTH, FORWARD
from .device import Device
from .devices import DEVICES
from .inputs import Rotation
from .loop import is_supported

WARM_UP = Shape(4096, 128)  # enough rows to start all threads; 2 MB in float32


def peaks(device: Device, shape: Shape, candidates: Sequence[Candidate]) -> list[dict[str, object]]:
    """Return a row for each candidate and direction.

    A row has shape, candidate, direction, logits_bytes, and peak_bytes or the status of a failure.
    """
    case, rows = Case(shape), []
    for candidate in candidates:
        for direction in (FORWARD, BOTH):
            if is_supported(candidate, case, (direction,)):
                row = {"shape": str(shape), "candidate": candidate.name, "direction": direction}
                row["logits_bytes"] = shape.rows * shape.classes * shape.dtype.itemsize
                rows.append(row | _in_fresh_process(device, shape, candidate.name, direction))
    return rows


def _in_fresh_process(device: Device, shape: Shape, candidate: str, direction: str) -> dict[str, object]:
    # Without the buffer that kcd_ext keeps between calls: the call itself must allocate everything that it uses.
    fresh = patch.dict(os.environ, KCD_GRADIENT_MEMORY="fresh")
    with fresh, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return {
                "peak_bytes": pool.submit(_measure, device.kind, device.threads, shape, candidate, direction).result()
            }
        except Exception as error:  # anything that fails in that process or kills it
            return {"status": f"failed: {describe_error(error)}"}


def _measure(kind: str, threads: int | None, shape: Shape, name: str, direction: str) -> int:
    """Return the peak bytes of the second call.

    The first call loads code and starts threads. It has another shape unless the candidate compiles for each shape.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    device, case, backward = DEVICES[kind](), Case(shape), direction == BOTH
    (candidate,) = (each for each in device.candidates()[0] if each.name == name)
    inputs = Rotation(shape, 1, kind)
    warm_up = WARM_UP._replace(dtype=shape.dtype, ignored=shape.ignored)
    first = inputs if candidate.compiles else Rotation(warm_up, 1, kind)
    with torch.set_grad_enabled(backward):
        first.call(candidate, case.keep, backward=backward)
        del first
        gc.collect()
        device.release()
        return device.peak_bytes(lambda: inputs.call(candidate, case.keep, backward=backward))
