"""Convolutional subsampling of log-mel frames that never reads beyond the frames of its own token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .precision import like_weight


class ConvSubsampling(nn.Module):
    """Stages of 3 x 3 convolution with stride 2 in time and frequency, ReLU; then a linear layer.

    Output n of a stage reads its inputs 2n - 1, 2n and 2n + 1, so that token n depends on the ``factor`` frames
    ``factor * n .. factor * (n + 1) - 1``, which its target is made of, and on ``factor - 1`` frames before, never on
    later ones: the same subsampling serves full context and streaming, which keeps one frame per stage.

        frames     0 1 2 3 | 4 5 6 7 |
        stage 1        0 1 |   2   3          output 2 reads frames 3 4 5
        stage 2          0 |       1          token 1 reads stage-1 outputs 1 2 3, that is frames 1 .. 7

    Args:
        num_mels: F.
        width: D of the tokens.
        channels: of each stage; 2 stages subsample by 4, 3 by 8.

    Shapes:
        frames ``(B, factor * N, F)``, present ``(B, N)`` bool or None, past: one tensor per stage from
        :meth:`start_past` or None -> ``(B, N, D)``. Frames of tokens that are not present are zero for every stage.
    """

    def __init__(self, num_mels: int, width: int, channels: tuple[int, ...] = (64, 32)) -> None:
        super().__init__()
        if not channels or min(channels) < 1:
            raise ValueError(f"expected the channels of at least one stage, got {channels}")
        self.factor = 2 ** len(channels)
        self.bands = [num_mels]
        stages = []
        for before, after in zip((1, *channels), channels):
            stages.append(nn.Conv2d(before, after, 3, stride=2, padding=(0, 1)))
            self.bands.append((self.bands[-1] + 1) // 2)
        self.stages = nn.ModuleList(stages)
        self.linear = nn.Linear(channels[-1] * self.bands[-1], width)

    def start_past(self, num_clips: int, like: Tensor) -> list[Tensor]:
        """Streaming state: every stage's last input frame ``(B, channels, 1, bands)``; zeros at the start."""
        convolutions = [stage for stage in self.stages if isinstance(stage, nn.Conv2d)]
        return [like.new_zeros(num_clips, c.in_channels, 1, f) for c, f in zip(convolutions, self.bands)]

    def forward(self, frames: Tensor, present: Tensor | None = None, past: list[Tensor] | None = None) -> Tensor:
        x = like_weight(frames, self.stages[0])[:, None]  # (B, 1, T, F)
        for number, stage in enumerate(self.stages):
            if present is not None:
                rate = self.factor >> number
                x = x * present.repeat_interleave(rate, dim=1)[:, None, :, None]
            if past is None:
                x = F.pad(x, (0, 0, 1, 0))
            else:
                x = torch.cat((past[number].to(x.dtype), x), dim=2)
                past[number] = x[:, :, -1:].detach()
            x = F.relu(stage(x))
        return self.linear(x.transpose(1, 2).flatten(2))

    def flops(self, tokens: int) -> float:
        """Matrix-product operations of one pass over one clip."""
        total = 2.0 * tokens * self.linear.weight.numel()
        for number, stage in enumerate(self.stages):
            outputs = tokens * (self.factor >> (number + 1)) * self.bands[number + 1]
            total += 2.0 * outputs * stage.weight.numel()  # type: ignore[union-attr, operator]
        return total
