"""Choice of the configuration of a launch of quantize, and constraints on all of them."""

import pytest

pytest.importorskip("triton")

from bestrq2.kernels import tuning
from bestrq2.kernels.quantize import CANDIDATES, FEW_ROWS, GROUP, STEP, config_for, split_codebook

CONFIGS = [
    *((name, config) for file in tuning.shipped("quantize") for name, config in file.configs.items()),
    *((name, config) for name, configs in CANDIDATES.items() for config in configs),
]


@pytest.mark.parametrize(("name", "config"), CONFIGS, ids=lambda v: v if isinstance(v, str) else "")
def test_tiles_hold_whole_groups(name, config):
    assert config["BN"] % (GROUP.value * STEP.value) == 0
    assert config["BK"] == 16, "more takes registers, less makes products too small"


def test_few_rows_take_their_own_tile():
    configs = {"quantize/16": {"BM": 256}, "quantize/16/few": {"BM": 64}, "quantize/32": {"BM": 32}}
    assert config_for(configs, 16, FEW_ROWS)["BM"] == 256
    assert config_for(configs, 16, FEW_ROWS - 1)["BM"] == 64
    assert config_for(configs, 9, 1)["BM"] == 64, "padded to 16 dimensions"
    assert config_for(configs, 20, 1)["BM"] == 32


def test_the_codebook_is_filled_up_with_its_first_code():
    import torch

    generator = torch.Generator().manual_seed(1)
    codebook = torch.nn.functional.normalize(torch.randn(2, 70, 13, generator=generator), dim=-1)
    high, low = split_codebook(codebook, 64)
    assert high.shape == low.shape == (2, 128, 16)
    assert torch.equal(high[:, 70:], high[:, :1].expand(-1, 58, -1))
    assert torch.equal(low[:, 70:], low[:, :1].expand(-1, 58, -1))
    both = high.double() + low.double()  # the largest value lies in [0.5, 1), so the power of two is 1
    assert (both[:, :70, :13] - codebook).abs().max() < 2.0**-22
    assert not both[..., 13:].any()
