"""Self-attention with Transformer-XL relative positions over chunks (``ops.chunked_attention``)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bestrq2 import ops
from bestrq2.ops import ChunkLayout

from .frame_grid import FrameGrid


@dataclass
class AttentionCache:
    """Keys and values ``(B, H, K, d)`` of the frames before, for streaming; K is a multiple of the chunk size."""

    key: Tensor
    value: Tensor

    def extend(self, key: Tensor, value: Tensor, layout: ChunkLayout) -> tuple[Tensor, Tensor]:
        """Join new frames to the cached ones; keep what later chunks can see."""
        key = torch.cat((self.key.to(key.dtype), key), dim=2)
        value = torch.cat((self.value.to(value.dtype), value), dim=2)
        kept = key.shape[2]
        if layout.left_context is not None and layout.chunk_size is not None:
            # Whole chunks, so that chunk borders keep their places; the window rule hides what is too old.
            kept = min(kept, -(-layout.left_context // layout.chunk_size) * layout.chunk_size)
        start = key.shape[2] - kept
        # Copies, so that dropped frames are freed.
        self.key, self.value = key[:, :, start:].detach().clone(), value[:, :, start:].detach().clone()
        return key, value


def relative_sinusoids(
    lowest: int, highest: int, width: int, symmetric: bool, device: torch.device, base: float = 10000.0
) -> Tensor:
    """Sinusoids of the offsets lowest..highest of query minus key: channels ``sin, cos, sin, cos, ...``.

    The sine is odd, so past and future differ (Dai et al., 2019); ``symmetric`` uses the distance alone, as SpeechBrain
    does.

    Shapes: -> ``(highest - lowest + 1, width)`` float32.
    """
    offset = torch.arange(lowest, highest + 1, device=device)
    offset = offset.abs() if symmetric else offset
    frequency = base ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angles = offset[:, None] * frequency
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


class RelativeAttention(nn.Module):
    """Multi-head attention with content and position terms, ``(q + u).k + (q + v).p``, inside the window of a layout.

    Args:
        width, heads: D and H.
        bias: biases of the query, key, value and output layers.
        scale_by_width: divide scores by sqrt(D), as SpeechBrain does, instead of sqrt(D / H).
    """

    def __init__(self, width: int, heads: int, bias: bool = True, scale_by_width: bool = False) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width if scale_by_width else width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.position = nn.Linear(width, width, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(heads, width // heads))
        self.position_bias = nn.Parameter(torch.zeros(heads, width // heads))
        self.proj = nn.Linear(width, width, bias=bias)

    def forward(
        self, x: Tensor, grid: FrameGrid, table: Tensor, layout: ChunkLayout, cache: AttentionCache | None = None
    ) -> Tensor:
        """Tokens ``(B, N, D)`` and sinusoids ``(R, D)`` of the layout's offsets -> ``(B, N, D)``."""
        frames = grid.to_frames(self.qkv(x))  # (B, T, 3 D)
        query, key, value = frames.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        position = self.position(table).unflatten(1, (self.heads, -1)).transpose(0, 1)  # (H, R, d)
        lengths, offset = grid.lengths, 0
        if cache is not None:
            offset = cache.key.shape[2]
            key, value = cache.extend(key, value, layout)
            lengths = None if lengths is None else lengths + offset
        mixed = ops.chunked_attention(
            query,
            key,
            value,
            chunk_size=layout.chunk_size,
            left_context=layout.left_context,
            right_context=layout.right_context,
            lengths=lengths,
            key_mask=None if grid.seen is None else grid.frame_valid,  # absent frames have zero keys, hidden here
            query_offset=offset,
            position=position,
            position_zero=-layout.offsets(query.shape[2], key.shape[2], query_offset=offset)[0],
            content_bias=self.content_bias,
            position_bias=self.position_bias,
            scale=self.scale,
        )
        return self.proj(grid.to_tokens(mixed.transpose(1, 2).flatten(2)))
