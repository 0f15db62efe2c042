"""The GPU kit: it builds, checks and measures the CUDA kernels. Start it with benchmarks/gpu_check.sh.

`__main__` runs each section of `sections` in a separate process, and `report` writes the results. A section reports through its
exit status, the last line that it prints and, for figures, a JSON file.
"""
