"""How fast the job can be at most: bytes that must move, exponentials that must be taken, over what the device reaches.

N = rows × classes × element size, v valid rows (all without labels), k selected of B rows; T = 4, so that e^z follows from e^(z/4)
by squaring and a pair of logits takes two exponentials.
"""

from typing import NamedTuple


class Ceilings(NamedTuple):
    """What the device reaches."""

    bytes_per_second: float
    exponentials_per_second: float | None
    """None where it is not known."""


class Job(NamedTuple):
    """What is computed: KL, entropies and the selection of k rows, and with `backward` the gradient."""

    rows: int
    classes: int
    itemsize: int
    """Bytes of a logit."""
    valid: int
    """Rows whose label is not ignored; the others are not read, and their gradient is 0."""
    k: int
    """Selected rows."""
    labelled: bool
    """With the cross entropy of every valid row."""
    backward: bool


class Work(NamedTuple):
    """What a job takes."""

    bytes: float
    exponentials: int


class Floor(NamedTuple):
    """The larger of the two times, and what it comes from."""

    seconds: float
    bound: str
    """"bytes" or "exponentials"."""


def selected(keep: float, rows: int) -> int:
    """k of a fraction of the rows."""
    return max(1, int(keep * rows))


def one_pass(job: Job) -> Work:
    """Where the gradient comes from the exponentials of the forward pass: 2vN/B, and N for the gradient; two a valid pair.

    No way takes less, whatever is selected: all must be read to know, and every element of the gradient is written.
    """
    n = job.classes * job.itemsize
    return Work((2 * job.valid + job.rows * job.backward) * n, 2 * job.valid * job.classes)


def two_passes(job: Job) -> Work:
    """Where the backward pass reads the logits again: (2k/B)N more, with labels (v/B + k/B)N; an exponential for each of them."""
    first = one_pass(job)
    again = ((job.valid if job.labelled else job.k) + job.k) * job.classes * job.backward
    return Work(first.bytes + again * job.itemsize, first.exponentials + again)


def floor(work: Work, ceilings: Ceilings) -> Floor:
    """The nearer of the two floors."""
    of_bytes = Floor(work.bytes / ceilings.bytes_per_second, "bytes")
    if ceilings.exponentials_per_second is None:
        return of_bytes
    return max(of_bytes, Floor(work.exponentials / ceilings.exponentials_per_second, "exponentials"))
