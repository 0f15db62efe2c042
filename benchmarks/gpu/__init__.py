"""The kit for a GPU: builds, checks and measures the CUDA kernels; benchmarks/gpu_check.sh is its door.

`__main__` runs the sections of `sections`, each a process of its own, and writes the results through `report`.  A section says
how it went by its exit status, by the last line it prints, and, where it has figures, by a JSON file.
"""
