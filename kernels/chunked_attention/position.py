"""Scores of queries against relative positions, and the gradient of the table: kernels and the layout of both.

Row i of the band holds (q_i + position_bias) . position for every offset of the window, column x for key - query =
x - highest: W columns instead of the 2T - 1 of Transformer-XL. Key j of query i lies at i * (R - 1) + j + constant, so
the box of a tile of scores is a box of row stride R - 1 in memory: the relative shift costs nothing. R = 1 (mod 16) and
a suitable first column make every row of that box start at a multiple of 16 elements, which keeps its loads vectorised.

              x = 0 . . . W-1                    j = j0 . . . j0+3
    i = 0     . . . a b c d . .   row stride R    a b c d
    i = 1     . . e f g h . . .   ------------>   e f g h      row stride R - 1
    i = 2     . i j k l . . . .                   i j k l

The band is read three times by key and written once, so its rows are aligned for the reader. They are aligned for the
writer, too, if all rows of a tile begin at the same place modulo 8 elements (16 bytes), so it writes rows that are 8
apart. Up to 7 columns before the first and behind the last one are written with them; nothing else is there.

Score gradients are written once by key and read twice by x (for the query's and the table's gradient): rows of W
rounded up to 16. Neither is filled before: what no pair of a window reaches is never read, or selected away.
"""

import triton
import triton.language as tl

from .window import add_bias, band_start, item_pointer, load_rows, valid_range, window

SLACK = 512  # elements around the band that the corners of edge tiles touch: at least BM + BN
# Sizes that change from call to call: no variant of a kernel for each.
RUNTIME = [
    *("H", "Tk", "chunk", "left", "right", "offset", "row_begin", "row_end", "band_row", "band_column"),
    *("width", "highest", "tiles_per_split", "row_tiles", "batch"),
]


def row_stride(width: int) -> int:
    """Smallest stride = 1 (mod 16) that holds ``width`` columns after up to 15 empty ones."""
    return (width + 14 + 15) // 16 * 16 + 1


@triton.jit
def load_table(table_ptr, x, width, D: tl.constexpr, BD: tl.constexpr):
    """Rows of the table for columns x: the table (width, D) begins at the lowest offset query - key: [x, BD]."""
    o_d = tl.arange(0, BD)
    inside = ((x >= 0) & (x < width))[:, None] & (o_d < D)[None, :]
    return tl.load(table_ptr + (width - 1 - x)[:, None] * D + o_d[None, :], mask=inside, other=0.0)


@triton.jit
def store_score_gradients(tile_ptr, ds, rows, x_0, o_m, o_n, width):
    """Store a tile by key whose first row has column ``x_0`` at its first key: row m has x_0 - m there.

    ``tile_ptr``: of the first of ``rows``. Zeros of hidden pairs are written, too: the mask needs no window, which in
    the layout of these stores would be that of 16 rows a thread.
    """
    row_width = tl.cdiv(width, 16) * 16
    from_first = o_n[None, :] - o_m[:, None]
    inside = (o_m < rows)[:, None] & (from_first >= -x_0) & (from_first < row_width - x_0)
    tl.store(tile_ptr + x_0 + ((o_m * (row_width - 1))[:, None] + o_n[None, :]), ds, mask=inside)


@triton.jit
def load_score_gradients(tile_ptr, o_m, m_row, position, low, high, x, width, highest):
    """Score gradients of consecutive rows and columns x, zero outside the windows: [rows, x].

    ``tile_ptr``: of the first row; x begins at a multiple of 16. The mask is the same for 16 columns, which keeps 16
    bytes a load; the windows are selected afterwards.
    """
    row_width = tl.cdiv(width, 16) * 16
    ds = tl.load(
        tile_ptr + ((o_m * row_width)[:, None] + x[None, :]), mask=m_row[:, None] & (x < row_width)[None, :], other=0.0
    )
    to_column = highest - position
    visible = (x[None, :] >= (low + to_column)[:, None]) & (x[None, :] < (high + to_column)[:, None])
    return tl.where(visible, ds, 0.0)


