"""Bounds from the machine code of the Triton kernels, without a GPU: ``python benchmarks/machine_code/report.py``."""
