"""Static analysis of the compiled CUDA kernels, without a GPU: resources, machine code and the paths through its loops."""

import functools
import heapq
import operator
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
INCLUDE = HERE.parent / "csrc"
KERNELS = INCLUDE / "cuda" / "launch.cu"
TIMEOUT = 300  # seconds per run of a tool


class MissingToolError(RuntimeError):
    """A tool is missing; the message says where to get it."""


# ---- tools


@functools.cache
def compiler() -> str:
    """Return the path of nvcc. Raise MissingToolError if it is missing."""
    return _require(shutil.which("nvcc"), "nvcc (part of the CUDA toolkit)")


@functools.cache
def disassembler() -> str:
    """Return the path of nvdisasm, from its Python package or the toolkit. Raise MissingToolError if it is missing."""
    try:
        files = metadata.files("nvidia-cuda-nvdisasm") or ()
    except metadata.PackageNotFoundError:
        files = ()
    packaged = (str(file.locate()) for file in files if file.name == "nvdisasm")
    path = next(packaged, None) or shutil.which("nvdisasm")
    return _require(path, "nvdisasm (pip install nvidia-cuda-nvdisasm, or part of the CUDA toolkit)")


def _require(path: str | None, name: str) -> str:
    if path is None:
        raise MissingToolError(f"{name} was not found")
    return path


def _run(*command: str | Path) -> subprocess.CompletedProcess:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=TIMEOUT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(done.args)}\n{done.stderr}")
    return done


@functools.cache
def architectures() -> tuple[str, ...]:
    """Return the architectures of nvcc's `all-major`, such as "90", oldest first. Raise MissingToolError if nvcc is missing."""
    done = _run(compiler(), "-arch=all-major", "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull)
    return tuple(sorted(set(re.findall(r"-arch[= ]sm_(\d+)", done.stderr)), key=int))


# ---- compiling


@dataclass(frozen=True)
class Resources:
    """The resources of a kernel: registers, stack bytes and spilled bytes per thread; shared memory bytes per block."""

    registers: int
    stack: int
    spilled: int
    shared: int


@dataclass(frozen=True)
class Build:
    """The kernels compiled for one architecture, the warnings of compiler and assembler, and the resources by kernel name."""

    binary: Path
    warnings: tuple[str, ...]
    resources: Mapping[str, Resources]


def compile(architecture: str, folder: Path) -> Build:
    """Compile the kernels into `folder`, optimised. Raise MissingToolError, or RuntimeError with nvcc's errors."""
    binary = folder / f"sm_{architecture}.cubin"
    command = [compiler(), "-std=c++17", f"-arch=sm_{architecture}", "-I", INCLUDE]
    log = _run(*command, "-Xptxas", "-v,-warn-spills,-warn-lmem-usage", "-cubin", KERNELS, "-o", binary).stderr
    warnings = tuple(line for line in log.splitlines() if re.search(r"\bwarning\b", line))
    return Build(binary, warnings, _resources(log))


def compile_all(architectures: Iterable[str], folder: Path) -> dict[str, Build]:
    """Compile for several architectures in parallel. Return the builds by architecture."""
    architectures = tuple(architectures)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        builds = pool.map(lambda architecture: compile(architecture, folder), architectures)
        return dict(zip(architectures, builds, strict=True))


def _resources(log: str) -> dict[str, Resources]:
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        name = part[: part.index("'")]
        own = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers(.*)", part)
        shared = re.search(r"(\d+) bytes smem", used[2])
        stack, stores, loads = map(int, own.groups())
        found[kernel_name(name)] = Resources(int(used[1]), stack, stores + loads, int(shared[1]) if shared else 0)
    return found


def kernel_name(symbol: str) -> str:
    """Return a kernel's name with its accumulator, such as `forward_rows<float>`; for other templates, the symbol itself."""
    mangled = re.match(r"_ZN3kcd4cuda(\d+)(\w+)", symbol)
    if not mangled:
        return symbol
    name, rest = mangled[2][: int(mangled[1])], mangled[2][int(mangled[1]) :]
    if not rest.startswith("I"):
        return name
    accumulator = {"IfE": "<float>", "IdE": "<double>"}.get(rest[:3])
    return name + accumulator if accumulator else symbol


# ---- machine code


@dataclass(frozen=True)
class Instruction:
    """An instruction; `target` is the index of the instruction that it may jump to."""

    predicate: str
    opcode: str
    operands: str
    target: int | None

    def is_a(self, *names: str) -> bool:
        """Return whether the opcode has all parts of one of the names: LDG.E.128 is an LDG.E and an LDG.128."""
        parts = self.opcode.split(".")
        return any(parts[0] == name.split(".")[0] and set(name.split(".")) <= set(parts) for name in names)


@dataclass(frozen=True)
class Block:
    """A basic block, and the indices of the first instructions of its successors."""

    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]


Blocks = dict[int, Block]  # by the index of the first instruction


