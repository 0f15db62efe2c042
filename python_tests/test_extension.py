"""The compiled extension: its ABI, its instruction sets, the effects of importing it, and its build."""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kcd_ext
from kcd_ext import _extension, ops

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc"
PYTHON = f"-DPython_EXECUTABLE={sys.executable}"  # an option of cmake


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter, in a folder without sources."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", env={**os.environ, **env}
    )


def test_build_info_describes_the_build():
    info = ops.build_info
    assert info["version"] == kcd_ext.__version__ and info["compiler"]
    assert all(re.fullmatch(r"sm_\d+", name) for name in info["cuda_architectures"])
    assert bool(info["cuda_architectures"]) == info["cuda_compiler"].startswith("nvcc ")
    assert info["instruction_set_in_use"] in info["instruction_sets"] and info["instruction_sets"][-1] == "baseline"
    assert sys.modules["kcd_ext._C"].build_info() == info


USE = """
import torch, kcd_ext
z = torch.randn(40, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    student = z.to(dtype, copy=True).requires_grad_()
    loss, knowledge = kcd_ext.condensed_kd_loss(student, z.flip(1).to(dtype), keep=0.5, return_knowledge=True)
    loss.backward()
    print(loss.item(), student.grad.double().square().sum().item(), *knowledge.selected.nonzero()[:, 0].tolist())
"""


@pytest.mark.parametrize("name", ops.build_info["instruction_sets"])
def test_each_instruction_set_gives_the_same_results(name):
    """KCD_ISA selects the instruction set, if the processor supports it."""
    done = python(f"{USE}print(kcd_ext.ops.build_info['instruction_set_in_use'])", KCD_ISA=name)
    if name != "baseline" and f"got '{name}'" in done.stderr:
        pytest.skip(f"this processor has no {name}")
    *lines, in_use = done.stdout.splitlines()
    assert in_use == name and len(lines) == 4
    own = io.StringIO()
    with contextlib.redirect_stdout(own):
        exec(USE, {})
    for line, expected in zip(lines, own.getvalue().splitlines(), strict=True):
        numbers, wanted = ([float(x) for x in text.split()] for text in (line, expected))
        assert numbers == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_unknown_instruction_set_raises():
    done = python("import kcd_ext", KCD_ISA="sse9")
    assert done.returncode != 0 and re.search(r"KCD_ISA must be one of .*baseline.* got 'sse9'", done.stderr)


PROCESS_STATE = """
import ctypes, warnings, torch
def state():
    tiny = torch.full((200_000,), 1e-40) * torch.tensor([1.0])   # flush-to-zero on any of torch's threads would make it 0
    return [torch.get_num_threads(), torch.get_num_interop_threads(), ctypes.CDLL(None).fegetround(), tiny.min().item(),
            1e-310 * 1.0, [str(f) for f in warnings.filters], str(torch.get_default_dtype()), str(torch.get_default_device()),
            torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(), torch.backends.mkldnn.enabled,
            torch.get_float32_matmul_precision(), torch.random.get_rng_state().sum().item()]
torch.manual_seed(0)
before = state()
import kcd_ext
imported = state()
z = torch.randn(64, 1000, generator=torch.Generator().manual_seed(1), requires_grad=True)
kcd_ext.condensed_kd_loss(z, z.detach().flip(0), keep=0.5).backward()
used = state()
assert before == imported, (before, imported)
assert before == used, (before, used)
print("same")
"""


@pytest.mark.slow
def test_import_and_use_leave_process_state_unchanged():
    done = python(PROCESS_STATE)
    assert done.stdout.strip() == "same", done.stderr


def test_import_loads_no_packages_except_torch_and_numpy():
    done = python(
        "import sys; before = set(sys.modules); import torch, numpy.random; base = set(sys.modules); import kcd_ext;"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - base} - set(sys.stdlib_module_names)))"
    )
    assert done.stdout.strip() == "['kcd_ext']", done.stdout + done.stderr


@pytest.mark.slow
def test_second_copy_of_the_extension_raises_import_error(tmp_path):
    installed = Path(sys.modules["kcd_ext._C"].__file__)
    copy = tmp_path / installed.name
    shutil.copy(installed, copy)
    done = python(f"""
import importlib.util, kcd_ext
try:
    spec = importlib.util.spec_from_file_location("_C", {str(copy)!r})
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
except ImportError as error:
    print("ImportError:", error)
import torch
print(kcd_ext.condensed_kd_loss(torch.zeros(2, 3), torch.zeros(2, 3)).item())
""")
    assert done.returncode == 0 and "another copy of kcd_ext" in done.stdout and done.stdout.endswith("0.0\n"), (
        done.stdout + done.stderr
    )


