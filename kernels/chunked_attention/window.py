"""Parts that the kernels share: windows, tiles of frames and of scores.

Positions are int32 and stay below 2^29, offsets into tensors are int64. UNLIMITED stands for a context or chunk size of
None: three of them still fit an int32. An absent optional input is None, which Triton compiles away.

Strides come divided by UNIT: 8 where they are multiples of 8 but not all of 16, which Triton would not know and would
load two bytes at a time (head size 72), else 1.
"""

import triton
import triton.language as tl

UNLIMITED = 1 << 29


@triton.jit
def valid_range(given, i_b, Tk):
    """[begin, end) of the positions of item ``i_b`` that hold frames, for queries and for keys."""
    begin = 0
    end = 1 << 30
    if given.starts is not None:
        begin = tl.maximum(tl.load(given.starts + i_b), 0).to(tl.int32)
    if given.lengths is not None:
        end = tl.maximum(tl.load(given.lengths + i_b), 0).to(tl.int32)
    return begin, end, tl.minimum(end, Tk)


@triton.jit
def window(position, begin, key_end, chunk, left, right):
    """Visible keys [low, high) of each query position."""
    chunk_begin = position // chunk * chunk
    return tl.maximum(chunk_begin - left, begin), tl.minimum(chunk_begin + chunk + right, key_end)


@triton.jit
def item_pointer(ptr, i_b, i_h, strides, UNIT: tl.constexpr):
    """Frames of one item and head: (T, D)."""
    return ptr + (i_b * strides.item + i_h * strides.head) * UNIT


@triton.jit
def row_pointers(ptr, rows, strides, UNIT: tl.constexpr, BD: tl.constexpr):
    """Addresses of frames of a (T, D) matrix with unit stride in D: [rows, BD]."""
    return ptr + (rows.to(tl.int64) * strides.frame * UNIT)[:, None] + tl.arange(0, BD)[None, :]


@triton.jit
def load_rows(ptr, rows, strides, mask, UNIT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Frames ``rows``, zero where masked: [rows, BD]."""
    inside = mask[:, None] & (tl.arange(0, BD) < D)[None, :]
    return tl.load(row_pointers(ptr, rows, strides, UNIT, BD), mask=inside, other=0.0)


@triton.jit
def store_rows(ptr, rows, strides, values, mask, UNIT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    inside = mask[:, None] & (tl.arange(0, BD) < D)[None, :]
    tl.store(row_pointers(ptr, rows, strides, UNIT, BD), values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_bias(rows, given, i_h, D: tl.constexpr, BD: tl.constexpr):
    """Rows plus the bias of a head, in the rows' dtype: [rows, BD]. Unchanged without a bias."""
    if given.bias is not None:
        o_d = tl.arange(0, BD)
        bias = tl.load(given.bias + i_h * D + o_d, mask=o_d < D, other=0.0)
        rows = (rows.to(tl.float32) + bias.to(tl.float32)[None, :]).to(rows.dtype)
    return rows


@triton.jit
def visible_keys(given, i_b, j, begin, key_end, Tk):
    """Keys of a tile whose frames the key mask (B, Tk) does not hide: [BN]."""
    m_n = (j >= begin) & (j < key_end)
    if given.key_mask is not None:
        m_n &= tl.load(given.key_mask + i_b * Tk + j, mask=m_n, other=0) != 0
    return m_n


@triton.jit
def band_start(band_ptr, i_bh, rows, band_row):
    """The band of one item and head; see position.py."""
    return band_ptr + i_bh * (tl.cdiv(rows, 16) * 16) * (band_row * 16 + 1)


@triton.jit
def load_band(band_ptr, i_row, m_row, j_0, o_n, band_row, band_shift):
    """Position scores of a tile: its box has the row stride 16 * band_row in the band of an item and head: [BM, BN]."""
    aligned = (i_row.to(tl.int64) * band_row)[:, None] * 16 + (band_shift * 16 + j_0)
    return tl.load(band_ptr + aligned + o_n[None, :], mask=m_row[:, None], other=0.0)


@triton.jit
def tile_scores(q, k, band_ptr, i_row, m_row, j_0, o_n, band_row, band_shift, PRECISION: tl.constexpr):
    """Unscaled scores of a tile: [BM, BN]. Those of hidden pairs are arbitrary, even NaN: select, do not multiply.

    ``band_ptr``: of the item and head, or None.
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if band_ptr is not None:
        scores += load_band(band_ptr, i_row, m_row, j_0, o_n, band_row, band_shift).to(tl.float32)
    return scores
