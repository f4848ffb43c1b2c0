"""Backward kernels: one over query tiles for the query gradient and the score gradients of the band, one over key tiles
for the key and value gradients. Each output element has one writer that adds in a fixed order: no atomics.
"""

import triton
import triton.language as tl

from .forward import RUNTIME
from .window import add_bias, band_pointers, load_rows, tile_scores, valid_range, visible_keys, window


@triton.jit
def _weights_and_gradient(s, visible, lse, delta, do, v, to_log2, PRECISION: tl.constexpr):
    """Softmax weights and gradients of the scaled scores of a tile, 0 where hidden: [BM, BN] each."""
    p = tl.exp2(tl.where(visible, s * to_log2 - (lse * 1.4426950408889634)[:, None], float("-inf")))
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    return p, p * (dp - delta[:, None])


@triton.jit(do_not_specialize=RUNTIME)
def chunked_attention_backward_query_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, lse_ptr,
    dq_ptr, delta_ptr,  # dq (B, H, rows, d) fp32 contiguous, unscaled; delta (B, H, Tq) fp32
    band_ptr, dband_ptr, content_ptr, lengths_ptr, starts_ptr, key_mask_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, out_b, out_h, out_t, do_b, do_h, do_t, band_bh,
    B, H, Tq, Tk, d, chunk, left, right, offset, row_begin, row_end, band_row, band_shift, scale,
    HAS_BAND: tl.constexpr, HAS_CONTENT: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_STARTS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, PRECISION: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    i_row = tl.program_id(0) * BM + tl.arange(0, BM)
    o_m = row_begin + i_row
    position = o_m + offset
    begin, end, key_end = valid_range(lengths_ptr, starts_ptr, i_b, Tk, HAS_LENGTHS, HAS_STARTS)
    low, high = window(position, begin, key_end, chunk, left, right)
    m_row = (o_m < row_end) & (position >= begin) & (position < end) & (low < high)

    q = load_rows(q_ptr + i_b * q_b + i_h * q_h, o_m, q_t, m_row, d, BD)
    if HAS_CONTENT:
        q = add_bias(q, content_ptr + i_h * d, d, BD)
    do = load_rows(do_ptr + i_b * do_b + i_h * do_h, o_m, do_t, m_row, d, BD)
    out = load_rows(out_ptr + i_b * out_b + i_h * out_h, o_m, out_t, m_row, d, BD)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + i_bh * Tq + o_m, delta, mask=o_m < row_end)
    lse = tl.load(lse_ptr + i_bh * Tq + o_m, mask=m_row, other=0.0)
    band_ptr += (i_h * B + i_b) * band_bh
    dband_ptr += (i_h * B + i_b) * band_bh
    k_ptr += i_b * k_b + i_h * k_h
    v_ptr += i_b * v_b + i_h * v_h
    to_log2 = scale * 1.4426950408889634
    dq = tl.zeros((BM, BD), tl.float32)
    first = tl.min(tl.where(m_row, low, key_end), axis=0)
    last = tl.max(tl.where(m_row, high, 0), axis=0)
    for i_n in range(first // BN, tl.cdiv(last, BN)):
        j_0 = i_n * BN
        o_n = tl.arange(0, BN)
        j = j_0 + o_n
        m_n = visible_keys(key_mask_ptr, i_b, j, begin, key_end, Tk, HAS_KEY_MASK)
        k = load_rows(k_ptr, j, k_t, m_n, d, BD)
        v = load_rows(v_ptr, j, v_t, m_n, d, BD)
        s = tile_scores(q, k, band_ptr, i_row, m_row, j_0, o_n, band_row, band_shift, HAS_BAND, PRECISION)
        visible = m_row[:, None] & (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
        if HAS_KEY_MASK:
            visible &= m_n[None, :]
        _, ds = _weights_and_gradient(s, visible, lse, delta, do, v, to_log2, PRECISION)
        ds = ds.to(k.dtype)
        dq += tl.dot(ds, k, input_precision=PRECISION)
        if HAS_BAND:
            tl.store(band_pointers(dband_ptr, i_row, j_0, o_n, band_row, band_shift), ds, mask=visible)

    o_d = tl.arange(0, BD)
    p_dq = dq_ptr + (i_bh * (row_end - row_begin) + i_row)[:, None] * d + o_d[None, :]
    tl.store(p_dq, dq, mask=(o_m < row_end)[:, None] & (o_d < d)[None, :])


@triton.jit(do_not_specialize=RUNTIME)
def chunked_attention_backward_key_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr,
    dk_ptr, dv_ptr,  # (B, H, Tk, d) contiguous; fp32 when ACCUMULATE
    band_ptr, content_ptr, lengths_ptr, starts_ptr, key_mask_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, band_bh,
    B, H, Tq, Tk, d, chunk, left, right, offset, row_begin, row_end, band_row, band_shift, scale,
    HAS_BAND: tl.constexpr, HAS_CONTENT: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_STARTS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    j_0 = tl.program_id(0) * BN
    o_n = tl.arange(0, BN)
    j = j_0 + o_n
    begin, end, key_end = valid_range(lengths_ptr, starts_ptr, i_b, Tk, HAS_LENGTHS, HAS_STARTS)
    # The inverse window: key j is seen from the chunks floor((j - right) / chunk) ... floor((j + left) / chunk).
    first = tl.maximum(j_0 - right, 0) // chunk * chunk
    last = (tl.minimum(j_0 + BN, Tk) - 1 + left) // chunk * chunk + chunk
    first = tl.maximum(first, begin) - offset - row_begin  # rows of the segment
    last = tl.minimum(tl.minimum(last, end) - offset, row_end) - row_begin
    last = tl.where((j_0 >= key_end) | (j_0 + BN <= begin), 0, last)
    first = tl.maximum(first, 0)

    m_n = visible_keys(key_mask_ptr, i_b, j, begin, key_end, Tk, HAS_KEY_MASK)
    k = load_rows(k_ptr + i_b * k_b + i_h * k_h, j, k_t, m_n, d, BD)
    v = load_rows(v_ptr + i_b * v_b + i_h * v_h, j, v_t, m_n, d, BD)
    q_ptr += i_b * q_b + i_h * q_h
    do_ptr += i_b * do_b + i_h * do_h
    band_ptr += (i_h * B + i_b) * band_bh
    to_log2 = scale * 1.4426950408889634
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    for i_m in range(first // BM, tl.cdiv(last, BM)):
        i_row = i_m * BM + tl.arange(0, BM)
        o_m = row_begin + i_row
        position = o_m + offset
        low, high = window(position, begin, key_end, chunk, left, right)
        m_row = (o_m < row_end) & (position >= begin) & (position < end) & (low < high)
        q = load_rows(q_ptr, o_m, q_t, m_row, d, BD)
        if HAS_CONTENT:
            q = add_bias(q, content_ptr + i_h * d, d, BD)
        do = load_rows(do_ptr, o_m, do_t, m_row, d, BD)
        lse = tl.load(lse_ptr + i_bh * Tq + o_m, mask=m_row, other=0.0)
        delta = tl.load(delta_ptr + i_bh * Tq + o_m, mask=m_row, other=0.0)
        visible = m_row[:, None] & (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
        if HAS_KEY_MASK:
            visible &= m_n[None, :]
        m_band = m_row & (high > j_0) & (low < j_0 + BN)  # rows whose band reaches this tile
        s = tile_scores(q, k, band_ptr, i_row, m_band, j_0, o_n, band_row, band_shift, HAS_BAND, PRECISION)
        p, ds = _weights_and_gradient(s, visible, lse, delta, do, v, to_log2, PRECISION)
        dv += tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
        dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION)
    dk *= scale

    o_d = tl.arange(0, BD)
    at = (i_bh * Tk + j)[:, None] * d + o_d[None, :]
    inside = (j < Tk)[:, None] & (o_d < d)[None, :]
    if ACCUMULATE:
        dk += tl.load(dk_ptr + at, mask=inside, other=0.0)
        dv += tl.load(dv_ptr + at, mask=inside, other=0.0)
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=inside)
