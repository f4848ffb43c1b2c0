"""Backward kernels of ``ops.chunked_attention_sinusoidal``: one over query tiles, then one over key tiles.

The first computes the features again, as the forward does, and writes them: the second would otherwise compute them
once per pair of tiles, which costs as many products as the position scores themselves. It also writes the gradients of
C and S (see sinusoidal.py), so that the gradient of ``onto`` is one product of a library per head, and per tile the
sums over its rows that the gradients of the biases are made of. One writer per element, fixed order, no atomics.
"""

import triton
import triton.language as tl

from .backward import _weights_and_gradient
from .sinusoidal import (
    RUNTIME,
    add_position_scores,
    block_pointers,
    load_block,
    load_features,
    load_onto,
    query_features,
    turn,
)
from .window import add_bias, load_rows, valid_range, visible_keys, window


@triton.jit(do_not_specialize=RUNTIME)
def chunked_attention_sinusoidal_backward_query_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, lse_ptr,
    dq_ptr, delta_ptr,  # (B, H, Tq, d); delta (B, H, Tq) fp32
    with_position_ptr, features_ptr, dseries_ptr,  # (H, B, tiles BM, d), (H, B, tiles BM, 2K) and again, unscaled
    partial_ptr,  # (2, B, H, tiles, d) fp32, unscaled: dq's content and position parts, summed over the tile's rows
    onto_ptr, turns_ptr, basis_ptr, content_ptr, position_ptr, lengths_ptr, starts_ptr, key_mask_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, out_b, out_h, out_t, do_b, do_h, do_t, dq_b, dq_h, dq_t,
    B, H, Tq, Tk, d, chunk, left, right, offset, period, scale,
    HAS_CONTENT: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_STARTS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, PRECISION: tl.constexpr, NB: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    i_hb = i_h * B + i_b
    i_m = tl.program_id(0) * BM
    o_m = i_m + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    position = o_m + offset
    begin, end, key_end = valid_range(lengths_ptr, starts_ptr, i_b, Tk, HAS_LENGTHS, HAS_STARTS)
    low, high = window(position, begin, key_end, chunk, left, right)
    in_range = o_m < Tq
    m_row = in_range & (position >= begin) & (position < end) & (low < high)
    m_store = in_range[:, None] & (o_d < d)[None, :]

    q = load_rows(q_ptr + i_b * q_b + i_h * q_h, o_m, q_t, m_row, d, BD)
    onto_ptr += i_h * d * (2 * NB * BK)
    with_position = q  # zero in padded rows, whose gradients are zero too: the library's sum over rows stays finite
    if HAS_POSITION:
        with_position = add_bias(q, position_ptr + i_h * d, d, BD)
    i_series = (i_hb * tl.num_programs(0) + tl.program_id(0)) * BM
    p_rows = with_position_ptr + (i_series + tl.arange(0, BM))[:, None] * d + o_d[None, :]
    tl.store(p_rows, with_position, mask=(o_d < d)[None, :])
    i_turn = (i_m + offset) % period
    features = query_features(with_position, onto_ptr, turns_ptr, i_turn, d, PRECISION, BD, BM, NB, BK)
    for i_block in tl.static_range(NB):
        tl.store(block_pointers(features_ptr, i_series, i_block, BM, NB, BK), features[2 * i_block])
        tl.store(block_pointers(features_ptr, i_series, NB + i_block, BM, NB, BK), features[2 * i_block + 1])
    tl.debug_barrier()
    if HAS_CONTENT:
        q = add_bias(q, content_ptr + i_h * d, d, BD)
    do = load_rows(do_ptr + i_b * do_b + i_h * do_h, o_m, do_t, m_row, d, BD)
    out = load_rows(out_ptr + i_b * out_b + i_h * out_h, o_m, out_t, m_row, d, BD)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + i_bh * Tq + o_m, delta, mask=in_range)
    lse = tl.load(lse_ptr + i_bh * Tq + o_m, mask=m_row, other=0.0)
    k_ptr += i_b * k_b + i_h * k_h
    v_ptr += i_b * v_b + i_h * v_h
    to_log2 = scale * 1.4426950408889634
    dq = tl.zeros((BM, BD), tl.float32)
    dfeatures = ()
    for _block in tl.static_range(NB):
        dfeatures = dfeatures + (tl.zeros((BM, BK), tl.float32), tl.zeros((BM, BK), tl.float32))  # type: ignore[assignment]  # noqa: RUF005
    first = tl.min(tl.where(m_row, low, key_end), axis=0)
    last = tl.max(tl.where(m_row, high, 0), axis=0)
    for i_n in range(first // BN, tl.cdiv(last, BN)):
        j_0 = i_n * BN
        j = j_0 + tl.arange(0, BN)
        m_n = visible_keys(key_mask_ptr, i_b, j, begin, key_end, Tk, HAS_KEY_MASK)
        k = load_rows(k_ptr, j, k_t, m_n, d, BD)
        v = load_rows(v_ptr, j, v_t, m_n, d, BD)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        features = load_features(features_ptr, i_series + tl.minimum(i_n, 0), BM, NB, BK)
        s = add_position_scores(s, features, basis_ptr, j_0 % period, PRECISION, BN, NB, BK)
        visible = m_row[:, None] & (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
        if HAS_KEY_MASK:
            visible &= m_n[None, :]
        _, ds = _weights_and_gradient(s, visible, lse, delta, do, v, to_log2, PRECISION)
        ds = ds.to(k.dtype)
        dq = tl.dot(ds, k, acc=dq, input_precision=PRECISION)
        added = ()
        for i_block in tl.static_range(NB):
            cosine = load_block(basis_ptr, j_0 % period, i_block, BN, NB, BK)
            sine = load_block(basis_ptr, j_0 % period, NB + i_block, BN, NB, BK)
            df = tl.dot(ds, cosine, acc=dfeatures[2 * i_block], input_precision=PRECISION)
            dg = tl.dot(ds, sine, acc=dfeatures[2 * i_block + 1], input_precision=PRECISION)
            added = added + (df, dg)  # type: ignore[assignment]  # noqa: RUF005
        dfeatures = added

    p_partial = partial_ptr + (i_bh * tl.num_programs(0) + tl.program_id(0)) * d + o_d
    if HAS_CONTENT:
        tl.store(p_partial, tl.sum(dq, axis=0), mask=o_d < d)
    by_position = tl.zeros((BM, BD), tl.float32)
    for i_block in tl.static_range(NB):
        df, dg = dfeatures[2 * i_block], dfeatures[2 * i_block + 1]
        dc, ds = turn(df, dg, turns_ptr, i_turn, i_block, BM, NB, BK)
        dc, ds = dc.to(with_position.dtype), ds.to(with_position.dtype)
        tl.store(block_pointers(dseries_ptr, i_series, i_block, BM, NB, BK), dc)
        tl.store(block_pointers(dseries_ptr, i_series, NB + i_block, BM, NB, BK), ds)
        onto = load_onto(onto_ptr, i_block, d, BD, NB, BK)
        by_position = tl.dot(dc, tl.trans(onto), acc=by_position, input_precision=PRECISION)
        onto = load_onto(onto_ptr, NB + i_block, d, BD, NB, BK)
        by_position = tl.dot(ds, tl.trans(onto), acc=by_position, input_precision=PRECISION)
    if HAS_POSITION:
        p_partial += tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * d
        tl.store(p_partial, tl.sum(by_position, axis=0), mask=o_d < d)
    p_dq = dq_ptr + i_b * dq_b + i_h * dq_h + o_m.to(tl.int64)[:, None] * dq_t + o_d[None, :]
    tl.store(p_dq, ((dq + by_position) * scale).to(dq_ptr.dtype.element_ty), mask=m_store)


@triton.jit(do_not_specialize=RUNTIME)
def chunked_attention_sinusoidal_backward_key_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr,
    dk_ptr, dv_ptr,  # (B, H, Tk, d), both with the strides dk_b, dk_h, dk_t
    features_ptr,  # (H, B, rows, 2K)
    basis_ptr, content_ptr, lengths_ptr, starts_ptr, key_mask_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, dk_b, dk_h, dk_t,
    B, H, Tq, Tk, d, chunk, left, right, offset, period, rows, scale,
    HAS_CONTENT: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    PRECISION: tl.constexpr, NB: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    j_0 = tl.program_id(0) * BN
    j = j_0 + tl.arange(0, BN)
    begin, end, key_end = valid_range(lengths_ptr, starts_ptr, i_b, Tk, HAS_LENGTHS, HAS_STARTS)
    # The inverse window: key j is seen from the chunks floor((j - right) / chunk) ... floor((j + left) / chunk).
    first = tl.maximum(j_0 - right, 0) // chunk * chunk
    last = (tl.minimum(j_0 + BN, Tk) - 1 + left) // chunk * chunk + chunk
    first = tl.maximum(tl.maximum(first, begin) - offset, 0)
    last = tl.minimum(tl.minimum(last, end) - offset, Tq)
    last = tl.where((j_0 >= key_end) | (j_0 + BN <= begin), 0, last)

    m_n = visible_keys(key_mask_ptr, i_b, j, begin, key_end, Tk, HAS_KEY_MASK)
    k = load_rows(k_ptr + i_b * k_b + i_h * k_h, j, k_t, m_n, d, BD)
    v = load_rows(v_ptr + i_b * v_b + i_h * v_h, j, v_t, m_n, d, BD)
    q_ptr += i_b * q_b + i_h * q_h
    do_ptr += i_b * do_b + i_h * do_h
    i_series = (i_h * B + i_b) * rows
    to_log2 = scale * 1.4426950408889634
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    for i_m in range(first // BM, tl.cdiv(last, BM)):
        o_m = i_m * BM + tl.arange(0, BM)
        position = o_m + offset
        low, high = window(position, begin, key_end, chunk, left, right)
        m_row = (o_m < Tq) & (position >= begin) & (position < end) & (low < high)
        q = load_rows(q_ptr, o_m, q_t, m_row, d, BD)
        if HAS_CONTENT:
            q = add_bias(q, content_ptr + i_h * d, d, BD)
        do = load_rows(do_ptr, o_m, do_t, m_row, d, BD)
        lse = tl.load(lse_ptr + i_bh * Tq + o_m, mask=m_row, other=0.0)
        delta = tl.load(delta_ptr + i_bh * Tq + o_m, mask=m_row, other=0.0)
        features = load_features(features_ptr, i_series + i_m * BM, BM, NB, BK)
        visible = m_row[:, None] & (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
        if HAS_KEY_MASK:
            visible &= m_n[None, :]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s = add_position_scores(s, features, basis_ptr, j_0 % period, PRECISION, BN, NB, BK)
        p, ds = _weights_and_gradient(s, visible, lse, delta, do, v, to_log2, PRECISION)
        dv += tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
        dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION)
    dk *= scale

    o_d = tl.arange(0, BD)
    at = i_b * dk_b + i_h * dk_h + j.to(tl.int64)[:, None] * dk_t + o_d[None, :]
    inside = (j < Tk)[:, None] & (o_d < d)[None, :]
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=inside)
