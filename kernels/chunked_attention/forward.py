"""Forward kernel: one program per tile of BM queries, online softmax over the tiles of keys that its windows reach.

A tile holds several chunks when chunks are small: each row masks its own window inside their union.
"""

import triton
import triton.language as tl

from .online_softmax import add_keys
from .window import (
    add_bias,
    band_start,
    item_pointer,
    load_rows,
    store_rows,
    tile_scores,
    valid_range,
    visible_keys,
    window,
)

# Sizes that change from call to call: no variant of a kernel for each.
RUNTIME = ["H", "Tq", "Tk", "chunk", "left", "right", "offset", "row_begin", "row_end", "band_row", "band_shift"]


@triton.jit(do_not_specialize=RUNTIME)
def chunked_attention_forward_kernel(
    frames, lse_ptr,  # Frames; (B, H, Tq) fp32
    band_ptr, given, strides,  # None without positions; Given; Frames of Strides
    H, Tq, Tk, chunk, left, right, offset, row_begin, row_end, band_row, band_shift, scale,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    i_row = tl.program_id(0) * BM + tl.arange(0, BM)  # row of the segment
    o_m = row_begin + i_row
    position = o_m + offset
    begin, end, key_end = valid_range(given, i_b, Tk)
    low, high = window(position, begin, key_end, chunk, left, right)
    m_row = (o_m < row_end) & (position >= begin) & (position < end) & (low < high)

    q = load_rows(item_pointer(frames.q, i_b, i_h, strides.q, UNIT), o_m, strides.q, m_row, UNIT, D, BD)
    q = add_bias(q, given, i_h, D, BD)
    if band_ptr is not None:
        band_ptr = band_start(band_ptr, i_bh, row_end - row_begin, band_row)
    k_ptr = item_pointer(frames.k, i_b, i_h, strides.k, UNIT)
    v_ptr = item_pointer(frames.v, i_b, i_h, strides.v, UNIT)
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
        m_n = visible_keys(given, i_b, j, begin, key_end, Tk)
        k = load_rows(k_ptr, j, strides.k, m_n, UNIT, D, BD)
        s = tile_scores(q, k, band_ptr, i_row, m_row, j_0, o_n, band_row, band_shift, PRECISION)
        visible = m_row[:, None] & (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
        if given.key_mask is not None:
            visible &= m_n[None, :]
        v = load_rows(v_ptr, j, strides.v, m_n, UNIT, D, BD)
        largest, total, out = add_keys(s, visible, v, to_log2, largest, total, out, PRECISION)

    if given.key_mask is not None:
        m_row &= total != 0  # the mask may hide a whole window
    total = tl.where(m_row, total, 1.0)
    lse = tl.where(m_row, (largest + tl.log2(total)) * 0.6931471805599453, 0.0)  # 0 where a row sees nothing
    in_range = o_m < row_end
    tl.store(lse_ptr + i_bh * Tq + o_m, lse, mask=in_range)
    out_ptr = item_pointer(frames.out, i_b, i_h, strides.out, UNIT)
    store_rows(out_ptr, o_m, strides.out, out / total[:, None], in_range, UNIT, D, BD)
