#!/usr/bin/env bash
# Builds, checks and measures kcd_ext's CUDA kernels on this machine's GPU:
#
#   benchmarks/gpu_check.sh [--wheels FOLDER] [--out FOLDER] [--only SECTION,...] [--minutes 8.5]
#
# It needs an NVIDIA GPU with its driver, nvcc, cmake, ninja and a Python with its headers, PyTorch for CUDA and pybind11 (python3,
# or the one that the variable PYTHON names); no network, no scikit-build-core.  The checkout may be read-only.
#
# Sections: build, conformance, training, sanitizers, graphs, large, ncu, benchmarks, reproduction.  Each runs by itself within
# its share of the minutes, which begin with this script; one that fails or hangs does not hide the others.
#
#   build         cmake and ninja for this GPU alone; where the variable KCD_LIBRARY names a compiled module, that one is taken.
#                 One call must give what the reference gives
#   conformance   the operator's tests that are marked gpu: with autograd, torch.library's checks, torch.compile, CUDA graphs and
#                 process groups (gloo with two ranks, NCCL with one); side by side where pytest-xdist is installed
#   training      the trainer's and the condenser's tests that are marked gpu
#   sanitizers    memcheck, racecheck, initcheck, synccheck; loss, selection and gradient against the reference meanwhile
#   graphs        CUDA graphs on two streams, and that no call waits for the device
#   large         logits of more than 2^31 elements
#   ncu           what warps wait for, by Nsight Compute
#   benchmarks    times beside PyTorch's and the floors, also replayed from CUDA graphs; memory; launches
#   reproduction  the paper's comparison in a short schedule, where KCD_CIFAR100 asks for it
#
# FOLDER of --out (default: $OUT if it is set, else benchmarks/results) gets three files named after the GPU: .json with
# everything, .md to read, .log with all output.  They take the place of an earlier run's.
#
# Exit status: 0 if every section passed or cannot run here, 1 if one failed, 2 if something that all of them need is missing.
# The last line names what failed and what cannot run here.  What can be mended here is a failure: a Python module, a tool or a
# test that is missing, time that ran out.  What the machine does not permit is not: its performance counters
# (ERR_NVGPUCTRPERM), a device that a sanitizer does not support.
#
# Where the machine lacks a Python module, or Liger-Kernel (whose losses are measured for comparison), prepare wheels elsewhere,
# for its Python, and hand them over:
#
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#       --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d wheels \
#       pybind11 pytest pluggy iniconfig packaging pygments hypothesis sortedcontainers pytest-xdist execnet liger-kernel pillow \
#       accelerate safetensors tqdm tyro docstring_parser typeguard matplotlib contourpy cycler kiwisolver pyparsing
#   benchmarks/gpu_check.sh --wheels wheels
#
# The reproduction needs CIFAR-100: the variable KCD_CIFAR100 names it as `kcd distill --data` does (a path to the archive, say).
#   KCD_CIFAR100=cifar-100-python.tar.gz benchmarks/gpu_check.sh --only reproduction --minutes 8.5
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
command -v "$python" >/dev/null || {
  echo "gpu_check: $python is not there: name a Python that has PyTorch for CUDA in the variable PYTHON" >&2
  exit 2
}
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUTF8=1
export PYTHONPATH=$checkout/benchmarks:$checkout${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m gpu "$@"
