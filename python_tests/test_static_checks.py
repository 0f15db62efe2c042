"""Static checks of the compiled CUDA kernels: registers, spills, load widths, exponentials and instructions per pair of logits."""

import re
from pathlib import Path

import pytest
import static_checks
from static_checks import EXPONENTIAL, PAIRS, STREAMED, VECTOR_LOAD, VECTORS, Work

pytestmark = pytest.mark.cuda_on_cpu

# Register limits per thread, on every architecture. A multiprocessor has 65536 registers; a warp gets them in units of 256.
# 80: 768 threads per multiprocessor, as three blocks of 256 or as one large block that ranks many rows.
# 64: four blocks of 256.
# 128: two blocks of 256.
# 168 (float64): one block of 256; on most GPUs its arithmetic, not its loads, takes the time.
# 48: five blocks of 256; their loads are scattered, so only other warps can hide the latency.
# 32: all 2048 threads of a multiprocessor.
REGISTERS = {
    "forward_rows<float>": 80,
    "forward_rows<double>": 168,
    "backward_rows<float>": 64,
    "backward_rows<double>": 168,
    "forward_rows_with_targets<float>": 128,
    "forward_rows_with_targets<double>": 168,
    "backward_rows_with_targets<float>": 128,
    "backward_rows_with_targets<double>": 168,
    "reduce_rows<float>": 80,
    "reduce_rows<double>": 80,
    "select_by_one_block": 48,
    "select_digit": 48,
    "select_mark": 48,
    "map_rows": 32,
}

# Per pair of logits: the exponentials, and the instruction limits for 2-byte and for 4-byte logits. The limits are about a quarter
# above the counts when this was written. An H200 (132 multiprocessors of 128 lanes, 1.98 GHz) executes 28 instructions in the time
# in which 4.8 TB/s deliver a pair of 2-byte logits, and 56 for 4 bytes; the gradient moves half as many bytes again.
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
# All exponentials in a hot loop's code, per pair. Forward: e^(z/T), e^(y/T), e^z and e^y on three paths (new maximum, no new
# maximum, masks). Backward: e^(z/T), e^(y/T) and e^z.
TOTAL_EXPONENTIALS = {FORWARD: 12, BACKWARD: 3}
RECOMPUTED = 0.1  # exponentials that a compiler short of registers may recompute

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
DISASSEMBLED = ("80", "90")  # architectures whose machine code is checked


@pytest.fixture(scope="session")
def builds(tmp_path_factory):
    """The builds of the kernels, by architecture."""
    try:
        architectures = static_checks.architectures()
    except static_checks.MissingToolError as missing:
        pytest.skip(str(missing))
    return static_checks.compile_all(architectures, tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="session")
def disassemble():
    """`static_checks.disassemble`; skips if the disassembler is missing."""
    try:
        static_checks.disassembler()
    except static_checks.MissingToolError as missing:
        pytest.skip(str(missing))
    return static_checks.disassemble


@pytest.fixture(scope="session", params=DISASSEMBLED)
def machine_code(request, builds, disassemble):
    """The instructions of every kernel, for one architecture."""
    return disassemble(builds[request.param])


def test_first_call_loads_every_kernel():
    """launch.cu loads the kernels that it lists. Compare them with the headers, for every compiled type."""
    defined = "".join(path.read_text() for path in SOURCES.glob("*.cuh"))
    names = set(re.findall(r"__global__ void __launch_bounds__\(.*\)\s+(\w+)\(", defined))
    listed = re.search(r"kKernels\[\] = \{(.*?)\};", (SOURCES / "launch.cu").read_text(), re.S)[1]
    loaded = set(re.findall(r"&(\w+(?:<\w+>)?)", listed))
    assert loaded == set(REGISTERS) and names == {name.split("<")[0] for name in REGISTERS}


def test_compiler_gives_no_warnings(builds):
    """The assembler would warn of spills and local memory."""
    warnings = {architecture: build.warnings for architecture, build in builds.items()}
    assert not any(warnings.values()), warnings


