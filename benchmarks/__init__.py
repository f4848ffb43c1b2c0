"""Benchmarks of the three operations against every strong peer. Start with ``python benchmarks/run.py --quick``."""