@triton.jit(do_not_specialize=RUNTIME)
def chunked_attention_band_kernel(
    q_ptr, table_ptr, band_ptr, given, q_strides,  # Given; Strides
    table_head,  # distance between the tables of two heads
    H, Tk, offset, row_begin, row_end, band_row, band_column, width,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The band of BM rows, each 8 behind the last: one product with the table; rows of padding are zero.

    With R = 16 k + 1 (k is ``band_row``), column x of row 8 m + c is at 8 (m R + 2 c k) + c + band_column + x, so with
    x = 8 y + n - (c + band_column) at a multiple of 8 plus n.
    """
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    remainder = tl.program_id(0) % 8
    eighth = tl.program_id(0) // 8 * BM + tl.arange(0, BM)
    i_row = eighth * 8 + remainder
    o_m = row_begin + i_row
    begin, end, _ = valid_range(given, i_b, Tk)
    in_range = o_m < row_end
    m_row = in_range & (o_m + offset >= begin) & (o_m + offset < end)
    q = load_rows(item_pointer(q_ptr, i_b, i_h, q_strides, UNIT), o_m, q_strides, m_row, UNIT, D, BD)
    q = add_bias(q, given, i_h, D, BD)
    table_ptr += i_h * table_head
    rows_ptr = band_start(band_ptr, i_bh, row_end - row_begin, band_row) + remainder * band_row * 16
    rows_ptr = rows_ptr + (eighth.to(tl.int64) * (band_row * 16 + 1))[:, None] * 8
    o_n = tl.arange(0, BN)
    empty = remainder + band_column
    for y in range(empty // 8, tl.cdiv(width + empty, 8), BN // 8):
        x = y * 8 - empty + o_n
        scores = tl.dot(q, tl.trans(load_table(table_ptr, x, width, D, BD)), input_precision=PRECISION)
        some_column = (y + o_n // 8) * 8 < width + empty
        tl.store(
            rows_ptr + (y * 8 + o_n)[None, :],
            scores.to(band_ptr.dtype.element_ty),
            mask=in_range[:, None] & some_column[None, :],
        )


@triton.jit(do_not_specialize=RUNTIME)
def chunked_attention_table_gradient_kernel(
    q_ptr, dscores_ptr, partial_ptr,  # partial (splits, H, width, D) fp32, in the order of the table
    given, q_strides,  # Given; Strides
    H, Tk, chunk, left, right, offset, row_begin, row_end, width, highest, batch, row_tiles, tiles_per_split, scale,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BN rows of the table's gradient from a share of the rows of all items: added in a fixed order."""
    x = tl.program_id(0) * BN + tl.arange(0, BN)
    i_h = tl.program_id(1).to(tl.int64)
    i_split = tl.program_id(2).to(tl.int64)
    total = tl.zeros((BN, BD), tl.float32)
    row_elements = (row_end - row_begin).to(tl.int64) * (tl.cdiv(width, 16) * 16)
    first = i_split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, batch * row_tiles)):
        i_b = tile // row_tiles
        first_row = (tile % row_tiles * BM).to(tl.int32)
        o_row = tl.arange(0, BM)
        o_m = row_begin + first_row + o_row
        position = o_m + offset
        begin, end, key_end = valid_range(given, i_b, Tk)
        low, high = window(position, begin, key_end, chunk, left, right)
        m_row = (o_m < row_end) & (position >= begin) & (position < end) & (low < high)
        tile_ptr = dscores_ptr + (i_b * H + i_h) * row_elements + first_row.to(tl.int64) * (tl.cdiv(width, 16) * 16)
        ds = load_score_gradients(tile_ptr, o_row, m_row, position, low, high, x, width, highest)
        q = load_rows(item_pointer(q_ptr, i_b, i_h, q_strides, UNIT), o_m, q_strides, m_row, UNIT, D, BD)
        q = add_bias(q, given, i_h, D, BD)
        total += tl.dot(tl.trans(ds), q, input_precision=PRECISION)
    o_d = tl.arange(0, BD)
    partial_ptr += (i_split * H + i_h) * width * D
    inside = (x < width)[:, None] & (o_d < D)[None, :]
    tl.store(partial_ptr + (width - 1 - x)[:, None] * D + o_d[None, :], total * scale, mask=inside)
