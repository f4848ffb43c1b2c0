"""Counter-based random numbers: a pure function of (seed, counters), the same on every device and rank.

A mask drawn from the global position of a clip in the training order does not depend on how a batch is split over
ranks, on what ran before, or on the device, so resumed and distributed runs see the masks of the uninterrupted single
run. The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
"""

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def mix(*counters: int) -> int:
    """Hash integers to one of 64 bits, in order."""
    state = 0
    for counter in counters:
        state = (state + _GOLDEN + (counter & _MASK)) & _MASK
        state = ((state ^ (state >> 30)) * _M1) & _MASK
        state = ((state ^ (state >> 27)) * _M2) & _MASK
        state ^= state >> 31
    return state


def uniform(*counters: int) -> float:
    """A float in [0, 1) that depends on nothing but ``counters``."""
    return (mix(*counters) >> 11) * 2.0**-53


def _shift(state: Tensor, bits: int) -> Tensor:
    # Logical right shift: torch's >> copies the sign bit.
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _mix_tensor(state: Tensor, counter: Tensor) -> Tensor:
    # int64 arithmetic wraps modulo 2^64 on every device, which is what SplitMix64 needs.
    state = state + counter + _signed(_GOLDEN)
    state = (state ^ _shift(state, 30)) * _signed(_M1)
    state = (state ^ _shift(state, 27)) * _signed(_M2)
    return state ^ _shift(state, 31)


def random_keys(seed: int, index: Tensor, num: int) -> Tensor:
    """``(B, num)`` int64 keys in [0, 2^62): key n of row b depends only on (seed, index[b], n).

    Args:
        seed: any integer; combine several with :func:`mix`.
        index: ``(B,)`` int64, e.g. the global position of each clip in the training order.
        num: keys per row.
    """
    start = torch.full_like(index, _signed(mix(seed)))
    row = _mix_tensor(start, index)
    column = torch.arange(num, device=index.device, dtype=torch.int64)
    return _shift(_mix_tensor(row[:, None].expand(-1, num), column[None, :]), 2)
