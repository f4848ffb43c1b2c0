"""Backward kernels: one over query tiles for the query gradient and the score gradients, one over key tiles for the key
and value gradients. Each output element has one writer that adds in a fixed order: no atomics.
"""

import triton
import triton.language as tl

from .position import load_score_gradients, load_table, store_score_gradients
from .window import (
    add_bias,
    band_start,
    item_pointer,
    load_band,
    load_rows,
    row_pointers,
    store_rows,
    tile_scores,
    valid_range,
    visible_keys,
    window,
)

# Sizes that change from call to call: no variant of a kernel for each.
RUNTIME = [
    *("H", "Tq", "Tk", "chunk", "left", "right", "offset", "row_begin", "row_end", "band_row", "band_shift"),
    *("width", "highest"),
]


@triton.jit
def _weights_and_gradient(s, visible, lse, delta, do, v, to_log2, PRECISION: tl.constexpr):
    """Softmax weights and gradients of the scaled scores of a tile, 0 where hidden: [BM, BN] each."""
    p = tl.exp2(tl.where(visible, s * to_log2 - (lse * 1.4426950408889634)[:, None], float("-inf")))
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    return p, p * (dp - delta[:, None])


@triton.jit
def _store_sum(sums_ptr, rows, i_bh, scale, D: tl.constexpr, BD: tl.constexpr):
    """The sum over a tile's rows, for the gradient of a bias: sums (B * H, tiles, D) fp32."""
    o_d = tl.arange(0, BD)
    place = i_bh * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums_ptr + place * D + o_d, tl.sum(rows, axis=0) * scale, mask=o_d < D)


