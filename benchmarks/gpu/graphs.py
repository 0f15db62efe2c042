"""Section graphs: replay forward and backward as CUDA graphs, two at once on two streams; check that no call synchronises."""

import sys

import torch
from harness.machine import write_json
from harness.timing import Deadline
from torch import Tensor

from .cases import Case, call, inputs, on_device
from .process import section_options

SETS = 3  # different inputs, used by the replays in turn
REPLAYS = 60
HEAD_START = 100_000_000  # clock cycles, about 50 ms: both streams queue their replays before the first one runs

SMALL = Case(64, 1000, torch.float32, keep=0.7, labelled=True)
PAIRS = (
    (SMALL, SMALL),  # the same kernels twice: state shared between calls would show
    # split rows; selection by several blocks
    (Case(2, 200_003, torch.bfloat16), Case(70_001, 3, torch.float32, keep=0.3)),
    (Case(33, 4097, torch.bfloat16, keep=0.5, inplace=True, labelled=True), Case(64, 1000, keep=9, reduction="none")),
)
UNSYNCHRONISED = (
    SMALL,
    Case(33, 4097, torch.bfloat16, keep=0.5, shift=3, inplace=True),
    Case(64, 1000, torch.float16, keep=10, named=True),
    Case(70_001, 3, torch.float32, keep=0.3, value="scores"),
    Case(2, 200_003, torch.float32, keep=1, reduction="none"),
)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same bits, including NaN and -0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def differences(replays: list[dict[str, Tensor]], eager: list[dict[str, Tensor]]) -> list[str]:
    """Return which results of the replays differ from the eager calls in any bit."""
    return [
        f"{name} of replay {i}"
        for i, results in enumerate(replays)
        for name, x in results.items()
        if not same_bits(x, eager[i % len(eager)][name])
    ]


class Captured:
    """A case's forward and backward pass as a graph on a separate stream."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case = case
        self.sets = [on_device(inputs(case, seed + i), "cuda") for i in range(SETS)]
        self.eager = [call(case, given) for given in self.sets]
        self.stream = torch.cuda.Stream()
        self.given = on_device(inputs(case, seed), "cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            for _ in range(2):  # load the kernels, which is impossible during capture
                call(case, self.given)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.results = call(case, self.given)
        self.replays: list[dict[str, Tensor]] = []

    def replay(self) -> None:
        """Queue one replay on the next inputs, and a copy of its results."""
        with torch.cuda.stream(self.stream):
            for name, x in self.sets[len(self.replays) % SETS].items():
                self.given[name].copy_(x)
            self.graph.replay()
            self.replays.append({name: x.clone() for name, x in self.results.items()})


def replay_together(pair: tuple[Case, Case], deadline: Deadline) -> list[str]:
    """Replay two graphs at once on two streams, and return their faults."""
    graphs = [Captured(case, seed=100 * i) for i, case in enumerate(pair)]
    for _ in range(5):
        torch.cuda._sleep(HEAD_START)
        started = torch.cuda.current_stream().record_event()
        for graph in graphs:
            graph.replays.clear()
            graph.stream.wait_event(started)
        for _ in range(REPLAYS):
            for graph in graphs:
                graph.replay()
        torch.cuda.synchronize()
        faults = [f"{graph.case}: {fault}" for graph in graphs for fault in differences(graph.replays, graph.eager)]
        if faults or deadline.left() == 0:
            return faults
    return []


def waits_for_device(case: Case) -> str | None:
    """Return how a call synchronises, or None. Uses torch's sync debug mode, and then a busy device."""
    given = on_device(inputs(case, seed=7), "cuda")
    for _ in range(2):
        call(case, given)  # load the kernels and fill torch's allocator
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(case, given)
    except RuntimeError as error:
        return f"{case}: {str(error).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    torch.cuda._sleep(10 * HEAD_START)  # half a second, far longer than a call
    busy = torch.cuda.current_stream().record_event()
    call(case, given)
    waited = busy.query()
    torch.cuda.synchronize()
    return f"{case}: a call returned only after the device had finished earlier work" if waited else None


def main() -> int:
    """Print one line: how many replays matched the eager calls bit for bit."""
    options = section_options(__doc__)
    deadline = Deadline(options.seconds)
    faults = [fault for case in UNSYNCHRONISED if (fault := waits_for_device(case))]
    for pair in PAIRS:
        faults += replay_together(pair, deadline)
    write_json(options.data, faults)
    for fault in faults:
        print(fault)
    if faults:
        print(f"{len(faults)} faults, the first: {faults[0]}")
        return 1
    print(
        f"{len(PAIRS)} pairs of graphs on two streams match eager calls bit for bit; {len(UNSYNCHRONISED)} calls do not synchronise"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
