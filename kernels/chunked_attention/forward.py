"""Forward kernel: one program per tile of BM queries, online softmax over the tiles of keys that its windows reach.

A tile holds several chunks when chunks are small: each row masks its own window inside their union.
"""

import triton
import triton.language as tl

from .online_softmax import add_keys, store_result
from .window import add_bias, load_rows, tile_scores, valid_range, visible_keys, window

RUNTIME = ["H", "Tq", "Tk", "chunk", "left", "right", "offset", "row_begin", "row_end", "band_row", "band_shift"]


@triton.jit(do_not_specialize=RUNTIME)
def chunked_attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,  # (B, H, T, d); lse (B, H, Tq) fp32
    band_ptr, content_ptr, lengths_ptr, starts_ptr, key_mask_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, out_b, out_h, out_t, band_bh,  # strides in elements
    B, H, Tq, Tk, d, chunk, left, right, offset, row_begin, row_end, band_row, band_shift, scale,
    HAS_BAND: tl.constexpr, HAS_CONTENT: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_STARTS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, PRECISION: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    i_row = tl.program_id(0) * BM + tl.arange(0, BM)  # row of the segment
    o_m = row_begin + i_row
    position = o_m + offset
    begin, end, key_end = valid_range(lengths_ptr, starts_ptr, i_b, Tk, HAS_LENGTHS, HAS_STARTS)
    low, high = window(position, begin, key_end, chunk, left, right)
    m_row = (o_m < row_end) & (position >= begin) & (position < end) & (low < high)

    q = load_rows(q_ptr + i_b * q_b + i_h * q_h, o_m, q_t, m_row, d, BD)
    if HAS_CONTENT:
        q = add_bias(q, content_ptr + i_h * d, d, BD)
    band_ptr += (i_h * B + i_b) * band_bh
    k_ptr += i_b * k_b + i_h * k_h
    v_ptr += i_b * v_b + i_h * v_h
    to_log2 = scale * 1.4426950408889634
    largest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    out = tl.zeros((BM, BD), tl.float32)
    first = tl.min(tl.where(m_row, low, key_end), axis=0)
    last = tl.max(tl.where(m_row, high, 0), axis=0)
    for i_n in range(first // BN, tl.cdiv(last, BN)):
        j_0 = i_n * BN
        o_n = tl.arange(0, BN)
        j = j_0 + o_n
        m_n = visible_keys(key_mask_ptr, i_b, j, begin, key_end, Tk, HAS_KEY_MASK)
        k = load_rows(k_ptr, j, k_t, m_n, d, BD)
        s = tile_scores(q, k, band_ptr, i_row, m_row, j_0, o_n, band_row, band_shift, HAS_BAND, PRECISION)
        visible = m_row[:, None] & (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
        if HAS_KEY_MASK:
            visible &= m_n[None, :]
        largest, total, out = add_keys(s, visible, v_ptr, j, v_t, m_n, d, to_log2, largest, total, out, PRECISION, BD)
    store_result(
        out_ptr + i_b * out_b + i_h * out_h, out_t, lse_ptr + i_bh * Tq, o_m, row_end, d, m_row, largest, total, out,
        HAS_KEY_MASK, BD,
    )  # fmt: skip
