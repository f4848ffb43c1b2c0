"""Kernels stay readable: related tensors and strides are one argument (kernels/chunked_attention/records.py)."""

import importlib

import pytest

pytest.importorskip("triton")

MOST = 26
MODULES = (
    *(
        "quantize",
        "log_mel",
        "short_attention",
        "chunked_attention.forward",
        "chunked_attention.backward",
        "chunked_attention.position",
    ),
    *("masked_cross_entropy.loss", "masked_cross_entropy.products", "masked_cross_entropy.softmax_gradient"),
)


@pytest.mark.parametrize("name", MODULES)
def test_number_of_arguments(name):
    module = importlib.import_module(f"bestrq2.kernels.{name}")
    kernels = [x for x in vars(module).values() if hasattr(x, "arg_names") and x.__module__ == module.__name__]
    assert kernels
    for kernel in kernels:
        print(f"{kernel.__name__}: {len(kernel.arg_names)}")
        assert len(kernel.arg_names) <= MOST
