"""Launches the kernels segment by segment, so that the band of position scores never exceeds a fixed budget.

``options`` is the record of bestrq2/ops/chunked_attention/operator.py.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from ..tuning import load_configs
from .backward import chunked_attention_backward_key_kernel, chunked_attention_backward_query_kernel
from .forward import chunked_attention_forward_kernel
from .position import Band, make_band, row_stride
from .window import UNLIMITED

BAND_BYTES = 256 * 2**20
SEGMENT_ROWS = 128  # segments are multiples of it


def padded_dim(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def config_key(kernel: str, head_dim: int, dtype: torch.dtype) -> str:
    """Name of a configuration: kernel, head size rounded up to 64, 128 or 256, and ``/fp32`` for fp32."""
    return f"{kernel}/{max(64, padded_dim(head_dim))}{'/fp32' if dtype == torch.float32 else ''}"


def choose_config(configs: Mapping[str, Any], key: str, key_mask: bool) -> dict[str, Any]:
    """The tile of ``key``; with a key mask, which takes registers, that of ``<key>/key_mask`` where there is one."""
    return configs.get(f"{key}/key_mask", configs[key]) if key_mask else configs[key]


class _Call:
    """Arguments that all launches of a call share."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, options: Any) -> None:
        self.options = options
        self.query, self.key, self.value = (unit_stride(x) for x in (query, key, value))
        self.batch, self.heads, self.frames, self.head_dim = query.shape
        self.keys = key.shape[2]
        self.content_bias, self.lengths, self.starts, self.key_mask = (
            as_read(x) for x in (options.content_bias, options.lengths, options.starts, options.key_mask)
        )
        self.window = window_sizes(options)
        self.offset = options.query_offset

    def constants(self, kernel: str) -> dict[str, Any]:
        configs = load_configs("chunked_attention", self.query.device)
        key = config_key(kernel, self.head_dim, self.query.dtype)
        config = choose_config(configs, key, self.key_mask is not None)
        return {
            "HAS_BAND": self.options.position is not None,
            "HAS_CONTENT": self.content_bias is not None,
            "HAS_LENGTHS": self.lengths is not None,
            "HAS_STARTS": self.starts is not None,
            "HAS_KEY_MASK": self.key_mask is not None,
            # Read for fp32 only. Configurations of large heads replace it by "ieee": fewer registers, no matrix unit.
            "PRECISION": "tf32x3" if self.query.dtype == torch.float32 else "tf32",
            "BD": padded_dim(self.head_dim),
            **config,
        }

    def given(self) -> tuple[Tensor, ...]:
        """Content bias, lengths, starts, key mask; absent ones as any pointer, which their kernels never read."""
        absent, given = self.query, (self.content_bias, self.lengths, self.starts, self.key_mask)
        return tuple(absent if x is None else x for x in given)

    def offsets(self, begin: int, end: int) -> tuple[int, int]:
        """Bounds on query position - key over the visible pairs of rows [begin, end)."""
        chunk, left, right = self.window
        lowest = max(self.offset + begin - self.keys + 1, 1 - chunk - right)
        return lowest, max(min(self.offset + end - 1, chunk - 1 + left), lowest)

    def segments(self) -> Iterator[tuple[int, int]]:
        """Row ranges whose band fits the budget; one range when there are no positions."""
        rows = self.frames
        if self.options.position is not None:
            lowest, highest = self.offsets(0, self.frames)
            width = row_stride(highest - lowest + 1) * self.query.element_size()
            rows = BAND_BYTES // (width * self.batch * self.heads) // SEGMENT_ROWS * SEGMENT_ROWS
        rows = max(rows, SEGMENT_ROWS)
        for begin in range(0, self.frames, rows):
            yield begin, min(begin + rows, self.frames)

    def band(self, begin: int, end: int) -> Band | None:
        if self.options.position is None:
            return None
        query = self.query[:, :, begin:end]
        place = torch.arange(begin, end, device=query.device)[None] + self.offset
        padded = None
        if self.lengths is not None:
            padded = place >= self.lengths[:, None]
        if self.starts is not None:
            early = place < self.starts[:, None]
            padded = early if padded is None else padded | early
        bias, zero = self.options.position_bias, self.options.position_zero
        offsets = self.offsets(begin, end)
        rows = self.options.position.shape[1]
        offsets = (max(offsets[0], -zero), min(offsets[1], rows - 1 - zero))  # only where nothing is visible
        return make_band(query, self.options.position, bias, zero, offsets, self.offset + begin, padded)

    def sizes(self, begin: int, end: int, band: Band | None) -> tuple[Any, ...]:
        """The integer arguments from B to scale."""
        row, shift = 0, 0
        if band is not None:
            row = (band.row_stride - 1) // 16
            highest = band.table.shape[1] - 1 + self._lowest(begin, end)
            shift = (band.column + highest - self.offset - begin) // 16
        chunk, left, right = self.window
        shape = (self.batch, self.heads, self.frames, self.keys, self.head_dim)
        return (*shape, chunk, left, right, self.offset, begin, end, row, shift, self.options.scale)

    def _lowest(self, begin: int, end: int) -> int:
        return max(self.offsets(begin, end)[0], -self.options.position_zero)


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


