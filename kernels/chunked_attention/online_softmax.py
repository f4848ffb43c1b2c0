"""The softmax of the forward kernels, one tile of keys at a time, and what it leaves in memory."""

import triton
import triton.language as tl

from .window import load_rows


@triton.jit
def add_keys(
    s, visible, v_ptr, j, v_t, m_n, d, to_log2, largest, total, out, PRECISION: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """One more tile of scores s [BM, BN]: new maximum (in units of log 2), sum of exponentials, sum of values."""
    s = tl.where(visible, s * to_log2, float("-inf"))
    now = tl.maximum(largest, tl.max(s, axis=1))
    base = tl.where(now == float("-inf"), 0.0, now)  # nothing visible yet
    p = tl.exp2(s - base[:, None])
    keep = tl.exp2(largest - base)
    total = total * keep + tl.sum(p, axis=1)
    v = load_rows(v_ptr, j, v_t, m_n, d, BD)
    out = out * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return now, total, out


@triton.jit
def store_result(
    out_ptr, out_t, lse_ptr, o_m, row_end, d, m_row, largest, total, out, HAS_KEY_MASK: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Output and log-sum-exp of the rows; 0 where a row sees nothing."""
    if HAS_KEY_MASK:
        m_row &= total != 0  # the mask may hide a whole window
    total_or_one = tl.where(m_row, total, 1.0)
    out = out / total_or_one[:, None]
    lse = tl.where(m_row, (largest + tl.log2(total_or_one)) * 0.6931471805599453, 0.0)

    o_d = tl.arange(0, BD)
    in_range = o_m < row_end
    p_out = out_ptr + o_m.to(tl.int64)[:, None] * out_t + o_d[None, :]
    tl.store(p_out, out.to(out_ptr.dtype.element_ty), mask=in_range[:, None] & (o_d < d)[None, :])
    tl.store(lse_ptr + o_m, lse, mask=in_range)