def disassemble(build: Build) -> dict[str, list[Instruction]]:
    """Return every kernel's instructions by kernel name. Raise MissingToolError, or RuntimeError with nvdisasm's errors."""
    done = _run(disassembler(), "-c", build.binary)
    sections = re.split(r"^//-+ \.text\.(\S+) +-+$", done.stdout, flags=re.MULTILINE)
    return {kernel_name(name): _instructions(text) for name, text in zip(sections[1::2], sections[2::2], strict=True)}


_LABEL = re.compile(r"(?P<label>\.L_x_\d+):")
_INSTRUCTION = re.compile(
    r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(?P<predicate>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>.*?)\s*;"
)


def _instructions(text: str) -> list[Instruction]:
    found, labels = [], {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label["label"]] = len(found)
        elif instruction := _INSTRUCTION.match(line):
            found.append((instruction["predicate"] or "", instruction["opcode"], instruction["operands"]))
    return [Instruction(*parts, _target(parts[-1], labels)) for parts in found]


def _target(operands: str, labels: Mapping[str, int]) -> int | None:
    label = re.search(r"`\((\.L_x_\d+)\)", operands)
    return labels.get(label[1]) if label else None


def blocks(instructions: list[Instruction]) -> Blocks:
    """Return the control flow graph of a kernel."""
    successors = {i: _successors(i, instruction) for i, instruction in enumerate(instructions)}
    first = {0, *(i + 1 for i, after in successors.items() if after != (i + 1,))}
    first |= {successor for i, after in successors.items() if after != (i + 1,) for successor in after}
    found, begin = {}, 0
    for i in range(len(instructions)):
        if i + 1 in first or i + 1 == len(instructions):
            after = tuple(successor for successor in successors[i] if successor < len(instructions))
            found[begin] = Block(tuple(instructions[begin : i + 1]), after)
            begin = i + 1
    return found


def _successors(i: int, instruction: Instruction) -> tuple[int, ...]:
    if instruction.is_a("EXIT", "RET"):
        return (i + 1,) if instruction.predicate else ()
    # Before sm_90 a branch of a full warp may be a conditional call that never returns.
    jump = instruction.is_a("BRA") or (instruction.is_a("CALL") and instruction.predicate)
    if not jump or instruction.target is None:
        return (i + 1,)
    condition = instruction.predicate or not instruction.operands.startswith("`")
    return (i + 1, instruction.target) if condition else (instruction.target,)


def loops(flow: Blocks) -> list[Blocks]:
    """Return the outermost loops: strongly connected components, each with its entry block first."""
    before = {start: [] for start in flow}
    for start, block in flow.items():
        for successor in block.successors:
            before[successor].append(start)
    order, seen = [], set()
    for start in flow:
        order += _reachable(start, lambda block: flow[block].successors, seen)
    found, seen = [], set()
    for start in reversed(order):
        members = set(_reachable(start, before.__getitem__, seen))
        if len(members) > 1 or start in flow[start].successors:
            entries = [block for block in members if block == 0 or set(before[block]) - members]
            found.append(
                {block: flow[block] for block in sorted(members, key=lambda block: (block not in entries, block))}
            )
    return found


def _reachable(start: int, neighbours: Callable[[int], Iterable[int]], seen: set[int]) -> list[int]:
    """Return the unseen blocks reachable from `start`, in depth-first postorder."""
    if start in seen:
        return []
    seen.add(start)
    order, stack = [], [(start, iter(neighbours(start)))]
    while stack:
        block, ahead = stack[-1]
        following = next((x for x in ahead if x not in seen), None)
        if following is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(neighbours(following))))
    return order


def count(instructions: Iterable[Instruction], *names: str) -> int:
    """Count the instructions that are one of these (see Instruction.is_a)."""
    return sum(instruction.is_a(*names) for instruction in instructions)


def instructions_of(loop: Blocks) -> list[Instruction]:
    """Return every instruction of a loop."""
    return [instruction for block in loop.values() for instruction in block.instructions]


def shortest_path(loop: Blocks, least: Mapping[str, int]) -> list[Instruction] | None:
    """Return the shortest path once around a loop with at least the given instruction counts, or None if there is no such path.

    Args:
        least: minimum counts by name (see Instruction.is_a). Predicated-off instructions count, because they are issued too.
    """
    names, numbers = zip(*least.items(), strict=True)
    own = {start: tuple(count(block.instructions, name) for name in names) for start, block in loop.items()}
    entry, back = next(iter(loop)), -1  # -1 is the entry, reached again
    # Dijkstra's algorithm. A state is the next block and the counts before it, capped at `numbers`.
    ahead, came_from, counted_at = [(0, (entry, (0,) * len(names)), None)], {}, {block: [] for block in (*loop, back)}
    while ahead:
        length, state, previous = heapq.heappop(ahead)
        block, before = state
        if any(all(map(operator.ge, other, before)) for other in reversed(counted_at[block])):
            continue  # a path of at most this length reached this block with at least these counts
        counted_at[block].append(before)
        came_from[state] = previous
        if block == back:
            return _instructions_to(state, came_from, loop)
        counted = tuple(map(min, map(operator.add, before, own[block]), numbers))
        for successor in loop[block].successors:
            if successor in loop and (successor != entry or counted == numbers):
                following = (back if successor == entry else successor, counted)
                heapq.heappush(ahead, (length + len(loop[block].instructions), following, state))
    return None


