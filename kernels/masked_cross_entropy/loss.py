"""Losses and accuracy without gradients: matrix product and online softmax in one kernel, no logits in memory.

A program takes BM rows and a share of the classes, tile by tile; per row it keeps the largest logit and the first class
that has it, the sum of exponentials relative to it, the target's logit and, for label smoothing, the sum of logits.
``merge_kernel`` joins the shares, in their order. Several shares a row are there to fill the GPU with few rows.

                share 0              share 1
          +-----+-----+-----+  +-----+-----+-----+
    BM    | BN  | BN  | BN  |  | BN  |  ...      |   fp32 logits in registers, never rounded to 16 bits
          +-----+-----+-----+  +-----+-----+-----+
            max, first, sum      max, first, sum      -> merge_kernel -> loss, correct
"""

import triton
import triton.language as tl

from .arguments import OF_ROWS


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=OF_ROWS)
def loss_kernel(
    p_hidden,  # (N, D), unit feature stride
    p_weight,  # (V, D) contiguous
    p_bias,  # (V,)
    p_targets,  # (N,) int64
    p_index,  # (N,) int64
    p_count,  # () int64
    p_parts,  # (4, shares, N) fp32: largest, sum of exponentials, target's logit, sum of logits
    p_first,  # (shares, N) int32: the first class with the largest logit
    row_stride,
    N,
    D,
    V,
    share,  # classes of a share, a multiple of BN
    HAS_INDEX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SMOOTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    i_m = tl.program_id(0).to(tl.int64)
    i_s = tl.program_id(1).to(tl.int64)
    N = N.to(tl.int64)
    present = N
    if HAS_INDEX:
        present = tl.load(p_count)
    if i_m * BM >= present:
        return
    o_m = i_m * BM + tl.arange(0, BM)
    o_k = tl.arange(0, BK)
    m_m = o_m < present
    rows = o_m
    if HAS_INDEX:
        rows = tl.load(p_index + o_m, mask=m_m, other=0)
    target = tl.load(p_targets + rows, mask=m_m, other=0)
    p_h = p_hidden + rows[:, None] * row_stride + o_k[None, :]  # [BM, BK]

    largest = tl.full((BM,), float("-inf"), tl.float32)
    first = tl.zeros((BM,), tl.int32)
    total = tl.zeros((BM,), tl.float32)
    z_target = tl.zeros((BM,), tl.float32)
    z_sum = tl.zeros((BM,), tl.float32)
    begin = (i_s * share).to(tl.int32)
    for v in range(begin, tl.minimum(begin + share, V), BN):
        o_n = v + tl.arange(0, BN)
        m_n = o_n < V
        p_w = p_weight + o_n.to(tl.int64)[None, :] * D + o_k[:, None]  # [BK, BN]
        z = tl.zeros((BM, BN), tl.float32)
        for k in range(0, D, BK):
            m_k = o_k < D - k
            h = tl.load(p_h + k, mask=m_m[:, None] & m_k[None, :], other=0.0)
            w = tl.load(p_w + k, mask=m_k[:, None] & m_n[None, :], other=0.0)
            z = tl.dot(h.to(w.dtype), w, z, input_precision=PRECISION)
        if HAS_BIAS:
            z += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        if SMOOTH:
            z_sum += tl.sum(tl.where(m_n[None, :], z, 0.0), axis=1)
        z_target += tl.sum(tl.where(o_n[None, :] == target[:, None], z, 0.0), axis=1)
        z = tl.where(m_n[None, :], z, float("-inf"))
        top = tl.max(z, axis=1)
        better = top > largest
        first = tl.where(better, tl.min(tl.where(z == top[:, None], o_n[None, :], 2147483647), axis=1), first)
        larger = tl.where(better, top, largest)
        base = tl.where(larger == float("-inf"), 0.0, larger)  # where nothing but -inf was seen
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(z - base[:, None]), axis=1)
        largest = larger
    p_out = p_parts + i_s * N + o_m
    plane = tl.num_programs(1) * N
    tl.store(p_out, largest, mask=m_m)
    tl.store(p_out + plane, total, mask=m_m)
    tl.store(p_out + 2 * plane, z_target, mask=m_m)
    tl.store(p_out + 3 * plane, z_sum, mask=m_m)
    tl.store(p_first + i_s * N + o_m, first, mask=m_m)


@triton.jit(do_not_specialize=["N", "shares"], do_not_specialize_on_alignment=OF_ROWS)
def merge_kernel(
    p_parts,  # (4, shares, N) fp32
    p_first,  # (shares, N) int32
    p_targets,  # (N,) int64
    p_weights,  # (N,) fp32
    p_index,  # (N,) int64
    p_count,  # () int64
    p_losses,  # (N,) fp32
    p_correct,  # (N,) fp32
    N,
    V,
    shares,
    scale,
    label_smoothing,
    z_loss,
    HAS_INDEX: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BM: tl.constexpr,
):
    """Join the shares of BM rows: the formulas of ``softmax_gradient_kernel``."""
    i_m = tl.program_id(0).to(tl.int64)
    N = N.to(tl.int64)
    present = N
    if HAS_INDEX:
        present = tl.load(p_count)
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < present
    plane = shares * N
    largest = tl.full((BM,), float("-inf"), tl.float32)
    first = tl.zeros((BM,), tl.int32)
    total = tl.zeros((BM,), tl.float32)
    z_target = tl.zeros((BM,), tl.float32)
    z_sum = tl.zeros((BM,), tl.float32)
    for s in range(0, shares):
        p_in = p_parts + s * N + o_m
        top = tl.load(p_in, mask=m_m, other=0.0)
        first = tl.where(top > largest, tl.load(p_first + s * N + o_m, mask=m_m, other=0), first)
        larger = tl.where(top > largest, top, largest)
        base = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(largest - base) + tl.load(p_in + plane, mask=m_m, other=1.0) * tl.exp(top - base)
        z_target += tl.load(p_in + 2 * plane, mask=m_m, other=0.0)
        z_sum += tl.load(p_in + 3 * plane, mask=m_m, other=0.0)
        largest = larger
    rows = o_m
    if HAS_INDEX:
        rows = tl.load(p_index + o_m, mask=m_m, other=0)
    target = tl.load(p_targets + rows, mask=m_m, other=0)
    weight = tl.zeros((BM,), tl.float32) + scale
    if HAS_WEIGHTS:
        weight *= tl.load(p_weights + rows, mask=m_m, other=0.0)
    log_total = tl.log(total)
    lse = largest + log_total
    loss = log_total - (1.0 - label_smoothing) * (z_target - largest) + z_loss * lse * lse
    if label_smoothing > 0.0:  # also keeps a class of logit -inf harmless where there is no smoothing
        loss -= label_smoothing * (z_sum / V - largest)
    valid = (target >= 0) & (target < V)
    tl.store(p_losses + rows, tl.where(valid, weight * loss, float("nan")), mask=m_m)
    tl.store(p_correct + rows, tl.where(valid & (first == target), 1.0, 0.0), mask=m_m)
