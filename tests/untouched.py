"""Tensors whose elements lie further apart than 2^31, in memory that is reserved but, but for them, never touched."""

import mmap
import sys

import pytest
import torch
from torch import Tensor

_NORESERVE = 0x4000 if sys.platform.startswith("linux") else 0  # the mmap module names it from Python 3.13 on


def untouched(count: int, dtype: torch.dtype) -> Tensor:
    """``count`` zeros that take address space only; skips the test where the system refuses it."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    try:
        memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    except OSError as error:
        pytest.skip(f"no address space for {count} elements: {error}")
    return torch.frombuffer(memory, dtype=dtype)


def spread(x: Tensor, dim: int) -> Tensor:
    """A copy of ``x`` whose last slice along ``dim`` begins at least 2^31 elements after the first one.

    The stride itself fits an int32: only the product of index and stride does not.
    """
    dim %= x.dim()
    stride = -(-(2**31) // (x.shape[dim] - 1)) if x.shape[dim] > 2 else 2**31
    stride = (stride + 63) // 64 * 64
    sizes = [1 if i == dim else size for i, size in enumerate(x.shape)]
    strides = [int(torch.tensor(sizes[i + 1 :]).prod()) for i in range(x.dim())]
    strides[dim] = stride
    assert stride >= sum((size - 1) * s for size, s in zip(sizes, strides)) + 1
    memory = untouched((x.shape[dim] - 1) * stride + x.numel(), x.dtype)
    return memory.as_strided(x.shape, strides).copy_(x)