def copy_sources(folder: Path) -> Path:
    """Copy csrc/ and kcd_ext/ without compiled files; return the folder."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "kcd_ext", folder / "kcd_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


@pytest.mark.parametrize("changed", [None, pytest.param("kernels.h", marks=pytest.mark.slow)])
def test_clone_uses_installed_extension_only_if_built_from_the_same_sources(tmp_path, changed):
    clone, site = copy_sources(tmp_path / "clone"), tmp_path / "site"
    (site / "kcd_ext").mkdir(parents=True)
    extension = Path(shutil.copy(sys.modules["kcd_ext._C"].__file__, site / "kcd_ext"))
    (site / "kcd_ext-1.dist-info").mkdir()
    (site / "kcd_ext-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: kcd-ext\nVersion: 1\n")
    if changed:
        (clone / "csrc" / changed).write_text("")
    path = [str(clone), str(site), str(Path(torch.__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {path}; import kcd_ext; print(kcd_ext.__file__, kcd_ext._C.__file__)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    if changed:
        assert done.returncode != 0 and "csrc has changed since" in done.stderr.splitlines()[-1]
    else:
        assert done.stdout.split() == [str(clone / "kcd_ext" / "__init__.py"), str(extension)], done.stderr


def test_source_hash_changes_with_files_and_paths_of_sources_only(tmp_path):
    csrc = copy_sources(tmp_path) / "csrc"
    built_from = ops.build_info["sources"]
    assert _extension._hash_of(csrc) == built_from
    (csrc / ".#kernels.h").symlink_to("nobody@nowhere")
    (csrc / "notes.txt").write_text("no source")
    assert _extension._hash_of(csrc) == built_from
    (csrc / "cpu" / "new.cpp").write_text("")
    added = _extension._hash_of(csrc)
    (csrc / "cpu" / "new.cpp").rename(csrc / "cuda" / "new.cpp")
    assert len({built_from, added, _extension._hash_of(csrc)}) == 3


@pytest.mark.slow
def test_csrc_of_another_package_is_ignored(tmp_path):
    (tmp_path / "site" / "csrc").mkdir(parents=True)
    (tmp_path / "site" / "csrc" / "kernels.h").write_text("")
    assert _extension._sources_beside(tmp_path / "site" / "kcd_ext") is None
    assert _extension._sources_beside(copy_sources(tmp_path / "clone") / "kcd_ext") == tmp_path / "clone" / "csrc"


def test_clone_without_installed_extension_explains_how_to_install(tmp_path):
    code = f"""
import sys
from importlib import metadata
def not_installed(name):
    raise metadata.PackageNotFoundError(name)
