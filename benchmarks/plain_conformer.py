"""One-stage BEST-RQ with a Conformer in plain PyTorch, as SpeechBrain's recipe has it. Independent of ``bestrq2``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.plain_step import Quantizer, Sizes, Spectrogram


class RelativeAttention(nn.Module):
    """Transformer-XL attention: both score matrices in full, relative shift by pad and view."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.position = nn.Linear(width, width, bias=False)
        self.u, self.v = (nn.Parameter(torch.zeros(heads, 1, width // heads)) for _ in range(2))

    def forward(self, x: Tensor, table: Tensor, mask: Tensor) -> Tensor:
        B, T, D = x.shape
        H, d = self.heads, D // self.heads
        q, k, value = self.qkv(x).view(B, T, 3, H, d).permute(2, 0, 3, 1, 4)
        position = self.position(table.to(x.dtype)).view(2 * T - 1, H, d).permute(1, 2, 0)
        content = (q + self.u) @ k.transpose(-2, -1)
        shifted = F.pad((q + self.v) @ position, (1, 0)).view(B, H, 2 * T, T)[:, :, 1:]
        scores = (content + shifted.reshape(B, H, T, 2 * T - 1)[..., :T]) * d**-0.5 + mask
        return self.proj((scores.softmax(-1) @ value).transpose(1, 2).reshape(B, T, D))


class FeedForward(nn.Sequential):
    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), nn.Dropout(dropout), nn.Linear(hidden, width),
            nn.Dropout(dropout),
        )  # fmt: skip


class ConvolutionModule(nn.Module):
    def __init__(self, width: int, dropout: float, kernel: int = 31) -> None:
        super().__init__()
        self.norm, self.conv_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.first, self.last = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.first(self.norm(x)), -1)
        x = self.depthwise(x.transpose(1, 2)).transpose(1, 2)
        return self.dropout(self.last(F.silu(self.conv_norm(x))))


class Block(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.ff1, self.ff2 = (FeedForward(s.width, s.hidden, s.dropout) for _ in range(2))
        self.attn_norm, self.norm = nn.LayerNorm(s.width), nn.LayerNorm(s.width)
        self.attn, self.conv = RelativeAttention(s.width, s.heads), ConvolutionModule(s.width, s.dropout)
        self.dropout = nn.Dropout(s.dropout)

    def forward(self, x: Tensor, table: Tensor, mask: Tensor) -> Tensor:
        x = x + 0.5 * self.ff1(x)
        x = x + self.dropout(self.attn(self.attn_norm(x), table, mask))
        x = x + self.conv(x)
        return self.norm(x + 0.5 * self.ff2(x))


class OneStage(nn.Module):
    """Masked frames become noise, the encoder sees all. ``forward(waveform (B, S)) -> loss``."""

    SPAN = 4

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.s = s
        self.spectrogram, self.quantizer = Spectrogram(s), Quantizer(s)
        self.conv1 = nn.Conv2d(1, 64, 3, 2, padding=1)
        self.conv2 = nn.Conv2d(64, 32, 3, 2, padding=1)
        self.linear = nn.Linear(32 * (s.num_mels // 4), s.width)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.depth))
        self.norm, self.head = nn.LayerNorm(s.width), nn.Linear(s.width, s.codes)

    def table(self, frames: int, device: torch.device) -> Tensor:
        offset = torch.arange(frames - 1, -frames, -1, device=device)
        half = self.s.width // 2
        angles = offset[:, None] * 10000.0 ** (-torch.arange(half, device=device) / half)
        return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)

    def mask(self, frames: int, device: torch.device) -> Tensor:
        """``(T,)`` bool: spans in random order until the share is reached."""
        masked = torch.zeros(frames, dtype=torch.bool)
        for start in torch.randperm(frames).tolist():
            if int(masked.sum()) >= int(frames * self.s.ratio):
                break
            masked[start : start + self.SPAN] = True
        return masked.to(device)

    def forward(self, waveform: Tensor) -> Tensor:
        s = self.s
        patches = self.spectrogram(waveform)  # (B, T, F * 4)
        masked = self.mask(patches.shape[1], waveform.device)
        codes = self.quantizer(patches[:, masked])
        patches = torch.where(masked[:, None], 0.1 * torch.randn_like(patches), patches)
        frames = patches.unflatten(2, (s.num_mels, s.patch_width)).transpose(2, 3).flatten(1, 2)[:, None]
        x = F.relu(self.conv2(F.relu(self.conv1(frames))))  # (B, 32, T, F / 4)
        x = self.linear(x.transpose(1, 2).flatten(2))
        table = self.table(x.shape[1], x.device)
        mask = x.new_zeros(1, 1, x.shape[1], x.shape[1])
        for block in self.blocks:
            x = block(x, table, mask)
        return F.cross_entropy(self.head(self.norm(x)[:, masked]).flatten(0, 1), codes.flatten())
