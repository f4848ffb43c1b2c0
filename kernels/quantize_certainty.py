"""Certainty of the codes on GPUs: an error bound of every score, and float64 for the rows that it leaves undecided.

The proof is in docs/kernels/quantize.md.
"""

import triton
import triton.language as tl

INFINITE, TINY = tl.constexpr(0x7F800000), tl.constexpr(0x0D800000)  # bits of infinity and of 2^-100 in fp32
EXACT_FEATURES, EXACT_CODES = tl.constexpr(64), tl.constexpr(256)  # taken at once for a row in float64


@triton.jit
def magnitude(x):
    """The bits of |x|: integers in the order of the numbers, infinity and NaN above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def margin(
    size2, mean, projection2, y, scale, reach, D, number_bits,
    LAYER_NORM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Twice the largest possible error of a fast score, for each row: docs/kernels/quantize.md has the proof."""
    largest = tl.max(magnitude(y), axis=1)
    size = tl.sqrt(size2)
    if LAYER_NORM:
        rounding = (2 * BK + 4) * size + (BK + 4) * tl.sqrt(tl.zeros_like(mean) + D) * tl.abs(mean)
    else:
        rounding = (BK + 2) * size
    of_y = (rounding * 5.9604645e-08) * (tl.sqrt(projection2) * scale)  # 2^-24
    scaled = y * scale[:, None]
    size_y = tl.sqrt(tl.sum(scaled * scaled, axis=1))
    of_score = ((BD + BD // 8 + 6) * 2.0 + (number_bits + 1)) * 1.1920929e-07 * size_y  # 2^-23
    ordinary = (tl.minimum(size2, projection2) > 8e-28) & (tl.maximum(size2, projection2) < 1e30)  # 2^-90, 2^100
    ordinary = ordinary & (largest >= TINY) & (largest < INFINITE)
    return tl.where(ordinary, (of_y + of_score) * (2.04 * reach), float("inf"))


@triton.jit
def is_zero(doubtful, x_ptrs, x_feature_stride, D, LAYER_NORM: tl.constexpr):
    """Mark the doubtful rows that are zero, or constant where layer norm subtracts the mean: silence."""
    first = tl.load(x_ptrs, mask=doubtful, other=0.0).to(tl.float32)
    largest = magnitude(first)
    if LAYER_NORM:
        largest = tl.zeros_like(largest)
    for _ in tl.range(1, D, num_stages=1):
        x_ptrs += x_feature_stride
        x = tl.load(x_ptrs, mask=doubtful, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, magnitude(x - first if LAYER_NORM else x))
    return doubtful & (largest == 0)


@triton.jit
def exact_code(
    x_ptr, x_feature_stride, projection_ptr, codebook_ptr, D, V,
    LAYER_NORM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Code of one row as the definition gives it, all in float64; -1 for a row that is not finite."""
    o_k = tl.arange(0, BK)
    o_d = tl.arange(0, BD)
    o_n = tl.arange(0, BN)
    first = tl.load(x_ptr).to(tl.float64)
    sum_first = tl.full((), 0.0, tl.float64)
    times = 1
    if LAYER_NORM:
        total = tl.zeros((BK,), tl.float64)
        for k in tl.range(0, D, BK, num_stages=1):
            x = tl.load(x_ptr + (k + o_k).to(tl.int64) * x_feature_stride, mask=k + o_k < D, other=0.0)
            total += tl.where(k + o_k < D, x.to(tl.float64) - first, 0.0)
        sum_first = tl.sum(total, axis=0)
        times = D  # instead of dividing the sum, which would take a subroutine with a stack
    else:
        first = sum_first
    y = tl.zeros((BD,), tl.float64)
    for k in tl.range(0, D, BK, num_stages=1):
        inside = k + o_k < D
        x = tl.load(x_ptr + (k + o_k).to(tl.int64) * x_feature_stride, mask=inside, other=0.0).to(tl.float64)
        x = tl.where(inside, (x - first) * times - sum_first, 0.0)
        p = tl.load(
            projection_ptr + (k + o_k)[:, None] * BD + o_d[None, :], mask=inside[:, None], other=0.0
        )  # [BK, BD]
        y += tl.sum(x[:, None] * p.to(tl.float64), axis=0)
    best = tl.full((BN,), float("-inf"), tl.float64)
    code = tl.zeros((BN,), tl.int32)
    size = tl.sum(tl.abs(y), axis=0)
    if size > 0:  # of the scores of zero the lowest code is taken
        for start in tl.range(0, V, BN, num_stages=1):
            exists = start + o_n < V
            c = tl.load(codebook_ptr + (start + o_n)[:, None] * BD + o_d[None, :], mask=exists[:, None], other=0.0)
            score = tl.where(exists, tl.sum(y[None, :] * c.to(tl.float64), axis=1), float("-inf"))
            code = tl.where(score > best, start + o_n, code)
            best = tl.maximum(best, score)
    lowest = tl.min(tl.where(best == tl.max(best, axis=0), code, 2147483647), axis=0)
    return tl.where(size - size == 0, lowest, -1)  # NaN and infinity in x reach y, whatever the projection
