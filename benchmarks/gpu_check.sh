#!/usr/bin/env bash
# Builds, checks and measures kcd_ext's CUDA kernels on this machine's GPU:
#
#   benchmarks/gpu_check.sh [--wheels FOLDER] [--out FOLDER] [--only SECTION,...] [--minutes 9]
#
# It needs an NVIDIA GPU with its driver, nvcc, cmake, ninja and a Python with PyTorch for CUDA (python3, or the one that the
# variable PYTHON names); no network, no scikit-build-core, no pybind11.  The checkout may be read-only.
#
# Sections: build, conformance, training, sanitizers, graphs, large, benchmarks, reproduction.  Each runs by itself within its share of the
# minutes; one that fails or hangs does not hide the others.  build always runs, unless the variable KCD_LIBRARY names a
# libkcd_ext.so.  FOLDER of --out (default: $OUT if it is set, else benchmarks/results) gets three files named after the GPU:
# .json with everything, .md to read, .log with all output.  They take the place of an earlier run's.
# Exit status: 0 if every section passed or cannot run here, 1 if one failed, 2 if something that all of them need is missing.
#
# Where the machine lacks pytest, hypothesis or Liger-Kernel (whose losses are measured for comparison), prepare their wheels
# elsewhere, for its Python, and hand them over:
#
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#       --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d wheels \
#       pytest pluggy iniconfig packaging pygments hypothesis sortedcontainers liger-kernel \
#       accelerate safetensors tqdm tyro docstring_parser typeguard matplotlib contourpy cycler kiwisolver pyparsing
#   benchmarks/gpu_check.sh --wheels wheels
#
# The reproduction needs CIFAR-100: the variable KCD_CIFAR100 names it as `kcd distill --data` does (a path to the archive, say).
#   KCD_CIFAR100=cifar-100-python.tar.gz benchmarks/gpu_check.sh --only reproduction --minutes 9
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
