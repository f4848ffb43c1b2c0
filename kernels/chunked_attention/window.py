"""Parts that forward and backward kernels share: windows, tiles of scores, the band of position scores.

Positions are int32 and stay below 2^29, offsets into tensors are int64. UNLIMITED stands for a context or chunk size of
None: three of them still fit an int32.
"""

import triton
import triton.language as tl

UNLIMITED = 1 << 29


@triton.jit
def valid_range(lengths_ptr, starts_ptr, i_b, Tk, HAS_LENGTHS: tl.constexpr, HAS_STARTS: tl.constexpr):
    """[begin, end) of the positions of item ``i_b`` that hold frames, for queries and for keys."""
    begin = 0
    end = 1 << 30
    if HAS_STARTS:
        begin = tl.maximum(tl.load(starts_ptr + i_b), 0).to(tl.int32)
    if HAS_LENGTHS:
        end = tl.maximum(tl.load(lengths_ptr + i_b), 0).to(tl.int32)
    return begin, end, tl.minimum(end, Tk)


@triton.jit
def window(position, begin, key_end, chunk, left, right):
    """Visible keys [low, high) of each query position."""
    chunk_begin = position // chunk * chunk
    return tl.maximum(chunk_begin - left, begin), tl.minimum(chunk_begin + chunk + right, key_end)


@triton.jit
def load_rows(ptr, rows, stride, mask, d, BD: tl.constexpr):
    """Frames ``rows`` of a (T, d) matrix with unit stride in d, zero where masked: [rows, BD]."""
    o_d = tl.arange(0, BD)
    p_rows = ptr + rows.to(tl.int64)[:, None] * stride + o_d[None, :]
    return tl.load(p_rows, mask=mask[:, None] & (o_d < d)[None, :], other=0.0)


@triton.jit
def add_bias(rows, bias_ptr, d, BD: tl.constexpr):
    """Rows plus one bias vector, in the rows' dtype: [rows, BD]."""
    o_d = tl.arange(0, BD)
    bias = tl.load(bias_ptr + o_d, mask=o_d < d, other=0.0)
    return (rows.to(tl.float32) + bias.to(tl.float32)[None, :]).to(rows.dtype)


@triton.jit
def visible_keys(key_mask_ptr, i_b, j, begin, key_end, Tk, HAS_KEY_MASK: tl.constexpr):
    """Keys of a tile whose frames the key mask (B, Tk) does not hide: [BN]."""
    m_n = (j >= begin) & (j < key_end)
    if HAS_KEY_MASK:
        m_n &= tl.load(key_mask_ptr + i_b * Tk + j, mask=m_n, other=0) != 0
    return m_n


@triton.jit
def band_pointers(band_ptr, i_row, j_0, o_n, band_row, band_shift):
    """Addresses of the position scores of rows x keys: a box of row stride 16 * band_row. See position.py."""
    aligned = (i_row.to(tl.int64) * band_row)[:, None] * 16 + (band_shift * 16 + j_0)
    return band_ptr + aligned + o_n[None, :]


@triton.jit
def tile_scores(
    q, k, band_ptr, i_row, m_row, j_0, o_n, band_row, band_shift, HAS_BAND: tl.constexpr, PRECISION: tl.constexpr
):
    """Unscaled scores of a tile: [BM, BN]. Those of hidden pairs are arbitrary, even NaN: select, do not multiply."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if HAS_BAND:
        p_band = band_pointers(band_ptr, i_row, j_0, o_n, band_row, band_shift)
        scores += tl.load(p_band, mask=m_row[:, None], other=0.0).to(tl.float32)
    return scores
