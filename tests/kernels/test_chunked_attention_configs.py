"""Choice among the shipped tiles of chunked attention."""

import pytest

pytest.importorskip("triton")

from bestrq2.kernels import tuning
from bestrq2.kernels.chunked_attention.launch import config_name


def name_of(names, kernel, head_dim, fp32=False, key_mask=False, positions=True):
    return config_name(names, kernel, head_dim, fp32, key_mask=key_mask, positions=positions)


def test_inputs_and_head_sizes_with_tiles_of_their_own():
    names = {
        "k/64",
        "k/64/key_mask",
        "k/72/no_positions",
        "k/128",
        "k/128/fp32",
        "k/128/fp32/no_positions",
        "k/72/fp32",
    }
    assert name_of(names, "k", 16) == name_of(names, "k", 64) == "k/64"
    assert name_of(names, "k", 64, key_mask=True) == "k/64/key_mask"
    assert name_of(names, "k", 64, positions=False) == "k/64", "nothing special is there"
    assert name_of(names, "k", 64, key_mask=True, positions=False) == "k/64/key_mask"
    assert name_of(names, "k", 72) == name_of(names, "k", 80, positions=False) == "k/128"
    assert name_of(names, "k", 72, positions=False) == "k/72/no_positions"
    assert name_of(names, "k", 72, fp32=True) == name_of(names, "k", 72, fp32=True, positions=False) == "k/72/fp32"
    assert name_of(names, "k", 100, fp32=True, key_mask=True, positions=False) == "k/128/fp32/no_positions"


@pytest.mark.parametrize("architecture", [80, 86, 89, 90, 100, 120])
def test_tiles_of_the_judged_kernels_do_not_change_with_positions(architecture):
    """The tiles measured on an H100, with positions, stay those of their kernels."""
    configs = tuning.merged(tuning.FOLDER, "chunked_attention", None, architecture)
    for kernel in ("forward", "backward_query", "backward_key"):
        assert name_of(configs, kernel, 64) == f"{kernel}/64"
        assert name_of(configs, kernel, 72) == f"{kernel}/128"
