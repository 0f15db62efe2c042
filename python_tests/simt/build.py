"""Builds of CUDA kernels and their tests for the CPU, with the shim and optionally with a sanitizer.

Results are cached by preprocessed source, flags and compiler, in the folder of the environment variable `KCD_TEST_CACHE`. The
default is a folder of the user in the temporary directory.
"""

import functools
import hashlib
import itertools
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__).resolve().parent
SHIM = HERE / "simt.cpp"
COMMON = ("-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-ffp-contract=off", "-pthread")
WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas")
OUTPUTS = {"executable": ((), ()), "module": (("-fPIC", "-fvisibility=hidden"), ("-shared",))}
TIMEOUT = 300  # seconds per compiler run


@dataclass(frozen=True)
class Kind:
    """A kind of build: compilers in order of preference, flags to compile and link, and the flags for simt.cpp (`shim`)."""

    compilers: tuple[str, ...]
    flags: tuple[str, ...]
    shim: tuple[str, ...]


_ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
KINDS = {
    "plain": Kind(("g++", "clang++"), (), ()),
    "asan": Kind(("g++", "clang++"), _ADDRESS, _ADDRESS),
    # clang's runtime is about ten times as fast here as gcc 12's.
    "tsan": Kind(("clang++-19", "clang++", "g++"), ("-fsanitize=thread",), ("-DSIMT_TSAN",)),
}
RACE_FOUND = 66  # exit status under "tsan"


class BuildError(RuntimeError):
    """A failed compilation: the command and its errors."""


@dataclass(frozen=True)
class Availability:
    """Whether a kind can be built and run; `reason` says why not."""

    compiler: str | None
    reason: str = ""

    def __bool__(self) -> bool:
        return self.compiler is not None


def environment() -> dict[str, str]:
    """Return this process's environment with the sanitizer options that the tests expect."""
    return {
        **os.environ,
        "ASAN_OPTIONS": "detect_stack_use_after_return=0",  # it would need a mapping per CUDA thread
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": f"exitcode={RACE_FOUND}",
    }


@functools.cache
def available(kind: str) -> Availability:
    """Return whether programs of this kind can be built and run here, by building and running a small one."""
    reasons = []
    for compiler in KINDS[kind].compilers:
        if shutil.which(compiler) is None:
            reasons.append(f"{compiler}: not found")
            continue
        try:
            program = _build(compiler, KINDS[kind], [HERE / "probe.cpp"], [], [], "executable")
            done = subprocess.run([program], env=environment(), capture_output=True, text=True, timeout=60)
        except (BuildError, subprocess.TimeoutExpired) as error:
            reasons.append(f"{compiler}: {error}")
            continue
        if done.returncode == 0:
            return Availability(compiler)
        reasons.append(f"{compiler}: exit status {done.returncode}, {done.stderr.strip()[:500]}")
    return Availability(None, f"no compiler for {kind}: " + "; ".join(reasons))


def compile(
    kind: str,
    sources: Sequence[Path | str],
    include_dirs: Sequence[Path | str] = (),
    defines: Sequence[str] = (),
    output_kind: str = "executable",
    link_flags: Sequence[str] = (),
) -> Path:
    """Compile `sources` (C++ with any suffix) and the shim, in parallel, and link them.

    Args:
        kind: a key of `KINDS`.
        include_dirs: folders besides the shim's own.
        defines: "NAME" or "NAME=VALUE", also for the shim.
        output_kind: "executable", or "module" for a shared library that Python can import and that uses its symbols.
        link_flags: libraries and their folders.

    Returns:
        The cached file, named after the first source.

    Raises:
        BuildError: a compiler is missing or failed.
    """
    compiler = available(kind)
    if not compiler:
        raise BuildError(compiler.reason)
    return _build(
        compiler.compiler, KINDS[kind], [*map(Path, sources), SHIM], include_dirs, defines, output_kind, link_flags
    )


def write_sources(files: Mapping[str, str]) -> Path:
    """Write files, given by relative path, to a folder of the cache. The same texts get the same folder, so builds stay cached."""
    folder = f"sources-{_key(*itertools.chain(*sorted(files.items())))}"
    for name, text in files.items():
        _cached(f"{folder}/{name}", lambda output, text=text: Path(output).write_text(text))
    return _cache_folder() / folder


def _build(compiler, kind, sources, include_dirs, defines, output_kind, libraries=()) -> Path:
    compile_flags, link_flags = OUTPUTS[output_kind]
    preprocess = [f"-I{folder}" for folder in (HERE, *include_dirs)] + [f"-D{name}" for name in defines]

    def build_object(source: Path) -> Path:
        flags = [*COMMON, *WARNINGS, *compile_flags, *(kind.shim if source == SHIM else kind.flags)]
        command = [compiler, *flags, *preprocess, "-x", "c++", str(source)]
        # Folders and definitions affect the key only through the preprocessed source.
        key = _key(_version(compiler), *flags, _run([*command, "-E"]))
        return _cached(f"{source.stem}-{key}.o", lambda output: _run([*command, "-c", "-o", output]))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(build_object, sources)]
    command = [compiler, *COMMON, *kind.flags, *link_flags, *objects, *libraries]
    suffix = sysconfig.get_config_var("EXT_SUFFIX") if output_kind == "module" else ""
    name = f"{sources[0].stem}-{_key(_version(compiler), *command)}{suffix}"
    return _cached(name, lambda output: _run([*command, "-o", output]))


def _cached(name: str, make) -> Path:
    """Return the cached file of this name; `make(path)` creates it. One process creates it, others wait."""
    path = _cache_folder() / name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        if not path.exists():
            unfinished = os.path.join(folder, path.name)
            make(unfinished)
            os.replace(unfinished, path)
    return path


def _cache_folder() -> Path:
    given = os.environ.get("KCD_TEST_CACHE")
    folder = Path(given) if given else Path(tempfile.gettempdir()) / f"kcd_ext-simt-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise BuildError(f"{folder} belongs to another user: set KCD_TEST_CACHE to a folder that you own")
    return folder


@functools.cache
def _version(compiler: str) -> str:
    return _run([compiler, "--version"])


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stderr[-8000:]}")
    return done.stdout
