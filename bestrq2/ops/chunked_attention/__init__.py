"""Attention in chunks with Transformer-XL relative positions: memory linear in the length, deterministic gradients."""

import torch
from torch import Tensor

from ..common.arguments import integer, number, require_tensors
from ..common.dispatch import Backend, requested
from ..common.transforms import refuse_transforms
from .checks import OFFSET_BITS, autocast, in_dtype_of, validate
from .layout import ChunkLayout
from .operator import Options

__all__ = ["ChunkLayout", "chunked_attention"]


def chunked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    chunk_size: int | None = None,
    left_context: int | None = None,
    right_context: int | None = 0,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_offset: int = 0,
    position: Tensor | None = None,
    position_zero: int | None = None,
    content_bias: Tensor | None = None,
    position_bias: Tensor | None = None,
    scale: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Attend to the own chunk and its context, with relative positions (Dai et al., Transformer-XL, 2019).

    The query in row i stands at position ``n = i + query_offset``, in chunk ``c = n // chunk_size``. It sees key j iff

        c * chunk_size - left_context <= j < (c + 1) * chunk_size + right_context
        and   starts[b] <= j < lengths[b]   and   key_mask[b, j]

    For chunk_size 4, left_context 3, right_context 2 (x: own chunk, <: left context, >: right context):

        key    0 1 2 3 4 5 6 7 8 9
        n=0-3  x x x x > >
        n=4-7    < < < x x x x > >
        n=8-9            < < < x x        the last chunk is just shorter

    ``chunk_size=1`` is a sliding band, ``None`` full attention; see :class:`bestrq2.ops.ChunkLayout` for the settings
    of SpeechBrain, WeNet, NeMo and icefall. The score of a visible pair is

        ((q_i + content_bias) . k_j + (q_i + position_bias) . position[h, position_zero + n - j]) * scale

    A padded query (``starts``/``lengths`` given and its position outside them) and a query that sees no key give
    exactly 0 and zero gradients. Padding and masked keys are never read, so they may hold NaN. Nothing of size Tq x Tk
    is stored (except by the reference backend). Results and gradients are bit-deterministic and do not depend on the
    number of threads. Inside autocast the inputs are cast to the autocast dtype; scores and sums are fp32 whatever the
    dtype.

    Compared with ``torch.nn.functional.scaled_dot_product_attention``: there is no ``attn_mask`` and no dropout.
    ``key_mask`` is True where a key is **visible**, as in its boolean masks and opposite to the ``key_padding_mask`` of
    ``nn.MultiheadAttention``. ``is_causal=True`` is ``chunk_size=1``. Rows that see nothing give 0 instead of NaN.

    ``left_context`` defaults to everything: the past costs no latency. ``right_context`` defaults to 0: every frame of
    it is latency, so looking ahead has to be asked for. With ``chunk_size=None`` neither has an effect.

    Args:
        query: (B, H, Tq, d), fp32, bf16, fp16 or fp64, of any strides; d <= 256 for the compiled backends, which do not
            take fp64.
        key: (B, H, Tk, d), dtype of query.
        value: (B, H, Tk, d), dtype of query.
        chunk_size: frames per chunk, counted from position 0 whatever the offset; None: one chunk for everything.
        left_context: frames visible before the chunk; None: all.
        right_context: frames visible after the chunk; None: all.
        lengths: (B,) int32 or int64, first padded position of each item; None: nothing is padded.
        starts: (B,) int32 or int64, first valid position of each item (caches that are not yet full); None: 0.
        key_mask: (B, Tk) bool, False hides a key anywhere in an item, from every query and head; None: hides nothing.
            Prefer lengths and starts for padding at the ends: they also skip its work and zero the padded queries.
        query_offset: position of query row 0 (streaming: the number of cached keys in front of it), below 2^29.
        position: (H, R, d) table of relative positions, row ``position_zero + n - j``. Must have a row for each
            visible offset (:meth:`ChunkLayout.offsets`). Tables ordered by j - n: pass ``position.flip(1)``.
        position_zero: row of offset 0; default (R - 1) // 2.
        content_bias: (H, d), Transformer-XL's u.
        position_bias: (H, d), Transformer-XL's v; needs ``position``.
        scale: factor of both terms; default 1 / sqrt(d).
        backend: "triton", "cpu", "reference"; None: the first that can run the call. position and the biases are
            converted to query's dtype.

    Returns:
        (B, H, Tq, d) in query's dtype and memory order. Differentiable once in query, key, value, position and biases,
        not by ``torch.func.grad``.

    Raises:
        TypeError: for what is no tensor, integer or number where one is expected.
        ValueError: for wrong shapes, dtypes or settings, and for a table that lacks a visible offset.
        RuntimeError: if the requested backend cannot run the call.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 100, 64)
        >>> position = torch.randn(4, 2 * 100 - 1, 64)
        >>> chunked_attention(q, k, v, chunk_size=16, left_context=32, position=position).shape
        torch.Size([2, 4, 100, 64])
    """
    op = "chunked_attention"
    tables = {"position": position, "content_bias": content_bias, "position_bias": position_bias}
    bounds = {"lengths": lengths, "starts": starts, "key_mask": key_mask}
    require_tensors(op, {"query": query, "key": key, "value": value}, {**bounds, **tables})
    query, key, value = autocast(query, key, value)
    position, content_bias, position_bias = in_dtype_of(query, op, tables)
    refuse_transforms(op, query, key, value, position, content_bias, position_bias)
    layout = ChunkLayout(chunk_size, left_context, right_context)  # raises for impossible settings
    validate(query, key, value, position, content_bias, position_bias, lengths, starts, key_mask)
    if position_zero is None:
        position_zero = 0 if position is None else (position.shape[1] - 1) // 2
    options = Options(
        position,
        content_bias,
        position_bias,
        lengths,
        starts,
        key_mask,
        layout.chunk_size,
        layout.left_context,
        layout.right_context,
        integer(f"{op}: query_offset", query_offset, 0, bits=OFFSET_BITS),
        integer(f"{op}: position_zero", position_zero),
        query.shape[-1] ** -0.5 if scale is None else number(f"{op}: scale", scale),
        requested(backend),
    )
    out, _ = torch.ops.bestrq2.chunked_attention.default(query, key, value, *options)
    return out
