#!/usr/bin/env bash
# Build, check and measure kcd_ext's CUDA kernels on this machine's GPU:
#
#   benchmarks/gpu_check.sh [--wheels FOLDER] [--out FOLDER] [--only SECTION,...] [--minutes 8.5]
#
# Requirements: an NVIDIA GPU with its driver, nvcc, cmake, ninja, and a Python with its headers, PyTorch for CUDA and pybind11
# (python3, or the one named by the environment variable PYTHON). No network, no scikit-build-core. The checkout may be read-only.
#
# Sections: build, conformance, training, sanitizers, graphs, large, ncu, benchmarks, reproduction. Each runs in its own process
# within its share of the minutes, which count from the start of this script. If one fails or hangs, the others still run.
#
#   build         compile for this GPU with cmake and ninja, or load the module that the variable KCD_LIBRARY names; one call must
#                 match the reference
#   conformance   the operator's tests marked gpu: autograd, torch.library's checks, torch.compile, CUDA graphs and process groups
#                 (gloo with two ranks, NCCL with one); in parallel if pytest-xdist is installed
#   training      the trainer's and the condenser's tests marked gpu
#   sanitizers    memcheck, racecheck, initcheck and synccheck; loss, selection and gradient are compared with the reference
#   graphs        CUDA graphs on two streams; no call may synchronise
#   large         logits of more than 2^31 elements
#   ncu           why warps stall, from Nsight Compute
#   benchmarks    times beside PyTorch's and the floors, also replayed from CUDA graphs; memory; launches
#   reproduction  the paper's comparison with a short schedule, if KCD_CIFAR100 is set
#
# The folder of --out (default: $OUT if set, else benchmarks/results) gets three files named after the GPU: .json with everything,
# .md to read, .log with all output. They replace those of an earlier run.
#
# Exit status: 0 if every section passed or cannot run here, 1 if one failed, 2 if a common requirement is missing. The last line
# names what failed and what cannot run here. Whatever can be fixed on the machine is a failure: a missing Python module, tool or
# test, or a timeout. What the machine forbids is not: its performance counters (ERR_NVGPUCTRPERM), or a device that a sanitizer
# does not support.
#
# If the machine lacks Python modules, or Liger-Kernel (whose losses are measured for comparison), download wheels elsewhere, for
# the machine's Python, and pass them:
#
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#       --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d wheels \
#       pybind11 pytest pluggy iniconfig packaging pygments hypothesis sortedcontainers pytest-xdist execnet liger-kernel pillow \
#       accelerate safetensors tqdm tyro docstring_parser typeguard matplotlib contourpy cycler kiwisolver pyparsing
#   benchmarks/gpu_check.sh --wheels wheels
#
# The reproduction needs CIFAR-100: KCD_CIFAR100 names it like `kcd distill --data` (for example by the path of the archive).
#   KCD_CIFAR100=cifar-100-python.tar.gz benchmarks/gpu_check.sh --only reproduction --minutes 8.5
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
command -v "$python" >/dev/null || {
  echo "gpu_check: $python was not found: set the environment variable PYTHON to a Python that has PyTorch for CUDA" >&2
  exit 2
}
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUTF8=1
export PYTHONPATH=$checkout/benchmarks:$checkout${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m gpu "$@"