@triton.jit(do_not_specialize=RUNTIME)
def chunked_attention_backward_query_kernel(
    frames, rows, gradients, positions, given,  # Frames, Rows, QueryGradients, Positions, Given
    strides,  # Frames of Strides
    H, Tq, Tk, chunk, left, right, offset, row_begin, row_end, band_row, band_shift, width, highest, scale,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_row = tl.arange(0, BM)
    i_row = tl.program_id(0) * BM + o_row
    o_m = row_begin + i_row
    position = o_m + offset
    begin, end, key_end = valid_range(given, i_b, Tk)
    low, high = window(position, begin, key_end, chunk, left, right)
    m_row = (o_m < row_end) & (position >= begin) & (position < end) & (low < high)

    q = load_rows(item_pointer(frames.q, i_b, i_h, strides.q, UNIT), o_m, strides.q, m_row, UNIT, D, BD)
    q = add_bias(q, given, i_h, D, BD)
    do = load_rows(item_pointer(gradients.out, i_b, i_h, strides.do, UNIT), o_m, strides.do, m_row, UNIT, D, BD)
    out = load_rows(item_pointer(frames.out, i_b, i_h, strides.out, UNIT), o_m, strides.out, m_row, UNIT, D, BD)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(rows.delta + i_bh * Tq + o_m, delta, mask=o_m < row_end)
    lse = tl.load(rows.lse + i_bh * Tq + o_m, mask=m_row, other=0.0)
    band_ptr = positions.band
    if positions.band is not None:
        band_ptr = band_start(positions.band, i_bh, row_end - row_begin, band_row)
        row_width = tl.cdiv(width, 16) * 16
        dscores_ptr = positions.dscores + (i_bh * (row_end - row_begin) + tl.program_id(0) * BM) * row_width
        nearest = row_begin + offset + tl.program_id(0) * BM - highest  # position of the first row, less highest
    k_ptr = item_pointer(frames.k, i_b, i_h, strides.k, UNIT)
    v_ptr = item_pointer(frames.v, i_b, i_h, strides.v, UNIT)
    to_log2 = scale * 1.4426950408889634
    dq = tl.zeros((BM, BD), tl.float32)
    first = tl.min(tl.where(m_row, low, key_end), axis=0)
    last = tl.max(tl.where(m_row, high, 0), axis=0)
    o_n = tl.arange(0, BN)
    begin_tile, end_tile = first // BN, tl.cdiv(last, BN)
    if positions.band is not None:
        by_offset = load_band(band_ptr, i_row, m_row, begin_tile * BN, o_n, band_row, band_shift)
    for i_n in range(begin_tile, end_tile):
        j_0 = i_n * BN
        j = j_0 + o_n
        m_n = visible_keys(given, i_b, j, begin, key_end, Tk)
        k = load_rows(k_ptr, j, strides.k, m_n, UNIT, D, BD)
        v = load_rows(v_ptr, j, strides.v, m_n, UNIT, D, BD)
        if PRECISION == "ieee" and positions.band is None:
            # Triton puts the barrier behind the stores of k and v only before the first load from k. That is too late:
            # the whole of q would be loaded into registers before it, and held.
            tl.debug_barrier()
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if positions.band is not None:
            # Only operands of products are copied ahead by Triton: here those of the next tile while this one is used.
            s += by_offset.to(tl.float32)
            m_next = m_row & (i_n + 1 < end_tile)
            by_offset = load_band(band_ptr, i_row, m_next, j_0 + BN, o_n, band_row, band_shift)
        visible = m_row[:, None] & (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
        if given.key_mask is not None:
            visible &= m_n[None, :]
        _, ds = _weights_and_gradient(s, visible, lse, delta, do, v, to_log2, PRECISION)
        ds = ds.to(k.dtype)
        dq += tl.dot(ds, k, input_precision=PRECISION)
        if positions.band is not None:
            store_score_gradients(
                dscores_ptr, ds, row_end - row_begin - tl.program_id(0) * BM, j_0 - nearest, o_row, o_n, width
            )

    if gradients.content_bias is not None:
        _store_sum(gradients.content_bias, dq, i_bh, scale, D, BD)
    if positions.band is not None:
        tl.debug_barrier()  # the score gradients of these rows, written above by other threads, are read again
        by_position = tl.zeros((BM, BD), tl.float32)
        table_ptr = positions.table + i_h * positions.table_head
        x_first = tl.maximum(first - nearest - (BM - 1), 0)
        for i_x in range(x_first // BN, tl.cdiv(tl.minimum(last - nearest, width), BN)):
            x = i_x * BN + tl.arange(0, BN)
            ds = load_score_gradients(dscores_ptr, o_row, m_row, position, low, high, x, width, highest)
            table = load_table(table_ptr, x, width, D, BD)
            by_position += tl.dot(ds, table, input_precision=PRECISION)
        if gradients.position_bias is not None:
            _store_sum(gradients.position_bias, by_position, i_bh, scale, D, BD)
        dq += by_position
    dq_ptr = item_pointer(gradients.q, i_b, i_h, strides.out, UNIT)
    store_rows(dq_ptr, o_m, strides.out, dq * scale, o_m < row_end, UNIT, D, BD)


@triton.jit(do_not_specialize=RUNTIME)
def chunked_attention_backward_key_kernel(
    frames, rows, gradients, band_ptr, given,  # Frames, Rows, KeyGradients; None without positions; Given
    strides, gradient_strides,  # Frames of Strides; Strides of dk and dv
    H, Tq, Tk, chunk, left, right, offset, row_begin, row_end, band_row, band_shift, scale,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    j_0 = tl.program_id(0) * BN
    o_n = tl.arange(0, BN)
    j = j_0 + o_n
    begin, end, key_end = valid_range(given, i_b, Tk)
    # The inverse window: key j is seen from the chunks floor((j - right) / chunk) ... floor((j + left) / chunk).
    first = tl.maximum(j_0 - right, 0) // chunk * chunk
    last = (tl.minimum(j_0 + BN, Tk) - 1 + left) // chunk * chunk + chunk
    first = tl.maximum(first, begin) - offset - row_begin  # rows of the segment
    last = tl.minimum(tl.minimum(last, end) - offset, row_end) - row_begin
    last = tl.where((j_0 >= key_end) | (j_0 + BN <= begin), 0, last)
    first = tl.maximum(first, 0)

    m_n = visible_keys(given, i_b, j, begin, key_end, Tk)
    k = load_rows(item_pointer(frames.k, i_b, i_h, strides.k, UNIT), j, strides.k, m_n, UNIT, D, BD)
    v = load_rows(item_pointer(frames.v, i_b, i_h, strides.v, UNIT), j, strides.v, m_n, UNIT, D, BD)
    q_ptr = item_pointer(frames.q, i_b, i_h, strides.q, UNIT)
    do_ptr = item_pointer(gradients.out, i_b, i_h, strides.do, UNIT)
    if band_ptr is not None:
        band_ptr = band_start(band_ptr, i_bh, row_end - row_begin, band_row)
    to_log2 = scale * 1.4426950408889634
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    for i_m in range(first // BM, tl.cdiv(last, BM)):
        i_row = i_m * BM + tl.arange(0, BM)
        o_m = row_begin + i_row
        position = o_m + offset
        low, high = window(position, begin, key_end, chunk, left, right)
        m_row = (o_m < row_end) & (position >= begin) & (position < end) & (low < high)
        q = load_rows(q_ptr, o_m, strides.q, m_row, UNIT, D, BD)
        q = add_bias(q, given, i_h, D, BD)
        do = load_rows(do_ptr, o_m, strides.do, m_row, UNIT, D, BD)
        lse = tl.load(rows.lse + i_bh * Tq + o_m, mask=m_row, other=0.0)
        delta = tl.load(rows.delta + i_bh * Tq + o_m, mask=m_row, other=0.0)
        visible = m_row[:, None] & (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
        if given.key_mask is not None:
            visible &= m_n[None, :]
        m_band = m_row & (high > j_0) & (low < j_0 + BN)  # rows whose band reaches this tile
        s = tile_scores(q, k, band_ptr, i_row, m_band, j_0, o_n, band_row, band_shift, PRECISION)
        p, ds = _weights_and_gradient(s, visible, lse, delta, do, v, to_log2, PRECISION)
        dv += tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
        dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION)
    dk *= scale

    in_range = j < Tk
    dk_ptr = item_pointer(gradients.k, i_b, i_h, gradient_strides, UNIT)
    dv_ptr = item_pointer(gradients.v, i_b, i_h, gradient_strides, UNIT)
    if ACCUMULATE:
        inside = in_range[:, None] & (tl.arange(0, BD) < D)[None, :]
        dk += tl.load(row_pointers(dk_ptr, j, gradient_strides, UNIT, BD), mask=inside, other=0.0)
        dv += tl.load(row_pointers(dv_ptr, j, gradient_strides, UNIT, BD), mask=inside, other=0.0)
    store_rows(dk_ptr, j, gradient_strides, dk, in_range, UNIT, D, BD)
    store_rows(dv_ptr, j, gradient_strides, dv, in_range, UNIT, D, BD)
