"""What nvcc makes of the CUDA kernels: registers, spills, the width of every load, exponentials and instructions for each logit."""

import re
from pathlib import Path

import pytest
import static_checks
from static_checks import EXPONENTIAL, PAIRS, STREAMED, WORD_LOAD, WORDS, Work

pytestmark = pytest.mark.cuda_on_cpu

# The most registers a thread may take, on any architecture.  A multiprocessor has 65536; a warp gets them by 256.
# 80: 768 threads share a multiprocessor, three blocks of 256, or one that selects from many rows in the end.  64: four blocks.
# 168, float64: one block of 256, whose arithmetic, not its reads, takes the time on most GPUs.
# 48: five blocks of 256, which read a number here and there, so that only other warps hide how long that takes.
# 32: all the 2048 threads that a multiprocessor can hold.
REGISTERS = {
    "forward_rows<float>": 80,
    "forward_rows<double>": 168,
    "backward_rows<float>": 64,
    "backward_rows<double>": 168,
    "reduce_rows<float>": 80,
    "reduce_rows<double>": 80,
    "select_by_one_block": 48,
    "select_digit": 48,
    "select_mark": 48,
    "map_rows": 32,
}

# For a pair of logits its exponentials, and the most instructions where both have two bytes, and where they have four: about a
# quarter more than there were when this was written.  While 4.8 TB/s bring a pair of two-byte logits, an H200 (132 multiprocessors
# of 128 lanes, 1.98 GHz) executes 28, and twice as many for four bytes; the gradient moves half as many bytes again.
FORWARD, BACKWARD = "forward_rows<float>", "backward_rows<float>"
PAIR = {
    Work(FORWARD, 1, False): (2, 28, 32),
    Work(FORWARD, 2, False): (2, 28, 32),
    Work(FORWARD, 4, False): (2, 28, 32),
    Work(FORWARD, 0, False): (3, 32, 35),
    Work(FORWARD, 4, True): (2, 38, 42),
    Work(FORWARD, 0, True): (4, 42, 46),
    Work(BACKWARD, 4, False): (2, 22, 21),
    Work(BACKWARD, 0, False): (2, 22, 21),
    Work(BACKWARD, 1, True): (2, 29, 27),
    Work(BACKWARD, 2, True): (2, 29, 28),
    Work(BACKWARD, 4, True): (2, 30, 28),
    Work(BACKWARD, 0, True): (3, 32, 30),
}
# In a hot loop's whole code, for a pair of a trip: forward e^(z/T), e^(y/T), e^z and e^y of three ways, at a maximum, beside all
# maxima and with care; backward e^(z/T), e^(y/T) and e^z.
EXPONENTIALS_IN_ALL = {FORWARD: 12, BACKWARD: 3}
TWICE = 0.1  # of an exponential: what a compiler short of registers may take again

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
READ = ("80", "90")  # architectures whose machine code is read


@pytest.fixture(scope="session")
def builds(tmp_path_factory):
    """The kernels for every architecture, by its name."""
    try:
        architectures = static_checks.architectures()
    except static_checks.MissingToolError as missing:
        pytest.skip(str(missing))
    return static_checks.compile_all(architectures, tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="session")
def disassemble():
    """Skips where there is no disassembler."""
    try:
        static_checks.disassembler()
    except static_checks.MissingToolError as missing:
        pytest.skip(str(missing))
    return static_checks.disassemble


@pytest.fixture(scope="session", params=READ)
def machine_code(request, builds, disassemble):
    """Every kernel's instructions for one architecture."""
    return disassemble(builds[request.param])


def test_every_kernel_is_loaded_by_the_first_call():
    """launch.cu loads what it lists: all that the headers define, in each type that is compiled."""
    defined = "".join(path.read_text() for path in SOURCES.glob("*.cuh"))
    names = set(re.findall(r"__global__ void __launch_bounds__\(.*\)\s+(\w+)\(", defined))
    listed = re.search(r"kKernels\[\] = \{(.*?)\};", (SOURCES / "launch.cu").read_text(), re.S)[1]
    loaded = set(re.findall(r"&(\w+(?:<\w+>)?)", listed))
    assert loaded == set(REGISTERS) and names == {name.split("<")[0] for name in REGISTERS}


