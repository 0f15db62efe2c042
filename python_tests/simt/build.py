"""Compiles tests of CUDA kernels for the CPU: the caller's sources with the shim, plain or under a sanitizer.

Results are cached by what the preprocessor makes of each source, the flags and the compiler, under the environment variable
KCD_TEST_CACHE or a folder of the user's in the system's temporary one.
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
TIMEOUT = 300  # seconds, for one run of the compiler


@dataclass(frozen=True)
class Kind:
    """A way to build. compilers: in order of preference; flags: compiling and linking; shim: in place of flags for simt.cpp."""

    compilers: tuple[str, ...]
    flags: tuple[str, ...]
    shim: tuple[str, ...]


_ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
KINDS = {
    "plain": Kind(("g++", "clang++"), (), ()),
    "asan": Kind(("g++", "clang++"), _ADDRESS, _ADDRESS),
    # The runtime of clang is some ten times as fast here as that of gcc 12.
    "tsan": Kind(("clang++-19", "clang++", "g++"), ("-fsanitize=thread",), ("-DSIMT_TSAN",)),
}
RACE_FOUND = 66  # exit status under "tsan"


class BuildError(RuntimeError):
    """The compiler's command and what it said."""


@dataclass(frozen=True)
class Availability:
    """True where a kind can be built and run; else `reason` says why not."""

    compiler: str | None
    reason: str = ""

    def __bool__(self) -> bool:
        return self.compiler is not None


def environment() -> dict[str, str]:
    """To run what was built: this process's environment, with the sanitizers' options as the tests expect them."""
    return {
        **os.environ,
        "ASAN_OPTIONS": "detect_stack_use_after_return=0",  # else a mapping for every CUDA thread
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": f"exitcode={RACE_FOUND}",
    }


@functools.cache
def available(kind: str) -> Availability:
    """Whether a program of this kind can be built and run here, tried on a tiny one."""
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
    """Compiles `sources` (C++, whatever their suffix) and the shim, in parallel, and links them.

    kind: of KINDS. include_dirs: besides the shim's own. defines: "NAME" or "NAME=VALUE", also for the shim.
    output_kind: "executable", or "module": a shared library that Python can import, with undefined symbols left to Python.
    link_flags: libraries and where they are.
    Returns the cached file, named after the first source. Raises BuildError.
    """
    compiler = available(kind)
    if not compiler:
        raise BuildError(compiler.reason)
    return _build(
        compiler.compiler, KINDS[kind], [*map(Path, sources), SHIM], include_dirs, defines, output_kind, link_flags
    )


def write_sources(files: Mapping[str, str]) -> Path:
    """A folder in the cache with these texts, by path inside it: always the same one, so that what is compiled is cached too."""
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
        # Folders and definitions count through what they lead to.
        key = _key(_version(compiler), *flags, _run([*command, "-E"]))
        return _cached(f"{source.stem}-{key}.o", lambda output: _run([*command, "-c", "-o", output]))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(build_object, sources)]
    command = [compiler, *COMMON, *kind.flags, *link_flags, *objects, *libraries]
    suffix = sysconfig.get_config_var("EXT_SUFFIX") if output_kind == "module" else ""
    name = f"{sources[0].stem}-{_key(_version(compiler), *command)}{suffix}"
    return _cached(name, lambda output: _run([*command, "-o", output]))


def _cached(name: str, make) -> Path:
    """The file of this name in the cache; `make(path)` makes it. Of several processes one does so; the others wait for it."""
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
        raise BuildError(f"{folder} belongs to somebody else; set KCD_TEST_CACHE to a folder of yours")
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
