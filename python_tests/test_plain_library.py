"""libkcd_ext.so, built by CMake and Ninja alone: it serves the package, and no code for one processor is in another's."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_extension import ROOT, python

from kcd_ext import ops

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plain_library(tmp_path_factory) -> Path:
    """libkcd_ext.so by cmake and ninja alone."""
    if not (shutil.which("cmake") and shutil.which("ninja")):
        pytest.skip("needs cmake and ninja")
    build = tmp_path_factory.mktemp("plain")
    no_network = {
        **os.environ,
        "PIP_NO_INDEX": "1",
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "CUDAARCHS": "90-real",  # of all the architectures one
    }
    for command in (
        ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), "-DCMAKE_CXX_FLAGS=-Werror"],
        ["ninja", "-j", os.environ["OMP_NUM_THREADS"], "-C", str(build)],  # a share of the processors
    ):
        done = subprocess.run(command, capture_output=True, text=True, env=no_network)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return build / "libkcd_ext.so"


def test_the_plain_library_serves_the_package(plain_library):
    code = """
import kcd_ext, sys, torch
assert "kcd_ext._C" not in sys.modules
z = torch.arange(12.0).view(3, 4).requires_grad_()
loss = kcd_ext.condensed_kd_loss(z, z.detach().flip(1), keep=2)
loss.backward()
print(repr(loss.item()), kcd_ext.ops.build_info["instruction_sets"])
"""
    plain, module = (
        python(code, KCD_LIBRARY=str(plain_library)),
        python(code.replace('assert "kcd_ext._C" not in', 'assert "kcd_ext._C" in')),
    )
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout == module.stdout
    built_for = python(
        "import kcd_ext.ops as o; print(o.build_info['cuda_architectures'])", KCD_LIBRARY=str(plain_library)
    )
    assert built_for.stdout == ("['sm_90']\n" if shutil.which("nvcc") else "[]\n")


def test_a_second_plain_library_is_an_error_and_no_abort(plain_library):
    done = python(f"""
import ctypes, kcd_ext, torch
torch.ops.load_library({str(plain_library)!r})
library = ctypes.CDLL({str(plain_library)!r})
library.kcd_load_error.restype = ctypes.c_char_p
print(library.kcd_load_error().decode())
print(kcd_ext.condensed_kd_loss(torch.zeros(2, 3), torch.zeros(2, 3)).item())
""")
    assert done.returncode == 0 and "another copy of kcd_ext" in done.stdout and done.stdout.endswith("0.0\n"), (
        done.stdout + done.stderr
    )


def test_no_code_for_one_processor_can_reach_another(plain_library):
    """Objects compiled for an instruction set share nothing: a weak symbol could be linked in place of the baseline's."""
    for name in ops.build_info["instruction_sets"]:
        objects = list(plain_library.parent.glob(f"csrc/CMakeFiles/kernels_{name}.dir/**/*.o"))
        assert len(objects) == 2
        for path in objects:
            symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
            assert not re.search(r"^[0-9a-f]* [WVu] ", symbols, re.M), f"{path}:\n{symbols}"
            visible = re.findall(r"^[0-9a-f]+ [A-Z] (.*)$", symbols, re.M)
            assert visible and all(symbol.startswith(f"kcd::cpu::{name}::") for symbol in visible), visible
