"""The three matrix products over the masked rows, whose number is read on the device.

A library product needs its sizes on the host. These take every row number from ``p_index`` (the rows that count first)
and leave tiles behind ``p_count`` alone, so that the work follows the number of masked rows without the host ever
waiting for it. ``start`` is the first slot of the chunk in ``p_index``; slot ``start + r`` is row r of the chunk.

                    V                        D                             D
             +------------+            +-----------+                 +-----------+
      slots  |  logits    |  = h W^T   | d h       |  = dz W       V | d weight  |  += dz^T h   over the slots
             |  -> dz     |            +-----------+                 +-----------+
             +------------+     rows written to their place         fp32, read and written once a chunk
"""

import triton
import triton.language as tl

SLOTS = ["start", "chunk"]  # change from call to call: no variant of a kernel for each


@triton.jit(do_not_specialize=SLOTS)
def logits_kernel(
    p_hidden,  # (N, D), unit feature stride
    p_weight,  # (V, D) contiguous
    p_bias,  # (V,)
    p_index,  # (N,) int64
    p_count,  # () int64
    p_logits,  # (chunk, V) contiguous
    row_stride,
    start,
    chunk,  # slots of this chunk
    D,
    V,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Logits of the chunk's slots: ``hidden[index] @ weight.T + bias``."""
    i_m = tl.program_id(0).to(tl.int64)
    i_n = tl.program_id(1).to(tl.int64)
    present = tl.minimum(tl.load(p_count) - start, chunk)
    if i_m * BM >= present:
        return
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m_m, m_n = o_m < present, o_n < V
    rows = tl.load(p_index + start + o_m, mask=m_m, other=0)
    p_h = p_hidden + rows[:, None] * row_stride + o_k[None, :]  # [BM, BK]
    p_w = p_weight + o_n[None, :] * D + o_k[:, None]  # [BK, BN]
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, D, BK):
        m_k = o_k < D - k
        h = tl.load(p_h + k, mask=m_m[:, None] & m_k[None, :], other=0.0)
        w = tl.load(p_w + k, mask=m_k[:, None] & m_n[None, :], other=0.0)
        acc = tl.dot(h.to(w.dtype), w, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_z = p_logits + o_m[:, None] * V + o_n[None, :]
    tl.store(p_z, acc.to(p_logits.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=SLOTS)
def hidden_gradient_kernel(
    p_dz,  # (chunk, V) contiguous
    p_weight,  # (V, D) contiguous
    p_index,  # (N,) int64
    p_count,  # () int64
    p_out,  # (N, D) contiguous
    start,
    chunk,
    D,
    V,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``out[index] = dz @ weight``, or ``+=``; every row is written by one program."""
    i_m = tl.program_id(0).to(tl.int64)
    i_n = tl.program_id(1).to(tl.int64)
    present = tl.minimum(tl.load(p_count) - start, chunk)
    if i_m * BM >= present:
        return
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m_m, m_n = o_m < present, o_n < D
    p_z = p_dz + o_m[:, None] * V + o_k[None, :]  # [BM, BK]
    p_w = p_weight + o_k.to(tl.int64)[:, None] * D + o_n[None, :]  # [BK, BN]
    if ADD:  # first: added behind the loop, it would take registers beside the sums
        rows = tl.load(p_index + start + o_m, mask=m_m, other=0)
        acc = tl.load(p_out + rows[:, None] * D + o_n[None, :], mask=m_m[:, None] & m_n[None, :], other=0.0)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, V, BK):
        m_k = o_k < V - k
        z = tl.load(p_z, mask=m_m[:, None] & m_k[None, :], other=0.0)
        w = tl.load(p_w, mask=m_k[:, None] & m_n[None, :], other=0.0)
        acc = tl.dot(z, w, acc, input_precision=PRECISION)
        p_z += BK
        p_w += BK * D
    rows = tl.load(p_index + start + o_m, mask=m_m, other=0)
    p_o = p_out + rows[:, None] * D + o_n[None, :]
    tl.store(p_o, acc.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=SLOTS)
def weight_gradient_kernel(
    p_dz,  # (chunk, V) contiguous
    p_hidden,  # (N, D), unit feature stride
    p_index,  # (N,) int64
    p_count,  # () int64
    p_total,  # (V, D) contiguous fp32
    row_stride,
    start,
    chunk,
    D,
    V,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``total += dz.T @ hidden[index]`` in fp32, over the slots of the chunk that exist; the first chunk writes."""
    i_m = tl.program_id(0).to(tl.int64)
    i_n = tl.program_id(1).to(tl.int64)
    present = tl.minimum(tl.load(p_count) - start, chunk)
    if (present <= 0) & (start > 0):
        return
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m_m, m_n = o_m < V, o_n < D
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, present, BK):
        slots = k + o_k
        m_k = slots < present
        rows = tl.load(p_index + start + slots, mask=m_k, other=0)
        z = tl.load(p_dz + slots.to(tl.int64)[:, None] * V + o_m[None, :], mask=m_k[:, None] & m_m[None, :], other=0.0)
        h = tl.load(p_hidden + rows[:, None] * row_stride + o_n[None, :], mask=m_k[:, None] & m_n[None, :], other=0.0)
        acc = tl.dot(tl.trans(z), h.to(z.dtype), acc, input_precision=PRECISION)
    p_t = p_total + o_m[:, None] * D + o_n[None, :]
    inside = m_m[:, None] & m_n[None, :]
    tl.store(p_t, tl.load(p_t, mask=inside & (start > 0), other=0.0) + acc, mask=inside)
