"""Lower bounds on the time: the bytes to move and the exponentials to compute, over the rates that the device reaches.

N = rows × classes × element size; v valid rows (all of them without labels); k selected rows out of B. At T = 4, e^z follows from
e^(z/4) by squaring, so a pair of logits takes two exponentials.
"""

from typing import NamedTuple


class Ceilings(NamedTuple):
    """The rates that the device reaches."""

    bytes_per_second: float
    exponentials_per_second: float | None
    """None: unknown."""


class Job(NamedTuple):
    """The computation: KL, entropies, the selection of k rows and, with `backward`, the gradient."""

    rows: int
    classes: int
    itemsize: int
    """Bytes of a logit."""
    valid: int
    """Rows whose label is not ignored. Ignored rows are not read; their gradient is 0."""
    k: int
    """Selected rows."""
    labelled: bool
    """Adds the cross entropy of every valid row."""
    backward: bool


class Work(NamedTuple):
    """The bytes and exponentials of a job."""

    bytes: float
    exponentials: int


class Floor(NamedTuple):
    """The larger of the two lower bounds, and which one it is."""

    seconds: float
    bound: str
    """"bytes" or "exponentials"."""


def num_selected(keep: float, rows: int) -> int:
    """Return k for a fraction `keep` of the rows."""
    return max(1, int(keep * rows))


def one_pass(job: Job) -> Work:
    """Return the work if the gradient reuses the forward pass's exponentials.

    Reads 2vN/B bytes, writes N for the gradient, and takes two exponentials for each valid pair of logits. No algorithm takes less,
    whatever is selected: selection must read every logit, and every element of the gradient is written.
    """
    n = job.classes * job.itemsize
    return Work((2 * job.valid + job.rows * job.backward) * n, 2 * job.valid * job.classes)


def two_passes(job: Job) -> Work:
    """Return the work if the backward pass reads the logits again.

    Adds (2k/B)N bytes, with labels (v/B + k/B)N, and one exponential for each logit that is read again.
    """
    first = one_pass(job)
    again = ((job.valid if job.labelled else job.k) + job.k) * job.classes * job.backward
    return Work(first.bytes + again * job.itemsize, first.exponentials + again)


def floor(work: Work, ceilings: Ceilings) -> Floor:
    """Return the larger lower bound on the time of `work`."""
    of_bytes = Floor(work.bytes / ceilings.bytes_per_second, "bytes")
    if ceilings.exponentials_per_second is None:
        return of_bytes
    return max(of_bytes, Floor(work.exponentials / ceilings.exponentials_per_second, "exponentials"))