def test_every_kernel_has_a_register_limit(builds):
    for build in builds.values():
        assert set(build.resources) == set(REGISTERS)


@pytest.mark.parametrize("kernel", REGISTERS)
def test_registers_are_within_limits(builds, kernel):
    used = {architecture: build.resources[kernel].registers for architecture, build in builds.items()}
    assert max(used.values()) <= REGISTERS[kernel], used


@pytest.mark.parametrize("kernel", REGISTERS)
def test_no_register_is_spilled(builds, kernel):
    for architecture, build in builds.items():
        resources = build.resources[kernel]
        assert (resources.stack, resources.spilled) == (0, 0), f"sm_{architecture}"


def test_kernels_use_no_local_memory(machine_code):
    used = {kernel: static_checks.count(code, "LDL", "STL") for kernel, code in machine_code.items()}
    assert set(used) == set(REGISTERS) and not any(used.values()), used


@pytest.mark.parametrize("kernel", [FORWARD, BACKWARD])
def test_hot_loops_access_16_byte_vectors(machine_code, kernel):
    """In the hot loops every load has 16 bytes, and every store is a streaming store of 16 bytes."""
    hot = [static_checks.instructions_of(loop) for loop in static_checks.hot_loops(machine_code[kernel])]
    assert len(hot) >= 3, "float16, bfloat16 or float32 has no loop with 16-byte loads"
    for loop in hot:
        assert static_checks.count(loop, VECTOR_LOAD) >= VECTORS
        assert static_checks.count(loop, "LDG", "LD") == static_checks.count(loop, VECTOR_LOAD)
        assert static_checks.count(loop, "STG", "ST") == static_checks.count(loop, STREAMED)
        assert bool(static_checks.count(loop, STREAMED)) == kernel.startswith("backward")


@pytest.mark.parametrize("size", PAIRS)
@pytest.mark.parametrize("kernel", TOTAL_EXPONENTIALS)
def test_total_exponentials_are_within_limits(machine_code, kernel, size):
    for loop in static_checks.hot_loops_of(machine_code[kernel], size):
        most = (TOTAL_EXPONENTIALS[kernel] + RECOMPUTED) * PAIRS[size]
        assert static_checks.count(static_checks.instructions_of(loop), EXPONENTIAL) <= most


@pytest.mark.parametrize("size", PAIRS)
@pytest.mark.parametrize("work", PAIR, ids=lambda work: f"{work.kernel}-{work.temperature}-{work.extra}")
def test_exponentials_and_instructions_per_pair_are_within_limits(machine_code, work, size):
    """On the path that nearly all pairs take, for every type of this size."""
    expected, *most = PAIR[work]
    loops = static_checks.hot_loops_of(machine_code[work.kernel], size)
    assert len(loops) == {2: 2, 4: 1}[size]
    for loop in loops:
        exponentials, instructions = static_checks.cost_per_pair(loop, work, size)
        assert expected <= exponentials <= expected + RECOMPUTED
        assert instructions <= most[size // 4]


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "blocks"),
    [
        (32, 0, 256, 8),  # all threads
        (80, 0, 256, 3),
        (81, 0, 256, 2),  # rounded to 88 registers: 5 warps per quarter
        (80, 0, 768, 1),
        (40, 0, 768, 2),
        (16, 0, 32, 32),  # the block limit
        (32, 48 << 10, 256, 4),  # 49 of 228 KiB each
    ],
)
def test_resident_blocks_match_occupancy_calculator(registers, shared, threads, blocks):
    resources = static_checks.Resources(registers, 0, 0, shared)
    assert static_checks.resident_blocks(resources, threads, static_checks.MULTIPROCESSORS["90"]) == blocks


def test_kernel_table_has_a_line_per_kernel(builds, monkeypatch):
    """The table is part of docs/internals/cuda-kernels.md."""
    monkeypatch.syspath_prepend(static_checks.HERE.parent / "benchmarks")
    import kernel_table

    text = kernel_table.occupancy_table(builds, "90")
    assert all(f"| `{kernel}` |" in text for kernel in REGISTERS)
