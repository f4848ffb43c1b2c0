"""Launches the kernels segment by segment, so that the band of position scores never exceeds a fixed budget.

    forward    band (position.py), then one kernel
    backward   band, query kernel (dq, score gradients, sums for the biases), key kernel (dk, dv), gradient of the table

Every gradient is written once, in its own dtype and in the memory order of its input; only several segments add up.
``options`` is the record of bestrq2/ops/chunked_attention/operator.py.
"""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..integers import ceil_div, power_of_2
from ..tuning import load_configs
from .backward import chunked_attention_backward_key_kernel, chunked_attention_backward_query_kernel
from .forward import chunked_attention_forward_kernel
from .position import SLACK, chunked_attention_band_kernel, chunked_attention_table_gradient_kernel, row_stride
from .records import Frames, Given, KeyGradients, Positions, QueryGradients, Rows, Strides
from .window import UNLIMITED

BAND_BYTES = 256 * 2**20
SEGMENT_ROWS = 128  # segments are multiples of it
PROGRAMS = 264  # of the gradient of the table: two for every multiprocessor of an H100; more only add partial sums
MOST_PAIRS = 65535  # items x heads: the second dimension of a grid


def padded_dim(head_dim: int) -> int:
    return max(16, power_of_2(head_dim))


def config_name(
    names: Container[str], kernel: str, head_dim: int, fp32: bool, *, key_mask: bool, positions: bool
) -> str:
    """Choose the configuration of a call among ``names``.

    They are named by kernel, head size (itself, where there is such a one, else rounded up to 64, 128 or 256) and
    ``/fp32`` for fp32. One that ends with ``/no_positions``, or with ``/key_mask``, is for calls without positions, or
    with a key mask: inputs change how many registers a tile takes.
    """
    special = [name for name, holds in (("/no_positions", not positions), ("/key_mask", key_mask)) if holds]
    sizes = (head_dim, max(64, padded_dim(head_dim)))
    keys = [f"{kernel}/{size}{'/fp32' if fp32 else ''}" for size in sizes]
    return next((name for key in keys for name in (*(key + end for end in special), key) if name in names), keys[-1])