metadata.distribution = not_installed
sys.path[:0] = [{str(copy_sources(tmp_path))!r}, {str(Path(torch.__file__).parents[1])!r}]
import kcd_ext
"""
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and done.stderr.splitlines()[-1].endswith("run pip install . first")


@pytest.mark.slow
def test_old_torch_raises_import_error_with_both_versions():
    done = python("import torch; torch.__version__ = '2.9.1+cu130'; import kcd_ext")
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: kcd_ext needs PyTorch 2.10 or newer, found 2.9.1+cu130"
    )


# ---- torch's ABI


TORCH_INCLUDE = Path(torch.__file__).parent / "include"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_declared_abi_matches_torchs_headers():
    """A conflicting declaration does not compile."""
    source = (
        "#define USE_CUDA 1\n#include <torch/csrc/inductor/aoti_torch/c/shim.h>\n#include <torch/csrc/stable/c/shim.h>\n"
        "#define KCD_TORCH_HEADERS\n#include <torch/abi.h>\n"
    )
    compile_ = ["g++", "-std=c++20", "-fsyntax-only", "-x", "c++", "-", f"-isystem{TORCH_INCLUDE}", f"-I{SOURCES}"]
    done = subprocess.run(compile_, input=source, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    # A wrong declaration fails the same check.
    wrong = source + 'extern "C" int32_t aoti_torch_get_dim(AtenTensorHandle, int32_t*);\n'
    assert subprocess.run(compile_, input=wrong, text=True, capture_output=True).returncode != 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_declared_dlpack_matches_torchs_header():
    """Compare the size and offsets of every structure in csrc/dlpack.h, and every constant."""
    pairs = {
        "Version": ("DLPackVersion", {"major": "major", "minor": "minor"}),
        "Device": ("DLDevice", {"device_type": "device_type", "device_id": "device_id"}),
        "DataType": ("DLDataType", {name: name for name in ("code", "bits", "lanes")}),
        "Array": (
            "DLTensor",
            {name: name for name in ("data", "device", "ndim", "dtype", "shape", "strides", "byte_offset")},
        ),
        "ManagedTensor": (
            "DLManagedTensorVersioned",
            {
                "version": "version",
                "manager_ctx": "manager_ctx",
                "deleter": "deleter",
                "flags": "flags",
                "array": "dl_tensor",
            },
        ),
        "ExchangeApi": (
            "DLPackExchangeAPI",
            {
                "version": "header",
                "allocate": "managed_tensor_allocator",
                "to_managed": "managed_tensor_from_py_object_no_sync",
                "to_python": "managed_tensor_to_py_object_no_sync",
                "view": "dltensor_from_py_object_no_sync",
                "current_stream": "current_work_stream",
            },
        ),
    }
    numbers = {"kMajorVersion": "DLPACK_MAJOR_VERSION", "kCpu": "kDLCPU", "kInt": "kDLInt", "kFloat": "kDLFloat"}
    numbers |= {"kBfloat": "kDLBfloat", "kUInt": "kDLUInt", "kBool": "kDLBool"}
    lines = ["#include <cstddef>", "#include <ATen/dlpack.h>", "#include <dlpack.h>", "namespace d = kcd::dlpack;"]
    for ours, (theirs, fields) in pairs.items():
        lines.append(f"static_assert(sizeof(d::{ours}) == sizeof({theirs}));")
        lines += [f"static_assert(offsetof(d::{ours}, {a}) == offsetof({theirs}, {b}));" for a, b in fields.items()]
    lines += [f"static_assert(d::{ours} == {theirs});" for ours, theirs in numbers.items()]
    compile_ = ["g++", "-std=c++20", "-fsyntax-only", "-x", "c++", "-", f"-I{SOURCES}", f"-isystem{TORCH_INCLUDE}"]
    done = subprocess.run(compile_, input="\n".join(lines), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    wrong = "\n".join(lines).replace("d::kUInt == kDLUInt", "d::kUInt == kDLInt")
    assert subprocess.run(compile_, input=wrong, text=True, capture_output=True).returncode != 0


def declared_functions() -> set[str]:
    text = (SOURCES / "torch" / "abi.h").read_text()
    body = text[text.index("#define KCD_TORCH_ABI(X)") : text.index("#define X(name, args)")]
    return set(re.findall(r"X\((\w+),", body))


def test_declared_functions_are_in_torchs_headers_and_documented():
    headers = "".join(
        (TORCH_INCLUDE / "torch" / "csrc" / path).read_text()
        for path in ("inductor/aoti_torch/c/shim.h", "stable/c/shim.h")
    )
    document = (ROOT / "docs" / "internals" / "abi.md").read_text()
    functions = declared_functions()
    assert len(functions) > 15
    for function in functions:
        assert re.search(rf"\b{function}\b", headers) or function.startswith("aoti_torch_dtype_"), (
            f"{function} is not in torch's headers"
        )
        assert f"`{function}`" in document, f"docs/internals/abi.md does not list {function}"
    assert set(re.findall(r"^\| `(\w+)`", document, re.M)) == functions, "docs/internals/abi.md lists unused functions"


# ---- builds


@pytest.mark.slow
def test_build_stops_on_unsupported_platforms(tmp_path):
    if not shutil.which("cmake"):
        pytest.skip("needs cmake")
    for system, processor in (("Windows", "AMD64"), ("Darwin", "arm64"), ("Linux", "riscv64")):
        toolchain = tmp_path / "toolchain.cmake"
        toolchain.write_text(
            f"set(CMAKE_SYSTEM_NAME {system})\nset(CMAKE_SYSTEM_PROCESSOR {processor})\n"
            "set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)\nset(CMAKE_CXX_COMPILER_WORKS 1)\n"
        )
        done = subprocess.run(
            [
                "cmake",
                "-S",
                str(ROOT),
                "-B",
                str(tmp_path / f"{system}-{processor}"),
                f"-DCMAKE_TOOLCHAIN_FILE={toolchain}",
            ],
            capture_output=True,
            text=True,
        )
        assert (
            done.returncode != 0
            and f"kcd_ext builds on Linux x86-64 and aarch64; this is {system} {processor}"
            in " ".join(done.stderr.split())
        )


NVCC = """#!/bin/sh
echo "{note}"
echo "error: -- unsupported GNU version! gcc versions later than 9 are not supported!" >&2
exit 1
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [
        *("PATH", "PATH with empty CUDACXX", "KCD_CUDA=ON", "KCD_CUDA=OFF", "PATH with silent nvcc"),
        *("CUDACXX", "CUDACXX of a missing file", "CUDACXX with options", "CUDACXX with a space"),
    ],
)
def test_broken_nvcc_is_reported(tmp_path, place):
    """CMake warns with nvcc's first error, or fails if CUDA was requested. It checks again in every run."""
    if not shutil.which("cmake") or not shutil.which("ninja"):
        pytest.skip("needs cmake and ninja")
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("cmake", "ninja", "c++", "g++", "gcc", "cc", "ar", "ranlib", "nm", "ld", "as", "sh", "python3"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    nvcc = tmp_path / ("a space" if place.endswith("space") else "") / "nvcc"
    nvcc.parent.mkdir(exist_ok=True)
    nvcc.write_text("#!/bin/sh\nexit 3\n" if place == "PATH with silent nvcc" else NVCC.format(note="nvcc: a note"))
    nvcc.chmod(0o755)
    environment = {**os.environ, "PATH": str(tools)}
    if place.startswith("CUDACXX"):
        options = " -lineinfo -O1" if "options" in place else ""
        environment["CUDACXX"] = str(tmp_path / "none" if "missing" in place else nvcc) + options
    else:
        environment["PATH"] = f"{tmp_path}:{tools}"
        if "empty" in place:
            environment["CUDACXX"] = ""
    define = [f"-D{place}"] if place.startswith("KCD") else []
    command = [shutil.which("cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(tmp_path / "build"), PYTHON, *define]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    errors = " ".join(done.stderr.split())
    requested = place.startswith("CUDACXX") or place == "KCD_CUDA=ON"
    assert (done.returncode != 0) == requested, done.stdout + done.stderr
    assert "nvcc was not found" not in done.stdout
    if place == "KCD_CUDA=OFF":
        assert "CUDA" not in done.stdout + errors
        return
    assert ("CMake Error" if requested else "CMake Warning") in errors and "nvcc (" in errors
    reason = {"CUDACXX of a missing file": "o such file", "PATH with silent nvcc": "it failed with: 3"}
    assert reason.get(place, "unsupported GNU version! gcc versions later than 9") in errors
    if place == "PATH":
        nvcc.write_text("#!/bin/sh\nexit 0\n")  # now it works
        again = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert "Looking for a CUDA compiler" in again.stdout and "GNU version" not in again.stderr


@pytest.mark.slow
def test_build_with_torchs_headers_compiles(tmp_path):
    if not (shutil.which("cmake") and shutil.which("ninja")):
        pytest.skip("needs cmake and ninja")
    configure = [
        "cmake",
        "-G",
        "Ninja",
        "-S",
        str(ROOT),
        "-B",
        str(tmp_path),
        "-DKCD_TORCH_HEADERS=ON",
        PYTHON,
    ]
    objects = ["ops.cpp.o", "cpu_ops.cpp.o"] + (["cuda_ops.cpp.o", "device.cpp.o"] if shutil.which("nvcc") else [])
    compile_ = ["ninja", "-C", str(tmp_path), *(f"csrc/CMakeFiles/operators.dir/torch/{name}" for name in objects)]
    for command in (configure, compile_):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def built_by_cmake(tmp_path_factory) -> Path:
    """A build folder of plain cmake and ninja, offline, with warnings as errors."""
    if not (shutil.which("cmake") and shutil.which("ninja")):
        pytest.skip("needs cmake and ninja")
    build = tmp_path_factory.mktemp("build")
    environment = {**os.environ, "PIP_NO_INDEX": "1", "CUDAARCHS": "90-real"}  # one architecture, to save time
    for proxy in ("http_proxy", "https_proxy"):
        environment[proxy] = "http://127.0.0.1:9"
    for command in (
        ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), PYTHON, "-DCMAKE_CXX_FLAGS=-Werror"],
        ["ninja", "-j", os.environ["OMP_NUM_THREADS"], "-C", str(build)],  # this worker's share of the processors
    ):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return build


@pytest.mark.slow
def test_kcd_library_selects_a_module_built_with_cmake(built_by_cmake, tmp_path):
    (module,) = built_by_cmake.glob("_C*.so")
    code = f"{USE}import sys; print(sys.modules['kcd_ext._C'].__file__, kcd_ext.ops.build_info['cuda_architectures'])"
    named, own = python(code, KCD_LIBRARY=str(module)), python(USE)
    architectures = "['sm_90']" if shutil.which("nvcc") else "[]"
    assert named.stdout == f"{own.stdout}{module} {architectures}\n", named.stderr
    done = python("import kcd_ext", KCD_LIBRARY=str(tmp_path / "none.so"))
    assert "KCD_LIBRARY must name a compiled module of kcd_ext" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_instruction_sets_share_no_symbols(built_by_cmake):
    """The linker could use a weak symbol of another instruction set for the baseline."""
    for name in ops.build_info["instruction_sets"]:
        objects = list(built_by_cmake.glob(f"csrc/CMakeFiles/kernels_{name}.dir/**/*.o"))
        assert len(objects) == 2
        for path in objects:
            symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
            assert not re.search(r"^[0-9a-f]* [WVu] ", symbols, re.M), f"{path}:\n{symbols}"
            visible = re.findall(r"^[0-9a-f]+ [A-Z] (.*)$", symbols, re.M)
            assert visible and all(symbol.startswith(f"kcd::cpu::{name}::") for symbol in visible), visible