def forward(query: Tensor, key: Tensor, value: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    """Return the output, in query's memory order, and the log-sum-exp of the scaled scores (B, H, Tq) in fp32."""
    result = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if not query.numel():
        return result, lse
    call = _Call(query, key, value, options)
    out = result if result.stride(-1) == 1 else torch.empty_like(query, memory_format=torch.contiguous_format)
    constants = call.constants("forward")
    with torch.cuda.device(query.device if query.device.type == "cuda" else -1):
        for begin, end in call.segments():
            band = call.band(begin, end)
            scores = call.query if band is None else band.start(band.fill().buffer)
            chunked_attention_forward_kernel[(triton.cdiv(end - begin, constants["BM"]), call.batch * call.heads)](
                call.query, call.key, call.value, out, lse, scores, *call.given(),
                *call.query.stride()[:3], *call.key.stride()[:3], *call.value.stride()[:3], *out.stride()[:3],
                0 if band is None else band.bh_stride, *call.sizes(begin, end, band), **constants,
            )  # fmt: skip
    return result if out is result else result.copy_(out), lse


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
    dq = torch.zeros_like(query)
    call = _Call(query, key, value, options)
    segments = list(call.segments())
    several = len(segments) > 1
    dk, dv = (torch.zeros(key.shape, dtype=torch.float32 if several else key.dtype, device=key.device) for _ in "kv")
    if query.numel() and key.numel():
        grad, out = unit_stride(grad.to(query.dtype)), unit_stride(out)
        delta = torch.empty_like(lse)
        with torch.cuda.device(query.device if query.device.type == "cuda" else -1):
            for begin, end in segments:
                segment = _backward_segment(call, begin, end, grad, out, lse, delta, dk, dv, sums, several)
                dq[:, :, begin:end] = segment
    frames = [dq, *(torch.empty_like(x).copy_(gradient) for x, gradient in ((key, dk), (value, dv)))]
    return (*frames, *(None if x is None else sums[name].to(x.dtype) for name, x in tables.items()))


def _backward_segment(
    call: _Call,
    begin: int,
    end: int,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    sums: dict[str, Tensor],
    accumulate: bool,
) -> Tensor:
    """Add one segment to dk, dv and the sums of the tables; return its query gradient (B, H, rows, d)."""
    band = call.band(begin, end)
    scores = call.query if band is None else band.start(band.fill().buffer)
    dband = call.query if band is None else torch.zeros_like(band.buffer)
    content = torch.empty(
        call.batch, call.heads, end - begin, call.head_dim, dtype=torch.float32, device=call.query.device
    )
    inputs = (call.query, call.key, call.value)
    strides = [size for x in inputs for size in x.stride()[:3]]
    bh_stride = 0 if band is None else band.bh_stride
    sizes, pairs, constants = call.sizes(begin, end, band), call.batch * call.heads, call.constants("backward_query")
    chunked_attention_backward_query_kernel[(triton.cdiv(end - begin, constants["BM"]), pairs)](
        *inputs, out, grad, lse, content, delta, scores, dband if band is None else band.start(dband), *call.given(),
        *strides, *out.stride()[:3], *grad.stride()[:3], bh_stride, *sizes, **constants,
    )  # fmt: skip
    constants = call.constants("backward_key")
    chunked_attention_backward_key_kernel[(triton.cdiv(call.keys, constants["BN"]), pairs)](
        *inputs, grad, lse, delta, dk, dv, scores, *call.given(),
        *strides, *grad.stride()[:3], bh_stride, *sizes, ACCUMULATE=accumulate, **constants,
    )  # fmt: skip

    scale = call.options.scale
    if call.content_bias is not None:
        sums["content_bias"] += content.sum((0, 2)) * scale
    if band is None:
        return content.mul_(scale)
    dscores = band.view(dband)  # (H, B * rows, W)
    by_position = torch.bmm(dscores, band.table).view(call.heads, call.batch, band.rows, call.head_dim)
    by_position = by_position[:, :, : end - begin].transpose(0, 1).float()
    if "position_bias" in sums:
        sums["position_bias"] += by_position.sum((0, 2)) * scale
    first = call.options.position_zero + call._lowest(begin, end)
    table = torch.bmm(dscores.transpose(1, 2), band.with_position).flip(1).float() * scale
    sums["position"][:, first : first + table.shape[1]] += table
    return content.add_(by_position).mul_(scale)
