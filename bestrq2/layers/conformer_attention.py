"""Self-attention with Transformer-XL relative positions over chunks (``ops.chunked_attention``)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bestrq2 import ops
from bestrq2.ops import ChunkLayout

from .masking import MaskPlan, valid_mask


@dataclass(frozen=True)
class FrameGrid:
    """Where tokens stand in time. Feed-forward layers work on tokens, attention and convolution on frames.

    With ``seen=None`` token t is frame t. Otherwise (two-step pretraining) there are tokens for some frames only, and
    the other frames are absent: zero for the convolution and invisible to attention.

    Attributes:
        num_frames: T.
        lengths: ``(B,)`` int64 on the device, valid frames of every clip; None: all T.
        frame_valid: ``(B, T)`` bool, frames that hold a token; None: all.
        seen: ``(B, N)`` int64 frame of every token, or None.
        token_valid: ``(B, N)`` bool, tokens that are no filler; None: all.
    """

    num_frames: int
    lengths: Tensor | None = None
    frame_valid: Tensor | None = None
    seen: Tensor | None = None
    token_valid: Tensor | None = None

    @classmethod
    def whole(cls, num_frames: int, lengths: Tensor | None, device: torch.device) -> "FrameGrid":
        """All frames of clips with ``lengths (B,)`` valid frames on the CPU (None: all)."""
        valid = None if lengths is None else valid_mask(lengths, num_frames, device)
        if valid is None or lengths is None:
            return cls(num_frames)
        return cls(num_frames, lengths.to(device, non_blocking=True), valid, None, valid)

    @classmethod
    def of_seen(cls, plan: MaskPlan, num_frames: int) -> "FrameGrid":
        """Only the frames that a mask plan leaves to the encoder."""
        device = plan.seen.device
        token_valid = valid_mask(plan.seen_lengths, plan.seen.shape[1], device)
        index = plan.seen if token_valid is None else torch.where(token_valid, plan.seen, num_frames)
        frame_valid = torch.zeros(len(index), num_frames + 1, dtype=torch.bool, device=device)
        frame_valid = frame_valid.scatter_(1, index, True)[:, :num_frames]
        lengths = (plan.seen_lengths + plan.predicted_lengths).to(device, non_blocking=True)
        return cls(num_frames, lengths, frame_valid, plan.seen, token_valid)

    def to_frames(self, x: Tensor) -> Tensor:
        """Tokens ``(B, N, X)`` -> frames ``(B, T, X)``, zero where there is no token."""
        if self.seen is None:
            return x if self.frame_valid is None else x.masked_fill(~self.frame_valid[..., None], 0)
        index = self.seen if self.token_valid is None else torch.where(self.token_valid, self.seen, self.num_frames)
        frames = x.new_zeros(x.shape[0], self.num_frames + 1, x.shape[2])
        return frames.scatter(1, index[..., None].expand_as(x), x)[:, : self.num_frames]

    def to_tokens(self, frames: Tensor) -> Tensor:
        """Inverse of :meth:`to_frames`."""
        if self.seen is None:
            return frames
        return frames.gather(1, self.seen[..., None].expand(-1, -1, frames.shape[-1]))


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
