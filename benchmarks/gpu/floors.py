"""How fast the job can be at most: bytes that must move, exponentials that must be taken, over what this GPU reaches.

N = rows × classes × element size, k selected of B rows.  Forward: student and teacher are read, 2N.  Backward: both again in the
selected rows, and the gradient written, (2k/B + 1)N.  Exponentials: two for each pair of logits forward, two for each pair of
the selected rows backward.
"""

from typing import NamedTuple

EXPONENTIALS_PER_CLOCK = 16  # of a multiprocessor: its special function units, compute capability 7.0 to 10.0


class Ceilings(NamedTuple):
    """What the GPU reaches."""

    bytes_per_second: float
    """Read and written by a large copy, measured."""
    exponentials_per_second: float | None
    """multiprocessors × 16 a clock × clock under load: computed, not measured; None where the clock is not known."""


class Job(NamedTuple):
    """What is computed: KL, entropies and the selection of k rows, and with `backward` the gradient."""

    rows: int
    classes: int
    itemsize: int
    """Bytes of a logit."""
    k: int
    """Selected rows."""
    backward: bool


class Floor(NamedTuple):
    """The larger of the two times, and what it comes from."""

    seconds: float
    bound: str
    """"bytes" or "exponentials"."""


def selected(keep: float, rows: int) -> int:
    """k of a fraction of the rows."""
    return max(1, int(keep * rows))


def traffic(job: Job) -> float:
    """Bytes."""
    size = job.rows * job.classes * job.itemsize
    return 2 * size + ((2 * job.k / job.rows + 1) * size if job.backward else 0)


def exponentials(job: Job) -> int:
    """How many."""
    return 2 * job.classes * (job.rows + (job.k if job.backward else 0))


def floor(job: Job, ceilings: Ceilings) -> Floor:
    """The nearer of the two floors: no version of the job in one pass a direction takes less."""
    of_bytes = Floor(traffic(job) / ceilings.bytes_per_second, "bytes")
    if ceilings.exponentials_per_second is None:
        return of_bytes
    return max(of_bytes, Floor(exponentials(job) / ceilings.exponentials_per_second, "exponentials"))
