"""Integer arithmetic of launchers against Triton's."""

import pytest
from bestrq2.kernels.integers import ceil_div, power_of_2


def test_the_same_as_triton():
    triton = pytest.importorskip("triton")
    for number in (1, 2, 3, 15, 16, 17, 63, 64, 65, 8191, 8192, 8193, 2**31 - 1):
        assert power_of_2(number) == triton.next_power_of_2(number)
        for size in (1, 3, 16, 64):
            assert ceil_div(number, size) == triton.cdiv(number, size)
    assert ceil_div(0, 8) == 0
