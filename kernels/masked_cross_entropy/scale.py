"""Multiply a gradient by the upstream gradient of the loss, which usually is 1."""

import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def scale_kernel(p_grad, p_factor, size, BLOCK: tl.constexpr):
    """``grad *= factor`` in place: ``(size,)`` contiguous, factor 0-d fp32. Nothing is read where the factor is 1."""
    factor = tl.load(p_factor)
    if factor != 1.0:
        o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        grad = tl.load(p_grad + o, mask=o < size).to(tl.float32)
        tl.store(p_grad + o, (grad * factor).to(p_grad.dtype.element_ty), mask=o < size)
