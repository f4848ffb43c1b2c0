"""Argument checks of ``chunked_attention``."""

import torch
from torch import Tensor

from ..common.shapes import check_devices, check_shapes
from .layout import ChunkLayout

OFFSET_BITS = 29
"""Of ``query_offset``: the positions of the Triton kernels are int32 (kernels/chunked_attention/window.py)."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def autocast(*frames: Tensor) -> tuple[Tensor, ...]:
    """Inputs of a product under autocast: every floating tensor but float64 in autocast's dtype."""
    device = frames[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return frames
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in frames)


def in_dtype_of(query: Tensor, op: str, tables: dict[str, Tensor | None]) -> tuple[Tensor | None, ...]:
    """Tables, which are often parameters in fp32, in query's dtype."""
    for name, x in tables.items():
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{op}: {name} must be floating, got {x.dtype}")
    return tuple(None if x is None else x.to(query.dtype) for x in tables.values())


def validate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor | None,
    content_bias: Tensor | None,
    position_bias: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    key_mask: Tensor | None,
) -> None:
    """Raise ValueError for what no backend accepts; looks at no value of a tensor."""
    op = "chunked_attention"
    check_shapes(
        op,
        query=(query, "B H Tq d"),
        key=(key, "B H Tk d"),
        value=(value, "B H Tk d"),
        position=(position, "H R d"),
        content_bias=(content_bias, "H d"),
        position_bias=(position_bias, "H d"),
        lengths=(lengths, "B"),
        starts=(starts, "B"),
        key_mask=(key_mask, "B Tk"),
    )
    if query.shape[1] < 1 or query.shape[3] < 1:
        raise ValueError(f"{op}: query must have at least one head and one channel, got {tuple(query.shape)}")
    if query.dtype not in DTYPES:
        raise ValueError(f"{op}: query must be fp32, bf16, fp16 or fp64, got {query.dtype}")
    if key.dtype != query.dtype or value.dtype != query.dtype:
        raise ValueError(
            f"{op}: query, key and value must share a dtype, got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    for name, bound in (("lengths", lengths), ("starts", starts)):
        if bound is not None and bound.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{op}: {name} must be int32 or int64, got {bound.dtype}")
    if key_mask is not None and key_mask.dtype != torch.bool:
        raise ValueError(f"{op}: key_mask must be bool, got {key_mask.dtype}")
    if position_bias is not None and position is None:
        raise ValueError(f"{op}: position_bias needs position, got position=None")
    tables = {"position": position, "content_bias": content_bias, "position_bias": position_bias}
    check_devices(op, query=query, key=key, value=value, lengths=lengths, starts=starts, key_mask=key_mask, **tables)


def check_table(
    position: Tensor, zero: int, layout: ChunkLayout, query_length: int, key_length: int, query_offset: int
) -> None:
    lowest, highest = layout.offsets(query_length, key_length, query_offset=query_offset)
    if (
        query_length
        and key_length
        and lowest <= highest
        and not 0 <= zero + lowest <= zero + highest < len(position[0])
    ):
        raise ValueError(
            f"chunked_attention: the window has offsets {lowest} to {highest}, rows {zero + lowest} to "
            f"{zero + highest} with position_zero={zero}, but position has rows 0 to {position.shape[1] - 1}"
        )
