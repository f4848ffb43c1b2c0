"""The stages of ``python benchmarks/gpu_run.py``: everything a GPU has to show, within a fixed time."""
