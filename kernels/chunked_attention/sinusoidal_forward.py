"""Forward kernel of ``ops.chunked_attention_sinusoidal``: forward.py with features of the queries instead of a band.

A program computes the features of its BM queries once, from the queries, and keeps them: nothing of the position term
goes to memory.
"""

import triton
import triton.language as tl

from .online_softmax import add_keys, store_result
from .sinusoidal import RUNTIME, add_position_scores, query_features
from .window import add_bias, load_rows, valid_range, visible_keys, window


@triton.jit(do_not_specialize=RUNTIME)
def chunked_attention_sinusoidal_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,  # (B, H, T, d); lse (B, H, Tq) fp32
    onto_ptr, turns_ptr, basis_ptr,  # (H, d, 2K), (P + more, 2K) fp32, (P + more, 2K)
    content_ptr, position_ptr, lengths_ptr, starts_ptr, key_mask_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, out_b, out_h, out_t,  # strides in elements
    B, H, Tq, Tk, d, chunk, left, right, offset, period, scale,
    HAS_CONTENT: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_STARTS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, PRECISION: tl.constexpr, NB: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    i_m = tl.program_id(0) * BM
    o_m = i_m + tl.arange(0, BM)
    position = o_m + offset
    begin, end, key_end = valid_range(lengths_ptr, starts_ptr, i_b, Tk, HAS_LENGTHS, HAS_STARTS)
    low, high = window(position, begin, key_end, chunk, left, right)
    m_row = (o_m < Tq) & (position >= begin) & (position < end) & (low < high)

    q = load_rows(q_ptr + i_b * q_b + i_h * q_h, o_m, q_t, m_row, d, BD)
    onto_ptr += i_h * d * (2 * NB * BK)
    with_position = q
    if HAS_POSITION:
        with_position = add_bias(q, position_ptr + i_h * d, d, BD)
    features = query_features(with_position, onto_ptr, turns_ptr, (i_m + offset) % period, d, PRECISION, BD, BM, NB, BK)
    if HAS_CONTENT:
        q = add_bias(q, content_ptr + i_h * d, d, BD)
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
        j = j_0 + tl.arange(0, BN)
        m_n = visible_keys(key_mask_ptr, i_b, j, begin, key_end, Tk, HAS_KEY_MASK)
        k = load_rows(k_ptr, j, k_t, m_n, d, BD)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s = add_position_scores(s, features, basis_ptr, j_0 % period, PRECISION, BN, NB, BK)
        visible = m_row[:, None] & (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
        if HAS_KEY_MASK:
            visible &= m_n[None, :]
        largest, total, out = add_keys(s, visible, v_ptr, j, v_t, m_n, d, to_log2, largest, total, out, PRECISION, BD)
    store_result(
        out_ptr + i_b * out_b + i_h * out_h, out_t, lse_ptr + i_bh * Tq, o_m, Tq, d, m_row, largest, total, out,
        HAS_KEY_MASK, BD,
    )  # fmt: skip
