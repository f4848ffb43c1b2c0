"""Specification of chunked attention with relative positions: the literal definition, T x T and all."""

from typing import Any

import torch
from torch import Tensor

from .layout import ChunkLayout


def chunked_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """See :func:`bestrq2.ops.chunked_attention`, whose keywords these are (without ``backend``).

    Differentiable by autograd, any floating dtype, O(Tq * Tk) memory.
    """
    return forward(query, key, value, **options)[0]


def forward(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The output in query's dtype, and the log-sum-exp (B, H, Tq) of each row's scores.

    16-bit inputs are computed in fp32, as by the kernels: the score of two fp16 vectors may lie beyond 65504.
    """
    dtype = query.dtype
    if dtype.itemsize == 2:
        query, key, value = query.float(), key.float(), value.float()
        tables = ("position", "content_bias", "position_bias")
        options |= {name: x.float() for name, x in options.items() if name in tables and x is not None}
    score, visible, value = scores(query, key, value, **options)
    return attend(score, visible, value).to(dtype), logsumexp(score, visible)


def attend(score: Tensor, visible: Tensor, value: Tensor) -> Tensor:
    """Average the values with the softmax of the visible scores; a row that sees nothing gives exactly 0."""
    weights = score.masked_fill(~visible, torch.finfo(score.dtype).min).softmax(-1)
    return weights.masked_fill(~visible, 0) @ value


def logsumexp(score: Tensor, visible: Tensor) -> Tensor:
    """Log-sum-exp (B, H, Tq) of each row's visible scores, 0 for a row that sees nothing."""
    return score.masked_fill(~visible, -torch.inf).logsumexp(-1).masked_fill(~visible.any(-1), 0)


def scores(
    query: Tensor,  # (B, H, Tq, d)
    key: Tensor,  # (B, H, Tk, d)
    value: Tensor,  # (B, H, Tk, d)
    *,
    chunk_size: int | None = None,
    left_context: int | None = None,
    right_context: int | None = 0,
    lengths: Tensor | None = None,  # (B,)
    starts: Tensor | None = None,  # (B,)
    key_mask: Tensor | None = None,  # (B, Tk) bool
    query_offset: int = 0,
    position: Tensor | None = None,  # (H, R, d)
    position_zero: int | None = None,
    content_bias: Tensor | None = None,  # (H, d)
    position_bias: Tensor | None = None,  # (H, d)
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scaled scores (B, H, Tq, Tk), which of them are visible, and the values with their padding zeroed.

    In the dtype of the inputs: what plain PyTorch makes of them.
    """
    frames, keys = query.shape[2], key.shape[2]
    i = torch.arange(frames, device=query.device) + query_offset
    j = torch.arange(keys, device=query.device)
    layout = ChunkLayout(chunk_size, left_context, right_context)
    visible = layout.mask(frames, keys, query_offset=query_offset, device=query.device)
    # Padding is zeroed on entry, so that NaN in it reaches neither the output nor a gradient.
    for padded_i, padded_j in _padding(i, j, lengths, starts):  # (B, Tq), (B, Tk)
        query = query.masked_fill(padded_i[:, None, :, None], 0)
        key, value = (x.masked_fill(padded_j[:, None, :, None], 0) for x in (key, value))
        visible = visible & ~padded_i[..., :, None] & ~padded_j[..., None, :]
    if key_mask is not None:
        key, value = (x.masked_fill(~key_mask[:, None, :, None], 0) for x in (key, value))
        visible = visible & key_mask[:, None, :]
    visible = visible if visible.dim() == 2 else visible[:, None]  # (Tq, Tk) or (B, 1, Tq, Tk)

    with_content = query if content_bias is None else query + content_bias[:, None]
    score = with_content @ key.transpose(-1, -2)  # (B, H, Tq, Tk)
    if position is not None:
        with_position = query if position_bias is None else query + position_bias[:, None]
        by_offset = with_position @ position.transpose(-1, -2)  # (B, H, Tq, R)
        zero = (position.shape[1] - 1) // 2 if position_zero is None else position_zero
        row = (zero + i[:, None] - j).clamp(0, position.shape[1] - 1)  # clamped rows are invisible
        score = score + by_offset.gather(-1, row.expand(*score.shape))
    return score * (query.shape[-1] ** -0.5 if scale is None else scale), visible, value


def _padding(i: Tensor, j: Tensor, lengths: Tensor | None, starts: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Masks of the query and key positions outside [starts, lengths), one pair for each given bound."""
    bounds = []
    if lengths is not None:
        bounds.append((i >= lengths[:, None], j >= lengths[:, None]))
    if starts is not None:
        bounds.append((i < starts[:, None], j < starts[:, None]))
    return bounds
