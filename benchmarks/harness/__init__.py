"""The benchmark harness: one loop, one set of candidates, one report for every kind of device.

`benchmarks/run.py` is its door; `benchmarks/gpu` uses it for its section benchmarks.  What differs between kinds of devices is one
class each: `cpu.Cpu`, `cuda.Cuda`.
"""
