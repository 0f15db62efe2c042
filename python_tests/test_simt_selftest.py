"""The shim that runs CUDA kernels on the CPU: semantics of its primitives, and detection of misuse by it and the sanitizers."""

import ctypes
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from simt import build

pytestmark = pytest.mark.cuda_on_cpu

FAILED_LAUNCH, WRONG, ADDRESS_ERROR = 86, 10, 1  # exit statuses of selftest.cpp and of AddressSanitizer and UBSan
# Name -> kind and definitions. "ucontext" tests the portable way to switch fibers.
PROGRAMS = {
    "plain": ("plain", []),
    "ucontext": ("plain", ["SIMT_UCONTEXT"]),
    "asan": ("asan", []),
    "tsan": ("tsan", []),
}
SOURCE = build.HERE / "selftest.cpp"


@pytest.fixture(scope="session")
def programs():
    """The self-test programs by key of PROGRAMS, built in parallel; instead of a program, the reason why it cannot be built."""

    def make(kind, defines):
        available = build.available(kind)
        return build.compile(kind, [SOURCE], defines=defines) if available else available.reason

    with ThreadPoolExecutor() as pool:
        futures = {name: pool.submit(make, *arguments) for name, arguments in PROGRAMS.items()}
        return {name: future.result() for name, future in futures.items()}


@pytest.fixture(params=PROGRAMS)
def selftest(request, programs):
    """A function that runs a case, checks its exit status (`status[program]`, default 0) and returns its stderr."""
    program = programs[request.param]
    if isinstance(program, str):
        pytest.skip(program)

    def run(case, **status):
        done = subprocess.run([program, case], env=build.environment(), capture_output=True, text=True, timeout=60)
        assert done.returncode == status.get(request.param, 0), done.stderr
        return done.stderr

    run.program = request.param
    return run


@pytest.mark.parametrize(
    "case",
    [
        "semantics",
        "atomics",
        "fresh_shared_is_poisoned",
        "host_side",
        "limits",
        "schedules_agree",
        "seed_determines_schedule",
        "resident_blocks_interleave",
        "huge_grid",
        "host_threads",
        "failures_then_success",
        "stack_reuse",
        "static_within",
        "syncwarp",
        "last_block",
    ],
)
def test_correct_kernels_pass(selftest, case):
    if case == "huge_grid" and selftest.program in ("ucontext", "tsan"):
        pytest.skip("slow, and the scheduler is the same")
    selftest(case)


@pytest.mark.parametrize(
    ("case", "messages"),
    [
        (
            "early_exit",
            ["deadlock", "threads 0..2 wait at __syncthreads (", "threads 3..3 exited", "threads 4..63 wait"],
        ),
        ("two_barriers", ["divergent barrier", "[block (0,0,0) thread 32]"]),
        ("partial_warp", ["__shfl_xor_sync", "names lanes that do not exist (warp has 000fffff)"]),
        ("lane_outside_mask", ["lane 0 reads lane 1, not in mask 00000001"]),
        ("caller_outside_mask", ["__any_sync", "mask 00000001 lacks the calling lane 1"]),
        ("odd_width", ["width 12"]),
        ("missing_lane", ["deadlock", "threads 0..6 wait at __syncwarp mask ffffffff", "threads 7..7 exited"]),
        ("too_much_static", ["more than 48 KiB"]),
        ("launch_inside", ["launch inside a kernel"]),
    ],
)
def test_misuse_fails_the_launch(selftest, case, messages):
    errors = selftest(case, **dict.fromkeys(PROGRAMS, FAILED_LAUNCH))
    for message in messages:
        assert message in errors


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("static_overrun", "heap-buffer-overflow"),
        ("dynamic_overrun", "heap-buffer-overflow"),
        ("misaligned_vector", "misaligned address"),
        ("ended_stack", "use-after-poison"),
    ],
)
@pytest.mark.parametrize("selftest", ["asan"], indirect=True)
def test_asan_detects_memory_errors(selftest, case, message):
    assert message in selftest(case, asan=ADDRESS_ERROR)


@pytest.mark.parametrize(
    "case",
    [
        "syncwarp_missing",
        "missing_barrier_forward",
        "last_block_no_release",
        "last_block_no_acquire",
        "last_block_plain_reset",
        "last_block_plain_count",
    ],
)
@pytest.mark.parametrize("selftest", ["tsan"], indirect=True)
def test_tsan_detects_races(selftest, case):
    assert "data race" in selftest(case, tsan=build.RACE_FOUND)


def test_missing_barrier_fails_in_descending_order(selftest):
    selftest("missing_barrier_reverse", plain=WRONG, ucontext=WRONG, asan=WRONG, tsan=build.RACE_FOUND)


def test_module_can_be_loaded_and_called(tmp_path):
    if not build.available("plain"):
        pytest.skip(build.available("plain").reason)
    source = tmp_path / "one.cpp"
    source.write_text(
        '#include "simt.h"\n__global__ void k() {}\n'
        'extern "C" __attribute__((visibility("default"))) int one() {\n'
        "  return gpu::launch(k, dim3(2), dim3(32), 0, nullptr);\n}\n"
    )
    assert ctypes.CDLL(build.compile("plain", [source], output_kind="module")).one() == 0


def test_builds_are_cached_by_content(tmp_path, monkeypatch):
    if not build.available("plain"):
        pytest.skip(build.available("plain").reason)
    monkeypatch.setenv("KCD_TEST_CACHE", str(tmp_path / "cache"))
    header, source = tmp_path / "value.h", tmp_path / "program.cu"
    header.write_text("#define VALUE 3\n")
    source.write_text('#include "value.h"\nint main() { return VALUE + MORE; }\n')

    def program(more):
        return build.compile("plain", [source], [tmp_path], [f"MORE={more}"])

    first = program(1)
    assert first == program(1) and subprocess.run([first]).returncode == 4
    assert subprocess.run([program(2)]).returncode == 5
    header.write_text("#define VALUE 7\n")
    assert subprocess.run([program(1)]).returncode == 8
    with pytest.raises(build.BuildError, match=r"program\.cu"):
        program("nonsense")
