"""The kinds of devices by name."""

from .cpu import Cpu
from .cuda import Cuda

DEVICES = {kind.kind: kind for kind in (Cpu, Cuda)}
