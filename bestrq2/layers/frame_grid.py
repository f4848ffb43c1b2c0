"""Tokens of a Conformer and the frames they stand for, where some frames are absent."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .masking import MaskPlan
from .padding import valid_mask


@dataclass(frozen=True)
class FrameGrid:
    """Positions of tokens in time. Feed-forward layers work on tokens, attention and convolution on frames.

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
        lengths = (plan.seen_lengths + plan.masked_lengths).to(device, non_blocking=True)
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
