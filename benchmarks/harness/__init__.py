"""The benchmark harness: one measuring loop, one set of candidates and one report for every kind of device.

`benchmarks/run.py` is its command line; `benchmarks/gpu` uses it for its section benchmarks. Each kind of device is one class:
`cpu.Cpu`, `cuda.Cuda`.
"""
