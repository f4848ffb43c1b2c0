"""The softmax of the forward kernel, one tile of keys at a time."""

import triton
import triton.language as tl


@triton.jit
def add_keys(s, visible, v, to_log2, largest, total, out, PRECISION: tl.constexpr):
    """One more tile of scores s [BM, BN]: new maximum (in units of log 2), sum of exponentials, sum of values."""
    s = tl.where(visible, s * to_log2, float("-inf"))
    now = tl.maximum(largest, tl.max(s, axis=1))
    base = tl.where(now == float("-inf"), 0.0, now)  # nothing visible yet
    p = tl.exp2(s - base[:, None])
    keep = tl.exp2(largest - base)
    total = total * keep + tl.sum(p, axis=1)
    out = out * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return now, total, out
