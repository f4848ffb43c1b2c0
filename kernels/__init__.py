"""Triton kernels, installed as ``bestrq2.kernels``. Importing this package does not import triton."""
