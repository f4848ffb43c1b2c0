"""One file per operation: shapes, cases and providers. The contract is the docstring of ``benchmarks/common.py``."""
