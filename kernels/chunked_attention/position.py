"""Scores of queries against relative positions as one matrix product, laid out so that tiles read them unsheared.

Row i of the band holds (q_i + position_bias) . position for every offset of the window, column x for key - query =
x - highest: W columns instead of the 2T - 1 of Transformer-XL. Key j of query i lies at i * (R - 1) + j + constant, so
the box of a tile of scores is a box of row stride R - 1 in memory: the relative shift costs nothing. R = 1 (mod 16) and
a suitable first column make every row of that box start at a multiple of 16 elements, which keeps its loads vectorised.

              x = 0 . . . W-1                    j = j0 . . . j0+3
    i = 0     . . . a b c d . .   row stride R    a b c d
    i = 1     . . e f g h . . .   ------------>   e f g h      row stride R - 1
    i = 2     . i j k l . . . .                   i j k l
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SLACK = 512  # elements around the band that the corners of edge tiles touch: more than any BM + BN


@dataclass
class Band:
    with_position: Tensor  # (H, B * rows, d): q + position_bias, zero in padded rows
    table: Tensor  # (H, W, d): the rows of the position table, in the direction of the keys
    buffer: Tensor
    rows: int  # per item, rounded up to 16
    row_stride: int
    column: int  # of x = 0

    @property
    def bh_stride(self) -> int:
        return self.rows * self.row_stride

    def start(self, buffer: Tensor) -> Tensor:
        return buffer[SLACK:]

    def view(self, buffer: Tensor) -> Tensor:
        """(H, B * rows, W) of a buffer of this layout."""
        heads, rows, _ = self.with_position.shape
        strides = (rows * self.row_stride, self.row_stride, 1)
        return buffer.as_strided((heads, rows, self.table.shape[1]), strides, SLACK + self.column)

    def fill(self) -> "Band":
        torch.bmm(self.with_position, self.table.transpose(1, 2), out=self.view(self.buffer))
        return self


def row_stride(width: int) -> int:
    """Smallest stride = 1 (mod 16) that holds ``width`` columns after up to 15 empty ones."""
    return (width + 14 + 15) // 16 * 16 + 1


def make_band(
    query: Tensor,  # (B, H, rows, d), a segment
    position: Tensor,  # (H, R, d)
    position_bias: Tensor | None,  # (H, d)
    position_zero: int,
    offsets: tuple[int, int],
    first_position: int,
    padded: Tensor | None,  # (B, rows) bool
) -> Band:
    """Lay out the band of a segment of queries; :meth:`Band.fill` computes it."""
    batch, heads, count, head_dim = query.shape
    lowest, highest = offsets
    rows = (count + 15) // 16 * 16
    with_position = query.new_zeros(heads, batch, rows, head_dim)
    target = with_position[:, :, :count]
    target.copy_(query.transpose(0, 1))
    if position_bias is not None:
        target += position_bias[:, None, None]
    if padded is not None:
        target.masked_fill_(padded[None, :, :, None], 0)  # padding may hold NaN, and the table's gradient sums over it
    table = position[:, position_zero + lowest : position_zero + highest + 1].flip(1)
    stride = row_stride(table.shape[1])
    buffer = query.new_zeros(2 * SLACK + heads * batch * rows * stride)
    return Band(
        with_position.view(heads, batch * rows, head_dim), table, buffer, rows, stride, (first_position - highest) % 16
    )