def test_nothing_is_warned_of(builds):
    """Neither by the compiler nor by the assembler, which warns of spills and of local memory."""
    warnings = {architecture: build.warnings for architecture, build in builds.items()}
    assert not any(warnings.values()), warnings


def test_every_kernel_has_a_limit(builds):
    for build in builds.values():
        assert set(build.resources) == set(REGISTERS)


@pytest.mark.parametrize("kernel", REGISTERS)
def test_registers(builds, kernel):
    used = {architecture: build.resources[kernel].registers for architecture, build in builds.items()}
    assert max(used.values()) <= REGISTERS[kernel], used


@pytest.mark.parametrize("kernel", REGISTERS)
def test_nothing_is_spilled(builds, kernel):
    for architecture, build in builds.items():
        resources = build.resources[kernel]
        assert (resources.stack, resources.spilled) == (0, 0), f"sm_{architecture}"


def test_no_local_memory(machine_code):
    used = {kernel: static_checks.count(code, "LDL", "STL") for kernel, code in machine_code.items()}
    assert set(used) == set(REGISTERS) and not any(used.values()), used


@pytest.mark.parametrize("kernel", [FORWARD, BACKWARD])
def test_reads_whole_words(machine_code, kernel):
    """In the loops over octets every load is a word of 16 bytes, and so is every store, past the caches."""
    hot = [static_checks.all_of(loop) for loop in static_checks.hot_loops(machine_code[kernel])]
    assert len(hot) >= 3, "float16, bfloat16 or float32 has no loop that reads whole words"
    for loop in hot:
        assert static_checks.count(loop, WORD_LOAD) >= WORDS
        assert static_checks.count(loop, "LDG", "LD") == static_checks.count(loop, WORD_LOAD)
        assert static_checks.count(loop, "STG", "ST") == static_checks.count(loop, STREAMED)
        assert bool(static_checks.count(loop, STREAMED)) == kernel.startswith("backward")


@pytest.mark.parametrize("size", PAIRS)
@pytest.mark.parametrize("kernel", EXPONENTIALS_IN_ALL)
def test_exponentials_in_all(machine_code, kernel, size):
    for loop in static_checks.hot_loops_of(machine_code[kernel], size):
        most = (EXPONENTIALS_IN_ALL[kernel] + TWICE) * PAIRS[size]
        assert static_checks.count(static_checks.all_of(loop), EXPONENTIAL) <= most


@pytest.mark.parametrize("size", PAIRS)
@pytest.mark.parametrize("work", PAIR, ids=lambda work: f"{work.kernel}-{work.temperature}-{work.extra}")
def test_exponentials_and_instructions_of_a_pair(machine_code, work, size):
    """On the way that nearly all pairs take, for every type of this size."""
    expected, *most = PAIR[work]
    loops = static_checks.hot_loops_of(machine_code[work.kernel], size)
    assert len(loops) == {2: 2, 4: 1}[size]
    for loop in loops:
        exponentials, instructions = static_checks.of_a_pair(loop, work, size)
        assert expected <= exponentials <= expected + TWICE
        assert instructions <= most[size // 4]


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "blocks"),
    [
        (32, 0, 256, 8),  # all the threads
        (80, 0, 256, 3),
        (81, 0, 256, 2),  # 88 registers: a quarter holds 5 warps
        (80, 0, 768, 1),
        (40, 0, 768, 2),
        (16, 0, 32, 32),  # the most blocks
        (32, 48 << 10, 256, 4),  # 49 KiB each of 228
    ],
)
def test_resident_blocks(registers, shared, threads, blocks):
    resources = static_checks.Resources(registers, 0, 0, shared)
    assert static_checks.resident_blocks(resources, threads, static_checks.MULTIPROCESSORS["90"]) == blocks


def test_table(builds, monkeypatch):
    """Every kernel has its line in the table for docs/kernels.md."""
    monkeypatch.syspath_prepend(static_checks.HERE.parent / "benchmarks")
    import kernel_table

    text = kernel_table.occupancy_table(builds, "90")
    assert all(f"| `{kernel}` |" in text for kernel in REGISTERS)