def _instructions_to(state: tuple, came_from: Mapping, loop: Blocks) -> list[Instruction]:
    path = []
    while (state := came_from[state]) is not None:
        path.append(loop[state[0]].instructions)
    return [instruction for instructions in reversed(path) for instruction in instructions]


# ---- counts


EXPONENTIAL, VECTOR_LOAD, STREAMED = "MUFU.EX2", "LDG.128", "STG.EF.128"  # STREAMED: a streaming store of 16 bytes
VECTORS = 4  # loads per iteration of a hot loop: two per tensor
PAIRS = {2: 16, 4: 8}  # pairs of logits per iteration, by bytes per logit


def hot_loops(instructions: list[Instruction]) -> list[Blocks]:
    """Return the loops that load 16-byte vectors and compute exponentials."""
    found = loops(blocks(instructions))
    return [
        loop
        for loop in found
        if count(instructions_of(loop), VECTOR_LOAD) and count(instructions_of(loop), EXPONENTIAL)
    ]


def hot_loops_of(instructions: list[Instruction], size: int) -> list[Blocks]:
    """Return the hot loops for two tensors of one type with `size` bytes per logit. For 2 bytes, that is one loop per type."""
    hot = hot_loops(instructions)
    exponentials = [count(instructions_of(loop), EXPONENTIAL) for loop in hot]
    # The same vectors contain twice as many pairs of 2-byte logits.
    many = 3 / 4 * max(exponentials, default=0)
    return [loop for loop, number in zip(hot, exponentials, strict=True) if (number > many) == (size == 2)]


@dataclass(frozen=True)
class Work:
    """The work of `forward_rows<float>` or `backward_rows<float>` per pair of logits.

    Attributes:
        temperature: 1, 2 or 4; 0 for any other.
        extra: also the teacher's entropy (forward) or the labels' gradient (backward).
    """

    kernel: str
    temperature: int
    extra: bool

    def least(self) -> dict[str, int]:
        """Return the minimum instructions per pair that the formulas need, by opcode. Each exponential needs a product."""
        forward = self.kernel.startswith("forward")
        powers = forward + self.extra  # e^z, e^y: by squaring, or with separate exponentials
        exponentials, products = {1: (0, 0), 2: (0, 1), 4: (0, 2), 0: (1, 1)}[self.temperature]
        return {
            EXPONENTIAL: 2 + powers * exponentials,
            "FMUL": 2 + powers * products + (not forward),
            # Forward: cross, and a product of each power. Backward: a difference, and the labels'.
            "FFMA": 1 + powers if forward else 1 + self.extra,
            # Differences to the maxima, and in the forward pass to the cross term; the sums of e^z, unless T = 1.
            "FADD": 5 + powers * (self.temperature != 1) if forward else 2,
        }


def cost_per_pair(loop: Blocks, work: Work, size: int) -> tuple[float, float]:
    """Return the exponentials and instructions per pair of logits of `size` bytes, for aligned rows without special values.

    They are counted on the shortest path that does at least the work.

    Args:
        loop: a loop of `hot_loops_of(instructions, size)`.

    Raises:
        RuntimeError: no path does the work, so `Work.least` requires too much.
    """
    pairs = PAIRS[size]
    stores = 0 if work.kernel.startswith("forward") else VECTORS // 2
    least = {VECTOR_LOAD: VECTORS, "STG": stores, **{name: number * pairs for name, number in work.least().items()}}
    path = shortest_path(loop, least)
    if path is None:
        raise RuntimeError(f"no path through the loop does all of this: {work}, {work.least()}")
    return count(path, EXPONENTIAL) / pairs, len(path) / pairs


# ---- occupancy


@dataclass(frozen=True)
class Multiprocessor:
    """The limits of a multiprocessor (CUDA C++ Programming Guide, technical specifications by compute capability)."""

    threads: int
    blocks: int
    shared: int
    shared_reserved: int  # per block, by CUDA
    registers: int = 65536
    quarters: int = 4  # each has a quarter of the registers and warps


MULTIPROCESSORS = {
    "75": Multiprocessor(1024, 16, 64 << 10, 0),
    "80": Multiprocessor(2048, 32, 164 << 10, 1024),
    "90": Multiprocessor(2048, 32, 228 << 10, 1024),
    "100": Multiprocessor(2048, 32, 228 << 10, 1024),
}


def resident_blocks(resources: Resources, threads: int, on: Multiprocessor) -> int:
    """Return how many blocks of `threads` threads fit on a multiprocessor, as cuda_occupancy.h computes it."""
    warps = -(-threads // 32)
    registers_of_warp = -(-resources.registers * 32 // 256) * 256
    warps_by_registers = on.registers // on.quarters // registers_of_warp * on.quarters
    shared = -(-(resources.shared + on.shared_reserved) // 128) * 128
    by_shared = on.shared // shared if shared else on.blocks
    return min(on.blocks, on.threads // 32 // warps, warps_by_registers // warps, by_shared)
