"""What nvcc makes of the CUDA kernels, read off its output without a GPU: resources, machine code, the ways through its loops."""

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
TIMEOUT = 300  # seconds, for one run of a tool


class MissingToolError(RuntimeError):
    """A tool that is not there, and where it comes from."""


# ---- tools


@functools.cache
def compiler() -> str:
    """nvcc. Raises MissingToolError."""
    return _found(shutil.which("nvcc"), "nvcc (part of the CUDA toolkit)")


@functools.cache
def disassembler() -> str:
    """nvdisasm, of its Python package or of the toolkit. Raises MissingToolError."""
    try:
        files = metadata.files("nvidia-cuda-nvdisasm") or ()
    except metadata.PackageNotFoundError:
        files = ()
    packaged = (str(file.locate()) for file in files if file.name == "nvdisasm")
    path = next(packaged, None) or shutil.which("nvdisasm")
    return _found(path, "nvdisasm (pip install nvidia-cuda-nvdisasm, or part of the CUDA toolkit)")


def _found(path: str | None, name: str) -> str:
    if path is None:
        raise MissingToolError(f"{name} is not there")
    return path


def _run(*command: str | Path) -> subprocess.CompletedProcess:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=TIMEOUT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(done.args)}\n{done.stderr}")
    return done


@functools.cache
def architectures() -> tuple[str, ...]:
    """The architectures that nvcc means by all-major, such as "90", oldest first. Raises MissingToolError."""
    done = _run(compiler(), "-arch=all-major", "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull)
    return tuple(sorted(set(re.findall(r"-arch[= ]sm_(\d+)", done.stderr)), key=int))


# ---- compiling


@dataclass(frozen=True)
class Resources:
    """What a kernel takes: registers of a thread; bytes of a thread's stack and spills, and of a block's shared memory."""

    registers: int
    stack: int
    spilled: int
    shared: int


@dataclass(frozen=True)
class Build:
    """The kernels compiled for one architecture; warnings of compiler and assembler, resources by the kernel's name."""

    binary: Path
    warnings: tuple[str, ...]
    resources: Mapping[str, Resources]


def compile(architecture: str, folder: Path) -> Build:
    """Compiles the kernels into `folder`, optimized. Raises MissingToolError; RuntimeError with nvcc's errors."""
    binary = folder / f"sm_{architecture}.cubin"
    command = [compiler(), "-std=c++17", f"-arch=sm_{architecture}", "-I", INCLUDE]
    log = _run(*command, "-Xptxas", "-v,-warn-spills,-warn-lmem-usage", "-cubin", KERNELS, "-o", binary).stderr
    warnings = tuple(line for line in log.splitlines() if re.search(r"\bwarning\b", line))
    return Build(binary, warnings, _resources(log))


def compile_all(architectures: Iterable[str], folder: Path) -> dict[str, Build]:
    """Builds by architecture, made side by side."""
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
    """A kernel's name in the source with its accumulator, forward_rows<float>; of other templates the symbol itself."""
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
    """One instruction; `target` is the index of the one it may jump to."""

    predicate: str
    opcode: str
    operands: str
    target: int | None

    def is_a(self, *names: str) -> bool:
        """Whether the opcode begins with the parts of one of these names: LDG.E.128 is an LDG.E and an LDG.128."""
        parts = self.opcode.split(".")
        return any(parts[0] == name.split(".")[0] and set(name.split(".")) <= set(parts) for name in names)


@dataclass(frozen=True)
class Block:
    """Instructions that are executed together, and the first ones of the blocks that may follow."""

    instructions: tuple[Instruction, ...]
    followers: tuple[int, ...]


Blocks = dict[int, Block]  # by the index of the first instruction


def disassemble(build: Build) -> dict[str, list[Instruction]]:
    """Every kernel's instructions, by its name. Raises MissingToolError; RuntimeError with nvdisasm's errors."""
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
    """The control flow of a kernel."""
    followers = {i: _followers(i, instruction) for i, instruction in enumerate(instructions)}
    first = {0, *(i + 1 for i, after in followers.items() if after != (i + 1,))}
    first |= {follower for i, after in followers.items() if after != (i + 1,) for follower in after}
    found, begin = {}, 0
    for i in range(len(instructions)):
        if i + 1 in first or i + 1 == len(instructions):
            after = tuple(follower for follower in followers[i] if follower < len(instructions))
            found[begin] = Block(tuple(instructions[begin : i + 1]), after)
            begin = i + 1
    return found


def _followers(i: int, instruction: Instruction) -> tuple[int, ...]:
    if instruction.is_a("EXIT", "RET"):
        return (i + 1,) if instruction.predicate else ()
    # Before sm_90 a branch that a whole warp takes may be a conditional call, which nothing returns from.
    jump = instruction.is_a("BRA") or (instruction.is_a("CALL") and instruction.predicate)
    if not jump or instruction.target is None:
        return (i + 1,)
    condition = instruction.predicate or not instruction.operands.startswith("`")
    return (i + 1, instruction.target) if condition else (instruction.target,)


def loops(flow: Blocks) -> list[Blocks]:
    """The outermost loops: the largest sets of blocks that can all reach each other. The first block of each is its entry."""
    before = {block: [] for block in flow}
    for block, has in flow.items():
        for follower in has.followers:
            before[follower].append(block)
    order, seen = [], set()
    for start in flow:
        order += _reachable(start, lambda block: flow[block].followers, seen)
    found, seen = [], set()
    for start in reversed(order):
        members = set(_reachable(start, before.__getitem__, seen))
        if len(members) > 1 or start in flow[start].followers:
            entries = [block for block in members if block == 0 or set(before[block]) - members]
            found.append(
                {block: flow[block] for block in sorted(members, key=lambda block: (block not in entries, block))}
            )
    return found


def _reachable(start: int, neighbours: Callable[[int], Iterable[int]], seen: set[int]) -> list[int]:
    """What is reached from `start` and not yet seen, each after everything that is reached from it."""
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
    """How many instructions are one of these (see Instruction.is_a)."""
    return sum(instruction.is_a(*names) for instruction in instructions)


def all_of(loop: Blocks) -> list[Instruction]:
    """Every instruction of a loop."""
    return [instruction for block in loop.values() for instruction in block.instructions]


def shortest_way(loop: Blocks, least: Mapping[str, int]) -> list[Instruction] | None:
    """The fewest instructions once round a loop, from its entry to its entry, with at least so many of each; None: no way.

    least: numbers by a name of Instruction.is_a. Instructions whose predicate is false count: they are issued too.
    """
    names, numbers = zip(*least.items(), strict=True)
    own = {block: tuple(count(has.instructions, name) for name in names) for block, has in loop.items()}
    entry, back = next(iter(loop)), -1  # the entry when it is come to again
    # Dijkstra's algorithm; a state: the block to come, and what was counted before it, as far as it matters.
    ahead, came_from, counted_at = [(0, (entry, (0,) * len(names)), None)], {}, {block: [] for block in (*loop, back)}
    while ahead:
        length, state, previous = heapq.heappop(ahead)
        block, before = state
        if any(all(map(operator.ge, other, before)) for other in reversed(counted_at[block])):
            continue  # a way that is no longer came here with as much
        counted_at[block].append(before)
        came_from[state] = previous
        if block == back:
            return _instructions_to(state, came_from, loop)
        counted = tuple(map(min, map(operator.add, before, own[block]), numbers))
        for follower in loop[block].followers:
            if follower in loop and (follower != entry or counted == numbers):
                following = (back if follower == entry else follower, counted)
                heapq.heappush(ahead, (length + len(loop[block].instructions), following, state))
    return None


def _instructions_to(state: tuple, came_from: Mapping, loop: Blocks) -> list[Instruction]:
    way = []
    while (state := came_from[state]) is not None:
        way.append(loop[state[0]].instructions)
    return [instruction for instructions in reversed(way) for instruction in instructions]


# ---- what is counted


EXPONENTIAL, WORD_LOAD, STREAMED = "MUFU.EX2", "LDG.128", "STG.EF.128"  # STREAMED: a word written past the caches
WORDS = 4  # that a trip round a hot loop reads: two of each tensor
PAIRS = {2: 16, 4: 8}  # of logits in them, by a logit's bytes


def hot_loops(instructions: list[Instruction]) -> list[Blocks]:
    """The loops that read whole words and take exponentials of them."""
    found = loops(blocks(instructions))
    return [loop for loop in found if count(all_of(loop), WORD_LOAD) and count(all_of(loop), EXPONENTIAL)]


def hot_loops_of(instructions: list[Instruction], size: int) -> list[Blocks]:
    """Those over two tensors of one type whose logits have `size` bytes: 2, a loop for each such type, or 4."""
    hot = hot_loops(instructions)
    exponentials = [count(all_of(loop), EXPONENTIAL) for loop in hot]
    # As many words hold twice as many pairs of two bytes.
    many = 3 / 4 * max(exponentials, default=0)
    return [loop for loop, number in zip(hot, exponentials, strict=True) if (number > many) == (size == 2)]


@dataclass(frozen=True)
class Work:
    """What forward_rows<float> or backward_rows<float> does with a pair of logits at one temperature; 0: at any but 1, 2, 4.

    extra: the teacher's entropy too, or the labels' gradient too.
    """

    kernel: str
    temperature: int
    extra: bool

    def least(self) -> dict[str, int]:
        """What the formulas take for a pair at the least, by opcode; an exponential takes a product beside."""
        forward = self.kernel.startswith("forward")
        powers = forward + self.extra  # e^z, e^y: by squaring, or by exponentials of their own
        exponentials, products = {1: (0, 0), 2: (0, 1), 4: (0, 2), 0: (1, 1)}[self.temperature]
        return {
            EXPONENTIAL: 2 + powers * exponentials,
            "FMUL": 2 + powers * products + (not forward),
            # Forward: cross, and a product of each power. Backward: a difference, and the labels'.
            "FFMA": 1 + powers if forward else 1 + self.extra,
            # Differences to the maxima, and forward the cross term's; each sum, where e^z is not e^(z/T) already.
            "FADD": 5 + powers * (self.temperature != 1) if forward else 2,
        }


def of_a_pair(loop: Blocks, work: Work, size: int) -> tuple[float, float]:
    """Exponentials and instructions for one pair of logits of `size` bytes, where all are aligned and none is special.

    loop: one of hot_loops_of(instructions, size). The way is the shortest that does at least what the work takes.
    Raises RuntimeError: there is none, so that Work.least says too much.
    """
    pairs = PAIRS[size]
    stores = 0 if work.kernel.startswith("forward") else WORDS // 2
    least = {WORD_LOAD: WORDS, "STG": stores, **{name: number * pairs for name, number in work.least().items()}}
    way = shortest_way(loop, least)
    if way is None:
        raise RuntimeError(f"no way through the loop does all of this: {work}, {work.least()}")
    return count(way, EXPONENTIAL) / pairs, len(way) / pairs


# ---- occupancy


@dataclass(frozen=True)
class Multiprocessor:
    """What blocks share (CUDA C++ Programming Guide, technical specifications by compute capability), and what CUDA keeps of it."""

    threads: int
    blocks: int
    shared: int
    shared_reserved: int  # of a block
    registers: int = 65536
    quarters: int = 4  # each has a quarter of the registers and of the warps


MULTIPROCESSORS = {
    "75": Multiprocessor(1024, 16, 64 << 10, 0),
    "80": Multiprocessor(2048, 32, 164 << 10, 1024),
    "90": Multiprocessor(2048, 32, 228 << 10, 1024),
    "100": Multiprocessor(2048, 32, 228 << 10, 1024),
}


def resident_blocks(resources: Resources, threads: int, on: Multiprocessor) -> int:
    """Blocks of so many threads that share a multiprocessor, as cuda_occupancy.h counts them."""
    warps = -(-threads // 32)
    registers_of_warp = -(-resources.registers * 32 // 256) * 256
    warps_by_registers = on.registers // on.quarters // registers_of_warp * on.quarters
    shared = -(-(resources.shared + on.shared_reserved) // 128) * 128
    by_shared = on.shared // shared if shared else on.blocks
    return min(on.blocks, on.threads // 32 // warps, warps_by_registers // warps, by_shared)
