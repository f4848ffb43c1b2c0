"""Counter-based random numbers as tensors: the hash of :mod:`bestrq2.hashing`, computed on the device.

A mask drawn from the global position of a clip in the training order does not depend on how a batch is split over
ranks, on what ran before, or on the device, so resumed and distributed runs see the masks of the uninterrupted one.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bestrq2.hashing import mix

_GOLDEN, _M1, _M2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(state: Tensor, bits: int) -> Tensor:
    # Logical right shift: torch's >> copies the sign bit.
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _mix_next(state: Tensor, key: Tensor) -> Tensor:
    """One more key of :func:`bestrq2.hashing.mix`. int64 arithmetic wraps modulo 2^64 on every device, as it must."""
    state = (state ^ key) + _signed(_GOLDEN)
    state = (state ^ _shift(state, 30)) * _signed(_M1)
    state = (state ^ _shift(state, 27)) * _signed(_M2)
    return state ^ _shift(state, 31)


def clip_index(index: Tensor | Sequence[int] | None, num_clips: int) -> Tensor:
    """``(B,)`` int64 numbers of the clips; None: 0..B-1.

    Raises:
        TypeError: if they are not integers: rounded to float, clips far into a training order would share a number.
        ValueError: for another count.
    """
    if index is None:
        return torch.arange(num_clips, device="cpu")
    if not isinstance(index, Tensor):
        index = torch.as_tensor(index, device="cpu")
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"index must hold integers, the places of the clips in the training order, got {index.dtype}")
    if index.shape != (num_clips,):
        raise ValueError(f"expected one index per clip, ({num_clips},), got {tuple(index.shape)}")
    return index.to(torch.int64)


def random_keys(seed: int, index: Tensor, num: int) -> Tensor:
    """``(B, num)`` int64 keys in [0, 2^62): key n of row b is ``mix(seed, index[b], n) >> 2``.

    Args:
        seed: any integer; combine several with :func:`bestrq2.hashing.mix`.
        index: ``(B,)`` int64, e.g. the global position of each clip in the training order.
        num: keys per row.
    """
    row = _mix_next(torch.full_like(index, _signed(mix(seed))), index)
    column = torch.arange(num, device=index.device, dtype=torch.int64)
    return _shift(_mix_next(row[:, None], column[None, :]), 2)


def normal(seed: int, index: Tensor, num: int) -> Tensor:
    """``(B, num)`` float32 standard normal (Box and Muller): number n of row b depends only on (seed, index[b], n)."""
    keys = random_keys(seed, index, 2 * num).unflatten(1, (num, 2))
    share = ((keys >> 38) + 1).float() * 2.0**-24  # in (0, 1]
    return (-2 * share[..., 0].log()).sqrt() * (2 * math.pi * share[..., 1]).cos()
