"""The interface of a device to the measuring loop."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from .candidates import Candidate
from .cases import Case, Shape
from .floors import Ceilings, Job, Work
from .inputs import Rotation
from .timing import Seconds


class Device(ABC):
    """One kind of device: its clock, its memory, its ceilings."""

    kind: str
    """torch's name for it."""
    passes: tuple[tuple[str, ...], ...]
    """Groups of directions; those of one group are measured in the same call."""
    rounds: tuple[int, int]
    """Fewest, most."""
    threads: int | None = None
    """Number of CPU threads, if the host's work is measured."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The file name of its results, different for different devices."""

    @abstractmethod
    def facts(self) -> dict[str, object]:
        """Return a description for the report: name -> fact."""

    @abstractmethod
    def candidates(self) -> tuple[list[Candidate], dict[str, str]]:
        """Return the available candidates, kcd_ext's first, and the unavailable ones: name -> reason."""

    @abstractmethod
    def configure(self, shape: Shape) -> None:
        """Apply the settings that a shape requests besides its logits."""

    @abstractmethod
    def sets(self, shape: Shape) -> int:
        """Return how many sets of inputs calls use in turn."""

    @abstractmethod
    def calls(self, call: Callable[[], object], inputs: Rotation, candidate: Candidate) -> int:
        """Return how many calls one sample times."""

    @abstractmethod
    def sample(
        self, inputs: Rotation, candidate: Candidate, case: Case, directions: tuple[str, ...], calls: int
    ) -> Seconds:
        """Time `calls` calls and return the seconds of one call in each direction."""

    @abstractmethod
    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Return the peak memory of a call, beyond the memory in use before it."""

    @abstractmethod
    def release(self) -> None:
        """Return free memory to the system."""

    @abstractmethod
    def work(self, job: Job) -> Work:
        """Return the least work that a job takes on this device."""

    def measure_bandwidth(self, shape: Shape) -> list[float]:
        """Return measurements for `ceilings`, taken right before and right after the candidates' rounds."""
        return []

    @abstractmethod
    def ceilings(self, shape: Shape, measured: list[float]) -> Ceilings | None:
        """Return the rates that the device reaches at a shape; None before `measure_bandwidth`, if it depends on that."""

    @abstractmethod
    def explain_ceilings(self) -> str:
        """Return an explanation of how the floors were found, in Markdown."""
