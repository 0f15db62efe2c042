"""What a kind of device must say of itself for the loop to measure on it."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from .candidates import Candidate
from .floors import Ceilings, Job, Work
from .inputs import Rotation
from .places import Place, Shape
from .timing import Seconds


class Device(ABC):
    """One kind of device: its clock, its memory, its ceilings."""

    kind: str
    """As torch calls it."""
    passes: tuple[tuple[str, ...], ...]
    """Directions; those of one pass are measured in the same call."""
    rounds: tuple[int, int]
    """Fewest, most."""
    threads: int | None = None
    """That the host's work is shared out to, where it is measured."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What tells its results from another's, as a file's name."""

    @abstractmethod
    def facts(self) -> dict[str, object]:
        """What it is, for the report: name -> fact."""

    @abstractmethod
    def candidates(self) -> tuple[list[Candidate], dict[str, str]]:
        """All that are here, ours first, and those that are not: name -> why."""

    @abstractmethod
    def use(self, shape: Shape) -> None:
        """Sets what a shape asks for beside its logits."""

    @abstractmethod
    def sets(self, shape: Shape) -> int:
        """Of inputs that calls take in turn."""

    @abstractmethod
    def calls(self, call: Callable[[], object], given: Rotation, candidate: Candidate) -> int:
        """How many make a sample."""

    @abstractmethod
    def sample(
        self, given: Rotation, candidate: Candidate, place: Place, directions: tuple[str, ...], calls: int
    ) -> Seconds:
        """A call's time in each direction, of so many calls."""

    @abstractmethod
    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Memory that a call takes at most, beyond what is taken before it."""

    @abstractmethod
    def release(self) -> None:
        """Gives memory that is free back to the system."""

    @abstractmethod
    def work(self, job: Job) -> Work:
        """What a job takes by the way that takes least here."""

    def gauge(self, shape: Shape) -> list[float]:
        """Measurements for `ceilings`, taken right before and right after the candidates' rounds."""
        return []

    @abstractmethod
    def ceilings(self, shape: Shape, gauged: list[float]) -> Ceilings | None:
        """What the device reaches at a shape; None where it has to be gauged and has not been."""

    @abstractmethod
    def about_ceilings(self) -> str:
        """How the floors were found, a paragraph."""
