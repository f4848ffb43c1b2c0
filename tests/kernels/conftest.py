"""Tests that run kernels in Triton's interpreter are skipped where the installed interpreter itself cannot run."""

import importlib.util

import numpy as np
import pytest


def _interpreter_obstacle() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None  # the tests skip themselves
    import triton

    try:
        int(np.zeros(1))
    except TypeError:
        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
            return f"the interpreter of Triton {triton.__version__} needs a numpy before 2.4, got {np.__version__}"
    return None


def pytest_collection_modifyitems(config, items):
    reason = _interpreter_obstacle() if config.option.device == "cpu" else None  # a GPU runs the kernels themselves
    for item in items:
        if reason and "tests/kernels/" in item.nodeid and "interpret" in item.nodeid:
            item.add_marker(pytest.mark.skip(reason=reason))