def checked_config(configs: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The tile ``name``.

    Raises:
        ValueError: if the corners of a tile would touch memory outside the band.
    """
    config = configs[name]
    if config["BM"] + config["BN"] > SLACK:
        raise ValueError(f"{name}: expected BM + BN of at most {SLACK}, got {config['BM']} + {config['BN']}")
    return dict(config)


@dataclass(frozen=True)
class Segment:
    """Rows [begin, end) of the queries and the offsets query - key that they see."""

    begin: int
    end: int
    lowest: int
    highest: int

    @property
    def rows(self) -> int:
        return self.end - self.begin

    @property
    def width(self) -> int:
        return self.highest - self.lowest + 1

    @property
    def band_row(self) -> int:
        return (row_stride(self.width) - 1) // 16

    def band_column(self, offset: int) -> int:
        """Of x = 0, so that the boxes of tiles begin at multiples of 16."""
        return (offset + self.begin - self.highest) % 16

    def band_shift(self, offset: int) -> int:
        return (self.band_column(offset) + self.highest - offset - self.begin) // 16


class _Call:
    """Arguments that all launches of a call share."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, options: Any) -> None:
        self.options = options
        self.query, self.key, self.value = (unit_stride(x) for x in (query, key, value))
        self.batch, self.heads, self.frames, self.head_dim = query.shape
        self.keys = key.shape[2]
        self.content_bias, self.position_bias, self.lengths, self.starts, self.key_mask = (
            as_read(getattr(options, name))
            for name in ("content_bias", "position_bias", "lengths", "starts", "key_mask")
        )
        table = options.position
        self.table = None if table is None else table.contiguous()
        self.window = window_sizes(options)
        self.offset, self.zero, self.scale = options.query_offset, options.position_zero, options.scale

    def constants(self, kernel: str) -> dict[str, Any]:
        configs = load_configs("chunked_attention", self.query.device)
        fp32, given = self.query.dtype == torch.float32, self.options
        inputs = {"key_mask": given.key_mask is not None, "positions": given.position is not None}
        name = config_name(configs, kernel, self.head_dim, fp32, **inputs)
        return {
            # Read for fp32 only. Configurations of large heads replace it by "ieee": fewer registers, no matrix unit.
            "PRECISION": "tf32x3" if fp32 else "tf32",
            "D": self.head_dim,
            "BD": padded_dim(self.head_dim),
            **checked_config(configs, name),
        }

    @property
    def given(self) -> Given:
        return Given(self.content_bias, self.lengths, self.starts, self.key_mask)

    @property
    def given_for_positions(self) -> Given:
        return Given(self.position_bias, self.lengths, self.starts)

    def segments(self) -> Iterator[Segment]:
        """Row ranges whose band fits the budget; one range when there are no positions."""
        rows = self.frames
        if self.table is not None:
            lowest, highest = self._offsets(0, self.frames)
            width = row_stride(highest - lowest + 1) * self.query.element_size()
            rows = BAND_BYTES // (width * self.batch * self.heads) // SEGMENT_ROWS * SEGMENT_ROWS
        rows = max(rows, SEGMENT_ROWS)
        for begin in range(0, self.frames, rows):
            end = min(begin + rows, self.frames)
            lowest, highest = self._offsets(begin, end)
            if self.table is not None:  # only where nothing is visible does the table not hold them all
                first, last = -self.zero, self.table.shape[1] - 1 - self.zero
                lowest = min(max(lowest, first), last)
                highest = min(max(highest, lowest), last)
            yield Segment(begin, end, lowest, highest)

    def _offsets(self, begin: int, end: int) -> tuple[int, int]:
        """Bounds on query position - key over the visible pairs of rows [begin, end)."""
        chunk, left, right = self.window
        lowest = max(self.offset + begin - self.keys + 1, 1 - chunk - right)
        return lowest, max(min(self.offset + end - 1, chunk - 1 + left), lowest)

    def rows_of_table(self, segment: Segment) -> Tensor:
        """The table from the lowest offset of the segment on: (H, ..., d), as a pointer with the table's strides."""
        assert self.table is not None
        return self.table[:, self.zero + segment.lowest :]

    def band(self, segment: Segment) -> Tensor | None:
        """Position scores of a segment, from the column where its rows begin; None without positions."""
        if self.table is None:
            return None
        rows = (segment.rows + 15) // 16 * 16
        size = self.batch * self.heads * rows * row_stride(segment.width)
        band = self.query.new_empty(2 * SLACK + size)[SLACK:]
        constants, table = self.constants("band"), self.rows_of_table(segment)
        unit, (strides,) = in_units(self.query)
        tiles = 8 * ceil_div(segment.rows, 8 * constants["BM"])
        chunked_attention_band_kernel[(tiles, self.batch * self.heads)](
            self.query, table, band, self.given_for_positions, strides, table.stride(0),
            self.heads, self.keys, self.offset, segment.begin, segment.end,
            segment.band_row, segment.band_column(self.offset), segment.width, UNIT=unit, **constants,
        )  # fmt: skip
        return band

    def sizes(self, segment: Segment) -> tuple[int, ...]:
        """The integer arguments from H to band_shift."""
        place = (segment.begin, segment.end, segment.band_row, segment.band_shift(self.offset))
        return self.heads, self.frames, self.keys, *self.window, self.offset, *place


def in_units(*tensors: Tensor) -> tuple[int, list[Strides]]:
    """(UNIT, the strides of item, head and frame of every tensor divided by it): see window.py."""
    strides = [x.stride() for x in tensors]
    bits = 0
    for item, head, frame, *_ in strides:
        bits |= item | head | frame
    if bits % 16 == 0 or bits % 8:
        return 1, [Strides(item, head, frame) for item, head, frame, *_ in strides]
    return 8, [Strides(item // 8, head // 8, frame // 8) for item, head, frame, *_ in strides]


def window_sizes(options: Any) -> tuple[int, int, int]:
    """Chunk size, left and right context as the kernels take them."""
    return _limited(options.chunk_size), _limited(options.left_context), _limited(options.right_context)


def _limited(size: int | None) -> int:
    return UNLIMITED if size is None else min(size, UNLIMITED)


def as_read(x: Tensor | None) -> Tensor | None:
    """An optional input as the kernels read it: contiguous, a mask as bytes, lengths and starts in the range of int32.

    The kernels convert int64 to int32; clamping there would cost the largest of them a spilled register.
    """
    if x is None:
        return None
    if x.dtype == torch.int64:
        x = x.clamp(0, UNLIMITED)
    return x.contiguous().view(torch.uint8) if x.dtype == torch.bool else x.contiguous()


def unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _written_like(x: Tensor) -> Tensor:
    """Memory for what is written frame by frame: in the order of ``x`` if its last stride is 1."""
    result = torch.empty_like(x)
    return result if result.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def _in_order_of(x: Tensor, result: Tensor) -> Tensor:
    """``result`` with the strides that ``empty_like(x)`` has."""
    order = torch.empty_like(x)
    return result.to(x.dtype) if order.stride() == result.stride() else order.copy_(result)


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device if device.type == "cuda" else -1)


def _parts(query: Tensor, options: Any) -> list[tuple[slice, Any]]:
    """Items of each launch with their options, where all of them are too many for one; else nothing.

    Raises:
        ValueError: for one item with too many heads.
    """
    batch, heads = query.shape[:2]
    if batch * heads <= MOST_PAIRS:
        return []
    if heads > MOST_PAIRS:
        raise ValueError(f"query: expected at most {MOST_PAIRS} heads in a Triton call, got {heads}")
    size, parts = MOST_PAIRS // heads, []
    for part in (slice(begin, begin + size) for begin in range(0, batch, size)):
        bounds = {name: getattr(options, name) for name in ("lengths", "starts", "key_mask")}
        parts.append((part, options._replace(**{name: x if x is None else x[part] for name, x in bounds.items()})))
    return parts


def forward(query: Tensor, key: Tensor, value: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    """Return the output, in query's memory order, and the log-sum-exp of the scaled scores (B, H, Tq) in fp32."""
    if parts := _parts(query, options):
        outs, sums = zip(*(forward(query[part], key[part], value[part], own) for part, own in parts))
        return _in_order_of(query, torch.cat(outs)), torch.cat(sums)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if not query.numel():
        return torch.empty_like(query), lse
    call, out = _Call(query, key, value, options), _written_like(query)
    constants = call.constants("forward")
    frames = Frames(call.query, call.key, call.value, out)
    unit, strides = in_units(*frames[:4])
    with _on(query.device):
        for segment in call.segments():
            chunked_attention_forward_kernel[(ceil_div(segment.rows, constants["BM"]), call.batch * call.heads)](
                frames, lse, call.band(segment), call.given, Frames(*strides),
                *call.sizes(segment), call.scale, UNIT=unit, **constants,
            )  # fmt: skip
    return _in_order_of(query, out), lse


def backward(
    grad: Tensor, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, options: Any
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, position, content_bias and position_bias (None where absent)."""
    tables = {name: getattr(options, name) for name in ("position", "content_bias", "position_bias")}
    sums = {
        name: torch.zeros(x.shape, dtype=torch.float32, device=query.device)
        for name, x in tables.items()
        if x is not None
    }
    if parts := _parts(query, options):
        several = [
            _gradients(grad[part], out[part], lse[part], query[part], key[part], value[part], own, sums)
            for part, own in parts
        ]
        dq, dk, dv = (torch.cat(gradients) for gradients in zip(*several))
    else:
        dq, dk, dv = _gradients(grad, out, lse, query, key, value, options, sums)
    frames = [_in_order_of(x, gradient) for x, gradient in ((query, dq), (key, dk), (value, dv))]
    return (*frames, *(None if x is None else sums[name].to(x.dtype) for name, x in tables.items()))


def _gradients(
    grad: Tensor, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, options: Any, sums: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; those of the tables are added to ``sums``."""
    if not (query.numel() and key.numel()):
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    call, dq = _Call(query, key, value, options), _written_like(query)
    # The kernels read the output and write dq with one set of strides.
    out = out if out.stride() == dq.stride() else torch.empty_like(dq).copy_(out)
    grad = unit_stride(grad.to(query.dtype))
    segments = list(call.segments())
    dk, dv = _key_gradients(call.key, len(segments) > 1)
    delta = torch.empty_like(lse)
    with _on(query.device):
        for segment in segments:
            _backward_segment(call, segment, grad, out, lse, delta, dq, dk, dv, sums)
    return dq, dk, dv


def _key_gradients(key: Tensor, several: bool) -> tuple[Tensor, Tensor]:
    """Memory for dk and dv, laid out alike; zeroed sums in fp32 where several segments add to them."""
    dk = _written_like(key)
    if several:
        dk = torch.zeros_like(dk, dtype=torch.float32)
    return dk, torch.zeros_like(dk) if several else torch.empty_like(dk)


def _backward_segment(
    call: _Call,
    segment: Segment,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    sums: dict[str, Tensor],
) -> None:
    """Fill the segment's rows of dq and, if it is the only one, dk and dv; else add to those. Add to the sums."""
    frames, rows = Frames(call.query, call.key, call.value, out), Rows(lse, delta)
    pairs, sizes, band = call.batch * call.heads, call.sizes(segment), call.band(segment)
    constants = call.constants("backward_query")
    tiles = ceil_div(segment.rows, constants["BM"])
    dscores = table = None
    if band is not None:
        dscores = call.query.new_empty(pairs * segment.rows * ((segment.width + 15) // 16 * 16))
        table = call.rows_of_table(segment)
    biases = [name for name in ("content_bias", "position_bias") if name in sums]
    shape = (len(biases), call.batch, call.heads, tiles, call.head_dim)
    partial = torch.empty(shape, dtype=torch.float32, device=grad.device)
    of_bias = dict(zip(biases, partial))
    unit, strides = in_units(*frames[:4], grad)
    gradients = QueryGradients(grad, dq, of_bias.get("content_bias"), of_bias.get("position_bias"))
    positions = Positions(band, dscores, table, None if table is None else table.stride(0))
    chunked_attention_backward_query_kernel[(tiles, pairs)](
        frames, rows, gradients, positions, call.given, Frames(*strides),
        *sizes, segment.width, segment.highest, call.scale, UNIT=unit, **constants,
    )  # fmt: skip
    if biases:
        for name, of_tiles in zip(biases, partial.sum((1, 3))):
            sums[name] += of_tiles

    constants = call.constants("backward_key")
    unit, (*strides, of_gradients) = in_units(*frames[:4], grad, dk)
    chunked_attention_backward_key_kernel[(ceil_div(call.keys, constants["BN"]), pairs)](
        frames, rows, KeyGradients(grad, dk, dv), band, call.given, Frames(*strides), of_gradients,
        *sizes, call.scale, ACCUMULATE=segment.rows < call.frames, UNIT=unit, **constants,
    )  # fmt: skip
    if dscores is not None:
        _add_table_gradient(call, segment, dscores, sums["position"])


def _add_table_gradient(call: _Call, segment: Segment, dscores: Tensor, total: Tensor) -> None:
    """Add the product of score gradients and queries to the sum of the table: partial sums in fp32, then one sum."""
    constants = call.constants("table_gradient")
    row_tiles, columns = ceil_div(segment.rows, constants["BM"]), ceil_div(segment.width, constants["BN"])
    splits = max(1, min(PROGRAMS // (columns * call.heads), call.batch * row_tiles))
    tiles_per_split = ceil_div(call.batch * row_tiles, splits)
    splits = ceil_div(call.batch * row_tiles, tiles_per_split)
    shape = (splits, call.heads, segment.width, call.head_dim)
    partial = torch.empty(shape, dtype=torch.float32, device=dscores.device)
    unit, (strides,) = in_units(call.query)
    chunked_attention_table_gradient_kernel[(columns, call.heads, splits)](
        call.query, dscores, partial, call.given_for_positions, strides,
        call.heads, call.keys, *call.window, call.offset, segment.begin, segment.end, segment.width, segment.highest,
        call.batch, row_tiles, tiles_per_split, call.scale, UNIT=unit, **constants,
    )  # fmt: skip
    first = call.zero + segment.lowest
    total[:, first : first + segment.width] += partial.sum(0)
